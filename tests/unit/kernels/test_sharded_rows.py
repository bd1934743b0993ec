"""Id tables outside autograd: the rule against dense references, any number of ranks, and no more
than the rows touched."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from genrec_kernels.sharded_rows import BLOCK, RowTable, look_up, plan_rows
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
    return torch.from_numpy(
        np.sort(np.random.default_rng(seed).choice(num_rows, count, replace=False))
    )


# The plan.


@settings(deadline=None)
@given(
    st.sampled_from([40, 3_000_000]),
    st.lists(
        st.tuples(st.lists(st.integers(0, 40), max_size=30), st.sampled_from([np.int32, np.int64])),
        max_size=3,
    ),
    st.data(),
)
def test_a_plan_names_each_row_once_and_the_arrays_find_them(
    num_rows: int, parts: list, data: Any
) -> None:
    arrays = [
        np.array(values, kind).reshape(-1, 1 if len(values) % 2 else 2) for values, kind in parts
    ]
    if arrays and arrays[0].size and num_rows > 40:
        arrays[0].flat[0] = data.draw(st.integers(0, num_rows))
    plan, local = plan_rows(arrays, num_rows)
    everything = np.unique(
        np.concatenate([np.zeros(1, np.int64), *(array.reshape(-1) for array in arrays)])
    )
    assert plan.rows.dtype == torch.int64
    assert plan.rows.tolist() == (everything[1:] - 1).tolist()
    with_zero = np.concatenate([[0], plan.rows.numpy() + 1])
    assert len(local) == len(arrays)
    for array, places in zip(arrays, local, strict=True):
        assert (places.dtype, places.shape) == (array.dtype, array.shape)
        assert np.array_equal(with_zero[places], array)


@pytest.mark.parametrize("num_rows", [10, 3_000_000])
@pytest.mark.parametrize("excess", [-1, 1])
def test_an_id_outside_its_table_is_named(num_rows: int, excess: int) -> None:
    wrong = -1 if excess < 0 else num_rows + 1
    with pytest.raises(ValueError, match=f"id {wrong} is outside its table of {num_rows} rows"):
        plan_rows([np.array([1, wrong])], num_rows)
    assert plan_rows([np.array([1, num_rows])], num_rows)[0].rows.tolist() == [0, num_rows - 1]


def test_through_a_plan_the_rows_get_the_gradient_that_a_dense_embedding_gets() -> None:
    ids = np.random.default_rng(0).integers(0, 201, (8, 20))
    table = table_of(200, 16)
    plan, (places,) = plan_rows([ids], 200)
    rows = table.fetch(plan.rows, zero_row=True).requires_grad_()
    dense = torch.cat([torch.zeros(1, 16), table.values]).requires_grad_()
    weight = torch.randn(8, 20, 16, generator=torch.Generator().manual_seed(0))
    ours = look_up(rows, torch.from_numpy(places))
    theirs = F.embedding(torch.from_numpy(ids), dense, padding_idx=0)
    assert torch.equal(ours, theirs)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert rows.grad is not None
    assert dense.grad is not None
    torch.testing.assert_close(rows.grad[1:], dense.grad[plan.rows + 1])
    assert dense.grad.count_nonzero() == rows.grad[1:].count_nonzero() > 0


# The start.


def test_a_row_starts_as_a_function_of_key_and_row() -> None:
    small, large = table_of(100), table_of(10 * BLOCK + 3)
    assert torch.equal(small.values, large.values[:100])
    assert torch.equal(small.values, table_of(100).values)
    assert not torch.isclose(small.values, table_of(100, key=KEY + 1).values).any()
    assert len(large.values.unique(dim=0)) == len(large.values)
    assert large.values.mean().item() == pytest.approx(
        0, abs=5 * STD / len(large.values.view(-1)) ** 0.5
    )
    assert large.values.std().item() == pytest.approx(STD, rel=0.02)
    assert not table_of(100, init_std=0).values.any()
    assert torch.equal(table_of(100, key=-1).values, table_of(100, key=2**64 - 1).values)
    assert not torch.equal(table_of(100, key=-1).values, table_of(100, key=-2).values)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"num_rows": 0}, "0 rows"),
        ({"dim": 0}, "width 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
    ],
)
def test_sizes_that_make_no_table(sizes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        table_of(**sizes)


# The rule.


def rowwise_adagrad(
    values: np.ndarray, steps: list, rate: float, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """The rule on a dense table in fp64, from its formula: what every entry of every row would
    be."""
    values, squares = values.astype(np.float64), np.zeros(len(values))
    for rows, gradient in steps:
        dense = np.zeros_like(values)
        dense[rows] = gradient
        squares += (dense**2).mean(1)
        moved = squares > 0
        values[moved] -= rate * dense[moved] / (np.sqrt(squares[moved]) + eps)[:, None]
    return values, squares


@pytest.mark.parametrize("eps", [1e-10, 0.1])
def test_it_is_rowwise_adagrad(eps: float) -> None:
    table = table_of(500, 24)
    before, steps = table.values.numpy().copy(), []
    for step in range(25):
        rows = some_rows(500, 60, step)
        gradient = gradient_of(step, 0, 60, 24)
        assert torch.equal(table.fetch(rows), table.values[rows])
        table.update(gradient.clone(), learning_rate=0.3, eps=eps)
        steps.append((rows.numpy(), gradient.numpy()))
    values, squares = rowwise_adagrad(before, steps, 0.3, eps)
    np.testing.assert_allclose(table.values.numpy(), values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table.squares.numpy(), squares, rtol=1e-5)


def test_at_width_one_it_is_torchs_adagrad() -> None:
    table = table_of(300, 1)
    parameter = torch.nn.Parameter(table.values.clone())
    rival = torch.optim.Adagrad([parameter], lr=0.2, eps=1e-10)
    for step in range(20):
        rows = some_rows(300, 40, step)
        gradient = gradient_of(step, 0, 40, 1)
        table.fetch(rows)
        table.update(gradient.clone(), learning_rate=0.2)
        parameter.grad = torch.zeros_like(parameter).index_copy_(0, rows, gradient)
        rival.step()
    torch.testing.assert_close(table.values, parameter.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        table.squares[:, None], rival.state[parameter]["sum"], rtol=1e-5, atol=0
    )


def test_scale_multiplies_the_gradient() -> None:
    scaled, multiplied = table_of(), table_of()
    rows, gradient = some_rows(NUM_ROWS, 100), gradient_of(0, 0, 100)
    scaled.fetch(rows)
    scaled.update(gradient.clone(), learning_rate=RATE, eps=0.5, scale=0.125)
    multiplied.fetch(rows)
    multiplied.update(gradient * 0.125, learning_rate=RATE, eps=0.5)
    torch.testing.assert_close(scaled.values, multiplied.values)
    torch.testing.assert_close(scaled.squares, multiplied.squares)


def test_other_rows_keep_every_bit_whatever_the_gradient() -> None:
    table, clean = table_of(), table_of()
    rows = some_rows(NUM_ROWS, 100)
    gradient = gradient_of(0, 0, 100)
    broken = gradient.clone()
    broken[3, 5], broken[7], broken[9, 0] = float("nan"), float("inf"), -float("inf")
    for one, given_gradient in ((table, broken), (clean, gradient)):
        one.fetch(rows)
        one.update(given_gradient, learning_rate=RATE)
    bad = rows[[3, 7, 9]]
    good = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill_(0, bad, False)
    assert torch.equal(table.values[good], clean.values[good])
    assert torch.equal(table.squares[good], clean.squares[good])
    untouched = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill_(0, rows, False)
    assert torch.equal(table.values[untouched], table_of().values[untouched])
    assert not table.squares[untouched].any()


def test_a_gradient_of_zeros_moves_nothing() -> None:
    table = table_of()
    rows = some_rows(NUM_ROWS, 50)
    table.fetch(rows)
    table.update(torch.zeros(50, DIM), learning_rate=RATE)
    assert torch.equal(table.values, table_of().values)


def test_a_step_without_rows() -> None:
    table = table_of()
    assert table.fetch(torch.empty(0, dtype=torch.int64)).shape == (0, DIM)
    table.update(torch.empty(0, DIM), learning_rate=RATE)
    assert torch.equal(table.values, table_of().values)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that operations make anew."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in self.known
            ):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
        return result


def test_a_step_makes_nothing_of_the_tables_size() -> None:
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
def test_rows_that_are_not_distinct_ascending_and_inside_are_refused(rows: list[int]) -> None:
    with pytest.raises(AssertionError):
        table_of().fetch(torch.tensor(rows))


def test_each_update_needs_its_fetch() -> None:
    table = table_of()
    with pytest.raises(AssertionError, match="its own fetch"):
        table.update(torch.zeros(1, DIM), learning_rate=RATE)
    table.fetch(torch.tensor([4]))
    table.update(torch.zeros(1, DIM), learning_rate=RATE)
    with pytest.raises(AssertionError, match="its own fetch"):
        table.update(torch.zeros(1, DIM), learning_rate=RATE)
    table.fetch(torch.tensor([4]))
    with pytest.raises(AssertionError):
        table.update(torch.zeros(2, DIM), learning_rate=RATE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_cannot_take_the_table_for_its_own() -> None:
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


def trained_alone(num_ranks: int) -> RowTable:
    """One process that takes the ranks' steps: their gradients added in the order of ranks."""
    table = table_of()
    for step, kind in enumerate(KINDS):
        total = torch.zeros(NUM_ROWS, DIM)
        parts = [
            torch.from_numpy(rows_of(kind, step, rank, num_ranks)) for rank in range(num_ranks)
        ]
        for rank, rows in enumerate(parts):
            total[rows] += gradient_of(step, rank, len(rows))
        union = torch.cat(parts).unique()
        table.fetch(union)
        table.update(total[union], learning_rate=RATE, scale=0.5)
    return table


def test_a_saved_table_comes_back_to_the_bit(tmp_path: Path) -> None:
    table = trained_alone(2)
    table.save(tmp_path, "items")
    assert [path.name for path in tmp_path.iterdir()] == ["items-00000-of-00001.safetensors"]
    back = table_of(init_std=0)
    back.load(tmp_path, "items")
    assert torch.equal(back.values, table.values)
    assert torch.equal(back.squares, table.squares)
    whole = back.full()
    assert whole is not None
    assert torch.equal(whole, table.values)
    assert whole.data_ptr() != back.values.data_ptr()


def save_by_hand(table: RowTable, folder: Path, num_ranks: int) -> None:
    """The files that so many ranks write, from their description: blocks in turn, and the table's
    sizes as metadata."""
    for rank in range(num_ranks):
        facts = {
            "num_rows": table.num_rows,
            "dim": table.dim,
            "block": BLOCK,
            "rank": rank,
            "world_size": num_ranks,
        }
        parts = {"values": table.values, "squares": table.squares}
        save_file(
            {
                name: torch.cat(tensor.split(BLOCK)[rank::num_ranks])
                for name, tensor in parts.items()
            },
            folder / f"items-{rank:05d}-of-{num_ranks:05d}.safetensors",
            metadata={"rows": json.dumps(facts)},
        )


@pytest.mark.parametrize("num_ranks", [1, 4, 7])
def test_files_of_any_number_of_ranks_make_one_table(num_ranks: int, tmp_path: Path) -> None:
    table = trained_alone(2)
    save_by_hand(table, tmp_path, num_ranks)
    back = table_of(init_std=0)
    back.load(tmp_path, "items")
    assert torch.equal(back.values, table.values)
    assert torch.equal(back.squares, table.squares)


def test_files_that_do_not_make_the_table_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: holds no items-00000-of-00001"):
        table_of().load(tmp_path, "items")
    table_of().save(tmp_path, "items")
    first = tmp_path / "items-00000-of-00001.safetensors"
    for other in (table_of(NUM_ROWS + 1), table_of(dim=DIM + 1)):
        with pytest.raises(
            ValueError,
            match=f"{first}: not rank 0 of a table of {other.num_rows} rows of width {other.dim}",
        ):
            other.load(tmp_path, "items")
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{first}: damaged"):
        table_of().load(tmp_path, "items")
    save_file({"values": torch.zeros(3)}, first)
    with pytest.raises(ValueError, match=f"{first}: not rank 0"):
        table_of().load(tmp_path, "items")


# Ranks.


@dataclass(frozen=True)
class Found:
    folder: Path
    num_ranks: int

    def table(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}.npy"))

    def facts(self, rank: int) -> dict[str, int]:
        return json.loads((self.folder / f"facts-{rank}.json").read_text())

    def files(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{name}-*.safetensors"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """Two ranks, then three; each loads what one process and what four saved, the three also what
    the two saved."""
    base = tmp_path_factory.mktemp("rows")
    alone = base / "alone"
    alone.mkdir()
    trained_alone(2).save(alone, "items")
    four = base / "four"
    four.mkdir()
    save_by_hand(trained_alone(2), four, 4)
    results: dict[int, Found] = {}
    for num_ranks in (2, 3):
        out = base / str(num_ranks)
        out.mkdir()
        saved = [alone, four, *(result.folder for result in results.values())]
        ranks = start_each([SCRIPT, out, *saved], base / f"logs-{num_ranks}", num_ranks)
        assert not any(rank.returncode for rank in ranks), ranks
        results[num_ranks] = Found(out, num_ranks)
    return results


@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [2, 3])
class TestRanks:
    def test_the_start_is_that_of_one_process(
        self, found: dict[int, Found], num_ranks: int
    ) -> None:
        assert torch.equal(found[num_ranks].table("initial"), table_of().values)

    def test_the_end_is_that_of_one_process_to_the_bit(
        self, found: dict[int, Found], num_ranks: int
    ) -> None:
        # Whatever rows the ranks have: the one process adds their gradients in the same order.
        alone = trained_alone(num_ranks)
        assert torch.equal(found[num_ranks].table("trained"), alone.values)
        assert not torch.equal(alone.values, table_of().values)

    def test_a_lost_gradient_is_seen(self, found: dict[int, Found], num_ranks: int) -> None:
        difference = found[num_ranks].table("lost") - trained_alone(num_ranks).values
        assert difference.abs().max() > 1e-3

    def test_every_rank_is_given_the_rows_it_asked_for(
        self, found: dict[int, Found], num_ranks: int
    ) -> None:
        alone = table_of()
        fetched = [
            np.load(found[num_ranks].folder / f"fetched-{rank}.npz") for rank in range(num_ranks)
        ]
        for step, kind in enumerate(KINDS):
            parts = [
                torch.from_numpy(rows_of(kind, step, rank, num_ranks)) for rank in range(num_ranks)
            ]
            total = torch.zeros(NUM_ROWS, DIM)
            for rank, rows in enumerate(parts):
                assert np.array_equal(fetched[rank][f"arr_{step}"], alone.values[rows].numpy()), (
                    kind,
                    rank,
                )
                total[rows] += gradient_of(step, rank, len(rows))
            union = torch.cat(parts).unique()
            alone.fetch(union)
            alone.update(total[union], learning_rate=RATE, scale=0.5)

    def test_a_hundred_runs_give_the_same_bits(
        self, found: dict[int, Found], num_ranks: int
    ) -> None:
        assert [found[num_ranks].facts(rank)["digests"] for rank in range(num_ranks)] == [
            1
        ] * num_ranks

    def test_only_touched_rows_are_on_the_wire(
        self, found: dict[int, Found], num_ranks: int
    ) -> None:
        # A remote row costs its id (int32) on the way there, its values back, its gradient there; a
        # step its counts (int64).
        sent = [8 * (num_ranks - 1) * len(KINDS)] * num_ranks
        touched = 0
        for step, kind in enumerate(KINDS):
            for rank in range(num_ranks):
                rows = rows_of(kind, step, rank, num_ranks)
                touched += len(rows)
                owners = np.bincount(rows // BLOCK % num_ranks, minlength=num_ranks)
                for owner in set(range(num_ranks)) - {rank}:
                    sent[rank] += int(owners[owner]) * (4 + DIM * 4)
                    sent[owner] += int(owners[owner]) * DIM * 4
        facts = [found[num_ranks].facts(rank) for rank in range(num_ranks)]
        assert [one["bytes_sent"] for one in facts] == sent
        assert sum(one["rows_fetched"] for one in facts) == touched
        assert sum(sent) <= 2 * touched * DIM * 4

    def test_files_load_at_any_number_of_ranks(
        self, found: dict[int, Found], num_ranks: int, tmp_path: Path
    ) -> None:
        back = table_of(init_std=0)
        back.load(found[num_ranks].folder, "items")
        alone = trained_alone(num_ranks)
        assert torch.equal(back.values, alone.values)
        assert torch.equal(back.squares, alone.squares)
        # And what one, four or two processes saved comes back at this number of ranks, squares too.
        for number, of in enumerate([1, 4, 2][:num_ranks]):
            source = trained_alone(2)
            assert torch.equal(found[num_ranks].table(f"loaded-{number}"), source.values), of
            again = table_of(init_std=0)
            again.load(found[num_ranks].folder, f"again-{number}")
            assert torch.equal(again.squares, source.squares), of

    def test_a_missing_and_a_foreign_file_are_named(
        self, found: dict[int, Found], num_ranks: int, tmp_path: Path
    ) -> None:
        for path in found[num_ranks].files("items"):
            shutil.copy(path, tmp_path)
        last = tmp_path / f"items-{num_ranks - 1:05d}-of-{num_ranks:05d}.safetensors"
        first = tmp_path / f"items-00000-of-{num_ranks:05d}.safetensors"
        kept = last.read_bytes()
        last.unlink()
        with pytest.raises(ValueError, match=f"{last}: missing"):
            table_of().load(tmp_path, "items")
        shutil.copy(first, last)
        with pytest.raises(ValueError, match=f"{last}: not rank {num_ranks - 1}"):
            table_of().load(tmp_path, "items")
        last.write_bytes(kept)
        foreign = tmp_path / "items-00000-of-00007.safetensors"
        shutil.copy(first, foreign)
        with pytest.raises(ValueError, match=f"{foreign}: beside {first.name}"):
            table_of().load(tmp_path, "items")

    def test_blocks_lie_in_turn(self, found: dict[int, Found], num_ranks: int) -> None:
        initial = trained_alone(num_ranks).values
        for rank, path in enumerate(found[num_ranks].files("items")):
            blocks = initial.split(BLOCK)[rank::num_ranks]
            assert torch.equal(load_file(path)["values"], torch.cat(blocks))
