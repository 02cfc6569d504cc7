"""The spikes that a detector finds in a whole recording: what ``serve`` would have seen live."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from offline.prepare.recording import Raw
from rt_neds.frames import SPIKE_DTYPE
from rt_neds.stream.detector import Detector

Tell = Callable[[str, float], None]
"""Told what is being done and how much of it is."""


def detect_recording(
    raw: Raw, detector: Detector, tell: Tell = lambda what, done: None
) -> tuple[NDArray[np.void], int, int]:
    """Run a detector over a recording.

    Parameters
    ----------
    raw : Raw
    detector : Detector
        Reset first.
    tell : callable

    Returns
    -------
    spikes : ndarray of SPIKE_DTYPE
    first, end : int
        The samples in which spikes could be found: without the beginning, in which filters settle,
        and the end, which nothing follows.

    Raises
    ------
    DetectorError
        The detector was made for another probe, rate or gain.
    """
    detector.check_source(raw.rate, raw.position_C2, raw.uv_per_bit)
    detector.reset(0)
    found, complete = [np.empty(0, SPIKE_DTYPE)], 0
    for at, samples_SC in raw.pieces(0, raw.samples):
        spikes, complete = detector.detect(samples_SC, at)
        found.append(spikes)
        tell("spikes", (at + len(samples_SC)) / raw.samples)
    return np.concatenate(found), detector.settle, complete
