"""A synthetic catalogue whose best possible recommendations are known: the demo's ceiling."""

from dataclasses import dataclass

import numpy as np

from genrec_shards.sequences import Sequences, flat_ranges, sequences_from_ids
from genrec_shards.splits import Split

# U users, N items, G groups, M items of a group, K classes of groups, C = K * G + G contexts, L
# items of a history.

RULE_PROBABILITY, FIRST_ORDER_PROBABILITY = 0.8, 0.08
"""Shares of the second-order rule and of the first-order table."""
ZIPF_EXPONENT = 1.3
"""Of the popularity within a group."""
_CHUNK = 512


@dataclass(frozen=True, eq=False)
class Process:
    """A noisy second-order process over items in hidden groups.

    The next item's group is drawn from a mixture: with `RULE_PROBABILITY` it is `pair_table[class
    of the group before the last, last group]`, with `FIRST_ORDER_PROBABILITY` it is
    `first_order_table[last group]`, otherwise any group. Within the group items follow a Zipf law.
    An item that the user has had is never drawn again: the rest is renormalised. After one item the
    rule's share goes to the first-order table; the first item's group is any one."""

    seed: int
    group_of: np.ndarray
    """int32[N], the hidden group of each item; item n has the id str(n + 1), which tells nothing of
    it."""
    members: np.ndarray
    """int32[G, M], the items of each group, the most popular first."""
    class_of: np.ndarray
    """int32[G], how the rule sees the group before the last: K classes."""
    pair_table: np.ndarray
    """int32[K, G]; each row is a permutation, so that all groups stay equally popular."""
    first_order_table: np.ndarray
    """int32[G], a permutation."""
    rank_probabilities: np.ndarray
    """float64[M], Zipf law within a group."""

    @property
    def num_items(self) -> int:
        return len(self.group_of)

    def sample(self, num_users: int, min_length: int, max_length: int, seed: int = 0) -> Sequences:
        """Sequences whose catalogue holds the items that occur, as if read from a file.

        Args:
            num_users: sequences to draw.
            min_length, max_length: items per user, drawn evenly from this range.
            seed: of the sample, besides the process's own.

        Raises:
            ValueError: the lengths leave no room for a split, or need more than half of the
                catalogue.
        """
        if not 3 <= min_length <= max_length <= self.num_items // 2:
            choices = f"3 <= min_length <= max_length <= {self.num_items // 2}"
            raise ValueError(f"lengths {min_length}..{max_length}: choose {choices}")
        rng = np.random.default_rng([self.seed, 1, seed])
        lengths = rng.integers(min_length, max_length + 1, num_users)
        items = np.empty((num_users, max_length), dtype=np.int32)
        seen = np.zeros((num_users, self.num_items), dtype=bool)
        for step in range(max_length):  # all users take one step together
            users = np.arange(num_users)
            # What a user has had is drawn again until it is new: that is the renormalised
            # distribution itself.
            while len(users):
                last_groups = self.group_of[items[users, max(step - 2, 0) : step]]
                groups = self._draw_groups(rng, last_groups)
                weights = self.rank_probabilities
                drawn = self.members[groups, rng.choice(len(weights), len(users), p=weights)]
                is_new = ~seen[users, drawn]
                items[users[is_new], step] = drawn[is_new]
                seen[users[is_new], drawn[is_new]] = True
                users = users[~is_new]
        kept = items[np.arange(max_length) < lengths[:, None]]
        names = np.array([str(item + 1) for item in range(self.num_items)], dtype=object)
        user_ids = [str(user + 1) for user in range(num_users)]
        return sequences_from_ids(user_ids, lengths, names[kept].tolist())

    def oracle_lists(self, sequences: Sequences, split: Split, top: int = 20) -> np.ndarray:
        """For each user the most probable next items, best first: no recommender can do better on
        average.

        The user's history is excluded, ties go to the lower row.

        Args:
            sequences: of this process; they may come from a file.
            split: what comes next.
            top: length of a list.

        Returns:
            int32[U, top], item rows of `sequences`.

        Raises:
            ValueError: an id is none of this process's own.
        """
        view = sequences.history_and_target(split)
        number_of = {str(item + 1): item for item in range(self.num_items)}
        foreign = next((item for item in sequences.item_ids if item not in number_of), None)
        if foreign is not None:
            own = f"none of this process's 1..{self.num_items}"
            raise ValueError(f"item {foreign[:40]!r} is {own}: sample it anew")
        numbers = np.array([number_of[item] for item in sequences.item_ids], dtype=np.int64)

        # The distribution after each context, before history is taken out: a class of the group
        # before the last and the last group, then, for a history of one item, the last group alone.
        num_classes, num_groups = self.pair_table.shape
        examples = [int(np.flatnonzero(self.class_of == one)[0]) for one in range(num_classes)]
        pairs = [[before, last] for before in examples for last in range(num_groups)]
        contexts = [*pairs, *([last] for last in range(num_groups))]
        by_context = np.stack([self._item_probabilities(np.array(groups)) for groups in contexts])
        by_context = by_context[:, numbers]  # [C, items of the sequences]

        groups, lengths = self.group_of[numbers], view.ends - view.starts
        last = groups[view.items[view.ends - 1]]
        before = groups[view.items[np.maximum(view.ends - 2, 0)]]
        first_part = np.where(lengths > 1, self.class_of[before], num_classes)
        context_U = first_part * num_groups + last
        lists = np.empty((sequences.num_users, top), dtype=np.int32)
        for first in range(0, sequences.num_users, _CHUNK):
            chunk = slice(first, first + _CHUNK)
            scores = -by_context[context_U[chunk]]
            users = np.repeat(np.arange(len(scores)), lengths[chunk])
            scores[users, view.items[flat_ranges(view.starts[chunk], lengths[chunk])]] = 1.0
            lists[chunk] = np.argsort(scores, axis=1, kind="stable")[:, :top]
        return lists

    def _draw_groups(self, rng: np.random.Generator, groups: np.ndarray) -> np.ndarray:
        """int[B]: the next group after `groups`, int[B, 0..2]."""
        size, known = groups.shape
        coin = rng.random(size)
        drawn = rng.integers(0, len(self.members), size=(size,))
        if known == 0:
            return drawn
        first_order = self.first_order_table[groups[:, -1]]
        by_rule = first_order
        if known == 2:
            by_rule = self.pair_table[self.class_of[groups[:, 0]], groups[:, 1]]
        either = RULE_PROBABILITY + FIRST_ORDER_PROBABILITY
        drawn = np.where(coin < either, first_order, drawn)
        return np.where(coin < RULE_PROBABILITY, by_rule, drawn)

    def _item_probabilities(self, groups: np.ndarray) -> np.ndarray:
        """float64[N]: the next item's distribution after `groups`, int[0..2], before history is
        taken out."""
        num_groups = len(self.members)
        rest = 1 - RULE_PROBABILITY - FIRST_ORDER_PROBABILITY
        by_group = np.full(num_groups, (rest if len(groups) else 1) / num_groups)
        if len(groups):
            by_rule = first_order = self.first_order_table[groups[-1]]
            if len(groups) == 2:
                by_rule = self.pair_table[self.class_of[groups[0]], groups[1]]
            by_group[first_order] += FIRST_ORDER_PROBABILITY
            by_group[by_rule] += RULE_PROBABILITY
        probabilities = np.empty(self.num_items)
        probabilities[self.members] = by_group[:, None] * self.rank_probabilities
        return probabilities


def make_process(
    num_items: int = 1024,
    num_groups: int = 32,
    seed: int = 0,
    *,
    num_classes: int = 8,
) -> Process:
    """A process of its own for each seed; all its tables are drawn at random.

    Args:
        num_items: a multiple of the groups.
        num_groups: of equal size.
        seed: of the tables.
        num_classes: how many kinds of groups the rule tells apart two items back. The more, the
            less a first-order counter sees and the more data it takes to learn.

    Raises:
        ValueError: sizes do not fit together.
    """
    if num_items % num_groups or not 1 <= num_classes <= num_groups:
        raise ValueError(
            f"{num_items} items, {num_groups} groups, {num_classes} classes: "
            "items must be a multiple of groups, and classes at most as many as groups"
        )
    rng = np.random.default_rng([seed, 0])
    members = rng.permutation(num_items).reshape(num_groups, -1).astype(np.int32)
    group_of = np.empty(num_items, dtype=np.int32)
    group_of[members] = np.arange(num_groups, dtype=np.int32)[:, None]
    weights = np.arange(1, members.shape[1] + 1) ** -ZIPF_EXPONENT
    class_of = (rng.permutation(num_groups) % num_classes).astype(np.int32)
    pair_table = np.stack([rng.permutation(num_groups) for _ in range(num_classes)])
    return Process(
        seed=seed,
        group_of=group_of,
        members=members,
        class_of=class_of,
        pair_table=pair_table.astype(np.int32),
        first_order_table=rng.permutation(num_groups).astype(np.int32),
        rank_probabilities=weights / weights.sum(),
    )
