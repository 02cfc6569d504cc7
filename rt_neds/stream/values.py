"""Raw outputs to published values in one compiled call; equal to ``readout.to_values``.

For a few behaviours the same in NumPy takes as long as the network.

Shape suffixes: T bins, O raw outputs, B behaviours, C steps of a continuous one, V values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np
from numpy.typing import NDArray

from rt_neds.model.readout import LOG_RATE_RANGE, SMEAR, STEPS, Behaviour, Scale

CONTINUOUS, POISSON, CATEGORICAL = range(3)
KINDS = {"continuous": CONTINUOUS, "poisson": POISSON, "categorical": CATEGORICAL}


@numba.njit(error_model="numpy", cache=True, nogil=True)
def write_values(raw_TO, kind_B, outputs_B, value_BC, limits_B2, share_C, values_TV):  # type: ignore[no-untyped-def]
    """Write mean and sd, rate, or probabilities of each behaviour in each bin.

    ``limits_B2`` bounds the log-rate of spikes; of a continuous behaviour it has the variance that
    smearing in training put into it, and the least that is left without.
    """
    for t in range(raw_TO.shape[0]):
        at = to = 0
        for b in range(kind_B.size):
            size = outputs_B[b]
            raw_C = raw_TO[t, at : at + size]
            at += size
            if kind_B[b] == POISSON:
                log_rate = max(np.float64(raw_C[0]), limits_B2[b, 0])
                values_TV[t, to] = math.exp(min(log_rate, limits_B2[b, 1]))
                to += 1
                continue
            top, total = raw_C[0], 0.0
            for c in range(1, size):
                top = max(top, raw_C[c])
            for c in range(size):
                share_C[c] = math.exp(np.float64(raw_C[c] - top))
                total += share_C[c]
            if kind_B[b] == CATEGORICAL:
                for c in range(size):
                    values_TV[t, to + c] = share_C[c] / total
                to += size
                continue
            mean = variance = 0.0
            for c in range(size):
                share_C[c] /= total
                mean += share_C[c] * value_BC[b, c]
            for c in range(size):
                variance += share_C[c] * (value_BC[b, c] - mean) ** 2
            variance = max(variance - limits_B2[b, 0], limits_B2[b, 1])
            values_TV[t, to], values_TV[t, to + 1] = mean, math.sqrt(variance)
            to += 2


class Values:
    """Turns raw outputs into values, in the order of the behaviours, without allocating.

    Parameters
    ----------
    behaviours : sequence of Behaviour
    scales : sequence of Scale
        One for each.
    bins : int
        Most bins of one call.

    Attributes
    ----------
    values_TV : ndarray of float32, shape (bins, values)
        Of the bins last given; overwritten by the next.
    """

    def __init__(self, behaviours: Sequence[Behaviour], scales: Sequence[Scale], bins: int) -> None:
        sizes = [values_of(b.kind, len(b.classes)) for b in behaviours]
        outputs = [b.outputs for b in behaviours]
        self.values_TV = np.zeros((bins, sum(sizes)), np.float32)
        self._of_behaviours = (
            np.array([KINDS[b.kind] for b in behaviours]),
            np.array(outputs),
            np.array([scale.values_C for scale in scales], np.float64).reshape(-1, STEPS),
            np.array(
                [
                    LOG_RATE_RANGE
                    if b.kind == "poisson"
                    else ((SMEAR * scale.step) ** 2, (0.5 * scale.step) ** 2)
                    for b, scale in zip(behaviours, scales, strict=True)
                ],
                np.float64,
            ).reshape(-1, 2),
            np.zeros(max(outputs, default=0)),
        )
        self.of(np.zeros((1, sum(outputs)), np.float32))  # compiles

    def of(self, raw_TO: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values (T, V) of some bins: a part of ``values_TV``."""
        values_TV = self.values_TV[: len(raw_TO)]
        write_values(raw_TO, *self._of_behaviours, values_TV)
        return values_TV


def values_of(kind: str, classes: int) -> int:
    """Published values of one output: mean and sd, a rate, or a probability per class."""
    return {"continuous": 2, "poisson": 1, "categorical": classes}[kind]
