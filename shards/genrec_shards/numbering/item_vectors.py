"""Item vectors that a model has learned: a safetensors file, bound to the sequences it was trained
on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from genrec_shards.errors import DataError
from genrec_shards.sequences import Sequences
from genrec_shards.splits import TrainedThrough, num_held_out
from genrec_shards.storage.manifest import file_sha256

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
    """Read item vectors that a model has learned.

    Args:
        path: a safetensors file of one tensor [items, D] by item row, floats. Its metadata holds
            `sequences_hash`, that of these sequences, and `trained_through`.
        sequences: the log.
        trained_through: what the metadata must say: vectors trained through n-1 have seen the
            validation targets, and codes made of them tell them.

    Raises:
        DataError: one line with the file, for any other file.
    """
    num_held_out(trained_through)
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            complaint = _wrong_origin(metadata, sequences, trained_through)
            if complaint is None and len(names) != 1:
                expected = "expected one, [items, width]: save the item vectors alone"
                complaint = f"{len(names)} tensors, {expected}"
            if complaint is None:
                part = file.get_slice(names[0])
                shape, dtype = part.get_shape(), part.get_dtype()
                if len(shape) != 2 or shape[0] != sequences.num_items or shape[1] == 0:
                    expected = f"expected [{sequences.num_items}, width]"
                    complaint = f"shape {shape}, {expected}, a row per item: save it by item row"
                elif dtype not in FLOATS:
                    expected = f"expected one of {', '.join(FLOATS)}: save it as float32"
                    complaint = f"type {dtype}, {expected}"
            if complaint is not None:
                raise DataError(f"{path}: {complaint}")
            values = file.get_tensor(names[0]).astype(np.float64)
        digest = file_sha256(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: check the path") from None
    except SafetensorError as error:
        complaint = f"not a safetensors file ({error}): save the item vectors again"
        raise DataError(f"{path}: {complaint}") from None
    except OSError as error:
        complaint = f"cannot be read ({error.strerror or error}): check the path and its rights"
        raise DataError(f"{path}: {complaint}") from None
    unfit = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if unfit.size:
        raise DataError(f"{path}: the vector of item row {unfit[0]} is not finite: train again")
    return TrainedVectors(values, path.name, digest, trained_through)


def _wrong_origin(
    metadata: dict[str, str], sequences: Sequences, trained_through: TrainedThrough
) -> str | None:
    """What is wrong with a file's metadata, and the remedy; None where it fits."""
    for key in ("sequences_hash", "trained_through"):
        if key not in metadata:
            return f"no {key} in its metadata, so nobody knows what it has seen: save it with that"
    ours, theirs = sequences.sequences_hash(), metadata["sequences_hash"]
    if theirs != ours:
        hashes = f"({theirs[:12]}, these are {ours[:12]})"
        return f"trained on other sequences {hashes}: give vectors trained on this data"
    found = metadata["trained_through"]
    if found == trained_through:
        return None
    if found == "n-1":
        remedy = (
            "they have seen the validation targets; where the model is to be refitted through n-1 "
            "as well, say --vectors-trained-through n-1"
        )
    else:
        again = "train them again"
        remedy = f"say --vectors-trained-through {found}" if found == "n-2" else again
    return f"trained through {found[:20]}, requested {trained_through}: {remedy}"
