"""The acquisition of ``rt-neds bench soak``: a process that sends, and does wrong when it is told.

It sends Poisson spikes in real time, a message every millisecond, and keeps a ledger: of every bin
of its clock how many spikes it has sent, and whether any were left out. Orders come as lines of
JSON on standard input, the ledger goes out as lines of JSON on standard output:

- ``["zero", epoch, sample, ns]``: from this sample on, sample 0 is at this host time;
- ``["bin", epoch, bin, known, unknown, state]``: a bin that its clock has passed;
- ``["muted", ids]``: units that are announced and no longer fire;
- ``["done", kind, injected, expect, epoch, first, last]``: a fault, what counters must now say more
  than before, and the bins during which it was injected;
- ``["end", lateness]``: how late messages were sent, in ms, when nothing was wrong.
"""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rt_neds.clock import monotonic_ns
from rt_neds.frames import SPIKE_DTYPE, SpikeBatch
from rt_neds.latency import Latency
from rt_neds.priority import quiet_machine
from rt_neds.soak_injected import BURST_BINS, FAULTS, MESSAGE, RATE
from rt_neds.stream.raw import RawSender

BURST = 10
BETWEEN_BURSTS_S = 45.0

WHOLE, HOLED, ABSENT, CUT = "whole", "holed", "absent", "cut"
"""A bin: all was sent; messages were left out; not recorded; an epoch began or ended in it."""


class Acquisition:
    """Sends the spikes of one probe in real time.

    Parameters
    ----------
    endpoint, probe, session : str
    units : list of str
    spikes_per_s : float
        Of all units together; ten times as many now and then.
    width : int
        Samples per bin.
    seed : int
    tell : callable
        Takes an entry of the ledger.
    """

    def __init__(
        self,
        endpoint: str,
        probe: str,
        session: str,
        units: list[str],
        spikes_per_s: float,
        width: int,
        seed: int,
        tell: Callable[..., None],
    ) -> None:
        self.probe, self.units, self.session, self.width = probe, units, session, width
        self.rng = np.random.default_rng(seed)
        self.sender = RawSender(endpoint, probe)
        self.lateness = Latency()
        self.calm = True
        self.bursting = 0  # bins left
        self.muted: set[str] = set()
        self.at = self.seq = self.zero_ns = 0
        self.epoch: int | None = None
        self.known = self.unknown = 0  # spikes sent so far of the bin that is open
        self._state = WHOLE
        self.spikes_per_s, self._per_bin = spikes_per_s, spikes_per_s * width / RATE
        self._burst_chance = width / RATE / BETWEEN_BURSTS_S
        self._tell = tell
        self._block = np.zeros(0, SPIKE_DTYPE)

    @property
    def bin(self) -> int:
        """The bin that is open."""
        return self.at // self.width

    @property
    def behind(self) -> bool:
        """Whether the next message is due already."""
        return monotonic_ns() > self.zero_ns + (self.at + MESSAGE) * 1_000_000_000 // RATE

    def begin(self, first: int = 0) -> None:
        """Begin an acquisition at sample ``first``."""
        if self.epoch is not None and self.at % self.width:
            self._tell("bin", self.epoch, self.bin, self.known, self.unknown, CUT)
        self.epoch, self.seq, self.at = time.time_ns(), 0, first
        self.known = self.unknown = 0
        self._state = CUT if first % self.width else WHOLE
        self.set_zero(monotonic_ns() - first * 1_000_000_000 // RATE)
        self._draw()

    def set_zero(self, zero_ns: int) -> None:
        """From now on sample 0 is at this host time."""
        self.zero_ns = zero_ns
        self._tell("zero", self.epoch, self.at, zero_ns)

    def spikes(self) -> NDArray[np.void]:
        """The spikes of the next message."""
        samples_S = self._block["sample"]
        low, high = np.searchsorted(samples_S, [self.at, self.at + MESSAGE])
        return self._block[low:high]

    def step(
        self,
        records: NDArray[np.void] | None = None,
        *,
        lost: bool = False,
        extra: NDArray[np.void] | None = None,
    ) -> SpikeBatch:
        """Send the next message when it is due.

        Parameters
        ----------
        records : ndarray of SPIKE_DTYPE, optional
            Its spikes, all of the open bin, if not those that were drawn.
        lost : bool
            It is not sent and never will be.
        extra : ndarray of SPIKE_DTYPE, optional
            Spikes beside these that do not belong to the open bin.
        """
        records = self.spikes() if records is None else records
        first, self.at = self.at, self.at + MESSAGE
        due_ns = self.zero_ns + self.at * 1_000_000_000 // RATE
        while (left := due_ns - monotonic_ns()) > 0:
            time.sleep(left / 1e9)
        sent = records if extra is None else np.concatenate([records, extra])
        sent_ns = monotonic_ns()
        batch = SpikeBatch(self.epoch or 0, self.seq, first, self.at, RATE, sent_ns, 0, sent)
        self.seq += 1
        if lost:
            self._state = HOLED if self._state == WHOLE else self._state
        else:
            unknown = int((records["unit"] >= len(self.units)).sum())
            self.known, self.unknown = self.known + len(records) - unknown, self.unknown + unknown
            self.sender.send(batch)
        if self.calm:
            self.lateness.record(sent_ns - due_ns)
        if self.at % self.width == 0:
            self._close()
        return batch

    def leave_out(self, bins: int) -> None:
        """The samples of so many bins are not recorded; only between two bins."""
        assert self.at % self.width == 0
        for bin_ in range(self.bin, self.bin + bins):
            self._tell("bin", self.epoch, bin_, 0, 0, ABSENT)
        self.at += bins * self.width
        self._draw()

    def align(self, messages: int = 0) -> None:
        """Send on to so many messages after the beginning of a bin."""
        while self.at % self.width != messages * MESSAGE:
            self.step()

    def announce(self) -> None:
        """Say who sends."""
        self.sender.announce(
            epoch=self.epoch or 0, rate=RATE, session=self.session, units=self.units
        )

    def _close(self) -> None:
        bin_ = self.bin - 1
        self._tell("bin", self.epoch, bin_, self.known, self.unknown, self._state)
        self.known = self.unknown = 0
        self._state = WHOLE
        self._draw()

    def _draw(self) -> None:
        """Draw the spikes of the bin that begins, or in the middle of which we begin."""
        if self.bursting:
            self.bursting -= 1
        elif self.rng.random() < self._burst_chance:
            self.bursting = BURST_BINS
        n = self.rng.poisson(self._per_bin * (BURST if self.bursting else 1))
        start = self.bin * self.width
        self._block = np.zeros(n, SPIKE_DTYPE)
        self._block["sample"] = np.sort(self.rng.integers(start, start + self.width, n))
        self._block["unit"] = self.rng.integers(0, len(self.units), n)
        if self.muted:
            self._block = self._block[~np.isin(self._block["unit"], self.numbers(self.muted))]

    def numbers(self, ids: Collection[str]) -> list[int]:
        """What records call units of these ids."""
        return [self.units.index(unit) for unit in ids]

    def mute(self, ids: Collection[str]) -> None:
        """From the next bin on these units no longer fire; only between two bins."""
        assert self.at % self.width == 0
        self.muted = set(ids)
        self._draw()
        if ids:
            self._tell("muted", sorted(ids))


def _tell(*entry: Any) -> None:
    sys.stdout.write(json.dumps(entry) + "\n")
    sys.stdout.flush()


def main(settings: dict[str, Any]) -> None:
    """Send until told to stop."""
    acquisition = Acquisition(**settings, tell=_tell)
    assert acquisition.sender.wait_for_subscriber(60)
    time.sleep(2.0)  # for those who connect a little later
    acquisition.begin()
    with quiet_machine(True):
        _obey(acquisition)
    _tell("end", acquisition.lateness.percentiles_ms())
    acquisition.sender.close()


def _obey(a: Acquisition) -> None:
    announced_ns = 0
    while True:
        if a.at % a.width == 0:
            if monotonic_ns() - announced_ns > 1_000_000_000:
                announced_ns = monotonic_ns()
                a.announce()
            if select.select([sys.stdin], [], [], 0)[0]:
                order = json.loads(sys.stdin.readline() or '["stop"]')
                if order[0] == "stop":
                    return
                a.calm, first = False, a.bin
                injected, expect = FAULTS[order[0]](a)
                while a.behind or a.at % a.width:  # what was held up is part of it
                    a.step()
                first = first if order[0] != "restarted" else 0
                _tell("done", order[0], injected, expect, a.epoch, first, a.bin)
                a.calm = True
        a.step()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
