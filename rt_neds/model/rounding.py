"""Weights that fit into two bytes each: a step on a CPU takes as long as its weights take to come.

A bundle's are rounded when it is written, so that everyone who reads it has the same ones
(``docs/decisions/0019``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rt_neds.model.neds import NEDS

TRUNK = ("layers.", "spikes_shared.", "linear_in.", "memory.")
"""What every session shares, and every bin reads whole."""


def trunk_weights(model: NEDS) -> Iterator[tuple[str, Tensor]]:
    """Names and matrices of the trunk's linear maps."""
    for name, parameter in model.named_parameters():
        if name.startswith(TRUNK) and name.endswith(".weight") and parameter.dim() == 2:
            yield name, parameter


def is_rounded(model: NEDS) -> bool:
    """Whether each weight of the trunk is a bfloat16."""
    return all(torch.equal(w, w.bfloat16().to(w.dtype)) for _, w in trunk_weights(model))


@torch.no_grad()
def round_trunk(model: NEDS) -> NEDS:
    """Round the weights of the trunk to bfloat16, in place; the network is returned."""
    for _, weight in trunk_weights(model):
        weight.copy_(weight.bfloat16())
    return model
