"""Top lists of all users of a data directory, in one file, in the user's own ids."""

# U users of a window, N list

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from genrec_shards.atomic import atomic_file
from genrec_shards.dataset import Dataset
from genrec_shards.sequences import SplitView

from genrec_dist.decoding.searcher import TopItems
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.evaluation.metrics import TOP
from genrec_dist.inference.load import check_numbering
from genrec_dist.inference.rank_users import WINDOW, Decoding, Window, rank_windows
from genrec_dist.inference.recommend import REQUESTS_AT_ONCE, Recommender, Shown


def recommend_all(
    recommender: Recommender,
    dataset: Dataset,
    out: str | Path,
    *,
    top: int = TOP,
    batch_size: int = REQUESTS_AT_ONCE,
    ranks: Ranks | None = None,
    on_batch: Callable[[int], None] | None = None,
    window: int = WINDOW,
) -> Path | None:
    """Lists for all users after their whole sequences: `OUT/topN.parquet` (user, items, scores), in
    row order. Collective.

    The bytes do not depend on the number of ranks; rank 0 holds the lists of one window of users at
    a time. Returns the file's path on rank 0, None elsewhere. Raises ValueError if the run speaks
    another numbering; an error of one rank on all of them, and then nothing is written. `on_batch`
    hears how many users have been decoded since."""
    ranks = ranks or Ranks()
    sequences = dataset.sequences
    path = Path(out) / f"top{top}.parquet"
    no_target_U = np.full(sequences.num_users, -1, np.int32)
    view = SplitView(
        "test", sequences.items, sequences.offsets[:-1], sequences.offsets[1:], no_target_U
    )
    decoding = Decoding(
        beam=recommender.beam,
        top=top,
        mode=recommender.mode,
        exclude_history=recommender.exclude_history,
        batch_size=batch_size,
    )

    def opened() -> ListsFile | None:
        check_numbering(recommender.run, dataset)
        return (
            files.enter_context(ListsFile(path, sequences.user_ids, recommender))
            if ranks.is_main
            else None
        )

    def add(found: Window) -> None:
        if lists is not None:
            lists.add(found)

    with contextlib.ExitStack() as files:
        lists = ranks.together(opened)
        users_U, searcher, layout = (
            np.arange(sequences.num_users),
            recommender.searcher,
            recommender.run.layout,
        )
        for found in rank_windows(
            searcher, layout, view, users_U, decoding, ranks, on_batch, window=window
        ):
            ranks.together(partial(add, found))
        ranks.together(lambda: None if lists is None else lists.finish())
    return path if ranks.is_main else None


class ListsFile:
    """Takes lists of users in row order, a row group a window, and leaves a Parquet file of all of
    them, or nothing."""

    def __init__(self, path: Path, user_ids: list[str], recommender: Recommender):
        self.path, self.user_ids = path, user_ids
        self.item_filter, self.mode = recommender.item_filter, recommender.mode
        self._item_ids = pa.array(recommender.run.catalogue.item_ids, pa.string())
        self._seen = 0
        self._files = contextlib.ExitStack()

    @property
    def schema(self) -> pa.Schema:
        fields = [
            ("user", pa.string()),
            ("items", pa.list_(pa.string())),
            ("scores", pa.list_(pa.float32())),
        ]
        counts = (
            [("invalid", pa.int32()), ("duplicates", pa.int32())] if self.mode == "free" else []
        )
        return pa.schema(fields + counts)

    def __enter__(self) -> ListsFile:
        temporary = self._files.enter_context(atomic_file(self.path))
        self._writer = self._files.enter_context(
            pq.ParquetWriter(temporary, self.schema, compression="zstd")
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After `finish` there is nothing left to undo.
        error = error or RuntimeError(f"{self.path}: left after {self._seen} users")
        self._files.__exit__(type(error), error, error.__traceback__)

    def add(self, found: Window) -> None:
        """Raises RuntimeError for users other than the next ones."""
        next_U = np.arange(self._seen, min(self._seen + len(found.user_rows), len(self.user_ids)))
        if not np.array_equal(found.user_rows, next_U):
            raise RuntimeError(
                f"after {self._seen} of {len(self.user_ids)} users come others than the next ones"
            )
        self._writer.write_table(self._table(found))
        self._seen += len(next_U)

    def finish(self) -> None:
        """Give the file its name. Raises RuntimeError if a user has no list."""
        if self._seen != len(self.user_ids):
            raise RuntimeError(f"{self._seen} of {len(self.user_ids)} users have a list")
        self._files.close()

    def _table(self, found: Window) -> pa.Table:
        shown = Shown.of(TopItems(found.items, found.scores), self.item_filter, self.mode)
        offsets = pa.array(np.concatenate([[0], np.cumsum(shown.keep_BN.sum(1))]), pa.int32())
        columns = [
            pa.array([self.user_ids[row] for row in found.user_rows], pa.string()),
            pa.ListArray.from_arrays(
                offsets, self._item_ids.take(pa.array(found.items[shown.keep_BN]))
            ),
            pa.ListArray.from_arrays(offsets, pa.array(found.scores[shown.keep_BN], pa.float32())),
        ]
        if shown.invalid_B is not None:
            columns += [
                pa.array(shown.invalid_B, pa.int32()),
                pa.array(shown.duplicates_B, pa.int32()),
            ]
        return pa.table(columns, schema=self.schema)
