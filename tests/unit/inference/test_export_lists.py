"""All users in one file: each once, in their own ids, the same bytes for any number of ranks, and
nothing where it fails."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from all_users_rank import WAYS
from genrec_shards.dataset import Dataset
from genrec_shards.prepare import prepare
from places import HELPERS
from two_ranks import environment, start_each

from genrec_dist.inference.export_lists import ListsFile, recommend_all
from genrec_dist.inference.rank_users import Window
from genrec_dist.inference.recommend import Recommender, user_request

SCRIPT = HELPERS / "all_users_rank.py"


def test_recommend_all_gives_each_user_a_row(
    recommender: Recommender, dataset: Dataset, tmp_path: Path
) -> None:
    done: list[int] = []
    path = recommend_all(
        recommender, dataset, tmp_path, top=10, batch_size=50, on_batch=done.append
    )
    assert path == tmp_path / "top10.parquet"
    assert [entry.name for entry in tmp_path.iterdir()] == ["top10.parquet"]
    assert sum(done) == 120
    table = pq.read_table(path)
    rows = table.to_pydict()
    assert list(rows) == ["user", "items", "scores"]
    assert rows["user"] == dataset.sequences.user_ids
    assert table.schema.field("items").type == pa.list_(pa.string())
    assert table.schema.field("scores").type == pa.list_(pa.float32())
    assert list(map(len, rows["items"])) == [10] * 119 + [0]  # the last user has all items
    assert list(map(len, rows["scores"])) == list(map(len, rows["items"]))
    # The same as a request for one user after their whole sequence.
    (answer,) = recommender.recommend([user_request(dataset, recommender.run, "user-17")], k=10)
    assert rows["items"][17] == answer.items
    assert rows["scores"][17] == pytest.approx(answer.scores, rel=1e-6)


def test_a_window_is_a_row_group_and_moves_no_list(
    recommender: Recommender, dataset: Dataset, tmp_path: Path
) -> None:
    whole = recommend_all(recommender, dataset, tmp_path / "whole")
    parts = recommend_all(recommender, dataset, tmp_path / "parts", batch_size=7, window=50)
    assert pq.ParquetFile(whole).num_row_groups == 1
    metadata = pq.ParquetFile(parts).metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [50, 50, 20]
    left, right = pq.read_table(whole), pq.read_table(parts)
    assert left.select(["user", "items"]) == right.select(["user", "items"])


def test_recommend_all_lists_what_the_recommender_may_list(
    recommender: Recommender, dataset: Dataset, tmp_path: Path
) -> None:
    """Other options than a run's own: history kept in, items chosen, texts without a trie."""
    allow = dataset.sequences.item_ids[:30]
    chosen = Recommender(recommender.run, exclude_history=False, allow=allow, block=allow[:3])
    path = recommend_all(chosen, dataset, tmp_path / "chosen", top=40)
    lists = pq.read_table(path).column("items").to_pylist()
    assert all(set(row) == set(allow[3:]) for row in lists)
    freely = Recommender(recommender.run, mode="free", exclude_history=False, block=allow[:3])
    table = pq.read_table(recommend_all(freely, dataset, tmp_path / "free"))
    (answer,) = freely.recommend([user_request(dataset, recommender.run, "user-17")])
    row = table.slice(17, 1).to_pylist()[0]
    assert row["items"] == answer.items
    assert (row["invalid"], row["duplicates"]) == (answer.invalid, answer.duplicates)
    assert sum(table.column("invalid").to_pylist()) > 0


def write_lists(
    recommender: Recommender, path: Path, users: list[str], rows: list[list[int]], item: int = 0
) -> None:
    """A file of windows of these users, each list twenty times `item`."""
    with ExitStack() as files:
        lists = ListsFile(files, path, users, recommender)
        for window in rows:
            shape = (len(window), 20)
            scores = np.full(shape, -1.0 if item >= 0 else -np.inf, np.float32)
            lists.add(Window(np.array(window), np.full(shape, item, np.int32), scores))
        lists.finish()


def test_lists_file_has_one_schema_also_where_nobody_has_anything_left(
    recommender: Recommender, tmp_path: Path
) -> None:
    """Columns of empty lists keep their types."""
    write_lists(recommender, tmp_path / "lists.parquet", ["a", "b"], [[0, 1]], item=-1)
    table = pq.read_table(tmp_path / "lists.parquet")
    assert table.schema.field("items").type == pa.list_(pa.string())
    assert table.to_pylist() == [{"user": name, "items": [], "scores": []} for name in "ab"]


@pytest.mark.parametrize("rows", [[[0, 1]], [[0, 1], [1]], [[0, 2]], [[1, 0]], [[0, 1, 2], [3]]])
def test_a_user_twice_or_never_leaves_no_file(
    recommender: Recommender, tmp_path: Path, rows: list[list[int]]
) -> None:
    with pytest.raises(
        RuntimeError, match=r"come others than the next ones|of 3 users have a list"
    ):
        write_lists(recommender, tmp_path / "lists.parquet", ["a", "b", "c"], rows)
    assert list(tmp_path.iterdir()) == []


def test_recommend_all_that_fails_leaves_what_was_there(
    recommender: Recommender, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "top20.parquet"
    path.write_text("an older file")
    add = ListsFile.add

    def fail_late(lists: ListsFile, found: Window) -> None:
        if found.user_rows[0]:
            raise OSError(28, "No space left on device")
        add(lists, found)

    monkeypatch.setattr(ListsFile, "add", fail_late)
    with pytest.raises(OSError, match="No space left") as failure:
        recommend_all(recommender, dataset, tmp_path, window=50)
    assert failure.value.filename == str(path)
    assert path.read_text() == "an older file"
    assert [entry.name for entry in tmp_path.iterdir()] == ["top20.parquet"]


def test_recommend_all_refuses_other_data(
    recommender: Recommender, dataset: Dataset, tmp_path: Path
) -> None:
    other = prepare(dataset.path.parent / "log.txt", tmp_path / "data", numbering="random", seed=1)
    with pytest.raises(ValueError, match="give --data the directory the run was trained on"):
        recommend_all(recommender, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def alone(tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone")
    done = forked.run([SCRIPT, tiny_run, tiny_data, out], environment(), timeout=300)
    assert done.returncode == 0, done
    return out


@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.ranks)])
def test_any_number_of_ranks_writes_the_same_bytes(
    alone: Path, tiny_run: Path, tiny_data: Path, tmp_path: Path, num_ranks: int
) -> None:
    """Real gloo ranks; numbers of batches that 2 and 3 do not divide, and one batch for all
    ranks."""
    done = start_each(
        [SCRIPT, tiny_run, tiny_data, tmp_path / "out"], tmp_path / "logs", num_ranks, timeout=300
    )
    assert not any(rank.returncode for rank in done), done
    assert "120 users, 64 items to choose from" in done[0].stdout
    assert done[0].stdout.count("\n") == 1
    assert not any(rank.stdout for rank in done[1:])  # rank 0 alone prints
    files = sorted(
        path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.parquet")
    )
    assert {file.parts[0] for file in files} == {*WAYS, "command"}
    assert files == sorted(path.relative_to(alone) for path in alone.rglob("*") if path.is_file())
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (alone / file).read_bytes(), file


@pytest.mark.dist
@pytest.mark.ranks
def test_a_place_that_cannot_be_written_ends_all_ranks(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "inside"
    command = ["-m", "genrec_dist.cli", "recommend", tiny_run, "--all-users", "--out", out]
    for rank in start_each(command, tmp_path / "logs", timeout=300):
        assert rank.returncode == 1
        (line,) = [line for line in rank.stderr.splitlines() if line.startswith("genrec: ")]
        assert str(tmp_path / "file") in line
        assert "Traceback" not in rank.stderr
