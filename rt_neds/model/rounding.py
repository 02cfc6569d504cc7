"""Weights that fit into one byte each: a step on a CPU takes as long as its weights take to come.

Each output of a linear map of the trunk has a scale, and its weights are whole multiples of that,
127 at most. A bundle's are rounded so when it is written, and everyone who reads it has the same
ones (``docs/decisions/0036``).

Shape suffixes: E outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rt_neds.model.neds import NEDS

TRUNK = ("layers.", "spikes_shared.", "memory.")
"""What every session shares, and every bin reads whole."""
MOST = 127
SCALE_BITS = 11
"""Of a scale's significand: with seven of a multiple the product is exact in float32, and the
greatest weight of a row is 127 times its scale, so that the scale can be read off it again."""
LEAST = 2.0**-100
"""An output whose weights are all smaller has none."""


def trunk_weights(model: NEDS) -> Iterator[tuple[str, Tensor]]:
    """Names and matrices of the trunk's linear maps."""
    for name, parameter in model.named_parameters():
        if name.startswith(TRUNK) and name.endswith(".weight") and parameter.dim() == 2:
            yield name, parameter


@torch.no_grad()
def to_bytes(weight_EI: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest multiples of a scale for each output, as int8 (E, I), and the scales (E,).

    Weights that are such multiples are given back exactly.
    """
    most_E = weight_EI.detach().abs().amax(dim=1).double()
    exact_E = torch.where(most_E < LEAST, 1.0, most_E / MOST)
    grain_E = 2.0 ** (torch.floor(torch.log2(exact_E)) + 1 - SCALE_BITS)
    scale_E = torch.ceil(exact_E / grain_E) * grain_E
    whole_EI = torch.round(weight_EI.detach().double() / scale_E[:, None])
    return whole_EI.to(torch.int8), scale_E.to(torch.float32)


def from_bytes(whole_EI: Tensor, scale_E: Tensor) -> Tensor:
    """The weights, in float32."""
    return whole_EI.to(torch.float32) * scale_E[:, None]


def is_rounded(model: NEDS) -> bool:
    """Whether the weights of each of the trunk's outputs are multiples of a scale."""
    return all(torch.equal(w, from_bytes(*to_bytes(w)).to(w)) for _, w in trunk_weights(model))


@torch.no_grad()
def round_trunk(model: NEDS) -> NEDS:
    """Round the weights of the trunk, in place; the network is returned."""
    for _, weight in trunk_weights(model):
        weight.copy_(from_bytes(*to_bytes(weight)))
    return model
