"""Which units have fallen silent, and are better taken for missing than believed.

A sorter goes on announcing a unit that it has lost. To the network such a unit is one that does not
fire, which for a busy unit never happened in training: a single one of them can take all decoding
with it, where the learned stand-in of a missing unit costs little (decision 0021). A unit is taken
to have fallen silent once it was silent several times longer than it ever was in training, and is
back with its first spike.

Shape suffixes: N units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from numpy.typing import NDArray

from rt_neds.frames import BinnedFrame

TIMES = 5.0
"""How many times its longest silence in training: with three, units of recordings that were as they
should be were now and then taken so (decision 0021)."""
LEAST_S = 3.0
"""No silence shorter than this is one: training may not have held the animal's longest pause."""
LONGEST_S = 20.0
"""Units that were silent for longer in training fire too rarely to be missed: never taken so."""


@numba.njit(
    numba.int64(
        numba.float32[::1],  # counts_N
        numba.int64[::1],  # limit_N
        numba.int64[::1],  # silent_bins_N
    ),
    cache=True,
    nogil=True,
)
def count_silence(counts_N, limit_N, silent_bins_N):  # type: ignore[no-untyped-def]
    """Count one more bin; returns how many units crossed their limit, either way."""
    changed = 0
    for n in range(counts_N.shape[0]):
        before = silent_bins_N[n]
        if counts_N[n] > 0:
            silent_bins_N[n] = 0
            changed += before > limit_N[n]
        else:
            silent_bins_N[n] = before + 1
            changed += before == limit_N[n]
    return changed


class FallenSilent:
    """Counts the silence of each unit of a stream.

    Parameters
    ----------
    longest_s : sequence of float
        Longest silence of each unit in training, in seconds; empty if that is not known, and then
        no unit is ever taken to have fallen silent.
    bin_s : float
    history : int
        Bins that the read-in looks back; a limit is never shorter.
    missing_N : ndarray of bool, optional
        Units that are not in the stream, and so cannot fall silent.
    silent_bins_N : ndarray of int64, optional
        For how many bins each has been silent; counted on in place. Zeros unless given.

    Attributes
    ----------
    now_N : ndarray of bool or None
        Units that have fallen silent; None for none. A new array at every change, never altered.
    """

    def __init__(
        self,
        longest_s: Sequence[float],
        bin_s: float,
        history: int,
        missing_N: NDArray[np.bool_] | None = None,
        silent_bins_N: NDArray[np.int64] | None = None,
    ) -> None:
        longest_N = np.asarray(longest_s, np.float64)
        limit_N = np.ceil(np.maximum(TIMES * longest_N, LEAST_S) / bin_s).astype(np.int64)
        limit_N = np.maximum(limit_N, history)
        never_N = longest_N > LONGEST_S
        if missing_N is not None and len(longest_N):
            never_N |= missing_N
        limit_N[never_N] = np.iinfo(np.int64).max
        self._limit_N = limit_N
        if silent_bins_N is None:
            silent_bins_N = np.zeros(len(limit_N), np.int64)
        self._silent_bins_N = silent_bins_N
        self.now_N: NDArray[np.bool_] | None = None
        self._look()

    def go_on_from(self, before: FallenSilent) -> None:
        """Go on with the same session's units where another ended."""
        if len(before._silent_bins_N) == len(self._silent_bins_N):
            self._silent_bins_N[:] = before._silent_bins_N
            self._look()

    def take(self, frame: BinnedFrame) -> None:
        """Count a bin and write on it who has fallen silent; holes in a recording do not count.

        What was silent before an acquisition began anew still is.
        """
        known = frame.observed and len(self._limit_N)
        if known and count_silence(frame.counts_N, self._limit_N, self._silent_bins_N):
            self._look()
        frame.silent_N = self.now_N

    def _look(self) -> None:
        now_N = self._silent_bins_N > self._limit_N
        self.now_N = now_N if now_N.any() else None
