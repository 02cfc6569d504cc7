"""Rotary attention over bins: banded and block-causal, or full; over a whole sequence, or a ring.

Shape suffixes: B batch, T query bins, S key bins, M modalities (tokens per bin), D model width,
H heads, F width of a head, R rows of the ring, Q = T * M queries, P key tokens (of all S bins).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import ArrayLike
from torch import Tensor, nn

from rt_neds.model import passes

ROTARY_BASE = 10_000.0
NEVER = -(1 << 60)
"""Bin number of a ring row that holds nothing."""


def rotary_table(bins_T: ArrayLike, head_width: int) -> Tensor:
    """Cosines and sines of the rotary angles of some bins.

    Angles are computed in float64 on the host and cast last: in float32 they are off by 0.04 after
    six hours of 20 ms bins.

    Parameters
    ----------
    bins_T : array of int, shape (bins,)
    head_width : int

    Returns
    -------
    tensor of float32, shape (2, bins, head_width / 2)
    """
    frequency_F = ROTARY_BASE ** -(np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    angle_TF = np.asarray(bins_T, dtype=np.float64)[:, None] * frequency_F
    return torch.from_numpy(np.stack([np.cos(angle_TF), np.sin(angle_TF)]).astype(np.float32))


def rotate(x_BHTMF: Tensor, table_2TF: Tensor) -> Tensor:
    """Turn the two halves of each head by the angle of the bin."""
    cos, sin = table_2TF[0][:, None, :], table_2TF[1][:, None, :]
    a, b = x_BHTMF.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def visible(query_bins_T: Tensor, key_bins_S: Tensor, context: int, causal: bool) -> Tensor:
    """Which bin may look at which, shape (T, S): the last ``context`` bins, itself included."""
    ago_TS = query_bins_T[:, None] - key_bins_S[None, :]
    if causal:
        return (ago_TS >= 0) & (ago_TS < context)
    return torch.ones_like(ago_TS, dtype=torch.bool)


class Attention(nn.Module):
    """Multi-head attention with rotary positions and one learned sink.

    The sink is a value that every query may attend to: a token that sees nothing (before the first
    spike, inside a hole) still has somewhere to look, and no softmax is ever empty. Its key is
    zero, for any other would make what it attracts depend on the absolute bin number.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.sink_value_HF = nn.Parameter(torch.zeros(heads, dim // heads))

    def project(
        self, x_BTMD: Tensor, table_2TF: Tensor, asking: Sequence[int], keys: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the tokens ``asking``, keys and values of the tokens ``keys``, rotated.

        Each of shape (B, H, T, tokens, F). A token that nobody may see needs no key.
        """
        weight, bias, (M, D) = self.qkv.weight, self.qkv.bias, x_BTMD.shape[2:]
        if len(keys) == len(asking) == M:
            q, k, v = nnf.linear(x_BTMD, weight, bias).chunk(3, dim=-1)
        else:
            q = nnf.linear(x_BTMD[:, :, asking], weight[:D], bias[:D])
            k, v = nnf.linear(x_BTMD[:, :, keys], weight[D:], bias[D:]).chunk(2, dim=-1)
        q, k, v = (self._split(x) for x in (q, k, v))
        return rotate(q, table_2TF), rotate(k, table_2TF), v

    def _split(self, x_BTMD: Tensor) -> Tensor:
        B, T, M, D = x_BTMD.shape
        return x_BTMD.view(B, T, M, self.heads, D // self.heads).permute(0, 3, 1, 2, 4)

    def attend(
        self, q_BHTMF: Tensor, k_BHSMF: Tensor, v_BHSMF: Tensor, allowed_BTMP: Tensor
    ) -> Tensor:
        """Mix, for every query token, what the allowed keys and the sink say; (B, T, M, D).

        ``allowed_BTMP`` has a column for each key token, bin by bin, without the sink; its third
        axis may be 1 where all tokens of a bin see the same.
        """
        B, H, T, M, F = q_BHTMF.shape
        k = nnf.pad(k_BHSMF.flatten(2, 3), (0, 0, 0, 1))
        sink_BH1F = self.sink_value_HF[None, :, None].expand(B, H, 1, F)
        v = torch.cat([v_BHSMF.flatten(2, 3), sink_BH1F], dim=2)
        allowed_BTMP = nnf.pad(allowed_BTMP, (0, 1), value=True)
        allowed_BQP = allowed_BTMP.expand(-1, -1, M, -1).flatten(1, 2)
        out_BHQF = nnf.scaled_dot_product_attention(
            q_BHTMF.reshape(B, H, T * M, F), k, v, attn_mask=allowed_BQP[:, None]
        )
        return out_BHQF.view(B, H, T, M, F).permute(0, 2, 3, 1, 4).flatten(3)

    def sequence(
        self,
        x_BTMD: Tensor,
        table_2TF: Tensor,
        seen_BTM: Tensor,
        asking: Sequence[int],
        context: int,
        causal: bool,
    ) -> Tensor:
        """Mix within a whole sequence; ``out`` is still to be applied.

        Parameters
        ----------
        x_BTMD : tensor
            Tokens.
        table_2TF : tensor
            Rotary angles of the bins.
        seen_BTM : tensor of bool
            Which tokens of a bin serve as keys.
        asking : sequence of int
            Tokens of a bin that attend.
        context : int
        causal : bool

        Returns
        -------
        tensor, shape (B, T, asking tokens, D)
        """
        if x_BTMD.shape[2] == len(asking) == 1 and passes.pay(self, x_BTMD):
            x_BTD, seen_BT, reach = x_BTMD.squeeze(2), seen_BTM[:, :, 0], context if causal else 0
            out_BTD = passes.attended(
                x_BTD, self.qkv, self.sink_value_HF, table_2TF, seen_BT, reach
            )
            return out_BTD.unsqueeze(2)
        keys = seen_BTM.any(dim=1).any(dim=0).nonzero()[:, 0].tolist()
        q, k, v = self.project(x_BTMD, table_2TF, asking, keys)
        seen = seen_BTM[:, :, keys]
        T = x_BTMD.shape[1]
        bins_T = torch.arange(T, device=x_BTMD.device)
        # A band of width `context` leaves most of the T x T square dark: cut it into strips.
        strip = context if causal and context < T else T
        outs = []
        for start in range(0, T, strip):
            stop = min(start + strip, T)
            oldest = max(0, start - context + 1) if causal else 0
            newest = stop if causal else T
            band_TS = visible(bins_T[start:stop], bins_T[oldest:newest], context, causal)
            allowed_BTP = (band_TS[None, :, :, None] & seen[:, None, oldest:newest]).flatten(2)
            outs.append(
                self.attend(
                    q[:, :, start:stop],
                    k[:, :, oldest:newest],
                    v[:, :, oldest:newest],
                    allowed_BTP[:, :, None],
                )
            )
        return torch.cat(outs, dim=1)


@dataclass(slots=True)
class Ring:
    """Keys and values of the last bins, of every layer, and what they belong to.

    Attributes
    ----------
    keys, values : list of tensors, shape (B, H, R, M, F)
        One of each per layer. Keys are stored rotated by the angle of their own bin.
    bin_R : tensor of int64, shape (R,)
        Bin number in each row; ``NEVER`` for one that holds nothing. Row of bin b: ``b % R``.
    seen_BRM : tensor of bool, shape (B, R, M)
        Which of the tokens serve as keys.
    """

    keys: list[Tensor]
    values: list[Tensor]
    bin_R: Tensor
    seen_BRM: Tensor

    @classmethod
    def empty(cls, layers: int, shape_BHRMF: tuple[int, int, int, int, int], like: Tensor) -> Ring:
        """A ring that holds nothing."""
        B, _, R, M, _ = shape_BHRMF
        return cls(
            keys=[like.new_zeros(shape_BHRMF) for _ in range(layers)],
            values=[like.new_zeros(shape_BHRMF) for _ in range(layers)],
            bin_R=torch.full((R,), NEVER, dtype=torch.int64, device=like.device),
            seen_BRM=torch.zeros((B, R, M), dtype=torch.bool, device=like.device),
        )
