"""Random numbers that are a function of a key: the same on every machine, in every order, in every
version of numpy."""

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def mixed_key(*parts: int) -> int:
    """One 64-bit key out of whole numbers; their order matters."""
    key = 0x243F6A8885A308D3
    for part in parts:
        key = _mix_one((key + _GOLDEN) ^ _mix_one(part & _MASK))
    return key


def keyed_bits(key: int, counters: np.ndarray) -> np.ndarray:
    """uint64, shaped as `counters` (whole numbers): 64 random bits for each counter under this
    key."""
    counters = np.asarray(counters).astype(np.uint64)
    first = _mix(counters * np.uint64(_GOLDEN) + np.uint64(key))
    return _mix(first ^ np.uint64(_mix_one(key ^ _GOLDEN)))


def keyed_uniform(seed: int, epoch: int, sample_ids: np.ndarray, draw: int) -> np.ndarray:
    """float64[B] in [0, 1): draw number `draw` of each sample, a function of its own four keys and
    of nothing else."""
    bits = keyed_bits(mixed_key(seed, epoch, draw), sample_ids)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(size: int, *key: int) -> np.ndarray:
    """int64[size], a permutation of 0..size-1 under a key of whole numbers (size below 2^31).

    Sorts words whose high bits are random and whose low bits are the index: all words differ, so
    the order does not depend on the sorting algorithm, and a sort of plain words is several times
    faster than an argsort."""
    # Size 3, so 2 index bits, with random bits of 4 digits for the example:
    #     index           00      01      10
    #     random bits   0110    0001    0100
    #     words       011000  000101  010010     the random bits shifted, and the index in the gap
    #     sorted      000101  010010  011000
    #     low bits        01      10      00     the permutation 1 2 0
    assert 0 <= size < 1 << 31
    index_bits = np.uint64(max(size - 1, 1).bit_length())
    index = np.arange(size, dtype=np.uint64)
    words = (keyed_bits(mixed_key(*key), index) << index_bits) | index
    words.sort()
    return (words & ((np.uint64(1) << index_bits) - np.uint64(1))).astype(np.int64)


def _mix_one(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))
