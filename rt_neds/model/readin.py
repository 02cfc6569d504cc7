"""From what was observed to tokens: one session's units, or one behaviour.

Shape suffixes: B batch, T bins, N units of one session, K boxcar widths, P places, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

PLACES = 25
"""Places of a normalised behaviour, a quarter of an sd apart, on three sds either side."""


def boxcar_sums(counts_BTN: Tensor, history: Sequence[int]) -> Tensor:
    """Spikes in the last ``k`` bins, the current one included, for each ``k`` of ``history``.

    Parameters
    ----------
    counts_BTN : tensor
        Counts; unobserved bins must be zero. Before the first bin there is nothing.
    history : sequence of int

    Returns
    -------
    tensor, shape (B, T, K, N)
    """
    if max(history) == 1:
        return counts_BTN[:, :, None].expand(-1, -1, len(history), -1)
    # Sums of integers below 2**24 are exact in float32, so a long cumulative sum loses nothing.
    total = nnf.pad(counts_BTN.cumsum(dim=1), (0, 0, max(history), 0))
    T = counts_BTN.shape[1]
    last = total[:, max(history) :]
    sums = [last - total[:, max(history) - k : max(history) - k + T] for k in history]
    return torch.stack(sums, dim=2)


def square_root(x: Tensor) -> Tensor:
    """Square roots of counts, of which most are zero: of that, MKL takes eleven times as long."""
    if x.device.type == "cpu" and not x.requires_grad:
        return torch.from_numpy(np.sqrt(x.numpy()))
    return x.sqrt()


class SpikeReadIn(nn.Module):
    """One session's counts to one vector per bin.

    Square roots of boxcar sums, standardised by unit, then linear. A unit that is masked (in
    training) or missing (at the rig) enters with a learned value instead, so that "masked", "dead"
    and "silent" are three different things (MtM, arXiv 2407.14668, masks with zeros instead).
    """

    mean_KN: Tensor
    sd_KN: Tensor

    def __init__(self, units: int, dim: int, history: Sequence[int]) -> None:
        super().__init__()
        self.history = tuple(history)
        self.linear = nn.Linear(len(history) * units, dim)
        self.missing_KN = nn.Parameter(torch.zeros(len(history), units))
        self.register_buffer("mean_KN", torch.zeros(len(history), units))
        self.register_buffer("sd_KN", torch.ones(len(history), units))

    def standardise(self, counts_BTN: Tensor, missing_BTN: Tensor | None = None) -> Tensor:
        """Counts to features of shape (B, T, K * N); ``missing_BTN`` broadcasts over bins."""
        z_BTKN = square_root(boxcar_sums(counts_BTN, self.history))
        z_BTKN.sub_(self.mean_KN).div_(self.sd_KN)
        if missing_BTN is not None and missing_BTN.any():
            z_BTKN = torch.where(missing_BTN[:, :, None], self.missing_KN, z_BTKN)
        return z_BTKN.flatten(2)

    def forward(self, z_BTF: Tensor) -> Tensor:
        """Features to vectors of shape (B, T, D)."""
        return self.linear(z_BTF)


class ContinuousReadIn(nn.Module):
    """One session's continuous behaviour, already normalised, to one vector per bin.

    It enters as itself and as how near it is to each of a row of places, so that a unit that fires
    in one place, or at one speed, is a linear function away.
    """

    places_P: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("places_P", torch.linspace(-3.0, 3.0, PLACES))
        self.linear = nn.Linear(1 + PLACES, dim)

    def forward(self, value_BT: Tensor) -> Tensor:
        away_BTP = (value_BT[..., None] - self.places_P) * ((PLACES - 1) / 6.0)
        near_BTP = torch.exp(-0.5 * away_BTP**2)
        return self.linear(torch.cat([value_BT[..., None], near_BTP], dim=-1))


class CategoricalReadIn(nn.Module):
    """A categorical behaviour, shared by all sessions, to one vector per bin."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, dim)

    def forward(self, value_BT: Tensor) -> Tensor:
        return self.embedding(value_BT.long())
