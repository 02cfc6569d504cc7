"""The processes of ``rt-neds bench soak``: the acquisition, and what memory everyone takes."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6 if hasattr(os, "sysconf") else 0.004096
SAMPLE_S = 2.0
WARM_S = 60.0
"""What is loaded and compiled in the first minute of a process is not growth."""


class Sending:
    """The acquisition as a process of its own.

    Parameters
    ----------
    settings : dict
        Of :class:`rt_neds.soak_sender.Acquisition`.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "rt_neds.soak_sender", json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._entries: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._entries.put(json.loads(line))

    @property
    def ended(self) -> bool:
        """Whether the process has ended and all it said was taken."""
        return not self._reading.is_alive() and self._entries.empty()

    def order(self, *words: str) -> None:
        """Tell it something."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(words) + "\n")
            self._child.stdin.flush()

    def entries(self) -> Iterator[list[Any]]:
        """What it has told since."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._entries.get_nowait()

    def close(self) -> None:
        """End it."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def children_of(pid: int) -> list[int]:
    """Process ids of the children of a process, oldest first; none where that cannot be seen."""
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class Memory:
    """Resident memory of ``serve`` and of every process it forks, over time.

    Parameters
    ----------
    pid : int
        The process that watches the others.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._next = 0.0
        # (seconds, resident MB, of which not of files or shared memory) of each process.
        self._samples: dict[int, list[tuple[float, float, float]]] = {}

    def sample(self) -> None:
        """Look, if the last look is a while ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + SAMPLE_S
        for pid in (self._pid, *children_of(self._pid)):
            with contextlib.suppress(OSError, ValueError, IndexError):
                _, resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[:3]
                mb, own_mb = int(resident) * PAGE_MB, (int(resident) - int(shared)) * PAGE_MB
                if mb:  # one that has ended has none
                    self._samples.setdefault(pid, []).append((now, mb, own_mb))

    def report(self) -> list[dict[str, Any]]:
        """For each process: how long it was seen, and memory once settled and late in its life.

        Returns
        -------
        list of dict
            ``role``, ``seconds``, ``settled_mb``, ``late_mb``, ``growth_mb``, and the same of what
            is its own (``own_growth_mb``). Settled is the median of the quarter of its samples (at
            most 30 s of them) that follow the first minute, or the first half of a shorter life;
            late the median of as many at its end. Absent where it was too short to tell.
        """
        rows = []
        for pid, samples in self._samples.items():
            lived = samples[-1][0] - samples[0][0]
            warm = samples[0][0] + min(WARM_S, lived / 2)
            after = [sample for sample in samples if sample[0] >= warm]
            some = min(15, len(after) // 4)
            row: dict[str, Any] = {
                "role": "supervisor" if pid == self._pid else "process",
                "seconds": round(lived, 1),
            }
            if some >= 2:
                for at, name in ((1, ""), (2, "own_")):
                    settled = statistics.median(sample[at] for sample in after[:some])
                    late = statistics.median(sample[at] for sample in after[-some:])
                    row[f"{name}settled_mb"], row[f"{name}late_mb"] = (
                        round(settled, 2),
                        round(late, 2),
                    )
                    row[f"{name}growth_mb"] = round(late - settled, 2)
            rows.append(row)
        return rows
