"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ENOUGH = 1 << 30


def keep_freed() -> None:
    """Keep what is freed for the next step, which asks for as much again.

    The GNU library gives it back to the system, and when it gets it again every page of it comes
    with a fault: 6 % of a step of the base size. Other libraries are left as they are.
    """
    if mallopt := _of_the_library("mallopt"):
        mallopt(M_TRIM_THRESHOLD, ENOUGH)
        mallopt(M_MMAP_THRESHOLD, ENOUGH)


def give_back_freed() -> None:
    """Give back what lies unused between arrays, when what comes next wants other sizes."""
    if malloc_trim := _of_the_library("malloc_trim"):
        malloc_trim(0)


def _of_the_library(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
