"""The lock of a directory: who is told what, and when it is free again."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from genrec_shards.file_lock import LOCK_FILE, _release_in_child, hold

HOLDER = """
import os, sys, time
from pathlib import Path
from genrec_shards.file_lock import hold
with hold(Path(sys.argv[1]), "somebody works here"):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(600)
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest):
    """A process that holds the lock in `tmp_path/run` until its input is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run" / LOCK_FILE, request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        process.stdout.readline()
        yield process
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("holder", ["alone"], indirect=True)
def test_the_second_process_is_told_who_holds_a_directory_and_leaves_no_trace(
    tmp_path: Path, holder: subprocess.Popen
) -> None:
    lock = tmp_path / "run" / LOCK_FILE
    with pytest.raises(ValueError, match="somebody") as caught, hold(lock, "somebody works"):
        pass
    time_ = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
    name = rf"process {holder.pid} on {re.escape(socket.gethostname())} since {time_}"
    assert re.fullmatch(
        rf"{re.escape(str(lock))}: somebody works \({name}\): wait for its end, or end it",
        str(caught.value),
    )
    # One that waits gets it at the holder's end, and leaves no file and no folder of its own.
    holder.stdin.close()
    with hold(lock, "somebody works", wait=30):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(ValueError, match=f"process {os.getpid()} "), hold(lock, "I work"):
            pass
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "run"])


@pytest.mark.parametrize("holder", ["fork"], indirect=True)
def test_a_killed_holder_blocks_nobody_though_its_worker_lives(
    tmp_path: Path, holder: subprocess.Popen
) -> None:
    holder.kill()
    holder.wait()
    lock = tmp_path / "run" / LOCK_FILE
    assert lock.read_text().startswith(f"process {holder.pid} on ")
    # On a busy machine the worker may not have run yet: it lets go of the lock as soon as it does.
    with hold(lock, "somebody works", wait=30):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")


def test_a_program_that_was_given_the_descriptor_holds_on(tmp_path: Path) -> None:
    lock = tmp_path / LOCK_FILE
    command = [sys.executable, "-c", "input()"]
    context = hold(lock, "ranks work")
    descriptor = context.__enter__()
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[descriptor]) as heir:
        _release_in_child()  # as if this process were killed: its descriptor is closed
        with pytest.raises(ValueError, match="ranks work"), hold(lock, "ranks work"):
            pass
        heir.communicate(b"\n")
    with hold(lock, "ranks work"):
        pass


def test_two_processes_never_hold_it_together(tmp_path: Path) -> None:
    """The file is removed at each release; whoever opened it before must not hold a lost one."""
    code = """
import sys, time
from pathlib import Path
from genrec_shards.file_lock import hold
time.sleep = lambda _: None
counter = Path(sys.argv[2])
for _ in range(200):
    with hold(Path(sys.argv[1]), "other", wait=60):
        counter.write_text(str(int(counter.read_text()) + 1))
"""
    counter = tmp_path / "counter"
    counter.write_text("0")
    arguments = [sys.executable, "-c", code, tmp_path / LOCK_FILE, counter]
    processes = [subprocess.Popen(arguments) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert counter.read_text() == "400"


def test_a_place_that_cannot_be_written_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught, hold(tmp_path / "file" / "run" / LOCK_FILE, "x"):
        pass
    assert caught.value.filename == str(tmp_path / "file" / "run")
