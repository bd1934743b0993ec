"""`manifest.json` of a saved model: the sha256 of its files, so that a damaged copy is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from genrec_shards.readers.documents import read_object
from genrec_shards.storage.manifest import file_sha256

from genrec_dist.config.model_config import REMEDY, ModelFileError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


def write_model_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write the hashes of these files of a directory that still has its temporary name."""
    hashes = {name: file_sha256(folder / name) for name in sorted(names)}
    fields = {"format_version": FORMAT_VERSION, "sha256": hashes}
    (folder / MANIFEST).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def start_check(folder: Path) -> Future[None]:
    """`check_model_manifest` on a thread: hashing leaves Python's lock to others, so where there is
    a second core it takes no time beside the import of torch and the loading of the weights."""
    pool = ThreadPoolExecutor(1)
    check = pool.submit(check_model_manifest, folder)
    pool.shutdown(wait=False)
    return check


def check_model_manifest(folder: Path) -> None:
    """Compare the files of a saved model with its manifest. A model without one, of an earlier
    version, passes. Raises ModelFileError naming the first file that is missing or is not the one
    that was written."""
    path = folder / MANIFEST
    try:
        fields = read_object(path)
        version, hashes = fields["format_version"], dict(fields["sha256"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelFileError(f"{path}: not readable ({error}): {REMEDY}") from None
    if version != FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: format {version!r}, this version reads {FORMAT_VERSION}: update genrec-dist"
        )
    for name, expected in hashes.items():
        file = folder / Path(name).name
        if not file.is_file():
            raise ModelFileError(f"{file}: no such file, and {MANIFEST} names it: {REMEDY}")
        if file_sha256(file) != expected:
            raise ModelFileError(
                f"{file}: damaged or changed (its sha256 is not that of {MANIFEST}): {REMEDY}"
            )
