"""One rank of a sharded id table: a few steps with a save, a load and a control, its findings as
files in a folder."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from genrec_kernels.sharded_rows import RowTable

NUM_ROWS, DIM, KEY, STD = 1000, 64, 11, 0.5
RATE = 0.1
# What rows the ranks have in a step: some of their own, all the same, none at all, nobody any, a
# single one.
EMPTY = ("first-empty", "last-empty", "all-empty")
KINDS = ("overlapping", "disjoint", "equal", *EMPTY, "single", "everything", "overlapping")


def rows_of(kind: str, step: int, rank: int, world_size: int) -> np.ndarray:
    """int64, the distinct ascending rows of a rank in a step."""
    empty = {"first-empty": rank == 0, "last-empty": rank == world_size - 1, "all-empty": True}
    if empty.get(kind, False):
        return np.empty(0, np.int64)
    if kind == "everything":
        return np.arange(NUM_ROWS)
    if kind == "single":
        return np.array([NUM_ROWS - 1])
    if kind == "equal":
        rank = 0
    drawn = np.random.default_rng([step, rank]).choice(NUM_ROWS, 300, replace=False)
    if kind == "disjoint":
        drawn = drawn[drawn // 7 % world_size == rank]
    return np.sort(drawn)


def gradient_of(step: int, rank: int, num_rows: int, dim: int = DIM) -> torch.Tensor:
    dice = np.random.default_rng([step, rank, 5])
    return torch.from_numpy(dice.standard_normal((num_rows, dim), np.float32))


def train(table: RowTable, lost: bool = False) -> list[torch.Tensor]:
    """All steps; gives what was fetched. `lost`: the last rank's gradient of step 0 never
    arrives."""
    fetched = []
    for step, kind in enumerate(KINDS):
        rows = torch.from_numpy(rows_of(kind, step, table.rank, table.world_size))
        given = table.fetch(rows, zero_row=step % 2 == 0)
        fetched.append(given[len(given) - len(rows) :])
        assert not given[: len(given) - len(rows)].any()
        gradient = gradient_of(step, table.rank, len(rows))
        if lost and step == 0 and table.rank == table.world_size - 1:
            gradient.zero_()
        table.update(gradient, learning_rate=RATE, scale=0.5)
    return fetched


def digests(rank: int, world_size: int, runs: int) -> set[str]:
    """What `runs` runs of three steps leave on this rank."""
    found = set()
    for _ in range(runs):
        table = RowTable(300, 16, init_std=STD, key=KEY, rank=rank, world_size=world_size)
        for step in range(3):
            rows = np.sort(np.random.default_rng([step, rank]).choice(300, 150, replace=False))
            table.fetch(torch.from_numpy(rows))
            table.update(gradient_of(step, rank, len(rows), 16), learning_rate=RATE)
        data = table.values.numpy().tobytes() + table.squares.numpy().tobytes()
        found.add(hashlib.sha256(data).hexdigest())
    return found


def main(out: Path, *saved: str) -> None:
    """`saved`: folders with a saved table "items" that this world size shall load."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def new_table(init_std: float = STD) -> RowTable:
        return RowTable(NUM_ROWS, DIM, init_std=init_std, key=KEY, rank=rank, world_size=world_size)

    def keep(name: str, table: RowTable) -> None:
        whole = table.full()
        assert (whole is None) == (rank > 0)
        if whole is not None:
            np.save(out / f"{name}.npy", whole.numpy())

    table = new_table()
    keep("initial", table)
    fetched = train(table)
    np.savez(out / f"fetched-{rank}.npz", *[rows.numpy() for rows in fetched])
    keep("trained", table)
    table.save(out, "items")
    lossy = new_table()
    train(lossy, lost=True)
    keep("lost", lossy)
    for number, folder in enumerate(saved):
        loaded = new_table(init_std=0)
        loaded.load(Path(folder), "items")
        keep(f"loaded-{number}", loaded)
        loaded.save(out, f"again-{number}")
    facts = {
        "bytes_sent": table.bytes_sent,
        "rows_fetched": table.rows_fetched,
        "digests": len(digests(rank, world_size, 100)),
    }
    (out / f"facts-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
