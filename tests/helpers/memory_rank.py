"""One rank of tests/unit/estimate/test_memory.py: trains under each method in turn and measures the
storages that then lie there.

`memory_rank.py JOBS.json`: a list of {"method", "precision", "settings": DeepSpeed's
zero_optimization section}. Rank 0 leaves MEASURED.json beside it: per job the kind of its optimiser
and, by rank, bytes by category."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import Batch
from genrec_dist.data.encoder_input import EncoderInput
from genrec_dist.distributed.accelerator import make_accelerator
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.estimate.sizes import build_config
from genrec_dist.model.genrec import GenRecForConditionalGeneration
from genrec_dist.model.optimizer import AveragedWeights
from genrec_dist.training.engine import Replicated, Spread, make_engine

USERS, ITEMS = 3000, 2000


def main(path: Path) -> None:
    measured = []
    gc.collect()
    gc.freeze()  # modules and functions need not be searched for tensors
    for job in json.loads(path.read_text()):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        measured.append(measure(job, path.parent))
    if dist.get_rank() == 0:
        (path.parent / "MEASURED.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


def measure(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Two steps of two micro-batches; each category at its most."""
    launch(job, folder)
    recipe = load_recipe(folder / "recipe.yaml", [f"precision={job['precision']}"])
    accelerator = make_accelerator(recipe)
    earlier = dict(storages())  # held, so that none of their addresses is used again
    torch.manual_seed(0)
    model = GenRecForConditionalGeneration(build_config(recipe, USERS, ITEMS))
    engine: Any = make_engine(model, recipe, accelerator)
    average = AveragedWeights(engine.masters, recipe.optimizer.ema_decay)
    buckets = watch_buckets(engine)
    most: dict[str, int] = {}

    def note(**bytes_of: int) -> None:
        most.update({name: max(value, most.get(name, 0)) for name, value in bytes_of.items()})

    # One of the last gradients of a backward: DeepSpeed has its buckets in use, later it may free
    # them.
    last = model.model.encoder.layernorm_embedding.weight
    last.register_hook(lambda _: note(buffers=bytes_in(communication_buffers(engine))))
    for step in range(2):
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-3
        for number in range(2):
            with engine.micro_step(last=number == 1):
                loss = engine.loss(batch(), 0.0) / 64
                whole = bytes_in(weights(engine.model))
                engine.backward(loss)
                del loss
            if step == 1:
                note(
                    gathered=whole - bytes_in(weights(engine.model)),
                    **classify(engine, average, buckets, earlier),
                )
        there = [storage for _, storage in storages()] if step == 1 else []
        with LiveBytes(there) if step == 1 else contextlib.nullcontext() as live:
            engine.step()
        if live is not None:
            note(step_extra=live.most)
        average.update(step)
    wrapper = engine.engine.optimizer if isinstance(engine, Spread) else engine.optimizer
    facts = {
        "distributed_type": accelerator.distributed_type.value,
        "stage": engine.stage if isinstance(engine, Spread) else None,
        "optimizer": type(wrapper).__name__,
        "bytes": [
            dict(zip(sorted(most), values, strict=True))
            for values in Ranks().exchange(in_order(most))
        ],
    }
    if isinstance(engine, Spread):
        engine.engine.destroy()
    return facts


def in_order(values: dict[str, int]) -> list[int]:
    return [values[name] for name in sorted(values)]


def launch(job: dict[str, Any], folder: Path) -> None:
    """Set up what accelerate's launcher would have."""
    with_deepspeed = job["method"] != "ddp"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(with_deepspeed).lower()
    os.environ["ACCELERATE_USE_CPU"] = str(not with_deepspeed).lower()
    if with_deepspeed:
        path = (
            folder
            / f"{job['method']}-{dist.get_rank() if dist.is_initialized() else os.environ['RANK']}.json"
        )
        path.write_text(
            json.dumps({"zero_optimization": job["settings"], "zero_force_ds_cpu_optimizer": False})
        )
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)


def batch() -> Batch:
    """4 samples of 16 input and 4 target tokens."""
    ids = torch.randint(5, 6000, (4, 16))
    encoder = EncoderInput(
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        torch.arange(16).expand(4, 16),
        torch.randint(0, USERS + 1, (4, 16)),
        torch.randint(0, ITEMS + 1, (4, 16)),
    )
    labels = torch.randint(5, 6000, (4, 4))
    return Batch(
        encoder=encoder,
        encoder_row=torch.arange(4),
        decoder_input_ids=labels,
        labels=labels,
        num_samples=4,
        num_target_tokens=16,
        num_targets=4,
        num_tokens=80,
        num_slots=80,
    )


def watch_buckets(engine: Any) -> dict[int, torch.UntypedStorage]:
    """DDP's buckets live outside Python: a hook that sums as DDP itself does sees them pass."""
    seen: dict[int, torch.UntypedStorage] = {}

    def hook(_, bucket):  # torch compares annotations with types, and ours are strings
        if bucket.index() == 0:
            seen.clear()  # after the first backward DDP makes its buckets anew
        seen[bucket.index()] = bucket.buffer().untyped_storage()
        flat = bucket.buffer().div_(dist.get_world_size())
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        return work.get_future().then(lambda done: done.value()[0])

    if isinstance(engine, Replicated):
        engine.prepared.register_comm_hook(None, hook)
    return seen


def classify(
    engine: Any,
    average: AveragedWeights,
    buckets: dict[int, torch.UntypedStorage],
    earlier: dict[int, torch.UntypedStorage],
) -> dict[str, int]:
    """Bytes of all storages made since `earlier`, each counted once; what has no other name counts
    as gradients."""
    time.sleep(0.2)  # gloo's threads let go of what they have reduced a moment after a wait ends
    found = {place: storage for place, storage in storages() if place not in earlier}
    found |= {storage.data_ptr(): storage for storage in buckets.values()}
    named = {
        "weights": places(weights(engine.model)),
        "masters": places(engine.masters),
        "moments": places(
            value for state in engine.optimizer.state.values() for value in state.values()
        ),
        "average": places(average.values),
        "buffers": places(communication_buffers(engine))
        | {storage.data_ptr() for storage in buckets.values()},
    }
    sizes = {
        name: sum(found.pop(place).nbytes() for place in those if place in found)
        for name, those in named.items()
    }
    return {**sizes, "gradients": sum(storage.nbytes() for storage in found.values())}


def places(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def bytes_in(tensors: Iterable[torch.Tensor]) -> int:
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(held.values())


def storages() -> Iterator[tuple[int, torch.UntypedStorage]]:
    """(address, storage) of every tensor that Python knows of."""
    gc.collect()
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if (
                    tensor is not None
                    and tensor.device.type == "cpu"
                    and tensor.untyped_storage().nbytes()
                ):
                    yield tensor.untyped_storage().data_ptr(), tensor.untyped_storage()


def weights(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def communication_buffers(engine: Any) -> Iterator[torch.Tensor]:
    wrapper = engine.engine.optimizer if isinstance(engine, Spread) else None
    for bucket in getattr(wrapper, "ipg_buckets", {}).values():
        yield from bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
    if hasattr(wrapper, "temp_grad_buffer_for_gpu_offload"):
        yield wrapper.temp_grad_buffer_for_gpu_offload  # type: ignore[union-attr]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, as they come and go."""

    def __init__(self, earlier: Iterable[torch.UntypedStorage]):
        """`earlier`: what was there before; it is held, so that nothing new takes its place."""
        super().__init__()
        self.earlier = {storage._cdata: storage for storage in earlier}
        self.now = self.most = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return output

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.earlier and key not in self.sizes and storage.nbytes():
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
