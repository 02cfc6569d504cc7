"""How long each unit was silent in training, at the most.

Shape suffixes: T bins, N units.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offline.windows import BinnedSession

SHORTEST_S = 300.0
"""Training from which this can be told: two minutes have not seen a unit's longest pause."""
LEAST_SPIKES = 20
PIECE = 5_000
"""Bins that are looked at together; bounds memory, changes nothing."""


def longest_silences(binned: BinnedSession) -> list[float]:
    """Seconds of recorded training bins, one after the other, without a spike of a unit.

    Returns
    -------
    list of float
        One for each unit; of one that hardly fired, all of training. Empty if training is shorter
        than five minutes.
    """
    bin_s = binned.width / binned.session.rate
    units = len(binned.session.unit_ids)
    longest_N, now_N, spikes_N = (np.zeros(units, np.int64) for _ in range(3))
    bins = 0
    for first, stop in binned.spans("train"):
        for low in range(first, stop, PIECE):
            high = min(low + PIECE, stop)
            fired_TN = binned.counts_TN(low, high)[binned.shown_TM[low:high, 0]] > 0
            if not len(fired_TN):
                continue
            bins += len(fired_TN)
            spikes_N += fired_TN.sum(axis=0)
            silent_TN = _silent_bins(fired_TN, now_N)
            longest_N = np.maximum(longest_N, silent_TN.max(axis=0))
            now_N = silent_TN[-1]
    if bins * bin_s < SHORTEST_S:
        return []
    longest_N[spikes_N < LEAST_SPIKES] = bins
    return [round(float(longest * bin_s), 3) for longest in longest_N]


def _silent_bins(fired_TN: NDArray[np.bool_], before_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bins since each unit last fired, at each bin; ``before_N`` were silent before the first."""
    bin_T1 = np.arange(len(fired_TN))[:, None]
    last_TN = np.maximum.accumulate(np.where(fired_TN, bin_T1, -1 - before_N), axis=0)
    return bin_T1 - last_TN
