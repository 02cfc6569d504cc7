"""What a network is not shown to decode better than each session's own regression is left to that.

One step of training is kept for all that a network decodes. What it has learned by heart by then,
a choice of a dozen trials say, must not cost what it has learned of others (decision 0031). And
the best of a dozen steps on a dozen trials of validation is better than regression by chance
(decision 0033).

Shape suffix: X trials or windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from offline.batches import Subject
from offline.processes import Processes
from offline.validation import LEAST_SCORE, Scores, Validation
from rt_neds.model.neds import NEDS

T = TypeVar("T")

SURE = 0.025
"""Chance at which a network that is no better than regression is taken for better."""


Left = dict[str, list[str]]
"""By session id, behaviours that are left to its own regression."""


def regressions_validated(
    model: NEDS,
    subjects: list[Subject],
    processes: Processes,
    validate: Callable[[], Validation],
) -> Validation:
    """What each session's own regression, alone, is worth on the validation split."""
    heard = {subject.id: subject.present for subject in subjects if subject.hear is not None}
    if not heard:
        return Validation({}, {})
    with regressions_alone(model, processes.own(subjects)):
        val = validate()

    def only(found: dict[str, dict[str, T]]) -> dict[str, dict[str, T]]:
        return {
            session: {name: of[name] for name in heard[session] if name in of}
            for session, of in found.items()
            if session in heard
        }

    return Validation(only(val.scores), only(val.losses))


def left_to_regression(
    now: Validation, alone: Validation, subjects: list[Subject], processes: Processes
) -> Left:
    """Behaviours that are left to regression, should a network that is worth ``now`` be kept.

    One session is to be decoded with what is made of it: of each behaviour its trials, or windows,
    must show (t-test of pairs, ``SURE``) that the network is better than regression ``alone``; one
    that does not change in validation, while others do, shows nothing. What several sessions taught
    is for the next one to begin with: there a behaviour is left to regression, in all of them, if
    that is better in the mean.
    """
    if len(now.scores) > 1:
        worse = _worse_in_the_mean(now.scores, alone.scores)
        return {session: [n for n in of if n in worse] for session, of in alone.scores.items()}
    shown = {
        session: {n: float(_shown(loss_X - now.losses[session][n])) for n, loss_X in of.items()}
        for session, of in alone.losses.items()
    }
    names = [name for of in alone.scores.values() for name in of]
    shown = processes.gather(shown, list(alone.scores), names)
    return {
        subject.id: [n for n in subject.present if not shown[subject.id].get(n)]
        for subject in subjects
        if shown.get(subject.id)  # nothing at all could be shown: without validation, say
    }


def _worse_in_the_mean(now: Scores, alone: Scores) -> set[str]:
    gains: dict[str, list[float]] = {}
    for session, of in alone.items():
        for name, score in of.items():
            gain = max(now[session][name], LEAST_SCORE) - max(score, LEAST_SCORE)
            gains.setdefault(name, []).append(gain)
    return {name for name, of in gains.items() if np.mean(of) < 0}


def _shown(gain_X: NDArray[np.float64]) -> bool:
    if len(gain_X) < 2 or not gain_X.any():
        return False
    return bool(stats.ttest_1samp(gain_X, 0.0, alternative="greater").pvalue < SURE)


def as_kept(now: Validation, alone: Validation, left: Left) -> Scores:
    """Scores with what is left to regression scored as regression."""
    return {
        session: of | {n: alone.scores[session][n] for n in left.get(session, ()) if n in of}
        for session, of in now.scores.items()
    }


def leave_to_regression(model: NEDS, subjects: Sequence[Subject], left: Left) -> None:
    """Decode by each session's own regression what is left to it."""
    for subject in subjects:
        for name in left.get(subject.id, ()):
            decode_by_regression(model, subject, name)


@contextmanager
def regressions_alone(model: NEDS, subjects: Sequence[Subject]) -> Iterator[None]:
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
