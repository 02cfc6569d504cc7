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
from rt_neds.serve import quiet_machine
from rt_neds.stream.raw import RawSender
from rt_neds.stream.silent import LEAST_S, TIMES
from rt_neds.wire import pack_spikes

RATE = 30_000
MESSAGE = 30
"""Samples per message: a millisecond."""
BURST = 10
BURST_BINS = 50
BETWEEN_BURSTS_S = 45.0
FAR = 36_000 * RATE
MUTED = 3
"""Units that fall silent together."""
PAUSES = 10
"""Mean intervals between two spikes of a unit that its longest pause is taken to be."""

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


# -- faults: what each does, and what counters must say of it ------------------------------------
# Each returns what was injected (a number) and the counters that must have grown, and by how much.

Expect = dict[str, int]
SOURCE, BINS, FRAMES = "source_counters", "bin_counters", "frame_counters"


def dropped(a: Acquisition) -> tuple[int, Expect]:
    """Messages that are never sent."""
    a.align(int(a.rng.integers(0, 20)))
    messages, first = int(a.rng.integers(3, 60)), a.bin
    for _ in range(messages):
        a.step(lost=True)
    last = (a.at - 1) // a.width
    return messages, {
        f"{SOURCE}.lost": messages,
        f"{BINS}.samples_lost": messages * MESSAGE,
        f"{BINS}.bins_unobserved": last - first + 1,
    }


def repeated(a: Acquisition) -> tuple[int, Expect]:
    """Messages that are sent again, at once and a while later."""
    old = a.step()
    for _ in range(3):
        a.sender.send(old)
    again = [a.step() for _ in range(4)]
    for batch in again:
        a.sender.send(batch)
    return 7, {f"{SOURCE}.repeated": 7}


def swapped(a: Acquisition) -> tuple[int, Expect]:
    """A message that comes after its successor: it counts as lost, and then as repeated."""
    pairs = 3
    for _ in range(pairs):
        a.align(5)
        early = a.step(lost=True)
        a.step()
        a.sender.send(early)
    return pairs, {
        f"{SOURCE}.lost": pairs,
        f"{SOURCE}.repeated": pairs,
        f"{BINS}.samples_lost": pairs * MESSAGE,
        f"{BINS}.bins_unobserved": pairs,
    }


def garbage(a: Acquisition) -> tuple[int, Expect]:
    """Messages cut short, too long, of wrong types, or of random bytes."""
    sent = 0
    for _ in range(20):
        topic, header, payload = pack_spikes(a.probe, a.step())
        noise = a.rng.integers(0, 256, 60, dtype=np.uint8).tobytes()
        for message in (
            [topic],
            [topic, header],
            [topic, header, payload + b"short"],
            [topic, header[:-3], payload],
            [topic, header, payload, b"extra"],
            [topic, b"\xc1" + noise, payload],
            [topic, b"\x81" * 1000, noise],
            [topic + b"0", header, payload],
        ):
            a.sender.send_frames(message)
            sent += 1
    return sent, {f"{SOURCE}.malformed": sent}


def late(a: Acquisition) -> tuple[int, Expect]:
    """Spikes whose bin has closed."""
    a.align(6)
    count = int(a.rng.integers(5, 50))
    a.step(extra=_spikes(a, count, a.at - 3 * a.width))
    return count, {f"{BINS}.spikes_late": count}


def disordered(a: Acquisition) -> tuple[int, Expect]:
    """A second of spikes that come out of order, the latest just before their bin closes."""
    a.align()
    moved, per_bin = 0, a.width // MESSAGE
    for _ in range(50):
        held = []
        for message in range(per_bin):
            records = a.spikes()
            held.append(records[::2][::-1])
            now = records[1::2][::-1]
            if message == per_bin - 1:
                now = np.concatenate([now, *held[::-1]])
            a.step(now)
        moved += sum(map(len, held))
    return moved, {}


def unknown(a: Acquisition) -> tuple[int, Expect]:
    """Spikes of units of which nobody knows."""
    a.align(3)
    count = int(a.rng.integers(5, 50))
    strange = _spikes(a, count, a.at)
    strange["unit"] = a.rng.integers(len(a.units), 1 << 32, count, dtype=np.uint64)
    a.step(np.concatenate([a.spikes(), strange]))
    return count, {f"{BINS}.spikes_unknown": count}


def absurd(a: Acquisition) -> tuple[int, Expect]:
    """Spikes hours ahead, and before the beginning of time."""
    a.align(3)
    ahead, before = 11, 7
    a.step(extra=np.concatenate([_spikes(a, ahead, a.at + FAR), _spikes(a, before, -(1 << 62))]))
    return ahead, {f"{BINS}.spikes_far": ahead, f"{BINS}.spikes_late": before}


def stalled_shortly(a: Acquisition) -> tuple[int, Expect]:
    """Nothing is sent for 0.4 s, and then all that was held up."""
    time.sleep(0.4)
    return 1, {f"{FRAMES}.stale": 1}


def stalled_long(a: Acquisition) -> tuple[int, Expect]:
    """Nothing is sent for 4 s, and then all that was held up."""
    time.sleep(4.0)
    return 1, {f"{FRAMES}.stale": 1}


def silent(a: Acquisition) -> tuple[int, Expect]:
    """Nothing is recorded for 4 s."""
    a.align()
    bins = 4 * RATE // a.width
    a.leave_out(bins)
    a.step()
    return bins, {
        f"{BINS}.bins_skipped": bins,
        f"{BINS}.samples_lost": bins * a.width,
        f"{FRAMES}.stale": 1,
        f"{FRAMES}.restarts": 1,
    }


def restarted(a: Acquisition) -> tuple[int, Expect]:
    """The acquisition ends in the middle of a bin, and another begins in the middle of one."""
    a.align(12)
    outside = a.known + a.unknown
    a.begin(first=20 * a.width + 11 * MESSAGE)
    a.announce()
    while a.at % a.width != a.width - MESSAGE:
        a.step()
    outside += a.known + a.unknown + len(a.spikes())
    a.step()
    return 1, {
        f"{SOURCE}.epochs": 1,
        f"{FRAMES}.restarts": 1,
        f"{BINS}.spikes_outside": outside,
    }


def units_silent(a: Acquisition) -> tuple[int, Expect]:
    """Units that go on being announced and no longer fire, and then fire again, each of them."""
    a.align()
    ids = {str(unit) for unit in a.rng.choice(a.units, MUTED, replace=False)}
    a.mute(ids)
    noticed_s = max(LEAST_S, TIMES * PAUSES * len(a.units) / a.spikes_per_s)
    until = a.bin + round((noticed_s + 3.0) * RATE / a.width)
    while a.bin < until:
        a.step()
    a.mute(())
    still = set(a.numbers(ids))
    while still:
        still -= set(a.step().records_S["unit"].tolist())
    return MUTED, {}


def renumbered(a: Acquisition) -> tuple[int, Expect]:
    """In the middle of a bin the acquisition says that its units are numbered otherwise."""
    a.align(7)
    a.units = [str(unit) for unit in a.rng.permutation(a.units)]
    a.announce()
    return 1, {f"{FRAMES}.restarts": 1}


def slipped(a: Acquisition) -> tuple[int, Expect]:
    """The sample clock jumps by 20 ms against the host's, this way or that."""
    a.align()
    a.set_zero(a.zero_ns + int(a.rng.choice([-1, 1])) * 20_000_000)
    return 1, {f"{FRAMES}.slips": 1}


def burst(a: Acquisition) -> tuple[int, Expect]:
    """A second of ten times as many spikes."""
    a.align()
    a.bursting = BURST_BINS
    last, total = a.bin + BURST_BINS, 0
    while a.bin <= last:
        total += len(a.step().records_S)
    return total, {}


def _spikes(a: Acquisition, count: int, first: int) -> NDArray[np.void]:
    records = np.zeros(count, SPIKE_DTYPE)
    records["sample"] = first + a.rng.integers(0, MESSAGE, count)
    records["unit"] = a.rng.integers(0, len(a.units), count)
    return records


FAULTS: dict[str, Callable[[Acquisition], tuple[int, Expect]]] = {
    made.__name__: made
    for made in (
        dropped, repeated, swapped, garbage, late, disordered, unknown, absurd, stalled_shortly,
        stalled_long, silent, restarted, units_silent, renumbered, slipped, burst,
    )
}  # fmt: skip


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
