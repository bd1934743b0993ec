"""What ranks tell each other besides gradients: whole numbers and errors, through host memory, so that no device waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_LONGEST_TEXT = 2000


class Ranks:
    """This process among the ranks of a run; alone, every exchange is with itself."""

    def __init__(self) -> None:
        """Collective: all ranks make theirs together, after the process group is there."""
        launched = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if launched else 0
        self.size = dist.get_world_size() if launched else 1
        # NCCL would move these few bytes over the GPU and wait for its queue.
        self.group = dist.new_group(backend="gloo") if self.size > 1 and dist.get_backend() != "gloo" else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchange(self, values: list[int]) -> list[list[int]]:
        """These int64 values of every rank, by rank."""
        if self.size == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        return [theirs.tolist() for theirs in everyone]

    def barrier(self) -> None:
        self.exchange([0])

    def text_of_main(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        return self.texts(text)[0]

    def texts(self, text: str) -> list[str]:
        """A text of every rank, cut at 2,000 bytes."""
        data = text.encode()[:_LONGEST_TEXT].ljust(_LONGEST_TEXT, b"\0")
        return [
            bytes(theirs).rstrip(b"\0").decode(errors="replace")
            for theirs in ([list(data)] if self.size == 1 else self.exchange(list(data)))
        ]

    def together(self, action: Callable[[], T]) -> T:
        """Do a rank's own part of something, which may raise; if one rank's part did, all raise."""
        error: Exception | None = None
        try:
            result = action()
        except Exception as raised:
            error = raised
        self.all_well(error)
        return result

    def all_well(self, error: Exception | None) -> None:
        """Raise on all ranks if one has an error: nobody goes on to a collective that another will never reach.

        Raises the rank's own error where there is one, a ValueError that names the rank elsewhere.
        """
        failed = [rank for rank, (bad,) in enumerate(self.exchange([int(error is not None)])) if bad]
        if not failed:
            return
        texts = self.texts("" if error is None else f"{error}")
        if error is not None:
            raise error
        raise ValueError(f"rank {failed[0]}: {texts[failed[0]]}")
