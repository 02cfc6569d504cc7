"""Real-time priority: of every thread, and given back."""

import os
import subprocess
import sys
import threading

import pytest

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
