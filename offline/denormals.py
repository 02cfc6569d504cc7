"""Numbers too small to be normal, for which a processor takes some hundred times as long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def flushed() -> Iterator[None]:
    """Meanwhile they count as zero, in this thread: how near a value is to places far off, say.

    Where a processor cannot, nothing changes. It is not left so, for others would be surprised:
    NumPy warns of it.
    """
    before = _are_flushed()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _are_flushed() -> bool:
    """PyTorch sets it, and does not say how it is set."""
    return not (torch.tensor([2.0**-100]) * 2.0**-40).item()
