"""Adapters: what is trained, what is saved, and that nothing else changes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from genrec_dist.bench.titles import made_up_titles, untrained_prompted
from genrec_dist.config.load import load_recipe
from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.model.causal.build import load_prompted
from genrec_dist.model.causal.kinds import trained_parameters
from genrec_dist.model.causal.lora import hash_of_frozen
from genrec_dist.model.causal.prompted import PromptedModel
from genrec_dist.model.optimizer import build_optimizer

SETTINGS = ["model.d_model=16", "model.heads=2", "model.ffn=32", "tokens.vocab_size=300"]
LORA = ["lora.rank=4", "lora.alpha=8.0"]


def adapted(*settings: str) -> PromptedModel:
    """With adapters that have been trained, as far as random values are."""
    titles = made_up_titles(30, np.random.default_rng(0))
    model, _ = untrained_prompted(titles, [*SETTINGS, *LORA, *settings])
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def states(model: PromptedModel) -> torch.Tensor:
    """What decoding reads of three histories."""
    titles = made_up_titles(30, np.random.default_rng(0))
    _, layout = untrained_prompted(titles, SETTINGS)
    items, offsets = np.arange(9, dtype=np.int32), np.array([0, 2, 5, 9])
    with torch.inference_mode():
        return model.encode(encode_histories(items, offsets, np.full(3, -1), layout))


def test_adapters_alone_are_trained() -> None:
    model = adapted()
    trained = trained_parameters(model)
    assert trained
    assert all("lora_" in name for name in trained)
    # All linear maps of both layers, not the head.
    assert len(trained) == 2 * 2 * 7
    frozen = hash_of_frozen(model.named_parameters())
    optimizer = build_optimizer(model, load_recipe("llama").optimizer)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    before = {name: p.detach().clone() for name, p in trained.items()}
    hidden = model.run(torch.arange(8)[None], torch.arange(8)[None], plain_attention())
    F.linear(hidden, model.head_weight).square().sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in trained.items())
    assert hash_of_frozen(model.named_parameters()) == frozen


def plain_attention() -> object:
    from genrec_dist.model.causal.attention import MaskedAttention

    return MaskedAttention(torch.ones(1, 8, 8, dtype=torch.bool).tril())


def test_named_modules_alone_get_adapters() -> None:
    names = set(trained_parameters(adapted("lora.targets='q_proj, v_proj'")))
    assert {name.split(".")[-4] for name in names} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"lora\.targets colour: "):
        adapted("lora.targets=colour")


def test_saved_models_are_merged_and_adapters_are_pefts(tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not list(tmp_path.rglob("*.bin"))
    expected = states(model)
    merged = load_prompted(tmp_path).eval()
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert float((states(merged) - expected).abs().max()) < 1e-4
    assert (
        float(
            (
                states(
                    untrained_prompted(made_up_titles(30, np.random.default_rng(0)), SETTINGS)[0]
                )
                - expected
            )
            .abs()
            .max()
        )
        > 0.1
    )
    # peft reads the adapters onto the weights that they were trained on.
    config = copy.deepcopy(model.lm.config)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    base.load_state_dict(
        {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in model.lm.state_dict().items()
            if ".lora_" not in name
        }
    )
    on_base = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokens = torch.arange(20)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert float((on_base(tokens).logits - plain(tokens).logits).abs().max()) < 1e-4
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"]) == ("LORA", 4)
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 28
