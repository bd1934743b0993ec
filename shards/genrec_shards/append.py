"""A data directory grows: new interactions, users and items behind the old ones, whose rows and
codes stay what they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec_shards.atomic import atomic_directory
from genrec_shards.cleaning.appended_rows import (
    Incoming,
    check_not_there,
    in_order,
    read_incoming,
    without_known,
)
from genrec_shards.dataset import Appended, Dataset, Source, load_dataset, write_dataset
from genrec_shards.errors import BadLines, DataError, OnError
from genrec_shards.numbering.extend import continued
from genrec_shards.numbering.item_text import Descriptions, read_descriptions
from genrec_shards.prepare import K_CORE
from genrec_shards.readers.detect_format import LOG_FORMATS, Format, guess_format
from genrec_shards.readers.read_log import LogOptions
from genrec_shards.readers.text_blocks import readable
from genrec_shards.sequences import Sequences, sort_ids
from genrec_shards.splits import LEAVE_ONE_OUT, MINIMUM_LENGTH
from genrec_shards.timestamps import moment

# R rows that are appended, U users, N items, both with the new ones

OURS = ("sequences.parquet", "items.parquet", "users.parquet", "dataset.json", "audit.json")


def append(
    new: str | Path,
    to: str | Path,
    out: str | Path | None = None,
    *,
    format: Format = "auto",
    overwrite: bool = False,
    k_core: int | None = None,
    min_length: int | None = None,
    since: str | None = None,
    until: str | None = None,
    on_error: OnError = "stop",
    log: LogOptions | None = None,
    items: str | Path | None = None,
    item_column: str | None = None,
    text_columns: Sequence[str] | None = None,
    title_column: str | None = None,
) -> Dataset:
    """Add a source to the data directory `to` and write `out`, or replace `to`; complete or not at
    all.

    Rows and codes of old users and items stay what they were; new ones get the next rows
    (`sort_ids`; users of other formats than a log's as they come) and codes beside the old ones
    (`new_codes.py`). Where both have times a user's rows are merged by them, new ones of an old
    one's time behind it, and a row that is there already is a duplicate. Where `to` has none, new
    rows stand behind the old ones. A new item of a log needs `k_core` rows in it (default 5), a new
    user `min_length` (default 3), again and again until all have enough; in other formats a new
    user needs 3. What was left out before stays out. `since`, `until`, `on_error`, `log`, `items`
    and the columns: as in `prepare`; texts are read for items that have none. Shards inside `to`
    belong to the old sequences and go with them. The source is held in memory, about 100 bytes a
    row.

    Raises DataError where there is nothing to append or it cannot be told from what is there,
    ValueError for a wrong argument."""
    new, to = Path(new), Path(to)
    target = to if out is None else Path(out)
    in_place = target.resolve() == to.resolve()
    data = load_dataset(to)
    if data.info.split != LEAVE_ONE_OUT:
        raise DataError(
            f"{to}: split {data.info.split}: its dates say what is held out, appending is for {LEAVE_ONE_OUT}: prepare the whole "
            "log again"
        )
    if in_place:
        _check_ours(to)
    readable(new)
    format = guess_format(new) if format == "auto" else format
    rules = _rules(format, k_core, min_length)
    if format not in LOG_FORMATS and (since, until, log or LogOptions()) != (
        None,
        None,
        LogOptions(),
    ):
        raise ValueError(
            f"since, until, columns and time_unit are a log's, {new} is of the {format} format: leave them out"
        )
    bad = BadLines(on_error)
    with atomic_directory(target, overwrite or in_place, marker="dataset.json") as folder:
        found = read_incoming(new, format, data, bad, log or LogOptions())
        if data.timestamps is not None and found.times_R is None:
            raise DataError(
                f"{new}: no times, and the rows of {to} have some: append a log with times"
            )
        grown, timestamps, entry = _grown(data, found, bad, rules, _span(since, until), str(new))
        descriptions, described_by = _described(
            data, grown, items, item_column, text_columns, title_column
        )
        numbering = continued(
            data.numbering, grown, descriptions if data.info.numbering == "semantic" else None
        )
        info = dataclasses.replace(
            data.info,
            users=grown.num_users,
            items=grown.num_items,
            interactions=grown.num_interactions,
            sequences_hash=grown.sequences_hash(),
            numbering_hash=numbering.numbering_hash(),
            expected=None,  # the published counts were those of the old rows
            hierarchy=numbering.hierarchy,
            described_by=None
            if descriptions is None
            else Source(descriptions.name, descriptions.sha256),
            appended=(
                *(data.info.appended or ()),
                dataclasses.replace(entry, described_by=described_by),
            ),
        )
        dataset = Dataset(
            target, grown, numbering, info, descriptions, timestamps, tuple(bad.told())
        )
        write_dataset(dataset, folder)
    return dataset


def appended_told(dataset: Dataset) -> list[str]:
    """Lines for a person: what the last source has added, what was left out of it, and lines that
    could not be read."""
    assert dataset.info.appended
    entry = dataset.info.appended[-1]
    parts = [
        f"{count:,} {reason.replace('_', ' ')}" for reason, count in entry.dropped.items() if count
    ]
    out = f"; left out: {', '.join(parts)}" if parts else ""
    read = "" if entry.read is None else f"{entry.read:,} rows read, "
    return [
        f"{entry.source.name}: {read}{entry.interactions:,} appended, {entry.users:,} new users, {entry.items:,} new items{out}",
        *dataset.bad_lines,
    ]


@dataclass(frozen=True)
class _Rules:
    """What a new user and a new item need."""

    k_core: int
    min_length: int


def _rules(format: Format, k_core: int | None, min_length: int | None) -> _Rules | None:
    """None for formats that are clean already."""
    if format not in ("sequences", "data", *LOG_FORMATS):
        raise ValueError(
            f"format {format!r} is not supported: use --format sequences, data or {', '.join(LOG_FORMATS)}"
        )
    if format not in LOG_FORMATS:
        if (k_core, min_length) != (None, None):
            raise ValueError(
                f"k_core and min_length are a log's, this is of the {format} format: leave them out"
            )
        return None
    if k_core is not None and k_core < 0:
        raise ValueError(f"k_core is {k_core}: give a whole number, 0 for none")
    if min_length is not None and min_length < MINIMUM_LENGTH:
        raise ValueError(
            f"min_length is {min_length}: at least {MINIMUM_LENGTH} are needed (training, validation, test)"
        )
    return _Rules(
        K_CORE if k_core is None else k_core, MINIMUM_LENGTH if min_length is None else min_length
    )


def _span(since: str | None, until: str | None) -> tuple[int | None, int | None]:
    first = None if since is None else moment(since, "--since")
    last = None if until is None else moment(until, "--until", end_of_day=True)
    if first is not None and last is not None and first > last:
        raise ValueError("since lies after until: no row can be between them")
    return first, last


def _check_ours(to: Path) -> None:
    """What is replaced must not take a stranger's files with it."""
    for path in sorted(to.iterdir()):
        if path.name not in OURS and not (path / "manifest.json").is_file():
            raise ValueError(
                f"{path} is no part of a data directory and would be lost: move it away, or give --out"
            )


def _grown(
    data: Dataset,
    found: Incoming,
    bad: BadLines,
    rules: _Rules | None,
    span: tuple[int | None, int | None],
    place: str,
) -> tuple[Sequences, np.ndarray | None, Appended]:
    """(sequences, timestamps, what was added) of the data and the rows that may stay."""
    old = data.sequences
    num_read, dropped = found.num_rows + bad.count, {"bad_lines": bad.count}
    found, dropped["outside_dates"] = _counted(found, _between(found, span))
    ties = "keep" if data.timestamps is not None and data.info.ties == "keep" else "shuffle"
    ordered = without_known(in_order(found, ties, data.info.seed), data)  # type: ignore[arg-type]
    dropped["duplicates"] = found.num_rows - ordered.num_rows
    users_stay, items_stay = _core(ordered, old, rules)
    by_item_R = ~items_stay[ordered.items_R]
    by_user_R = ~by_item_R & ~users_stay[ordered.users_R]
    dropped |= {
        "new_items_below_k": int(by_item_R.sum()),
        "new_users_below_min_length": int(by_user_R.sum()),
    }
    rows = ordered.keep(~by_item_R & ~by_user_R)
    if not rows.num_rows:
        told = (
            ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
            or "no rows"
        )
        raise DataError(
            f"{place}: nothing in it that {data.path} lacks and may take ({told}): nothing was appended"
        )
    if data.timestamps is None:
        check_not_there(rows, data, place)
    user_ids, user_rows = _placed(rows.users_R, rows.user_ids, old.num_users, by_id=rows.is_log)
    item_ids, item_rows = _placed(rows.items_R, rows.item_ids, old.num_items, by_id=True)
    sequences, timestamps = _merged(data, rows, user_rows, item_rows, user_ids, item_ids)
    assert not rows.is_log or rows.num_rows + sum(dropped.values()) == num_read
    entry = Appended(
        source=rows.source,
        interactions=rows.num_rows,
        users=sequences.num_users - old.num_users,
        items=sequences.num_items - old.num_items,
        dropped=dropped if rules is not None else {reason: n for reason, n in dropped.items() if n},
        read=None if rows.times_R is None else num_read,
        k_core=None if rules is None else rules.k_core,
        min_length=None if rules is None else rules.min_length,
    )
    return sequences, timestamps, entry


def _counted(found: Incoming, stay_R: np.ndarray) -> tuple[Incoming, int]:
    return found.keep(stay_R), int((~stay_R).sum())


def _between(found: Incoming, span: tuple[int | None, int | None]) -> np.ndarray:
    """bool[R]"""
    stay_R = np.ones(found.num_rows, bool)
    if found.times_R is not None:
        first, last = span
        stay_R &= found.times_R >= (np.iinfo(np.int64).min if first is None else first)
        stay_R &= found.times_R <= (np.iinfo(np.int64).max if last is None else last)
    return stay_R


def _core(found: Incoming, old: Sequences, rules: _Rules | None) -> tuple[np.ndarray, np.ndarray]:
    """(bool by user, bool by item), who may stay: all that are known, and new ones with enough rows
    that stay."""
    users, items = np.ones(len(found.user_ids), bool), np.ones(len(found.item_ids), bool)
    while rules is not None:
        stay_R = users[found.users_R] & items[found.items_R]
        few_users = users & (
            np.bincount(found.users_R[stay_R], minlength=len(users)) < rules.min_length
        )
        few_items = items & (
            np.bincount(found.items_R[stay_R], minlength=len(items)) < rules.k_core
        )
        few_users[: old.num_users] = few_items[: old.num_items] = False
        if not few_users.any() and not few_items.any():
            break
        users &= ~few_users
        items &= ~few_items
    return users, items


def _placed(
    numbers_R: np.ndarray, ids: list[str], num_known: int, by_id: bool
) -> tuple[list[str], np.ndarray]:
    """(ids by row, row by number): the known ones as they were, behind them those of the others
    that have rows."""
    numbers = np.unique(numbers_R)
    found: list[int] = numbers[numbers >= num_known].tolist()
    if by_id:
        number_of = {ids[number]: number for number in found}
        found = [number_of[id_] for id_ in sort_ids(number_of)]
    rows = np.arange(len(ids))
    rows[num_known:] = -1
    rows[found] = np.arange(num_known, num_known + len(found))
    return [*ids[:num_known], *(ids[number] for number in found)], rows


def _merged(
    data: Dataset,
    rows: Incoming,
    user_rows: np.ndarray,
    item_rows: np.ndarray,
    user_ids: list[str],
    item_ids: list[str],
) -> tuple[Sequences, np.ndarray | None]:
    """Old rows keep their order among themselves, and so do new ones."""
    old = data.sequences
    users = np.concatenate(
        [np.repeat(np.arange(old.num_users), old.lengths), user_rows[rows.users_R]]
    )
    items = np.concatenate([old.items, item_rows[rows.items_R].astype(np.int32)])
    if data.timestamps is None:
        order, timestamps = np.argsort(users, kind="stable"), None
    else:
        assert rows.times_R is not None
        times = np.concatenate([data.timestamps, rows.times_R])
        order = np.lexsort((times, users))
        timestamps = times[order]
    offsets = np.zeros(len(user_ids) + 1, np.int64)
    np.cumsum(np.bincount(users, minlength=len(user_ids)), out=offsets[1:])
    return Sequences(items[order], offsets, user_ids, item_ids), timestamps


def _described(
    data: Dataset,
    grown: Sequences,
    items: str | Path | None,
    item_column: str | None,
    text_columns: Sequence[str] | None,
    title_column: str | None,
) -> tuple[Descriptions | None, Source | None]:
    """(texts of all items, the file that was read): old texts stay, others come from the file,
    where one is given."""
    if items is None:
        if (item_column, text_columns, title_column) != (None, None, None):
            raise ValueError(
                "a column of item ids, text or titles is named, and no table: give --items META"
            )
        before, more = data.descriptions, grown.num_items - data.sequences.num_items
        if before is None:
            return None, None
        titles = None if before.titles is None else [*before.titles, *[""] * more]
        return dataclasses.replace(before, texts=[*before.texts, *[""] * more], titles=titles), None
    found = read_descriptions(
        items, grown.item_ids, id_column=item_column, text_columns=text_columns, title_column=title_column
    )  # fmt: skip
    origin = Source(found.name, found.sha256)
    if data.descriptions is None:
        return found, origin
    merged = dataclasses.replace(
        data.descriptions, texts=_filled(data.descriptions.texts, found.texts)
    )
    if data.descriptions.titles is not None or found.titles is not None:
        titles = _filled(data.descriptions.titles or [], found.titles or [""] * grown.num_items)
        merged = dataclasses.replace(merged, titles=titles)
    return merged, origin


def _filled(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """The old texts where there are some, else the new ones."""
    return [
        before or after
        for before, after in zip([*old, *[""] * (len(new) - len(old))], new, strict=True)
    ]
