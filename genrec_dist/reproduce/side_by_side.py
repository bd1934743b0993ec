"""Steps of `genrec reproduce` side by side, each in a process of its own."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from genrec_dist.distributed.deadline import Deadline, OutOfTime
from genrec_dist.distributed.signals import Stopped
from genrec_dist.reproduce.steps import Step
from genrec_dist.reproduce.systems import Options
from genrec_dist.reproduce.train_process import last_line, work_in_process

POLL_SECONDS = 0.2
StepInProcess = Callable[[Options, str, Callable[[str], None]], None]
"""Does the step of this name of `genrec reproduce` with these options."""


def do_side_by_side(
    options: Options,
    steps: list[Step],
    do_step: StepInProcess,
    ending: Deadline,
    say: Callable[[str], None],
    on_done: Callable[[Step, float], None],
) -> None:
    """Do the steps that are left, at most `options.parallel` at a time, each once those that it
    needs are done. One that fails leaves out those that need it, and no others.

    Args:
        options: of the command.
        steps: all of them, in their order.
        do_step: called in the process of a step that is no training; a training has its own.
        ending: all running steps end when it is due.
        say: called with lines that begin with their step's name.
        on_done: called after each step, with its seconds.

    Raises:
        Stopped, OutOfTime: from `Deadline.check`, once all processes have ended.
        ValueError: naming the steps that failed and why, once the others are done.
    """
    left = {step.name: step for step in steps if not step.is_done()}
    failed: dict[str, str] = {}
    running: dict[Future[float], Step] = {}
    with ThreadPoolExecutor(options.parallel) as threads:
        while True:
            if not ending.is_due:
                waiting_for = {*left, *failed, *(step.name for step in running.values())}
                ready = [step for step in left.values() if not step.after & waiting_for]
                for step in ready[: options.parallel - len(running)]:
                    del left[step.name]
                    say(f"{step.name}: begins")
                    running[threads.submit(_timed, options, step, do_step, ending, say)] = step
            if not running:
                break
            for future in wait(running, POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                step, error = running.pop(future), future.exception()
                if error is None:
                    on_done(step, future.result())
                elif not isinstance(error, Stopped | OutOfTime):
                    failed[step.name] = str(error)
                    say(f"{step.name}: failed: {error}")
    ending.check()
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        more = f", {len(left)} need them" * bool(left)
        raise ValueError(
            f"{len(failed)} of {len(steps)} steps failed{more}: {reasons}; the others are done, "
            "and the same command goes on"
        )


def _timed(
    options: Options,
    step: Step,
    do_step: StepInProcess,
    ending: Deadline,
    say: Callable[[str], None],
) -> float:
    """Do a step, in a thread that waits for its process; returns its seconds."""
    start = time.monotonic()

    def say_of_step(text: str) -> None:
        say(f"{step.name}: {text}")

    if step.run is not None:
        step.work(ending, say_of_step)
        return time.monotonic() - start
    log = options.out / "logs" / (re.sub(r"[^\w.+-]+", "-", step.name) + ".log")
    code = work_in_process(do_step, (options, step.name), log, ending, say_of_step)
    if not step.is_done():
        ending.check()
        raise ValueError(f"exit code {code}: {last_line(log)}")
    return time.monotonic() - start
