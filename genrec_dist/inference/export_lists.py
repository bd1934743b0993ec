"""Top lists of all users of a data directory, in one file, in the user's own ids."""

# U users of a window, N list

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from genrec_shards.atomic import atomic_file
from genrec_shards.dataset import Dataset
from genrec_shards.sequences import SplitView

from genrec_dist.decoding.searcher import TopItems
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.evaluation.metrics import TOP
from genrec_dist.evaluation.score_mixture import Mixture
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
    """Write `OUT/topN.parquet` (user, items, scores): lists for all users after their whole
    sequences, in row order. Collective.

    The bytes do not depend on the number of ranks; rank 0 holds the lists of one window of users at
    a time.

    Args:
        recommender: The run and its options.
        dataset: The data directory.
        out: Directory of the file.
        top: Length of the lists.
        batch_size: Users decoded at once.
        ranks: Who shares the work; None: this process alone.
        on_batch: Called with how many users have been decoded since the last call.
        window: Users of a row group.

    Returns:
        The file's path on rank 0, None elsewhere.

    Raises:
        ValueError: The run has another numbering. An error of one rank is raised on all of them,
            and then nothing is written.
    """
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
        mixture=recommender.mixture or Mixture(),
    )

    def open_file() -> ListsFile | None:
        check_numbering(recommender.run, dataset)
        return ListsFile(files, path, sequences.user_ids, recommender) if ranks.is_main else None

    with contextlib.ExitStack() as files:
        lists = ranks.run_on_all(open_file)
        windows = rank_windows(
            recommender.searcher, recommender.run.layout, view, np.arange(sequences.num_users),
            decoding, ranks, on_batch, window=window, history_scores=recommender.history_scores,
        )  # fmt: skip
        for found in windows:
            ranks.run_on_all(partial(lists.add, found) if lists else lambda: None)
        ranks.run_on_all(lists.finish if lists else lambda: None)
    return path if ranks.is_main else None


class ListsFile:
    """Takes lists of users in row order, a row group per window, and leaves a Parquet file of all
    of them, or nothing."""

    def __init__(
        self,
        files: contextlib.ExitStack,
        path: Path,
        user_ids: list[str],
        recommender: Recommender,
    ):
        """Open a temporary file in `files`, which removes it unless `finish` was called."""
        self.files, self.user_ids, self.num_written = files, user_ids, 0
        self.item_filter, self.mode = recommender.item_filter, recommender.mode
        self.item_ids = pa.array(recommender.run.catalogue.item_ids, pa.string())
        columns = [
            ("user", pa.string()),
            ("items", pa.list_(pa.string())),
            ("scores", pa.list_(pa.float32())),
        ]
        if self.mode == "free":
            columns += [("invalid", pa.int32()), ("duplicates", pa.int32())]
        self.schema = pa.schema(columns)
        temporary = files.enter_context(atomic_file(path))
        self.writer = files.enter_context(
            pq.ParquetWriter(temporary, self.schema, compression="zstd")
        )

    def add(self, found: Window) -> None:
        """Write a row group. Raises RuntimeError for users other than the next ones."""
        last = min(self.num_written + len(found.user_rows), len(self.user_ids))
        if not np.array_equal(found.user_rows, np.arange(self.num_written, last)):
            raise RuntimeError(
                f"after {self.num_written} of {len(self.user_ids)} users come others than the "
                "next ones"
            )
        shown = Shown.of(TopItems(found.items, found.scores), self.item_filter, self.mode)
        offsets = pa.array(np.concatenate([[0], np.cumsum(shown.keep_BN.sum(1))]), pa.int32())
        items = self.item_ids.take(pa.array(found.items[shown.keep_BN]))
        scores = pa.array(found.scores[shown.keep_BN], pa.float32())
        columns = [
            pa.array([self.user_ids[row] for row in found.user_rows], pa.string()),
            pa.ListArray.from_arrays(offsets, items),
            pa.ListArray.from_arrays(offsets, scores),
        ]
        if shown.invalid_B is not None:
            columns += [pa.array(c, pa.int32()) for c in (shown.invalid_B, shown.duplicates_B)]
        self.writer.write_table(pa.table(columns, schema=self.schema))
        self.num_written = last

    def finish(self) -> None:
        """Give the file its name. Raises RuntimeError if a user has no list."""
        if self.num_written != len(self.user_ids):
            raise RuntimeError(f"{self.num_written} of {len(self.user_ids)} users have a list")
        self.files.pop_all().close()
