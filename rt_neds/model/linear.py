"""What a linear decoder makes of the spikes, and what is made of that.

Shape suffixes: B batch, T bins, F features of the read-in, U numbers the decoder says, X fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from rt_neds.model.readout import Behaviour


def numbers_said(behaviour: Behaviour) -> int:
    """Numbers a linear decoder says of a behaviour: a value in sds, or a score per class."""
    return {"continuous": 1, "poisson": 1, "categorical": len(behaviour.classes)}[behaviour.kind]


def where_said(behaviours: Sequence[Behaviour]) -> dict[str, slice]:
    """Where, among all that a linear decoder says, each behaviour is."""
    ends = list(accumulate(map(numbers_said, behaviours), initial=0))
    return {b.name: slice(a, z) for b, a, z in zip(behaviours, ends, ends[1:], strict=False)}


class LinearDecoder(nn.Module):
    """One session's linear decoder of all its behaviours, on the features its read-in has.

    It is fitted in closed form before training (``offline.linear``) and stays as it is. The network
    is told what it says, in numbers that mean the same of every animal, and each read-out begins as
    how likely each value is given them: before the first step the network decodes as well as
    regression does, of a new animal too, and it learns what regression does not know
    (``docs/decisions/0022``).

    Parameters
    ----------
    features : int
    behaviours : sequence of Behaviour
    """

    weight_UF: Tensor
    bias_U: Tensor

    def __init__(self, features: int, behaviours: Sequence[Behaviour]) -> None:
        super().__init__()
        self.where, said = where_said(behaviours), sum(map(numbers_said, behaviours))
        self.register_buffer("weight_UF", torch.zeros(said, features))
        self.register_buffer("bias_U", torch.zeros(said))
        self.out = nn.ModuleDict(
            {b.name: nn.Linear(numbers_said(b), b.outputs) for b in behaviours}
        )
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z_BTF: Tensor, fits: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """What it says of each bin.

        Parameters
        ----------
        z_BTF : tensor
            Standardised features of the read-in.
        fits : (tensor, tensor, tensor), optional
            Weights (X, U, F) and biases (X, U) of several decoders, and which of them speaks at
            each bin (B, T): in training one that was not fitted to the bin.

        Returns
        -------
        tensor, shape (B, T, U)
        """
        if fits is None:
            return z_BTF @ self.weight_UF.T + self.bias_U
        weight_XUF, bias_XU, fit_BT = fits
        X, U, F = weight_XUF.shape
        said_BTXU = (z_BTF @ weight_XUF.view(X * U, F).T).view(*z_BTF.shape[:2], X, U) + bias_XU
        at = fit_BT[:, :, None, None].expand(-1, -1, 1, U)
        return said_BTXU.gather(2, at)[:, :, 0]

    def read_out(self, name: str, said_BTU: Tensor) -> Tensor:
        """What it adds to the numbers of an output."""
        return self.out[name](said_BTU[..., self.where[name]])
