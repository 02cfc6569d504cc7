"""Samples of a SpikeGLX probe to batches of spikes: what the detector finds, and what was lost.

Shape suffixes: S samples, C channels.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rt_neds.frames import SPIKE_DTYPE, SpikeBatch
from rt_neds.spikeglx_wire import LINK_ERRORS, MAX_FETCH, MISSED

_NO_SPIKES = np.zeros(0, SPIKE_DTYPE)


class Detector(Protocol):
    """Finds spikes in samples.

    Attributes
    ----------
    units : tuple of str
        Unit ids, in the order of the unit numbers.
    channels : int
        AP channels it is for.
    settle : int
        After a reset nothing is found in so many samples.
    """

    units: tuple[str, ...]
    channels: int
    settle: int

    def check_source(
        self,
        rate: float,
        position_C2: NDArray[np.float64] | None = None,
        uv_per_bit: float | None = None,
    ) -> None:
        """Raise an error, for a person, if it was made for another probe."""

    def reset(self, first: int) -> None:
        """Forget everything; the next sample has this number."""

    def detect(self, samples_SC: NDArray[np.int16], first: int) -> tuple[NDArray[np.void], int]:
        """Spikes by sample, in an array of their own, and up to which sample all are given."""


class Samples:
    """The samples of one probe, in order, run after run.

    Parameters
    ----------
    detector : Detector
    counters : dict of str to int
        Counts on ``samples``, ``spikes``, ``epochs``, ``lost``, ``missed``, ``skipped`` and
        ``link_*``.

    Attributes
    ----------
    epoch : int
        The run; 0 before the first.
    next : int
        The first sample that has not come yet.
    ready : deque of SpikeBatch
        What is complete; for the caller to take.
    """

    def __init__(self, detector: Detector, counters: dict[str, int]) -> None:
        self.epoch = self.next = 0
        self.ready: deque[SpikeBatch] = deque()
        self._detector, self._counters = detector, counters
        self._ap_SC = np.zeros((0, 0), np.int16)
        self._rate = 0.0
        self._seq = 0
        self._end = 0  # complete up to here
        self._broken = True  # what comes next does not follow what came
        self._lost = 0

    def meet(self, ap: int, rate: float) -> None:
        """So many AP channels are sampled at this rate."""
        self._rate = rate
        if self._ap_SC.shape != (MAX_FETCH, ap):
            self._ap_SC = np.zeros((MAX_FETCH, ap), np.int16)

    def begin(self, epoch: int, first: int) -> None:
        """A new run: what the detector still holds of the last can never be complete."""
        self._counters["epochs"] += 1
        self.epoch = epoch
        self._seq = self._lost = 0
        self._go_on_at(first)

    def give_up_to(self, sample: int) -> None:
        """The samples up to this one are held no more."""
        if self._seq:
            self._skip_to(sample, "skipped")
        else:  # of this run nothing was stated yet that could have a gap
            self._go_on_at(sample)

    def take(self, first: int, samples_SC: NDArray[np.int16], received_ns: int) -> None:
        """Take in samples from ``first`` on; status words follow the AP channels."""
        ap = self._ap_SC.shape[1]
        self._counters["samples"] += len(samples_SC)
        if first > self.next:
            self._skip_to(first, "skipped")
        status_S = np.bitwise_or.reduce(samples_SC[:, ap:], axis=1)
        bits = int(np.bitwise_or.reduce(status_S))
        for name, bit in LINK_ERRORS.items():
            if bits & bit:
                self._counters[f"link_{name}"] += int(np.count_nonzero(status_S & bit))
        if not bits & MISSED:
            self._detect(samples_SC[:, :ap], received_ns)
            return
        missed_S = (status_S & MISSED) != 0
        edges = np.flatnonzero(np.diff(missed_S)) + 1
        for start, end in zip([0, *edges], [*edges, len(missed_S)], strict=True):
            if missed_S[start]:
                self._skip_to(self.next + int(end - start), "missed")
            else:
                self._detect(samples_SC[start:end, :ap], received_ns)
        if missed_S[-1]:  # say so now: the next sample may be long in coming
            self._state(self.next, self.next, _NO_SPIKES, received_ns)

    def _go_on_at(self, sample: int) -> None:
        self.next = self._end = sample
        self._broken = True

    def _skip_to(self, sample: int, kind: str) -> None:
        """Take in that the samples up to this one will not come."""
        lost = sample - self.next
        self._counters["lost"] += lost
        self._counters[kind] += lost
        self._lost += lost
        self.next = sample
        self._broken = True

    def _detect(self, samples_SC: NDArray[np.int16], received_ns: int) -> None:
        """Give samples that follow each other to the detector, and make ready what it finds."""
        first = self.next
        if self._broken:
            self._detector.reset(first)
            self._broken = False
            self._end = first + self._detector.settle
        ap_SC = self._ap_SC[: len(samples_SC)]
        ap_SC[:] = samples_SC
        self.next += len(samples_SC)
        found_S, complete = self._detector.detect(ap_SC, first)
        assert complete <= self.next, "a detector cannot know what has not come"
        self._counters["spikes"] += len(found_S)
        if complete >= self._end:  # until it has settled there is nothing to state
            self._state(self._end, complete, found_S, received_ns)

    def _state(self, first: int, end: int, records_S: NDArray[np.void], received_ns: int) -> None:
        # SpikeGLX states no time of sending; when it came is the first that is known.
        batch = SpikeBatch(
            self.epoch, self._seq, first, end, self._rate, received_ns, received_ns, records_S,
            self._lost, self.next,
        )  # fmt: skip
        self.ready.append(batch)
        self._seq += 1
        self._end, self._lost = end, 0
