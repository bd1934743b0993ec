"""What ranks exchange besides gradients: numbers, texts and errors, through host memory, so that no
device waits."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from genrec_dist.distributed.signals import HAS_GONE, RankGone

T = TypeVar("T")

_TEXT_BYTES = 2000
_NO_RANK = -1
_TIMEOUT = timedelta(days=1)
_LOST = ("gloo/transport", "remote process exited")
"""What gloo's and NCCL's errors say where a connection is lost."""
_NO_ANSWER = "no answer"
_MAIN_SECONDS, _OTHER_SECONDS = 3.0, 7.0
"""How long rank 0 waits for the others, and they for it, to find out who has gone: one may compute
on, or wait in a collective for a rank that has left it."""


def join() -> None:
    """Start the process group of a launched command that only decodes: gloo, also on GPUs.

    A rank that has gone is noticed at once by its closed connection, so a long timeout costs
    nothing, and rank 0 may take long over its last table while the others wait."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_TIMEOUT)


def leave() -> None:
    """Destroy the process group after all ranks have come to their end."""
    Ranks().barrier()
    dist.destroy_process_group()


class Ranks:
    """This process among the ranks of a run; a process alone exchanges with itself.

    Everything is sent to rank 0 and back, not around a ring: all ranks then learn the name of a
    rank that has gone (torch's own collectives name a connection), and a few bytes take two hops,
    however many ranks there are. Nothing is pickled."""

    def __init__(self, own_group: bool = False) -> None:
        """Collective: all ranks make theirs together, once the process group is there.

        `own_group`: with connections of their own, for a thread that meets the threads of other
        ranks while the training goes on. In the training's own group its messages would be taken
        for theirs."""
        launched = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if launched else 0
        self.size = dist.get_world_size() if launched else 1
        # NCCL would move these few bytes over the GPU and wait for its queue.
        needs_gloo = self.size > 1 and (own_group or dist.get_backend() != "gloo")
        self.group = dist.new_group(backend="gloo") if needs_gloo else None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def exchange(self, values: list[int]) -> list[list[int]]:
        """The values of every rank, by rank: int64, equally many on each."""
        everyone = self._meet(torch.tensor(values, dtype=torch.int64), None, share=True)
        return [theirs.tolist() for theirs in everyone]

    def gather(self, mine: Tensor, error: Exception | None = None) -> list[Tensor]:
        """The tensors of every rank, by rank, on rank 0; on the others an empty list.

        Args:
            mine: in host memory, of one shape and type on all ranks.
            error: of a rank that has no tensor (it gives any of that shape).

        Raises:
            Exception: on all ranks if one has an error, as `raise_if_any_failed` does.
        """
        return self._meet(mine, error, share=False)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.raise_if_any_failed(None)

    def broadcast_str(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        return self.all_gather_str(text)[0]

    def all_gather_str(self, text: str) -> list[str]:
        """The texts of every rank, by rank, each cut at 2,000 bytes."""
        return [_text(theirs) for theirs in self._meet(_bytes(text), None, share=True)]

    def run_on_all(self, action: Callable[[], T]) -> T:
        """The result of this rank's action; if the action of any rank raised, all raise."""
        error: Exception | None = None
        try:
            result = action()
        except Exception as raised:
            error = raised
        self.raise_if_any_failed(error)
        return result

    def raise_if_any_failed(self, error: Exception | None) -> None:
        """Raise on all ranks if one has an error or has gone, so that no rank enters a collective
        that another will never reach.

        Raises:
            Exception: `error`, where it is not None.
            ValueError: elsewhere, naming the first rank that failed and its error.
            RankGone: if that rank has gone.
        """
        self._meet(torch.empty(0), error, share=False)

    @contextlib.contextmanager
    def naming_the_gone(self) -> Iterator[None]:
        """Context in which a collective of a library (DDP's or DeepSpeed's gradients) that a lost
        connection ends raises what a meeting raises: its own error names no rank. Raises RankGone
        naming the rank, or "another rank" where rank 0 does not answer."""
        try:
            yield
        except RuntimeError as error:
            # The store says so by the kind of its error.
            lost = isinstance(error, dist.DistNetworkError)
            if self.size == 1 or not (lost or any(words in str(error) for words in _LOST)):
                raise
            failure = self._who_has_gone(error)
            if not failure:
                raise
            raise RankGone(failure) from None

    def _who_has_gone(self, error: RuntimeError) -> str:
        """A sentence about the rank whose connection is lost; "" if all ranks are there.

        It is a meeting of the ranks that have lost a connection; a rank whose own connections are
        whole is in a collective or on its way to an ordinary meeting, where it learns the same.
        """
        if self.is_main:
            until = time.monotonic() + _MAIN_SECONDS
            # Room for the frame of any meeting: gloo takes a shorter message for a longer one.
            room = torch.empty(2**16, dtype=torch.uint8)
            _, failure = self._collect(room, None, share=False, until=until)
            return failure if HAS_GONE in failure else ""
        until, reason = time.monotonic() + _OTHER_SECONDS, _reason(error)
        _, failure = self._report(torch.empty(0), ValueError(reason), share=False, until=until)
        return failure if HAS_GONE in failure else _gone("another rank", reason)

    def _meet(self, mine: Tensor, error: Exception | None, share: bool) -> list[Tensor]:
        """The tensors of every rank, by rank; where they are not shared, on rank 0 alone.

        Each rank sends rank 0 a frame: 8 bytes with the number of the rank that failed (or -1),
        then the tensor's bytes; one that failed sends its error's text after it. Rank 0 answers
        with a frame of the same form that holds all tensors, and with the text of the first error.
        """
        everyone, failure = [mine], ""
        if self.size > 1:
            exchange = self._collect if self.is_main else self._report
            everyone, failure = exchange(mine, error, share)
        if error is not None:
            raise error
        if failure:
            raise (RankGone if HAS_GONE in failure.split(": ")[0] else ValueError)(failure)
        return everyone

    def _collect(
        self, mine: Tensor, error: Exception | None, share: bool, until: float | None = None
    ) -> tuple[list[Tensor], str]:
        """Rank 0's part of a meeting: all tensors, and the first failed rank's error or "". A rank
        that has not answered at the time `until` counts as one that has nothing to say."""
        others = range(1, self.size)
        frames = [
            _frame(_NO_RANK, mine if rank == 0 else torch.empty_like(mine))
            for rank in range(self.size)
        ]
        failures = {} if error is None else {0: f"rank 0: {error}"}
        receiving = [self._start(dist.irecv, frames[rank], rank) for rank in others]
        for rank, transfer in zip(others, receiving, strict=True):
            problem = _wait(transfer, until)
            if not problem and _mark(frames[rank]) != _NO_RANK:
                text = _bytes("")
                problem = _wait(self._start(dist.irecv, text, rank), until)
                failures[rank] = f"rank {rank}: {_text(text)}"
            if problem not in ("", _NO_ANSWER):
                failures[rank] = _gone(f"rank {rank}", problem)
        # One that has gone before those that have lost their connection to it.
        gone = [rank for rank in failures if HAS_GONE in failures[rank]]
        first = min(gone or failures, default=_NO_RANK)
        everyone = [frame[8:].view(mine.dtype).view(mine.shape) for frame in frames]
        answers = [_frame(first, torch.stack(everyone) if share else torch.empty(0))]
        if failures:
            answers.append(_bytes(failures[first]))
        sending = [self._start(dist.isend, data, rank) for rank in others for data in answers]
        for transfer in sending:
            _wait(transfer, until)  # a rank that has gone since is named at the next meeting
        return everyone, failures.get(first, "")

    def _report(
        self, mine: Tensor, error: Exception | None, share: bool, until: float | None = None
    ) -> tuple[list[Tensor], str]:
        """Another rank's part of a meeting: send to rank 0, and receive its answer, at the latest
        at the time `until`."""
        sent = [_frame(_NO_RANK if error is None else self.rank, mine)]
        if error is not None:
            sent.append(_bytes(str(error)))
        shared = mine.new_empty(self.size if share else 0, *mine.shape)
        answer, failure = _frame(_NO_RANK, shared), _bytes("")
        # Posted before sending: gloo sends at once to a rank that is already waiting, and otherwise
        # asks first, which would take two more hops.
        receiving = self._start(dist.irecv, answer, 0)
        problems = [_wait(self._start(dist.isend, data, 0), until) for data in sent]
        problem = next(filter(None, problems), "") or _wait(receiving, until)
        if not problem and _mark(answer) != _NO_RANK:
            problem = _wait(self._start(dist.irecv, failure, 0), until)
        everyone = list(answer[8:].view(shared.dtype).view(shared.shape))
        if problem:
            return everyone, "" if problem == _NO_ANSWER else _gone("rank 0", problem)
        return everyone, _text(failure)

    def _start(self, transfer: Callable[..., Any], data: Tensor, rank: int) -> Any:
        """A transfer under way, or the error of one that cannot begin."""
        try:
            return transfer(data, rank, group=self.group)
        except RuntimeError as error:
            return error


def _wait(transfer: Any, until: float | None = None) -> str:
    """Wait for a transfer; why it did not take place, or "".

    Args:
        transfer: of `Ranks._start`.
        until: time of `time.monotonic` at which it is given up.
    """
    if until is not None:
        # In a thread, since a time limit of gloo's own would close the connections to all ranks.
        found: list[str] = []
        waiting = threading.Thread(target=lambda: found.append(_wait(transfer)), daemon=True)
        waiting.start()
        waiting.join(max(0.1, until - time.monotonic()))
        return found[0] if found else _NO_ANSWER
    try:
        if isinstance(transfer, RuntimeError):
            raise transfer
        transfer.wait()
    except RuntimeError as error:
        return _reason(error)
    return ""


def _reason(error: RuntimeError) -> str:
    """A library's message without gloo's source file before the reason and its advice after it."""
    return str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]


def _gone(who: str, reason: str) -> str:
    return f"{who}{HAS_GONE}{reason}): its own message says why, unless it was killed"


def _frame(mark: int, content: Tensor) -> Tensor:
    head, data = torch.tensor([mark]), content.contiguous().flatten()
    return torch.cat([head.view(torch.uint8), data.view(torch.uint8)])


def _mark(frame: Tensor) -> int:
    return int(frame[:8].view(torch.int64))


def _bytes(text: str) -> Tensor:
    data = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _text(data: Tensor) -> str:
    return bytes(data.tolist()).rstrip(b"\0").decode(errors="replace")
