"""Do the units still fire as the network expects?

A network that was taught to predict each bin's spikes from the bins before it (``masking.ahead``)
notices by itself when units were lost or exchanged, the probe has moved, or the animal does what it
never did: what comes is then less likely (or, where units fell silent, more likely) under its own
prediction than it says itself. What is decoded then is not to be believed either. The same few
lines run over the validation split once, for what is usual, and over the stream.

Two numbers, over the last stretch of time. With counts ``y`` and predicted rates ``r``:

* ``surprise``: the log-likelihood less what it should be if the prediction were true, in standard
  deviations: ``sum((y - r) log r) / sqrt(sum(r log(r)^2))``.
* ``bits_per_spike``: the log-likelihood less that of the constant rates of training, per spike
  (NEDS, arXiv 2504.08201, section 4). For people: it does **not** tell drift, for when units are
  lost or exchanged the constant rates suffer more than the network, and it rises
  (``docs/decisions/0020``).

Shape suffixes: N units.
"""

from __future__ import annotations

import math
from collections import deque

import msgspec
import numpy as np
from numpy.typing import NDArray

from rt_neds.model.readout import LOG_RATE_RANGE

UNUSUAL_SDS = 4.0
"""Standard deviations from the usual surprise that count as drifted."""
LEAST_RATE = 1e-4
"""Spikes per bin of a unit that was silent in training; of none, a single spike would be infinite
news."""


class Expectation(msgspec.Struct, frozen=True):
    """What was usual on the validation split, part of a bundle's session.

    Attributes
    ----------
    rates : list of float
        Mean count per bin of each unit in the training split.
    surprise, sd : float
        Mean and spread of the surprise over stretches of the validation split; by its definition
        they are 0 and 1 for a network that knows all that can be known.
    bits_per_spike : float
        Mean over the same stretches.
    seconds : float
        How long a stretch is.
    """

    rates: list[float]
    surprise: float
    sd: float
    bits_per_spike: float
    seconds: float


class Drift:
    """Surprise and bits per spike over the last stretch.

    Parameters
    ----------
    rates_N : array_like
        Mean count per bin of each unit.
    bins : int
        Bins of a stretch; before so many are seen nothing is said.
    known_N : ndarray of bool, optional
        Units that are in the stream; the others are left out.
    """

    PARTS = 10

    def __init__(
        self, rates_N: NDArray | list[float], bins: int, known_N: NDArray[np.bool_] | None = None
    ) -> None:
        usual_N = np.maximum(np.asarray(rates_N, np.float32), np.float32(LEAST_RATE))
        self._known_N = np.ones(len(usual_N), bool) if known_N is None else known_N
        self._log_usual_N = np.log(usual_N[self._known_N])
        self._usual = float(usual_N[self._known_N].sum())
        self._part = max(1, -(-bins // self.PARTS))
        self._parts: deque[NDArray[np.float64]] = deque(maxlen=self.PARTS)
        self._sums, self._bins = np.zeros(4), 0
        self._log_rate_N: NDArray[np.float32] | None = None

    def expect(self, log_rate_N: NDArray[np.float32] | None) -> None:
        """Take in the log-rates predicted for the next bin; None if nobody knows."""
        self._log_rate_N = (
            None if log_rate_N is None else np.clip(log_rate_N, *LOG_RATE_RANGE)[self._known_N]
        )

    def take(self, counts_N: NDArray[np.float32], observed: bool) -> None:
        """Compare a bin with what was predicted for it."""
        if self._log_rate_N is None or not observed:
            return
        counts_N, log_rate_N = counts_N[self._known_N], self._log_rate_N
        rate_N = np.exp(log_rate_N)
        weight_N = rate_N * log_rate_N
        likely = float(counts_N @ log_rate_N)
        self._sums += (
            likely - float(weight_N.sum()),
            float(weight_N @ log_rate_N),
            likely - float(counts_N @ self._log_usual_N) - float(rate_N.sum()) + self._usual,
            float(counts_N.sum()),
        )
        self._bins += 1
        if self._bins == self._part:
            self._parts.append(self._sums)
            self._sums, self._bins = np.zeros(4), 0

    def forget(self) -> None:
        """Begin a new stretch."""
        self._parts.clear()
        self._sums, self._bins = np.zeros(4), 0

    @property
    def complete(self) -> bool:
        """Whether the last bin completed a part of a stretch."""
        return self._bins == 0 and len(self._parts) == self.PARTS

    def now(self) -> tuple[float, float]:
        """Surprise and bits per spike of the last stretch; NaN before one is over."""
        if len(self._parts) < self.PARTS:
            return math.nan, math.nan
        score, variance, gain, spikes = np.sum(self._parts, axis=0).tolist()
        surprise = score / math.sqrt(variance) if variance else math.nan
        return surprise, gain / math.log(2) / spikes if spikes else math.nan

    def status(self, usual: Expectation) -> dict[str, float | bool | None]:
        """``drift`` of the status message.

        Returns
        -------
        dict
            ``surprise`` of the last ``seconds``, in standard deviations from the usual, and
            ``bits_per_spike``, None before they are over; ``expected``: the usual bits per spike;
            ``drifted``.
        """
        surprise, bits = self.now()
        off = (surprise - usual.surprise) / max(usual.sd, 1.0)
        return {
            "surprise": None if math.isnan(off) else round(off, 2),
            "bits_per_spike": None if math.isnan(bits) else round(bits, 4),
            "expected": round(usual.bits_per_spike, 4),
            "seconds": round(usual.seconds, 2),
            "drifted": abs(off) > UNUSUAL_SDS,
        }
