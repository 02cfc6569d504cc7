"""The three nouns that flow: SpikeBatch -> BinnedFrame -> DecodedFrame.

Shape suffixes, here and everywhere: T bins, N units, V values, S spikes.
Time is an int64 count of probe samples; host time is int64 monotonic nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntFlag

import numpy as np
from numpy.typing import NDArray

SPIKE_DTYPE = np.dtype([("sample", "<i8"), ("unit", "<u4"), ("spare", "<u4")])
"""One spike, 16 bytes: the same on the wire, in memory and in the kernel."""


class Flag(IntFlag):
    """Reasons to distrust a decoded frame; with no bit set nothing is known against it.

    Attributes
    ----------
    GAP
        Samples are missing somewhere in the context (lost messages, or not recorded).
    LATE
        The frame came out more than one bin after its end, or spikes came after their bin closed.
    WARMING
        Fewer bins than the context, or the span of the memory, have been seen.
    STALE
        The source had been silent for longer than it should.
    SLIPPED
        The sample clock jumped against the host clock.
    RESTARTED
        The acquisition began anew, or another process decodes, and that is not yet a context ago.
    UNKNOWN_UNITS
        Spikes came from units the bundle does not know.
    MISSING_UNITS
        Units of the bundle are not in the stream; their learned stand-in is used.
    """

    GAP = 1
    LATE = 2
    WARMING = 4
    STALE = 8
    SLIPPED = 16
    RESTARTED = 32
    UNKNOWN_UNITS = 64
    MISSING_UNITS = 128


@dataclass(slots=True)
class SpikeBatch:
    """What a source read: every spike of the samples ``[first, end)``, in any order.

    Attributes
    ----------
    epoch : int
        One acquisition run; samples and sequence numbers restart with it.
    seq : int
        Number of the message inside the epoch.
    first, end : int
        Samples this batch completes; ``end`` is the watermark.
    rate : float
        Samples per second of the probe.
    sent_ns, received_ns : int
        Host monotonic time of sender and receiver.
    records_S : ndarray of SPIKE_DTYPE
        The spikes. It may be a view of a buffer that the next read overwrites.
    lost : int
        Messages missing just before this one.
    newest : int or None
        Where the source has come to by ``received_ns``, if it holds back what may not be complete.
    """

    epoch: int
    seq: int
    first: int
    end: int
    rate: float
    sent_ns: int
    received_ns: int
    records_S: NDArray[np.void]
    lost: int = 0
    newest: int | None = None


@dataclass(slots=True)
class BinnedFrame:
    """One closed bin.

    Attributes
    ----------
    bin, end : int
        Bin number in the epoch and the first sample after it.
    counts_N : ndarray of float32, shape (units,)
        Spikes per unit of the bundle. A view that the next bin overwrites.
    observed : bool
        False if any sample of the bin is missing: the counts are then not to be believed.
    spikes, unknown : int
        Spikes in this bin from known and from unknown units.
    late, lost : int
        Spikes that came after their bin closed, and messages lost, since the frame before.
    first_of_run : bool
        True for the first bin after a start, a restart or a gap longer than the context: nothing
        from before can matter any more, but for what is ``known``.
    known, missed : int
        Of a first bin: bins of its run that a worker before this one has decoded and left in
        memory, and how many after those nobody has. 0 and 0: the run is not known.
    silent_N : ndarray of bool or None
        Units that have fallen silent, to be taken for missing; None for none. The same array as in
        the bin before, unless it changed.
    live_M : ndarray of float32 or None
        Behaviours observed live, at the bin's right edge, NaN where one is not; None if none are. A
        view that the next bins overwrite.
    """

    epoch: int
    bin: int
    end: int
    counts_N: NDArray[np.float32]
    observed: bool
    spikes: int
    unknown: int
    late: int
    lost: int
    first_of_run: bool
    sent_ns: int
    received_ns: int
    binned_ns: int = 0
    silent_N: NDArray[np.bool_] | None = None
    live_M: NDArray[np.float32] | None = None
    known: int = 0
    missed: int = 0


@dataclass(slots=True)
class DecodedFrame:
    """What goes out for one bin: values, reasons to distrust them, and the time of every hop.

    Attributes
    ----------
    values_V : ndarray of float32, shape (values,)
        Flat, in the order of the schema. A view that the next bin overwrites.
    flags : int
        Bits of :class:`Flag`.
    stamps : dict of str to int
        ``sent, received, binned, decoded, published``, host monotonic ns; and ``ended``, the bin's
        end by the clock fit, while the stream is known to be real time.
    allowed_ns : int
        How long after its end it may go out and is not late. Not on the wire.
    """

    probe: str
    epoch: int
    bin: int
    end: int
    values_V: NDArray[np.float32]
    flags: int
    spikes: int
    late: int
    unknown: int
    lost: int
    model: str
    stamps: dict[str, int] = field(default_factory=dict)
    allowed_ns: int = 0
