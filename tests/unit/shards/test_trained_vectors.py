"""Trained item vectors: read as they were saved, and refused where they are another data's or have
seen too much."""

import hashlib

import numpy as np
import pytest
from damage import damaged
from genrec_shards.errors import DataError
from genrec_shards.numbering.item_vectors import read_trained_vectors
from genrec_shards.sequences import sequences_from_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

LOG = sequences_from_ids(["a", "b"], [4, 3], ["5", "3", "9", "1", "3", "7", "9"])
ORIGIN = {"sequences_hash": LOG.sequences_hash(), "trained_through": "n-2"}
VALUES = np.arange(10, dtype=np.float32).reshape(5, 2)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_vectors_come_back_by_item_row(tmp_path, kind):
    path = tmp_path / "items.safetensors"
    save_file({"item_embedding": VALUES.astype(kind)}, path, metadata=ORIGIN)
    found = read_trained_vectors(path, LOG)
    assert found.values.dtype == np.float64
    assert np.array_equal(found.values, VALUES)
    assert (found.name, found.trained_through) == ("items.safetensors", "n-2")
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_vectors_trained_through_n_1_must_be_requested(tmp_path):
    path = tmp_path / "items.safetensors"
    save_file({"items": VALUES}, path, metadata=ORIGIN | {"trained_through": "n-1"})
    message = r"have seen the validation targets.*--vectors-trained-through n-1"
    with pytest.raises(DataError, match=message):
        read_trained_vectors(path, LOG)
    assert read_trained_vectors(path, LOG, "n-1").trained_through == "n-1"
    save_file({"items": VALUES}, path, metadata=ORIGIN)
    message = "trained through n-2, requested n-1: say --vectors-trained-through n-2"
    with pytest.raises(DataError, match=message):
        read_trained_vectors(path, LOG, "n-1")


HASH = {"sequences_hash": ORIGIN["sequences_hash"]}
OTHER_HASH, OTHER_TRAINING = {"sequences_hash": "f" * 64}, {"trained_through": "n"}
UNKNOWN = "trained through n, requested n-2: train them again"
NOT_FINITE = np.where(VALUES == 6, np.nan, VALUES)


@pytest.mark.parametrize(
    ("tensors", "origin", "message"),
    [
        ({"items": VALUES}, {}, "no sequences_hash in its metadata"),
        ({"items": VALUES}, HASH, "no trained_through in its metadata"),
        ({"items": VALUES}, ORIGIN | OTHER_HASH, "trained on other sequences .ffffffffffff"),
        ({"items": VALUES}, ORIGIN | OTHER_TRAINING, UNKNOWN),
        ({"items": VALUES[:4]}, ORIGIN, r"shape \[4, 2\], expected \[5, width\]"),
        ({"items": VALUES[:, 0].copy()}, ORIGIN, r"shape \[5\], expected"),
        ({"items": VALUES.astype(np.int32)}, ORIGIN, "type I32, expected one of F16"),
        ({"items": VALUES, "users": VALUES}, ORIGIN, "2 tensors, expected one"),
        ({"items": NOT_FINITE}, ORIGIN, "item row 3 is not finite"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path, tensors, origin, message):
    path = tmp_path / "items.safetensors"
    save_file(tensors, path, metadata=origin)
    with pytest.raises(DataError, match=message) as caught:
        read_trained_vectors(path, LOG)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "folder", b"", b"\x80\x04pickle", b"\xff" * 64])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "items.safetensors"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)) as caught:
        read_trained_vectors(path, LOG)
    assert "\n" not in str(caught.value)


@given(st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_file_is_read_or_reported_in_one_line(tmp_path, data):
    path = tmp_path / "items.safetensors"
    save_file({"items": VALUES}, path, metadata=ORIGIN)
    damaged(path.read_bytes(), path, data)
    try:
        found, message = read_trained_vectors(path, LOG).values, f"{path}: "
    except DataError as error:
        found, message = VALUES, str(error)
    assert found.shape == (5, 2)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
