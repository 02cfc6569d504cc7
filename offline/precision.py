"""Products of matrices in bfloat16, where training is told so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bf16_products(wanted: bool) -> Iterator[None]:
    """Meanwhile a CPU rounds what it multiplies to bfloat16; sums and results stay float32.

    On a GPU that is autocast's to do. Where PyTorch has no such products it goes on in float32; see
    :func:`rounds_factors`.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if wanted else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rounds_factors() -> bool:
    """Whether PyTorch does so on this processor, found by trying: it says nothing where not."""
    x = torch.full((256, 256), 1 + 2.0**-12)  # in bfloat16 that is 1
    with bf16_products(True):
        return bool((x @ x)[0, 0] == 256)
