"""Products of matrices in bfloat16, where training is told so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bf16_products(wanted: bool) -> Iterator[None]:
    """Meanwhile a CPU rounds what it multiplies to bfloat16; sums and results stay float32.

    On a GPU that is autocast's to do. A processor that has no such products goes on in float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if wanted else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
