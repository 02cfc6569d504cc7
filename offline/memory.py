"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ENOUGH = 1 << 30


def keep_freed() -> None:
    """Keep what is freed for the next step, which asks for as much again.

    The GNU library gives it back to the system, and when it gets it again every page of it comes
    with a fault: 6 % of a step of the base size. Other libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, ENOUGH)
    mallopt(M_MMAP_THRESHOLD, ENOUGH)
