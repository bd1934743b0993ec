"""Threads: what is set where the user has set nothing, and what is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from genrec_dist.distributed import threads
from genrec_dist.distributed.threads import cpu_quota, set_thread_defaults


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "garbage"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_is_read(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("quota", "given", "expected"),
    [
        (None, {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (0.5, {}, {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}),
        (2.5, {}, {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}),
        (64.0, {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        (2.0, {"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}),
        (None, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        (None, {"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
    ],
)
def test_defaults_are_those_of_the_machine_and_yield_to_the_user(
    monkeypatch: pytest.MonkeyPatch,
    quota: float | None,
    given: dict[str, str],
    expected: dict[str, str],
) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "num_cores", lambda: 8)
    environment = dict(given)
    set_thread_defaults(environment)
    assert environment == expected


def test_they_are_set_before_torch_is_loaded_and_doctor_says_so() -> None:
    """OpenMP reads its environment once, when torch loads it."""
    program = (
        "import sys; sys.argv = ['genrec', 'doctor', '--json']\n"
        "from genrec_dist.cli import app\n"
        "assert 'torch' not in sys.modules\n"
        "app.main()"
    )
    names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert "they sleep while they wait" in done.stdout, done.stderr
