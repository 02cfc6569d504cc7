"""One loss per modality: a mean over what was asked, then a weighted sum, so that none is drowned.

Shape suffixes: B samples, T bins, S scored bins, Q asked bins, N units, C numbers of an output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from rt_neds.model.readout import LOG_RATE_RANGE, SMEAR, Kind, Scale


def loss_of(
    kind: Kind, raw_BTC: Tensor, target_BT: Tensor, asked_BT: Tensor, scale: Scale
) -> Tensor:
    """Mean loss of one behaviour over the bins that were asked for; zero if none was.

    A continuous one is asked which step of its range it is in, and a value is smeared over the
    steps around it (HL-Gauss: Imani and White, arXiv 1806.04613, section 4). Against squared error
    this gains .06 of R2 on real recordings (``docs/decisions/0012``), and its sd is learned.

    Parameters
    ----------
    kind : {"continuous", "poisson", "categorical"}
    raw_BTC : tensor
        What the network gave.
    target_BT : tensor
        Value in physical units, count, or class number.
    asked_BT : tensor of bool
    scale : Scale
        Of a continuous behaviour in this session.

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
    return nnf.cross_entropy(raw, smeared(target, scale))


def smeared(value_S: Tensor, scale: Scale) -> Tensor:
    """Share of each step of the range in values smeared by a normal curve, shape (S, STEPS).

    A value outside the range counts as the end of it, as it does where it is observed live.
    """
    values_C = torch.from_numpy(scale.values_C).to(value_S.device)
    inside_S = value_S.clamp(scale.low, scale.high)
    away_SC = (inside_S[:, None] - values_C) / (SMEAR * scale.step)
    return torch.softmax(-0.5 * away_SC**2, dim=1)


def spikes_loss(
    log_rate_BTN: Tensor, counts_BTN: Tensor, asked_BT: Tensor, asked_BN: Tensor, rate_N: Tensor
) -> Tensor:
    """Poisson loss of the spikes, without the factorial, over asked bins of asked units.

    That of each unit is divided by ``rate_N``, its spikes per bin, and so in nats per spike, as
    units are scored: summed as it is, one unit of a hundred spikes a second would be all that is
    learned, and per bin it would be a tenth of a behaviour's loss, or less.
    """
    rows, bins = asked_BT.nonzero(as_tuple=True)
    if len(rows) == 0:
        return log_rate_BTN.sum() * 0.0
    log_rate, counts = log_rate_BTN[rows, bins].clamp(*LOG_RATE_RANGE), counts_BTN[rows, bins]
    loss_QN, asked_QN = (torch.exp(log_rate) - counts * log_rate) / rate_N, asked_BN[rows]
    return (loss_QN * asked_QN).sum() / asked_QN.sum()
