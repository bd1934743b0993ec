"""One rank of test_stream.py: walks the steps of a recipe as training does and writes down what it
saw."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch.utils.data import DataLoader

from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import Batch, RankStep
from genrec_dist.data.word_table import WordTable
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.setup import build_setup

# (user row, item rows that are seen, [(number of the mask, item rows behind it), ...])
Sample = tuple[int, tuple[int, ...], tuple[tuple[int, tuple[int, ...]], ...]]


@dataclass(frozen=True)
class Seen:
    """One rank's share of a step, read back out of its arrays."""

    samples: list[Sample]
    num_samples: int
    num_padding: int
    num_padding_rows: int
    """Encoder rows without a label."""
    digest: int


def walk(data: StepBatches, steps: range, workers: int, words: WordTable) -> list[Seen]:
    """The steps as the loop of training gets them."""
    options = {"num_workers": workers, "prefetch_factor": 4 if workers else None}
    loader: Iterable[RankStep] = DataLoader(data, sampler=steps, batch_size=None, **options)
    item_of = items_by_tokens(words)
    return [read_back(share, words, item_of) for share in loader]


def items_by_tokens(words: WordTable) -> dict[tuple[int, ...], int]:
    tokens, offsets = words.tokens_of_items()
    items = np.split(tokens, offsets[1:-1])
    return {tuple(item.tolist()): row for row, item in enumerate(items)}


def read_back(share: RankStep, words: WordTable, item_of: dict[tuple[int, ...], int]) -> Seen:
    samples: list[Sample] = []
    num_without = 0
    for batch in share.micro_batches:
        found = samples_of(batch, words, item_of)
        samples += [sample for sample in found if sample[2]]
        num_without += sum(not sample[2] for sample in found)
    return Seen(samples, share.num_samples, share.num_padding, num_without, share.samples_digest)


def samples_of(batch: Batch, words: WordTable, item_of: dict[tuple[int, ...], int]) -> list[Sample]:
    targets: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in batch.encoder.input_ids]
    masks = words.tokens[words.offsets[2] : words.offsets[2 + words.num_masks]].tolist()
    decoder = (batch.encoder_row, batch.labels, batch.decoder_input_ids)
    for row, labels, inputs in zip(*(array.tolist() for array in decoder), strict=True):
        tokens = [token for token in labels if token >= 0]
        if tokens:  # the last one is </s>
            targets[row].append((masks.index(inputs[0]), (item_of[tuple(tokens[:-1])],)))
    encoder = batch.encoder
    rows = zip(encoder.user_rows.tolist(), encoder.item_rows.tolist(), targets, strict=True)
    return [(max(users) - 1, collapsed(items), tuple(sorted(own))) for users, items, own in rows]


def collapsed(rows: list[int]) -> tuple[int, ...]:
    """An item's tokens as one item; no user of this data takes an item twice."""
    return tuple(row - 1 for row in dict.fromkeys(rows) if row)


def main() -> None:
    recipe, out = load_recipe(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    ranks = Ranks()
    setup, _ = ranks.run_on_all(lambda: build_setup(recipe))
    data = StepBatches(setup.stages, setup.reader, setup.layout, recipe, ranks.rank, ranks.size)
    seen = walk(data, range(setup.stages[-1].end_step), recipe.workers, setup.words)
    digests = [
        sum(theirs) % 2**64
        for theirs in zip(*ranks.exchange([step.digest for step in seen]), strict=True)
    ]
    report = {"steps": [asdict(step) for step in seen], "digests": digests}
    (out / f"rank-{ranks.rank}.json").write_text(json.dumps(report), encoding="utf-8")
    ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
