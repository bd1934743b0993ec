"""Calls from many threads, worked on in shared batches by the callers themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


@dataclass(eq=False)
class _Call(Generic[Asked, Answer]):
    asked: Asked
    kind: Hashable
    size: int
    done: bool = False
    answer: Answer | None = None
    error: Exception | None = None
    bell: SimpleQueue[None] = field(default_factory=SimpleQueue)
    """Rings when the call is answered or its turn has come; once too often does no harm."""


class Callers(Generic[Asked, Answer]):
    """Threads that call at the same time: what comes while a batch is worked on goes into the next
    one.

    Once nobody works, the thread whose call has waited longest does: on its own call and on those
    behind it that are of the same kind and fit. The others sleep until they are answered. So no
    thread lives beside the callers', a lone call waits for nobody, and none is overtaken for long.

    An interrupt (KeyboardInterrupt) can come between any two steps. So each change is made in an
    order that leaves nobody behind if the next never comes, and leaving can be done twice. A
    condition variable would not do: interrupted while it takes its lock back, it gives up a lock
    that is another's by then."""

    def __init__(self, work: Callable[[list[Asked]], list[Answer]], at_once: int):
        """`work` gives an answer to each call of a batch; `at_once`: what the sizes of a batch add
        up to at most."""
        self._work = work
        self._at_once = at_once
        self._lock = threading.Lock()
        self._waiting: list[_Call[Asked, Answer]] = []
        self._batch: list[_Call[Asked, Answer]] = []
        self._leader: _Call[Asked, Answer] | None = None

    def ask(self, asked: Asked, kind: Hashable = None, size: int = 1) -> Answer:
        """The answer to one call. Raises what `work` raised for its batch, in each thread of the
        batch.

        A thread that is interrupted leaves, and those whose calls it had in its batch work on them
        themselves."""
        call: _Call[Asked, Answer] = _Call(asked, kind, size)
        try:
            with self._lock:
                self._waiting.append(call)
                self._appoint()
            while not call.done and self._leader is not call:
                call.bell.get()
            if not call.done:
                self._take_batch(call)
                self._answer_batch()
        finally:
            try:
                self._leave(call)
            except BaseException:
                self._leave(call)
                raise
        if call.error is not None:
            raise call.error
        return call.answer  # type: ignore[return-value]

    def _appoint(self) -> None:
        if self._leader is None and self._waiting:
            self._leader = self._waiting[0]
        if self._leader is not None:
            self._leader.bell.put(None)

    def _take_batch(self, call: _Call[Asked, Answer]) -> None:
        with self._lock:
            batch, total = [call], call.size
            for other in self._waiting:
                if (
                    other is not call
                    and other.kind == call.kind
                    and total + other.size <= self._at_once
                ):
                    batch.append(other)
                    total += other.size
            self._batch = batch
            self._waiting = [other for other in self._waiting if other not in batch]

    def _answer_batch(self) -> None:
        batch = self._batch
        try:
            answers = self._work([call.asked for call in batch])
        except Exception as error:
            for call in batch:
                call.error, call.done = error, True
        else:
            for call, answer in zip(batch, answers, strict=True):
                call.answer, call.done = answer, True

    def _leave(self, call: _Call[Asked, Answer]) -> None:
        """Ring for who is answered, let who is not wait on, and give the lead to the next."""
        with self._lock:
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
            self._appoint()
