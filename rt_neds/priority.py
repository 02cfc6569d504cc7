"""Real-time priority for every thread of a process, where the system lets us.

The sockets' own threads matter as much as the loop: on a busy machine it is they who bring
messages late while the loop sits ready and waits.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

WATCHER, WORKER = 50, 49
"""Of the system's 1 to 99. Who watches must be able to run before those it watches."""


def _threads() -> list[int]:
    """Thread ids of this process; 0, the calling one, where they cannot be seen."""
    try:
        return [int(task.name) for task in Path("/proc/self/task").iterdir()]
    except OSError:
        return [0]


def take_priority(priority: int = WORKER, *, children: bool = True) -> dict[int, tuple[int, int]]:
    """Let every thread of this process run before all that is ordinary; going without is no error.

    Threads that are made later inherit it.

    Parameters
    ----------
    priority : int
    children : bool
        Whether processes that are forked inherit it, too.

    Returns
    -------
    dict of int to (int, int)
        Policy and priority that each thread had, for :func:`give_back`.
    """
    before: dict[int, tuple[int, int]] = {}
    if not hasattr(os, "sched_setscheduler"):
        return before
    policy = os.SCHED_FIFO | (0 if children else getattr(os, "SCHED_RESET_ON_FORK", 0))
    for thread in _threads():
        with contextlib.suppress(OSError):
            had = os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority
            os.sched_setscheduler(thread, policy, os.sched_param(priority))
            before[thread] = had
    return before


def give_back(before: dict[int, tuple[int, int]]) -> None:
    """Let threads run as they did."""
    for thread, (policy, priority) in before.items():
        with contextlib.suppress(OSError):
            os.sched_setscheduler(thread, policy, os.sched_param(priority))


@contextlib.contextmanager
def urgent(wanted: bool = True, *, children: bool = True) -> Iterator[None]:
    """Real-time priority for the length of the block."""
    before = take_priority(children=children) if wanted else {}
    try:
        yield
    finally:
        give_back(before)


@contextlib.contextmanager
def quiet_machine(realtime: bool) -> Iterator[None]:
    """No garbage collection (one with torch loaded stalls 150 ms); real-time priority if we may.

    For what must be on time: decoding, sending, measuring either.

    What a supervisor loaded is frozen and must stay so: to look through it all again, in a worker,
    copies all of it, and takes longer than a worker may be silent.
    """
    gc.collect()
    gc.disable()
    try:
        with urgent(realtime):
            yield
    finally:
        gc.enable()
