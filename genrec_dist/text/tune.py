"""The settings of the text term chosen on validation."""

# U users, B users of a batch, N items

from __future__ import annotations

from dataclasses import replace

import numpy as np
from genrec_shards.dataset import Dataset
from genrec_shards.histories import histories, sample_users, windows

from genrec_dist.evaluation.metrics import TOP, metrics_from_histogram, rank_histogram
from genrec_dist.evaluation.score_mixture import TextTerm
from genrec_dist.text.similarity import TextSimilarity, shares_of, text_rows

HISTORIES = ((1, 1.0), (3, 0.6), (8, 0.6), (8, 0.8), (20, 0.9), (50, 0.95))
"""What is tried for (recent, decay)."""
POWERS = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0)
UNIFORM = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Uniform shares that are mixed in, to compare powers."""
MOST_USERS = 2000
"""Validation users that are scored, a seeded sample."""
_ENTRIES_AT_ONCE = 4_000_000


def tune_text(dataset: Dataset, source: str) -> TextTerm:
    """A term of weight 0: how much of the history counts, by NDCG@10 of the texts alone on
    validation, and then the power under which the targets are most likely (no power changes a
    ranking).

    Users whose target repeats their history are not scored. Nothing is learned from any other
    interaction than these targets and their histories.

    Args:
        dataset: Whose items have texts.
        source: As of `TextTerm`.

    Raises:
        ValueError: As `item_vectors`.
    """
    sequences = dataset.sequences
    users = sequences.history_and_target("validation").users
    users = users[sample_users(len(users), MOST_USERS, 0)]
    past = histories(sequences, "validation", users)
    users = users[~past.holds(np.arange(past.num_users), past.targets_U)]
    rows, at_once = text_rows(dataset, source), max(1, _ENTRIES_AT_ONCE // sequences.num_items)
    best, best_ndcg = TextTerm(source=source), -1.0
    if not len(users):
        return best
    for recent, decay in HISTORIES:
        term, counts = replace(best, recent=recent, decay=decay), np.zeros(TOP + 1, np.int64)
        for part in windows(users, at_once):
            past = histories(sequences, "validation", part)
            near_BN = TextSimilarity(rows, term).cosines(past.items, past.offsets)
            target_B1 = near_BN[np.arange(len(part)), past.targets_U][:, None]
            # Ties rank above the target, and what is not near at all is not listed.
            ranks_B = np.where(target_B1[:, 0] > 0, (near_BN >= target_B1).sum(1), 0)
            counts += rank_histogram(np.where(ranks_B <= TOP, ranks_B, 0))
        ndcg = metrics_from_histogram(counts)["NDCG@10"]
        if ndcg > best_ndcg:
            best, best_ndcg = term, ndcg
    logp_PE = np.zeros((len(POWERS), len(UNIFORM)))
    uniform_E = np.array(UNIFORM)
    for part in windows(users, at_once):
        past = histories(sequences, "validation", part)
        near_BN = TextSimilarity(rows, best).cosines(past.items, past.offsets)
        for place, power in enumerate(POWERS):
            share_B = shares_of(near_BN, power)[np.arange(len(part)), past.targets_U]
            mixed_BE = (1 - uniform_E) * share_B[:, None] + uniform_E / sequences.num_items
            logp_PE[place] += np.log(mixed_BE).sum(0)
    return replace(best, power=POWERS[int(logp_PE.max(1).argmax())])
