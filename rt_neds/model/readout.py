"""From tokens to named outputs, and what each output means.

Shape suffixes: B batch, T bins, D model width, C numbers per output.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Kind = Literal["gaussian", "poisson", "categorical"]

LOG_VARIANCE_RANGE = (-8.0, 5.0)
LOG_RATE_RANGE = (-12.0, 8.0)


class Behaviour(msgspec.Struct, frozen=True, kw_only=True):
    """What is decoded and how it is written down.

    Attributes
    ----------
    name : str
    kind : {"gaussian", "poisson", "categorical"}
    classes : tuple of str
        Names of the classes of a categorical behaviour, in the order of its probabilities.
    unit : str
        Physical unit of a continuous one.
    """

    name: str
    kind: Kind
    classes: tuple[str, ...] = ()
    unit: str = ""

    @property
    def outputs(self) -> int:
        """Numbers the network gives: mean and log-variance, log-rate, or one logit per class."""
        return {"gaussian": 2, "poisson": 1, "categorical": len(self.classes)}[self.kind]


class ReadOut(nn.Module):
    """Linear map from a token to the numbers of one output."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, outputs)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear(x_BTD)


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """A session's physical scale of one continuous behaviour, from its training split.

    Attributes
    ----------
    mean, sd : float
        Normaliser.
    low, high : float or None
        Range that was seen; a decoded mean is held inside it.
    """

    mean: float = 0.0
    sd: float = 1.0
    low: float | None = None
    high: float | None = None


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
    if behaviour.kind == "gaussian":
        mean = float(raw_C[0]) * scale.sd + scale.mean
        if scale.low is not None and scale.high is not None:
            mean = min(max(mean, scale.low), scale.high)
        log_variance = min(max(float(raw_C[1]), LOG_VARIANCE_RANGE[0]), LOG_VARIANCE_RANGE[1])
        return [mean, float(np.exp(0.5 * log_variance)) * scale.sd]
    if behaviour.kind == "poisson":
        return [float(np.exp(min(max(float(raw_C[0]), LOG_RATE_RANGE[0]), LOG_RATE_RANGE[1])))]
    e = np.exp(raw_C - raw_C.max())
    return [float(p) for p in e / e.sum()]


def to_values_TV(raw_TC: Tensor, behaviour: Behaviour, scale: Scale) -> Tensor:
    """The same for a whole sequence, shape (T, C)."""
    if behaviour.kind == "gaussian":
        mean = raw_TC[:, 0] * scale.sd + scale.mean
        if scale.low is not None and scale.high is not None:
            mean = mean.clamp(scale.low, scale.high)
        spread = (0.5 * raw_TC[:, 1].clamp(*LOG_VARIANCE_RANGE)).exp() * scale.sd
        return torch.stack([mean, spread], dim=1)
    if behaviour.kind == "poisson":
        return raw_TC.clamp(*LOG_RATE_RANGE).exp()
    return raw_TC.softmax(dim=1)
