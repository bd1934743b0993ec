"""Id tables outside autograd and outside the optimiser: rows sharded over ranks, and only a step's
rows ever touched."""

# N table rows, D width, W ranks, u rows of this rank's step, n rows this rank owns that some rank
# requests

from __future__ import annotations

import contextlib
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

from genrec_kernels.row_blocks import (
    BLOCK,
    copy_blocks,
    file_name,
    global_rows,
    local_rows,
    saved_ranks,
)

_WIPE_ON_FORK = 18  # MADV_WIPEONFORK of Linux, which the mmap module does not name
_CHUNK = 1 << 24  # bytes that full() moves at once


@dataclass(frozen=True)
class _Exchange:
    """Which rank requested which rows in a fetch; update() sends gradients back along it."""

    owned: Tensor
    """int64 [n], local rows of this rank, one run of ascending rows for each requesting rank."""
    order: Tensor
    """int64 [u], places in the caller's rows, sorted by the rank that owns them. Empty on one
    rank."""
    requested: list[int]
    """Rows this rank requested of each rank."""
    owed: list[int]
    """Rows each rank requested of this one."""


class RowTable:
    """One rank's rows of an id table: float32 [local, D], and one float32 sum of squares per row.

    fetch() and update() are one step: the rows go out, their gradient comes back, and the owner
    updates them by row-wise Adagrad. Both are collective over `group`, also for a rank that has no
    rows in a step; a table of one rank talks to nobody. No more than a step's rows is ever
    allocated. On CPU the two arrays are in huge pages, and a forked child finds them empty:
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
        host_group: dist.ProcessGroup | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Rows are N(0, init_std) as a function of (key, row, dim): the same at any world size and
        any `num_rows`.

        Args:
            num_rows: of the whole table.
            dim: width of a row.
            init_std: standard deviation; 0: zeros.
            key: any whole number.
            rank, world_size, group: who shares the table.
            host_group: the same ranks over host memory, where `group` is over a device: by it they
                say how many rows they request, so that nobody waits for a device. None: `group`.
            device: of this rank's rows.

        Raises:
            ValueError: a size is below 1, or the rank is not the group's.
        """
        if num_rows < 1 or dim < 1:
            sizes = f"an id table of {num_rows} rows of width {dim}"
            raise ValueError(f"{sizes}: both must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}: count from 0")
        if world_size > 1:
            found = (dist.get_rank(group), dist.get_world_size(group))
            if found != (rank, world_size):
                says = f"the process group says {found[0]} of {found[1]}"
                raise ValueError(f"rank {rank} of {world_size}: {says}")
        self.num_rows, self.dim = num_rows, dim
        self.rank, self.world_size, self.group = rank, world_size, group
        self.host_group = group if host_group is None else host_group
        self.device = torch.device(device)
        self.bytes_sent = 0
        """Bytes this rank has sent in fetch() and update(): ids, counts, values and gradients."""
        self.rows_fetched = 0
        """Rows this rank has requested, of whichever owner."""
        local = local_rows(num_rows, rank, world_size)
        assert local < 1 << 31  # ids are sent as int32
        self.values = _zeros(local * dim, self.device).view(local, dim)
        """float32 [local, D]: block `rank`, block `rank + world_size`, ..."""
        self.squares = _zeros(local, self.device)
        """float32 [local]: the sum over updates of a row's mean squared gradient."""
        self._exchange: _Exchange | None = None
        self._process = os.getpid()
        drawn = np.empty((BLOCK, dim), np.float32)
        for start in range(0, local if init_std else 0, BLOCK):
            block = start // BLOCK * world_size + rank
            # Philox is keyed by (key, block) and draws a block's rows in order: a row knows neither
            # ranks nor table size.
            philox = np.random.Philox(key=np.array([key % 2**64, block], np.uint64))
            np.random.Generator(philox).standard_normal(out=drawn, dtype=np.float32)
            drawn *= init_std
            part = self.values[start : start + BLOCK]
            part.copy_(torch.from_numpy(drawn[: len(part)]))

    def fetch(self, rows_u: Tensor, *, zero_row: bool = False) -> Tensor:
        """These rows, from whichever rank owns them. Collective; the next update() is for them.

        Args:
            rows_u: int64 [u] on the CPU, strictly ascending.
            zero_row: put a row of zeros in front, which `distinct_rows` counts from.

        Returns:
            float32 [u, D], or [u + 1, D] with the zero row.
        """
        self._check_process()
        assert (rows_u.dtype, rows_u.ndim) == (torch.int64, 1), (rows_u.dtype, rows_u.shape)
        assert rows_u.device.type == "cpu", rows_u.device
        if len(rows_u):
            first, last = int(rows_u[0]), int(rows_u[-1])
            assert 0 <= first <= last < self.num_rows, f"rows {first}..{last} of {self.num_rows}"
            assert bool((rows_u[1:] > rows_u[:-1]).all()), "rows must be distinct and ascending"
        self.rows_fetched += len(rows_u)
        fetched = torch.empty(zero_row + len(rows_u), self.dim, device=self.device)
        fetched[:zero_row].zero_()
        if self.world_size == 1:
            owned_n = _moved(rows_u, self.device)
            torch.index_select(self.values, 0, owned_n, out=fetched[zero_row:])
            self._exchange = _Exchange(owned_n, rows_u.new_empty(0), [len(rows_u)], [len(rows_u)])
            return fetched
        # Two ranks, rows 0, 64, 70 and 130: their blocks 0 1 1 2 are on ranks 0 1 1 0, where they
        # are local rows 0 0 6 66; `order_u` 0 3 1 2 puts rank 0's first, `requested` is 2 2.
        blocks_u = rows_u // BLOCK
        owner_u = blocks_u % self.world_size
        local_u = (blocks_u // self.world_size) * BLOCK + rows_u % BLOCK
        order_u = torch.argsort(owner_u, stable=True)
        asked_W = torch.bincount(owner_u, minlength=self.world_size)
        owed_W = torch.empty_like(asked_W)
        dist.all_to_all_single(owed_W, asked_W, group=self.host_group)
        self.bytes_sent += 8 * (self.world_size - 1)
        requested, owed = asked_W.tolist(), owed_W.tolist()
        ids = _moved(local_u[order_u].int(), self.device)
        owned_n = self._send(ids, requested, owed).long()
        arrived_uD = self._send(self.values.index_select(0, owned_n), owed, requested)
        self._exchange = _Exchange(owned_n, _moved(order_u, self.device), requested, owed)
        fetched[zero_row:].index_copy_(0, self._exchange.order, arrived_uD)
        return fetched

    @torch.no_grad()
    def update(
        self, gradient_uD: Tensor, *, learning_rate: float, eps: float = 1e-10, scale: float = 1.0
    ) -> None:
        """Row-wise Adagrad on the rows of the last fetch(): s += mean(g^2), row -= learning_rate *
        g / (sqrt(s) + eps). Collective.

        g is the sum of the ranks' gradients in the order of ranks, so that it is the same to the
        bit each time, times `scale`. The rule is EXACT_ROWWISE_ADAGRAD of FBGEMM and TorchRec, from
        DLRM (arXiv 1906.00091): Adagrad that keeps one number per row instead of one per entry.

        Args:
            gradient_uD: float [u, D] in the order of those rows; it is used up: afterwards it holds
                nothing of meaning.
            learning_rate: of the step.
            eps: above 0.
            scale: factor of the gradient.
        """
        exchange, self._exchange = self._exchange, None
        assert exchange is not None, "each update() needs its own fetch()"
        assert gradient_uD.shape == (sum(exchange.requested), self.dim), gradient_uD.shape
        assert eps > 0, eps  # a row whose gradients were all zero would become 0 / 0
        gradient_nD, owned_n = gradient_uD.to(self.device, torch.float32), exchange.owned
        if self.world_size > 1:
            ordered_uD = gradient_nD.index_select(0, exchange.order)
            gradient_nD = self._send(ordered_uD, exchange.requested, exchange.owed)
            gradient_nD = _summed(gradient_nD, owned_n, exchange.owed)
        # A row may come several times if all its gradients but one are zero: those add nothing. The
        # mean square is that of g * scale, and so is the step: scale goes into the factors, not
        # over the gradient.
        norms_n = torch.linalg.vector_norm(gradient_nD, dim=1)
        squares_n = norms_n.mul_(scale / math.sqrt(self.dim)).square_()
        self.squares.index_add_(0, owned_n, squares_n)
        roots_n = self.squares.index_select(0, owned_n).sqrt_()
        factor_n = roots_n.add_(eps).reciprocal_().mul_(-learning_rate * scale)
        # In place, because fresh memory of this size costs more, in page faults, than the product.
        self.values.index_add_(0, owned_n, gradient_nD.mul_(factor_n[:, None]))

    @torch.no_grad()
    def begin_with(self, rows_nD: Tensor) -> None:
        """Let the table's first n rows be these, float32 [n, D]; this rank takes its own. Not
        collective; before any step."""
        self._check_process()
        assert rows_nD.shape[0] <= self.num_rows, (rows_nD.shape, self.num_rows)
        assert rows_nD.shape[1] == self.dim, (rows_nD.shape, self.dim)
        mine = global_rows(0, len(self.values), self.rank, self.world_size)
        mine = mine[mine < len(rows_nD)]  # ascending, so that they are this rank's first ones
        self.values[: len(mine)] = rows_nD[mine].to(self.device, torch.float32)

    def save(self, folder: Path, name: str) -> Path:
        """Write this rank's rows to `folder/NAME-RANK-of-RANKS.safetensors`, which is returned. Not
        collective.

        Not atomic either: the folder is the caller's to rename when all ranks are done.
        """
        own_name, tensors, metadata = self.contents(name)
        save_file(tensors, folder / own_name, metadata=metadata)
        return folder / own_name

    def contents(self, name: str) -> tuple[str, dict[str, Tensor], dict[str, str]]:
        """What `save` writes, for a caller that writes it itself: the file's name, its tensors (the
        table's own, not copies) and the metadata of its header."""
        self._check_process()
        tensors = {"values": self.values, "squares": self.squares}
        own_name = file_name(name, self.rank, self.world_size)
        return own_name, tensors, self._metadata(self.rank, self.world_size)

    def load(self, folder: Path, name: str) -> None:
        """Read this rank's rows from files that any number of ranks saved. Not collective.

        Files are mapped and only the rows of this rank are read. Raises ValueError naming a file
        that is missing, damaged or of another table."""
        self._check_process()
        saved = saved_ranks(folder, name)
        for rank in range(saved):
            self._load_from(folder / file_name(name, rank, saved), rank, saved)

    @torch.no_grad()
    def full(self) -> Tensor | None:
        """The whole table, float32 [N, D], on rank 0's CPU; None on other ranks. Collective.
        `bytes_sent` leaves it out."""
        self._check_process()
        if self.world_size == 1:
            return self.values.to("cpu", copy=True)
        ranks, is_first = range(self.world_size), self.rank == 0
        whole = torch.empty(self.num_rows, self.dim) if is_first else None
        owned = [local_rows(self.num_rows, rank, self.world_size) for rank in ranks]
        step = BLOCK * max(1, _CHUNK // (BLOCK * self.dim * 4 * self.world_size))
        for start in range(0, owned[0], step):
            counts = [max(0, min(count - start, step)) for count in owned]
            chunk = torch.empty(sum(counts) if is_first else 0, self.dim, device=self.device)
            mine = self.values[start : start + counts[self.rank]]
            arriving = counts if is_first else [0] * self.world_size
            leaving = [counts[self.rank]] + [0] * (self.world_size - 1)
            dist.all_to_all_single(chunk, mine, arriving, leaving, group=self.group)
            if whole is not None:
                rows = [global_rows(start, counts[r], r, self.world_size) for r in ranks]
                whole.index_copy_(0, torch.cat(rows), chunk.cpu())
        return whole

    def _check_process(self) -> None:
        owner = "an id table belongs to the process that made it: a forked child finds zeros"
        assert os.getpid() == self._process, owner

    def _send(self, rows: Tensor, sending: list[int], arriving: list[int]) -> Tensor:
        """Rows [sum(sending), ...] to the ranks, run by run; rows [sum(arriving), ...] from
        them."""
        received = rows.new_empty((sum(arriving), *rows.shape[1:]))
        dist.all_to_all_single(received, rows, arriving, sending, group=self.group)
        bytes_per_row = math.prod(rows.shape[1:]) * rows.element_size()
        self.bytes_sent += (len(rows) - sending[self.rank]) * bytes_per_row
        return received

    def _metadata(self, rank: int, world_size: int) -> dict[str, str]:
        sizes = {"num_rows": self.num_rows, "dim": self.dim, "block": BLOCK}
        return {"rows": json.dumps(sizes | {"rank": rank, "world_size": world_size})}

    def _load_from(self, path: Path, rank: int, saved: int) -> None:
        """Take what is this rank's of the file that `rank` of `saved` ranks wrote."""
        # Blocks of that file are rank, rank + saved, ...; this rank's are self.rank, self.rank +
        # world_size, ...: both have one block in each `period`, or none. Saved by 2, read by 3:
        # rank 1 of the readers takes block 1, 7, 13, ... of file 1, its blocks 0, 3, 6, ..., as its
        # own 0, 2, 4, ...
        shared = math.gcd(saved, self.world_size)
        if (rank - self.rank) % shared:
            return
        period = saved // shared * self.world_size
        mine = range(self.rank, period + self.rank, self.world_size)
        block = next(block for block in mine if block % saved == rank)
        spread = slice(block // saved, None, period // saved)
        wanted = slice(block // self.world_size, None, period // self.world_size)
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() != self._metadata(rank, saved):
                    raise ValueError(
                        f"{path}: not rank {rank} of a table of {self.num_rows} rows of width "
                        f"{self.dim}, it says {file.metadata()}: give the folder that this table "
                        "was saved in"
                    )
                for key, target in (("values", self.values), ("squares", self.squares)):
                    # Mapped: a page is read when something is copied from it.
                    source = file.get_tensor(key)
                    if source.shape != (local_rows(self.num_rows, rank, saved), *target.shape[1:]):
                        found = f"{key} of shape {list(source.shape)}"
                        raise ValueError(f"{path}: {found}; resume from an older checkpoint")
                    copy_blocks(source, target, spread, wanted)
        except (OSError, SafetensorError) as error:
            remedy = "resume from an older checkpoint"
            raise ValueError(f"{path}: damaged ({error}); {remedy}") from None


def _summed(gradient_nD: Tensor, owned_n: Tensor, owed: Sequence[int]) -> Tensor:
    """Each row's gradients, added in the order of ranks where the row comes first; zero where it
    comes again.

    Its size is known without asking a device how many rows are distinct. Within a rank rows are
    distinct, so no two additions meet and the order is fixed on every device."""
    # Rank 0 sends gradients of rows 4 and 7, rank 1 of rows 4 and 9:
    #     owned_n    4 7 4 9
    #     sorted_n   4 4 7 9     order_n  0 2 1 3
    #     starts_n   0 0 2 3     a repeated row takes the last start before it
    #     first_n    0 1 0 3     where the row of each place comes first
    # so the third gradient is added to the first, and place 2 of the total stays zero.
    sorted_n, order_n = torch.sort(owned_n, stable=True)
    starts_n = torch.arange(len(owned_n), device=owned_n.device)
    starts_n[1:].masked_fill_(sorted_n[1:] == sorted_n[:-1], 0)
    first_n = torch.empty_like(order_n).index_copy_(0, order_n, order_n[starts_n.cummax(0).values])
    total_nD = torch.zeros_like(gradient_nD)
    sizes = list(owed)
    for places, gradients in zip(first_n.split(sizes), gradient_nD.split(sizes), strict=True):
        total_nD.index_add_(0, places, gradients)
    return total_nD


def _zeros(size: int, device: torch.device) -> Tensor:
    """float32 [size]; on CPU in huge pages, which torch does not request, and hidden from forked
    children."""
    if device.type != "cpu" or not size:
        return torch.zeros(size, device=device)
    memory = mmap.mmap(-1, size * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    wipe = _WIPE_ON_FORK if sys.platform == "linux" else None
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), wipe):
        if advice is not None:
            with contextlib.suppress(OSError):  # advice: a kernel without it is slower, not wrong
                memory.madvise(advice)
    return torch.frombuffer(memory, dtype=torch.float32)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """Host values on a device, for which nobody waits."""
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True)
