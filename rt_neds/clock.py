"""Two clocks, the probe's samples and the host's monotonic nanoseconds, and the fit between."""

from __future__ import annotations

import time

import numpy as np

from rt_neds.errors import ConfigError

monotonic_ns = time.monotonic_ns


def samples_per_bin(bin_ms: float, rate: float) -> int:
    """Width of a bin in samples.

    Parameters
    ----------
    bin_ms : float
        Width in milliseconds.
    rate : float
        Samples per second.

    Returns
    -------
    int
        ``round(bin_ms / 1000 * rate)``.

    Raises
    ------
    ConfigError
        If that is less than one sample.
    """
    width = round(bin_ms / 1000.0 * rate)
    if width < 1:
        raise ConfigError(
            f"bins of {bin_ms} ms at {rate} Hz are {width} samples; "
            "a bin must hold at least one: choose a larger bin_ms"
        )
    return width


def same_rate(one: float, other: float) -> bool:
    """Whether two rates differ by no more than a nominal and a measured one may."""
    return abs(one - other) <= ClockFit.REALTIME_TOLERANCE * other


class ClockFit:
    """When, by the host's clock, was a sample taken?

    Delay on the way here is one-sided: a message can come late, never early. So of every second
    only the least-delayed message counts, and a line through the last minute of those gives offset
    and rate. (Median and mean would follow every stall of the machine.)

    Parameters
    ----------
    rate : float
        Nominal samples per second.
    slip_ms : float
        A change of the offset that lasts ``PATIENCE`` seconds and exceeds this is a slip.

    Attributes
    ----------
    realtime : bool
        The stream runs at the probe's rate (within 0.1 %), so that lateness means something. A
        replay at another speed is not late, it is not real time.
    slips : int
        Slips seen so far.
    last_slip_ms : float
        By how much the offset changed at the last of them; 0 before the first.
    """

    BUCKET_NS = 1_000_000_000
    KEPT = 60
    PATIENCE = 3
    SETTLED = 10
    REALTIME_TOLERANCE = 1e-3

    def __init__(self, rate: float, slip_ms: float = 5.0) -> None:
        self.rate = rate
        self.slips, self.last_slip_ms = 0, 0.0
        self._slip_ns = slip_ms * 1e6
        self.restart()

    def restart(self) -> None:
        """Forget everything: a new epoch has another origin."""
        self.realtime = False
        self._minima: list[tuple[int, int]] = []  # (host ns, offset ns) of each finished bucket
        self._bucket_start = 0
        self._best: tuple[int, int] | None = None
        self._off_by_one_way = 0
        self._origin_ns = 0
        self._slope = 0.0
        self._intercept = 0.0
        self._fitted = False

    def observe(self, sample: int, host_ns: int) -> bool:
        """Take in that ``sample`` was known of at ``host_ns``; say whether the clock slipped."""
        offset = host_ns - round(sample * 1e9 / self.rate)
        if self._best is None:
            self._bucket_start = host_ns
            self._best = (host_ns, offset)
        elif offset < self._best[1]:
            self._best = (host_ns, offset)
        if host_ns - self._bucket_start < self.BUCKET_NS:
            return False
        finished, self._best = self._best, None
        return self._close_bucket(finished)

    def _close_bucket(self, finished: tuple[int, int]) -> bool:
        slipped = False
        if self._fitted and self.realtime:
            moved_ns = finished[1] - self._offset_at(finished[0])
            off = abs(moved_ns) > self._slip_ns
            self._off_by_one_way = self._off_by_one_way + 1 if off else 0
            if self._off_by_one_way >= self.PATIENCE:
                self.slips, self.last_slip_ms = self.slips + 1, moved_ns / 1e6
                slipped = True
                self._minima = self._minima[-(self.PATIENCE - 1) :]
                self._off_by_one_way = 0
        self._minima.append(finished)
        del self._minima[: -self.KEPT]
        if self._off_by_one_way == 0:  # a bucket under suspicion must not pull the line towards it
            self._refit()
        return slipped

    def _refit(self) -> None:
        if len(self._minima) < 2:
            return
        # Differences of Python's integers: a late sample number is more nanoseconds than int64 has.
        self._origin_ns, origin = self._minima[0]
        elapsed = np.array([float(host - self._origin_ns) for host, _ in self._minima])
        relative = np.array([float(offset - origin) for _, offset in self._minima])
        slope = float(np.polyfit(elapsed, relative, 1)[0])
        # A quartz is never 0.1 % off, but only after a while can so little be told from jitter.
        settled = len(self._minima) >= self.SETTLED
        self.realtime = abs(slope) < (self.REALTIME_TOLERANCE if settled else 0.02)
        self._slope = slope if settled else 0.0
        self._intercept = float(origin) + float(np.min(relative - self._slope * elapsed))
        self._fitted = True

    def status(self) -> dict[str, float | bool]:
        """``clock`` of the status message.

        Returns
        -------
        dict
            ``realtime``; ``ppm``: how much slower than nominal the probe's clock runs by the
            host's, 0 until it can be told; ``last_slip_ms``.
        """
        return {
            "realtime": self.realtime,
            "ppm": round(1e6 * self._slope, 2),
            "last_slip_ms": round(self.last_slip_ms, 3),
        }

    def _offset_at(self, host_ns: int) -> float:
        return self._intercept + self._slope * (host_ns - self._origin_ns)

    def host_ns(self, sample: int, near_ns: int) -> int | None:
        """Host time at which ``sample`` was taken, or None before two seconds have been seen."""
        if not self._fitted:
            return None
        return round(sample * 1e9 / self.rate + self._offset_at(near_ns))
