"""What a network is not shown to decode better than each session's own regression is left to that.

One step of training is kept for all that a network decodes. What it has learned by heart by then,
a choice of a dozen trials say, must not cost what it has learned of others (decision 0031). And
the best of a dozen steps on a dozen trials of validation is better than regression by chance
(decision 0033).

Shape suffixes: S scored bins, X trials or windows, C numbers of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.special import log_softmax

from offline.batches import Subject
from offline.calibration import temperature_of
from offline.decoded import Decoded, decoded
from offline.validation import Scores
from rt_neds.model.neds import NEDS

SURE = 0.025
"""Chance at which a network that is no better than regression is taken for better."""


def regression_scores(
    model: NEDS, subjects: list[Subject], validate: Callable[[], Scores]
) -> Scores:
    """What each session's own regression, alone, is worth on the validation split."""
    heard = {subject.id: subject.present for subject in subjects if subject.hear is not None}
    if not heard:
        return {}
    with regressions_alone(model, subjects):
        val = validate()
    return {
        session: {name: score for name, score in of.items() if name in heard.get(session, ())}
        for session, of in val.items()
    }


def leave_to_regression(
    model: NEDS,
    subjects: list[Subject],
    val: Scores,
    alone: Scores,
    window: int,
    device: torch.device,
) -> Scores:
    """Leave to regression what the network is not shown to decode better, in place.

    Of several sessions, that is what a session's own regression decodes better on validation: what
    the network has learned of the rest is what a new animal begins with. Of one session, which is
    to be decoded with this bundle, it must be shown (:func:`shown_better`).

    Parameters
    ----------
    model : NEDS
        As it is to be kept, but for what is left to regression here.
    subjects : list of Subject
    val, alone : dict of dict of float
        Scores on validation, of the network and of each session's own regression.
    window : int
        Bins that a network sees together which sees the future too.
    device : torch.device

    Returns
    -------
    dict of dict of float
        By session, the behaviours left to its regression, and what that scores.
    """
    if not alone:
        return {}
    shown = shown_better(model, subjects[0], window, device) if len(subjects) == 1 else None
    left = {
        session: {
            name: score
            for name, score in of.items()
            if (shown is not None and name not in shown) or score > val[session].get(name, score)
        }
        for session, of in alone.items()
    }
    for subject in subjects:
        for name in left.get(subject.id, ()):
            decode_by_regression(model, subject, name)
    return {session: of for session, of in left.items() if of}


def shown_better(model: NEDS, subject: Subject, window: int, device: torch.device) -> set[str]:
    """Behaviours of which validation shows that the network decodes them better than regression.

    Trials, or windows, are compared in pairs, by a t-test (``SURE``).
    """
    own = _losses(model, subject, window, device)
    with regressions_alone(model, [subject]):
        by_regression = _losses(model, subject, window, device)
    return {name for name, loss_X in own.items() if _shown(by_regression[name] - loss_X)}


def _shown(gain_X: NDArray[np.float64]) -> bool:
    if len(gain_X) < 2 or not gain_X.any():
        return False
    return bool(stats.ttest_1samp(gain_X, 0.0, alternative="greater").pvalue < SURE)


def _losses(
    model: NEDS, subject: Subject, window: int, device: torch.device
) -> dict[str, NDArray[np.float64]]:
    """What each trial of validation, or window, adds to what is not explained of a behaviour."""
    losses = {}
    for of in decoded(model, subject, window, "val", device):
        block_S = np.where(of.trial_S >= 0, of.trial_S, -1 - of.bins_S // window)
        _, block_S, bins_X = np.unique(block_S, return_inverse=True, return_counts=True)
        loss_S = _loss(of) / np.where(of.trial_S >= 0, bins_X[block_S], 1)
        losses[of.behaviour.name] = np.bincount(block_S, loss_S).astype(float)
    return losses


def _loss(of: Decoded) -> NDArray[np.float64]:
    true_S, value_S = of.true_S.astype(float), of.value_SV[:, 0].astype(float)
    if of.behaviour.kind == "continuous":
        return (true_S - value_S) ** 2 / max(float(true_S.var()), 1e-12)
    if of.behaviour.kind == "poisson":
        return value_S - true_S * np.log(np.maximum(value_S, 1e-9))
    class_S = true_S.astype(np.int64)
    raw_SC = of.raw_SC / temperature_of(of.raw_SC, class_S, of.trial_S)
    return -log_softmax(raw_SC, axis=1)[np.arange(len(class_S)), class_S].astype(float)


@contextmanager
def regressions_alone(model: NEDS, subjects: list[Subject]) -> Iterator[None]:
    """Meanwhile sessions are decoded by nothing but their own regressions."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if _out(name)}
    for subject in subjects:
        if subject.hear is not None:
            for name in subject.present:
                decode_by_regression(model, subject, name)
    try:
        yield
    finally:
        model.load_state_dict(before, strict=False)


def _out(name: str) -> bool:
    return ".behaviour_out." in name or ".linear.out." in name


@torch.no_grad()
def decode_by_regression(model: NEDS, subject: Subject, name: str) -> None:
    """Read a behaviour out of what the session's own regression says of it, and nothing else."""
    assert subject.hear is not None
    parts = model.parts(subject.id)
    assert parts.linear is not None
    for parameter in parts.behaviour_out[name].parameters():
        parameter.zero_()
    for key, tensor in parts.linear.out[name].state_dict().items():
        tensor.copy_(subject.hear().outs[f"{name}.{key}"])
