"""The offline forward pass over stretches of a session: what the stream must equal.

Shape suffixes: T bins, M modalities (0 is spikes), C numbers of an output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.windows import BinnedSession
from rt_neds.model.neds import NEDS, SCHEMES, SPIKES
from rt_neds.model.readout import LOG_RATE_RANGE, Scale

SEGMENT = 1000
"""Bins decoded at once; bounds memory, changes nothing."""


def scales(binned: BinnedSession, names: Sequence[str], kinds: Sequence[str]) -> list[Scale]:
    """Scale of each continuous behaviour over the scored training bins; 0 and 1 for others."""
    out = []
    for m, (name, kind) in enumerate(zip(names, kinds, strict=True), start=1):
        values = binned.values_TM[binned.of_split("train") & binned.scored_TM[:, m], m]
        if kind == "categorical" or name not in binned.present or len(values) == 0:
            out.append(Scale())
        else:
            low, high = float(values.min()), float(values.max())
            sd = max(float(values.std()), 1e-6)
            out.append(Scale(mean=float(values.mean()), sd=sd, low=low, high=high))
    return out


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
    window: int = 300,
    device: torch.device | str = "cpu",
) -> dict[str, NDArray[np.float32]]:
    """Decode from spikes alone, offline.

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

    Returns
    -------
    dict of str to ndarray, shape (bins of all spans, numbers of that output)
        Raw outputs.
    """
    pieces: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for first, stop in spans:
        for low, high, start, end in _segments(model, first, stop, window):
            outputs = _decode(model, binned, start, end, wanted, device)
            for name in wanted:
                pieces[name].append(outputs[name][0, low - start : high - start].cpu())
    return {name: torch.cat(raws).numpy() for name, raws in pieces.items()}


def _segments(model: NEDS, first: int, stop: int, window: int) -> list[tuple[int, int, int, int]]:
    """Bins to keep ``[low, high)`` and bins to run ``[start, end)`` for them."""
    if model.config.attention == "causal":
        before = model.config.receptive_field
        lows = range(first, stop, SEGMENT)
        return [(a, min(a + SEGMENT, stop), a - before, min(a + SEGMENT, stop)) for a in lows]
    segments = []
    for low in range(first, stop, window):
        high = min(low + window, stop)
        start = high - window  # a last, shorter piece is seen in a whole window that ends with it
        segments.append((low, high, start, high))
    return segments


def encode_spans(
    model: NEDS,
    binned: BinnedSession,
    spans: Iterable[tuple[int, int]],
    by: Sequence[Scale],
    *,
    window: int = 300,
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
    for first, stop in spans:
        for low, high, start, end in _segments(model, first, stop, window):
            shown = binned.cut(binned.shown_TM, start, end)
            shown[:, 0] = False
            values = normalise(binned.cut(binned.values_TM, start, end), by).astype(np.float32)
            counts = np.zeros((end - start, len(binned.session.unit_ids)), np.float32)
            raw = _forward(model, binned, counts, values, shown, "encoding", [SPIKES])[SPIKES]
            pieces.append(raw[0, low - start : high - start].clamp(*LOG_RATE_RANGE).exp())
    return torch.cat(pieces).numpy()


def _decode(
    model: NEDS,
    binned: BinnedSession,
    start: int,
    end: int,
    wanted: Sequence[str],
    device: torch.device | str,
) -> dict[str, Tensor]:
    shown = binned.cut(binned.shown_TM, start, end)
    shown[:, 1:] = False
    values = np.zeros(shown.shape, np.float32)
    counts = binned.counts_TN(start, end)
    return _forward(model, binned, counts, values, shown, "decoding", wanted, device)


@torch.no_grad()
def _forward(
    model: NEDS,
    binned: BinnedSession,
    counts_TN: NDArray[np.float32],
    values_TM: NDArray[np.float32],
    shown_TM: NDArray[np.bool_],
    scheme: str,
    wanted: Sequence[str],
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    arrays = (counts_TN, values_TM, shown_TM)
    counts, values, shown = (torch.from_numpy(array)[None].to(device) for array in arrays)
    scheme_B = torch.tensor([SCHEMES.index(scheme)], device=device)
    return model(binned.session.id, counts, values, shown, scheme_B, wanted=wanted)
