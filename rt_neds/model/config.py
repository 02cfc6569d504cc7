"""Size and kind of a network: what must be known to build one."""

from __future__ import annotations

from typing import Literal

import msgspec

from rt_neds.model.memory import ROUNDING


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Size and kind of the network.

    Attributes
    ----------
    dim, layers, heads : int
    widen : int
        Width of the feed-forward layer over ``dim``.
    context : int
        Bins a token sees in each layer, its own included.
    attention : {"causal", "full"}
        ``full`` is the paper's, for comparison; it cannot be served.
    tokens : {"bin", "modality"}
        ``bin``: one token per bin, made of what the bin shows; what is hidden is simply not in it.
        ``modality``, the paper's, for comparison: one token per modality and bin; hidden ones are
        learned vectors that all others see. It cannot be served.
    memory : int
        Longest time constant, in bins, of the running averages that outlast the context; 0 for no
        memory, as in the papers.
    history : tuple of int
        Widths, in bins, of the running sums of counts that a spike token is made of.
    linear : bool
        Whether a linear decoder of each session, fitted to the same sums before training, is heard
        and begun at.
    dropout : float
    """

    dim: int = 128
    layers: int = 4
    heads: int = 4
    widen: int = 2
    context: int = 100
    attention: Literal["causal", "full"] = "causal"
    tokens: Literal["bin", "modality"] = "bin"
    memory: int = 0
    history: tuple[int, ...] = (1, 5, 25)
    linear: bool = False
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if min(self.dim, self.layers, self.heads, self.widen, self.context) < 1:
            raise ValueError("dim, layers, heads, widen and context must be at least 1")
        if self.memory == 1 or self.memory < 0:
            raise ValueError(f"memory is {self.memory}; it needs at least 2 bins, or 0 for none")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} must be an even multiple of heads {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; 0 <= dropout < 1 is needed")
        if not self.history or min(self.history) < 1:
            raise ValueError("history needs widths of at least one bin")

    @property
    def streams(self) -> bool:
        """Whether it can be run bin by bin, and so served."""
        return self.attention == "causal" and self.tokens == "bin"

    @property
    def receptive_field(self) -> int:
        """Bins that can influence an output by more than rounding."""
        band = self.layers * (self.context - 1) + max(self.history)
        return band + ROUNDING * self.memory
