"""The largest factors of a sparse matrix: numpy's, and the same bits at any number of threads."""

import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
from genrec_shards.numbering.truncated_eigen import factor_rows, symmetric_eigen


@pytest.mark.parametrize("size", [1, 2, 5, 30])
def test_eigenvalues_and_vectors_are_those_of_numpy(size):
    rng = np.random.default_rng(size)
    half = rng.normal(size=(size, size))
    matrix = half + half.T
    values, vectors = symmetric_eigen(matrix)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[::-1], atol=1e-12)
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, matrix, atol=1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(size), atol=1e-12)


def decaying(rows: int, columns: int) -> np.ndarray:
    """A matrix whose singular values fall from 30 to nothing, half of them each."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for size in (rows, columns))
    rank = min(rows, columns)
    return left[:, :rank] @ np.diag(30 * 0.5 ** np.arange(rank)) @ right[:, :rank].T


@pytest.mark.parametrize(
    ("rows", "columns", "dims"), [(60, 40, 8), (40, 60, 8), (12, 5, 64), (3, 3, 64), (1, 9, 4)]
)
def test_factor_rows_are_those_of_the_singular_value_decomposition(rows, columns, dims):
    matrix = decaying(rows, columns)
    found = factor_rows(sp.csr_matrix(matrix), dims, seed=3)
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    kept = min(dims, rows, columns)
    expected = left[:, :kept] * np.sqrt(values[:kept])
    assert found.shape == (rows, kept)
    # Signs of factors are anybody's; what the rows have in common is not.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-6)


def test_matrix_of_lower_rank_and_one_of_zeros_have_factors():
    one = np.outer(np.arange(1, 7), np.ones(5))
    found = factor_rows(sp.csr_matrix(one), 4, seed=0)
    expected = np.outer(np.arange(1, 7), np.arange(1, 7)) * (5 / np.sqrt(91 * 5))
    np.testing.assert_allclose(found @ found.T, expected)
    assert not factor_rows(sp.csr_matrix((6, 5)), 4, seed=0).any()


PROGRAM = """
import hashlib
import numpy as np, scipy.sparse as sp
from genrec_shards.numbering.truncated_eigen import factor_rows
rng = np.random.default_rng(0)
matrix = sp.random(3000, 2500, 0.004, format="csr", rng=rng, dtype=np.float64)
print(hashlib.sha256(factor_rows(matrix, 64, 0).tobytes()).hexdigest())
"""


def test_bits_do_not_depend_on_threads():
    digests = set()
    for threads in ("1", "2", "5"):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        own = dict.fromkeys(names, threads) | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, env=os.environ | own, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
