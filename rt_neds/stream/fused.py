"""One step of the network in one compiled call, for one CPU core.

Equal to ``NEDS.step`` for one stream that shows spikes and asks for behaviours. Both read every
weight once per bin; what this saves is everything around that:

* Spikes are the only keys, so only their token needs keys and values; the last layer needs no more
  of it than those, and a bin that is not observed needs nothing of it at all.
* The tokens of behaviours are hidden, hence constant: their first queries are computed at load.
* Scales, shifts and means (of the norms, of the standardisation, of missing units, of the softmax)
  are folded into the linear maps at load.
* Weights lie in one array in the order they are read, which is as the prefetcher wants them; all
  tokens use a weight while it is in a register.
* Keys lie so that scores are one more linear map whose bias says who is seen, and values so that
  mixing them is another; the sink is a row of both that never changes.

Shape suffixes: N units, K boxcar widths, C bins of the longest boxcar, M tokens (0 is spikes, then
each wanted behaviour), D model width padded to panels, G widened likewise, R rows of the ring and
the sink likewise, F half the width of a head, O numbers read out, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import nn

from rt_neds.model.attention import ROTARY_BASE
from rt_neds.model.neds import NEDS, SCHEMES, SPIKES

LANES = 16 if llvm.get_host_cpu_features().get("avx512f", False) else 8
PANEL = 2 * LANES
"""Outputs computed together: two vectors per token."""
TILE_TOKENS = 6
"""Most tokens computed together: 2 * 6 sums, 2 weights and an input fill 16 vector registers."""

Array = NDArray[np.float32]

# -- linear maps ---------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def _tile(typingctx, tokens, weights, at, inputs, x, x_at, x_stride, y, y_at, y_stride):  # type: ignore[no-untyped-def]
    """``y = bias + weights x`` for one panel of outputs and a constant number of tokens.

    Written as vector code because the sums must stay in registers over the whole of ``inputs``,
    which the compiler cannot promise of array elements that might overlap.
    """
    if not isinstance(tokens, types.IntegerLiteral):
        return None
    signature = types.void(tokens, weights, at, inputs, x, x_at, x_stride, y, y_at, y_stride)
    vector = ir.VectorType(ir.FloatType(), LANES)
    chains = 4 if tokens.literal_value == 1 else 2 if tokens.literal_value <= 3 else 1

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        def start(array: int, index: int) -> ir.Value:
            value = context.make_array(signature.args[array])(context, builder, args[array])
            return builder.gep(value.data, [args[index]])

        def load(pointer: ir.Value, offset: ir.Value) -> ir.Value:
            pointer = builder.gep(pointer, [offset])
            return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=4)

        def fused(a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
            return builder.fadd(builder.fmul(a, b, flags=["contract"]), c, flags=["contract"])

        def accumulate(first: ir.Value, count: int) -> None:
            """Add the products of ``count`` inputs, each to the sums of its own chain."""
            for chain in range(count):
                i = builder.add(first, size(chain))
                row = builder.mul(builder.add(i, size(1)), size(PANEL))
                columns = [load(w, builder.add(row, size(v * LANES))) for v in range(2)]
                for m in range(tokens.literal_value):
                    xi = builder.load(
                        builder.gep(x, [builder.add(i, builder.mul(size(m), args[6]))])
                    )
                    spread = builder.insert_element(ir.Constant(vector, ir.Undefined), xi, lane0)
                    spread = builder.shuffle_vector(spread, spread, all_lane0)
                    for v in range(2):
                        slot = sums[chain][m][v]
                        builder.store(fused(columns[v], spread, builder.load(slot)), slot)

        def size(n: int) -> ir.Constant:
            return ir.Constant(args[2].type, n)

        lane0 = ir.Constant(ir.IntType(32), 0)
        all_lane0 = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        w, x, y = start(1, 2), start(4, 5), start(7, 8)
        rows, halves = range(tokens.literal_value), range(2)
        sums = [
            [[cgutils.alloca_once(builder, vector) for _ in halves] for _ in rows]
            for _ in range(chains)
        ]
        zero = ir.Constant(vector, [0.0] * LANES)
        for chain, of_chain in enumerate(sums):
            for of_row in of_chain:
                for v, slot in enumerate(of_row):
                    builder.store(zero if chain else load(w, size(v * LANES)), slot)
        whole = builder.udiv(args[3], size(chains))
        with cgutils.for_range(builder, whole, intp=args[2].type) as loop:
            accumulate(builder.mul(loop.index, size(chains)), chains)
        if chains > 1:
            with cgutils.for_range_slice(
                builder, builder.mul(whole, size(chains)), args[3], size(1), intp=args[2].type
            ) as (index, _):
                accumulate(index, 1)
        for m in rows:
            for v in halves:
                total = builder.load(sums[0][m][v])
                for chain in range(1, chains):
                    total = builder.fadd(total, builder.load(sums[chain][m][v]))
                to = builder.add(builder.mul(size(m), args[9]), size(v * LANES))
                pointer = builder.bitcast(builder.gep(y, [to]), vector.as_pointer())
                builder.store(total, pointer, align=4)
        return context.get_dummy_value()

    return signature, generate
