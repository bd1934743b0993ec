"""Users' item sequences as one flat array with offsets, read from and written to the `sequences`
format."""

import gzip
import hashlib
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec_shards.atomic import atomic_file
from genrec_shards.errors import BadLines, DataError
from genrec_shards.readers.text_blocks import blocks, find_fault
from genrec_shards.splits import (
    MINIMUM_LENGTH,
    NO_TARGET,
    Periods,
    Split,
    TrainedThrough,
    num_held_out,
)

# U users, N items of the catalogue, total interactions.


@dataclass(frozen=True, eq=False)
class SplitView:
    """One split of some users, no copy: user u's history is `items[starts[u]:ends[u]]`, the target
    `targets[u]`."""

    split: Split
    items: np.ndarray
    """int32[total], the sequences' own array."""
    starts: np.ndarray
    """int64[U]"""
    ends: np.ndarray
    """int64[U], exclusive."""
    targets: np.ndarray
    """int32[U], item rows; NO_TARGET of users whom a split by time leaves without one."""

    @property
    def users(self) -> np.ndarray:
        """int64[V], the places of the users who have a target, ascending: those who are
        evaluated."""
        return np.flatnonzero(self.targets != NO_TARGET)


@dataclass(frozen=True, eq=False)
class Sequences:
    """All users' items in time order, and the ids of users and items."""

    items: np.ndarray
    """int32[total], item rows, user after user, oldest first."""
    offsets: np.ndarray
    """int64[U+1]: user u's items are `items[offsets[u]:offsets[u + 1]]`."""
    user_ids: list[str]
    """Index = user row, in the order of the file."""
    item_ids: list[str]
    """Index = item row, in sorted order."""
    periods: Periods | None = None
    """Of a split by time, how far each user's periods reach; None: leave-one-out."""

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_interactions(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> np.ndarray:
        """int64[U], items per user."""
        return np.diff(self.offsets)

    def sequences_hash(self) -> str:
        """sha256 (hex) of offsets, items, both lists of ids and the periods, the same on every
        platform."""
        digest = hashlib.sha256(b"genrec sequences 1\n")
        digest.update(np.ascontiguousarray(self.offsets, dtype="<i8").data)
        digest.update(np.ascontiguousarray(self.items, dtype="<i4").data)
        update_with_strings(digest, self.user_ids)
        update_with_strings(digest, self.item_ids)
        if self.periods is not None:
            digest.update(b"periods 1\n")
            digest.update(np.ascontiguousarray(self.periods.flat(), dtype="<i8").data)
        return digest.hexdigest()

    def history_and_target(self, split: Split, users: np.ndarray | None = None) -> SplitView:
        """The history and target of each user in a split.

        Leave-one-out: the target of validation is t_{n-1} after the history t_1..t_{n-2}, that of
        test t_n after t_1..t_{n-1}. Split by time: the target of validation is the first item of
        the validation period, after those of the training period; that of test the first of the
        test period, after all before it. Who has no item there has no target.

        Args:
            split: validation or test.
            users: int64[U], user rows; None: all.
        """
        if split not in ("validation", "test"):
            raise ValueError(f"split is {split!r}: choose validation or test")
        chosen = slice(None) if users is None else users
        starts, stops = self.offsets[:-1][chosen], self.offsets[1:][chosen]
        if self.periods is None:
            ends = stops - (2 if split == "validation" else 1)
            return SplitView(split, self.items, starts, ends, self.items[ends])
        known = starts + self.periods.known_U[chosen]
        if split == "validation":
            ends, stops = starts + self.periods.training_U[chosen], known
        else:
            ends = known
        targets = np.full(len(ends), NO_TARGET, np.int32)
        has_target = ends < stops
        targets[has_target] = self.items[ends[has_target]]
        return SplitView(split, self.items, starts, ends, targets)

    def training_ends(
        self, trained_through: TrainedThrough = "n-2", users: np.ndarray | None = None
    ) -> np.ndarray:
        """int64[U], exclusive: user u's training part is `items[offsets[u]:training_ends[u]]`.

        Args:
            trained_through: n-2 leaves out the targets of validation and test, or the periods of
                both; n-1 the target of test, or its period.
            users: int64[U], user rows; None: all.
        """
        held_out = num_held_out(trained_through)
        chosen = slice(None) if users is None else users
        if self.periods is None:
            return self.offsets[1:][chosen] - held_out
        return self.offsets[:-1][chosen] + self.periods.lengths(trained_through)[chosen]


def flat_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64[lengths.sum()]: starts[0], starts[0] + 1, ..., then starts[1], ...; of each as many as
    `lengths` says: the index that picks many slices of one flat array at once.

    Example: starts 5, 0, 9 and lengths 2, 0, 3 give 5, 6, 9, 10, 11.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """int64[S+1]: the start of each of S consecutive segments of these lengths, and the end of the
    last."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def sequences_from_ids(
    user_ids: Sequence[str], lengths: Sequence[int] | np.ndarray, ids: Sequence[str]
) -> Sequences:
    """Give rows to ids: users keep their order, items get that of `sort_ids`.

    Args:
        user_ids: [U]
        lengths: [U], items per user.
        ids: [total], the item ids of all users one after another.
    """
    item_ids = sort_ids(set(ids))
    row_of = {item: row for row, item in enumerate(item_ids)}
    items = np.fromiter(map(row_of.__getitem__, ids), dtype=np.int32, count=len(ids))
    offsets = offsets_of(np.asarray(lengths))
    assert offsets[-1] == len(items)
    return Sequences(items, offsets, list(user_ids), item_ids)


def sort_ids(ids: Iterable[str]) -> list[str]:
    """In numeric order when all ids are whole numbers, otherwise by code point."""
    ids = list(ids)
    if not all(item.isascii() and item.isdigit() for item in ids):
        return sorted(ids)
    # The length of the digits and then the digits are the numeric order, and int() refuses more
    # than 4,300 digits.
    return sorted(ids, key=lambda item: (len(digits := item.lstrip("0")), digits, item))


def update_with_strings(digest: "hashlib._Hash", strings: Sequence[str]) -> None:
    """Feed strings to a hash so that no two lists look alike: how many, each one's length, then
    their bytes."""
    encoded = [string.encode() for string in strings]
    lengths = np.fromiter(map(len, encoded), dtype="<i8", count=len(encoded))
    digest.update(len(encoded).to_bytes(8, "little"))
    digest.update(lengths.data)
    digest.update(b"".join(encoded))


def read_sequences(
    path: str | Path, bad: BadLines | None = None, known: Collection[str] = ()
) -> Sequences:
    """Read `user item item ...`, one user per line, oldest item first, plain or gzipped.

    Words are separated by spaces or tabs, blank lines are skipped.

    Args:
        path: the file.
        bad: takes lines that are wrong in themselves; None stops at the first.
        known: users of whom one item is enough.

    Raises:
        DataError: one line with file and line for a file that is missing, empty, binary, not UTF-8
            or cut off, for fewer than 3 items and for a user who comes twice.
    """
    path = Path(path)
    skipping = bad is not None and bad.on_error == "skip"
    user_ids: list[str] = []
    lengths: list[int] = []
    # Item ids get numbers as they come: a log is far longer than its catalogue.
    number_of: defaultdict[bytes, int] = defaultdict()
    number_of.default_factory = number_of.__len__
    numbers = array("i")
    line_of: dict[str, int] = {}
    for number, line in _lines(path, check=not skipping):
        words = line.split()
        if not words:
            continue
        if skipping and bad is not None and (fault := find_fault(line)) is not None:
            bad.add(path, number, fault[1])
            continue
        user, num_items = words[0].decode(), len(words) - 1
        fewest = 1 if user in known else MINIMUM_LENGTH
        if num_items < fewest or user in line_of:
            if num_items < fewest:
                have = f"has {num_items} item{'s' * (num_items != 1)}, at least {fewest} are needed"
                reason = f"user {_shortened(user)} {have} (training, validation, test)"
            else:
                reason = f"user {_shortened(user)} came before in line {line_of[user]}"
            if bad is None or not skipping:
                remedy = "join the two lines" if user in line_of else "remove the line or add items"
                skip = "or use --on-error skip to leave such lines out"
                raise DataError(f"{path}:{number}: {reason}: {remedy}, {skip}")
            bad.add(path, number, reason)
            continue
        line_of[user] = number
        user_ids.append(user)
        lengths.append(num_items)
        numbers.extend(map(number_of.__getitem__, words[1:]))
    if not user_ids:
        raise DataError(f"{path}: empty: expected one user a line, `user item item ...`")
    ids = [item.decode() for item in number_of]
    item_ids = sort_ids(ids)
    row_of = {item: row for row, item in enumerate(item_ids)}
    rows = np.array([row_of[item] for item in ids], np.int32)
    return Sequences(rows[np.array(numbers)], offsets_of(np.array(lengths)), user_ids, item_ids)


def _lines(path: Path, check: bool) -> Iterator[tuple[int, bytes]]:
    """(number, line) from 1. `check`: raise DataError at the first that is no text."""
    for block in blocks(path):
        if check and (fault := find_fault(block.data)) is not None:
            binary = fault[1].startswith("binary")
            remedy = "expected text, plain or gzipped" if binary else "save it as UTF-8 text"
            number = block.first_line + block.data.count(b"\n", 0, fault[0])
            raise DataError(f"{path}:{number}: {fault[1]}: {remedy}")
        yield from enumerate(block.data.split(b"\n"), start=block.first_line)


def write_sequences(sequences: Sequences, path: str | Path) -> None:
    """Write the `sequences` format, gzipped when the name ends in .gz; the same sequences give the
    same bytes. Raises DataError where an id is empty or holds white space, which the format cannot
    carry."""
    path = Path(path)
    for kind, ids in (("user", sequences.user_ids), ("item", sequences.item_ids)):
        for name in ids:
            if len(name.encode().split()) != 1 or name != name.strip(" \t\r\n"):
                fault = f"{kind} id {_shortened(name)} is empty or holds white space"
                raise DataError(f"{path}: {fault}: rename it")
    words = np.array(sequences.item_ids, dtype=object)[sequences.items].tolist()
    bounds = sequences.offsets.tolist()
    lines = [
        " ".join([user, *words[start:end]])
        for user, start, end in zip(sequences.user_ids, bounds[:-1], bounds[1:], strict=True)
    ]
    data = ("\n".join(lines) + "\n").encode()
    with atomic_file(path) as temporary:
        temporary.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
