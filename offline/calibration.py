"""Probabilities that are not surer than validation bears out.

A network that has seen two hundred trials many times is surer of each choice than it has a right to
be. Dividing its logits by one number mends that and changes no decision (temperature scaling: Guo
et al., ICML 2017, section 4.2); the division goes into the read-out's weights, so nothing is left
of it to be done at the rig.

Shape suffixes: S scored bins, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import nn

from offline.batches import Subject
from offline.decoded import decoded
from rt_neds.model.neds import NEDS

MOST = 20.0
"""Temperatures beyond this are as good as knowing nothing."""


def calibrate(
    model: NEDS, subjects: Sequence[Subject], window: int, device: torch.device | str = "cpu"
) -> dict[str, dict[str, float]]:
    """Divide the logits of each session's categorical behaviours by a temperature, in place.

    Parameters
    ----------
    model : NEDS
        As it is to be kept.
    subjects : sequence of Subject
        Where one has no validation split, nothing is changed.
    window : int
        Bins that a network sees together which sees the future too.
    device : torch device

    Returns
    -------
    dict of str to dict of str to float
        Temperatures by session and behaviour.
    """
    found: dict[str, dict[str, float]] = {}
    for subject in subjects:
        for of in decoded(model, subject, window, "val", device):
            behaviour = of.behaviour
            if behaviour.kind != "categorical":
                continue
            temperature = temperature_of(of.raw_SC, of.true_S.astype(np.int64), of.trial_S)
            parts = model.parts(subject.id)
            outs: list[nn.Module] = [parts.behaviour_out[behaviour.name]]
            outs += [] if parts.linear is None else [parts.linear.out[behaviour.name]]
            with torch.no_grad():
                for parameter in (p for out in outs for p in out.parameters()):
                    parameter.div_(temperature)
            found.setdefault(subject.id, {})[behaviour.name] = temperature
    return found


def temperature_of(
    raw_SC: NDArray[np.float32], class_S: NDArray[np.int64], trial_S: NDArray[np.int64]
) -> float:
    """The temperature, 1 or more, at which the true classes are likeliest.

    All bins of a trial are evidence as one is, and there is a prior, of one e-fold about 1: with
    few trials little is changed. Bins outside trials count each by itself.

    Parameters
    ----------
    raw_SC : ndarray
        Logits.
    class_S, trial_S : ndarray of int
        The true class; the trial, or -1.

    Returns
    -------
    float
    """
    surprise = _surprise(raw_SC, class_S, trial_S)

    def regret(log_temperature: float) -> float:
        return surprise(float(np.exp(log_temperature))) + 0.5 * log_temperature**2

    best = minimize_scalar(regret, bounds=(0.0, np.log(MOST)), method="bounded")
    return float(np.exp(best.x)) if regret(best.x) < regret(0.0) else 1.0


def categorical_d2(
    raw_SC: NDArray[np.float32], class_S: NDArray[np.int64], trial_S: NDArray[np.int64]
) -> float:
    """Share of a uniform guess's surprise that is gone once the logits are calibrated.

    1 is sure and right, 0 knows nothing; all bins of a trial count as one does. A dozen trials rank
    networks better by this than by how many of their decisions are right.

    Parameters
    ----------
    raw_SC, class_S, trial_S
        See :func:`temperature_of`.

    Returns
    -------
    float
    """
    surprise = _surprise(raw_SC, class_S, trial_S)
    known = surprise(temperature_of(raw_SC, class_S, trial_S))
    return 1.0 - known / _surprise(np.zeros_like(raw_SC), class_S, trial_S)(1.0)


def _surprise(
    raw_SC: NDArray[np.float32], class_S: NDArray[np.int64], trial_S: NDArray[np.int64]
) -> Callable[[float], float]:
    """Nats of the true classes, summed over trials, at a temperature."""
    _, trial, bins = np.unique(trial_S, return_inverse=True, return_counts=True)
    weight_S = torch.from_numpy(np.where(trial_S < 0, 1.0, 1.0 / bins[trial]))
    raw, true = torch.from_numpy(raw_SC).double(), torch.from_numpy(class_S)

    def at(temperature: float) -> float:
        return float(weight_S @ nnf.cross_entropy(raw / temperature, true, reduction="none"))

    return at
