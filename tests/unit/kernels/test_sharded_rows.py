"""Id tables outside autograd: the rule against dense references, any number of ranks, and no more
than the rows touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genrec_kernels.distinct_rows import distinct_rows, look_up
from genrec_kernels.row_blocks import BLOCK
from genrec_kernels.sharded_rows import RowTable
from hypothesis import given, settings
from hypothesis import strategies as st
from places import HELPERS
from rows_rank import DIM, KEY, KINDS, NUM_ROWS, RATE, STD, gradient_of, rows_of
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from two_ranks import start_each

SCRIPT = HELPERS / "rows_rank.py"


def table_of(num_rows: int = NUM_ROWS, dim: int = DIM, **more: Any) -> RowTable:
    return RowTable(num_rows, dim, **{"init_std": STD, "key": KEY, **more})


def some_rows(num_rows: int, count: int, seed: int = 0) -> torch.Tensor:
    rows = np.random.default_rng(seed).choice(num_rows, count, replace=False)
    return torch.from_numpy(np.sort(rows))


def step(table: RowTable, rows: torch.Tensor, gradient: torch.Tensor, **more: Any) -> None:
    assert torch.equal(table.fetch(rows), table.values[rows])
    table.update(gradient.clone(), **{"learning_rate": RATE, **more})


def check_same(ours: RowTable, theirs: RowTable) -> None:
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(ours.squares, theirs.squares)


# The distinct rows of a step.


@settings(deadline=None)
@given(
    st.sampled_from([40, 3_000_000]),
    st.lists(
        st.tuples(st.lists(st.integers(0, 40), max_size=30), st.sampled_from([np.int32, np.int64])),
        max_size=3,
    ),
    st.data(),
)
def test_distinct_rows_names_each_row_once_and_the_arrays_find_them(
    num_rows: int, parts: list, data: Any
) -> None:
    arrays = [
        np.array(values, kind).reshape(-1, 1 if len(values) % 2 else 2) for values, kind in parts
    ]
    if arrays and arrays[0].size and num_rows > 40:
        arrays[0].flat[0] = data.draw(st.integers(0, num_rows))
    rows, local = distinct_rows(arrays, num_rows)
    numbers = {0, *(int(number) for array in arrays for number in array.flat)}
    assert rows.dtype == torch.int64
    assert rows.tolist() == [number - 1 for number in sorted(numbers - {0})]
    with_zero = np.concatenate([[0], rows.numpy() + 1])
    for array, places in zip(arrays, local, strict=True):
        assert (places.dtype, places.shape) == (array.dtype, array.shape)
        assert np.array_equal(with_zero[places], array)


@pytest.mark.parametrize("num_rows", [10, 3_000_000])
@pytest.mark.parametrize("excess", [-1, 1])
def test_distinct_rows_names_an_id_outside_its_table(num_rows: int, excess: int) -> None:
    wrong = -1 if excess < 0 else num_rows + 1
    with pytest.raises(ValueError, match=f"id {wrong} is outside its table of {num_rows} rows"):
        distinct_rows([np.array([1, wrong])], num_rows)
    assert distinct_rows([np.array([1, num_rows])], num_rows)[0].tolist() == [0, num_rows - 1]


def test_fetched_rows_get_the_gradient_that_a_dense_embedding_gets() -> None:
    ids = np.random.default_rng(0).integers(0, 201, (8, 20))
    table = table_of(200, 16)
    rows_u, (places,) = distinct_rows([ids], 200)
    rows = table.fetch(rows_u, zero_row=True).requires_grad_()
    dense = torch.cat([torch.zeros(1, 16), table.values]).requires_grad_()
    weight = torch.randn(8, 20, 16, generator=torch.Generator().manual_seed(0))
    ours = look_up(rows, torch.from_numpy(places))
    theirs = F.embedding(torch.from_numpy(ids), dense, padding_idx=0)
    assert torch.equal(ours, theirs)
    (found,) = torch.autograd.grad(ours, rows, weight)
    (expected,) = torch.autograd.grad(theirs, dense, weight)
    torch.testing.assert_close(found[1:], expected[rows_u + 1])
    assert expected.count_nonzero() == found[1:].count_nonzero() > 0


# The start.


def test_row_starts_as_a_function_of_key_and_row() -> None:
    small, large = table_of(100), table_of(10 * BLOCK + 3)
    assert torch.equal(small.values, large.values[:100])
    assert torch.equal(small.values, table_of(100).values)
    assert not torch.isclose(small.values, table_of(100, key=KEY + 1).values).any()
    assert len(large.values.unique(dim=0)) == len(large.values)
    mean_error = STD / large.values.numel() ** 0.5
    assert large.values.mean().item() == pytest.approx(0, abs=5 * mean_error)
    assert large.values.std().item() == pytest.approx(STD, rel=0.02)
    assert not table_of(100, init_std=0).values.any()
    assert torch.equal(table_of(100, key=-1).values, table_of(100, key=2**64 - 1).values)
    assert not torch.equal(table_of(100, key=-1).values, table_of(100, key=-2).values)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_rows": 0}, "0 rows"),
        ({"dim": 0}, "width 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_of(**sizes)


# The rule.


@pytest.mark.parametrize("eps", [1e-10, 0.1])
def test_update_is_rowwise_adagrad(eps: float) -> None:
    """The formula on a dense table in fp64; the last steps have no row or zeros as their
    gradient."""
    table = table_of(500, 24)
    values, squares = table.values.double().numpy().copy(), np.zeros(500)
    for number, count in enumerate([60] * 25 + [0, 50]):
        rows = some_rows(500, count, number)
        gradient = gradient_of(number, 0, count, 24) * (count != 50)
        step(table, rows, gradient, learning_rate=0.3, eps=eps)
        dense = np.zeros_like(values)
        dense[rows] = gradient
        squares += (dense**2).mean(1)
        moved = squares > 0
        values[moved] -= 0.3 * dense[moved] / (np.sqrt(squares[moved]) + eps)[:, None]
    np.testing.assert_allclose(table.values.numpy(), values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table.squares.numpy(), squares, rtol=1e-5)


def test_at_width_one_update_is_torchs_adagrad() -> None:
    table = table_of(300, 1)
    parameter = torch.nn.Parameter(table.values.clone())
    rival = torch.optim.Adagrad([parameter], lr=0.2, eps=1e-10)
    for number in range(20):
        rows, gradient = some_rows(300, 40, number), gradient_of(number, 0, 40, 1)
        step(table, rows, gradient, learning_rate=0.2)
        parameter.grad = torch.zeros_like(parameter).index_copy_(0, rows, gradient)
        rival.step()
    torch.testing.assert_close(table.values, parameter.detach(), rtol=1e-5, atol=1e-6)
    sums = rival.state[parameter]["sum"]
    torch.testing.assert_close(table.squares[:, None], sums, rtol=1e-5, atol=0)


def test_scale_multiplies_the_gradient() -> None:
    scaled, multiplied = table_of(), table_of()
    rows, gradient = some_rows(NUM_ROWS, 100), gradient_of(0, 0, 100)
    step(scaled, rows, gradient, eps=0.5, scale=0.125)
    step(multiplied, rows, gradient * 0.125, eps=0.5)
    torch.testing.assert_close(scaled.values, multiplied.values)
    torch.testing.assert_close(scaled.squares, multiplied.squares)


def test_other_rows_keep_every_bit_whatever_the_gradient() -> None:
    table, clean, untouched = table_of(), table_of(), table_of()
    rows, gradient = some_rows(NUM_ROWS, 100), gradient_of(0, 0, 100)
    broken = gradient.clone()
    broken[3, 5], broken[7], broken[9, 0] = float("nan"), float("inf"), -float("inf")
    step(table, rows, broken)
    step(clean, rows, gradient)
    good = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill_(0, rows[[3, 7, 9]], False)
    assert torch.equal(table.values[good], clean.values[good])
    assert torch.equal(table.squares[good], clean.squares[good])
    others = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(table.values[others], untouched.values[others])
    assert not table.squares[others].any()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that operations make anew."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.elements = max(self.elements, storage.nbytes() // 4)
        return result


def test_step_makes_nothing_of_the_tables_size() -> None:
    table = table_of(20_000, 8)
    rows = some_rows(20_000, 100)
    with Largest(table.values, table.squares) as noted:
        table.fetch(rows)
        table.update(gradient_of(0, 0, 100, 8), learning_rate=RATE)
    assert 100 * 8 <= noted.elements <= 2 * 100 * 8
    with Largest(table.values, table.squares) as control:
        table.values + 1
    assert control.elements == 20_000 * 8


@pytest.mark.parametrize("rows", [[3, 3], [5, 4], [-1, 4], [4, NUM_ROWS]])
def test_fetch_refuses_rows_that_are_not_distinct_ascending_and_inside(rows: list[int]) -> None:
    with pytest.raises(AssertionError):
        table_of().fetch(torch.tensor(rows))


def test_each_update_needs_its_fetch() -> None:
    table = table_of()
    for _ in range(2):
        with pytest.raises(AssertionError, match="its own fetch"):
            table.update(torch.zeros(1, DIM), learning_rate=RATE)
        step(table, torch.tensor([4]), torch.zeros(1, DIM))
    table.fetch(torch.tensor([4]))
    with pytest.raises(AssertionError):
        table.update(torch.zeros(2, DIM), learning_rate=RATE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_cannot_use_the_table() -> None:
    table = table_of()
    child = os.fork()
    if child == 0:
        try:
            table.fetch(torch.tensor([4]))
        except AssertionError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(table.fetch(torch.tensor([4])), table_of().values[[4]])


# Files.


def trained_alone(num_ranks: int, fetched: list[list[np.ndarray]] | None = None) -> RowTable:
    """One process that takes the ranks' steps: their gradients added in the order of ranks.
    `fetched`: by rank, what it must have been given."""
    table = table_of()
    for number, kind in enumerate(KINDS):
        total = torch.zeros(NUM_ROWS, DIM)
        parts = [
            torch.from_numpy(rows_of(kind, number, rank, num_ranks)) for rank in range(num_ranks)
        ]
        for rank, rows in enumerate(parts):
            if fetched is not None:
                given = fetched[rank][number]
                assert np.array_equal(given, table.values[rows].numpy()), (kind, rank)
            total[rows] += gradient_of(number, rank, len(rows))
        union = torch.cat(parts).unique()
        step(table, union, total[union], scale=0.5)
    return table


def loaded(folder: Path, name: str = "items") -> RowTable:
    back = table_of(init_std=0)
    back.load(folder, name)
    return back


def test_saved_table_comes_back_to_the_bit(tmp_path: Path) -> None:
    table = trained_alone(2)
    table.save(tmp_path, "items")
    assert [path.name for path in tmp_path.iterdir()] == ["items-00000-of-00001.safetensors"]
    back = loaded(tmp_path)
    check_same(back, table)
    whole = back.full()
    assert whole is not None
    assert torch.equal(whole, table.values)
    assert whole.data_ptr() != back.values.data_ptr()


def save_by_hand(table: RowTable, folder: Path, num_ranks: int) -> None:
    """The files that so many ranks write, from their description: blocks in turn, and the table's
    sizes as metadata."""
    sizes = {"num_rows": table.num_rows, "dim": table.dim, "block": BLOCK}
    arrays = {"values": table.values, "squares": table.squares}
    for rank in range(num_ranks):
        parts = {
            name: torch.cat(tensor.split(BLOCK)[rank::num_ranks]) for name, tensor in arrays.items()
        }
        facts = json.dumps(sizes | {"rank": rank, "world_size": num_ranks})
        path = folder / f"items-{rank:05d}-of-{num_ranks:05d}.safetensors"
        save_file(parts, path, metadata={"rows": facts})


@pytest.mark.parametrize("num_ranks", [1, 4, 7])
def test_files_of_any_number_of_ranks_make_one_table(num_ranks: int, tmp_path: Path) -> None:
    table = trained_alone(2)
    save_by_hand(table, tmp_path, num_ranks)
    check_same(loaded(tmp_path), table)
    names = [tmp_path / f"items-{r:05d}-of-{num_ranks:05d}.safetensors" for r in range(num_ranks)]
    kept = names[-1].read_bytes()
    shutil.copy(names[0], foreign := tmp_path / "items-00000-of-00009.safetensors")
    with pytest.raises(ValueError, match=f"{foreign}: beside {names[0].name}"):
        loaded(tmp_path)
    foreign.unlink()
    if num_ranks > 1:
        shutil.copy(names[0], names[-1])
        with pytest.raises(ValueError, match=f"{names[-1]}: not rank {num_ranks - 1}"):
            loaded(tmp_path)
        names[-1].unlink()
        with pytest.raises(ValueError, match=f"{names[-1]}: missing"):
            loaded(tmp_path)
        names[-1].write_bytes(kept)


def test_load_names_files_that_do_not_make_the_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: holds no items-00000-of-00001"):
        loaded(tmp_path)
    first = table_of().save(tmp_path, "items")
    for other in (table_of(NUM_ROWS + 1), table_of(dim=DIM + 1)):
        sizes = f"{other.num_rows} rows of width {other.dim}"
        with pytest.raises(ValueError, match=f"{first}: not rank 0 of a table of {sizes}"):
            other.load(tmp_path, "items")
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{first}: damaged"):
        loaded(tmp_path)
    save_file({"values": torch.zeros(3)}, first)
    with pytest.raises(ValueError, match=f"{first}: not rank 0"):
        loaded(tmp_path)


# Ranks.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What two ranks leave, then three; each loads what one process and what four saved, the three
    also what the two saved."""
    base = tmp_path_factory.mktemp("rows")
    folders = {num_ranks: base / str(num_ranks) for num_ranks in (1, 4, 2, 3)}
    for folder in folders.values():
        folder.mkdir()
    trained_alone(2).save(folders[1], "items")
    save_by_hand(trained_alone(2), folders[4], 4)
    for num_ranks, saved in ((2, (1, 4)), (3, (1, 4, 2))):
        arguments = [SCRIPT, folders[num_ranks], *(folders[n] for n in saved)]
        ranks = start_each(arguments, base / f"logs-{num_ranks}", num_ranks)
        assert not any(rank.returncode for rank in ranks), ranks
    return folders


@pytest.mark.dist
@pytest.mark.ranks
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_do_what_one_process_does(folders: dict[int, Path], num_ranks: int) -> None:
    folder = folders[num_ranks]
    tables = {path.stem: torch.from_numpy(np.load(path)) for path in folder.glob("*.npy")}
    assert torch.equal(tables["initial"], table_of().values)
    # Every rank is given the rows it requested, and the end is the same to the bit: the one process
    # adds the gradients in the same order.
    archives = [np.load(folder / f"fetched-{rank}.npz") for rank in range(num_ranks)]
    fetched = [[one[f"arr_{number}"] for number in range(len(KINDS))] for one in archives]
    alone = trained_alone(num_ranks, fetched)
    assert torch.equal(tables["trained"], alone.values)
    assert not torch.equal(alone.values, table_of().values)
    # A gradient that does not arrive would be seen.
    assert (tables["lost"] - alone.values).abs().max() > 1e-3
    # Files load at any number of ranks, squares too.
    check_same(loaded(folder), alone)
    source = trained_alone(2)
    for number in range(num_ranks):
        assert torch.equal(tables[f"loaded-{number}"], source.values), number
        assert torch.equal(loaded(folder, f"again-{number}").squares, source.squares), number
    for rank, path in enumerate(sorted(folder.glob("items-*.safetensors"))):
        blocks = alone.values.split(BLOCK)[rank::num_ranks]
        assert torch.equal(load_file(path)["values"], torch.cat(blocks))


@pytest.mark.dist
@pytest.mark.ranks
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_send_touched_rows_alone_and_repeat_every_bit(
    folders: dict[int, Path], num_ranks: int
) -> None:
    # A remote row costs its id (int32) on the way there, its values back, its gradient there; a
    # step its counts (int64).
    sent = [8 * (num_ranks - 1) * len(KINDS)] * num_ranks
    touched = 0
    for number, kind in enumerate(KINDS):
        for rank in range(num_ranks):
            rows = rows_of(kind, number, rank, num_ranks)
            touched += len(rows)
            owners = np.bincount(rows // BLOCK % num_ranks, minlength=num_ranks)
            for owner in set(range(num_ranks)) - {rank}:
                sent[rank] += int(owners[owner]) * (4 + DIM * 4)
                sent[owner] += int(owners[owner]) * DIM * 4
    paths = [folders[num_ranks] / f"facts-{rank}.json" for rank in range(num_ranks)]
    facts = [json.loads(path.read_text()) for path in paths]
    assert [one["bytes_sent"] for one in facts] == sent
    assert sum(one["rows_fetched"] for one in facts) == touched
    assert sum(sent) <= 2 * touched * DIM * 4
    assert [one["digests"] for one in facts] == [1] * num_ranks
