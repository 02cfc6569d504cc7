"""A made-up session whose counts and behaviours are given outright."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offline.windows import BinnedSession
from rt_neds.frames import SPIKE_DTYPE
from rt_neds.session import Session

WIDTH = 600


def binned_session(
    counts_TN: NDArray[np.int64],
    value_T: NDArray[np.float64],
    name: str = "speed",
    **others: NDArray,
) -> BinnedSession:
    """A session with these counts and behaviours, split 60/20/20 in time, all of it recorded."""
    bins, units = counts_TN.shape
    at, unit = np.nonzero(counts_TN)
    repeats = counts_TN[at, unit]
    records = np.zeros(repeats.sum(), SPIKE_DTYPE)
    records["sample"] = np.repeat(at, repeats) * WIDTH + WIDTH // 2
    records["unit"] = np.repeat(unit, repeats)
    session = Session(
        path=Path("made-up.h5"),
        id="made-up",
        rate=30_000.0,
        unit_ids=[f"u{n}" for n in range(units)],
        records_S=records,
        domain_K2=np.array([[0, bins * WIDTH]]),
        _data=None,
    )
    values = [np.zeros(bins), value_T, *others.values()]
    split_T = np.repeat([0, 1, 2], [bins * 6 // 10, bins * 2 // 10, bins * 2 // 10])
    return BinnedSession(
        session=session,
        width=WIDTH,
        values_TM=np.stack(values, axis=1).astype(np.float32),
        shown_TM=np.ones((bins, len(values)), bool),
        scored_TM=np.ones((bins, len(values)), bool),
        split_T=split_T.astype(np.int8),
        trial_T=np.full(bins, -1, np.int32),
        present=(name, *others),
    )
