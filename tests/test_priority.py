"""Real-time priority: of every thread, and given back."""

import gc
import os
import subprocess
import sys
import threading

import pytest

from rt_neds.bench_input import poisson_session
from rt_neds.cli import main
from rt_neds.priority import WORKER, take_priority, urgent

CODE = "from rt_neds.priority import take_priority; print(bool(take_priority()))"


@pytest.fixture
def allowed():
    """Skips where the system does not let us; asked in another process, not to stay so."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    if done.stdout.strip() != "True":
        pytest.skip("no real-time priority may be taken here")


def policies():
    return {int(task): os.sched_getscheduler(int(task)) for task in os.listdir("/proc/self/task")}


def test_every_thread_has_it_and_gives_it_back(allowed):
    go = threading.Event()
    waiting = threading.Thread(target=go.wait)
    waiting.start()
    try:
        before = policies()
        with urgent():
            inside = policies()
            late = threading.Thread(target=go.wait)
            late.start()
            assert os.sched_getscheduler(late.native_id) == os.SCHED_FIFO
            assert os.sched_getparam(0).sched_priority == WORKER
        after = policies()
    finally:
        go.set()
        waiting.join()
        late.join()
    assert waiting.native_id in before
    assert set(inside.values()) == {os.SCHED_FIFO}
    assert {thread: after[thread] for thread in before} == before


def test_unwanted_or_not_allowed_it_changes_nothing(monkeypatch):
    def refuse(*_):
        raise PermissionError

    with urgent(False):
        assert not hasattr(os, "sched_getscheduler") or os.sched_getscheduler(0) != 1
    if hasattr(os, "sched_setscheduler"):
        monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert take_priority() == {}


@pytest.mark.parametrize(("speed", "urgent_then"), [("1", True), ("20", False), ("0", False)])
def test_a_replay_in_its_own_time_is_sent_as_an_acquisition_would(
    allowed, tmp_path, monkeypatch, speed, urgent_then
):
    seen = []

    def look(session, probe, **_):
        seen.append((os.sched_getscheduler(0) == os.SCHED_FIFO, gc.isenabled()))
        return {"spikes": 0, "messages": 0, "seconds": 0.0, "behind_ms_max": 0.0}

    monkeypatch.setattr("rt_neds.replay.replay", look)
    path = str(poisson_session(tmp_path / "s.h5", "bench", ["bench/0"], 10.0, 1.0))
    assert main(["replay", "--session", path, "--probe", "imec0", "--speed", speed]) == 0
    assert seen == [(urgent_then, False)]
    assert os.sched_getscheduler(0) != os.SCHED_FIFO
    assert gc.isenabled()
