"""Where training begins: read-ins standardised, read-outs of the spikes at the mean rates.

Shape suffixes: T bins, K boxcar widths, N units, F features (widths x units).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from offline.batches import Subject
from offline.cache import held, kept_fits
from offline.config import TrainConfig
from offline.linear import fit
from offline.windows import BinnedSession, behaviours_of
from rt_neds.errors import ConfigError
from rt_neds.model.neds import NEDS
from rt_neds.model.readin import boxcar_sums

WINDOWS_FOR_STATISTICS = 40


def build(config: TrainConfig, subjects: list[Subject]) -> NEDS:
    """The network, its read-ins standardised and its spike read-outs at the mean rates."""
    units = {s.id: len(s.binned.session.unit_ids) for s in subjects}
    model = NEDS(config.model, behaviours_of(config.behaviour), units)
    for subject in subjects:
        parts = model.parts(subject.id)
        # The same windows of it, whoever else is there: what was fitted to them is kept.
        counts_TN, sums_TKN = _statistics_sample(subject.binned, config, np.random.default_rng(0))
        root_TKN = np.sqrt(sums_TKN)
        # A near-silent unit must not become a hammer when it speaks: its sd has a floor.
        parts.spikes_in.mean_KN.copy_(torch.from_numpy(root_TKN.mean(axis=0)))
        parts.spikes_in.sd_KN.copy_(torch.from_numpy(np.maximum(root_TKN.std(axis=0), 0.2)))
        with torch.no_grad():
            rate_N = torch.from_numpy(counts_TN.mean(axis=0)).clamp_min(1e-4)
            parts.spikes_out.linear.bias.copy_(rate_N.log())
            parts.spikes_out.linear.weight.mul_(0.1)
            if parts.linear is not None:  # what regression says is all there is to say yet
                for head in parts.behaviour_out.parameters():
                    head.zero_()
    return model


def fit_linear(
    model: NEDS, subjects: Sequence[Subject], known: Mapping[str, Collection[str]] | None = None
) -> None:
    """Fit each session's linear decoder to its training split, in place.

    What was fitted is kept beside a session that is kept on disk. ``known`` sessions go on from a
    bundle: what the read-outs of their ``known`` behaviours make of it is not changed.
    """
    for subject in subjects:
        parts = model.parts(subject.id)
        if parts.linear is None:
            continue
        fitted = partial(fit, subject.binned, model.behaviours, subject.scales, parts.spikes_in)
        folder, scales = subject.folder, subject.scales
        keep = held if folder is None else partial(kept_fits, folder, scales)
        subject.hear = keep(parts.spikes_in, fitted)
        subject.hear().give(parts.linear, but=(known or {}).get(subject.id, ()))


def _statistics_sample(
    binned: BinnedSession, config: TrainConfig, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Counts and boxcar sums of recorded bins of the training split, from up to 40 windows."""
    T, before = config.data.window_bins, max(config.model.history)
    usable = np.flatnonzero(binned.of_split("train") & binned.shown_TM[:, 0])
    if not len(usable):
        raise ConfigError(
            f"{binned.session.path}: no whole bin of the training split was recorded "
            f"(data.split = {config.data.split!r}); choose another split, or leave the session out"
        )
    counts, sums = [], []
    for first in rng.choice(usable, size=min(WINDOWS_FOR_STATISTICS, len(usable)), replace=False):
        counts_TN = binned.counts_TN(first - before, first + T)
        keep = binned.cut(binned.shown_TM[:, 0] & binned.of_split("train"), first, first + T)
        sums_TKN = boxcar_sums(torch.from_numpy(counts_TN)[None], config.model.history)[0].numpy()
        counts.append(counts_TN[before:][keep])
        sums.append(sums_TKN[before:][keep])
    return np.concatenate(counts), np.concatenate(sums)
