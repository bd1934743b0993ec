"""A data directory grows: new interactions, users and items after the old ones, whose rows and
codes stay what they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genrec_shards.atomic import atomic_directory
from genrec_shards.cleaning.appended_rows import (
    Incoming,
    check_not_there,
    in_time_order,
    read_incoming,
    without_known,
)
from genrec_shards.cleaning.clean import Cleaning
from genrec_shards.cleaning.left_out import left_out
from genrec_shards.dataset import Appended, Dataset, load_dataset, write_dataset
from genrec_shards.errors import BadLines, DataError
from genrec_shards.numbering.extend import continued
from genrec_shards.numbering.item_text import Descriptions
from genrec_shards.numbering.numbering import DESCRIBED
from genrec_shards.prepare import Finish, PrepareOptions, source_of_texts
from genrec_shards.readers.recognise import guess_format
from genrec_shards.readers.text_blocks import check_readable
from genrec_shards.sequences import Sequences, offsets_of, sort_ids
from genrec_shards.splits import LEAVE_ONE_OUT

# R rows that are appended, U users, N items, both with the new ones

FILES = (
    *("sequences.parquet", "items.parquet", "users.parquet", "dataset.json", "audit.json"),
    "text",  # vectors, which are made again
)
"""What a data directory holds beside shards."""
SETTLED = (
    *("numbering", "seed", "levels", "vectors", "vectors_trained_through"),
    *("ties", "expect", "split", "cutoff"),
)
"""Options that the data directory has settled."""


def append(
    new: str | Path,
    to: str | Path,
    out: str | Path | None = None,
    options: PrepareOptions | None = None,
    finish: Finish | None = None,
    **fields: Any,
) -> Dataset:
    """Add a source to a data directory; complete or not at all.

    Rows and codes of old users and items stay what they were; new ones get the next rows
    (`sort_ids`; users of other formats than a log's as they come) and codes beside the old ones
    (`numbering/extend.py`). Where both have times a user's rows are merged by them, new ones after
    old ones of the same time, and a row that is there already is a duplicate. Where `to` has none,
    new rows come after the old ones. A new item of a log needs `k_core` rows in it, a new user
    `min_length`, again and again until all have enough; in other formats a new user needs 3. What
    was left out before stays out. Texts are read for items that have none. Shards inside `to`
    belong to the old sequences and go with them. The source is held in memory, about 100 bytes per
    row.

    Args:
        new: the source.
        to: the data directory.
        out: the data directory to write; None replaces `to`.
        options: as of `prepare`, without those that `to` has settled.
        finish: adds to what the directory holds.
        fields: fields of `options` by name, in place of those in it.

    Raises:
        DataError: there is nothing to append, or it cannot be told from what is there.
        ValueError: a wrong argument.
    """
    options = dataclasses.replace(options or PrepareOptions(), **fields)
    new, to = Path(new), Path(to)
    for name in SETTLED:
        if getattr(options, name) != getattr(PrepareOptions(), name):
            raise ValueError(f"{name} with append: {to} has settled it, leave it out")
    target = to if out is None else Path(out)
    in_place = target.resolve() == to.resolve()
    data = load_dataset(to)
    if data.info.split != LEAVE_ONE_OUT:
        raise DataError(
            f"{to}: split {data.info.split}: its dates say what is held out, appending is for "
            f"{LEAVE_ONE_OUT}: prepare the whole log again"
        )
    for path in sorted(to.iterdir()) if in_place else ():
        if path.name not in FILES and not (path / "manifest.json").is_file():
            lost = "is no part of a data directory and would be lost"
            raise ValueError(f"{path} {lost}: move it away, or give --out")
    check_readable(new)
    format = options.format
    if format == "auto":
        format = guess_format(new, options.log.columns)
    options.check(format, new)
    timed = data.timestamps is not None
    kept_ties = timed and data.info.ties == "keep"
    cleaning = dataclasses.replace(
        options.cleaning(), ties="keep" if kept_ties else "shuffle", seed=data.info.seed
    )
    bad = BadLines(options.on_error)
    with atomic_directory(target, options.overwrite or in_place, marker="dataset.json") as folder:
        found = read_incoming(new, format, data, bad, options.log)
        if timed and not found.has_times:
            has_none = f"{new}: no times, and the rows of {to} have some"
            raise DataError(f"{has_none}: append a log with times")
        rows, dropped = _selected(data, found, cleaning, bad.count, str(new))
        grown, timestamps = _merged(data, rows)
        read = options.descriptions(grown.item_ids)
        descriptions = _descriptions(data.descriptions, read, grown.num_items)
        described = data.info.numbering in DESCRIBED
        numbering = continued(data.numbering, grown, descriptions if described else None)
        num_read = len(found.rows_R) + bad.count
        assert not rows.is_log or len(rows.rows_R) + sum(dropped.values()) == num_read
        entry = Appended(
            source=rows.source,
            interactions=len(rows.rows_R),
            users=grown.num_users - data.sequences.num_users,
            items=grown.num_items - data.sequences.num_items,
            dropped={reason: count for reason, count in dropped.items() if count or rows.is_log},
            read=num_read if rows.has_times else None,
            k_core=cleaning.k_core if rows.is_log else None,
            min_length=cleaning.fewest if rows.is_log else None,
            described_by=source_of_texts(read),
            read_as=rows.read_as,
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
            described_by=source_of_texts(descriptions),
            items_with_text=None if descriptions is None else descriptions.num_described,
            appended=(*(data.info.appended or ()), entry),
        )
        bad_lines = tuple(bad.summary())
        dataset = Dataset(target, grown, numbering, info, descriptions, timestamps, bad_lines)
        write_dataset(dataset, folder)
        if finish is not None:
            finish(dataset, folder)
    return dataset


def _selected(
    data: Dataset, found: Incoming, cleaning: Cleaning, bad_lines: int, place: str
) -> tuple[Incoming, dict[str, int]]:
    """The rows that may stay, in order, and how many others there are by reason."""
    old, times_R = data.sequences, found.rows_R["time"]
    inside_R = np.ones(len(times_R), bool)
    if cleaning.since is not None:
        inside_R &= times_R >= cleaning.since
    if cleaning.until is not None:
        inside_R &= times_R <= cleaning.until
    inside = found.keep(inside_R)
    rows = in_time_order(without_known(inside, data), cleaning)
    users_R, items_R = rows.rows_R["user"], rows.rows_R["item"]
    users_stay, items_stay = np.ones(len(rows.user_ids), bool), np.ones(len(rows.item_ids), bool)
    while rows.is_log:
        # Old users and items stay whatever they have; new ones need enough rows that stay.
        stay_R = users_stay[users_R] & items_stay[items_R]
        counts_U = np.bincount(users_R[stay_R], minlength=len(users_stay))
        counts_N = np.bincount(items_R[stay_R], minlength=len(items_stay))
        few_U, few_N = (
            users_stay & (counts_U < cleaning.fewest),
            items_stay & (counts_N < cleaning.k_core),
        )
        few_U[: old.num_users] = few_N[: old.num_items] = False
        if not few_U.any() and not few_N.any():
            break
        users_stay &= ~few_U
        items_stay &= ~few_N
    by_item_R = ~items_stay[items_R]
    by_user_R = ~by_item_R & ~users_stay[users_R]
    dropped = {
        "bad_lines": bad_lines,
        "outside_dates": int((~inside_R).sum()),
        "duplicates": len(inside.rows_R) - len(rows.rows_R),
        "new_items_below_k": int(by_item_R.sum()),
        "new_users_below_min_length": int(by_user_R.sum()),
    }
    rows = rows.keep(~by_item_R & ~by_user_R)
    if not len(rows.rows_R):
        rules = {"k_core": cleaning.k_core, "min_length": cleaning.fewest}
        counts = left_out(dropped, rules) or "no rows"
        lacks = f"nothing in it that {data.path} lacks and may take ({counts})"
        raise DataError(f"{place}: {lacks}: nothing was appended")
    if data.timestamps is None:
        check_not_there(rows, data, place)
    return rows, dropped


def _merged(data: Dataset, rows: Incoming) -> tuple[Sequences, np.ndarray | None]:
    """Sequences and timestamps of the data and new rows; old rows keep their order among
    themselves, and so do new ones."""
    old, new_R = data.sequences, rows.rows_R
    user_ids, user_rows = _placed(new_R["user"], rows.user_ids, old.num_users, by_id=rows.is_log)
    item_ids, item_rows = _placed(new_R["item"], rows.item_ids, old.num_items, by_id=True)
    old_users = np.repeat(np.arange(old.num_users), old.lengths)
    users = np.concatenate([old_users, user_rows[new_R["user"]]])
    items = np.concatenate([old.items, item_rows[new_R["item"]].astype(np.int32)])
    if data.timestamps is None:
        order, timestamps = np.argsort(users, kind="stable"), None
    else:
        times = np.concatenate([data.timestamps, new_R["time"]])
        order = np.lexsort((times, users))
        timestamps = times[order]
    offsets = offsets_of(np.bincount(users, minlength=len(user_ids)))
    return Sequences(items[order], offsets, user_ids, item_ids), timestamps


def _placed(
    numbers_R: np.ndarray, ids: list[str], num_known: int, by_id: bool
) -> tuple[list[str], np.ndarray]:
    """(ids by row, row by number): the known ones as they were, then those of the others that have
    rows. `by_id`: these in the order of `sort_ids`."""
    numbers = np.unique(numbers_R)
    found: list[int] = numbers[numbers >= num_known].tolist()
    if by_id:
        number_of = {ids[number]: number for number in found}
        found = [number_of[id_] for id_ in sort_ids(number_of)]
    rows = np.arange(len(ids))
    rows[num_known:] = -1
    rows[found] = np.arange(num_known, num_known + len(found))
    return [*ids[:num_known], *(ids[number] for number in found)], rows


def _descriptions(
    old: Descriptions | None, read: Descriptions | None, num_items: int
) -> Descriptions | None:
    """Texts of all items: old ones stay, others come from the file that was read, if any."""
    if old is None:
        return read
    none = [""] * num_items
    texts = _filled(old.texts, none if read is None else read.texts)
    titles = None
    if old.titles is not None or (read is not None and read.titles is not None):
        new_titles = none if read is None or read.titles is None else read.titles
        titles = _filled(old.titles or [], new_titles)
    return dataclasses.replace(old, texts=texts, titles=titles)


def _filled(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """The old texts where there are some, else the new ones."""
    padded = [*old, *[""] * (len(new) - len(old))]
    return [before or after for before, after in zip(padded, new, strict=True)]
