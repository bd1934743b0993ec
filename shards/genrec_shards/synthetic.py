"""A synthetic catalogue whose best possible recommendations are known: the demo's ceiling."""

from dataclasses import dataclass

import numpy as np

from genrec_shards.sequences import Sequences, flat_ranges, sequences_from_ids
from genrec_shards.splits import Split

# U users, N items, G groups, M items of a group, K classes of groups, C = K * G contexts, L items
# of a history.

_CHUNK = 512


@dataclass(frozen=True, eq=False)
class Process:
    """A noisy second-order process over items in hidden groups.

    The next item's group is drawn from a mixture: with `rule_probability` it is `pair_table[class
    of the group before the last, last group]`, with `first_order_probability` it is
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
    rule_probability: float
    first_order_probability: float

    @property
    def num_items(self) -> int:
        return len(self.group_of)

    def sample(self, num_users: int, min_length: int, max_length: int, seed: int = 0) -> Sequences:
        """Sequences of `num_users` users with lengths drawn evenly from min_length..max_length
        (items).

        The catalogue holds the items that occur, as if it had been read from a file. Raises
        ValueError for lengths that leave no room for a split or that ask for more than half of the
        catalogue."""
        if not 3 <= min_length <= max_length <= self.num_items // 2:
            raise ValueError(
                f"lengths {min_length}..{max_length}: choose 3 <= min_length <= max_length <= {self.num_items // 2}"
            )
        rng = np.random.default_rng([self.seed, 1, seed])
        lengths = rng.integers(min_length, max_length + 1, num_users)
        items = self._draw_sequences(rng, num_users, max_length)
        kept = items[np.arange(max_length) < lengths[:, None]]
        names = np.array([str(item + 1) for item in range(self.num_items)], dtype=object)
        return sequences_from_ids(
            [str(user + 1) for user in range(num_users)], lengths, names[kept].tolist()
        )

    def next_item_probabilities(self, history: np.ndarray) -> np.ndarray:
        """float64[N], the exact distribution of the next item after `history`, int[L] item numbers
        0..N-1 (id - 1)."""
        history = np.asarray(history, dtype=np.int64)
        groups = self._group_probabilities(self.group_of[history[-2:]])
        probabilities = np.empty(self.num_items)
        probabilities[self.members] = groups[:, None] * self.rank_probabilities
        probabilities[history] = 0
        return probabilities / probabilities.sum()

    def oracle_lists(self, sequences: Sequences, split: Split, top: int = 20) -> np.ndarray:
        """int32[U, top], item rows of `sequences`: for each user the most probable next items, best
        first.

        No recommender can do better on average. The user's history is excluded, ties go to the
        lower row. `sequences` may come from a file; raises ValueError if an id is none of this
        process's own."""
        view = sequences.history_and_target(split)
        numbers = self._item_numbers(sequences.item_ids)  # [N'], row -> item of the process
        by_context = self._context_probabilities()[:, numbers]  # [C, N']
        groups = self.group_of[numbers]
        last, before = (
            groups[view.items[view.ends - 1]],
            groups[view.items[np.maximum(view.ends - 2, 0)]],
        )
        contexts = np.where(
            view.ends - view.starts > 1, self._context(before, last), self._context(-1, last)
        )
        lists = np.empty((sequences.num_users, top), dtype=np.int32)
        for first in range(0, sequences.num_users, _CHUNK):
            chunk = slice(first, first + _CHUNK)
            scores = -by_context[contexts[chunk]]
            lengths = (view.ends - view.starts)[chunk]
            users = np.repeat(np.arange(len(lengths)), lengths)
            scores[users, view.items[flat_ranges(view.starts[chunk], lengths)]] = 1.0
            lists[chunk] = np.argsort(scores, axis=1, kind="stable")[:, :top]
        return lists

    def _item_numbers(self, ids: list[str]) -> np.ndarray:
        number_of = {str(item + 1): item for item in range(self.num_items)}
        foreign = next((item for item in ids if item not in number_of), None)
        if foreign is not None:
            raise ValueError(
                f"item {foreign[:40]!r} is none of this process's 1..{self.num_items}: sample it anew"
            )
        return np.array([number_of[item] for item in ids], dtype=np.int64)

    def _draw_sequences(self, rng: np.random.Generator, num_users: int, length: int) -> np.ndarray:
        """int32[U, length]; all users take one step together."""
        items = np.empty((num_users, length), dtype=np.int32)
        seen = np.zeros((num_users, self.num_items), dtype=bool)
        for step in range(length):
            users = np.arange(num_users)
            # What a user has had is drawn again until it is new: that is the renormalised
            # distribution itself.
            while len(users):
                groups = self._draw_groups(
                    rng, self.group_of[items[users, max(step - 2, 0) : step]]
                )
                ranks = rng.choice(
                    len(self.rank_probabilities), len(users), p=self.rank_probabilities
                )
                drawn = self.members[groups, ranks]
                is_new = ~seen[users, drawn]
                items[users[is_new], step] = drawn[is_new]
                seen[users[is_new], drawn[is_new]] = True
                users = users[~is_new]
        return items

    def _draw_groups(self, rng: np.random.Generator, groups: np.ndarray) -> np.ndarray:
        """int[B]: the next group after `groups`, int[B, 0..2]."""
        size, known = groups.shape
        coin = rng.random(size)
        drawn = rng.integers(0, len(self.members), size=(size,))
        if known == 0:
            return drawn
        by_first_order = self.first_order_table[groups[:, -1]]
        by_rule = (
            by_first_order
            if known == 1
            else self.pair_table[self.class_of[groups[:, 0]], groups[:, 1]]
        )
        drawn = np.where(
            coin < self.rule_probability + self.first_order_probability, by_first_order, drawn
        )
        return np.where(coin < self.rule_probability, by_rule, drawn)

    def _group_probabilities(self, groups: np.ndarray) -> np.ndarray:
        """float64[G]: the next group's distribution after `groups`, int[0..2]."""
        num_groups = len(self.members)
        if len(groups) == 0:
            return np.full(num_groups, 1 / num_groups)
        rest = 1 - self.rule_probability - self.first_order_probability
        probabilities = np.full(num_groups, rest / num_groups)
        first_order = self.first_order_table[groups[-1]]
        by_rule = (
            first_order
            if len(groups) == 1
            else self.pair_table[self.class_of[groups[0]], groups[1]]
        )
        probabilities[first_order] += self.first_order_probability
        probabilities[by_rule] += self.rule_probability
        return probabilities

    def _context(self, before: np.ndarray | int, last: np.ndarray) -> np.ndarray:
        """Number of the pair of groups; `before` -1: there was only one item."""
        if isinstance(before, int):
            return len(self.pair_table) * len(self.members) + last
        return self.class_of[before] * len(self.members) + last

    def _context_probabilities(self) -> np.ndarray:
        """float64[C + G, N]: the next item's distribution for each pair of groups, before history
        is taken out."""
        num_classes, num_groups = self.pair_table.shape
        one_of_class = [
            int(np.flatnonzero(self.class_of == number)[0]) for number in range(num_classes)
        ]
        pairs = [[before, last] for before in one_of_class for last in range(num_groups)]
        contexts = [*pairs, *([last] for last in range(num_groups))]
        probabilities = np.empty((len(contexts), self.num_items))
        for row, context in enumerate(contexts):
            groups = self._group_probabilities(np.array(context))
            probabilities[row, self.members] = groups[:, None] * self.rank_probabilities
        return probabilities


def make_process(
    num_items: int = 1024,
    num_groups: int = 32,
    seed: int = 0,
    *,
    num_classes: int = 8,
    rule_probability: float = 0.8,
    first_order_probability: float = 0.08,
    zipf_exponent: float = 1.3,
) -> Process:
    """A process of its own for each seed; all its tables are drawn at random.

    `num_classes`: how many kinds of groups the rule tells apart two items back. The more, the less
    a first-order counter sees and the more data it takes to learn. Raises ValueError for sizes or
    shares that do not fit together."""
    if num_items % num_groups or not 1 <= num_classes <= num_groups:
        raise ValueError(
            f"{num_items} items, {num_groups} groups, {num_classes} classes: "
            "items must be a multiple of groups, and classes at most as many as groups"
        )
    if (
        min(rule_probability, first_order_probability) < 0
        or rule_probability + first_order_probability > 1
    ):
        raise ValueError(
            f"shares {rule_probability} and {first_order_probability}: choose two that sum to 1 at most"
        )
    rng = np.random.default_rng([seed, 0])
    members = rng.permutation(num_items).reshape(num_groups, -1).astype(np.int32)
    group_of = np.empty(num_items, dtype=np.int32)
    group_of[members] = np.arange(num_groups, dtype=np.int32)[:, None]
    weights = np.arange(1, members.shape[1] + 1) ** -zipf_exponent
    return Process(
        seed=seed,
        group_of=group_of,
        members=members,
        class_of=(rng.permutation(num_groups) % num_classes).astype(np.int32),
        pair_table=np.stack([rng.permutation(num_groups) for _ in range(num_classes)]).astype(
            np.int32
        ),
        first_order_table=rng.permutation(num_groups).astype(np.int32),
        rank_probabilities=weights / weights.sum(),
        rule_probability=rule_probability,
        first_order_probability=first_order_probability,
    )
