"""Item vectors that a model has learned: a safetensors file, bound to the sequences it was trained
on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from genrec_shards.errors import DataError
from genrec_shards.sequences import Sequences
from genrec_shards.splits import TrainedThrough, num_held_out

FLOATS = ("F16", "F32", "F64")


@dataclass(frozen=True, eq=False)
class TrainedVectors:
    """A vector for each item row, and which training it comes from."""

    values: np.ndarray
    """float64[N, D]"""
    name: str
    """File name without its folder."""
    sha256: str
    trained_through: TrainedThrough


def read_trained_vectors(
    path: str | Path, sequences: Sequences, trained_through: TrainedThrough = "n-2"
) -> TrainedVectors:
    """Read a safetensors file of one tensor [items, D] by item row, floats, with its origin in the
    metadata.

    Metadata: `sequences_hash`, that of these sequences, and `trained_through`, which must be the
    one asked for: vectors trained through n-1 have seen the validation targets, and codes made of
    them tell them. Raises DataError, one line with the file, for any other file."""
    num_held_out(trained_through)
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            _check_origin(path, metadata, sequences, trained_through)
            if len(names) != 1:
                raise DataError(
                    f"{path}: {len(names)} tensors, expected one, [items, width]: save the item vectors alone"
                )
            part = file.get_slice(names[0])
            _check_shape(path, part.get_shape(), part.get_dtype(), sequences.num_items)
            values = file.get_tensor(names[0]).astype(np.float64)
        with path.open("rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check the path") from None
    except SafetensorError as error:
        raise DataError(
            f"{path}: not a safetensors file ({error}): save the item vectors again"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}): check the path and its rights"
        ) from None
    unfit = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if unfit.size:
        raise DataError(f"{path}: the vector of item row {unfit[0]} is not finite: train again")
    return TrainedVectors(values, path.name, digest, trained_through)


def _check_origin(
    path: Path, metadata: dict[str, str], sequences: Sequences, trained_through: TrainedThrough
) -> None:
    for key in ("sequences_hash", "trained_through"):
        if key not in metadata:
            raise DataError(
                f"{path}: no {key} in its metadata, so nobody knows what it has seen: save it with that"
            )
    ours = sequences.sequences_hash()
    if metadata["sequences_hash"] != ours:
        raise DataError(
            f"{path}: trained on other sequences ({metadata['sequences_hash'][:12]}, these are {ours[:12]}): "
            "give vectors trained on this data"
        )
    found = metadata["trained_through"]
    if found != trained_through:
        way_out = (
            "they have seen the validation targets; where the model is to be refitted through n-1 as well, "
            "say --vectors-trained-through n-1"
            if found == "n-1"
            else f"say --vectors-trained-through {found}"
            if found == "n-2"
            else "train them again"
        )
        raise DataError(
            f"{path}: trained through {found[:20]}, asked for {trained_through}: {way_out}"
        )


def _check_shape(path: Path, shape: list[int], dtype: str, num_items: int) -> None:
    if len(shape) != 2 or shape[0] != num_items or shape[1] == 0:
        raise DataError(
            f"{path}: shape {shape}, expected [{num_items}, width], a row an item: save it by item row"
        )
    if dtype not in FLOATS:
        raise DataError(
            f"{path}: type {dtype}, expected one of {', '.join(FLOATS)}: save it as float32"
        )
