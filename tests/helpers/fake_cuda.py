"""A CUDA of fake tensors, without a GPU: what would be launched, who would wait for the device, and
which tensors of two devices would meet."""

from __future__ import annotations

import contextlib
import ctypes
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from places import ROOT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import custom_op
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
# They change what a tensor looks like, and launch nothing.
VIEWS = frozenset(
    [
        "view",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "as_strided",
        "detach",
        "alias",
        "unsqueeze",
        "squeeze",
        "_unsafe_view",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "split",
        "split_with_sizes",
        "narrow",
        "unbind",
        "lift_fresh",
        "_reshape_alias",
        "unfold",
        "is_same_size",
        "diagonal",
        "resize_",
        "record_stream",
        "set_",
    ]
)
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
COPIES = ("_to_copy", "copy_")


class Watch(TorchDispatchMode):
    """Counts what reaches the device. Answers what the host would read there: `kept` places of a
    mask, and ones."""

    def __init__(self, device: str = "cuda", kept: int = 40):
        super().__init__()
        self.device, self.kept = device, kept
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        """Places in the code where the host waits for the device, by line."""
        self.copies: Counter[str] = Counter()
        """To the device."""
        self.mixed: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        on_device = any(tensor.device.type == self.device for tensor in tensors)
        if name in COPIES and tensors:
            self._see_copy(name, args, kwargs)
        elif on_device:
            if len({tensor.device.type for tensor in tensors if tensor.dim()}) > 1:
                self.mixed.add(f"{name} {where()}")
            if name == "_local_scalar_dense":
                self.waits[where()] += 1
                return (tensors[0].dtype.is_floating_point and 1.0) or 1
            if name == "nonzero":
                self.waits[where()] += 1
                places = min(self.kept, tensors[0].numel())
                return torch.zeros(places, tensors[0].dim(), dtype=torch.long, device=self.device)
            if name in INDEXING:
                args = (args[0], self._without_masks(args[1]), *args[2:])
        if name == "_local_scalar_dense":
            return 1.0 if tensors[0].dtype.is_floating_point else 1
        if name == "_unique2":
            count = min(self.kept, tensors[0].numel())
            return tuple(torch.zeros_like(tensors[0].flatten()[:n]) for n in (count, 0, 0))
        out = func(*args, **kwargs)
        makes = device is not None and torch.device(device).type == self.device
        if (on_device or makes) and name not in VIEWS and func.namespace != "prim":
            self.launches[name] += 1
        return out

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())

    def _see_copy(self, name: str, args: Any, kwargs: Any) -> None:
        if name == "copy_":
            target, source = args[0].device.type, args[1]
            is_blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        else:
            source = args[0]
            target = torch.device(kwargs.get("device") or source.device).type
            is_blocking = not kwargs.get("non_blocking")
        if (source.device.type, target) == ("cpu", "cuda") and source.dim():
            self.copies[where()] += 1
            # From memory that is not pinned even such a copy waits.
            if is_blocking or not getattr(source, "is_pinned_here", False):
                self.waits[where()] += 1
        elif (source.device.type, target) == ("cuda", "cpu"):
            self.waits[where()] += 1

    def _without_masks(self, indices: Any) -> list[Any]:
        """Places instead of masks, whose number of places somebody has to wait for."""
        found: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
                continue
            self.waits[where()] += 1
            count = min(self.kept, index.numel())
            places = torch.zeros(count, dtype=torch.long, device=self.device)
            found += [places] * index.dim()
        return found


def where() -> str:
    """The innermost line of this project's code, as `folder/file.py: text`, since lines move."""
    folders = tuple(str(ROOT / name) for name in ("genrec_dist", "kernels", "shards"))
    ours = [f for f in traceback.extract_stack() if f.filename.startswith(folders)]
    if not ours:
        return "elsewhere"
    path = Path(ours[-1].filename)
    return f"{path.parent.name}/{path.name}: {ours[-1].line}"


@custom_op("fake_cuda::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise NotImplementedError


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@custom_op("fake_cuda::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_attention.register_autograd(
    lambda ctx, grad: _attention_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **_: Any) -> Tensor:
    """One launch, and what CUDA's fused attention requires."""
    device = query.device
    if torch.is_autocast_enabled(device.type):
        low = torch.get_autocast_dtype(device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    assert query.dtype == key.dtype == value.dtype, (query.dtype, key.dtype, value.dtype)
    if attn_mask is not None:
        assert attn_mask.dtype in (torch.bool, query.dtype), (attn_mask.dtype, query.dtype)
        assert attn_mask.device == device
        torch.broadcast_shapes(attn_mask.shape, (*query.shape[:-1], key.shape[-2]))
    out: Tensor = _attention(query, key, value)
    return out


def _varlen(query: Tensor, key: Tensor, value: Tensor, *offsets: Any, **_: Any) -> Tensor:
    """One launch, and what flash attention over ragged sequences requires."""
    assert query.dtype in (torch.bfloat16, torch.float16), query.dtype
    assert query.shape[-1] % 8 == 0, query.shape
    for cu_seqlens in offsets[:2]:
        assert cu_seqlens.device == query.device
        assert cu_seqlens.dtype == torch.int32
    out: Tensor = _attention(query, key, value)
    return out


FUSED = (
    ("torch.nn.functional.scaled_dot_product_attention", _sdpa),
    ("torch.nn.attention.varlen.varlen_attn", _varlen),
)
"""Attentions of CUDA, each as one launch; on fake tensors of any device."""


def _pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.is_pinned_here = True  # type: ignore[attr-defined]
    return copy


def _numpy(real: Callable[..., np.ndarray], self: Tensor, *args: Any) -> np.ndarray:
    if not isinstance(self, FakeTensor):
        return real(self, *args)
    kinds = {torch.int64: np.int64, torch.float32: np.float32, torch.bool: np.bool_}
    return np.zeros(tuple(self.shape), kinds[self.dtype])


_CPU_BUILD = torch.version.cuda is None
_DEVICE_TYPES, _CUDA, _META = 21, 1, 14  # of c10::DeviceType


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Context in which a build of torch without CUDA has a device guard for it, which Python's
    indexing asks for: that of the device `meta`, which does nothing."""
    if not _CPU_BUILD:
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    registry = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(library, name)
    registry[_CUDA] = registry[_META]
    try:
        yield
    finally:
        registry[_CUDA] = None


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Context in which tensors on CUDA can be made and computed with, without a gradient: autograd
    asks a GPU for its streams."""
    real = Tensor.numpy
    changes = [
        patch("torch.cuda.amp.common.amp_definitely_not_available", no),
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        *(patch(name, fake) for name, fake in FUSED),
        patch.object(Tensor, "pin_memory", _pinned),
        patch.object(Tensor, "numpy", lambda self, *args: _numpy(real, self, *args)),
        # Fake tensors are none of inference.
        patch("torch.autograd.grad_mode.inference_mode.__enter__", lambda self: None),
        patch("torch.autograd.grad_mode.inference_mode.__exit__", lambda *_: None),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_device_guard())
        for change in changes:
            stack.enter_context(change)
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def no() -> bool:
    return False
