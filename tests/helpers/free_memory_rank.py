"""One rank of test_micro_batch_ranks.py: settles a recipe's micro-batches as if its card had so many
GiB free. `free_memory_rank.py RECIPE FOLDER GIB,GIB ...`, each pair of rank 0 and rank 1."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from genrec_dist.config.load import load_recipe
from genrec_dist.distributed.collectives import Ranks, join
from genrec_dist.training.setup import build_setup
from genrec_dist.training.step.micro_batches import Devices, settle_micro_batches


def main(recipe_file: str, folder: Path, pairs: list[str]) -> None:
    join()
    ranks, recipe = Ranks(), load_recipe(recipe_file)
    accelerator: Any = SimpleNamespace(device=torch.device("cuda", 0), deepspeed_plugin=None)
    setup, model = build_setup(recipe)

    def settle(devices: Devices) -> list[Any]:
        found, why = settle_micro_batches(recipe, setup.dataset, setup.words, model, devices)
        return [found.micro_batch_tokens, why]

    answers = []
    for pair in pairs:
        free = int(float(pair.split(",")[ranks.rank]) * 2**30)
        torch.cuda.mem_get_info = lambda device=None, free=free: (free, free)  # type: ignore[assignment]
        devices = Devices.of(accelerator, ranks)
        try:
            answers.append(ranks.run_on_all(lambda devices=devices: settle(devices)))  # type: ignore[misc]
        except ValueError as error:
            answers.append([0, str(error)])
    (folder / f"{ranks.rank}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
