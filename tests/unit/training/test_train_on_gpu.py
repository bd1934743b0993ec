"""What a training does for a GPU: fixed sums, the device in its log, and memory that is too small
in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from run_events import events
from safetensors.torch import load_file

from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.model.seq2seq import base
from genrec_dist.training.run import train
from genrec_dist.training.saving.tensor_file import HostCopies


@pytest.fixture
def recipe(tiny_recipe: Path) -> Recipe:
    return load_recipe(tiny_recipe, ["deterministic=true"])


def test_a_deterministic_step_refuses_what_has_no_fixed_order(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While losses and gradients are computed a warning is not enough: attention on a GPU would
    only warn."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    modes: set[tuple[bool, bool]] = set()

    def seen() -> tuple[bool, bool]:
        on = torch.are_deterministic_algorithms_enabled()
        return on, torch.is_deterministic_algorithms_warn_only_enabled()

    real = base.head_loss

    def watched(*arguments: object) -> torch.Tensor:
        modes.add(seen())
        loss = real(*arguments)
        loss.register_hook(lambda gradient: modes.add(seen()))
        return loss

    monkeypatch.setattr(base, "head_loss", watched)
    run = train(recipe)
    assert modes == {(True, False)}
    assert seen() == (False, False)  # the next run of this process is as it would be alone
    (start,) = events(run, "start")
    assert start["recipe"]["deterministic"] is True
    assert start["device"] == ("CPU" if not torch.cuda.is_available() else start["device"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_the_same_run_on_a_gpu_ends_at_the_same_bits(
    recipe: Recipe, tmp_path: Path, packing: str
) -> None:
    found = []
    for number in range(2):
        one = replace(recipe, run=str(tmp_path / f"{number}"), packing=packing, precision="bf16")
        train(one)
        found.append(load_file(tmp_path / f"{number}" / "best" / "model.safetensors"))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_memory_that_is_too_small_is_one_line_with_the_way_out(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")

    monkeypatch.setattr(base, "head_loss", full)
    with pytest.raises(ValueError, match=r"^out of GPU memory") as caught:
        train(replace(recipe, deterministic=False))
    assert f"lower micro_batch_tokens, now {recipe.micro_batch_tokens}" in str(caught.value)
    assert "\n" not in str(caught.value)
    reason = events(Path(recipe.run), "end")[0]["error"]
    assert "out of GPU memory" in reason


def test_layers_that_padding_leaves_uncompiled_are_refused(recipe: Recipe) -> None:
    padded = replace(recipe, deterministic=False, compile="layers", packing="padded")
    with pytest.raises(ValueError, match=r"^compile layers: .* set packing packed"):
        train(padded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_checkpoints_copies_are_pinned_and_of_the_moment_at_which_they_were_queued() -> None:
    copies, tensor = HostCopies(), torch.zeros(1 << 26, device="cuda")
    product = torch.randn(8192, 8192, device="cuda")
    for _ in range(20):  # so that the copy is still queued when the tensor changes
        product = product @ product / 1e4
    (copy,) = copies.take({"a": tensor}).values()
    tensor.add_(1)
    assert copy.is_pinned()
    copies.wait()
    assert not copy.any()
    torch.cuda.synchronize()
    assert not copy.any()
