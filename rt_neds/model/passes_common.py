"""What the compiled passes of training have in common.

No compiled function: numba's cache does not notice that one changed in another file than the one
that calls it, so each has its own copy of what both need. After a change here, clear the cache.
"""

from __future__ import annotations

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
from numba.core import types
from numba.extending import intrinsic

LANES = 16 if llvm.get_host_cpu_features().get("avx512f", False) else 8
"""Numbers in the widest vector there is."""

plain = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
summing = numba.njit(
    cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}
)


@intrinsic
def wide(typingctx):  # type: ignore[no-untyped-def]
    """Lets the compiler use the widest vectors there are in the function that calls this."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        # llvmlite has no name for it, and its own ``add`` refuses what it has no name for.
        set.add(builder.function.attributes, f'"prefer-vector-width"="{32 * LANES}"')
        return context.get_dummy_value()

    return types.void(), generate
