"""Calls from many threads, answered in shared batches by the callers themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


@dataclass(eq=False)
class _Call(Generic[Request, Answer]):
    request: Request
    kind: Hashable
    size: int
    done: bool = False
    answer: Answer | None = None
    error: Exception | None = None
    bell: SimpleQueue[None] = field(default_factory=SimpleQueue)
    """Rings when the call is answered or its turn has come; once too often does no harm."""


class Batcher(Generic[Request, Answer]):
    """Answers calls of many threads: what comes while a batch is answered goes into the next one.

    Once no thread works, the one whose call has waited longest does: on its own call and on those
    after it that are of the same kind and fit. The others sleep until they are answered. So there
    is no thread besides the callers', a lone call waits for nobody, and none is overtaken for long.

    An interrupt (KeyboardInterrupt) can come between any two steps. So each change is made in an
    order that strands nobody if the next never comes, and leaving can be done twice. A condition
    variable would not do: interrupted while it takes its lock back, it gives up a lock that is
    another's by then.

    No loop stands in a `with` or `try` here, but in a function that is called there. CPython looks
    for interrupts where a loop jumps back, and leaves some of these jumps out of the `with` or
    `try` around them (its issue 130279): the lock would never be given up.
    """

    def __init__(self, answer_batch: Callable[[list[Request]], list[Answer]], at_once: int):
        """`answer_batch` gives an answer to each call of a batch; `at_once`: what the sizes of a
        batch add up to at most."""
        self._answer_batch = answer_batch
        self._at_once = at_once
        self._lock = threading.Lock()
        self._waiting: list[_Call[Request, Answer]] = []
        self._batch: list[_Call[Request, Answer]] = []
        self._leader: _Call[Request, Answer] | None = None

    def answer(self, request: Request, kind: Hashable = None, size: int = 1) -> Answer:
        """The answer to one call.

        A thread that is interrupted leaves, and those whose calls it had in its batch answer them
        themselves.

        Args:
            request: What is to be answered.
            kind: Only calls of equal kinds share a batch.
            size: How much of a batch it takes.

        Raises:
            Exception: What the answering raised for the batch, in each thread of the batch.
        """
        call: _Call[Request, Answer] = _Call(request, kind, size)
        try:
            with self._lock:
                self._waiting.append(call)
                self._appoint_leader()
            self._sleep(call)
            if not call.done:
                self._lead(call)
        finally:
            try:
                self._leave(call)
            except BaseException:
                self._leave(call)
                raise
        if call.error is not None:
            raise call.error
        return call.answer  # type: ignore[return-value]

    def _appoint_leader(self) -> None:
        if self._leader is None and self._waiting:
            self._leader = self._waiting[0]
        if self._leader is not None:
            self._leader.bell.put(None)

    def _sleep(self, call: _Call[Request, Answer]) -> None:
        """Return when the call is answered or its turn has come."""
        while not call.done and self._leader is not call:
            call.bell.get()

    def _lead(self, call: _Call[Request, Answer]) -> None:
        """Answer this call and those that wait, are of its kind and fit."""
        with self._lock:
            self._choose_batch(call)
        batch = self._batch
        requests = [other.request for other in batch]
        try:
            answers = self._answer_batch(requests)
        except Exception as error:
            for other in batch:
                other.error, other.done = error, True
        else:
            for other, answer in zip(batch, answers, strict=True):
                other.answer, other.done = answer, True

    def _choose_batch(self, call: _Call[Request, Answer]) -> None:
        batch, total = [call], call.size
        for other in self._waiting:
            fits = other.kind == call.kind and total + other.size <= self._at_once
            if other is not call and fits:
                batch.append(other)
                total += other.size
        self._batch = batch
        self._waiting = [other for other in self._waiting if other not in batch]

    def _leave(self, call: _Call[Request, Answer]) -> None:
        """Wake those who are answered, let the others wait on, and appoint the next leader."""
        with self._lock:
            self._take_out(call)
            self._appoint_leader()

    def _take_out(self, call: _Call[Request, Answer]) -> None:
        if self._leader is call:
            for other in self._batch:
                if other.done:
                    other.bell.put(None)
            # Before younger calls: they came first.
            left = dict.fromkeys([*self._batch, *self._waiting])
            self._waiting = [other for other in left if not other.done and other is not call]
            self._leader, self._batch = None, []
        elif call in self._waiting:
            self._waiting.remove(call)
