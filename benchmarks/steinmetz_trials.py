"""Trials of the Steinmetz sessions: which side the wheel was turned to, and the spikes before.

Shape suffixes: K trials, T bins of a trial, N units, S spikes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rt_neds.session import load_session

BIN_S, BINS = 0.02, 20


@dataclass(frozen=True, eq=False)
class Trials:
    """Some go trials of one session, in order.

    Attributes
    ----------
    path : Path
        The session's file.
    animal : str
    index_K : ndarray of int
        Their rows in its ``trials``.
    counts_KTN : ndarray of float32
    side_K : ndarray of float64
        -1 left, +1 right.
    contrast_K2 : ndarray of float64
        Left and right.
    """

    path: Path
    animal: str
    index_K: NDArray[np.int64]
    counts_KTN: NDArray[np.float32]
    side_K: NDArray[np.float64]
    contrast_K2: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.side_K)

    def __getitem__(self, which: Any) -> Trials:
        return replace(
            self,
            index_K=self.index_K[which],
            counts_KTN=self.counts_KTN[which],
            side_K=self.side_K[which],
            contrast_K2=self.contrast_K2[which],
        )

    def until(self, ms: int) -> Trials:
        """The same trials, with spikes up to so long after the stimulus."""
        return replace(self, counts_KTN=self.counts_KTN[:, : round(ms / 1000 / BIN_S)])


def load_trials(path: Path) -> Trials:
    """The go trials of a session, their spikes counted from the stimulus on."""
    session = load_session(path)
    movement_K = session.column("trials.movement")
    index_K = np.flatnonzero(np.abs(movement_K) == 1)
    start_K = session.samples(session.column("trials.stim_on_time"))[index_K]
    width, N = round(BIN_S * session.rate), len(session.unit_ids)
    sample_S, unit_S = session.records_S["sample"], session.records_S["unit"].astype(np.int64)
    counts_KTN = np.zeros((len(index_K), BINS, N), np.float32)
    for k, start in enumerate(start_K):
        low, high = np.searchsorted(sample_S, [start, start + BINS * width])
        bin_S = (sample_S[low:high] - start) // width
        flat = np.bincount(bin_S * N + unit_S[low:high], minlength=BINS * N)
        counts_KTN[k] = flat.reshape(BINS, N)
    contrast_K2 = np.stack(
        [session.column(f"trials.contrast_{side}")[index_K] for side in ("left", "right")], axis=1
    )
    with h5py.File(path) as file:
        animal = str(file["subject"].attrs["id"])
    side_K = movement_K[index_K].astype(float)
    return Trials(path, animal, index_K, counts_KTN, side_K, contrast_K2)
