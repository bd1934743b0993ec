"""What a person would look up in a run's lists: the items that are listed most, and some users with
their history, list and target."""

# U users, N list

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from genrec_shards.dataset import load_info
from genrec_shards.histories import sample_users
from genrec_shards.sequences import Sequences, offsets_of
from genrec_shards.splits import Split, cutoff_of

LISTED = 10
"""Places of a list that are counted and shown, as HR@10 and NDCG@10 do."""
MOST = 15
"""Items in the table of those that are listed most."""
OF_EACH = 5
"""Users drawn of those whose target is among the LISTED, and of the others."""
LATEST = 5
"""Items of a history that are shown."""
_SEED = 0
_COLUMNS = {
    "user": pa.string(),
    "target": pa.string(),
    "items": pa.list_(pa.string()),
    "rank": pa.int32(),
}


@dataclass(frozen=True)
class ListedItem:
    """An item, and in how many users' first LISTED places and as whose target it occurs."""

    item: str
    lists: int
    targets: int


@dataclass(frozen=True)
class Example:
    """One user, named by their row in the file of lists alone."""

    row: int
    target: str
    rank: int
    """Place of the target; 0: not listed."""
    items: list[str | None]
    """The first LISTED; None is a generated text that is no item."""
    history: list[str]
    """The LATEST items, oldest first; empty where the data is not at hand."""
    length: int | None = None
    """Items of the whole history; None where the data is not at hand."""

    @property
    def is_hit(self) -> bool:
        return 1 <= self.rank <= LISTED


@dataclass(frozen=True)
class ListExamples:
    """What the report shows of one file of lists."""

    name: str
    """Of the file."""
    users: int
    hits: int
    """Users whose target is among the first LISTED."""
    most_listed: list[ListedItem]
    examples: list[Example]
    titles: dict[str, str]
    """Of the items above, those that have one."""


def read_list_examples(
    lists: Path, split: Split, folders: Sequence[Path], notes: list[str]
) -> ListExamples | None:
    """Read a file of lists, and histories and titles where a data directory is at hand.

    Args:
        lists: `topN-SPLIT.parquet`.
        split: whose targets they were scored against.
        folders: where histories and titles are looked for, the data directory first; those that do
            not exist are passed over.
        notes: takes a sentence for what cannot be read.

    Returns:
        None where the lists cannot be read.
    """
    try:
        found, user_ids = _read_lists(lists)
    except (OSError, ValueError, pa.ArrowException) as error:
        notes.append(f"{lists.name}: {_first_line(error)}: evaluate again")
        return None
    examples, titles = found.examples, {}
    wanted = {listed.item for listed in found.most_listed}
    for folder in folders:
        try:
            if (folder / "sequences.parquet").is_file():
                examples = _with_histories(examples, user_ids, folder, split)
                break
        except (OSError, ValueError, LookupError, pa.ArrowException) as error:
            notes.append(f"{folder}: no histories: {_first_line(error)}")
    for one in examples:
        wanted |= {one.target, *one.history, *(item for item in one.items if item is not None)}
    for folder in folders:
        try:
            if titles := _titles_of(folder / "items.parquet", wanted):
                break
        except (OSError, ValueError, pa.ArrowException) as error:
            notes.append(f"{folder}: no titles: {_first_line(error)}")
    return replace(found, examples=examples, titles=titles)


def _read_lists(path: Path) -> tuple[ListExamples, list[str]]:
    """Examples without histories and titles, and the users' ids, which stay here."""
    listed, targets = Counter[str](), Counter[str]()
    ranks = []
    with _open(path, _COLUMNS) as file:
        for batch in file.iter_batches(columns=list(_COLUMNS)):
            if gaps := [name for name in _COLUMNS if batch.column(name).null_count]:
                raise ValueError(f"column {gaps[0]} has gaps")
            first = pc.list_slice(batch.column("items"), 0, LISTED)
            for counter, values in ((listed, pc.list_flatten(first)), (targets, batch["target"])):
                counted = pc.value_counts(values.drop_null())
                names, counts = (counted.field(name).to_pylist() for name in ("values", "counts"))
                counter.update(dict(zip(names, counts, strict=True)))
            ranks.append(batch.column("rank").to_numpy(zero_copy_only=False))
        ranks_U = np.concatenate([np.empty(0, np.int32), *ranks])
        hit_U = (ranks_U >= 1) & (ranks_U <= LISTED)
        rows = [
            int(row)
            for chosen in (np.flatnonzero(hit_U), np.flatnonzero(~hit_U))
            for row in chosen[sample_users(len(chosen), OF_EACH, _SEED)]
        ]
        shown = _rows_of(file, rows, list(_COLUMNS)).to_pylist()
    examples = [
        Example(row, one["target"], one["rank"], (one["items"] or [])[:LISTED], [])
        for row, one in zip(rows, shown, strict=True)
    ]
    # Of equal counts the smaller id, so that a page is the same each time.
    most = sorted(listed.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST]
    facts = ListExamples(
        name=path.name,
        users=len(ranks_U),
        hits=int(hit_U.sum()),
        most_listed=[ListedItem(item, count, targets[item]) for item, count in most],
        examples=examples,
        titles={},
    )
    return facts, [one["user"] for one in shown]


def _with_histories(
    examples: list[Example], user_ids: list[str], folder: Path, split: Split
) -> list[Example]:
    """The examples with the histories that a data directory has; only their users are read. Raises
    ValueError where the directory's targets are others."""
    info = load_info(folder / "dataset.json")
    with _open(folder / "users.parquet", {"id": pa.string()}) as file:
        known = file.read(columns=["id"]).column("id")
    rows = [pc.index(known, one).as_py() for one in user_ids]
    columns = ["items", *(["times"] if info.global_time is not None else [])]
    with _open(folder / "sequences.parquet", {"items": pa.list_(pa.int32())}) as file:
        found = _rows_of(file, rows, columns)
    sequences = found.column("items").combine_chunks()
    offsets = offsets_of(sequences.value_lengths().to_numpy())
    periods = None
    if info.global_time is not None:
        times = found.column("times").combine_chunks().flatten().to_numpy()
        periods = cutoff_of(info.global_time.cutoff).periods(times, offsets)
    with _open(folder / "items.parquet", {"id": pa.string()}) as file:
        item_ids = file.read(columns=["id"]).column("id")
    view = Sequences(
        sequences.flatten().to_numpy(), offsets, user_ids, [], periods
    ).history_and_target(split)

    def ids_of(rows: np.ndarray) -> list[str]:
        return item_ids.take(pa.array(rows)).to_pylist()

    if ids_of(view.targets) != [one.target for one in examples]:
        raise ValueError("its targets are not those of the lists: evaluate on it again")
    return [
        replace(
            one,
            history=ids_of(view.items[max(start, end - LATEST) : end]),
            length=int(end - start),
        )
        for one, start, end in zip(examples, view.starts, view.ends, strict=True)
    ]


def _titles_of(path: Path, wanted: Collection[str]) -> dict[str, str]:
    """Titles of the wanted items, or where the table has no column of them their texts."""
    if not path.is_file():
        return {}
    with _open(path, {"id": pa.string()}) as file:
        names = file.schema_arrow.names
        column = next((name for name in ("title", "text") if name in names), None)
        if column is None:
            return {}
        table = file.read(columns=["id", column])
    table = table.filter(pc.is_in(table.column("id"), pa.array(sorted(wanted), pa.string())))
    pairs = zip(table.column("id").to_pylist(), table.column(column).to_pylist(), strict=True)
    return {item: title for item, title in pairs if title}


def _open(path: Path, columns: dict[str, pa.DataType]) -> pq.ParquetFile:
    """The file, if it has these columns. Not `read_table`, which would open an address."""
    file = pq.ParquetFile(path)
    for name, kind in columns.items():
        place = file.schema_arrow.get_field_index(name)
        if place < 0 or not file.schema_arrow.field(place).type.equals(kind):
            file.close()
            raise ValueError(f"{path.name} has no column {name} of type {kind}")
    return file


def _rows_of(file: pq.ParquetFile, rows: Sequence[int], columns: list[str]) -> pa.Table:
    """These rows in their order; only their row groups are read."""
    groups = [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)]
    ends = np.cumsum(groups)
    needed = np.searchsorted(ends, rows, side="right")
    if len(rows) and (min(rows) < 0 or needed.max() >= len(groups)):
        raise ValueError("a user of the lists is not among its users")
    parts = {
        group: file.read_row_group(int(group), columns=columns) for group in sorted(set(needed))
    }
    empty = file.schema_arrow.empty_table().select(columns)
    return pa.concat_tables(
        [
            empty,
            *(
                parts[group].slice(int(row - (ends[group] - groups[group])), 1)
                for row, group in zip(rows, needed, strict=True)
            ),
        ]
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
