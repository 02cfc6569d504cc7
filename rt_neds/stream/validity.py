"""Reasons to distrust a bin, from what has been seen up to it."""

from __future__ import annotations

from rt_neds.clock import ClockFit
from rt_neds.frames import BinnedFrame, Flag, SpikeBatch


class Validity:
    """Keeps the flags of one stream.

    Parameters
    ----------
    context : int
        Bins of context of the decoder; a fault stays flagged while it is inside.
    full : int
        Bins of a run after which the decoder knows all that it can; at least the context.
    bin_ns : int
        Width of a bin.
    fit : ClockFit
    stale_ms : float
        A source silent for longer is stale.
    units_missing : bool
        Whether units of the bundle are not in the stream.
    lateness_ns : int
        For which bins are held open: on purpose, so that is not late.

    Attributes
    ----------
    counters : dict of str to int
        ``late`` frames, ``stale`` silences, clock ``slips``, ``restarts``.
    """

    def __init__(
        self,
        context: int,
        full: int,
        bin_ns: int,
        fit: ClockFit,
        stale_ms: float,
        units_missing: bool,
        lateness_ns: int = 0,
    ) -> None:
        self.units_missing = units_missing
        self.counters = dict.fromkeys(("late", "stale", "slips", "restarts"), 0)
        self._context, self._full, self._fit = context, full, fit
        self._in_time_ns, self._held_ns = bin_ns + lateness_ns, 0
        self._stale_ns = round(stale_ms * 1e6)
        self._epoch: int | None = None
        self._bins_in_run = self._bins_of_ours = 0
        self._began_before = False
        self._bins_since_hole = self._bins_since_slip = context
        self._last_received_ns = 0
        self._stale = self._stale_told = False

    def go_on_from(self, before: Validity) -> None:
        """Go on with the same stream where another ended; what was silent meanwhile were we."""
        self.counters, self._fit, self._epoch = before.counters, before._fit, before._epoch
        self._began_before = before._began_before
        self._stale, self._stale_told = before._stale, before._stale_told
        self._bins_since_slip = before._bins_since_slip
        self._bins_since_hole = before._bins_since_hole

    def follow(self, before: Validity) -> None:
        """Begin anew where another ended whose bins were others: that shows, and counts go on."""
        self.counters, self._began_before = before.counters, before._began_before

    @property
    def realtime(self) -> bool:
        """Whether the stream runs at the probe's own rate."""
        return self._fit.realtime

    def clock(self) -> dict[str, float | bool]:
        """The clock fit, as the status message says it."""
        return self._fit.status()

    def take(self, batch: SpikeBatch) -> None:
        """Look at a batch before its bins."""
        silent_ns = batch.received_ns - self._last_received_ns
        stale = bool(self._last_received_ns) and silent_ns > self._stale_ns
        self.counters["stale"] += stale
        self._stale = stale or (self._stale and not self._stale_told)  # until a bin could say so
        self._stale_told = False
        self._last_received_ns = batch.received_ns
        if batch.epoch != self._epoch:
            self._fit.restart()
            self._epoch = batch.epoch
        newest = batch.end if batch.newest is None else batch.newest
        self._held_ns = round((newest - batch.end) / batch.rate * 1e9)
        if self._fit.observe(newest, batch.received_ns):
            self.counters["slips"] += 1
            self._bins_since_slip = 0

    def flags(self, frame: BinnedFrame) -> int:
        """Flags of a bin that is about to be decoded; lateness is added by :meth:`lateness`."""
        if frame.first_of_run:
            self.counters["restarts"] += self._began_before
            self._bins_in_run, self._bins_of_ours = frame.known + frame.missed, 0
            if not frame.known:
                self._bins_since_hole = self._context
            elif frame.missed:
                self._bins_since_hole = 0
        self._bins_in_run += 1
        self._bins_of_ours += 1
        self._bins_since_hole = 0 if not frame.observed else self._bins_since_hole + 1
        self._bins_since_slip += 1
        flags = 0
        if self._bins_since_hole < self._context:
            flags |= Flag.GAP
        if self._bins_in_run < self._full:
            flags |= Flag.WARMING
        if self._bins_of_ours < self._context and self.counters["restarts"]:
            flags |= Flag.RESTARTED
        if self._stale:
            flags |= Flag.STALE
            self._stale_told = True
        if self._bins_since_slip <= self._context:
            flags |= Flag.SLIPPED
        if frame.unknown:
            flags |= Flag.UNKNOWN_UNITS
        if self.units_missing or frame.silent_N is not None:
            flags |= Flag.MISSING_UNITS
        if frame.late:
            flags |= Flag.LATE
        self._began_before = True
        return int(flags)

    def ended_ns(self, end: int, near_ns: int) -> int | None:
        """Host time of sample ``end``; None unless the stream runs at the probe's own rate."""
        return self._fit.host_ns(end, near_ns) if self._fit.realtime else None

    @property
    def allowed_ns(self) -> int:
        """After its end a bin may take so long: its own width, and what is held back on purpose."""
        return self._in_time_ns + self._held_ns

    def lateness(self, ended_ns: int | None, published_ns: int) -> int:
        """``Flag.LATE`` if a bin that ended at ``ended_ns`` comes out more than a bin later, and
        later than it was held back on purpose.
        """
        if ended_ns is None or published_ns - ended_ns <= self.allowed_ns:
            return 0
        self.counters["late"] += 1
        return int(Flag.LATE)
