"""What the acquisition of ``rt-neds bench soak`` does wrong when it is told.

Each fault returns what was injected (a number) and the counters of ``serve`` that must then have
grown, and by how much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rt_neds.frames import SPIKE_DTYPE
from rt_neds.stream.silent import LEAST_S, TIMES
from rt_neds.wire import pack_spikes

if TYPE_CHECKING:
    from rt_neds.soak_sender import Acquisition

RATE = 30_000
MESSAGE = 30
"""Samples per message: a millisecond."""
BURST_BINS = 50
FAR = 36_000 * RATE
MUTED = 3
"""Units that fall silent together."""
PAUSES = 10
"""Mean intervals between two spikes of a unit that its longest pause is taken to be."""
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
    """Messages cut short, too long, of wrong types, of random bytes, or of another topic."""
    times, sent = 20, 0
    for _ in range(times):
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
    return sent - times, {f"{SOURCE}.malformed": sent - times, f"{SOURCE}.others": times}


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
