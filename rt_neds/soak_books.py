"""The books of ``rt-neds bench soak``: every bin of the acquisition's clock, and what became of it.

The acquisition's ledger says which bins there were and what was in them; the decoded stream says
which came. What is in the first and not in the second needs a reason, by bin number, that either
``serve`` has stated or the acquisition knows to be its own doing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from rt_neds.frames import DecodedFrame, Flag
from rt_neds.latency import Latency
from rt_neds.soak_injected import RATE
from rt_neds.soak_sender import ABSENT, CUT, HOLED

MISSING = int(Flag.MISSING_UNITS)
Bin = tuple[int, int]
"""Epoch and number."""

PUBLISHED = "published"
NOT_RECORDED = "not recorded: a hole longer than the context"
CUT_SHORT = "cut short by the beginning or end of an epoch"
MISSED = "missed at a handover"
ON_ITS_WAY = "written at a handover, lost before it arrived"
UNACCOUNTED = "unaccounted"


class Sent(NamedTuple):
    """A bin in the ledger."""

    known: int
    unknown: int
    state: str


class Heard(NamedTuple):
    """A bin that came."""

    spikes: int
    unknown: int
    flags: int
    published_ns: int
    received_ns: int


class Books:
    """Of one run with one ``serve``."""

    def __init__(self) -> None:
        self.sent: dict[Bin, Sent] = {}
        self.heard: dict[Bin, Heard] = {}
        self.repeated = 0
        self.out_of_order = 0
        self.late = self.lost = self.unknown = 0
        """Sums over the frames that came."""
        self.handovers: list[tuple[Bin, Bin]] = []
        self.touched: list[tuple[int, int, int]] = []
        """Epoch, and first and last bin, of what a fault may have delayed."""
        self.muted: list[tuple[int, int, int]] = []
        """The same of bins in which units had been silenced."""
        self._zeros: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self._last: Bin | None = None

    def take_entry(self, entry: list[Any]) -> None:
        """Take an entry of the ledger."""
        if entry[0] == "zero":
            _, epoch, sample, zero_ns = entry
            self._zeros[epoch].append((sample, zero_ns))
        elif entry[0] == "bin":
            _, epoch, bin_, known, unknown, state = entry
            self.sent[epoch, bin_] = Sent(known, unknown, state)

    def take_frame(self, frame: DecodedFrame) -> None:
        """Take a frame that came."""
        key = (frame.epoch, frame.bin)
        self.late, self.lost = self.late + frame.late, self.lost + frame.lost
        self.unknown += frame.unknown
        if key in self.heard:
            self.repeated += 1
            return
        if self._last is not None and self._last[0] == key[0] and key[1] < self._last[1]:
            self.out_of_order += 1
        self._last = key
        stamps = frame.stamps
        self.heard[key] = Heard(
            frame.spikes, frame.unknown, frame.flags, stamps["published"], stamps["received"]
        )

    def take_handover(self, supervision: dict[str, Any]) -> None:
        """Take what the status says of the last handover."""
        told = supervision["handover"]
        if told is None:
            return
        before, after = ((told[end]["epoch"], told[end]["bin"]) for end in ("from", "to"))
        if not self.handovers or self.handovers[-1] != (before, after):
            self.handovers.append((before, after))

    def ended_ns(self, epoch: int, sample: int) -> int | None:
        """Host time of a sample by the acquisition's clock."""
        zero_ns = None
        for since, zero in self._zeros.get(epoch, ()):
            if since < sample:
                zero_ns = zero
        return None if zero_ns is None else zero_ns + sample * 1_000_000_000 // RATE

    def spikes_between(self, epoch: int, first: int, last: int) -> tuple[int, int]:
        """Spikes of known units that were sent in some bins, and that their frames have counted."""
        keys = [(epoch, n) for n in range(first, last) if (epoch, n) in self.sent]
        came = sum(self.heard[key].spikes for key in keys if key in self.heard)
        return sum(self.sent[key].known for key in keys), came

    def missing_in(self, epoch: int, first: int, last: int) -> int:
        """Frames of some bins that say that units are missing."""
        keys = ((epoch, n) for n in range(first, last + 1))
        return sum(bool(self.heard[key].flags & MISSING) for key in keys if key in self.heard)

    def fates(self) -> dict[str, int]:
        """How many bins came to which end; all of them are in it once."""
        fates = dict.fromkeys(
            (PUBLISHED, NOT_RECORDED, CUT_SHORT, MISSED, ON_ITS_WAY, UNACCOUNTED), 0
        )
        missed, on_its_way = self._lost_at_handovers()
        for key, sent in self.sent.items():
            if key in self.heard:
                fate = PUBLISHED
            elif sent.state == ABSENT:
                fate = NOT_RECORDED
            elif sent.state == CUT:
                fate = CUT_SHORT
            elif key in missed:
                fate = MISSED
            else:
                fate = ON_ITS_WAY if key in on_its_way else UNACCOUNTED
            fates[fate] += 1
        return fates

    def unaccounted(self) -> list[Bin]:
        """The bins without a reason."""
        missed, on_its_way = self._lost_at_handovers()
        return [
            key
            for key, sent in self.sent.items()
            if key not in self.heard
            and sent.state not in (ABSENT, CUT)
            and key not in missed
            and key not in on_its_way
        ]

    def _lost_at_handovers(self) -> tuple[set[Bin], set[Bin]]:
        """Bins that nobody wrote, and those that adjoin them and were written but not heard."""
        missed, on_its_way = set(), set()
        for (epoch, from_bin), (to_epoch, to_bin) in self.handovers:
            if epoch == to_epoch:
                missed |= {(epoch, n) for n in range(from_bin + 1, to_bin)}
            n = from_bin
            while (epoch, n) in self.sent and (epoch, n) not in self.heard:
                on_its_way.add((epoch, n))
                n -= 1
            n = to_bin
            while (to_epoch, n) in self.sent and (to_epoch, n) not in self.heard:
                on_its_way.add((to_epoch, n))
                n += 1
        return missed, on_its_way

    def check(self) -> dict[str, int]:
        """What must all be zero.

        Returns
        -------
        dict
            ``repeated`` and ``out_of_order`` frames; ``wrong_counts``: frames whose spikes are not
            those sent; ``never_sent``: frames of bins that were not in the ledger;
            ``holes_unflagged``: frames of bins with messages missing and no flag;
            ``missing_unasked``: frames that miss units when none was silenced.
        """
        counts = {
            "repeated": self.repeated,
            "out_of_order": self.out_of_order,
            "wrong_counts": 0,
            "never_sent": 0,
            "holes_unflagged": 0,
            "missing_unasked": 0,
        }
        if self.muted:
            flagged = sum(bool(heard.flags & MISSING) for heard in self.heard.values())
            counts["missing_unasked"] = flagged - sum(self.missing_in(*b) for b in self.muted)
        for key, heard in self.heard.items():
            sent = self.sent.get(key)
            if sent is None or sent.state in (ABSENT, CUT):
                counts["never_sent"] += 1
                continue
            counts["wrong_counts"] += (heard.spikes, heard.unknown) != (sent.known, sent.unknown)
            counts["holes_unflagged"] += sent.state == HOLED and not heard.flags
        return counts

    def record(self, width: int, latencies: dict[str, Latency]) -> None:
        """Add to histograms ``all`` and ``undisturbed`` (from a bin's intended end) and ``hop``."""
        disturbed = {
            (epoch, n) for epoch, first, last in self.touched for n in range(first, last + 1)
        }
        for key, heard in self.heard.items():
            ended_ns = self.ended_ns(key[0], (key[1] + 1) * width)
            if ended_ns is None:
                continue
            latencies["all"].record(heard.published_ns - ended_ns)
            if key not in disturbed:
                latencies["undisturbed"].record(heard.published_ns - ended_ns)
                latencies["receive_to_publish"].record(heard.published_ns - heard.received_ns)
