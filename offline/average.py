"""The running average of the weights: steadier than any of them, and what is kept."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from rt_neds.model.neds import NEDS


def touched(model: NEDS, sessions: Iterable[str]) -> list[nn.Parameter]:
    """Parameters that a step of these sessions may use: theirs, and those that all share."""
    found = list(model.parameters(recurse=False))
    for name, part in model.named_children():
        if name != "sessions":
            found += part.parameters()
    for session in sessions:
        found += model.parts(session).parameters()
    return found


class RunningAverage:
    """Exponential average over steps, in which a step costs nothing for sessions it is not of.

    What belongs to a session stands still until the next step of that session. Its average is owed
    the steps between, and gets them all at once: at that next step, or when it is asked for.

    Parameters
    ----------
    model : NEDS
        Whose weights are averaged; the average begins at them.

    Attributes
    ----------
    mean : NEDS
        The average; whole after :meth:`settle`.
    """

    def __init__(self, model: NEDS) -> None:
        self._model = model
        self.mean = copy.deepcopy(model).eval()
        self._owed = dict.fromkeys(model.session_ids, 1.0)

    def before(self, sessions: Sequence[str]) -> None:
        """To be called before the weights change in a step of these sessions."""
        for session in sessions:
            theirs, ours = self._model.parts(session), self.mean.parts(session)
            _draw_near(ours.parameters(), theirs.parameters(), self._owed[session])
            self._owed[session] = 1.0

    def after(self, sessions: Sequence[str], decay: float) -> None:
        """To be called after the weights changed in that step."""
        near = touched(self._model, sessions)
        _draw_near(touched(self.mean, sessions), near, decay)
        for session in self._owed:
            if session not in sessions:
                self._owed[session] *= decay

    def settle(self) -> NEDS:
        """The average, nothing owed."""
        self.before(list(self._owed))
        return self.mean


@torch.no_grad()
def _draw_near(
    means: Iterable[nn.Parameter], targets: Iterable[nn.Parameter], decay: float
) -> None:
    if decay == 1.0:
        return
    torch._foreach_lerp_(list(means), list(targets), 1.0 - decay)
