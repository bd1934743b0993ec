"""Top lists of any system, read from a file that names users and items by the user's own ids."""

# U users, N list

from __future__ import annotations

import ast
import re
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from genrec_shards.dataset import Source, source_of
from genrec_shards.errors import DataError
from genrec_shards.histories import histories, windows
from genrec_shards.readers.columns import COLUMNS, first_of
from genrec_shards.readers.frames import identifier, listed
from genrec_shards.readers.records import read_records
from genrec_shards.sequences import Sequences, offsets_of
from genrec_shards.splits import Split

from genrec_dist.evaluation.metrics import EMPTY, TOP
from genrec_dist.evaluation.ranked_lists import Lists, empty_lists, history_listed, without_last

LISTS = ("items", "item_ids", "item_list", "recommendations", "recs")
"""Where a user's list is looked for when it is in one cell; compared with `plain_name`."""
RANKS = ("rank", "position", "place")
SCORES = ("score", "scores")
_FORMS = (
    "name the columns user, item and rank (a row per item), user and items (a list per row), or "
    "user and 1, 2, 3, ... (a column per place)"
)


@dataclass(frozen=True, eq=False)
class GivenLists:
    """A list of each user who is asked for, and where in the file it is."""

    path: Path
    users: np.ndarray
    """int64[U], user rows, ascending."""
    lists: Lists
    """In the order of `users`; the scores are float64."""
    lines_UN: np.ndarray
    """int64[U, N], line of each place's item, 0 where the list has ended."""
    longest: int
    """Items of the longest list; the first 20 are scored."""
    left_out: int
    """Users with a list and without a target in this split."""
    source: Source

    @property
    def shorter(self) -> int:
        """Users with fewer than 20 items."""
        return int((self.lists.items_UN[:, -1] == EMPTY).sum())

    def __call__(self, users: np.ndarray) -> Lists:
        """The lists of these user rows, as a rule makes them."""
        at = np.searchsorted(self.users, users)
        items_UN, scores_UN, tied_beyond_U = self.lists
        assert tied_beyond_U is not None
        return Lists(items_UN[at], scores_UN[at], tied_beyond_U[at])

    def check_history_is_out(self, sequences: Sequences, split: Split) -> None:
        """Raises DataError for the first item that its user has already had."""
        for at in windows(range(len(self.users))):
            items_UN = self.lists.items_UN[at]
            found = np.argwhere(
                history_listed(items_UN, histories(sequences, split, self.users[at]))
            )
            for user, place in found[:1]:
                owner = sequences.user_ids[self.users[at[user]]]
                item = sequences.item_ids[items_UN[user, place]]
                raise DataError(
                    f"{self.path}:{self.lines_UN[at[user], place]}: user {owner!r}: item {item!r} "
                    "is in the history, which is excluded: leave it out, or give "
                    "--exclude-history no"
                )

    def notes(self, split: Split) -> list[str]:
        """What a person should know of the lists; a line each."""
        found = []
        if self.shorter:
            found.append(
                f"{self.shorter:,} of {len(self.users):,} lists have fewer than {TOP} items"
            )
        if self.longest > TOP:
            found.append(f"lists have up to {self.longest:,} items: the first {TOP} are scored")
        if self.left_out:
            found.append(f"{self.left_out:,} lists of users without a {split} target are left out")
        return found


def read_lists(
    path: str | Path, sequences: Sequences, split: Split, users: np.ndarray
) -> GivenLists:
    """Read the lists of a file: Parquet, JSON lines, or text with any delimiter.

    One row per item (`user`, `item` and `rank`; without ranks by falling `score`; without either in
    the order of the rows), one row per user with a list in a cell (`user`, `items`, and if there
    are any `scores`), or one with a cell per place (`user`, `1`, `2`, ...). Where there are scores,
    a target ranks below everything that ties with it, as it does for our own systems that score
    all items.

    Args:
        path: the file.
        sequences: whose ids it uses.
        split: whose targets are ranked.
        users: int64[U], the user rows that are asked for, ascending.

    Raises:
        DataError: one line with file, line and user, for a list that cannot be scored.
    """
    path = Path(path)
    rows = _Rows(path, sequences)
    for line, record in read_records(path):
        rows.add(line, record)
    if not rows.line_of:
        raise DataError(f"{path}: empty: expected a list of each user")
    asked_U = np.zeros(sequences.num_users, bool)
    asked_U[users] = True
    for row in users.tolist():
        if row not in rows.line_of:
            raise DataError(
                f"{path}: user {sequences.user_ids[row]!r} has no list, and {len(users):,} users "
                f"have a {split} target: list items for each; an empty list in a column items is "
                "a miss"
            )
    entries = rows.sorted()
    longest = int(entries.places.max(initial=-1)) + 1
    entries = entries.chosen(asked_U[entries.users] & (entries.places <= TOP))
    rows.check(entries)
    # In the file's precision, so that no two scores tie that differ there.
    items_UN, scores_UN, _ = empty_lists(len(users), TOP + 1)
    longer = Lists(items_UN, scores_UN.astype(np.float64))
    lines_UN = np.zeros((len(users), TOP + 1), np.int64)
    at = np.searchsorted(users, entries.users), entries.places
    longer.items_UN[at], longer.scores_UN[at], lines_UN[at] = (
        entries.items,
        entries.scores,
        entries.lines,
    )
    return GivenLists(
        path=path,
        users=users,
        lists=without_last(longer),
        lines_UN=lines_UN[:, :TOP],
        longest=longest,
        left_out=len(rows.line_of) - len(users),
        source=source_of(path, [path]),
    )


@dataclass(frozen=True, eq=False)
class _Entries:
    """Listed items, by user and place."""

    users: np.ndarray
    items: np.ndarray
    keys: np.ndarray
    """What they are ranked by, ascending."""
    scores: np.ndarray
    lines: np.ndarray
    places: np.ndarray
    """From 0."""

    def chosen(self, which: np.ndarray) -> _Entries:
        return _Entries(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


@dataclass
class _Form:
    """Which columns hold what, told by the first record."""

    user: str
    item: str | None = None
    rank: str | None = None
    score: str | None = None
    places: list[str] = field(default_factory=list)
    """Columns of a list: one with the whole of it, or one per place."""


class _Rows:
    """What the rows of a file list, checked one by one."""

    def __init__(self, path: Path, sequences: Sequences):
        self.path, self.sequences = path, sequences
        self.user_rows = {name: row for row, name in enumerate(sequences.user_ids)}
        self.item_rows = {name: row for row, name in enumerate(sequences.item_ids)}
        self.form: _Form | None = None
        self.line_of: dict[int, int] = {}
        """First line of each user."""
        self.users, self.items, self.lines = array("q"), array("q"), array("q")
        self.keys, self.scores = array("d"), array("d")

    def add(self, line: int, record: dict[str, Any]) -> None:
        """Take what one row lists."""
        if self.form is None:
            self.form = _form_of(f"{self.path}:{line}", list(record))
        form = self.form
        user = self._row(line, "user", record.get(form.user), self.user_rows)
        if form.item is not None:
            self.line_of.setdefault(user, line)
            key = len(self.users)
            score = rank = None
            if form.score is not None:
                score = self._number(line, form.score, record.get(form.score))
            if form.rank is not None:
                rank = self._number(line, form.rank, record.get(form.rank))
            chosen = rank if rank is not None else key if score is None else -score
            self._append(line, user, record.get(form.item), chosen, score)
            return
        if user in self.line_of:
            self._refuse(
                line, user, f"came before in line {self.line_of[user]}: give one list each"
            )
        self.line_of[user] = line
        if form.score is None and len(form.places) > 1:
            cells = [record.get(name) for name in form.places]
            while cells and cells[-1] in (None, ""):
                cells.pop()
        else:
            cells = _cells(record.get(form.places[0]))
        scores: list[float | None] = [None] * len(cells)
        if form.score is not None:
            found = _cells(record.get(form.score))
            if len(found) != len(cells):
                self._refuse(line, user, f"has {len(cells)} items and {len(found)} scores")
            scores = [self._number(line, form.score, score) for score in found]
        for place, (cell, score) in enumerate(zip(cells, scores, strict=True)):
            self._append(line, user, cell, place, score)

    def sorted(self) -> _Entries:
        """By user and what ranks them; of equal keys the earlier row first."""
        columns = (self.users, self.items, self.keys, self.scores, self.lines)
        users, *others = (np.array(column) for column in columns)
        order = np.lexsort((others[1], users))
        users = users[order]
        starts = offsets_of(np.bincount(users, minlength=self.sequences.num_users))
        places = np.arange(len(users)) - starts[users]
        items, keys, scores, lines = (column[order] for column in others)
        # Without scores the order is all there is, and no two items tie.
        return _Entries(
            users, items, keys, np.where(np.isnan(scores), -places, scores), lines, places
        )

    def check(self, entries: _Entries) -> None:
        """Raises DataError for an item that is listed twice, two items of one rank, and scores
        that rise."""
        by_item = np.lexsort((entries.places, entries.items, entries.users))
        keys = entries.users * np.int64(self.sequences.num_items) + entries.items
        for at in by_item[1:][keys[by_item[1:]] == keys[by_item[:-1]]][:1]:
            item = self.sequences.item_ids[entries.items[at]]
            self._refuse_entry(entries, at, f"lists item {item!r} twice: list each item once")
        same_user = entries.users[1:] == entries.users[:-1]
        if self.form is not None and self.form.rank is not None:
            for at in np.flatnonzero(same_user & (entries.keys[1:] == entries.keys[:-1]))[:1] + 1:
                rank = f"{entries.keys[at]:g}"
                self._refuse_entry(entries, at, f"has two items of {self.form.rank} {rank}")
        for at in np.flatnonzero(same_user & (entries.scores[1:] > entries.scores[:-1]))[:1] + 1:
            reason = "has a score above that of the item before: leave out scores that are not the"
            self._refuse_entry(entries, at, f"{reason} list's order")

    def _append(self, line: int, user: int, cell: Any, key: float, score: float | None) -> None:
        self.items.append(self._row(line, "item", cell, self.item_rows, user))
        self.users.append(user)
        self.lines.append(line)
        self.keys.append(key)
        self.scores.append(np.nan if score is None else score)

    def _row(
        self, line: int, kind: str, cell: Any, rows: dict[str, int], user: int | None = None
    ) -> int:
        name = identifier(cell)
        row = None if name is None else rows.get(name)
        if row is None:
            shown = repr(cell if isinstance(cell, str) else str(cell))[:60]
            whose = "" if user is None else f"user {self.sequences.user_ids[user]!r}: "
            where = f"among the {len(rows):,} {kind}s of the data"
            raise DataError(
                f"{self.path}:{line}: {whose}{kind} {shown} is not {where}: use the log's own ids"
            )
        return row

    def _number(self, line: int, name: str, cell: Any) -> float:
        try:
            number = float(cell)
        except (TypeError, ValueError):
            number = np.nan
        if not np.isfinite(number):
            raise DataError(f"{self.path}:{line}: {name} is {str(cell)[:40]!r}: give a number")
        return number

    def _refuse(self, line: int, user: int, reason: str) -> None:
        raise DataError(f"{self.path}:{line}: user {self.sequences.user_ids[user]!r} {reason}")

    def _refuse_entry(self, entries: _Entries, at: int, reason: str) -> None:
        self._refuse(int(entries.lines[at]), int(entries.users[at]), reason)


def _form_of(place: str, names: list[str]) -> _Form:
    usual = (COLUMNS["users"], COLUMNS["items"], LISTS, RANKS, SCORES)
    user, item, whole, rank, score = (first_of(one, names) for one in usual)
    numbered = {name: re.fullmatch(r"\D*(\d{1,4})", name.strip()) for name in names if name != user}
    if user is not None and whole is not None:
        return _Form(user, score=score, places=[whole])
    if user is not None and item is not None:
        return _Form(user, item, rank, score)
    if user is not None and numbered and all(numbered.values()):
        return _Form(user, places=sorted(numbered, key=lambda name: int(numbered[name][1])))  # type: ignore[index]
    raise DataError(f"{place}: no lists in columns {listed(names, 12) or 'none'}: {_FORMS}")


def _cells(cell: Any) -> list[Any]:
    """The items or scores of one cell: a list, or a text of them, as `a b c`, `a,b,c` or
    `["a", "b", "c"]`."""
    if cell is None:
        return []
    if isinstance(cell, list):
        return cell
    text = str(cell).strip()
    if text.startswith("["):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            found = None
        if isinstance(found, list):
            return found
        text = text.strip("[]")  # numpy's way to print, without commas
    return re.findall(r"[^\s,;|]+", text)
