"""The node's cache: bounded at every moment, shared by processes that may be killed, believed only
where sha256 agrees."""

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from genrec_shards.storage.disk_cache import NodeCache

FORK = multiprocessing.get_context("fork")
NUM_KEYS = 40


def content(number: int) -> bytes:
    """Between 500 and 1,500 bytes, another for each number."""
    return random.Random(number).randbytes(500 + 25 * number)


def get(cache: NodeCache, number: int, log: Path | None = None, timeout: float = 60) -> bool:
    """Whether it was cached; what came is compared. `log`: notes what is fetched, slowly."""

    def fetch() -> bytes:
        if log is not None:
            with log.open("a") as file:
                file.write(f"{number}\n")
            time.sleep(0.005)  # other processes are waiting by now
        return content(number)

    sha256 = hashlib.sha256(content(number)).hexdigest()
    data, was_cached = cache.get(f"set/{number}", sha256, fetch, timeout)
    assert data == content(number)
    return was_cached


def fetched(log: Path) -> list[int]:
    return sorted(map(int, log.read_text().split()))


def bytes_in(directory: Path) -> int:
    """Complete and half-written files."""
    total = 0
    for folder, _, names in os.walk(directory / "files"):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def started(count: int, target, *arguments) -> list:
    """Processes that are given their number after the arguments."""
    processes = [FORK.Process(target=target, args=(*arguments, n)) for n in range(count)]
    for process in processes:
        process.start()
    return processes


def test_fetched_files_are_there_for_another_process(tmp_path):
    log = tmp_path / "log"
    assert not get(NodeCache(tmp_path), 1, log)
    assert get(NodeCache(tmp_path), 1, log)
    assert fetched(log) == [1]
    assert NodeCache(tmp_path).num_bytes() == len(content(1))


def test_least_recently_used_goes_first_and_the_bound_holds(tmp_path):
    cache = NodeCache(tmp_path, max_bytes=5500)
    for number in range(5):
        get(cache, number)
        os.utime(tmp_path / "files" / "set" / str(number), (number, number))
    assert get(cache, 0)  # used just now
    for number in range(20, 23):
        get(cache, number)
        assert cache.num_bytes() <= 5500
    left = {path.name for path in (tmp_path / "files" / "set").iterdir()}
    assert left == {"0", "2", "3", "4", "20", "21", "22"}


def test_file_larger_than_the_cache_is_not_kept(tmp_path):
    cache = NodeCache(tmp_path, max_bytes=600)
    assert [get(cache, number) for number in (0, 30, 0)] == [False, False, True]
    nothing = NodeCache(tmp_path / "nothing", max_bytes=0)
    assert [get(nothing, number) for number in (0, 0)] == [False, False]
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("damage", [b"", b"torn", content(1)[:-1] + b"x"])
def test_damaged_file_is_fetched_again(tmp_path, damage):
    cache = NodeCache(tmp_path)
    get(cache, 1)
    (tmp_path / "files" / "set" / "1").write_bytes(damage)
    assert [get(cache, 1) for _ in range(2)] == [False, True]


@pytest.mark.parametrize("account", [None, b"", b"-", b"99999999999999999999"])
def test_lost_or_wrong_count_mends_itself(tmp_path, account):
    cache = NodeCache(tmp_path, max_bytes=6000)
    get(cache, 0)
    (tmp_path / "account").unlink()
    if account is not None:
        (tmp_path / "account").write_bytes(account)
    for number in range(1, 20):
        get(cache, number)
        assert cache.num_bytes() <= 6000
    assert int((tmp_path / "account").read_bytes()) == cache.num_bytes()


def test_cache_that_is_cleared_meanwhile_fills_again(tmp_path):
    cache = NodeCache(tmp_path / "cache")
    get(cache, 0)
    shutil.rmtree(tmp_path / "cache")
    assert [get(cache, 0) for _ in range(2)] == [False, True]


def test_full_disk_costs_the_cache_and_not_the_data(tmp_path):
    cache = NodeCache(tmp_path)
    (tmp_path / "files").rmdir()
    # No directory can be made below a file: the system refuses as a full disk would.
    (tmp_path / "files").write_bytes(b"")
    with pytest.warns(UserWarning, match="shards are not cached"):
        assert not get(cache, 0)


def test_defaults_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("GENREC_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("GENREC_CACHE_BYTES", "12345")
    cache = NodeCache()
    assert (cache.directory, cache.max_bytes) == (tmp_path / "a", 12345)
    monkeypatch.delenv("GENREC_CACHE")
    monkeypatch.delenv("GENREC_CACHE_BYTES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    cache = NodeCache()
    assert (cache.directory, cache.max_bytes) == (tmp_path / "b" / "genrec", 20 * 2**30)
    monkeypatch.setenv("GENREC_CACHE_BYTES", "20G")
    with pytest.raises(ValueError, match="GENREC_CACHE_BYTES is '20G': give a whole number"):
        NodeCache()
    monkeypatch.delenv("GENREC_CACHE_BYTES")
    (tmp_path / "file").write_bytes(b"")
    message = r"file/x: the cache .* cannot be made \(Not a directory\): set GENREC_CACHE"
    with pytest.raises(ValueError, match=message):
        NodeCache(tmp_path / "file" / "x")
    with pytest.raises(ValueError, match="-1 bytes"):
        NodeCache(tmp_path, -1)


def get_all(directory: Path, log: Path, start, _number: int) -> None:
    cache = NodeCache(directory)
    start.wait()
    for number in range(NUM_KEYS):
        get(cache, number, log)


def test_processes_that_miss_together_fetch_once(tmp_path):
    processes = started(4, get_all, tmp_path / "cache", tmp_path / "log", FORK.Barrier(4))
    [process.join(120) for process in processes]
    assert [process.exitcode for process in processes] == [0] * 4
    assert fetched(tmp_path / "log") == list(range(NUM_KEYS))


def get_at_random(directory: Path, times: int, seed: int) -> None:
    cache, dice = NodeCache(directory, 8000), random.Random(seed)
    for _ in range(times):
        get(cache, dice.randrange(NUM_KEYS))


def test_processes_that_evict_at_once_stay_below_the_bound(tmp_path):
    """40 kB of files in 8 kB, four processes: nearly every write must evict."""
    processes = started(4, get_at_random, tmp_path, 60)
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, bytes_in(tmp_path))
        time.sleep(0.001)
    [process.join(120) for process in processes]
    assert [process.exitcode for process in processes] == [0] * 4
    assert 0 < bytes_in(tmp_path) <= 8000
    assert 4000 < most <= 8000


def test_killed_processes_leave_nothing_that_is_believed_or_that_stays(tmp_path):
    dice = random.Random(0)
    for _ in range(12):
        processes = started(2, get_at_random, tmp_path, 10**9)
        time.sleep(dice.uniform(0.02, 0.1))
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join(60)
        assert bytes_in(tmp_path) <= 8000
    for name in ("half", "another"):
        path = tmp_path / "files" / "set" / f".{name}.tmp"
        path.write_bytes(b"half-written" * 10)
        os.utime(path, (2**32, 2**32))  # however young: while one process evicts none writes
    (tmp_path / "account").unlink()
    cache = NodeCache(tmp_path, 8000)
    for number in range(NUM_KEYS):
        get(cache, number, timeout=5)
    assert cache.num_bytes() <= 8000
    assert list((tmp_path / "files").rglob("*.tmp")) == []


def hold(directory: Path, name: str, held, _number: int) -> None:
    with NodeCache(directory)._locked(name, 60):
        held.set()
        time.sleep(600)


@pytest.mark.parametrize("name", ["gate", "turn-*"])
def test_process_that_stops_for_good_does_not_stop_the_others(tmp_path, name):
    cache = NodeCache(tmp_path)
    get(cache, 0)
    (lock,) = (tmp_path / "locks").glob(name)
    held = FORK.Event()
    (process,) = started(1, hold, tmp_path, lock.name, held)
    assert held.wait(60)
    try:
        assert get(cache, 0, timeout=0.1)
        (tmp_path / "files" / "set" / "0").unlink()
        assert not get(cache, 0, timeout=0.1)
    finally:
        process.kill()
        process.join(60)
    get(cache, 0)
    assert get(cache, 0)  # a lock goes with its holder


def test_child_forked_under_a_lock_does_not_keep_it(tmp_path):
    cache = NodeCache(tmp_path)
    with cache._locked("gate", 5) as held:
        assert held
        child = FORK.Process(target=time.sleep, args=(600,))
        child.start()
    try:
        with cache._locked("gate", 5) as held:
            assert held
    finally:
        child.kill()
        child.join(60)
