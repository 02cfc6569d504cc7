"""Whoever starts processes ends them, even when ended itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def children_of(pid: int) -> set[int]:
    """Processes below a process."""
    found, parents = set(), {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int(
                    (folder / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:
                continue
    below = {pid}
    while below:
        below = {child for child, parent in parents.items() if parent in below} - found
        found |= below
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_benchmark_that_is_terminated_leaves_no_process_behind():
    bench = subprocess.Popen(
        [sys.executable, "-m", "rt_neds.cli", "bench", "latency", "--seconds", "60", "--size",
         "small", "--units", "20", "--json", os.devnull, "--quiet"],
        stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (begun := children_of(bench.pid)):
        assert time.monotonic() < deadline
        assert bench.poll() is None, bench.stderr.read()
        time.sleep(0.1)
    bench.terminate()
    assert bench.wait(timeout=60) == -signal.SIGTERM
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in begun):
        assert time.monotonic() < deadline
        time.sleep(0.1)
