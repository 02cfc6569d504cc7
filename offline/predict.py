"""The offline forward pass over stretches of a session: what the stream must equal.

Each function hides exactly what its name says and returns what the model gives there.

Shape suffixes: B windows or copies, T bins, S bins kept, M modalities (0 is spikes), N units,
X passes, C numbers of an output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.windows import BinnedSession
from rt_neds.model.neds import AHEAD, NEDS, SCHEMES, SPIKES
from rt_neds.model.readout import LOG_RATE_RANGE, Scale

SEGMENT = 1000
"""Least bins that are decoded at once; bounds memory, changes nothing."""

COPIED_BINS = 8_000
"""Bins, of copies with other units hidden, that go through the network together."""

WINDOWS = 32
"""Short windows that go through the network together."""

FORECAST_WINDOW, FORECAST_BINS = 100, 10
"""MtM's forward prediction: bins 90 to 99 of a window from bins 0 to 89."""

RARE = 0.0005
"""Share of values, at each end, that do not make the range of a behaviour by themselves."""


def scales(binned: BinnedSession, names: Sequence[str], kinds: Sequence[str]) -> list[Scale]:
    """Scale of each continuous behaviour over the scored training bins; 0 and 1 for others."""
    out = []
    for m, (name, kind) in enumerate(zip(names, kinds, strict=True), start=1):
        values = binned.values_TM[binned.of_split("train") & binned.scored_TM[:, m], m]
        if kind == "categorical" or name not in binned.present or len(values) == 0:
            out.append(Scale())
        else:
            low, high = _range(values, kind)
            values = values.clip(low, high)
            sd = max(float(values.std()), 1e-6)
            out.append(Scale(mean=float(values.mean()), sd=sd, low=low, high=high))
    return out


def _range(values: NDArray[np.float32], kind: str) -> tuple[float, float]:
    """Range that was seen, but for artefacts: of one value 300 sds out all steps would be as wide.

    Nearly all values lie in some range; what is farther from it than it is wide is an artefact.
    Counts are spared: where licks are rare, nearly all values are the same, and a lick is none.
    """
    low, high = float(values.min()), float(values.max())
    first = float(np.quantile(values, RARE, method="higher"))
    last = float(np.quantile(values, 1 - RARE, method="lower"))
    if kind == "poisson" or first >= last:
        return low, high
    return max(low, 2 * first - last), min(high, 2 * last - first)


def normalise(values_TM: NDArray[np.float32], by: Sequence[Scale]) -> NDArray:
    """Behaviours as the network reads them; ``by`` has a scale for each, spikes excepted."""
    mean_M, sd_M = np.array([(0.0, 1.0), *((s.mean, s.sd) for s in by)], dtype=np.float32).T
    return (values_TM - mean_M) / sd_M


def decode_spans(
    model: NEDS,
    binned: BinnedSession,
    spans: Iterable[tuple[int, int]],
    *,
    wanted: Sequence[str],
    window: int,
    device: torch.device | str = "cpu",
    live: Mapping[str, Scale] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Decode from spikes, alone or with behaviours that are observed live, offline.

    Parameters
    ----------
    model : NEDS
    binned : BinnedSession
    spans : iterable of (int, int)
        Runs of bins ``[first, stop)`` to decode. The causal model sees as many earlier bins as can
        influence them; the full one sees windows of ``window`` bins, as in training.
    wanted : sequence of str
        Behaviours to decode.
    window : int
    device : torch device
    live : dict of str to Scale, optional
        Behaviours that are shown beside the spikes; none by default.

    Returns
    -------
    dict of str to ndarray, shape (bins of all spans, numbers of that output)
        Raw outputs.
    """
    pieces: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for kept_S, start, end in _segments(model, spans, window):
        arrays = _shown(model, binned, start, end, live or {})
        outputs = _forward(model, binned, *arrays, "decoding", wanted, device)
        for name in wanted:
            pieces[name].append(outputs[name][0, kept_S].cpu())
    return {name: torch.cat(raws).numpy() for name, raws in pieces.items()}


def _segments(
    model: NEDS, spans: Iterable[tuple[int, int]], window: int
) -> Iterator[tuple[NDArray[np.int64], int, int]]:
    """Bins to run ``[start, end)``, and which of them, from the first, to keep.

    What the causal model runs to settle it runs once for all spans nearby.
    """
    spans = list(spans)
    if model.config.attention == "causal":
        bins_S = np.concatenate([np.arange(a, b) for a, b in spans])
        assert (np.diff(bins_S) > 0).all(), "spans in order, apart from each other"
        before = model.config.receptive_field
        while len(bins_S):
            start = max(int(bins_S[0]) - before, 0)  # before a session there is nothing to see
            inside = int(np.searchsorted(bins_S, bins_S[0] + max(SEGMENT, before)))
            yield bins_S[:inside] - start, start, int(bins_S[inside - 1]) + 1
            bins_S = bins_S[inside:]
        return
    for first, stop in spans:
        for low in range(first, stop, window):
            high = min(low + window, stop)
            start = high - window  # a last, shorter piece is seen in a whole window that ends so
            yield np.arange(low, high) - start, start, high


def encode_spans(
    model: NEDS,
    binned: BinnedSession,
    spans: Iterable[tuple[int, int]],
    by: Sequence[Scale],
    *,
    window: int,
) -> NDArray[np.float32]:
    """Predicted spike counts from behaviours alone, offline.

    Parameters
    ----------
    model, binned, spans, window
        As for :func:`decode_spans`.
    by : sequence of Scale
        Of the behaviours.

    Returns
    -------
    ndarray, shape (bins of all spans, units)
    """
    pieces = []
    for kept_S, start, end in _segments(model, spans, window):
        shown = binned.cut(binned.shown_TM, start, end)
        shown[:, 0] = False
        values = normalise(binned.cut(binned.values_TM, start, end), by).astype(np.float32)
        counts = np.zeros((end - start, len(binned.session.unit_ids)), np.float32)
        arrays = (counts[None], values[None], shown[None])
        raw = _forward(model, binned, *arrays, "encoding", [SPIKES])[SPIKES]
        pieces.append(_counts(raw[0, kept_S]))
    return np.concatenate(pieces)


# -- spikes from other spikes: behaviours are neither shown nor asked ----------------------------


def spans_without_units(
    model: NEDS,
    binned: BinnedSession,
    spans: Iterable[tuple[int, int]],
    hidden_XN: NDArray[np.bool_],
    asked_XN: NDArray[np.bool_],
    scheme: str,
    *,
    window: int,
) -> NDArray[np.float32]:
    """Predicted counts of units replaced by their stand-in, from the units that are left.

    Parameters
    ----------
    model, binned, spans, window
        As for :func:`decode_spans`.
    hidden_XN : ndarray of bool
        Units replaced in each pass, over all bins.
    asked_XN : ndarray of bool
        Units read in each pass, a part of the hidden ones; each unit in one pass at most.
    scheme : str
        One of ``SCHEMES``.

    Returns
    -------
    ndarray, shape (bins of all spans, units)
        NaN for units that no pass asks for.
    """
    assert not (asked_XN & ~hidden_XN).any(), "a unit that is seen is not predicted"
    pieces = []
    for kept_S, start, end in _segments(model, spans, window):
        counts, values, shown = _spikes_alone(binned, [(start, end)])
        rate_SN = np.full((len(kept_S), asked_XN.shape[1]), np.nan, np.float32)
        copies = max(1, COPIED_BINS // (end - start))
        for x in range(0, len(hidden_XN), copies):
            hidden_BN, asked_BN = hidden_XN[x : x + copies], asked_XN[x : x + copies]
            raw = _forward(
                model,
                binned,
                counts.repeat(len(hidden_BN), axis=0),
                values.repeat(len(hidden_BN), axis=0),
                shown.repeat(len(hidden_BN), axis=0),
                scheme,
                [SPIKES],
                missing_BN=hidden_BN,
            )
            for raw_SN, asked_N in zip(raw[SPIKES][:, kept_S], asked_BN, strict=True):
                rate_SN[:, asked_N] = _counts(raw_SN[:, torch.from_numpy(asked_N)])
        pieces.append(rate_SN)
    return np.concatenate(pieces)


def forecast_spans(
    model: NEDS, binned: BinnedSession, spans: Iterable[tuple[int, int]], scheme: str
) -> NDArray[np.float32]:
    """Predicted counts of the last ten bins of windows of a hundred, all spikes there hidden.

    The hidden parts of the windows lie side by side; what a window shows may lie before the span.

    Returns
    -------
    ndarray, shape (bins of all spans, units)
        NaN in the last bins of a span, too few for a window, and where a window was not wholly
        recorded.
    """
    pieces = []
    recorded_T = binned.shown_TM[:, 0]
    for first, stop in spans:
        rate_TN = np.full((stop - first, len(binned.session.unit_ids)), np.nan, np.float32)
        ends = [
            end
            for end in range(first + FORECAST_BINS, stop + 1, FORECAST_BINS)
            if binned.cut(recorded_T, end - FORECAST_WINDOW, end).all()
        ]
        for at in range(0, len(ends), WINDOWS):
            some = ends[at : at + WINDOWS]
            arrays = _spikes_alone(binned, [(end - FORECAST_WINDOW, end) for end in some])
            arrays[2][:, -FORECAST_BINS:, 0] = False
            raw = _forward(model, binned, *arrays, scheme, [SPIKES])[SPIKES]
            for end, last_TN in zip(some, _counts(raw[:, -FORECAST_BINS:]), strict=True):
                rate_TN[end - FORECAST_BINS - first : end - first] = last_TN
        pieces.append(rate_TN)
    return np.concatenate(pieces)


def ahead_spans(
    model: NEDS,
    binned: BinnedSession,
    spans: Iterable[tuple[int, int]],
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Predicted counts of every bin from the spikes of strictly earlier bins; causal models only.

    Returns
    -------
    ndarray, shape (bins of all spans, units)
    """
    pieces = []
    for kept_S, start, end in _segments(model, spans, SEGMENT):
        arrays = _spikes_alone(binned, [(start, end)])
        raw = _forward(model, binned, *arrays, "decoding", [AHEAD], device)[AHEAD]
        pieces.append(_counts(raw[0, kept_S]))
    return np.concatenate(pieces)


def _spikes_alone(
    binned: BinnedSession, stretches: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Counts, behaviours (nothing) and what is shown (spikes, where recorded) of equal windows."""
    shown = np.stack([binned.cut(binned.shown_TM, a, b) for a, b in stretches])
    shown[:, :, 1:] = False
    counts = np.stack([binned.counts_TN(a, b) for a, b in stretches])
    return counts, np.zeros(shown.shape, np.float32), shown


def _counts(raw: Tensor) -> NDArray[np.float32]:
    return raw.clamp(*LOG_RATE_RANGE).exp().cpu().numpy()


# -- through the network -------------------------------------------------------------------------


def _shown(
    model: NEDS, binned: BinnedSession, start: int, end: int, live: Mapping[str, Scale]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Counts, behaviours and what is shown, spikes and live behaviours, of one stretch."""
    counts_BTN, values_BTM, shown_BTM = _spikes_alone(binned, [(start, end)])
    for name, scale in live.items():
        m = model.modalities.index(name)
        value_T = binned.cut(binned.values_TM[:, m], start, end)
        categorical = model.behaviours[m - 1].kind == "categorical"
        values_BTM[0, :, m] = value_T if categorical else scale.normalised(value_T)
        shown_BTM[0, :, m] = binned.cut(binned.shown_TM[:, m], start, end)
    return counts_BTN, values_BTM, shown_BTM


@torch.no_grad()
def _forward(
    model: NEDS,
    binned: BinnedSession,
    counts_BTN: NDArray[np.float32],
    values_BTM: NDArray[np.float32],
    shown_BTM: NDArray[np.bool_],
    scheme: str,
    wanted: Sequence[str],
    device: torch.device | str = "cpu",
    missing_BN: NDArray[np.bool_] | None = None,
) -> dict[str, Tensor]:
    arrays = (counts_BTN, values_BTM, shown_BTM)
    counts, values, shown = (torch.from_numpy(array).to(device) for array in arrays)
    scheme_B = torch.full((len(counts_BTN),), SCHEMES.index(scheme), device=device)
    missing = None
    if missing_BN is not None:
        missing = torch.from_numpy(missing_BN)[:, None].to(device)
    return model(
        binned.session.id, counts, values, shown, scheme_B, missing_BTN=missing, wanted=wanted
    )
