"""One loss per modality: a mean over what was asked, then a weighted sum, so that none is drowned.

Shape suffixes: B samples, T bins, N units, C numbers of an output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from rt_neds.model.readout import LOG_RATE_RANGE, LOG_VARIANCE_RANGE, Kind


def loss_of(kind: Kind, raw_BTC: Tensor, target_BT: Tensor, asked_BT: Tensor) -> Tensor:
    """Mean loss of one behaviour over the bins that were asked for; zero if none was.

    A gaussian's mean is fitted by squared error and its variance by likelihood on the residual that
    is left (detached): the joint likelihood lets hard bins be given up as noise, which costs R2.

    Parameters
    ----------
    kind : {"gaussian", "poisson", "categorical"}
    raw_BTC : tensor
        What the network gave.
    target_BT : tensor
        Normalised value, count, or class number.
    asked_BT : tensor of bool

    Returns
    -------
    tensor, scalar
    """
    raw, target = raw_BTC[asked_BT], target_BT[asked_BT]
    if len(target) == 0:
        return raw_BTC.sum() * 0.0
    if kind == "categorical":
        return nnf.cross_entropy(raw, target.long())
    if kind == "poisson":
        log_rate = raw[:, 0].clamp(*LOG_RATE_RANGE)
        return (log_rate.exp() - target * log_rate).mean()
    residual = (raw[:, 0] - target) ** 2
    log_variance = raw[:, 1].clamp(*LOG_VARIANCE_RANGE)
    likelihood = 0.5 * (log_variance + residual.detach() * (-log_variance).exp())
    return 0.5 * residual.mean() + likelihood.mean()


def spikes_loss(log_rate_BTN: Tensor, counts_BTN: Tensor, asked_BT: Tensor) -> Tensor:
    """Poisson loss of the spikes, without the factorial, mean over asked bins and all units."""
    log_rate, counts = log_rate_BTN[asked_BT].clamp(*LOG_RATE_RANGE), counts_BTN[asked_BT]
    if len(counts) == 0:
        return log_rate_BTN.sum() * 0.0
    return (torch.exp(log_rate) - counts * log_rate).mean()
