"""Which rank owns which block of rows, and the files of rows that ranks leave."""

# N table rows, D width, W ranks, u rows of this rank's step, n rows this rank owns that some rank
# requests

from __future__ import annotations

import glob
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 64
"""Rows that stay together; block b is on rank b % world_size, so a row's place is a function of the
row alone."""
_COPIED_BLOCKS = 1024  # on another device a copy of spread blocks is gathered first


def copy_blocks(source: Tensor, target: Tensor, spread: slice, wanted: slice) -> None:
    """Copy the blocks `spread` of `source` [rows, ...] to the blocks `wanted` of `target`; only a
    table's last block is short."""
    whole_source, whole_target = len(source) // BLOCK * BLOCK, len(target) // BLOCK * BLOCK
    blocks_source = source[:whole_source].unflatten(0, (-1, BLOCK))[spread]
    blocks_target = target[:whole_target].unflatten(0, (-1, BLOCK))[wanted]
    assert len(blocks_source) == len(blocks_target)
    for start in range(0, len(blocks_target), _COPIED_BLOCKS):
        part = slice(start, start + _COPIED_BLOCKS)
        blocks_target[part].copy_(blocks_source[part])
    if whole_source < len(source) and whole_target < len(target):
        target[whole_target:].copy_(source[whole_source:])


def local_rows(num_rows: int, rank: int, world_size: int) -> int:
    """How many of the rows a rank owns."""
    whole = num_rows // BLOCK
    mine = (whole - rank + world_size - 1) // world_size * BLOCK
    return mine + (num_rows % BLOCK if whole % world_size == rank else 0)


def global_rows(start: int, count: int, rank: int, world_size: int) -> Tensor:
    """int64 [count], the table rows of a rank's local rows start, start + 1, ..."""
    local = torch.arange(start, start + count)
    return (local // BLOCK * world_size + rank) * BLOCK + local % BLOCK


def file_name(name: str, rank: int, world_size: int) -> str:
    return f"{name}-{rank:05d}-of-{world_size:05d}.safetensors"


def saved_ranks(folder: Path, name: str) -> int:
    """How many ranks saved the table in this folder. Raises ValueError unless each left its file
    and no other is there."""
    pattern = f"{glob.escape(name)}-?????-of-?????.safetensors"
    found = sorted(path.name for path in folder.glob(pattern))
    if not found:
        example = f"{file_name(name, 0, 1)} or the like"
        raise ValueError(f"{folder}: holds no {example}; give a checkpoint with this table")
    saved = int(found[0].removesuffix(".safetensors")[-5:])
    expected = [file_name(name, rank, saved) for rank in range(saved)]
    if missing := sorted(set(expected) - set(found)):
        complaint = f"missing; {saved} files make this table, copy them all"
        raise ValueError(f"{folder / missing[0]}: {complaint}")
    if foreign := sorted(set(found) - set(expected)):
        complaint = f"beside {found[0]}: files of two savings, remove the older ones"
        raise ValueError(f"{folder / foreign[0]}: {complaint}")
    return saved
