"""Names for the acquisitions of a rig that names none, the same for all processes that read it.

An acquisition is known by where its sample count is at a moment of the host's clock. One that began
since has counted no further than the time since then; so whoever finds a count that goes on from
what is written here reads the same one, and calls it by the same name. What is written lies in
memory that forks share, and outlives whoever wrote it.
"""

from __future__ import annotations

import multiprocessing
import threading
from time import time_ns
from typing import Any

import numpy as np

from rt_neds.stream.board import shared

SAME_S = 1.0
"""So exactly an acquisition goes on by the host's clock: what is late on its way, or stalls."""
TOLD_NS = 1_000_000_000
"""How often it is written where one has come to: the probe's clock and the host's drift apart."""
WAIT_S = 0.05
"""For whoever names one at the same moment. One that died at it would be waited for for ever."""

_ROW = np.dtype([("epoch", "<i8"), ("sample", "<i8"), ("at_ns", "<i8")])


class Acquisitions:
    """The acquisition of one probe that was named last. To be made before processes are forked."""

    def __init__(self) -> None:
        self._row = shared(1, _ROW)[0]
        can_fork = "fork" in multiprocessing.get_all_start_methods()
        lock: Any = multiprocessing.get_context("fork") if can_fork else threading
        self._lock = lock.Lock()
        self._told_ns = 0

    def name(self, sample: int, at_ns: int, rate: float, previous: int = 0) -> int:
        """The epoch of an acquisition that we meet, or that follows the one we read before.

        Parameters
        ----------
        sample : int
            Where it has come to.
        at_ns : int
            By the host's clock.
        rate : float
            Samples per second.
        previous : int
            Epoch of the one that is over for us; 0 if we begin to read.
        """
        locked = self._lock.acquire(True, WAIT_S)
        try:
            row = self._row
            passed_s = (at_ns - int(row["at_ns"])) / 1e9
            ahead_s = (sample - int(row["sample"])) / rate - passed_s
            before = sample >= row["sample"] and sample / rate > passed_s + SAME_S
            epoch = int(row["epoch"])
            if not epoch or epoch == previous or not (before or abs(ahead_s) < SAME_S):
                epoch = max(epoch + 1, previous + 1, time_ns() // 1_000_000)
            row["epoch"], row["sample"], row["at_ns"] = epoch, sample, at_ns
            self._told_ns = at_ns
            return epoch
        finally:
            if locked:
                self._lock.release()

    def reached(self, epoch: int, sample: int, at_ns: int) -> None:
        """Write, now and then, where the acquisition that we read has come to. Waits for nobody."""
        if at_ns - self._told_ns < TOLD_NS or not self._lock.acquire(False):
            return
        if self._row["epoch"] == epoch:
            self._row["sample"], self._row["at_ns"] = sample, at_ns
        self._told_ns = at_ns
        self._lock.release()
