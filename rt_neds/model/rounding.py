"""Weights that fit into one byte each: a step on a CPU takes as long as its weights take to come.

Each output of a linear map of the trunk has a scale, and its weights are whole multiples of that,
127 at most; in a session's read-in of spikes each input has, which is a unit that fires as it does
(:func:`by_scale`). A bundle's are rounded so when it is written, and everyone who reads it has the
same ones (``docs/decisions/0036``).

Shape suffixes: E outputs, I inputs, X weights of one scale, S scales.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rt_neds.model.neds import NEDS

TRUNK = ("layers.", "spikes_shared.", "memory.")
"""What every session shares, and every bin reads whole."""
READ_IN = ".spikes_in.linear.weight"
"""How the name of a session's read-in of spikes ends."""
MOST = 127
SCALE_BITS = 11
"""Of a scale's significand: with seven of a multiple the product is exact in float32, and the
greatest weight of a row is 127 times its scale, so that the scale can be read off it again."""
LEAST = 2.0**-100
"""A row whose weights are all smaller has none."""


def rounded_weights(model: NEDS, session: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and matrices, shape (E, I), of what is rounded: of all sessions, or of one."""
    only = "" if session is None else f"sessions.{model.session_ids.index(session)}."
    for name, parameter in model.named_parameters():
        of_trunk = name.startswith(TRUNK) and name.endswith(".weight")
        of_session = name.endswith(READ_IN) and name.startswith(only)
        # Of one dimension are scales of norms, and what another process keeps of a session.
        if (of_trunk or of_session) and parameter.dim() == 2:
            yield name, parameter


def by_scale(name: str, weight: Tensor) -> Tensor:
    """A matrix with a row for each scale, of the one it is for linear maps, or the reverse."""
    return weight.T if name.endswith(READ_IN) else weight


@torch.no_grad()
def to_bytes(weight_SX: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest multiples of a scale for each row, as int8 (S, X), and the scales (S,).

    Weights that are such multiples are given back exactly.
    """
    most_S = weight_SX.detach().abs().amax(dim=1).double()
    exact_S = torch.where(most_S < LEAST, 1.0, most_S / MOST)
    grain_S = 2.0 ** (torch.floor(torch.log2(exact_S)) + 1 - SCALE_BITS)
    scale_S = torch.ceil(exact_S / grain_S) * grain_S
    whole_SX = torch.round(weight_SX.detach().double() / scale_S[:, None])
    return whole_SX.to(torch.int8).contiguous(), scale_S.to(torch.float32)


def from_bytes(whole_SX: Tensor, scale_S: Tensor) -> Tensor:
    """The weights, in float32."""
    return whole_SX.to(torch.float32) * scale_S[:, None]


def _nearest(name: str, weight_EI: Tensor) -> Tensor:
    return by_scale(name, from_bytes(*to_bytes(by_scale(name, weight_EI))))


def is_rounded(model: NEDS, session: str | None = None) -> bool:
    """Whether all weights that a step reads of one session, or of all, are multiples of scales."""
    return all(
        torch.equal(w, _nearest(name, w).to(w)) for name, w in rounded_weights(model, session)
    )


@torch.no_grad()
def round_weights(model: NEDS) -> NEDS:
    """Round the weights that a bundle keeps in bytes, in place; the network is returned."""
    for name, weight in rounded_weights(model):
        weight.copy_(_nearest(name, weight))
    return model
