"""What a worker knows of a stream, where whoever takes its place finds it.

Memory that forks share, and that outlives whoever wrote it: the step's past (keys and values, the
running sums, the memory) and how long each unit has been silent. A worker decodes in it; so it
costs nothing, and a worker that is killed has left it as it was after the last bin. Its successor
goes on with the acquisition as after a hole of the bins that nobody decoded. One that died or hung
in the middle of a step has left nothing to be trusted: then the successor begins anew.

Shape suffixes: N units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rt_neds.bundle import BundleSession, BundleSpec
from rt_neds.frames import BinnedFrame
from rt_neds.stream.board import shared
from rt_neds.stream.fused_arrays import past_words

_HEAD = np.dtype(
    [
        (name, "<i8")
        for name in (
            "silence_of",  # number of the session whose silences are counted; 0 for nobody's
            "past_of",  # the same of the past of the step
            "width",  # samples of its bins
            "epoch",
            "first_bin",  # of the run, and
            "next_bin",  # the one after the last that was decoded; not after the first: nothing
        )
    ]
)


class Kept:
    """Of one probe, for one worker after the other.

    To be made before workers are forked, one for each that may be alive at once.

    Parameters
    ----------
    spec : BundleSpec
        All of its sessions may come.
    """

    def __init__(self, spec: BundleSpec) -> None:
        self.context = spec.model.context
        self.number = {session.id: number for number, session in enumerate(spec.sessions, start=1)}
        self.head = shared(1, _HEAD)[0]
        most = max(len(session.longest_silence) for session in spec.sessions)
        self._silent_bins = shared(max(most, 1), np.dtype(np.int64))
        words = max(past_words(spec.model, len(session.units)) for session in spec.sessions)
        self.room = shared(words, np.dtype(np.float32))

    def reached(self, epoch: int) -> int | None:
        """The first sample of an acquisition that was not decoded; None if that is not known."""
        head = self.head
        if head["epoch"] != epoch or head["next_bin"] <= head["first_bin"]:
            return None
        return int(head["next_bin"] * head["width"])

    def silence(self, session: BundleSession) -> NDArray[np.int64]:
        """For how many bins each unit has been silent, to be counted on; zeros for another session
        than whose were counted last.
        """
        number = self.number[session.id]
        if self.head["silence_of"] != number:
            self.head["silence_of"] = 0  # nobody's, should we end now
            self._silent_bins[:] = 0
            self.head["silence_of"] = number
        return self._silent_bins[: len(session.longest_silence)]


class Past:
    """A session's past, as one worker keeps it.

    Parameters
    ----------
    kept : Kept
    session : BundleSession
    width : int
        Samples of a bin.
    """

    def __init__(self, kept: Kept, session: BundleSession, width: int) -> None:
        self.room: NDArray[np.float32] = kept.room
        self._head: Any = kept.head
        self._number, self._width = kept.number[session.id], width
        self._context = kept.context

    def join(self, frame: BinnedFrame) -> None:
        """Write on the first bin of a run what is known of that run, if the bin can go on from it.

        It can if it is of the same acquisition, and fewer bins than the context lie in between.
        """
        head = self._head
        known = int(head["next_bin"] - head["first_bin"])
        missed = int(frame.bin - head["next_bin"])
        ours = head["past_of"] == self._number and head["width"] == self._width
        if ours and head["epoch"] == frame.epoch and known > 0 and 0 <= missed < self._context:
            frame.known, frame.missed = known, missed

    def change(self, frame: BinnedFrame) -> None:
        """From this bin on it is being changed: until it is complete it is nobody's."""
        head = self._head
        head["next_bin"] = -1
        if frame.first_of_run:
            head["past_of"], head["width"], head["epoch"] = self._number, self._width, frame.epoch
            if not frame.known:
                head["first_bin"] = frame.bin

    def complete(self, frame: BinnedFrame) -> None:
        """It is what it should be after this bin."""
        self._head["next_bin"] = frame.bin + 1
