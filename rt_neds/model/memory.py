"""What outlasts the context: running averages of the tokens, each at a pace that the token sets.

Shape suffixes: B batch, T bins, M tokens of a bin, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from rt_neds.model import passes

ROUNDING = 16
"""So many times its longest span after a bin, a memory holds less than float32 rounding of it."""


class Memory(nn.Module):
    """Gated running averages (a minimal recurrent unit: Feng et al., arXiv 2410.01201, section 3).

    Attention forgets what is older than its context: of an animal that stops, where it stopped. An
    average whose pace the token sets can wait, at the cost of a fraction of a layer
    (``docs/decisions/0014``)::

        keep = (1 - 1 / span) * sigmoid(gate(x))
        memory = keep * memory + (1 - keep) * value(x)

    A token of which nothing was observed leaves it as it is, until nothing observed is in sight of
    attention either: then it forgets, so that a long hole in a recording is a new beginning. It is
    bounded by the largest value, and what a bin left in it halves within ``0.7 * span`` bins.

    Parameters
    ----------
    dim : int
    span : int
        Longest time constant of an average, in bins.
    """

    def __init__(self, dim: int, span: int) -> None:
        super().__init__()
        self.longest = 1.0 - 1.0 / span
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        with torch.no_grad():  # time constants from two bins to hundreds
            self.gate.bias.copy_(torch.linspace(0.0, 6.0, dim))

    def sequence(
        self,
        normed_BTMD: Tensor,
        seen_BTM: Tensor,
        in_sight_BTM: Tensor,
        before_BMD: Tensor | None = None,
    ) -> Tensor:
        """The memory of each token after each bin, from the one before the first.

        Parameters
        ----------
        normed_BTMD : tensor
            Tokens, after ``norm``.
        seen_BTM : tensor of bool
            Of which anything was observed.
        in_sight_BTM : tensor of bool
            Whether anything was observed in the context of the bin.
        before_BMD : tensor, optional
            Memory before the first bin; nothing by default.

        Returns
        -------
        tensor, shape (B, T, M, D)
        """
        M = normed_BTMD.shape[2]
        if before_BMD is None and M == 1 and passes.pay(self, normed_BTMD):
            x_BTD, seen_BT, near_BT = (x.squeeze(2) for x in (normed_BTMD, seen_BTM, in_sight_BTM))
            held_BTD = passes.remembered(
                x_BTD, self.gate, self.value, seen_BT, near_BT, self.longest
            )
            return held_BTD.unsqueeze(2)
        keep = self.longest * torch.sigmoid(self.gate(normed_BTMD))
        fresh = torch.where(seen_BTM[..., None], (1.0 - keep) * self.value(normed_BTMD), 0.0)
        keep = torch.where(seen_BTM[..., None], keep, in_sight_BTM[..., None].to(keep.dtype))
        # Bins are joined by twos, fours, eights: a few large operations instead of one per bin.
        apart = 1
        while apart < normed_BTMD.shape[1]:
            earlier = (0, 0, 0, 0, apart, 0)
            fresh = fresh + keep * nnf.pad(fresh[:, :-apart], earlier)
            keep = keep * nnf.pad(keep[:, :-apart], earlier, value=1.0)
            apart *= 2
        return fresh if before_BMD is None else fresh + keep * before_BMD[:, None]


def in_sight(seen_BTM: Tensor, context: int) -> Tensor:
    """Whether anything was observed in the last ``context`` bins, the bin itself included."""
    count_BTM = nnf.pad(seen_BTM.cumsum(dim=1), (0, 0, context, 0))
    return count_BTM[:, context:] > count_BTM[:, :-context]
