"""Signals: recorded, answered at once, and left alone where `nohup` ignores them."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from genrec_dist.console import command_to_continue, exit_code_of
from genrec_dist.distributed.signals import (
    STOPPING,
    RankGone,
    StopRequest,
    Terminated,
    speaking_last,
    terminating,
)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """As in a terminal, whatever this process has inherited."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_answered_while_one_long_operation_runs() -> None:
    """As a backward pass, the key derivation is one call, after which alone Python's handlers
    run."""
    answered: list[tuple[int, int, float]] = []
    with StopRequest() as stop:
        stop.on_first = lambda number: answered.append((number, stop.number, time.monotonic()))
        sender = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
        sender.start()
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 3_000_000)
        ended = time.monotonic()
        sender.join()
        assert stop.number == signal.SIGINT
    ((number, noted, when),) = answered
    assert number == signal.SIGINT
    assert when < ended
    assert noted == 0, "the main thread had not learned of it yet"


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_counts_and_a_second_interrupt_ends_at_once(number: int) -> None:
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert stop.number == number
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == number
        with pytest.raises(Terminated, match="ended by SIGINT"):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1, "no descriptor is left behind"


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop, terminating():
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_with_nothing_to_save_is_ended(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with terminating():
            signal.raise_signal(number)

    with pytest.raises(Terminated):
        work()
    assert exit_code_of(work) == 128 + number
    assert capsys.readouterr().err == f"genrec: ended by {number.name}\n"


@pytest.mark.parametrize(
    ("arguments", "remedy", "command"),
    [
        (["train", "tiny"], "--resume latest", "genrec train tiny --resume latest"),
        (
            ["train", "a b.yaml", "--resume", "run/checkpoints/step-3", "--set", "run=c d"],
            "--resume latest",
            "genrec train 'a b.yaml' --set 'run=c d' --resume latest",
        ),
        (["train", "--resume=x", "tiny"], "--resume latest", "genrec train tiny --resume latest"),
        (["tune", "--resume", "s.yaml"], "--resume", "genrec tune s.yaml --resume"),
        (["reproduce", "--out", "x"], "the same command", "genrec reproduce --out x"),
    ],
)
def test_the_command_that_continues_is_whole(
    arguments: list[str], remedy: str, command: str
) -> None:
    assert command_to_continue(arguments, remedy) == command


def test_a_rank_that_lost_another_is_not_ended_before_it_has_said_so() -> None:
    def end(*_: object) -> None:
        raise AssertionError("the launcher has ended it")

    stop = StopRequest()

    def lose_rank_0() -> None:
        try:
            with stop:
                raise RankGone("rank 0 has gone (Connection closed by peer): ...")
        finally:
            signal.raise_signal(signal.SIGTERM)  # on the way out of the run

    signal.signal(signal.SIGTERM, end)
    with pytest.raises(RankGone) as caught, speaking_last():
        lose_rank_0()
    signal.raise_signal(signal.SIGTERM)  # while the line is printed
    assert (stop.number, caught.value.is_main) == (signal.SIGTERM, True)
    assert not RankGone("rank 10 has gone (Connection closed by peer): ...").is_main
    # Of any other error's way out the handlers from before are in place.
    signal.signal(signal.SIGTERM, end)
    with pytest.raises(ValueError, match="x"), speaking_last(), StopRequest():
        raise ValueError("x")
    assert signal.getsignal(signal.SIGTERM) is end
