"""What is usual: how the spikes of the validation split compare with what was predicted of them.

Shape suffixes: T bins, N units, X stretches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offline.config import TrainConfig
from offline.predict import ahead_spans
from offline.windows import BinnedSession
from rt_neds.drift import Drift, Expectation
from rt_neds.model.neds import NEDS

STRETCH_S = 30.0
LEAST_STRETCHES, MOST_STRETCHES = 6, 20
SHORTEST_S = 5.0


def expectation_of(
    model: NEDS,
    binned: BinnedSession,
    config: TrainConfig,
    device: torch.device | str = "cpu",
) -> Expectation | None:
    """Surprise and bits per spike over stretches of the validation split.

    Parameters
    ----------
    model : NEDS
    binned : BinnedSession
    config : TrainConfig
    device : torch device
        Where the model is.

    Returns
    -------
    Expectation or None
        None if the network was not taught to predict the next bin, if it was trained on the
        validation split, too, or if that is too short to say what is usual.
    """
    if not config.masking.ahead or config.data.refit:
        return None
    spans = binned.spans("val")
    bin_s = config.data.bin_ms / 1000
    seconds = min(STRETCH_S, sum(b - a for a, b in spans) * bin_s / LEAST_STRETCHES)
    if seconds < SHORTEST_S:
        return None
    spans = list(_first(spans, round(MOST_STRETCHES * seconds / bin_s)))
    rates_N = mean_counts_N(binned)
    drift = Drift(rates_N, round(seconds / bin_s))
    kept_T = np.concatenate([np.arange(a, b) for a, b in spans])
    log_rate_TN = np.log(np.maximum(ahead_spans(model, binned, spans, device), 1e-12))
    stretches: list[Any] = []
    for bin_, log_rate_N in zip(kept_T, log_rate_TN, strict=True):
        drift.expect(log_rate_N)
        drift.take(binned.counts_TN(bin_, bin_ + 1)[0], bool(binned.scored_TM[bin_, 0]))
        if drift.complete:
            stretches.append(drift.now())
            drift.forget()
    if len(stretches) < LEAST_STRETCHES - 1:
        return None
    surprise_XN = np.stack([surprise_N for surprise_N, _ in stretches])
    return Expectation(
        rates=_short(rates_N),
        surprise=_short(surprise_XN.mean(axis=0)),
        sd=_short(surprise_XN.std(axis=0, ddof=1)),
        bits_per_spike=float(np.mean([bits for _, bits in stretches])),
        seconds=seconds,
    )


def _first(spans: list[tuple[int, int]], bins: int) -> Iterator[tuple[int, int]]:
    """The first bins of all spans: many sessions shall not be gone through whole."""
    for a, b in spans:
        if bins > 0:
            yield a, min(b, a + bins)
        bins -= b - a


def _short(array_N: NDArray) -> list[float]:
    return [round(float(number), 6) for number in array_N]


def mean_counts_N(binned: BinnedSession) -> NDArray[np.float64]:
    """Mean count per recorded bin of each unit in the training split."""
    spikes_N, bins = np.zeros(len(binned.session.unit_ids)), 0
    for a, b in binned.spans("train"):
        spikes_N += binned.spikes_N(a, b)
        bins += int(binned.scored_TM[a:b, 0].sum())
    return spikes_N / max(1, bins)
