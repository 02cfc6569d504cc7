"""The faults of ``rt-neds bench soak``: what is done, and whether what is said of it is exact."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rt_neds.clock import monotonic_ns
from rt_neds.soak_injected import BINS, FRAMES, SOURCE
from rt_neds.soak_injected import FAULTS as OF_THE_ACQUISITION
from rt_neds.stream.raw import RawListener

if TYPE_CHECKING:
    from rt_neds.soak import Watched

KILLED, HUNG, SLOW = "worker killed", "worker hung", "slow subscriber"
MUTED = "units_silent"
ROTATION = (
    "dropped", "repeated", KILLED, "garbage", "late", "swapped", "stalled_shortly", "disordered",
    HUNG, "unknown", "burst", "restarted", SLOW, "absurd", "renumbered", KILLED, "silent",
    "slipped", MUTED, "stalled_long",
)  # fmt: skip
"""In this order, over and over. A new worker needs seconds until it can see lateness and slips."""

EXACT = {
    "source_counters": ("malformed", "repeated", "lost", "epochs"),
    "bin_counters": (
        "bins_unobserved", "bins_skipped", "spikes_unknown", "spikes_late", "spikes_far",
        "spikes_outside", "samples_lost",
    ),
    "frame_counters": ("stale", "slips", "restarts"),
}  # fmt: skip
"""Counters that must grow by what was injected and no more. ``late`` frames are the machine's."""
SETTLE_S = {"slipped": 8.0, KILLED: 4.0, HUNG: 4.0}
USUAL_SETTLE_S = 2.5
TIMEOUT_S = 60.0
SLOW_S = 20.0
MARGIN_BINS = 10


@dataclass
class Fault:
    """One fault, from the moment it is injected until what was said of it has been compared.

    Attributes
    ----------
    injected, reported : int
        What was done, and what ``serve`` said of it.
    wrong : list of str
        Everything that it said and that was not so, or did not say.
    """

    kind: str
    at_s: float
    injected: int = 0
    reported: int = 0
    wrong: list[str] = field(default_factory=list)
    recovery_ms: float | None = None
    expect: dict[str, int] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    sums: tuple[int, int, int] = (0, 0, 0)
    bins: tuple[int, int, int] | None = None
    began: float = 0.0
    began_ns: int = 0
    settled: float | None = None
    muted: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    """Units that were silenced, and those that a status said have fallen silent."""

    def row(self) -> dict[str, Any]:
        """For the record."""
        told = {"kind": self.kind, "at_s": round(self.at_s, 1), "injected": self.injected}
        told |= {"reported": self.reported, "wrong": self.wrong}
        return told | ({"recovery_ms": self.recovery_ms} if self.recovery_ms is not None else {})


class Faults:
    """Injects one fault at a time.

    Parameters
    ----------
    watched : Watched
        The run: its processes and its books.
    """

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self.current: Fault | None = None
        self.past: list[Fault] = []
        self.handovers_unasked = 0
        """A standby takes over from a worker that is late, too: no bin is lost by it."""
        self._deaf: RawListener | None = None
        self._deaf_until = 0.0
        # Another worker has counted other things. Of each its last status, and all that had been
        # injected by then; and the latter when the youngest began, with the restarts before it.
        self._injected: Counter[str] = Counter()
        self._seen: dict[int, tuple[dict[str, Any], Counter[str]]] = {}
        self._at_birth: tuple[Counter[str], int] = (Counter(), 0)

    def inject(self, kind: str, at_s: float) -> None:
        """Begin a fault."""
        watched = self.watched
        assert self.current is None
        assert watched.status is not None
        fault = Fault(kind, at_s, before=watched.status, sums=watched.sums)
        fault.began, fault.began_ns = time.monotonic(), monotonic_ns()
        self.current = fault
        if kind in OF_THE_ACQUISITION:
            watched.sending.order(kind)
        elif kind == SLOW:
            # It takes one message, and what lies in the buffers of two sockets.
            self._deaf = RawListener((watched.decoded,), queue=1)
            self._deaf_until = fault.began + min(SLOW_S, watched.period_s / 3)
            fault.bins = watched.at_bin()
        else:
            fault.injected = 1
            fault.bins = watched.at_bin()
            fault.began_ns = monotonic_ns()
            os.kill(watched.status["pid"], signal.SIGKILL if kind == KILLED else signal.SIGSTOP)

    def take_done(self, entry: list[Any]) -> None:
        """Take from the ledger that the acquisition has done what it was told."""
        _, kind, injected, expect, epoch, first, last = entry
        self._injected.update(expect)
        fault = self.current
        if fault is not None and fault.kind == kind:
            fault.injected, fault.expect, fault.bins = injected, expect, (epoch, first, last)
            self._settle(fault)

    def take_muted(self, ids: list[str]) -> None:
        """Take from the ledger which units fire no longer."""
        if self.current is not None:
            self.current.muted = set(ids)

    def take_ended(self, ended_ns: int) -> None:
        """Take that a frame came of a bin that ended then: is a worker back?"""
        fault = self.current
        if fault is None or fault.kind not in (KILLED, HUNG) or fault.recovery_ms is not None:
            return
        if ended_ns > fault.began_ns:
            fault.recovery_ms = round((monotonic_ns() - fault.began_ns) / 1e6, 2)
            self._settle(fault)

    def turn(self) -> None:
        """Do what is due."""
        fault = self.current
        if fault is None:
            return
        now = time.monotonic()
        if self._deaf is not None and now > self._deaf_until:
            self._deaf.close()
            self._deaf = None
            self._settle(fault)
        if now > fault.began + TIMEOUT_S:
            fault.wrong.append(f"not over within {TIMEOUT_S:g} s")
            self._end(fault)

    def take_status(self) -> None:
        """Take that a status came: is it one to compare?"""
        fault, status = self.current, self.watched.status
        assert status is not None
        if fault is not None:
            fault.named |= set(status["units"]["silent"])
        if fault is None and status["realtime"]:  # not before the stream has begun
            self._seen[status["pid"]] = status, self._injected.copy()
        elif fault is not None and fault.settled is not None and time.monotonic() > fault.settled:
            self._compare(fault)
            self._end(fault)

    def close(self) -> None:
        """Close what is open."""
        if self._deaf is not None:
            self._deaf.close()

    def _settle(self, fault: Fault) -> None:
        fault.settled = time.monotonic() + SETTLE_S.get(fault.kind, USUAL_SETTLE_S)

    def _end(self, fault: Fault) -> None:
        if fault.bins is not None:
            epoch, first, last = fault.bins
            # What serve does about a fault goes on when the acquisition has done with it.
            if fault.kind not in OF_THE_ACQUISITION or fault.kind == "renumbered":
                last = self.watched.at_bin()[1]
            self.watched.books.touched.append((epoch, first, last + MARGIN_BINS))
        self.past.append(fault)
        self.current = None

    def _compare(self, fault: Fault) -> None:
        before, after = fault.before, self.watched.status
        assert after is not None
        restarts = grown(before, after, "supervision", "restarts")
        handovers = grown(before, after, "supervision", "handovers")
        if fault.kind in (KILLED, HUNG):
            fault.reported = restarts
            self._at_birth = self._injected.copy(), after["supervision"]["restarts"]
            if after["pid"] == before["pid"] or not handovers:
                fault.wrong.append("the same worker as before")
            self.handovers_unasked += max(0, handovers - 1)
            return
        self.handovers_unasked += handovers
        if restarts:
            fault.wrong.append(f"restarts {restarts}, 0 expected")
        told = self._counted(fault, after)
        fault.reported = sum(told[path] for path in list(fault.expect)[:1])
        self._compare_frames(fault)
        self._compare_silent(fault, after["units"]["silent"])

    def _counted(self, fault: Fault, after: dict[str, Any]) -> Counter[str]:
        """What the counters say of this fault; that they say no more and no less."""
        base, then = self._seen.get(after["pid"], (None, self._at_birth[0]))
        counted: Counter[str] = Counter()
        for group, names in EXACT.items():
            for name in names:
                path = f"{group}.{name}"
                if base is None and name == "spikes_outside":
                    continue  # of the bin in the middle of which it began
                born = {"epochs": 1, f"{FRAMES}.restarts": self._at_birth[1]}
                was = born.get(name, born.get(path, 0)) if base is None else base[group][name]
                wanted = fault.expect.get(path, 0)
                came = after[group][name] - was - (self._injected[path] - then[path] - wanted)
                counted[path] = came
                if came != wanted:
                    fault.wrong.append(f"{name} {came}, {wanted} expected")
        return counted

    def _compare_frames(self, fault: Fault) -> None:
        """Frames say the same as the counters; spikes are those that were sent."""
        paths = f"{BINS}.spikes_late", f"{SOURCE}.lost", f"{BINS}.spikes_unknown"
        for path, was, is_ in zip(paths, fault.sums, self.watched.sums, strict=True):
            wanted = fault.expect.get(path, 0)
            if is_ - was != wanted:
                fault.wrong.append(f"{path} {is_ - was} on frames, {wanted} expected")
        if fault.bins is None:
            return
        epoch, first, _ = fault.bins
        if fault.kind == SLOW:
            bins = range(first, self.watched.at_bin()[1])
            fault.injected = len(bins)
            fault.reported = sum((epoch, n) in self.watched.books.heard for n in bins)
        elif not fault.expect and fault.kind != MUTED:
            fault.injected, fault.reported = self.watched.books.spikes_between(*fault.bins)

    def _compare_silent(self, fault: Fault, still: list[str]) -> None:
        """Units that fell silent were named, these and no others, and are believed again."""
        if fault.kind == MUTED:
            fault.reported = len(fault.named & fault.muted)
            if fault.bins is not None:
                self.watched.books.muted.append(fault.bins)
                if not self.watched.books.missing_in(*fault.bins):
                    fault.wrong.append("no frame flagged: units missing")
        if strange := (fault.named - fault.muted) | set(still):
            fault.wrong.append(f"silent {', '.join(sorted(strange)[:3])}, none expected")


def grown(before: dict[str, Any], after: dict[str, Any], group: str, name: str) -> int:
    """By how much a counter grew from one status to another."""
    return after[group][name] - before[group][name]
