"""What ranks tell each other besides gradients: numbers, lists and errors, through host memory, so
that no device waits."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_LONGEST_TEXT = 2000
_WELL = -1
_PATIENCE = timedelta(days=1)


def join() -> None:
    """Meet the other ranks of a launched command that only decodes: gloo alone, also on GPUs.

    A rank that has gone is known by its closed connection at once, so patience costs nothing; and
    rank 0 may take long over its last table while the others wait."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_PATIENCE)


def leave() -> None:
    """Part from the other ranks after all have come to the end."""
    Ranks().barrier()
    dist.destroy_process_group()


_GONE = " has gone ("


class RankGone(ValueError):
    """Another rank is no longer there. What this one was given is not to blame: another attempt may
    end well."""


class Ranks:
    """This process among the ranks of a run; alone, every exchange is with itself.

    All that is exchanged goes to rank 0 and back: a rank that has gone is then known by name to
    every other, and the few bytes take two hops where a ring takes as many as there are ranks."""

    def __init__(self) -> None:
        """Collective: all ranks make theirs together, after the process group is there."""
        launched = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if launched else 0
        self.size = dist.get_world_size() if launched else 1
        # NCCL would move these few bytes over the GPU and wait for its queue.
        self.group = (
            dist.new_group(backend="gloo")
            if self.size > 1 and dist.get_backend() != "gloo"
            else None
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchange(self, values: list[int]) -> list[list[int]]:
        """These int64 values of every rank, by rank; each rank gives equally many."""
        return [
            theirs.tolist()
            for theirs in self._meet(torch.tensor(values, dtype=torch.int64), None, share=True)
        ]

    def gather(self, mine: Tensor, error: Exception | None = None) -> list[Tensor]:
        """A tensor of every rank, all of one shape and type and in host memory: by rank on rank 0,
        nothing on the others.

        A rank that has none gives its `error` and any tensor of that shape; then all raise, as
        `raise_if_any_failed` does."""
        return self._meet(mine, error, share=False)

    def barrier(self) -> None:
        self.raise_if_any_failed(None)

    def broadcast_str(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        return self.all_gather_str(text)[0]

    def all_gather_str(self, text: str) -> list[str]:
        """A text of every rank, cut at 2,000 bytes."""
        return [_text(theirs) for theirs in self._meet(_bytes(text), None, share=True)]

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Do a rank's own part of something, which may raise; if one rank's part did, all raise."""
        error: Exception | None = None
        try:
            result = action()
        except Exception as raised:
            error = raised
        self.raise_if_any_failed(error)
        return result

    def raise_if_any_failed(self, error: Exception | None) -> None:
        """Raise on all ranks if one has an error or has gone: nobody goes on to a collective that
        another will never reach.

        Raises the rank's own error where there is one, elsewhere a ValueError that names the rank,
        or RankGone if that has gone."""
        self._meet(torch.empty(0), error, share=False)

    def _meet(self, mine: Tensor, error: Exception | None, share: bool) -> list[Tensor]:
        """What every rank gave, by rank; where it is not shared, on rank 0 alone."""
        everyone, failure = [mine], ""
        if self.size > 1:
            everyone, failure = (self._hear_all if self.is_main else self._ask_main)(
                mine, error, share
            )
        if error is not None:
            raise error
        if failure:
            raise (RankGone if _GONE in failure.split(": ")[0] else ValueError)(failure)
        return everyone

    def _hear_all(
        self, mine: Tensor, error: Exception | None, share: bool
    ) -> tuple[list[Tensor], str]:
        """Rank 0's part: what all gave, and what is wrong with the first rank that failed, or
        ""."""
        others = range(1, self.size)
        frames = [_frame(_WELL, mine)] + [_frame(_WELL, torch.empty_like(mine)) for _ in others]
        wrong = {} if error is None else {0: f"rank 0: {error}"}
        coming = [self._post(dist.irecv, frames[rank], rank) for rank in others]
        for rank, work in zip(others, coming, strict=True):
            lost, text = _lost(work), _bytes("")
            if not lost and _mark(frames[rank]) != _WELL:
                lost = _lost(self._post(dist.irecv, text, rank))
                wrong[rank] = f"rank {rank}: {_text(text)}"
            if lost:
                wrong[rank] = _gone(rank, lost)
        first = min(wrong, default=_WELL)
        everyone = [_content(frame).view(mine.dtype).view(mine.shape) for frame in frames]
        notes = [_frame(first, torch.stack(everyone) if share else torch.empty(0))]
        if wrong:
            notes.append(_bytes(wrong[first]))
        # Whoever is not there to hear it is named at the next meeting at the latest.
        for work in [self._post(dist.isend, note, rank) for rank in others for note in notes]:
            _lost(work)
        return everyone, wrong.get(first, "")

    def _ask_main(
        self, mine: Tensor, error: Exception | None, share: bool
    ) -> tuple[list[Tensor], str]:
        """Another rank's part: tell rank 0, and hear what it knows of all."""
        notes = (
            [_frame(_WELL, mine)]
            if error is None
            else [_frame(self.rank, mine), _bytes(f"{error}")]
        )
        shared = mine.new_empty(self.size, *mine.shape) if share else mine.new_empty(0)
        answer, failure = _frame(_WELL, shared), _bytes("")
        # Gloo sends at once to whoever waits already, and asks first otherwise: that would be two
        # more hops.
        coming = self._post(dist.irecv, answer, 0)
        lost = next(
            filter(None, (_lost(self._post(dist.isend, note, 0)) for note in notes)), ""
        ) or _lost(coming)
        if not lost and _mark(answer) != _WELL:
            lost = _lost(self._post(dist.irecv, failure, 0))
        return list(_content(answer).view(shared.dtype).view(shared.shape)), _gone(
            0, lost
        ) if lost else _text(failure)

    def _post(self, transfer: Callable[..., Any], frame: Tensor, rank: int) -> Any:
        """A transfer under way, or the error of one that cannot begin."""
        try:
            return transfer(frame, rank, group=self.group)
        except RuntimeError as error:
            return error


def _lost(work: Any) -> str:
    """Wait for a transfer; why it did not take place, or ""."""
    try:
        if isinstance(work, RuntimeError):
            raise work
        work.wait()
    except RuntimeError as error:
        return (
            str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        )  # not gloo's source file, nor its advice
    return ""


def _gone(rank: int, reason: str) -> str:
    return f"rank {rank}{_GONE}{reason}): its own message says why, unless it was killed"


def _frame(mark: int, content: Tensor) -> Tensor:
    """uint8: a mark (the rank that failed, or _WELL), then the content's bytes."""
    return torch.cat(
        [torch.tensor([mark]).view(torch.uint8), content.contiguous().flatten().view(torch.uint8)]
    )


def _mark(frame: Tensor) -> int:
    return int(frame[:8].view(torch.int64))


def _content(frame: Tensor) -> Tensor:
    return frame[8:]


def _bytes(text: str) -> Tensor:
    data = text.encode()[:_LONGEST_TEXT].ljust(_LONGEST_TEXT, b"\0")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _text(frame: Tensor) -> str:
    return bytes(frame.tolist()).rstrip(b"\0").decode(errors="replace")
