"""Threads that call together: shared batches in order, errors to whom they belong, and nobody left
behind by an interrupt."""

from __future__ import annotations

import ctypes
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
from background import PATIENCE, spawn

from genrec_dist.inference.request_batching import Batcher


class Work:
    """Doubles numbers; notes each batch and who worked on it. Negative numbers are an error; it
    waits while it is `held`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: list[int] = []
        self.begun, self.held = threading.Event(), threading.Event()
        self.held.set()
        self.alone = threading.Lock()

    def __call__(self, numbers: list[int]) -> list[int]:
        assert self.alone.acquire(blocking=False), "two batches at one time"
        try:
            self.batches.append(numbers)
            self.threads.append(threading.get_ident())
            self.begun.set()
            assert self.held.wait(PATIENCE)
            if min(numbers) < 0:
                raise ValueError(f"{min(numbers)} is negative")
            return [2 * number for number in numbers]
        finally:
            self.alone.release()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)


@contextmanager
def queued(
    batcher: Batcher[int, int], work: Work, calls: list[tuple[int, str, int]]
) -> Iterator[list[Future[int]]]:
    """The first call is worked on, and held, while the others come, in this order; then all go
    on."""
    work.held.clear()
    try:
        futures = [spawn(batcher.answer, *calls[0])]
        assert work.begun.wait(PATIENCE)
        for number, call in enumerate(calls[1:], 1):
            futures.append(spawn(batcher.answer, *call))
            wait_until(lambda number=number: len(batcher._waiting) == number)  # type: ignore[misc]
        yield futures
    finally:
        work.held.set()


def results(futures: list[Future[int]]) -> list[int]:
    return [future.result(PATIENCE) for future in futures]


def test_a_lone_call_is_answered_at_once_in_its_own_thread() -> None:
    work = Work()
    batcher = Batcher(work, 8)
    before = threading.active_count()
    assert [batcher.answer(number) for number in (1, 2)] == [2, 4]
    assert work.batches == [[1], [2]]
    assert set(work.threads) == {threading.get_ident()}
    assert threading.active_count() == before


def test_calls_that_come_meanwhile_share_the_next_batch() -> None:
    batcher = Batcher(work := Work(), 100)
    with queued(batcher, work, [(number, "same", 1) for number in range(8)]) as futures:
        pass
    assert results(futures) == [2 * number for number in range(8)]
    assert work.batches == [[0], [1, 2, 3, 4, 5, 6, 7]]


def test_batches_hold_one_kind_and_what_fits_the_oldest_first() -> None:
    batcher = Batcher(work := Work(), 4)
    calls = [
        (0, "a", 1),
        (1, "b", 2),
        (2, "a", 1),
        (3, "b", 3),
        (4, "b", 2),
        (5, "a", 9),
        (6, "a", 3),
        (7, "b", 1),
    ]
    with queued(batcher, work, calls) as futures:
        pass
    assert results(futures) == [2 * number for number in range(8)]
    # Larger than a batch: alone. What did not fit waits for the next of its kind, led by its own
    # thread.
    assert work.batches == [[0], [1, 4], [2, 6], [3, 7], [5]]


def test_an_error_reaches_its_batch_alone_and_the_next_call_works() -> None:
    batcher = Batcher(work := Work(), 3)
    calls = [(0, "a", 1), (1, "a", 1), (-2, "a", 1), (3, "a", 1), (4, "a", 1)]
    with queued(batcher, work, calls) as futures:
        pass
    for future in futures[1:4]:
        with pytest.raises(ValueError, match="-2 is negative"):
            future.result(PATIENCE)
    assert [futures[place].result(PATIENCE) for place in (0, 4)] == [0, 8]
    assert batcher.answer(5) == 10


def test_an_answer_too_few_is_an_error() -> None:
    batcher: Batcher[int, int] = Batcher(lambda numbers: [], 3)
    with pytest.raises(ValueError, match="shorter"):
        batcher.answer(1)


def test_an_interrupted_leader_leaves_its_batch_to_the_others() -> None:
    work, interrupted = Work(), threading.Event()

    def interrupted_once(numbers: list[int]) -> list[int]:
        if 1 in numbers and not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        return work(numbers)

    batcher = Batcher(interrupted_once, 100)
    with queued(batcher, work, [(number, "a", 1) for number in range(6)]) as futures:
        pass
    with pytest.raises(KeyboardInterrupt):
        futures[1].result(PATIENCE)
    assert results([futures[0], *futures[2:]]) == [0, 4, 6, 8, 10]
    assert work.batches == [[0], [2, 3, 4, 5]]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A test run in the background of a shell inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("leads", [True, False])
def test_control_c_ends_the_call_of_the_main_thread_alone(leads: bool) -> None:
    """A real signal, while the main thread works for all, or waits for another to."""
    batcher = Batcher(work := Work(), 100)
    work.held.clear()
    try:
        first = [] if leads else [spawn(batcher.answer, 1)]
        assert leads or work.begun.wait(PATIENCE)
        # Whoever leads, two others wait, besides the main thread or behind it.
        more = [spawn(_ask_when, batcher, number, work.begun.is_set) for number in (2, 3)]
        waiting = 2 if leads else 3
        kill = spawn(
            _interrupt_when, lambda: work.begun.is_set() and len(batcher._waiting) == waiting
        )
        with pytest.raises(KeyboardInterrupt):
            batcher.answer(9)
    finally:
        work.held.set()
    kill.result(PATIENCE)
    assert results(first + more) == ([] if leads else [2]) + [4, 6]
    assert batcher.answer(5) == 10
    assert not leads or work.threads[0] == threading.get_ident()


def _ask_when(batcher: Batcher[int, int], number: int, condition: Callable[[], bool]) -> int:
    wait_until(condition)
    return batcher.answer(number)


def _interrupt_when(condition: Callable[[], bool]) -> None:
    wait_until(condition)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_many_threads_get_their_own_answers() -> None:
    """Errors of single calls, several kinds: each of 8 threads gets what it would get alone."""
    batcher = Batcher(work := Work(), 5)

    def one_thread(seed: int) -> None:
        dice = random.Random(seed)
        for number in range(seed * 1000, seed * 1000 + 150):
            if dice.random() < 0.05:
                with pytest.raises(ValueError, match="is negative"):
                    batcher.answer(-number - 1, kind="bad")
            assert (
                batcher.answer(number, kind=dice.choice("ab"), size=dice.choice([1, 2]))
                == 2 * number
            )

    for future in [spawn(one_thread, seed) for seed in range(8)]:
        future.result(PATIENCE)
    assert sum(map(len, work.batches)) > 1200
    assert batcher._waiting == []


def test_an_interrupt_between_any_two_steps_strands_nobody() -> None:
    """Threads are interrupted again and again, wherever they happen to be; all the others' calls
    are answered."""
    batcher: Batcher[int, int] = Batcher(lambda numbers: [2 * number for number in numbers], 4)
    stop, counts = threading.Event(), {"answered": 0, "interrupted": 0}
    busy: set[int] = set()

    def victim(seed: int) -> None:
        number = seed
        while not stop.is_set():
            number += 8
            try:
                busy.add(threading.get_ident())
                assert batcher.answer(number) == 2 * number
                busy.discard(threading.get_ident())
                counts["answered"] += 1
            except KeyboardInterrupt:
                counts["interrupted"] += 1

    threads = [
        threading.Thread(target=_shielded, args=(victim, seed), daemon=True) for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    dice, end = random.Random(0), time.monotonic() + PATIENCE
    while min(counts.values()) < 200 and time.monotonic() < end:
        ident = dice.choice(threads).ident
        if ident in busy:
            busy.discard(ident)  # once a call: what is interrupted while it leaves is let go
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(ident), ctypes.py_object(KeyboardInterrupt)
            )
        time.sleep(dice.random() * 1e-3)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    assert min(counts.values()) >= 200, counts
    assert batcher.answer(3) == 6


def _shielded(target: Callable[[int], None], seed: int) -> None:
    """An interrupt can also hit a thread between two calls."""
    while True:
        try:
            target(seed)
            return
        except KeyboardInterrupt:
            continue
