"""Users' item sequences as one flat array with offsets, read from and written to the `sequences`
format."""

import gzip
import hashlib
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genrec_shards.atomic import atomic_file
from genrec_shards.errors import DataError
from genrec_shards.splits import (
    MINIMUM_LENGTH,
    NO_TARGET,
    Periods,
    Split,
    TrainedThrough,
    num_held_out,
)

if TYPE_CHECKING:
    from genrec_shards.errors import BadLines

# U users, N items of the catalogue, total interactions.


GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, eq=False)
class SplitView:
    """One split of some users, no copy: the u-th one's history is `items[starts[u]:ends[u]]`, her
    target `targets[u]`."""

    split: Split
    items: np.ndarray
    """int32[total], the sequences' own array."""
    starts: np.ndarray
    """int64[U]"""
    ends: np.ndarray
    """int64[U], exclusive."""
    targets: np.ndarray
    """int32[U], item rows; NO_TARGET where a split by time leaves her without: she is not asked."""

    @property
    def users(self) -> np.ndarray:
        """int64[V], the places of those who have a target, ascending: who is evaluated, each
        once."""
        return np.flatnonzero(self.targets != NO_TARGET)


@dataclass(frozen=True, eq=False)
class Sequences:
    """All users' items in time order, and the ids behind the rows."""

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
        """int64[U], items a user."""
        return np.diff(self.offsets)

    def sequences_hash(self) -> str:
        """sha256 (hex) of offsets, items, both lists of ids and the periods in a form that no
        platform changes."""
        digest = hashlib.sha256(b"genrec sequences 1\n")
        digest.update(np.ascontiguousarray(self.offsets, dtype="<i8").data)
        digest.update(np.ascontiguousarray(self.items, dtype="<i4").data)
        update_with_strings(digest, self.user_ids)
        update_with_strings(digest, self.item_ids)
        if self.periods is not None:
            self.periods.update(digest)
        return digest.hexdigest()

    def history_and_target(self, split: Split, users: np.ndarray | None = None) -> SplitView:
        """What a split asks of these user rows (None: all).

        Leave-one-out: validation asks for t_{n-1} after t_1..t_{n-2}, test for t_n after
        t_1..t_{n-1}. Split by time: validation asks for the first item of the validation period
        after those of the training period, test for the first of the test period after all before
        it; who has none there has no target."""
        if split not in ("validation", "test"):
            raise ValueError(f"split is {split!r}: choose validation or test")
        chosen = slice(None) if users is None else users
        starts, behind = self.offsets[:-1][chosen], self.offsets[1:][chosen]
        if self.periods is None:
            ends = behind - (2 if split == "validation" else 1)
            return SplitView(split, self.items, starts, ends, self.items[ends])
        known = starts + self.periods.known_U[chosen]
        if split == "validation":
            ends, behind = starts + self.periods.training_U[chosen], known
        else:
            ends = known
        targets = np.full(len(ends), NO_TARGET, np.int32)
        asked = ends < behind
        targets[asked] = self.items[ends[asked]]
        return SplitView(split, self.items, starts, ends, targets)

    def training_ends(
        self, trained_through: TrainedThrough = "n-2", users: np.ndarray | None = None
    ) -> np.ndarray:
        """int64[U], exclusive: user u's training part is `items[offsets[u]:training_ends[u]]`; of
        these user rows (None: all).

        n-2 leaves out what validation and test ask for, or the periods of both; n-1 what test asks
        for, or its period."""
        held_out = num_held_out(trained_through)
        chosen = slice(None) if users is None else users
        if self.periods is None:
            return self.offsets[1:][chosen] - held_out
        return self.offsets[:-1][chosen] + self.periods.lengths(trained_through)[chosen]


def flat_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64[lengths.sum()]: starts[0], starts[0] + 1, ..., then starts[1], ...; of each as many as
    `lengths` says.

    The index that picks many stretches out of one flat array at once.
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
    """Give rows to ids: users keep their order, items are sorted (by number if all are whole, else
    by code point).

    `lengths`: items a user, [U]; `ids`: the item ids of all users one after another, [total].
    """
    item_ids = sort_ids(set(ids))
    row_of = {item: row for row, item in enumerate(item_ids)}
    items = np.fromiter(map(row_of.__getitem__, ids), dtype=np.int32, count=len(ids))
    offsets = np.zeros(len(user_ids) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
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
    path: str | Path, bad: "BadLines | None" = None, known: Collection[str] = ()
) -> Sequences:
    """Read `user item item ...`, one user a line, oldest item first, plain or gzipped (told by the
    content).

    Words are separated by spaces or tabs, blank lines are skipped. Raises DataError, one line with
    file and line, for a file that is missing, empty, binary, not UTF-8 or cut off, for fewer than 3
    items and for a user who comes twice. `bad`: takes lines that are wrong in themselves; None
    stops at the first. `known`: users of whom one item is enough."""
    path = Path(path)
    user_ids: list[str] = []
    lengths: list[int] = []
    ids: list[str] = []
    line_of: dict[str, int] = {}
    skipping = bad is not None and bad.on_error == "skip"
    for number, line in enumerate(_text(path, checked=not skipping).split(b"\n"), start=1):
        words = line.split()
        if not words:
            continue
        if skipping and bad is not None and (reason := _unfit(line)):
            bad.meet(path, number, reason)
            continue
        user = words[0].decode()
        if reason := _wrong(user, len(words) - 1, line_of, 1 if user in known else MINIMUM_LENGTH):
            if bad is None or not skipping:
                remedy = "join the two lines" if user in line_of else "remove the line or add items"
                raise DataError(f"{path}:{number}: {reason}: {remedy}")
            bad.meet(path, number, reason)
            continue
        line_of[user] = number
        user_ids.append(user)
        lengths.append(len(words) - 1)
        # One decode a line costs a third of one decode a word; \n cannot be inside a word.
        ids.extend(b"\n".join(words[1:]).decode().split("\n"))
    if not user_ids:
        raise DataError(f"{path}: empty: expected one user a line, `user item item ...`")
    return sequences_from_ids(user_ids, lengths, ids)


def write_sequences(sequences: Sequences, path: str | Path) -> None:
    """Write the `sequences` format, gzipped when the name ends in .gz; the same sequences give the
    same bytes.

    Raises DataError for an id that is empty or holds white space, which the format cannot carry.
    """
    path = Path(path)
    for kind, ids in (("user", sequences.user_ids), ("item", sequences.item_ids)):
        unfit = next(
            (
                item
                for item in ids
                if len(item.encode().split()) != 1 or item != item.strip(" \t\r\n")
            ),
            None,
        )
        if unfit is not None:
            raise DataError(
                f"{path}: {kind} id {_shortened(unfit)} is empty or holds white space: rename it"
            )
    words = np.array(sequences.item_ids, dtype=object)[sequences.items].tolist()
    bounds = zip(sequences.offsets[:-1].tolist(), sequences.offsets[1:].tolist(), strict=True)
    lines = [
        " ".join([user, *words[start:end]])
        for user, (start, end) in zip(sequences.user_ids, bounds, strict=True)
    ]  # fmt: skip
    data = ("\n".join(lines) + "\n").encode()
    with atomic_file(path) as temporary:
        temporary.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)


def _text(path: Path, checked: bool = True) -> bytes:
    """The file's bytes, unpacked and, if `checked`, known to be UTF-8 text."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check the path") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}): check the path and its rights"
        ) from None
    if data.startswith(GZIP_MAGIC):
        data = _unpacked(path, data)
    data = data.removeprefix(BYTE_ORDER_MARK)
    if not checked:
        return data
    if (position := data.find(b"\0")) >= 0:
        raise DataError(
            f"{path}:{_line_at(data, position)}: binary (a zero byte): expected text, plain or gzipped"
        )
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = _line_at(data, error.start)
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}): save it as UTF-8 text"
        ) from None
    return data


def _unpacked(path: Path, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except EOFError:
        raise DataError(
            f"{path}: the gzip stream is cut off: download or copy the file again"
        ) from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: the gzip stream is damaged ({error}): download or copy the file again"
        ) from None


def _line_at(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _unfit(line: bytes) -> str | None:
    """What keeps a line from being text."""
    if b"\0" in line:
        return "binary (a zero byte)"
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte 0x{line[error.start]:02x})"
    return None


def _wrong(user: str, num_items: int, line_of: dict[str, int], fewest: int) -> str | None:
    if num_items < fewest:
        return (
            f"user {_shortened(user)} has {num_items} item{'s' * (num_items != 1)}, at least "
            f"{fewest} are needed (training, validation, test)"
        )
    if user in line_of:
        return f"user {_shortened(user)} came before in line {line_of[user]}"
    return None


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
