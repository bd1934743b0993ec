"""Vectors of the items' texts, from one of several sources, kept in the data directory."""

# N items, D dims

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
from genrec_shards.atomic import atomic_file
from genrec_shards.dataset import Dataset
from genrec_shards.errors import DataError
from genrec_shards.numbering.item_text import Descriptions, text_vectors
from genrec_shards.readers.documents import read_object
from genrec_shards.storage.manifest import file_sha256
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FOLDER = "text"
"""Of the data directory; everything in it can be made again."""
FACTORS = 128
"""Dims of source `factors`."""
WORDLLAMA = 256
"""Dims of the vectors that this package loads unless told otherwise."""
SOURCES = "words, factors, wordllama or the directory of a sentence-transformers model"
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of a data directory that may be read alone: what would be kept in it is made each time."""
_SEED = 0


def described(dataset: Dataset) -> Descriptions:
    """The items' texts. Raises ValueError where `prepare` was given none."""
    if dataset.descriptions is None:
        raise ValueError(
            f"{dataset.path}: its items have no texts: prepare it again with --items META"
        )
    return dataset.descriptions


def item_vectors(dataset: Dataset, source: str) -> np.ndarray:
    """float32 [N, D] by item row, of length 1 or, without a text, 0.

    They are a function of catalogue and source alone: no interaction and no popularity enters. The
    first call leaves them in `text/` of the data directory, named by the hash of texts and source;
    where that may not be written to, nothing is kept.

    Args:
        dataset: Whose items have texts.
        source: `factors`: TF-IDF of the words, cut to its largest factors. `wordllama`: the mean of
            that package's static token vectors. Else the directory of a sentence-transformers
            model with weights in safetensors.

    Raises:
        ValueError: There are no texts, the source's package is missing, or the directory is no
            such model.
    """
    texts = described(dataset)
    key = {"texts": texts.texts_hash, "source": source_identity(source), "version": 1}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = dataset.path / FOLDER / f"{name[:32]}.safetensors"
    if path.is_file():
        return _load(path, len(texts.texts))
    vectors_ND = np.zeros((len(texts.texts), 0), np.float32)
    rows = np.flatnonzero([bool(text) for text in texts.texts])
    if source == "factors":
        vectors_ND = text_vectors(texts.texts, FACTORS, _SEED).astype(np.float32)
    else:
        found_RD = _encode([texts.texts[row] for row in rows], source)
        vectors_ND = np.zeros((len(texts.texts), found_RD.shape[1]), np.float32)
        # What all texts share distinguishes none, and makes all of them look alike.
        vectors_ND[rows] = found_RD - found_RD.mean(0)
    lengths_N = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    vectors_ND /= np.where(lengths_N > 0, lengths_N, 1)
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as temporary:
            save_file(
                {"vectors": vectors_ND}, temporary, {key: str(value) for key, value in key.items()}
            )
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
    return vectors_ND


def vector_width(source: str, num_items: int) -> int:
    """Dims of the vectors, without making them; of factors, where there are as many words, at most.

    Raises:
        ValueError: For a directory that does not say it.
    """
    if source == "factors":
        return min(FACTORS, num_items)
    if source == "wordllama":
        return WORDLLAMA
    path = Path(source) / "1_Pooling" / "config.json"
    found = read_object(path).get("word_embedding_dimension") if path.is_file() else None
    if not isinstance(found, int):
        raise ValueError(f"text source {source!r}: {path} does not say how wide its vectors are")
    return found


def check_source(source: str) -> None:
    """Raises ValueError for a source that is none, or whose package is missing: before a training
    that will end with it."""
    if source in ("none", "words", "factors"):
        return
    source_identity(source)
    _package("wordllama" if source == "wordllama" else "sentence_transformers")


def source_identity(source: str) -> str:
    """What the vectors depend on beside the texts."""
    if source == "factors":
        return f"factors {FACTORS}"
    if source == "wordllama":
        _package(source)
        return f"wordllama {version('wordllama')}"
    folder = Path(source)
    if not (folder / "modules.json").is_file():
        raise ValueError(f"text source {source!r}: choose {SOURCES}, which holds modules.json")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    foreign = [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    if foreign:
        raise ValueError(
            f"{foreign[0]}: weights are read from safetensors alone: save the model with "
            "safe_serialization and remove this file"
        )
    hashes = [f"{file_sha256(path)}  {path.relative_to(folder)}" for path in files]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _encode(texts: Sequence[str], source: str) -> np.ndarray:
    """float32 [R, D] of the texts, none of which is empty. Nothing is downloaded."""
    if source == "wordllama":
        package = _package("wordllama")
        # Its own lookup misses the folder in which it ships its tokenizer.
        folder = Path(package.__file__ or "").parent
        model = package.WordLlama.load(cache_dir=folder, disable_download=True)
        found: np.ndarray = np.asarray(model.embed(list(texts), norm=True), np.float32)
        return found
    transformer = _package("sentence_transformers").SentenceTransformer(
        source,
        device="cpu",
        local_files_only=True,
        trust_remote_code=False,
        model_kwargs={"use_safetensors": True},
    )
    vectors = transformer.encode(
        list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
    )
    return np.asarray(vectors, np.float32)


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"text source: the package {name} cannot be imported ({error}): "
            "install genrec-dist[text]"
        ) from None


def _load(path: Path, num_items: int) -> np.ndarray:
    try:
        with safe_open(path, framework="numpy") as file:
            vectors_ND: np.ndarray = file.get_tensor("vectors")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged ({error}): remove it, it is made again") from None
    if len(vectors_ND) != num_items:
        raise DataError(f"{path}: {len(vectors_ND)} rows for {num_items} items: remove it")
    return vectors_ND
