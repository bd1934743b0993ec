"""What do two gloo ranks on two CPU cores gain over one on one core, and how much of their step is
communication?

`python benchmarks/ranks_cpu.py DATA [--json FILE]`; DATA: a sharded data directory. Each rank has
one thread. A rank's steps are taken in turn as they are, and with the ranks' gradients left apart:
the difference is what communication adds."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from genrec_dist.bench.measure import Claim, format_claims, table, write_table
from genrec_dist.config.load import load_recipe
from genrec_dist.training.engine import make_accelerator
from genrec_dist.training.loop import Loop
from genrec_dist.training.setup import build_setup

WARM, STEPS = 4, 12
"""Steps of each way before the clock starts and while it runs; of the latter the median counts."""


@contextlib.contextmanager
def apart(loop: Loop) -> Iterator[None]:
    """Steps whose gradients meet nobody."""
    engine: Any = loop.engine
    before = engine.micro_step
    engine.micro_step = lambda last: loop.accelerator.no_sync(engine.prepared)
    try:
        yield
    finally:
        engine.micro_step = before


def work(data: str, out: str) -> None:
    """One rank: seconds a step of each way, into a file of its own."""
    with tempfile.TemporaryDirectory() as room:
        recipe = load_recipe(
            "tiny", [f"data={data}", f"run={room}/run", "workers=1", "log_every=1000000"]
        )
        accelerator = make_accelerator(recipe)
        setup, model = build_setup(recipe)
        loop = Loop(setup, model, accelerator)
        seconds: dict[str, list[float]] = {"together": [], "apart": []}
        tokens = 0
        with contextlib.closing(loop.batches()) as batches:  # type: ignore[type-var]
            for number in range(2 * (WARM + STEPS)):
                step, share = next(batches)
                totals = loop.step_totals(share)
                if dist.is_initialized():
                    dist.barrier()
                way = "apart" if number % 2 else "together"
                started = time.perf_counter()
                with apart(loop) if way == "apart" else contextlib.nullcontext():
                    loop.take_step(step, share, totals, recipe.finetune, 0.1)
                if number >= 2 * WARM:
                    seconds[way].append(time.perf_counter() - started)
                    tokens += (
                        sum(batch.num_tokens for batch in share.micro_batches)
                        if way == "together"
                        else 0
                    )
        facts = {"seconds": seconds, "tokens": tokens, "parameters": loop.num_parameters}
        Path(out, f"{os.environ.get('RANK', '0')}.json").write_text(
            json.dumps(facts), encoding="utf-8"
        )
        accelerator.end_training()


def measured(data: Path, ranks: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
            __file__, str(data), "--rank-of", out,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        subprocess.run(command, check=True, env=environment)
        return [
            json.loads(Path(out, f"{rank}.json").read_text(encoding="utf-8"))
            for rank in range(ranks)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        work(str(arguments.data), arguments.rank_of)
        return
    found = {ranks: measured(arguments.data, ranks) for ranks in (1, 2)}
    rate = {
        ranks: sum(fact["tokens"] for fact in facts) / sum(facts[0]["seconds"]["together"])
        for ranks, facts in found.items()
    }
    together, alone = (
        statistics.median(found[2][0]["seconds"][way]) for way in ("together", "apart")
    )
    claims = [
        Claim("real tokens/s, two ranks on two cores", "one rank on one core", rate[2], rate[1], "tokens/s",
              rate[2] / rate[1], "as measured", True),
        Claim("a step of two ranks", "the same, gradients apart", together, alone, "s", together / alone, "as measured", True),
    ]  # fmt: skip
    print(format_claims(claims))
    share = 1 - alone / together
    print(
        f"share of communication: {share:.1%} of a step; {4 * found[2][0]['parameters'] / 2**20:.1f} MiB of gradients"
    )
    if arguments.json:
        write_table(
            table("ranks", claims, measured=found, communication_share=share, threads_a_rank=1),
            arguments.json,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
