"""A model of given sizes on a CPU."""

from __future__ import annotations

import torch

from genrec_dist.config.load import load_recipe
from genrec_dist.estimate.memory.activations import Compute
from genrec_dist.estimate.sizes import ParameterCounts, build_config, count_parameters
from genrec_dist.model.genrec import GenRecForConditionalGeneration


def model_on_cpu(
    compute: Compute, *overrides: str
) -> tuple[GenRecForConditionalGeneration, ParameterCounts]:
    settings = [
        "data=x",
        "run=x",
        "model.user_ids=true",
        "model.heads=4",
        "model.max_tokens=128",
        *overrides,
    ]
    recipe = load_recipe("tiny", settings)
    config = build_config(recipe, 500, 400)
    torch.manual_seed(0)
    model = GenRecForConditionalGeneration(config).train()
    model.set_attn_implementation("sdpa")
    return (model.bfloat16() if compute == "bf16" else model), count_parameters(recipe, config)
