"""What a bundle is compared with: baselines fitted to the same bins, and the ideal observer.

Shape suffixes: S scored bins, T bins, M modalities (0 is spikes), V published values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from offline.config import TrainConfig
from offline.windows import BinnedSession
from rt_neds.model.readout import Behaviour

Baselines = Literal["linear", "all", "none"]


def of_present(binned: BinnedSession, names: list[str]) -> BinnedSession:
    """The session without the columns of behaviours that it lacks, as baselines read it."""
    at = [0, *(1 + names.index(name) for name in binned.present)]
    return replace(
        binned,
        values_TM=binned.values_TM[:, at],
        shown_TM=binned.shown_TM[:, at],
        scored_TM=binned.scored_TM[:, at],
    )


def baseline_values(
    binned: BinnedSession,
    behaviours: list[Behaviour],
    bins: dict[str, NDArray[np.int64]],
    which: Baselines,
    live: Sequence[Behaviour] = (),
    *,
    window: int = 0,
) -> dict[str, dict[str, NDArray]]:
    """What each baseline, fitted on the same training bins, gives: by method, by behaviour.

    ``window`` is that of the network's training: the GRU is given as long a one to remember in.
    """
    guesses: dict[str, dict[str, NDArray]] = {}
    if which == "none" or not behaviours:
        return guesses
    from offline.baselines.linear import logistic, ridge

    classes = {b.name: len(b.classes) for b in behaviours if b.kind == "categorical"}
    for name, at_S in bins.items():
        if name in classes:
            guess = logistic(binned, name, at_S, classes=classes[name])
            guesses.setdefault("logistic", {})[name] = guess
        else:
            guesses.setdefault("ridge", {})[name] = ridge(binned, name, at_S)[:, None]
    if which == "all":
        from offline.baselines.gru import gru

        asked = np.unique(np.concatenate(list(bins.values())))
        classes |= {b.name: len(b.classes) for b in live if b.kind == "categorical"}
        shown = [b.name for b in live]
        of_gru = gru(binned, list(bins), asked, classes=classes, window=window, live=shown)
        guesses["gru"] = {
            name: of_gru[name][np.searchsorted(asked, at_S)].reshape(len(at_S), -1)
            for name, at_S in bins.items()
        }
    return guesses


SIMULATED = ("wheel.wheel_speed", "whisker.whisker_motion_energy", "trials.choice")
"""What the ideal observer of a simulated session estimates; another table's column is not that."""


def ideal_values(
    binned: BinnedSession, behaviour: Behaviour, config: TrainConfig, at_S: NDArray[np.int64]
) -> NDArray | None:
    """Estimates of the ideal observer, where a simulated session carries them."""
    of = config.behaviour[behaviour.name]
    source, name = of.sources[0], of.sources[0].rpartition(".")[2]
    if source not in SIMULATED or of.transform != "none" or not binned.session.has(f"ideal.{name}"):
        return None
    series = binned.session.series(f"ideal.{name}")
    last = np.searchsorted(series.samples_L, (at_S + 1) * binned.width, side="right") - 1
    value_S = series.values_L[np.maximum(last, 0)]
    if behaviour.kind != "categorical":
        return value_S[:, None]
    codes = list(of.classes.values())
    if sorted(codes) != [0.0, 1.0]:
        return None
    return np.stack([value_S if code == 1.0 else 1.0 - value_S for code in codes], axis=1)
