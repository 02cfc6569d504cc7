"""Where training begins: read-ins standardised, read-outs at the mean rates, shortcuts at ridge.

Shape suffixes: T bins, K boxcar widths, N units, F features (widths x units).
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from offline.baselines import Scaler, fit_ridge
from offline.batches import Subject
from offline.config import TrainConfig
from offline.windows import BinnedSession, behaviours_of
from rt_neds.model.neds import NEDS, SessionParts
from rt_neds.model.readin import boxcar_sums
from rt_neds.model.readout import ReadOut

WINDOWS_FOR_STATISTICS = 40


def build(config: TrainConfig, subjects: list[Subject]) -> NEDS:
    """The network, its read-ins standardised and its spike read-outs at the mean rates."""
    units = {s.id: len(s.binned.session.unit_ids) for s in subjects}
    model = NEDS(config.model, behaviours_of(config.behaviour), units)
    rng = np.random.default_rng(0)
    for subject in subjects:
        parts = model.parts(subject.id)
        counts_TN, sums_TKN = _statistics_sample(subject.binned, config, rng)
        root_TKN = np.sqrt(sums_TKN)
        # A near-silent unit must not become a hammer when it speaks: its sd has a floor.
        parts.spikes_in.mean_KN.copy_(torch.from_numpy(root_TKN.mean(axis=0)))
        parts.spikes_in.sd_KN.copy_(torch.from_numpy(np.maximum(root_TKN.std(axis=0), 0.2)))
        with torch.no_grad():
            rate_N = torch.from_numpy(counts_TN.mean(axis=0)).clamp_min(1e-4)
            parts.spikes_out.linear.bias.copy_(rate_N.log())
            parts.spikes_out.linear.weight.mul_(0.1)
        _begin_at_ridge(parts, subject, model)
    return model


@torch.no_grad()
def _begin_at_ridge(parts: SessionParts, subject: Subject, model: NEDS) -> None:
    """Set the shortcut of each continuous behaviour to ridge, so that the rest learns what is left.

    The read-out itself begins small: training starts where the linear decoder ends.
    """
    spikes_in = parts.spikes_in
    scaler = Scaler(spikes_in.mean_KN.flatten().numpy(), spikes_in.sd_KN.flatten().numpy())
    for m, (behaviour, scale) in enumerate(zip(model.behaviours, subject.scales, strict=True), 1):
        name = behaviour.name
        if name not in parts.shortcut or name not in subject.binned.present:
            continue
        head = cast(ReadOut, parts.behaviour_out[name]).linear
        head.weight.mul_(0.1)
        if behaviour.kind == "gaussian":
            weights_F, offset = fit_ridge(subject.binned, m, spikes_in.history, scaler)
            straight = cast(torch.nn.Linear, parts.shortcut[name])
            straight.weight[0] = torch.from_numpy(weights_F / scale.sd)
            head.bias[0] = (offset - scale.mean) / scale.sd


def _statistics_sample(
    binned: BinnedSession, config: TrainConfig, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Counts and boxcar sums of recorded bins of the training split, from up to 40 windows."""
    T, before = config.data.window_bins, max(config.model.history)
    usable = np.flatnonzero(binned.of_split("train") & binned.shown_TM[:, 0])
    counts, sums = [], []
    for first in rng.choice(usable, size=min(WINDOWS_FOR_STATISTICS, len(usable)), replace=False):
        counts_TN = binned.counts_TN(first - before, first + T)
        keep = binned.cut(binned.shown_TM[:, 0] & binned.of_split("train"), first, first + T)
        sums_TKN = boxcar_sums(torch.from_numpy(counts_TN)[None], config.model.history)[0].numpy()
        counts.append(counts_TN[before:][keep])
        sums.append(sums_TKN[before:][keep])
    return np.concatenate(counts), np.concatenate(sums)
