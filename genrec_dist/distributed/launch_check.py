"""What the launcher was asked for, and whether the run got it: processes, ZeRO stage, precision,
device."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType

CHOICES = {
    "processes": (),
    "zero": ("none", "0", "1", "2", "3"),
    "precision": ("fp32", "bf16", "fp16"),
    "device": ("cpu", "gpu"),
}
"""What can be asked for, and its values; `processes` is a whole number, `zero=none` is a run
without DeepSpeed."""

# Where a program that starts the ranks by itself tells how many there are; the first one that is
# set counts.
_WORLD_SIZES = (
    "WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
_LEVELS = 4


@dataclass(frozen=True)
class Asked:
    what: str
    """One of CHOICES."""
    value: str
    by: str
    """Who asked: a variable, a file or a command line."""


@dataclass(frozen=True)
class Launch:
    """A process above this one that is `accelerate launch`."""

    arguments: list[str]
    """Behind the word `launch`."""
    folder: Path
    """Where it was started; a configuration file may be named from there."""


def check(accelerator: Accelerator, precision: str) -> None:
    """Compare what was asked for with what this run got; collective.

    `precision`: the recipe's. Raises ValueError, on all ranks, where any rank got something else or
    another than rank 0."""
    got = gotten(accelerator)
    error: ValueError | None = None
    try:
        difference = first_difference(
            [*asked(os.environ, launch_above()), Asked("precision", precision, "recipe")], got
        )
    except ValueError as raised:  # what was asked cannot be read
        error = raised
    else:
        error = ValueError(difference) if difference else None
    codes = [_code(what, value) for what, value in got.items()]
    everyone = _exchange([int(error is not None), *codes], accelerator)
    if error is not None:
        raise error
    for rank, (failed, *theirs) in enumerate(everyone):
        if failed:
            raise ValueError(
                f"rank {rank} did not get what it was asked for: its own message says what"
            )
        for what, first, other in zip(got, everyone[0][1:], theirs, strict=True):
            if first != other:
                raise ValueError(
                    f"rank {rank} got {_said(what, other)}, rank 0 {_said(what, first)}: "
                    "start all ranks with the same file, variables and machines alike"
                )


def gotten(accelerator: Accelerator) -> dict[str, str]:
    """What this rank has, by the keys of CHOICES."""
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    zero = "none"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # The very dictionary that the engine will be made from, so neither a flag nor a file counts
        # but what became of them.
        config = accelerator.deepspeed_plugin.deepspeed_config
        zero = str(config["zero_optimization"].get("stage", 0))
        enabled = [kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled") is True]
        precision = enabled[0] if enabled else "fp32"
    return {
        "processes": str(accelerator.num_processes),
        "zero": zero,
        "precision": precision,
        "device": "cpu" if accelerator.device.type == "cpu" else "gpu",
    }


def first_difference(wishes: list[Asked], got: Mapping[str, str]) -> str | None:
    """A line about the first wish that was not granted: what was asked, by whom, what came, and the
    way out."""
    for wish in wishes:
        if wish.value != got[wish.what]:
            asked_for, came = (_phrase(wish.what, value) for value in (wish.value, got[wish.what]))
            return f"{wish.by} asks for {asked_for}, the run got {came}: {_way_out(wish, got)}"
    return None


def _phrase(what: str, value: str) -> str:
    if what == "processes":
        return f"{value} process" + ("es" if value != "1" else "")
    if what == "zero":
        return "no DeepSpeed" if value == "none" else f"DeepSpeed ZeRO stage {value}"
    return f"{what} {value}"


def _way_out(wish: Asked, got: Mapping[str, str]) -> str:
    if wish.what == "processes" and got["processes"] == "1" and got["device"] == "cpu":
        return "accelerate alone starts one process on a CPU; start them with launch/cpu_two_ranks.sh or torchrun"
    if wish.what == "processes":
        return "start all ranks with one launcher (launch/README.md), or ask for what there is"
    if wish.what == "zero" and got["zero"] == "none":
        return "unset ACCELERATE_USE_CPU, which turns DeepSpeed off; on a CPU set DS_ACCELERATOR=cpu instead"
    if wish.what == "zero" and wish.value == "none":
        return "unset ACCELERATE_USE_DEEPSPEED, which outlives the launch that set it"
    if wish.what == "zero":
        return "let one place name the stage: the DeepSpeed file that the launch file names"
    if wish.what == "precision":
        return "set the recipe's `precision` and the launcher's mixed_precision to the same"
    return "launch with a file for this machine (launch/README.md), and see that torch finds its GPUs (genrec doctor)"


def asked(environ: Mapping[str, str], launch: Launch | None) -> list[Asked]:
    """All that was asked for, in words of GENREC_EXPECT, of the launcher's command line and of its
    variables.

    Raises ValueError for a GENREC_EXPECT or a DeepSpeed file that cannot be read.
    """
    return [*_expected(environ), *(_of_launch(launch) if launch else []), *_of_environment(environ)]


def _expected(environ: Mapping[str, str]) -> Iterator[Asked]:
    """`GENREC_EXPECT=processes=8,zero=3`: the launch scripts' own statement."""
    for part in filter(None, environ.get("GENREC_EXPECT", "").split(",")):
        what, _, value = part.partition("=")
        if what not in CHOICES or not (
            value in CHOICES[what] or (what == "processes" and value.isdecimal())
        ):
            known = ", ".join(f"{key}={'|'.join(values) or 'N'}" for key, values in CHOICES.items())
            raise ValueError(f"GENREC_EXPECT: {part} is not one of {known}")
        yield Asked(what, value, f"GENREC_EXPECT={environ['GENREC_EXPECT']}")


def _of_environment(environ: Mapping[str, str]) -> Iterator[Asked]:
    for name in _WORLD_SIZES:
        if environ.get(name):
            yield Asked("processes", environ[name], f"{name}={environ[name]}")
            break
    if _is_true(environ.get("ACCELERATE_USE_DEEPSPEED")):
        yield from _stages(
            environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"),
            environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"),
            "ACCELERATE_USE_DEEPSPEED",
        )
    # Accelerate sets "no" where nobody said anything, so that is no statement.
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        yield Asked("precision", precision, f"ACCELERATE_MIXED_PRECISION={precision}")
    if _is_true(environ.get("ACCELERATE_USE_CPU")):
        yield Asked("device", "cpu", "ACCELERATE_USE_CPU")


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "on", "y", "t")


def _stages(file: str | None, stage: Any, by: str) -> Iterator[Asked]:
    """What a DeepSpeed file and a stage named beside it ask for; accelerate's own default where
    both are silent."""
    in_file = None
    if file and file != "none":
        try:
            in_file = json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"][
                "stage"
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}: no DeepSpeed file with zero_optimization.stage ({error!r})"
            ) from None
    if in_file not in (None, "auto"):
        yield Asked("zero", str(in_file), file or by)
    if stage is not None or in_file in (None, "auto"):
        yield Asked("zero", str(2 if stage is None else stage), by)


def _of_launch(launch: Launch) -> Iterator[Asked]:
    """What accelerate's own parser reads in the command line and the configuration file it
    names."""
    handlers = list(logging.root.handlers)
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    logging.root.handlers[:] = handlers  # that import takes over the logging of whoever does it
    options = launch_command_parser().parse_args(launch.arguments)
    own = launch.arguments[: -1 - len(options.training_script_args)]
    by = " ".join(["accelerate launch", *own]).removesuffix(" -m").removesuffix(" --module")
    if options.config_file:
        options.config_file = str(launch.folder / options.config_file)
    silent, gpu_ids = options.num_processes is None, options.gpu_ids
    logger = logging.getLogger("accelerate.commands.launch")
    logger.disabled = True  # what it fills in and says so, the launcher has said already
    options, defaults, _ = _validate_launch_command(options)
    logger.disabled = False
    if not (silent and defaults is None):
        yield Asked("processes", str(options.num_processes), by)
    if options.use_deepspeed:
        yield from _stages(options.deepspeed_config_file, options.zero_stage, by)
    else:
        yield Asked("zero", "none", by)
    if options.mixed_precision != "no":
        yield Asked("precision", options.mixed_precision, by)
    gpu_ids = gpu_ids or (defaults.gpu_ids if defaults else None)
    if options.cpu or options.use_cpu:
        yield Asked("device", "cpu", by)
    elif options.multi_gpu or gpu_ids:
        yield Asked("device", "gpu", by)


def launch_above() -> Launch | None:
    """The nearest `accelerate launch` above this process; None where there is none or the system
    does not tell."""
    process = os.getppid()
    for _ in range(_LEVELS):
        folder = Path("/proc") / str(process)
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            arguments = launch_arguments(words)
            if arguments is not None:
                return Launch(arguments, (folder / "cwd").readlink())
            # Behind the name, which may hold anything, in brackets: the state, then the parent.
            process = int(
                (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
            )
        except (OSError, ValueError, IndexError):
            return None
    return None


def launch_arguments(words: list[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line, whichever way it is written; None where
    it is another one."""
    for place, word in enumerate(words):
        name = Path(word).name
        if (
            name == "accelerate-launch"
            or word == "accelerate.commands.launch"
            or word.endswith("accelerate/commands/launch.py")
        ):
            return words[place + 1 :]
        is_door = name == "accelerate" or word == "accelerate.commands.accelerate_cli"
        if is_door and words[place + 1 : place + 2] == ["launch"]:
            return words[place + 2 :]
    return None


def _code(what: str, value: str) -> int:
    return (
        CHOICES[what].index(value)
        if value in CHOICES[what]
        else int(value)
        if value.isdecimal()
        else -1
    )


def _said(what: str, code: int) -> str:
    return _phrase(what, CHOICES[what][code] if CHOICES[what] and code >= 0 else str(code))


def _exchange(codes: list[int], accelerator: Accelerator) -> list[list[int]]:
    """These numbers of every rank, by rank."""
    if accelerator.num_processes == 1 or not dist.is_initialized():
        return [codes]
    mine = torch.tensor(codes, dtype=torch.int64, device=accelerator.device)
    everyone = [torch.empty_like(mine) for _ in range(accelerator.num_processes)]
    dist.all_gather(everyone, mine)
    return [theirs.tolist() for theirs in everyone]
