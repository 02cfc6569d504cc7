"""What a session's own regression decodes better by itself, and so is left to it.

One step of training is kept for all that a network decodes. What it has learned by heart by then,
a choice of a dozen trials say, must not cost what it has learned of others (decision 0031).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from offline.batches import Subject
from offline.validation import Scores
from rt_neds.model.neds import NEDS


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
    model: NEDS, subjects: list[Subject], val: Scores, alone: Scores
) -> dict[str, list[str]]:
    """Leave to its own regression what that decodes better than the network has learned to.

    Returns
    -------
    dict of str to list of str
        By session, the behaviours left to it.
    """
    left = {
        session: [name for name, score in of.items() if score > val[session].get(name, score)]
        for session, of in alone.items()
    }
    for subject in subjects:
        for name in left.get(subject.id, ()):
            decode_by_regression(model, subject, name)
    return {session: names for session, names in left.items() if names}


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
