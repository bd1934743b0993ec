"""Files and directories are complete or absent: what a failure leaves, what may be overwritten."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from genrec_shards.atomic import (
    atomic_directory,
    atomic_file,
    remove_directory,
    sweep_killed_writers,
    system_errors,
)
from safetensors.numpy import save_file


def fail_half_way(path) -> None:
    path.write_text("half")
    raise OSError("disk full")


def test_atomic_file_appears_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with atomic_file(path) as temporary:
            assert temporary.name.startswith(".")
            assert f".{os.getpid()}." in temporary.name
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_failed_block_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_file(path) as temporary:
        fail_half_way(temporary)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, ...]]:
    """The calls that decide what a power cut leaves, in their order, with their paths."""
    made: list[tuple[str, ...]] = []
    fsync, rmtree = os.fsync, shutil.rmtree

    def noted_fsync(descriptor):
        fsync(descriptor)
        made.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def noted_rmtree(path, *more, **options):
        made.append(("rmtree", str(path)))
        rmtree(path, *more, **options)

    def noted_rename(source, target, real=os.rename):
        real(source, target)
        made.append(("rename", str(source), str(target)))

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(shutil, "rmtree", noted_rmtree)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "replace", noted_rename)
    return made


def test_atomic_file_is_on_the_disk_before_it_takes_its_name(tmp_path, calls):
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        calls.clear()
        with atomic_file(path) as temporary:
            temporary.write_text(text)
        named = ("rename", str(temporary), str(path))
        assert calls == [("fsync", str(temporary)), named, ("fsync", str(tmp_path))]


def test_atomic_directory_is_on_the_disk_before_it_takes_its_name(tmp_path, calls):
    path = tmp_path / "out"
    with atomic_directory(path) as temporary:
        (temporary / "deep").mkdir()
        for name in ("x", "deep/y", "deep/z"):
            (temporary / name).write_text(name)
    within = [temporary, *(temporary / name for name in ("x", "deep", "deep/y", "deep/z"))]
    *before, named, after = calls
    assert sorted(before) == sorted(("fsync", str(place)) for place in within)
    assert named == ("rename", str(temporary), str(path))
    assert after == ("fsync", str(tmp_path))


def test_old_directory_is_removed_after_the_new_name_is_on_the_disk(tmp_path, calls):
    path = tmp_path / "out"
    for text in ("old", "new"):
        calls.clear()
        with atomic_directory(path, overwrite=True) as temporary:
            (temporary / "x").write_text(text)
    _, moved, named, synced, removed = [call for call in calls if call[1] != str(temporary / "x")]
    aside = moved[2]
    assert moved == ("rename", str(path), aside)
    assert named == ("rename", str(temporary), str(path))
    assert synced == ("fsync", str(tmp_path))
    assert removed == ("rmtree", aside)
    assert (path / "x").read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_old_directory_stays_where_the_new_one_cannot_take_its_name(tmp_path):
    path = tmp_path / "out"
    with atomic_directory(path) as temporary:
        (temporary / "x").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_directory(path, overwrite=True) as temporary:
        temporary.rmdir()  # there is nothing to rename when the block has ended
    assert (path / "x").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_directory_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(OSError, match="disk full"), atomic_directory(path) as temporary:
        fail_half_way(temporary / "x")
    assert list(tmp_path.iterdir()) == []
    path.mkdir()  # an empty directory is nobody's work
    with atomic_directory(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "x").write_text("whole")
        assert list(path.iterdir()) == []
    assert (path / "deep" / "x").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_overwriting_needs_the_flag_and_the_marker(tmp_path):
    path = tmp_path / "out"
    with atomic_directory(path) as temporary:
        (temporary / "marker").write_text("1")
    for arguments, message in (
        ({}, "--overwrite"),
        ({"overwrite": True, "marker": "other"}, "not ours"),
    ):
        with pytest.raises(ValueError, match=message), atomic_directory(path, **arguments):
            raise AssertionError("the block must not run")
    with pytest.raises(RuntimeError), atomic_directory(path, overwrite=True, marker="marker"):
        raise RuntimeError
    assert (path / "marker").read_text() == "1"
    with atomic_directory(path, overwrite=True, marker="marker") as temporary:
        (temporary / "marker").write_text("2")
    assert (path / "marker").read_text() == "2"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="not a directory"),
        atomic_directory(tmp_path / "file", overwrite=True),
    ):
        raise AssertionError("the block must not run")


def test_kill_leaves_nothing_under_the_final_name(tmp_path):
    program = (
        "import os, signal, sys; from genrec_shards.atomic import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as t:\n"
        "    (t / 'x').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert all(p.name.startswith(".out.") for p in tmp_path.iterdir())


@pytest.mark.parametrize("make", [atomic_file, atomic_directory])
def test_system_error_names_the_file_to_be_written(tmp_path, make):
    for error in (OSError(28, "No space left"), OSError("8 requested and 3 written")):
        with pytest.raises(OSError, match=f"{tmp_path}/out"), make(tmp_path / "out"):
            raise error
        assert str(tmp_path / "out") in str(error)
    with pytest.raises(OSError, match="elsewhere"), make(tmp_path / "out"):
        raise OSError(2, "No such file", "elsewhere")


WRITER = """
import sys, time
from genrec_shards.atomic import atomic_directory
with atomic_directory(sys.argv[1]) as temporary:
    (temporary / "deep").mkdir()
    (temporary / "deep" / "half").write_text("x")
    print(temporary, flush=True)
    time.sleep(600)
"""


def writer_of(path) -> tuple[subprocess.Popen, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    return process, Path(process.stdout.readline().strip())


def test_next_run_removes_what_a_killed_writer_left_and_keeps_what_a_living_one_has(tmp_path):
    out = tmp_path / "out"
    (killed, left), (living, busy) = writer_of(out), writer_of(out)
    # The name of a neighbour, a file put aside, and one of another machine.
    names = (".out.more.1.0123abcd.tmp", f".out.1.{'0' * 8}-0123abcd.tmp")
    others = [tmp_path / name for name in names]
    aside = tmp_path / left.name.replace(".tmp", ".old")
    for folder in (*others, aside):
        folder.mkdir()
    killed.kill()
    killed.wait(60)
    try:
        assert left.is_dir()
        with atomic_directory(out) as temporary:
            assert not left.exists()
            assert temporary.is_dir()
            (temporary / "whole").write_text("1")
        assert set(tmp_path.iterdir()) == {out, busy, aside, *others}
        assert (busy / "deep" / "half").read_text() == "x"
    finally:
        living.kill()
        living.wait(60)
    with atomic_directory(tmp_path / "out", overwrite=True):
        pass
    assert not busy.exists()


def test_what_another_machine_or_version_left_is_removed_after_a_day(tmp_path):
    names = {
        "old": f".out.1.{'0' * 8}-0123abcd.tmp",
        "old, of an earlier version": ".out.2.0123abcd.tmp",
        "young": ".out.3.0123abcd.tmp",
        "running": ".out.4.0123abcd.tmp",  # its file is young, since its bytes still change
        "aside": ".out.5.0123abcd.old",
        "foreign": ".out-of-mine.6.0123abcd.tmp",
    }
    yesterday = time.time() - 25 * 3600
    for kind, name in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
        if kind not in ("young", "running"):
            os.utime(tmp_path / name / "half", (yesterday, yesterday))
        if kind != "young":
            os.utime(tmp_path / name, (yesterday, yesterday))
    with atomic_directory(tmp_path / "out"):
        pass
    left = {name for kind, name in names.items() if not kind.startswith("old")}
    assert {path.name for path in tmp_path.iterdir()} == {"out", *left}


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file of this process may become larger than a page."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("make", [atomic_file, atomic_directory])
def test_a_full_disk_is_an_error_of_the_system_whatever_library_meets_it(tmp_path, no_room, make):
    """`SafetensorError` is no OSError."""
    path = tmp_path / "out"

    def write() -> None:
        with make(path) as temporary:
            file = temporary / "weights" if make is atomic_directory else temporary
            save_file({"values": np.zeros(10_000)}, file)

    with pytest.raises(OSError, match="File too large") as caught:
        write()
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_half_removed_no_longer_bears_its_name(tmp_path, monkeypatch):
    (tmp_path / "step-3").mkdir()
    for name in ("a", "b"):
        (tmp_path / "step-3" / name).write_text("whole")
    unlink, left = os.unlink, []

    def noted(*arguments, **options):
        unlink(*arguments, **options)
        left.append([path.name for path in tmp_path.iterdir() if not path.name.startswith(".")])

    monkeypatch.setattr(os, "unlink", noted)
    remove_directory(tmp_path / "step-3")
    assert left == [[], []]
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_a_library_stays_what_it_is(tmp_path):
    for error in (RuntimeError("No such file or directory (os error 2)"), RuntimeError("28")):
        with pytest.raises(RuntimeError), system_errors(tmp_path):
            raise error
    with pytest.raises(OSError, match="No space left") as caught, system_errors(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_that_open_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as temporary:
            save_file({"values": np.zeros(3)}, temporary)
        with atomic_directory(tmp_path / "folder") as temporary:
            (temporary / "deep").mkdir()
            save_file({"values": np.zeros(3)}, temporary / "deep" / "file")
    finally:
        os.umask(before)
    for path in (tmp_path / "file", tmp_path / "folder" / "deep" / "file"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder" / "deep").stat().st_mode & 0o777 == 0o777 & ~umask


KILLED = """
import os, sys
from pathlib import Path
from genrec_shards import atomic
kill = lambda *_: os.kill(os.getpid(), 9)
if sys.argv[2] == "amid":
    atomic._fsync = kill
else:
    real, atomic.os.rename = os.rename, lambda *pair: (real(*pair), kill())
path = Path(sys.argv[1])
if path.suffix:
    with atomic.atomic_file(path) as temporary:
        temporary.write_text("new")
else:
    with atomic.atomic_directory(path, overwrite=True) as temporary:
        (temporary / "file").write_text("new")
"""


def test_what_killed_writers_left_is_swept_and_what_was_put_aside_comes_back(tmp_path):
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "best" / "file").write_text("old")

    def killed(name: str, when: str) -> None:
        done = subprocess.run([sys.executable, "-c", KILLED, run / name, when])
        assert done.returncode == -signal.SIGKILL

    killed("status.json", "amid")
    killed("best", "amid")
    killed("metrics.json", "amid")
    killed("best", "between")  # its two renames: best/ has only a hidden name
    mine = [".notes.tmp", ".best.old", ".lock"]
    for name in mine:
        (run / name).write_text("")
    hidden = {path.name for path in run.iterdir()} - set(mine)
    assert sorted(name.split(".")[1] for name in hidden) == ["best", "best", "metrics", "status"]
    living, busy = writer_of(run / "busy")  # not under the caller's lock either
    foreign = run / f".report.html.1.{'0' * 8}-0123abcd.tmp"
    foreign.write_text("")
    try:
        with atomic_file(run / "own.json") as own:
            own.write_text("")
            sweep_killed_writers(run, "best", "status.json")
            assert {path.name for path in run.iterdir()} == {
                *mine, "best", busy.name, foreign.name, own.name
            }  # fmt: skip
    finally:
        living.kill()
        living.wait(60)
    yesterday = time.time() - 25 * 3600
    os.utime(foreign, (yesterday, yesterday))
    sweep_killed_writers(run)
    assert {path.name for path in run.iterdir()} == {*mine, "best", "own.json"}
    assert (run / "best" / "file").read_text() == "old"

    killed("best", "between")
    (aside,) = run.glob(".best.*.old")
    shutil.copytree(aside, run / "best")  # a new best/ has the name: the old one can go
    sweep_killed_writers(run, "best")
    assert not list(run.glob(".best.*.*"))
    assert (run / "best" / "file").read_text() == "old"
    sweep_killed_writers(tmp_path / "none", "*")
