"""Do the units still fire as the network expects?

A network that was taught to predict each bin's spikes from the bins before it (``masking.ahead``)
notices by itself when units were lost or exchanged, the probe has moved, or the animal does what it
never did: what comes is then less likely (or, where units fell silent, more likely) under its own
prediction than it says itself. What is decoded then is not to be believed either. The same few
lines run over the validation split once, for what is usual, and over the stream.

Of the last stretch of time, with counts ``y`` and predicted rates ``r`` of a unit:

* its ``surprise`` is its log-likelihood less what that should be if the prediction were true, in
  standard deviations: ``sum((y - r) log r) / sqrt(sum(r log(r)^2))``; of all units together, the
  root mean square of these over what was usual of each. About 1 is as it should be.
* ``bits_per_spike`` is the log-likelihood less that of the constant rates of training, per spike
  (NEDS, arXiv 2504.08201, section 4). For people: it does **not** tell drift (decision 0020).

Shape suffixes: N units.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rt_neds.model.readout import LOG_RATE_RANGE

UNUSUAL = 2.0
"""Surprise that counts as drifted."""
MOST_OFF = 5
"""Units that are named, at the most."""
LEAST_RATE = 1e-4
"""Spikes per bin of a unit that was silent in training; of none, a single spike would be infinite
news."""


class Expectation(msgspec.Struct, frozen=True):
    """What was usual on the validation split, part of a bundle's session.

    Attributes
    ----------
    rates : list of float
        Mean count per bin of each unit in the training split.
    surprise, sd : list of float
        Mean and spread of each unit's surprise over stretches of the validation split; by its
        definition they are 0 and 1 for a network that knows all that can be known.
    bits_per_spike : float
        Mean over the same stretches.
    seconds : float
        How long a stretch is.
    """

    rates: list[float]
    surprise: list[float]
    sd: list[float]
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
        self._usual_N = usual_N[self._known_N]
        self._log_usual_N = np.log(self._usual_N)
        self._part = max(1, -(-bins // self.PARTS))
        self._parts: deque[NDArray[np.float64]] = deque(maxlen=self.PARTS)
        self._log_rate_N: NDArray[np.float32] | None = None
        self._begin()

    def _begin(self) -> None:
        """A new part: of each unit score, variance, gain and spikes."""
        self._sums_4N, self._bins = np.zeros((4, len(self._log_usual_N))), 0

    def expect(self, log_rate_N: NDArray[np.float32] | None) -> None:
        """Take in the log-rates predicted for the next bin; None if nobody knows."""
        self._log_rate_N = (
            None if log_rate_N is None else np.clip(log_rate_N, *LOG_RATE_RANGE)[self._known_N]
        )

    def take(
        self,
        counts_N: NDArray[np.float32],
        observed: bool,
        silent_N: NDArray[np.bool_] | None = None,
    ) -> None:
        """Compare a bin with what was predicted for it, but for units taken for missing in it."""
        if self._log_rate_N is None or not observed:
            return
        counts_N, log_rate_N = counts_N[self._known_N], self._log_rate_N
        rate_N = np.exp(log_rate_N)
        heard_N = np.float32(1) if silent_N is None else ~silent_N[self._known_N]
        news_N = counts_N * (log_rate_N - self._log_usual_N) - rate_N + self._usual_N
        self._sums_4N[0] += heard_N * (counts_N - rate_N) * log_rate_N
        self._sums_4N[1] += heard_N * rate_N * log_rate_N**2
        self._sums_4N[2] += heard_N * news_N
        self._sums_4N[3] += counts_N
        self._bins += 1
        if self._bins == self._part:
            self._parts.append(self._sums_4N)
            self._begin()

    def forget(self) -> None:
        """Begin a new stretch."""
        self._parts.clear()
        self._begin()

    @property
    def complete(self) -> bool:
        """Whether the last bin completed a part of a stretch."""
        return self._bins == 0 and len(self._parts) == self.PARTS

    def now(self) -> tuple[NDArray[np.float64], float] | None:
        """Surprise of each known unit and bits per spike of the last stretch; None before."""
        if len(self._parts) < self.PARTS:
            return None
        score_N, variance_N, gain_N, spikes_N = np.sum(self._parts, axis=0)
        bits = gain_N.sum() / math.log(2) / max(1.0, spikes_N.sum())
        return score_N / np.sqrt(np.maximum(variance_N, LEAST_RATE)), float(bits)

    def status(
        self,
        usual: Expectation,
        units: Sequence[str],
        silent_N: NDArray[np.bool_] | None = None,
    ) -> dict[str, Any]:
        """``drift`` of the status message.

        Parameters
        ----------
        usual : Expectation
        units : sequence of str
            Ids of all units.
        silent_N : ndarray of bool, optional
            Units already taken for missing, and so left out.

        Returns
        -------
        dict
            ``surprise`` of the last ``seconds``, about 1 if all is as usual, and
            ``bits_per_spike``, both None before they are over; ``expected``: the usual bits per
            spike; ``drifted``; and ``units``: ids of those that are off by most, if it has drifted.
        """
        now = self.now()
        off_N = None if now is None else self._off_N(now[0], usual, silent_N)
        surprise = None if off_N is None else float(np.sqrt(np.nanmean(off_N**2)))
        drifted = surprise is not None and surprise > UNUSUAL
        return {
            "surprise": None if surprise is None else round(surprise, 2),
            "bits_per_spike": None if now is None else round(now[1], 4),
            "expected": round(usual.bits_per_spike, 4),
            "seconds": round(usual.seconds, 2),
            "drifted": drifted,
            "units": self._most_off(off_N, units) if off_N is not None and drifted else [],
        }

    def _off_N(
        self,
        surprise_N: NDArray[np.float64],
        usual: Expectation,
        silent_N: NDArray[np.bool_] | None,
    ) -> NDArray[np.float64] | None:
        """How far each unit is from its usual, in spreads; NaN for those left out, None if all."""
        off_N = np.full(len(self._known_N), np.nan)
        off_N[self._known_N] = surprise_N
        off_N = (off_N - usual.surprise) / np.maximum(usual.sd, 1.0)
        if silent_N is not None:
            off_N[silent_N] = np.nan
        return None if np.isnan(off_N).all() else off_N

    @staticmethod
    def _most_off(off_N: NDArray[np.float64], units: Sequence[str]) -> list[str]:
        size_N = np.nan_to_num(np.abs(off_N))
        return [units[n] for n in np.argsort(-size_N)[:MOST_OFF] if size_N[n] > UNUSUAL]
