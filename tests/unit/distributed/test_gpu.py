"""What is set for a GPU, and the line about one that torch cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genrec_dist.distributed.gpu import set_gpu_defaults, unusable_gpu

SAYS = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri May 31 09:35:42 UTC 2024\n"


def test_the_allocator_grows_its_segments_unless_the_user_says_otherwise() -> None:
    environment: dict[str, str] = {}
    set_gpu_defaults(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        environment = {name: "max_split_size_mb:64"}
        set_gpu_defaults(environment)
        assert environment == {name: "max_split_size_mb:64"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this GPU can be used")
def test_a_driver_that_torch_cannot_use_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    driver = tmp_path / "version"
    assert unusable_gpu(driver) == ""
    driver.write_text(SAYS)
    line = unusable_gpu(driver)
    assert line.startswith("this machine has an NVIDIA driver 550.90.07, ")
    assert "the CPU is used; " in line
    assert "\n" not in line
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "(built for CUDA 13.0) cannot use" in unusable_gpu(driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unusable_gpu(driver) == ""
