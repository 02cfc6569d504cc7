"""Latency histograms: constant memory for hours, exact maximum, percentiles that can be trusted.

Latency is measured from the *intended* time (a bin's end by the sample clock), so that a stall
cannot hide: what waits during it is as late as it is, not as late as it looked once read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hdrh.histogram import HdrHistogram

from rt_neds.frames import DecodedFrame

LONGEST_NS = 3_600_000_000_000

STAGES = ("sent", "received", "published")
"""Where a bin can first be late: at the sender, on its way or waking us, and in our hands."""

LONGEST_STALLS = 5


def stolen_ms(proc: Path = Path("/proc")) -> float | None:
    """Processor time that the host of a virtual machine gave to others, all cores, since the start.

    None where the system does not say (Linux does, in ``/proc/stat``, to 10 ms). What is stolen
    stops every thread on that core, whatever its priority.
    """
    try:
        with (proc / "stat").open() as file:
            return int(file.readline().split()[8]) * 1000.0 / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None


class Latency:
    """A histogram of nanoseconds.

    Attributes
    ----------
    count : int
    """

    def __init__(self) -> None:
        self._histogram = HdrHistogram(1_000, LONGEST_NS, 3)
        self._max = 0
        self.count = 0

    def record(self, ns: int) -> None:
        """Add one latency; one below zero (a clock fit that is not exact) counts as zero."""
        self._histogram.record_value(min(max(ns, 1_000), LONGEST_NS))
        self._max = max(self._max, ns)
        self.count += 1

    def percentiles_ms(self) -> dict[str, float]:
        """``p50``, ``p99``, ``p99_9`` and ``max`` in milliseconds."""
        if not self.count:
            return dict.fromkeys(("p50", "p99", "p99_9", "max"), float("nan"))
        at = self._histogram.get_value_at_percentile
        marks = {"p50": at(50.0), "p99": at(99.0), "p99_9": at(99.9), "max": self._max}
        return {name: round(min(ns, self._max) / 1e6, 4) for name, ns in marks.items()}

    def shares(self, edges_ms: list[float]) -> list[int]:
        """How many latencies lie between successive edges, for drawing."""
        counts = [0] * (len(edges_ms) - 1)
        for item in self._histogram.get_recorded_iterator():
            value = item.value_iterated_to / 1e6
            for index in range(len(counts)):
                if edges_ms[index] <= value < edges_ms[index + 1]:
                    counts[index] += item.count_added_in_this_iter_step
        return counts


class Tally:
    """Latencies and counts of one path.

    Attributes
    ----------
    stalls : int
        Runs of bins that came late one after the other: whatever held the machine up held up all of
        them, so that these, and not late bins, are what chance deals out.
    longest : list of dict
        Of the longest stalls: ``s`` into its turn, ``ms`` by which its worst bin was late, ``bins``
        late, and ``when`` the first of them was.
    """

    def __init__(self, bin_ms: float) -> None:
        self.bins = self.repeated = self.missed = self.late_spikes = self.lost = self.stalls = 0
        self.late_when = dict.fromkeys(STAGES, 0)
        self.longest: list[dict[str, Any]] = []
        self.stolen_ms: float | None = 0.0
        self.receive_to_publish, self.decode = Latency(), Latency()
        self.bin_end_to_publish = Latency()
        self._bin_ns = bin_ms * 1e6
        self._seen: set[tuple[int, int]] = set()

    def take(self, frames: list[DecodedFrame], summary: dict[str, Any]) -> None:
        """Add the frames of one turn; ``summary`` is the sender's."""
        stalls: list[dict[str, Any]] = []
        stalled = False
        for frame in frames:
            key = (frame.epoch, frame.bin)
            if key in self._seen:
                self.repeated += 1
                continue
            self._seen.add(key)
            self.bins += 1
            self.late_spikes += frame.late
            self.lost += frame.lost
            stamps = frame.stamps
            intended = summary["zero_ns"] + round(frame.end * 1e9 / summary["rate"])
            self.receive_to_publish.record(stamps["published"] - stamps["received"])
            self.decode.record(stamps["decoded"] - stamps["binned"])
            self.bin_end_to_publish.record(stamps["published"] - intended)
            late = [stage for stage in STAGES if stamps[stage] - intended > self._bin_ns]
            if late:
                self.missed += 1
                self.late_when[late[0]] += 1
                if not stalled:
                    into = (frame.end - summary["first"]) / summary["rate"]
                    stalls.append({"s": round(into, 3), "ms": 0.0, "bins": 0, "when": late[0]})
                by = round((stamps["published"] - intended) / 1e6, 3)
                stalls[-1]["ms"] = max(stalls[-1]["ms"], by)
                stalls[-1]["bins"] += 1
            stalled = bool(late)
        self.stalls += len(stalls)
        longest = sorted(self.longest + stalls, key=lambda stall: -stall["ms"])
        self.longest = longest[:LONGEST_STALLS]

    def steal(self, before: float | None, after: float | None) -> None:
        """Add what was stolen from the machine during a turn; see :func:`stolen_ms`."""
        if self.stolen_ms is None or before is None or after is None:
            self.stolen_ms = None
        else:
            self.stolen_ms += after - before

    def report(self, control: Tally, expected: int) -> dict[str, Any]:
        """What ``rt-neds bench latency`` says of this path, beside its control.

        Parameters
        ----------
        control : Tally
            The same path with a decoder that does nothing.
        expected : int
            Bins that should have been published.
        """
        return {
            "bins": self.bins,
            "expected": expected,
            "repeated": self.repeated,
            "missed": self.missed + max(0, expected - self.bins),
            "late_when": self.late_when,
            "stalls": self.stalls,
            "longest_stalls": self.longest,
            "late_spikes": self.late_spikes,
            "lost": self.lost,
            "stages_ms": {
                "receive_to_publish": self.receive_to_publish.percentiles_ms(),
                "bin_end_to_publish": self.bin_end_to_publish.percentiles_ms(),
                "decode": self.decode.percentiles_ms(),
                "control": control.bin_end_to_publish.percentiles_ms(),
            },
        }
