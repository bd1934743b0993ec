"""The largest factors of a sparse matrix, with the same bits at any number of threads."""

# N rows, F columns, D dims kept, B columns of the iterated block

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from genrec_shards.keyed_random import keyed_bits, mixed_key

if TYPE_CHECKING:
    import scipy.sparse as sp

_START_STREAM = 11
_SPARE = 16
"""Columns iterated beyond those kept, for accuracy of the last ones."""
_ITERATIONS = 8
_SWEEPS = 40


def factor_rows(matrix_NF: sp.csr_matrix, dims: int, seed: int) -> np.ndarray:
    """float64[N, D], D = min(dims, N, F): row i is U_i sqrt(S) of the truncated singular value
    decomposition U S V'.

    Orthogonal iteration of a random block (Halko, Martinsson and Tropp, 2011) from signs keyed by
    the seed. No BLAS: it splits sums by the number of threads, and one bit more or less can move an
    item to another cluster."""
    transposed_FN = matrix_NF.T.tocsr()
    num_rows, dims = matrix_NF.shape[0], min(dims, *matrix_NF.shape)
    width = min(dims + _SPARE, *matrix_NF.shape)
    bits = keyed_bits(mixed_key(seed, _START_STREAM), np.arange(num_rows * width))
    signs = (bits >> np.uint64(63)).astype(np.float64) * 2 - 1
    block_NB = signs.reshape(num_rows, width)
    for _ in range(_ITERATIONS):
        block_NB = _orthonormal(matrix_NF @ (transposed_FN @ block_NB))
    seen_FB = transposed_FN @ block_NB
    squares, turn_BB = symmetric_eigen(_product(np.ascontiguousarray(seen_FB.T), seen_FB))
    left_ND = _product(block_NB, np.ascontiguousarray(turn_BB[:, :dims]))
    return left_ND * np.maximum(squares[:dims], 0) ** 0.25


def symmetric_eigen(matrix_BB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values float64[B] from the largest down, vectors float64[B, B] by column) of a symmetric
    matrix.

    Jacobi's rotations, disjoint pairs of a round at once: elementwise arithmetic only.
    """
    left = matrix_BB.astype(np.float64)
    vectors = np.eye(len(left))
    limit = 1e-30 * float((left * left).sum())
    rounds = _rounds(len(left))
    for _ in range(_SWEEPS):
        beside = left - np.diag(np.diag(left))
        if float((beside * beside).sum()) <= limit:
            break
        for one, other in rounds:
            # Cosine and sine of the rotations that bring `between` to zero.
            between = left[one, other]
            apart = left[other, other] - left[one, one]
            longer = np.abs(apart) + np.sqrt(apart * apart + 4 * between * between)
            signed = np.where(apart < 0, -2.0, 2.0) * between
            tangent = np.divide(signed, longer, out=np.zeros_like(between), where=longer > 0)
            cosine = 1 / np.sqrt(1 + tangent * tangent)
            sine = tangent * cosine
            for array in (left.T, left, vectors):
                first, second = array[:, one], array[:, other]
                array[:, one] = cosine * first - sine * second
                array[:, other] = sine * first + cosine * second
    order = np.argsort(-np.diag(left), kind="stable")
    return np.diag(left)[order], vectors[:, order]


def _orthonormal(block_NB: np.ndarray) -> np.ndarray:
    """Modified Gram-Schmidt; a column in the span of those before it becomes zero."""
    columns_BN = np.ascontiguousarray(block_NB.T)
    smallest = 1e-12 * np.sqrt((columns_BN * columns_BN).sum(axis=1).max(initial=0))
    for index, column_N in enumerate(columns_BN):
        length = np.sqrt((column_N * column_N).sum())
        column_N *= 1 / length if length > smallest else 0
        rest_BN = columns_BN[index + 1 :]
        rest_BN -= (rest_BN * column_N).sum(axis=1)[:, None] * column_N
    return np.ascontiguousarray(columns_BN.T)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left @ right as scipy multiplies sparse matrices: in one fixed order, without BLAS."""
    import scipy.sparse as sp

    return sp.csr_matrix(left) @ right


def _rounds(size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every pair of 0..size-1 once, in rounds of disjoint pairs, as in a round-robin tournament.

    For 4: (0, 3) and (1, 2), then (0, 2) and (1, 3), then (0, 1) and (2, 3)."""
    even = size + size % 2
    circle = np.arange(1, even)
    rounds = []
    for turn in range(even - 1):
        players = np.concatenate([[0], np.roll(circle, turn)])
        one, other = players[: even // 2], players[::-1][: even // 2]
        real = (one < size) & (other < size)
        rounds.append((np.minimum(one, other)[real], np.maximum(one, other)[real]))
    return rounds
