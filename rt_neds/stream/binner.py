"""Spikes to counts, by the probe's own clock.

A bin closes when the watermark passes its end, never because a spike of the next bin came, so bins
are a pure function of the stream: how it was cut into messages, and in which order spikes arrived
within the allowed lateness, cannot change them.

Shape suffixes: S spikes, R rows of the ring (open bins), N units, C = N + 2 columns of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numba
import numpy as np
from numpy.typing import NDArray

from rt_neds.clock import monotonic_ns
from rt_neds.frames import BinnedFrame, SpikeBatch

OPEN_BINS = 64
CHUNK = 8
"""Most closed bins that may wait to be decoded together."""
COUNTERS = (
    "bins",
    "bins_unobserved",
    "bins_skipped",
    "spikes",
    "spikes_unknown",
    "spikes_late",
    "spikes_far",
    "spikes_outside",
    "samples_lost",
)

_I8_READONLY = numba.types.Array(numba.int64, 2, "C", readonly=True)
_MAP_READONLY = numba.types.Array(numba.int32, 1, "C", readonly=True)


_TWO_COUNTS = numba.types.UniTuple(numba.int64, 2)


@numba.njit(
    _TWO_COUNTS(
        _I8_READONLY,  # records_S2
        _MAP_READONLY,  # row_of_unit_U
        numba.float32[:, ::1],  # ring_RC
        numba.int64,  # first_bin
        numba.int64,  # end_bin
        numba.int64,  # width
    ),
    cache=True,
    nogil=True,
    boundscheck=False,
)
def count_spikes(records_S2, row_of_unit_U, ring_RC, first_bin, end_bin, width):  # type: ignore[no-untyped-def]
    """Add the spikes of bins ``[first_bin, end_bin)`` to their rows of the ring.

    Parameters
    ----------
    records_S2 : int64 array, shape (spikes, 2)
        SPIKE_DTYPE records seen as pairs: sample, and unit in the low 32 bits.
    row_of_unit_U : int32 array
        Column of each stream unit; -1 for one that is not known.
    ring_RC : float32 array, shape (rows, units + 2)
        Counts; the last two columns of a row count unknown-unit spikes and known ones.
    first_bin, end_bin : int
        ``end_bin - first_bin`` is at most the number of rows.
    width : int
        Samples per bin.

    Returns
    -------
    tuple of int
        Spikes before ``first_bin``, and at or after ``end_bin``.
    """
    rows = ring_RC.shape[0]
    units = ring_RC.shape[1] - 2
    # Bounds of the bin last seen, which most spikes share, and how many of them it had since.
    row, low, high = 0, np.int64(0), np.int64(0)
    known = unknown = np.float32(0)
    before = beyond = np.int64(0)
    start, stop = first_bin * width, end_bin * width
    for i in range(records_S2.shape[0]):
        sample = records_S2[i, 0]
        if sample < start:
            before += 1
            continue
        if sample >= stop:
            beyond += 1
            continue
        if sample < low or sample >= high:
            ring_RC[row, units] += unknown
            ring_RC[row, units + 1] += known
            known = unknown = np.float32(0)
            bin_ = sample // width
            low, high, row = bin_ * width, (bin_ + 1) * width, bin_ % rows
        unit = records_S2[i, 1] & 0xFFFFFFFF
        column = row_of_unit_U[unit] if unit < row_of_unit_U.shape[0] else -1
        if column >= 0:
            ring_RC[row, column] += np.float32(1)
            known += np.float32(1)
        else:
            unknown += np.float32(1)
    ring_RC[row, units] += unknown
    ring_RC[row, units + 1] += known
    return before, beyond


@numba.njit(
    _TWO_COUNTS(numba.float32[:, ::1], numba.int64, numba.float32[::1]), cache=True, nogil=True
)
def empty_row(ring_RC, row, counts_N):  # type: ignore[no-untyped-def]
    """Move the counts of a row of the ring to ``counts_N``, and leave zeros.

    Returns
    -------
    tuple of int
        Its unknown-unit spikes and its known ones.
    """
    units = counts_N.shape[0]
    for n in range(units):
        counts_N[n] = ring_RC[row, n]
        ring_RC[row, n] = 0
    unknown, known = np.int64(ring_RC[row, units]), np.int64(ring_RC[row, units + 1])
    ring_RC[row, units] = ring_RC[row, units + 1] = 0
    return unknown, known


def as_pairs(records_S: NDArray[np.void]) -> NDArray[np.int64]:
    """See SPIKE_DTYPE records as the int64 pairs the kernel takes; copies only if unaligned."""
    flags = records_S.flags
    if not (flags.c_contiguous and flags.aligned):
        records_S = records_S.copy()
    return records_S.view(np.int64).reshape(-1, 2)


class Binner:
    """Turns batches into closed bins, in order, each exactly once.

    Parameters
    ----------
    row_of_unit_U : ndarray of int32
        For each unit number of the stream its column, or -1 if it is not known.
    units : int
        Columns of the counts.
    width : int
        Samples per bin.
    context : int
        Bins of context of the decoder. A hole of at least so many bins is skipped, because nothing
        from before it can matter after it; a shorter one is filled with unobserved bins.
    lateness : int
        Samples by which bins are held open past their end, for sources whose spikes come late.

    Attributes
    ----------
    counters : dict of str to int
        Every spike ends in exactly one of ``spikes`` and ``spikes_unknown`` (in a closed bin),
        ``spikes_late`` (its bin was closed), ``spikes_far`` (beyond all open bins: absurd) and
        ``spikes_outside`` (in bins never published: before the first whole bin, or skipped). Then
        ``bins``, of which ``bins_unobserved``; ``bins_skipped``; ``samples_lost``.
    """

    def __init__(
        self,
        row_of_unit_U: NDArray[np.int32],
        units: int,
        width: int,
        context: int,
        lateness: int = 0,
    ) -> None:
        self.width = width
        self.context = context
        self.lateness = lateness
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._row_of_unit_U = np.ascontiguousarray(row_of_unit_U, dtype=np.int32)
        rows = OPEN_BINS + -(-lateness // width)
        self._ring_RC = np.zeros((rows, units + 2), np.float32)
        self._counts_of_frame = np.zeros((1 + CHUNK, units), np.float32)
        self._epoch: int | None = None
        self._next_bin = 0  # the oldest bin still open
        self._end = 0  # samples are complete, or known to be lost, up to here
        self._holes: list[tuple[int, int]] = []  # missing sample ranges that touch open bins
        self._late = self._lost = 0
        self._first_of_run = True
        self._anew = False  # the decoder has forgotten what came before, the bins have not

    def go_on_from(self, before: Binner) -> None:
        """Go on in the middle of the bin where another ended that numbered units otherwise.

        Columns are those of the bundle, whatever numbers the stream has for them: what was counted
        stays counted.
        """
        assert before._ring_RC.shape == self._ring_RC.shape
        self.counters, self._ring_RC = before.counters, before._ring_RC
        self._epoch, self._next_bin, self._end = before._epoch, before._next_bin, before._end
        self._holes, self._late, self._lost = before._holes, before._late, before._lost
        self._first_of_run, self._anew = before._first_of_run, True

    def frames(self, batch: SpikeBatch) -> Iterator[BinnedFrame]:
        """Take in a batch and yield the bins it closes; a frame lasts until ``CHUNK`` more came."""
        if batch.epoch != self._epoch:
            yield from self._close_complete(batch)
            self._begin_run(batch.first)
            self._epoch = batch.epoch
        elif batch.first > self._end:
            yield from self._pass_hole(batch)
        self._end = max(self._end, batch.end)
        self._lost += batch.lost
        closing = (self._end - self.lateness) // self.width
        records_S2 = as_pairs(batch.records_S)
        rows = len(self._ring_RC)
        counted_to = self._next_bin + rows
        before, beyond = self._count(records_S2, self._next_bin, counted_to)
        if before:
            self._note_early_or_late(before)
        while True:
            yield from self._close_to(min(closing, counted_to) if beyond else closing, batch)
            # Bins that closed made room: what lay beyond the open ones is counted further on.
            open_to = max(counted_to, self._next_bin + rows)
            if not beyond or open_to == counted_to:
                break
            _, beyond = self._count(records_S2, counted_to, open_to)
            counted_to = open_to
        self.counters["spikes_far"] += beyond

    @property
    def left(self) -> int:
        """Samples that are to come until the oldest open bin closes."""
        return (self._next_bin + 1) * self.width + self.lateness - self._end

    def _count(
        self, records_S2: NDArray[np.int64], first_bin: int, end_bin: int
    ) -> tuple[int, int]:
        """Count spikes into some of the open bins; return how many lay before and beyond them."""
        ring_RC, width = self._ring_RC, self.width
        return count_spikes(records_S2, self._row_of_unit_U, ring_RC, first_bin, end_bin, width)

    def _note_early_or_late(self, spikes: int) -> None:
        if self._first_of_run:  # nothing has closed yet: they lie in the bin we joined midway
            self.counters["spikes_outside"] += spikes
        else:
            self.counters["spikes_late"] += spikes
            self._late += spikes

    def _begin_run(self, first: int) -> None:
        """Open bins anew from ``first``; what was open lacks samples and is never published."""
        self.counters["spikes_outside"] += int(self._ring_RC[:, -2:].sum())
        self._ring_RC[:] = 0.0
        self._holes.clear()
        # The bin we join in the middle of can never be complete: start with the next whole one.
        self._next_bin = -(-first // self.width)
        self._end = first
        self._first_of_run = True

    def _pass_hole(self, batch: SpikeBatch) -> Iterator[BinnedFrame]:
        start, end = self._end, batch.first
        self.counters["samples_lost"] += end - start
        whole_bins = end // self.width - -(-start // self.width)
        if whole_bins < self.context:
            self._holes.append((start, end))
            return
        # Nothing from before can matter after it: skip the bins, and account for them.
        yield from self._close_complete(batch)
        oldest_open = self._next_bin
        self._begin_run(end)
        self.counters["bins_skipped"] += self._next_bin - oldest_open

    def _close_complete(self, batch: SpikeBatch) -> Iterator[BinnedFrame]:
        """Close what was only held open for spikes that come late: none of its own will."""
        return self._close_to(self._end // self.width, batch)

    def _close_to(self, bin_: int, batch: SpikeBatch) -> Iterator[BinnedFrame]:
        while self._next_bin < bin_:
            yield self._close(batch)

    def _close(self, batch: SpikeBatch) -> BinnedFrame:
        bin_, width = self._next_bin, self.width
        start, end = bin_ * width, (bin_ + 1) * width
        observed = True
        if self._holes:
            observed = not any(hole[0] < end and hole[1] > start for hole in self._holes)
            self._holes = [hole for hole in self._holes if hole[1] > end]
        counts_N = self._counts_of_frame[self.counters["bins"] % len(self._counts_of_frame)]
        unknown, known = empty_row(self._ring_RC, bin_ % len(self._ring_RC), counts_N)
        assert self._epoch is not None
        frame = BinnedFrame(
            epoch=self._epoch,
            bin=bin_,
            end=end,
            counts_N=counts_N,
            observed=observed,
            spikes=known,
            unknown=unknown,
            late=self._late,
            lost=self._lost,
            first_of_run=self._first_of_run or self._anew,
            sent_ns=batch.sent_ns,
            received_ns=batch.received_ns,
            binned_ns=monotonic_ns(),
        )
        self._next_bin += 1
        self._late = self._lost = 0
        self._first_of_run = self._anew = False
        counters = self.counters
        counters["bins"] += 1
        counters["bins_unobserved"] += not observed
        counters["spikes"] += known
        counters["spikes_unknown"] += unknown
        return frame
