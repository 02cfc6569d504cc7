"""A bundle on spans of a session, decoded as the rig would, and by the offline forward pass.

Shape suffixes: T bins, U units, V published values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from offline.predict import decode_spans
from offline.windows import BinnedSession
from rt_neds.bundle import BundleSession, BundleSpec
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour, to_values_TV
from rt_neds.replay import batches
from rt_neds.stream.binner import Binner
from rt_neds.stream.decoder import Decoder, make_step, schema_outputs

BATCH_MS = 20.0


def stream_spans(
    spec: BundleSpec,
    model: NEDS,
    of_bundle: BundleSession,
    binned: BinnedSession,
    spans: list[tuple[int, int]],
    live: Sequence[str] = (),
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_]]:
    """Decode spans as the rig would: batches through the binner and the decoder, bin by bin.

    Each span begins as many bins earlier as can influence it, as a run of its own. ``live``
    behaviours are observed, not decoded.

    Returns
    -------
    dict of str to ndarray, shape (bins of all spans, values of that output)
    ndarray of bool
        Which of the bins were published.
    """
    units = len(of_bundle.units)
    step = make_step(model, spec, of_bundle, np.zeros(units, bool), live=live)
    decoder = Decoder(spec, of_bundle, step, live=live)
    columns = [model.modalities.index(name) for name in live]
    live_TM = np.where(binned.shown_TM, binned.values_TM, np.float32(np.nan))[:, columns]
    rows_U = np.arange(units, dtype=np.int32)
    values, published = [], []
    for epoch, (first, stop) in enumerate(spans):
        values_TV = np.full((stop - first, len(decoder.values_V)), np.nan, np.float32)
        binner = Binner(rows_U, units, binned.width, spec.model.context)
        start = max(0, first - spec.model.receptive_field) * binned.width
        plan = batches(binned.session, BATCH_MS, epoch=epoch, first=start, end=stop * binned.width)
        for batch in plan:
            for frame in binner.frames(batch):
                if live:
                    frame.live_M = live_TM[frame.bin]
                value_V = decoder.decode(frame)
                if frame.bin >= first:
                    values_TV[frame.bin - first] = value_V
        values.append(values_TV)
        published.append(np.isfinite(values_TV[:, 0]))
    all_TV = np.concatenate(values)
    cut = {
        o["name"]: slice(o["offset"], o["offset"] + o["size"])
        for o in schema_outputs(spec, of_bundle, live)
    }
    return {name: all_TV[:, at] for name, at in cut.items()}, np.concatenate(published)


def offline_values(
    model: NEDS,
    of_bundle: BundleSession,
    binned: BinnedSession,
    spans: list[tuple[int, int]],
    behaviours: list[Behaviour],
    window: int,
    live: Sequence[str] = (),
) -> dict[str, NDArray[np.float32]]:
    """The same from the offline forward pass."""
    raws = decode_spans(
        model,
        binned,
        spans,
        wanted=[b.name for b in behaviours],
        window=window,
        live={name: of_bundle.scales[name] for name in live},
    )
    return {
        b.name: to_values_TV(torch.from_numpy(raws[b.name]), b, of_bundle.scales[b.name]).numpy()
        for b in behaviours
    }


def largest_difference(
    streamed: dict[str, NDArray],
    offline: dict[str, NDArray],
    scored: dict[str, NDArray],
    of_bundle: BundleSession,
    behaviours: list[Behaviour],
) -> float:
    """Largest difference over all scored bins, in sds of a behaviour or in probability."""
    worst = 0.0
    for b in behaviours:
        use = scored[b.name]
        if use.any():
            sd = of_bundle.scales[b.name].sd if b.kind == "continuous" else 1.0
            gap = np.abs(streamed[b.name][use] - offline[b.name][use])
            worst = max(worst, float(gap.max()) / sd)
    return worst
