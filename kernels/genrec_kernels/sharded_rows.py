"""Id tables outside autograd and outside the optimiser: rows sharded over ranks, and only a step's
rows ever touched."""

# N table rows, D width, W ranks, u rows of this rank's step, n rows this rank owns and somebody
# asked for

from __future__ import annotations

import contextlib
import glob
import json
import math
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
"""Rows that stay together; block b lies on rank b % world_size, so a row's place is a function of
the row alone."""

_WIPE_ON_FORK = 18  # MADV_WIPEONFORK of Linux, which the mmap module does not name
_FEW_ROWS = 1_000_000  # up to here a table of all rows' places beats a sort of those that come
_CHUNK = 1 << 24  # bytes that full() moves at once


@dataclass(frozen=True)
class RowPlan:
    """The distinct rows of a step, made where the batch is made."""

    rows: Tensor
    """int64 [u], table rows, strictly ascending."""


def plan_rows(arrays: Sequence[np.ndarray], num_rows: int) -> tuple[RowPlan, list[np.ndarray]]:
    """The distinct rows of whole-number arrays of any shapes, and the arrays with places for rows.

    In the arrays 0 means "no row" and r + 1 means table row r of `num_rows`. In what comes back,
    shapes and dtypes kept, 0 stays 0 and p + 1 stands for `plan.rows[p]`. Raises ValueError for a
    number outside 0..num_rows."""
    # The zero in front is always there to be found, so that the others' places follow it.
    flat = np.concatenate([np.zeros(1, np.int64), *(array.reshape(-1) for array in arrays)])
    low, high = int(flat.min()), int(flat.max())
    if low < 0 or high > num_rows:
        raise ValueError(
            f"id {low if low < 0 else high} is outside its table of {num_rows} rows and the zero row: "
            "prepare and shard again"
        )
    found, places = (
        _by_lookup(flat, num_rows)
        if num_rows <= _FEW_ROWS
        else np.unique(flat, return_inverse=True)
    )
    ends = 1 + np.cumsum([array.size for array in arrays])
    local = [
        places[end - array.size : end].reshape(array.shape).astype(array.dtype, copy=False)
        for array, end in zip(arrays, ends, strict=True)
    ]
    return RowPlan(torch.from_numpy(found[1:] - 1)), local


def _by_lookup(flat: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """What np.unique gives, several times as fast while a table of all rows' places is small."""
    ordered = np.sort(flat)
    found = ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
    # Only the entries of rows that come are ever written or read.
    place_of = np.empty(num_rows + 1, np.int32)
    place_of[found] = np.arange(len(found), dtype=np.int32)
    return found, place_of.take(flat)


def look_up(table: Tensor, places: Tensor) -> Tensor:
    """`table[places]`, float [..., D], where gradients reach the table: its backward adds into
    [rows, D], no more.

    On CPU this backward takes half the time of `F.embedding`'s. Elsewhere it is `F.embedding`'s,
    which sorts and is therefore the same to the bit each time. Row 0 gets a gradient too: update()
    is given `table.grad[1:]`."""
    if table.device.type == "cpu":
        return table.index_select(0, places.reshape(-1)).view(*places.shape, table.shape[1])
    return F.embedding(places, table, padding_idx=0)


@dataclass(frozen=True)
class _Exchange:
    """Who asked whom for what in a fetch; update() sends gradients back along it."""

    owned: Tensor
    """int64 [n], local rows of this rank, one run of ascending rows for each rank that asked."""
    order: Tensor
    """int64 [u], places in the caller's rows, sorted by the rank that owns them. Empty on one
    rank."""
    asked: list[int]
    """Rows asked of each rank."""
    owed: list[int]
    """Rows each rank asked of this one."""


class RowTable:
    """One rank's rows of an id table: float32 [local, D], and one float32 sum of squares a row.

    fetch() and update() are one step: the rows go out, their gradient comes back, and the owner
    updates them by row-wise Adagrad. Both are collective over `group`, also for a rank that has no
    rows in a step; a table of one rank talks to nobody. No more than a step's rows is ever
    allocated. On CPU the two arrays lie in huge pages, and a forked child finds them empty:
    otherwise its mere existence would make the parent copy each page that it updates."""

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        init_std: float,
        key: int,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Rows are N(0, init_std) as a function of (key, row, dim): the same at any world size and
        any `num_rows`.

        `key`: any whole number. Raises ValueError for sizes below 1 and a rank that is not the
        group's."""
        if num_rows < 1 or dim < 1:
            raise ValueError(
                f"an id table of {num_rows} rows of width {dim}: both must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}: count from 0")
        if world_size > 1:
            found = (dist.get_rank(group), dist.get_world_size(group))
            if found != (rank, world_size):
                raise ValueError(
                    f"rank {rank} of {world_size}: the process group says {found[0]} of {found[1]}"
                )
        self.num_rows, self.dim = num_rows, dim
        self.rank, self.world_size, self.group = rank, world_size, group
        self.device = torch.device(device)
        self.bytes_sent = 0
        """Bytes this rank has put on the wire in fetch() and update(): ids, counts, values and
        gradients to other ranks."""
        self.rows_fetched = 0
        """Rows this rank has asked for, whoever owns them."""
        local = _local_rows(num_rows, rank, world_size)
        assert local < 1 << 31  # ids cross the wire as int32
        self.values = _zeros(local * dim, self.device).view(local, dim)
        """float32 [local, D]: block `rank`, block `rank + world_size`, ..."""
        self.squares = _zeros(local, self.device)
        """float32 [local]: the sum over updates of a row's mean squared gradient."""
        self._initialise(init_std, key)
        self._exchange: _Exchange | None = None
        self._process = os.getpid()

    def fetch(self, rows_u: Tensor, *, zero_row: bool = False) -> Tensor:
        """float32 [u, D], these rows, from wherever they lie. Collective.

        `rows_u`: int64 [u], strictly ascending; best on the CPU, where it is checked and where
        counting makes nobody wait for a device. `zero_row` puts a row of zeros in front, float32 [u
        + 1, D], which is what the places of a plan count in. The next update() is for these rows.
        """
        self._check(rows_u)
        self.rows_fetched += len(rows_u)
        fetched = torch.empty(zero_row + len(rows_u), self.dim, device=self.device)
        fetched[:zero_row].zero_()
        if self.world_size == 1:
            owned_n = rows_u.to(self.device)
            torch.index_select(self.values, 0, owned_n, out=fetched[zero_row:])
            self._exchange = _Exchange(owned_n, rows_u.new_empty(0), [len(rows_u)], [len(rows_u)])
            return fetched
        blocks_u = rows_u // BLOCK
        owner_u = blocks_u % self.world_size
        local_u = (blocks_u // self.world_size) * BLOCK + rows_u % BLOCK
        order_u = torch.argsort(owner_u, stable=True)
        asked, owed = self._exchange_counts(torch.bincount(owner_u, minlength=self.world_size))
        owned_n = self._send(local_u[order_u].to(self.device, torch.int32), asked, owed).long()
        arrived_uD = self._send(self.values.index_select(0, owned_n), owed, asked)
        self._exchange = _Exchange(owned_n, order_u.to(self.device), asked, owed)
        fetched[zero_row:].index_copy_(0, self._exchange.order, arrived_uD)
        return fetched

    @torch.no_grad()
    def update(
        self, gradient_uD: Tensor, *, learning_rate: float, eps: float = 1e-10, scale: float = 1.0
    ) -> None:
        """Row-wise Adagrad on the rows of the last fetch(): s += mean(g^2), row -= learning_rate *
        g / (sqrt(s) + eps). Collective.

        `gradient_uD`: float [u, D] in the order of those rows; it is used up: afterwards it holds
        nothing of meaning. g is the sum of the ranks' gradients in the order of ranks, so that it
        is the same to the bit each time, times `scale`. The rule is EXACT_ROWWISE_ADAGRAD of FBGEMM
        and TorchRec, from DLRM (arXiv 1906.00091): Adagrad that keeps one number a row instead of
        one an entry."""
        exchange, self._exchange = self._exchange, None
        assert exchange is not None, "each update() needs its own fetch()"
        assert gradient_uD.shape == (sum(exchange.asked), self.dim), gradient_uD.shape
        assert eps > 0, eps  # a row whose gradients were all zero would become 0 / 0
        gradient_nD = gradient_uD.to(self.device, torch.float32)
        if self.world_size > 1:
            gradient_nD = self._send(
                gradient_nD.index_select(0, exchange.order), exchange.asked, exchange.owed
            )
            gradient_nD = _summed(gradient_nD, exchange.owned, exchange.owed)
        self._adagrad(exchange.owned, gradient_nD, learning_rate, eps, scale)

    @torch.no_grad()
    def begin_with(self, rows_nD: Tensor) -> None:
        """Let the table's first n rows be these, float32 [n, D]; this rank takes its own. Not
        collective; before any step."""
        self._check_process()
        assert rows_nD.shape[0] <= self.num_rows, (rows_nD.shape, self.num_rows)
        assert rows_nD.shape[1] == self.dim, (rows_nD.shape, self.dim)
        mine = _global_rows(0, len(self.values), self.rank, self.world_size)
        mine = mine[mine < len(rows_nD)]  # ascending, so that they are this rank's first ones
        self.values[: len(mine)] = rows_nD[mine].to(self.device, torch.float32)

    def save(self, folder: Path, name: str) -> Path:
        """Write this rank's rows to `folder/NAME-RANK-of-RANKS.safetensors`, which is returned. Not
        collective.

        Not atomic either: the folder is the caller's to rename when all ranks are done.
        """
        self._check_process()
        tensors = {"values": self.values, "squares": self.squares}
        path = folder / _file_name(name, self.rank, self.world_size)
        save_file(tensors, path, metadata=self._facts(self.rank, self.world_size))
        return path

    def load(self, folder: Path, name: str) -> None:
        """Read this rank's rows from files that any number of ranks saved. Not collective.

        Files are mapped and only the rows of this rank are read. Raises ValueError naming a file
        that is missing, damaged or of another table."""
        self._check_process()
        saved = _saved_ranks(folder, name)
        for rank in range(saved):
            self._load_from(folder / _file_name(name, rank, saved), rank, saved)

    @torch.no_grad()
    def full(self) -> Tensor | None:
        """The whole table, float32 [N, D], on rank 0's CPU; None on other ranks. Collective.
        `bytes_sent` leaves it out."""
        self._check_process()
        if self.world_size == 1:
            return self.values.to("cpu", copy=True)
        whole = torch.empty(self.num_rows, self.dim) if self.rank == 0 else None
        step = BLOCK * max(1, _CHUNK // (BLOCK * self.dim * 4 * self.world_size))
        for start in range(0, _local_rows(self.num_rows, 0, self.world_size), step):
            counts = [
                max(0, min(_local_rows(self.num_rows, rank, self.world_size) - start, step))
                for rank in range(self.world_size)
            ]
            to_first = [counts[self.rank]] + [0] * (self.world_size - 1)
            chunk = torch.empty(sum(counts) if self.rank == 0 else 0, self.dim, device=self.device)
            mine = self.values[start : start + counts[self.rank]]
            arriving = counts if self.rank == 0 else [0] * self.world_size
            dist.all_to_all_single(chunk, mine, arriving, to_first, group=self.group)
            if whole is not None:
                rows = [
                    _global_rows(start, count, rank, self.world_size)
                    for rank, count in enumerate(counts)
                ]
                whole.index_copy_(0, torch.cat(rows), chunk.cpu())
        return whole

    def _initialise(self, init_std: float, key: int) -> None:
        if init_std == 0:
            return
        drawn = np.empty((BLOCK, self.dim), np.float32)
        for start in range(0, len(self.values), BLOCK):
            block = start // BLOCK * self.world_size + self.rank
            # Philox is keyed by (key, block) and draws a block's rows in order: a row knows neither
            # ranks nor table size.
            generator = np.random.Generator(
                np.random.Philox(key=np.array([key % 2**64, block], np.uint64))
            )
            generator.standard_normal(out=drawn, dtype=np.float32)
            drawn *= init_std
            part = self.values[start : start + BLOCK]
            part.copy_(torch.from_numpy(drawn[: len(part)]))

    def _check(self, rows_u: Tensor) -> None:
        self._check_process()
        assert (rows_u.dtype, rows_u.ndim) == (torch.int64, 1), (rows_u.dtype, rows_u.shape)
        if rows_u.device.type != "cpu" or not len(rows_u):
            return
        first, last = int(rows_u[0]), int(rows_u[-1])
        assert 0 <= first <= last < self.num_rows, f"rows {first}..{last} of {self.num_rows}"
        assert bool((rows_u[1:] > rows_u[:-1]).all()), "rows must be distinct and ascending"

    def _check_process(self) -> None:
        assert os.getpid() == self._process, (
            "an id table belongs to the process that made it: a forked child finds zeros"
        )

    def _exchange_counts(self, asked_W: Tensor) -> tuple[list[int], list[int]]:
        counts = torch.stack([asked_W, torch.zeros_like(asked_W)]).to(self.device)
        dist.all_to_all_single(counts[1], counts[0].contiguous(), group=self.group)
        self.bytes_sent += 8 * (self.world_size - 1)
        asked, owed = counts.tolist()
        return asked, owed

    def _send(self, rows: Tensor, sending: list[int], arriving: list[int]) -> Tensor:
        """Rows [sum(sending), ...] to the ranks, run by run; rows [sum(arriving), ...] from
        them."""
        received = rows.new_empty((sum(arriving), *rows.shape[1:]))
        dist.all_to_all_single(received, rows, arriving, sending, group=self.group)
        self.bytes_sent += (
            (len(rows) - sending[self.rank]) * math.prod(rows.shape[1:]) * rows.element_size()
        )
        return received

    def _adagrad(
        self, owned_n: Tensor, gradient_nD: Tensor, learning_rate: float, eps: float, scale: float
    ) -> None:
        """A row may come several times if all its gradients but one are zero: those add nothing."""
        # The mean square is that of g * scale, and so is the step: scale goes into the factors, not
        # over the gradient.
        squares_n = (
            torch.linalg.vector_norm(gradient_nD, dim=1).mul_(scale / math.sqrt(self.dim)).square_()
        )
        self.squares.index_add_(0, owned_n, squares_n)
        factor_n = (
            self.squares.index_select(0, owned_n)
            .sqrt_()
            .add_(eps)
            .reciprocal_()
            .mul_(-learning_rate * scale)
        )
        # In place, because fresh memory of this size costs more, in page faults, than the product.
        self.values.index_add_(0, owned_n, gradient_nD.mul_(factor_n[:, None]))

    def _facts(self, rank: int, world_size: int) -> dict[str, str]:
        facts = {
            "num_rows": self.num_rows,
            "dim": self.dim,
            "block": BLOCK,
            "rank": rank,
            "world_size": world_size,
        }
        return {"rows": json.dumps(facts)}

    def _load_from(self, path: Path, rank: int, saved: int) -> None:
        """Take what is ours of the file that `rank` of `saved` ranks wrote."""
        shared = math.gcd(saved, self.world_size)
        if (rank - self.rank) % shared:
            return  # no block of that rank is ours
        period = saved // shared * self.world_size
        block = next(
            block
            for block in range(self.rank, period + self.rank, self.world_size)
            if block % saved == rank
        )
        where = (
            block // saved,
            period // saved,
            block // self.world_size,
            period // self.world_size,
        )
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() != self._facts(rank, saved):
                    raise ValueError(
                        f"{path}: not rank {rank} of a table of {self.num_rows} rows of width {self.dim}, "
                        f"it says {file.metadata()}: give the folder that this table was saved in"
                    )
                for key, target in (("values", self.values), ("squares", self.squares)):
                    source = file.get_tensor(
                        key
                    )  # mapped: a page is read when something is copied from it
                    if source.shape != (_local_rows(self.num_rows, rank, saved), *target.shape[1:]):
                        raise ValueError(
                            f"{path}: {key} of shape {list(source.shape)}; resume from an older checkpoint"
                        )
                    _copy_blocks(source, target, *where)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path}: damaged ({error}); resume from an older checkpoint"
            ) from None


def _summed(gradient_nD: Tensor, owned_n: Tensor, owed: Sequence[int]) -> Tensor:
    """Each row's gradients, added in the order of ranks where the row comes first; zero where it
    comes again.

    Its size is known without asking a device how many rows are distinct. Within a rank rows are
    distinct, so no two additions meet and the order is fixed on every device."""
    sorted_n, order_n = torch.sort(owned_n, stable=True)
    starts_n = torch.arange(len(owned_n), device=owned_n.device)
    starts_n[1:].masked_fill_(sorted_n[1:] == sorted_n[:-1], 0)
    first_n = torch.empty_like(order_n).index_copy_(0, order_n, order_n[starts_n.cummax(0).values])
    total_nD = torch.zeros_like(gradient_nD)
    for places, gradients in zip(
        first_n.split(list(owed)), gradient_nD.split(list(owed)), strict=True
    ):
        total_nD.index_add_(0, places, gradients)
    return total_nD


def _copy_blocks(
    source: Tensor,
    target: Tensor,
    first_source: int,
    step_source: int,
    first_target: int,
    step_target: int,
) -> None:
    """Copy blocks first, first + step, ... of `source` [rows, ...] to those of `target`; only a
    table's last block is short."""
    whole_source, whole_target = len(source) // BLOCK * BLOCK, len(target) // BLOCK * BLOCK
    blocks_source = source[:whole_source].unflatten(0, (-1, BLOCK))[first_source::step_source]
    blocks_target = target[:whole_target].unflatten(0, (-1, BLOCK))[first_target::step_target]
    assert len(blocks_source) == len(blocks_target)
    for start in range(
        0, len(blocks_target), 1024
    ):  # on another device a copy of spread blocks is gathered first
        blocks_target[start : start + 1024].copy_(blocks_source[start : start + 1024])
    if whole_source < len(source) and whole_target < len(target):
        target[whole_target:].copy_(source[whole_source:])


def _local_rows(num_rows: int, rank: int, world_size: int) -> int:
    """How many of the rows a rank owns."""
    whole = num_rows // BLOCK
    mine = (whole - rank + world_size - 1) // world_size * BLOCK
    return mine + (num_rows % BLOCK if whole % world_size == rank else 0)


def _global_rows(start: int, count: int, rank: int, world_size: int) -> Tensor:
    """int64 [count], the table rows of a rank's local rows start, start + 1, ..."""
    local = torch.arange(start, start + count)
    return (local // BLOCK * world_size + rank) * BLOCK + local % BLOCK


def _zeros(size: int, device: torch.device) -> Tensor:
    """float32 [size]; on CPU in huge pages, which torch does not ask for, and hidden from forked
    children."""
    if device.type != "cpu" or not size:
        return torch.zeros(size, device=device)
    memory = mmap.mmap(-1, size * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (
        getattr(mmap, "MADV_HUGEPAGE", None),
        _WIPE_ON_FORK if sys.platform == "linux" else None,
    ):
        if advice is not None:
            with contextlib.suppress(OSError):  # advice: a kernel without it is slower, not wrong
                memory.madvise(advice)
    return torch.frombuffer(memory, dtype=torch.float32)


def _file_name(name: str, rank: int, world_size: int) -> str:
    return f"{name}-{rank:05d}-of-{world_size:05d}.safetensors"


def _saved_ranks(folder: Path, name: str) -> int:
    """How many ranks saved the table in this folder. Raises ValueError unless each left its file
    and nobody else did."""
    found = sorted(
        path.name for path in folder.glob(f"{glob.escape(name)}-?????-of-?????.safetensors")
    )
    if not found:
        raise ValueError(
            f"{folder}: holds no {_file_name(name, 0, 1)} or the like; give a checkpoint with this table"
        )
    saved = int(found[0].removesuffix(".safetensors")[-5:])
    expected = [_file_name(name, rank, saved) for rank in range(saved)]
    if missing := sorted(set(expected) - set(found)):
        raise ValueError(
            f"{folder / missing[0]}: missing; {saved} files make this table, copy them all"
        )
    if foreign := sorted(set(found) - set(expected)):
        raise ValueError(
            f"{folder / foreign[0]}: beside {found[0]}: files of two savings, remove the older ones"
        )
    return saved
