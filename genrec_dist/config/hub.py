"""Runs on the Hugging Face Hub: how they are named, and the folder that one is downloaded to."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from genrec_shards.readers.documents import read_object
from genrec_shards.storage.manifest import file_sha256

from genrec_dist.config.model_manifest import MANIFEST

TOKEN = "HF_TOKEN"
SUFFIXES = (".json", ".safetensors", ".yaml")
"""Of the files of a pushed run that are read; nothing of another kind is downloaded."""
_NAME = re.compile(r"(?:hf:/{1,2})?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class HubName:
    """owner/name, and a branch, tag or commit of it."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")


def parse_hub_name(text: str | Path) -> HubName:
    """`[hf://]owner/name[@revision]`. Raises ValueError where it is something else."""
    match = _NAME.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text}: no name on the hub: write it as hf://owner/name[@revision]")
    return HubName(match[1], match[2])


def run_folder(run: str | Path) -> Path:
    """The directory of a run: the path itself, or where a run on the hub was downloaded to.

    A download goes to the hub's own cache (`HF_HOME`) and is compared with its `manifest.json`;
    what is there is not loaded again, and without a network the cache is read. `run`: A directory,
    or `hf://owner/name[@revision]`. Raises ValueError: There is no such run on the hub, it was not
    pushed by this program, or a file of it arrives damaged twice.
    """
    if not str(run).startswith("hf:/"):  # a Path keeps one slash of two
        return Path(run)
    name = parse_hub_name(run)
    manifest = _download(name, MANIFEST)
    folder = manifest.parent
    # The commit that the manifest is of: a branch may move while the other files come.
    name = HubName(name.repo, folder.name)
    for file, expected in _files_of(manifest, name).items():
        if file_sha256(_download(name, file)) == expected:
            continue
        if file_sha256(_download(name, file, force=True)) != expected:
            raise ValueError(
                f"{name}: {file} has arrived damaged twice (its sha256 is not that of {MANIFEST}): "
                "try again, or let its owner push it again"
            )
    return folder


def _files_of(manifest: Path, name: HubName) -> dict[str, str]:
    """sha256 by file name, of names that may be downloaded."""
    files = read_object(manifest).get("sha256")
    if not isinstance(files, dict) or "config.json" not in files:
        raise ValueError(f"{name}: its {MANIFEST} is not one of genrec push")
    for file in files:
        if Path(file).name != file or not file.endswith(SUFFIXES):
            raise ValueError(f"{name}: {file!r} is no file of a pushed run: nothing is loaded")
    return {str(file): str(digest) for file, digest in files.items()}


def _download(name: HubName, file: str, force: bool = False) -> Path:
    """A file of the run, in the cache; a server that is busy is asked again."""
    hub = hub_library()
    token = os.environ.get(TOKEN) or False
    with one_line_errors(name):
        for pause in (1, 4, None):
            try:
                path = hub.hf_hub_download(
                    name.repo, file, revision=name.revision, token=token, force_download=force
                )
            except hub.errors.HfHubHTTPError as error:
                if pause is None or error.response.status_code < 500:
                    raise
                time.sleep(pause)
            else:
                return Path(path)
    raise AssertionError  # the last attempt returns or raises


def hub_library() -> ModuleType:
    """`huggingface_hub`, which by default speaks plain HTTP here, as any server of `HF_ENDPOINT`
    does, and not Xet. Off a terminal it says nothing."""
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub
    import huggingface_hub.errors

    if not sys.stderr.isatty():
        from huggingface_hub import utils

        utils.disable_progress_bars()
        utils.logging.set_verbosity_error()
    return huggingface_hub


@contextmanager
def one_line_errors(name: HubName) -> Iterator[None]:
    """Raise what the library raises as ValueError: the name, the reason and the way out."""
    errors = hub_library().errors
    try:
        yield
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name}: there is no such branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{name}: there is no such model, or {TOKEN} in the environment may not see it"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ValueError(
            f"{name}: the hub cannot be reached and the cache does not have it: try again with a "
            "network"
        ) from None
    except errors.EntryNotFoundError:
        raise ValueError(
            f"{name}: no {MANIFEST} with all its files is there: genrec push did not put it there"
        ) from None
    except Exception as error:  # of the library, and of the HTTP client that its version has
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name}: {reason}: try again; what has arrived is kept") from None
