"""How well spikes are predicted: from behaviour, from other units, from the past; bits per spike.

    bits_per_spike  every spike hidden, behaviours shown (NEDS, arXiv 2504.08201)
    co_smoothing    one unit hidden at a time, all others shown (MtM, arXiv 2407.14668)
    intra_region    one unit hidden at a time, only the others of its region shown (MtM)
    inter_region    a whole region hidden, all others shown (MtM)
    forward         bins 90 to 99 of windows of 100 bins from bins 0 to 89 (MtM)
    forward_1       each bin from the bins before it

Each is computed only if training drew the scheme that fits it; a network is not asked for what it
was never taught. What is shown of the past is what the network can see; the causal one sees nothing
later than the bin it predicts.

Shape suffixes: T bins, N units, X passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline.metrics import LEAST_SPIKES, bits_of_units, bits_per_spike
from offline.predict import ahead_spans, encode_spans, forecast_spans, spans_without_units
from offline.windows import BinnedSession
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Scale

SCHEME_OF = {
    "bits_per_spike": "encoding",
    "co_smoothing": "neuron",
    "intra_region": "intra_region",
    "inter_region": "inter_region",
    "forward": "forward",
    "forward_1": "ahead",
}
"""Metrics, and the training scheme that asks the same."""

MOST_UNITS = 50
"""Units predicted one at a time; of more, so many are drawn, always the same."""


@dataclass
class Predicted:
    """Counts of some units in some bins, and what was predicted for them."""

    bins_T: NDArray[np.int64]
    units_N: NDArray[np.int64]
    count_TN: NDArray
    rate_TN: NDArray

    def scores(self) -> dict[str, float | int]:
        """Bits per spike, and over how many units and bins."""
        return {
            **bits_per_spike(self.count_TN, self.rate_TN),
            "units": len(self.units_N),
            "bins": len(self.bins_T),
        }

    def bits(self) -> dict[str, NDArray]:
        """Of each unit: its number, its bits per spike (NaN without spikes), and its spikes."""
        gain_N, spikes_N = bits_of_units(self.count_TN, self.rate_TN)
        bits_N = np.where(spikes_N > 0, gain_N / np.maximum(spikes_N, 1), np.nan)
        return {"unit": self.units_N, "bits": bits_N, "spikes": spikes_N}


def predict_spikes(
    model: NEDS,
    schemes: dict[str, float],
    binned: BinnedSession,
    spans: list[tuple[int, int]],
    by: Sequence[Scale],
    region_N: NDArray[np.str_] | None,
    *,
    window: int,
) -> dict[str, Predicted]:
    """Predict spikes in every way that was trained and that the session allows.

    Parameters
    ----------
    model : NEDS
    schemes : dict of str to float
        Those of training, with their weights.
    binned : BinnedSession
    spans : list of (int, int)
    by : sequence of Scale
        Of the behaviours.
    region_N : ndarray of str, optional
        Region of each unit, ``""`` for none.
    window : int
        Bins the full network sees at once.

    Returns
    -------
    dict of str to Predicted
        By metric; those that cannot be given are absent.
    """
    kept_T = np.concatenate([np.arange(a, b) for a, b in spans])
    count_TN = np.concatenate([binned.counts_TN(a, b) for a, b in spans])
    shown_TM, recorded_T = binned.shown_TM[kept_T], binned.scored_TM[kept_T, 0]
    one_by_one_N = drawn_units(count_TN[recorded_T].sum(axis=0))
    predicted = {}
    for metric, scheme in SCHEME_OF.items():
        if not schemes.get(scheme):
            continue
        use_T = recorded_T
        if metric == "bits_per_spike":
            rate_TN = encode_spans(model, binned, spans, by, window=window)
            use_T = recorded_T & shown_TM[:, 1:].any(axis=1)
        elif metric == "forward":
            rate_TN = forecast_spans(model, binned, spans, scheme)
        elif metric == "forward_1":
            rate_TN = ahead_spans(model, binned, spans)
        else:
            passes = passes_of(metric, count_TN.shape[1], region_N, one_by_one_N)
            if len(passes[0]) == 0:
                continue
            rate_TN = spans_without_units(model, binned, spans, *passes, scheme, window=window)
        found_TN = np.isfinite(rate_TN) & use_T[:, None]
        bins_T, units_N = found_TN.any(axis=1), found_TN.any(axis=0)
        if bins_T.any():
            at = np.ix_(bins_T, units_N)
            predicted[metric] = Predicted(
                kept_T[bins_T], np.flatnonzero(units_N), count_TN[at], rate_TN[at]
            )
    return predicted


def passes_of(
    metric: str,
    units: int,
    region_N: NDArray[np.str_] | None,
    one_by_one_N: NDArray[np.int64],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which units each pass hides and which it asks for.

    Parameters
    ----------
    metric : {"co_smoothing", "intra_region", "inter_region"}
    units : int
    region_N : ndarray of str, optional
        Without at least two regions there is nothing to do for the last two.
    one_by_one_N : ndarray of int
        Units that are asked for one at a time.

    Returns
    -------
    hidden_XN, asked_XN : ndarray of bool
        None of them for what cannot be done. A unit alone in its region has nothing to be predicted
        from inside it, and a unit of no region is never asked for by region.
    """
    hidden, asked = [], []
    one_N = np.eye(units, dtype=bool)
    names = [] if region_N is None else [str(name) for name in np.unique(region_N) if name]
    if metric == "co_smoothing":
        hidden = asked = [one_N[n] for n in one_by_one_N] if units > 1 else []
    elif len(names) < 2 or region_N is None:
        pass
    elif metric == "inter_region":
        hidden = asked = [region_N == name for name in names]
    else:
        for n in one_by_one_N:
            inside_N = region_N == region_N[n]
            if region_N[n] and inside_N.sum() > 1:
                hidden.append(~inside_N | one_N[n])
                asked.append(one_N[n])
    empty = np.zeros((0, units), bool)
    return np.array(hidden) if hidden else empty, np.array(asked) if asked else empty


def encoding_scores(predicted: dict[str, Predicted]) -> dict[str, Any]:
    """Scores of each metric; null for what was not trained or cannot be done in this session."""
    return {
        metric: predicted[metric].scores() if metric in predicted else None for metric in SCHEME_OF
    }


def glm_scores(
    binned: BinnedSession, predicted: dict[str, Predicted], classes: dict[str, int]
) -> dict[str, Any]:
    """Poisson regression's scores for the same units in the same bins, of what it can predict."""
    from offline.baselines.glm import encoding, forward_1

    scores = {}
    for metric, of in predicted.items():
        if metric == "bits_per_spike":
            rate_TN = encoding(binned, of.bins_T, classes=classes)
        elif metric == "forward_1":
            rate_TN = forward_1(binned, of.bins_T)
        else:
            continue
        rate_TN = rate_TN[:, of.units_N]
        scores[metric] = Predicted(of.bins_T, of.units_N, of.count_TN, rate_TN).scores()
    return scores


def drawn_units(spikes_N: NDArray) -> NDArray[np.int64]:
    """Units to predict one at a time, ascending: first those with spikes enough for a score."""
    fired = np.random.default_rng(0).permutation(np.flatnonzero(spikes_N > 0))
    enough_first = np.argsort(spikes_N[fired] < LEAST_SPIKES, kind="stable")
    return np.sort(fired[enough_first][:MOST_UNITS])
