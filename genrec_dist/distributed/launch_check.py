"""What was requested of the launcher, and whether the run got it: processes, ZeRO stage, precision,
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
from accelerate import Accelerator, DistributedType
from accelerate.utils import str_to_bool
from genrec_shards.readers.documents import read_object

from genrec_dist.distributed.collectives import Ranks

VALUES = {
    "processes": (),
    "zero": ("none", "0", "1", "2", "3"),
    "precision": ("fp32", "bf16", "fp16"),
    "device": ("cpu", "gpu"),
}
"""What can be requested, and its values; `processes` is a whole number, `zero=none` is a run
without DeepSpeed."""

# Where a program that starts the ranks writes how many there are; the first one that is set counts.
_WORLD_SIZES = (
    "WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
_ANCESTORS = 4
"""How many processes above this one may be the launcher."""


def name_device_to_deepspeed() -> None:
    """Where there is no accelerator, tell DeepSpeed so: it would find it out, and print it."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True)
class Request:
    """One thing that was requested."""

    what: str
    """A key of VALUES."""
    value: str
    by: str
    """Where it was requested: a variable, a file or a command line."""


@dataclass(frozen=True)
class Launch:
    """A process above this one that is `accelerate launch`."""

    arguments: list[str]
    """After the word `launch`."""
    folder: Path
    """Its working directory; a configuration file may be named relative to it."""


def check(accelerator: Accelerator, precision: str) -> None:
    """Compare what was requested with what this run got. Collective.

    Args:
        accelerator: of the run.
        precision: the recipe's.

    Raises:
        ValueError: on all ranks, where any rank got something else, or not the same as rank 0.
    """
    got = gotten(accelerator)
    try:
        requests = requested(os.environ, launch_above())
        problem = first_difference([*requests, Request("precision", precision, "recipe")], got)
    except ValueError as error:  # what was requested cannot be read
        problem = str(error)
    mine = json.dumps([problem is not None, got])
    everyone = [json.loads(theirs) for theirs in Ranks().all_gather_str(mine)]
    if problem is not None:
        raise ValueError(problem)
    for rank, (failed, theirs) in enumerate(everyone):
        if failed:
            raise ValueError(
                f"rank {rank} did not get what was requested: its own message says what"
            )
        for what, first in everyone[0][1].items():
            if theirs[what] != first:
                other = _phrase(what, theirs[what])
                raise ValueError(
                    f"rank {rank} got {other}, rank 0 {_phrase(what, first)}: "
                    "start all ranks with the same file, variables and machines alike"
                )


def gotten(accelerator: Accelerator) -> dict[str, str]:
    """What this rank has, by the keys of VALUES."""
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    zero = "none"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # The dictionary that the engine is made from: flags and files count by their effect on it.
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


def first_difference(requests: list[Request], got: Mapping[str, str]) -> str | None:
    """A line about the first request that was not met: what it is, where it was made, what came,
    and the remedy; None where all were met."""
    for request in requests:
        what, value, came = request.what, request.value, got[request.what]
        if value == came:
            continue
        if what == "processes" and came == "1" and got["device"] == "cpu":
            remedy = (
                "accelerate alone starts one process on a CPU; start them with "
                "launch/cpu_two_ranks.sh or torchrun"
            )
        elif what == "processes":
            remedy = (
                "start all ranks with one launcher (launch/README.md), or ask for what there is"
            )
        elif what == "zero" and came == "none":
            remedy = (
                "unset ACCELERATE_USE_CPU, which turns DeepSpeed off; on a CPU set "
                "DS_ACCELERATOR=cpu instead"
            )
        elif what == "zero" and value == "none":
            remedy = "unset ACCELERATE_USE_DEEPSPEED, which outlives the launch that set it"
        elif what == "zero":
            remedy = "let one place name the stage: the DeepSpeed file that the launch file names"
        elif what == "precision":
            remedy = "set the recipe's `precision` and the launcher's mixed_precision to the same"
        else:
            remedy = (
                "launch with a file for this machine (launch/README.md), and see that torch finds "
                "its GPUs (genrec doctor)"
            )
        asked_for = _phrase(what, value)
        return f"{request.by} asks for {asked_for}, the run got {_phrase(what, came)}: {remedy}"
    return None


def _phrase(what: str, value: str) -> str:
    if what == "processes":
        return f"{value} process" + ("es" if value != "1" else "")
    if what == "zero":
        return "no DeepSpeed" if value == "none" else f"DeepSpeed ZeRO stage {value}"
    return f"{what} {value}"


def requested(environ: Mapping[str, str], launch: Launch | None) -> list[Request]:
    """All that was requested: by GENREC_EXPECT, the launcher's command line and its variables.
    Raises ValueError for a GENREC_EXPECT or a DeepSpeed file that cannot be read."""
    requests = [*_of_expect(environ.get("GENREC_EXPECT", ""))]
    if launch is not None:
        requests += _of_launch(launch)
    size = next((name for name in _WORLD_SIZES if environ.get(name)), None)
    if size is not None:
        requests.append(Request("processes", environ[size], f"{size}={environ[size]}"))
    if _is_true(environ, "ACCELERATE_USE_DEEPSPEED"):
        file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        requests += _stages(file, stage, "ACCELERATE_USE_DEEPSPEED")
    # Accelerate sets "no" where nothing was said, so that is no request.
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        requests.append(Request("precision", precision, f"ACCELERATE_MIXED_PRECISION={precision}"))
    if _is_true(environ, "ACCELERATE_USE_CPU"):
        requests.append(Request("device", "cpu", "ACCELERATE_USE_CPU"))
    return requests


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    try:
        return bool(str_to_bool(environ.get(name) or "no"))
    except ValueError:
        return False


def _of_expect(text: str) -> Iterator[Request]:
    """`GENREC_EXPECT=processes=8,zero=3`: the launch scripts' own statement."""
    for part in filter(None, text.split(",")):
        what, _, value = part.partition("=")
        is_count = what == "processes" and value.isdecimal()
        if value not in VALUES.get(what, ()) and not is_count:
            known = ", ".join(f"{key}={'|'.join(values) or 'N'}" for key, values in VALUES.items())
            raise ValueError(f"GENREC_EXPECT: {part} is not one of {known}")
        yield Request(what, value, f"GENREC_EXPECT={text}")


def _stages(file: str | None, stage: Any, by: str) -> Iterator[Request]:
    """The ZeRO stages that a DeepSpeed file and a setting beside it ask for; accelerate's own
    default where neither names one."""
    in_file = None
    if file and file != "none":
        try:
            in_file = read_object(file)["zero_optimization"]["stage"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}: no DeepSpeed file with zero_optimization.stage ({error!r})"
            ) from None
    if in_file not in (None, "auto"):
        yield Request("zero", str(in_file), file or by)
    if stage is not None or in_file in (None, "auto"):
        yield Request("zero", str(2 if stage is None else stage), by)


def _of_launch(launch: Launch) -> Iterator[Request]:
    """What accelerate's own parser reads in the command line and the configuration file it names.

    The environment alone does not say it: on a CPU `accelerate launch --num_processes 2` starts one
    process and leaves no trace of the other."""
    handlers = list(logging.root.handlers)
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    logging.root.handlers[:] = handlers  # that import replaces the handlers of whoever imports it
    options = launch_command_parser().parse_args(launch.arguments)
    own = launch.arguments[: -1 - len(options.training_script_args)]
    by = " ".join(["accelerate launch", *own]).removesuffix(" -m").removesuffix(" --module")
    if options.config_file:
        options.config_file = str(launch.folder / options.config_file)
    count_given, gpu_ids = options.num_processes is not None, options.gpu_ids
    logger = logging.getLogger("accelerate.commands.launch")
    logger.disabled = True  # the launcher itself has reported the defaults it fills in
    options, defaults, _ = _validate_launch_command(options)
    logger.disabled = False
    if count_given or defaults is not None:
        yield Request("processes", str(options.num_processes), by)
    if options.use_deepspeed:
        yield from _stages(options.deepspeed_config_file, options.zero_stage, by)
    else:
        yield Request("zero", "none", by)
    if options.mixed_precision != "no":
        yield Request("precision", options.mixed_precision, by)
    if options.cpu or options.use_cpu:
        yield Request("device", "cpu", by)
    elif options.multi_gpu or gpu_ids or (defaults and defaults.gpu_ids):
        yield Request("device", "gpu", by)


def launch_above() -> Launch | None:
    """The nearest `accelerate launch` above this process; None where there is none, or no /proc."""
    process = os.getppid()
    for _ in range(_ANCESTORS):
        folder = Path("/proc") / str(process)
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            arguments = launch_arguments(words)
            if arguments is not None:
                return Launch(arguments, (folder / "cwd").readlink())
            # "12 (any name) S 11 ...": after the name in brackets come the state and the parent.
            stat = (folder / "stat").read_text(errors="replace")
            process = int(stat.rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return None
    return None


def launch_arguments(words: list[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line, however it is written; None for other
    commands."""
    for place, word in enumerate(words):
        name = Path(word).name
        is_launch = name == "accelerate-launch" or word == "accelerate.commands.launch"
        if is_launch or word.endswith("accelerate/commands/launch.py"):
            return words[place + 1 :]
        is_cli = name == "accelerate" or word == "accelerate.commands.accelerate_cli"
        if is_cli and words[place + 1 : place + 2] == ["launch"]:
            return words[place + 2 :]
    return None
