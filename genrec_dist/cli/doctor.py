"""What is installed, what works, what is missing, and the exact command that gets it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from genrec_dist.distributed.gpu import unusable_gpu
from genrec_dist.distributed.threads import describe_threads, num_cores

State = Literal["ok", "absent", "untested", "broken"]

_MODEL = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "tensorboard")
_DATA = ("numpy", "scipy", "pyarrow", "webdataset")
REQUIRED = (*_MODEL, *_DATA, "PyYAML", "rich", "typer")
# What each optional package is for, and the extra that installs it.
OPTIONAL = {
    "deepspeed": ("ZeRO", "zero"),
    "triton": ("GPU kernels", "kernels"),
    "ray": ("sweeps", "tune"),
    "optuna": ("sweeps", "tune"),
    "peft": ("adapters of language models", "llama"),
    "gguf": ("weights in GGUF files", "llama"),
    "fastapi": ("serving", "serve"),
    "uvicorn": ("serving", "serve"),
    "wandb": ("tracking", "track"),
    "mlflow-skinny": ("tracking", "track"),
    "torchmetrics": ("a test's second opinion", "dev"),
    "pytest": ("tests", "dev"),
    "ruff": ("checks", "dev"),
    "mypy": ("checks", "dev"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination. A machine with a finding that is `required` and `broken` is
    unfit; `remedy` is a command."""

    what: str
    state: State
    detail: str
    remedy: str = ""
    required: bool = True


def examine() -> list[Finding]:
    """Look at the machine and the packages, and try what has to work. Takes seconds, and leaves no
    file."""
    glibc, temporary = platform.libc_ver()[1] or "none", tempfile.gettempdir()
    python: State = "ok" if sys.version_info < (3, 13) else "untested"
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
        memory = f"{os.sysconf('SC_PAGE_SIZE') * pages / 2**30:.1f} GiB"
    except (AttributeError, OSError, ValueError):
        memory = "not known"
    tested = locked_versions()
    return [
        Finding("Python", python, f"{platform.python_version()} at {sys.prefix}"),
        Finding("platform", "ok", f"{platform.system()} {platform.machine()}, glibc {glibc}"),
        Finding("processor", "ok", f"{num_cores()} cores for this process"),
        Finding("memory", "ok", memory),
        *(_package(name, tested) for name in REQUIRED),
        *(_package(name, tested, *uses) for name, uses in OPTIONAL.items()),
        _attempt("torch computes", _torch_computes, "make env"),
        _attempt("threads", _threads, "", required=False),
        _attempt("bf16 on this CPU", _cpu_bf16, "", required=False),
        _attempt("GPU", _gpu, "", required=False),
        _attempt("Triton on the GPU", _triton, "", required=False),
        _attempt("processes (gloo)", _gloo, "install a torch build with torch.distributed", False),
        _attempt(
            "tar in a temporary directory", _tar_round_trip, f"free or set TMPDIR (now {temporary})"
        ),
        _attempt(
            "writing here", _writes_here, f"cd to a directory you may write to (now {Path.cwd()})"
        ),
    ]


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing required is broken."""
    return not any(finding.required and finding.state == "broken" for finding in findings)


def as_json(findings: list[Finding]) -> str:
    """`{"healthy": bool, "findings": [{what, state, detail, remedy, required}, ...]}`."""
    found = {"healthy": healthy(findings), "findings": [asdict(finding) for finding in findings]}
    return json.dumps(found, indent=1)


def render(findings: list[Finding]) -> Table:
    """The findings as a table for a terminal."""
    styles = {"ok": "green", "absent": "dim", "untested": "yellow", "broken": "bold red"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "state", "found", "to get it"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        state = Text(finding.state, style=styles[finding.state])
        # Text, not str: a path with brackets is not markup.
        table.add_row(Text(finding.what), state, Text(finding.detail), Text(finding.remedy))
    verdict = "everything required works" if healthy(findings) else "something required is broken"
    table.caption, table.caption_justify = verdict, "left"
    return table


def locked_versions(lock: Path | None = None) -> dict[str, str]:
    """Versions of `requirements.lock` by lower-case name; empty where there is no checkout."""
    lock = lock or Path(__file__).resolve().parents[2] / "requirements.lock"
    text = lock.read_text(encoding="utf-8") if lock.is_file() else ""
    pins = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, flags=re.MULTILINE)
    return {name.lower(): version for name, version in pins}


def _package(name: str, tested: dict[str, str], use: str = "", extra: str = "") -> Finding:
    """By the package's metadata: importing deepspeed or ray would take seconds and start things."""
    required = not extra
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if required:
            return Finding(name, "broken", "", f"pip install {name}")
        remedy = f"pip install 'genrec-dist[{extra}]'"
        return Finding(name, "absent", f"for {use}", remedy, required=False)
    wanted = tested.get(name.lower(), version)
    # A local label (2.13.0+cpu) names a build of the same version.
    if version.split("+")[0] == wanted.split("+")[0]:
        return Finding(name, "ok", version, required=required)
    remedy = f"pip install '{name}=={wanted}'"
    return Finding(name, "untested", f"{version}; tested: {wanted}", remedy, required)


def _attempt(
    what: str, check: Callable[[], tuple[State, str]], remedy: str, required: bool = True
) -> Finding:
    try:
        state, detail = check()
    except Exception as error:  # any failure is the finding
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(what, "broken", text, remedy, required)
    return Finding(what, state, detail, "" if state == "ok" else remedy, required)


def _multiply(device: str, dtype: str) -> None:
    torch = importlib.import_module("torch")
    ones = torch.ones(64, 64, device=device, dtype=getattr(torch, dtype))
    if (ones @ ones)[0, 0].item() != 64.0:
        raise ArithmeticError(f"a {dtype} product of ones is wrong on {device}")


def _torch_computes() -> tuple[State, str]:
    _multiply("cpu", "float32")
    return "ok", "fp32"


def _threads() -> tuple[State, str]:
    return "ok", describe_threads(importlib.import_module("torch").get_num_threads())


def _cpu_bf16() -> tuple[State, str]:
    _multiply("cpu", "bfloat16")
    cpu = importlib.import_module("torch").cpu
    amx = getattr(cpu, "_is_amx_tile_supported", lambda: None)()
    return "ok", f"right; AMX {'not known' if amx is None else 'yes' if amx else 'no'}"


def _gpu() -> tuple[State, str]:
    torch = importlib.import_module("torch")
    if problem := unusable_gpu():
        return "broken", problem
    if not torch.cuda.is_available():
        return "absent", f"none that this torch sees (built for CUDA {torch.version.cuda or 'no'})"
    _multiply("cuda", "bfloat16")
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return "ok", ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)


def _triton() -> tuple[State, str]:
    if not importlib.import_module("torch").cuda.is_available():
        return "absent", "no GPU to launch a kernel on"
    problem = importlib.import_module("genrec_kernels").launch_problem()
    if problem:
        return "broken", f"{problem}; plain torch takes the place of the kernels"
    return "ok", "a kernel was compiled and launched"


def _gloo() -> tuple[State, str]:
    distributed = importlib.import_module("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        return "absent", "this torch was built without gloo"
    # A store in a file opens no port that another process could take for its own.
    with tempfile.TemporaryDirectory() as directory:
        store = distributed.FileStore(str(Path(directory) / "store"), 1)
        store.set("greeting", "hello")
        if store.get("greeting") != b"hello":
            raise OSError("a key set in the store came back changed")
    return "ok", "available, its file store works"


def _tar_round_trip() -> tuple[State, str]:
    with tempfile.TemporaryDirectory() as directory:
        path, member = Path(directory) / "shard.tar", Path(directory) / "00000000.items.npy"
        member.write_bytes(bytes(range(256)))
        with tarfile.open(path, "w") as tar:
            tar.add(member, member.name)
        with tarfile.open(path) as tar:
            found = tar.extractfile(member.name)
            if found is None or found.read() != bytes(range(256)):
                raise OSError("what was read is not what was written")
    return "ok", f"written and read in {tempfile.gettempdir()}"


def _writes_here() -> tuple[State, str]:
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    return "ok", str(Path.cwd())
