"""From tokens to named outputs, and what each output means.

Shape suffixes: B batch, T bins, D model width, C numbers per output.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Kind = Literal["continuous", "poisson", "categorical"]

SMEAR = 1.5
"""Steps by which training smears a true value: neighbours of the right step are nearly right."""
RANGE_STEPS, MARGIN_STEPS = 51, 5
"""Steps of the range that was seen, and beyond each end: what smearing reaches from the end itself.

With less beyond the ends, the smearing there is cut off, and what is published drawn inwards.
"""
STEPS = RANGE_STEPS + 2 * MARGIN_STEPS
"""Steps of a continuous behaviour that get a probability each."""
LOG_RATE_RANGE = (-12.0, 8.0)


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """What is decoded and how it is written down.

    Attributes
    ----------
    name : str
    kind : {"continuous", "poisson", "categorical"}
    classes : tuple of str
        Names of the classes of a categorical behaviour, in the order of its probabilities.
    unit : str
        Physical unit of a continuous one.
    live : bool
        Whether training also showed it beside the spikes, so that it may be observed while others
        are decoded.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    unit: str = ""
    live: bool = False

    @property
    def outputs(self) -> int:
        """Numbers the network gives: a logit per step of its range or per class, or a log-rate."""
        return {"continuous": STEPS, "poisson": 1, "categorical": len(self.classes)}[self.kind]


class ReadOut(nn.Module):
    """Linear map from a token to the numbers of one output."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, outputs)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear(x_BTD)


class Scale(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A session's physical scale of one continuous behaviour, from its training split.

    Attributes
    ----------
    mean, sd : float
        Normaliser.
    low, high : float
        Range that was seen: the values of the first and last of ``RANGE_STEPS``.
    """

    mean: float = 0.0
    sd: float = 1.0
    low: float = -3.0
    high: float = 3.0

    @cached_property
    def values_C(self) -> NDArray[np.float32]:
        """Value at the middle of each step, shape (STEPS,)."""
        at_C = np.arange(STEPS) - MARGIN_STEPS
        return (self.low + at_C * self.step).astype(np.float32)

    def normalised(self, value: Any) -> Any:
        """What is observed, as the network reads it: no further out than was seen in training."""
        return (np.clip(value, self.low, self.high) - self.mean) / self.sd

    @property
    def step(self) -> float:
        """Width of a step; that of a range as wide as the sd where all values were the same."""
        return max(self.high - self.low, self.sd) / (RANGE_STEPS - 1)


def _spread(variance: Any, step: float) -> Any:
    """Sd without what the smearing put into it; no less than half a step."""
    return (variance - (SMEAR * step) ** 2).clip(min=(0.5 * step) ** 2) ** 0.5


def to_values(raw_C: NDArray[np.float32], behaviour: Behaviour, scale: Scale) -> list[float]:
    """What is published for one output of one bin, in physical units.

    Parameters
    ----------
    raw_C : ndarray
        Numbers the network gave.
    behaviour : Behaviour
    scale : Scale
        Of a continuous behaviour in this session.

    Returns
    -------
    list of float
        Mean and sd; rate per bin; or probabilities.
    """
    if behaviour.kind == "poisson":
        return [float(np.exp(min(max(float(raw_C[0]), LOG_RATE_RANGE[0]), LOG_RATE_RANGE[1])))]
    e_C = np.exp(raw_C - raw_C.max())
    p_C = e_C / e_C.sum()
    if behaviour.kind == "continuous":
        mean = float(p_C @ scale.values_C)
        variance = p_C @ (scale.values_C - mean) ** 2
        return [mean, float(_spread(variance, scale.step))]
    return p_C.tolist()


def to_values_TV(raw_TC: Tensor, behaviour: Behaviour, scale: Scale) -> Tensor:
    """The same for a whole sequence, shape (T, values)."""
    if behaviour.kind == "poisson":
        return raw_TC.clamp(*LOG_RATE_RANGE).exp()
    p_TC = raw_TC.softmax(dim=1)
    if behaviour.kind == "continuous":
        values_C = torch.from_numpy(scale.values_C).to(raw_TC.device)
        mean_T = p_TC @ values_C
        variance_T = (p_TC * (values_C - mean_T[:, None]) ** 2).sum(dim=1)
        return torch.stack([mean_T, _spread(variance_T, scale.step)], dim=1)
    return p_TC
