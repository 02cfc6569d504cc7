"""The compiled part of the passes of training: one CPU core, float32.

This file only computes; what it is the derivative of is :mod:`rt_neds.model.passes`'s business.
All of it must stay in one file: numba's cache does not notice that a function changed in another.

* Arrays are read and written from their beginning to their end, whole: what is far takes long, and
  processors fetch by themselves only what lies ahead of what was read.
* Attention's products are small, of a head of a window, and need only what causality leaves of a
  square; they go through a tile of their own.
* A number is dropped by a hash of a seed, its row and its place in it.

Shape suffixes: B windows, T bins, D model width, H heads, F width of a head, P keys, Q queries that
attend together, R rows (bins of all windows), X numbers of any array, flat. Work space has P and F
padded to whole pairs of vectors.
"""

from __future__ import annotations

import math
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16 if llvm.get_host_cpu_features().get("avx512f", False) else 8
PAIR = 2 * LANES
ROWS = 8 if LANES == 16 else 4
"""A tile is so many rows of two vectors: its sums stay in registers, of which there are 32 or 16,
and are as many as must be under way for none to wait for itself."""
QUERIES = 32
"""Bins that attend together."""

_plain = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
_summing = numba.njit(
    cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}
)


@intrinsic
def _wide(typingctx):  # type: ignore[no-untyped-def]
    """Lets the compiler use the widest vectors there are in the function that calls this."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        # llvmlite has no name for it, and its own ``add`` refuses what it has no name for.
        set.add(builder.function.attributes, f'"prefer-vector-width"="{32 * LANES}"')
        return context.get_dummy_value()

    return types.void(), generate


# -- products ------------------------------------------------------------------------------------


@intrinsic
def _tile(typingctx, a, a_at, a_row, a_step, b, b_at, b_row, count, c, c_at, c_row, more):  # type: ignore[no-untyped-def]
    """``c = a b``, plus what was there if ``more``: ROWS rows of ``a``, a pair of vectors of ``b``.

    Arrays are flat. The next row of ``a`` is ``a_row`` numbers further, the next of the ``count``
    numbers that are multiplied and summed ``a_step``.
    """
    signature = types.void(a, a_at, a_row, a_step, b, b_at, b_row, count, c, c_at, c_row, more)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector, i32, size = ir.VectorType(ir.FloatType(), LANES), ir.IntType(32), args[1].type

        def pointer(array: int) -> Any:
            made = context.make_array(signature.args[array])(context, builder, args[array])
            return builder.gep(made.data, [args[array + 1]])

        def further(pointer: Any, number: Any, stride: Any) -> Any:
            return builder.gep(pointer, [builder.mul(number, stride)])

        def at(pointer: Any, v: int) -> Any:
            place = builder.gep(pointer, [size(v * LANES)])
            return builder.bitcast(place, vector.as_pointer())

        a, b, c = pointer(0), pointer(4), pointer(8)
        a_row, a_step, b_row, count, c_row, more = (args[n] for n in (2, 3, 6, 7, 10, 11))
        places = [(r, v) for r in range(ROWS) for v in range(2)]
        sums = {place: cgutils.alloca_once(builder, vector) for place in places}
        for place in places:
            builder.store(vector([0.0] * LANES), sums[place])
        with cgutils.for_range(builder, count) as loop:
            b_at, a_at = further(b, loop.index, b_row), further(a, loop.index, a_step)
            row = [builder.load(at(b_at, v), align=4) for v in range(2)]
            for r in range(ROWS):
                number = builder.load(further(a_at, size(r), a_row))
                spread = builder.insert_element(vector(ir.Undefined), number, i32(0))
                lane0 = ir.VectorType(i32, LANES)([0] * LANES)
                spread = builder.shuffle_vector(spread, spread, lane0)
                for v in range(2):
                    product = builder.fmul(row[v], spread, flags=["contract"])
                    total = builder.fadd(product, builder.load(sums[r, v]), flags=["contract"])
                    builder.store(total, sums[r, v])
        with builder.if_then(builder.icmp_signed("!=", more, size(0))):
            for r, v in places:
                before = builder.load(at(further(c, size(r), c_row), v), align=4)
                builder.store(builder.fadd(before, builder.load(sums[r, v])), sums[r, v])
        for r, v in places:
            to = at(further(c, size(r), c_row), v)
            builder.store(builder.load(sums[r, v]), to, align=4)
        return context.get_dummy_value()

    return signature, generate


@_plain
def _mix(rows, columns, a, a_at, a_row, a_step, b, b_at, b_row, count, c, c_at, c_row, more):  # type: ignore[no-untyped-def]
    """Whole tiles: what is beyond ``rows`` is written, too."""
    for p in range(0, columns, PAIR):
        for r in range(0, rows, ROWS):
            _tile(
                a, a_at + r * a_row, a_row, a_step, b, b_at + p, b_row, count,
                c, c_at + r * c_row + p, c_row, more,
            )  # fmt: skip


# -- dropout -------------------------------------------------------------------------------------


@_plain
def _key(seed, row):  # type: ignore[no-untyped-def]
    """Two random words for each row (splitmix64)."""
    x = np.uint64(seed) + np.uint64(row + 1) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return np.uint32(x & np.uint64(0xFFFFFFFF)), np.uint32(x >> np.uint64(32))


@_plain
def _draw(key, d):  # type: ignore[no-untyped-def]
    """A random word for each number of a row: rounds of multiplying and shifting, keyed twice."""
    x = np.uint32(np.uint32(d) ^ key[0])
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) ^ key[1])
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


# -- sum and norm --------------------------------------------------------------------------------


@_summing
def add(x_RD, more_RD, bias_D, scale_D, shift_D, epsilon, seed, zeroed, normed_RD, sd_2R):  # type: ignore[no-untyped-def]
    """``more`` becomes ``x + dropout(more + bias)``, ``normed`` the norm of that."""
    _wide()
    (R, D), least = x_RD.shape, np.uint32(zeroed)
    grow = np.float32(4294967296.0 / (4294967296.0 - zeroed))
    for r in range(R):
        key = _key(seed, r)
        x_D, sum_D, normed_D = x_RD[r], more_RD[r], normed_RD[r]
        total = squares = np.float32(0)
        for d in range(D):
            kept = _draw(key, d) >= least
            y = x_D[d] + (grow * (sum_D[d] + bias_D[d]) if kept else np.float32(0))
            sum_D[d] = y
            total += y
        mean = total / np.float32(D)
        for d in range(D):
            squares += (sum_D[d] - mean) * (sum_D[d] - mean)
        per_sd = np.float32(1) / np.sqrt(squares / np.float32(D) + epsilon)
        for d in range(D):
            normed_D[d] = (sum_D[d] - mean) * per_sd * scale_D[d] + shift_D[d]
        sd_2R[0, r], sd_2R[1, r] = mean, per_sd


@_summing
def add_back(g_sum_RD, g_normed_RD, sum_RD, sd_2R, scale_D, seed, zeroed, g_x_RD, g_more_RD, g_3D):  # type: ignore[no-untyped-def]
    """Gradients of both summands, and in ``g_3D`` of bias, scale and shift."""
    _wide()
    (R, D), least = sum_RD.shape, np.uint32(zeroed)
    grow = np.float32(4294967296.0 / (4294967296.0 - zeroed))
    g_bias_D, g_scale_D, g_shift_D = g_3D[0], g_3D[1], g_3D[2]
    for r in range(R):
        key = _key(seed, r)
        sum_D, g_sum_D, g_normed_D = sum_RD[r], g_sum_RD[r], g_normed_RD[r]
        g_x_D, g_more_D, mean, per_sd = g_x_RD[r], g_more_RD[r], sd_2R[0, r], sd_2R[1, r]
        total = along = np.float32(0)
        for d in range(D):
            z = (sum_D[d] - mean) * per_sd
            g = g_normed_D[d] * scale_D[d]
            total += g
            along += g * z
            g_scale_D[d] += g_normed_D[d] * z
            g_shift_D[d] += g_normed_D[d]
        total, along = total / np.float32(D), along / np.float32(D)
        for d in range(D):
            z = (sum_D[d] - mean) * per_sd
            g = g_sum_D[d] + per_sd * (g_normed_D[d] * scale_D[d] - total - along * z)
            g_x_D[d] = g
            more = grow * g if _draw(key, d) >= least else np.float32(0)
            g_more_D[d] = more
            g_bias_D[d] += more


# -- curves --------------------------------------------------------------------------------------

_EXP2 = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(7))


@_plain
def _exp2(x):  # type: ignore[no-untyped-def]
    """2**x for x <= 0, to two parts in 1e7; at least 2**-126."""
    x = x if x > np.float32(-126) else np.float32(-126)
    # Adding 1.5 * 2**23 leaves no bits for a fraction: what comes back is the nearest integer.
    n = (x + np.float32(12582912)) - np.float32(12582912)
    f, c = x - n, _EXP2
    p = ((c[6] * f + c[5]) * f + c[4]) * f + c[3]
    p = ((p * f + c[2]) * f + c[1]) * f + c[0]
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


def _of_the_tail(degree: int = 8, top: float = 6.0) -> list[tuple[np.float32, ...]]:
    """Polynomials on [0, top]: log2 of the normal distribution's upper tail, and what times the
    tail is the slope of gelu on the other side.

    The logarithm is nearly a parabola, and an error in it hardly matters where the tail is thin.
    """
    x = (np.polynomial.chebyshev.chebpts1(200) + 1) * top / 2
    tail = np.array([0.5 * math.erfc(float(a) / math.sqrt(2)) for a in x])
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    wanted = (np.log2(tail), (x + 1) * tail + 1e-3), (1 - x * density / tail, tail + 1e-4)
    fits = [np.polynomial.Chebyshev.fit(x, y, degree, [0, top], w=w) for y, w in wanted]
    kind = np.polynomial.Polynomial
    return [tuple(np.float32(c) for c in fit.convert(kind=kind).coef) for fit in fits]


_TAIL, _SLOPE = _of_the_tail()


@_plain
def _polynomial(c, x):  # type: ignore[no-untyped-def]
    p = (((c[8] * x + c[7]) * x + c[6]) * x + c[5]) * x + c[4]
    return (((p * x + c[3]) * x + c[2]) * x + c[1]) * x + c[0]


@_plain
def gelu(x_RD, bias_D, out_RD):  # type: ignore[no-untyped-def]
    """Gelu of ``x + bias``, to 5e-7; ``x`` becomes its slope there."""
    _wide()
    (R, D), zero, one = x_RD.shape, np.float32(0), np.float32(1)
    for r in range(R):
        x_D, out_D = x_RD[r], out_RD[r]
        for d in range(D):
            x = x_D[d] + bias_D[d]
            a = min(abs(x), np.float32(6))
            tail = _exp2(_polynomial(_TAIL, a))
            slope = tail * _polynomial(_SLOPE, a)
            out_D[d] = (zero if x < zero else x) - a * tail  # a NaN stays one
            x_D[d] = one - slope if x > zero else slope


@_plain
def softsign(x_RD, bias_D, out_RD):  # type: ignore[no-untyped-def]
    """Softsign of ``x + bias``; ``x`` becomes its slope there."""
    _wide()
    (R, D), one = x_RD.shape, np.float32(1)
    for r in range(R):
        x_D, out_D = x_RD[r], out_RD[r]
        for d in range(D):
            x = x_D[d] + bias_D[d]
            share = one / (one + abs(x))
            out_D[d] = x * share
            x_D[d] = share * share


@_plain
def curve_back(g_RD, slope_RD, g_bias_D):  # type: ignore[no-untyped-def]
    """``slope`` becomes the gradient of what the curve was of; in ``g_bias_D`` that of the bias."""
    _wide()
    R, D = slope_RD.shape
    for r in range(R):
        g_D, slope_D = g_RD[r], slope_RD[r]
        for d in range(D):
            g = g_D[d] * slope_D[d]
            slope_D[d] = g
            g_bias_D[d] += g


# -- memory --------------------------------------------------------------------------------------


@_plain
def remember(gate_BTD, gate_bias_D, value_BTD, value_bias_D, seen_BT, near_BT, longest, held_BTD):  # type: ignore[no-untyped-def]
    """The memory after each bin; ``gate`` becomes what is kept, and bias is added to ``value``."""
    _wide()
    (B, T, D), one = gate_BTD.shape, np.float32(1)
    bits, nothing_D = np.float32(math.log2(math.e)), np.zeros(D, np.float32)
    for b in range(B):
        for t in range(T):
            gate_D, value_D, held_D = gate_BTD[b, t], value_BTD[b, t], held_BTD[b, t]
            before_D = held_BTD[b, t - 1] if t > 0 else nothing_D
            if seen_BT[b, t]:
                for d in range(D):
                    x, value = gate_D[d] + gate_bias_D[d], value_D[d] + value_bias_D[d]
                    small = _exp2(-bits * abs(x))
                    keep = longest * (one if x > 0 else small) / (one + small)
                    held_D[d] = keep * before_D[d] + (one - keep) * value
                    gate_D[d], value_D[d] = keep, value
            else:
                keep = one if near_BT[b, t] else np.float32(0)
                for d in range(D):
                    held_D[d] = keep * before_D[d]


@_plain
def remember_back(g_held_BTD, keep_BTD, value_BTD, seen_BT, near_BT, longest, held_BTD, g_2D):  # type: ignore[no-untyped-def]
    """``keep`` and ``value`` become the gradients of gate and value, ``g_2D`` those of biases."""
    _wide()
    (B, T, D), one = keep_BTD.shape, np.float32(1)
    later_D, nothing_D, g_gate_bias_D, g_value_bias_D = (
        np.empty(D, np.float32), np.zeros(D, np.float32), g_2D[0], g_2D[1],
    )  # fmt: skip
    for b in range(B):
        later_D[:] = np.float32(0)
        for t in range(T - 1, -1, -1):
            keep_D, value_D, g_held_D = keep_BTD[b, t], value_BTD[b, t], g_held_BTD[b, t]
            before_D = held_BTD[b, t - 1] if t > 0 else nothing_D
            if seen_BT[b, t]:
                for d in range(D):
                    g, keep = g_held_D[d] + later_D[d], keep_D[d]
                    g_gate = g * (before_D[d] - value_D[d]) * keep * (one - keep / longest)
                    g_value = (one - keep) * g
                    later_D[d] = keep * g
                    keep_D[d], value_D[d] = g_gate, g_value
                    g_gate_bias_D[d] += g_gate
                    g_value_bias_D[d] += g_value
            else:
                keep = one if near_BT[b, t] else np.float32(0)
                for d in range(D):
                    later_D[d] = keep * (g_held_D[d] + later_D[d])
                    keep_D[d] = value_D[d] = np.float32(0)


# -- attention -----------------------------------------------------------------------------------


@_plain
def up(n, to):  # type: ignore[no-untyped-def]
    """The next multiple."""
    return (n + to - 1) // to * to


@_plain
def _in_reach(t, T, context):  # type: ignore[no-untyped-def]
    """First key and end of those that the queries from t on reach; first and number stored."""
    if context == 0:
        return 0, T, 0, up(T, PAIR)
    low, high = max(0, t - context + 1), min(T, t + QUERIES)
    first = low // PAIR * PAIR
    return low, high, first, up(high - first, PAIR)


@_plain
def shares_of_head(T, context):  # type: ignore[no-untyped-def]
    """Numbers that are kept of the shares of one head in one window."""
    total = 0
    for t in range(0, T, QUERIES):
        total += QUERIES * _in_reach(t, T, context)[3]
    return total


@_plain
def _turn(x_T3HF, bias_3HF, turn_2TF, scale, q_HTF, k_HTF, v_HTF):  # type: ignore[no-untyped-def]
    """Queries, scaled, and keys, turned by the angle of their bin; values."""
    _wide()
    T, _, H, F = x_T3HF.shape
    half, cos_TF, sin_TF = F // 2, turn_2TF[0], turn_2TF[1]
    for t in range(T):
        for h in range(H):
            for f in range(half):
                x = (x_T3HF[t, 0, h, f] + bias_3HF[0, h, f]) * scale
                y = (x_T3HF[t, 0, h, half + f] + bias_3HF[0, h, half + f]) * scale
                q_HTF[h, t, f] = x * cos_TF[t, f] - y * sin_TF[t, f]
                q_HTF[h, t, half + f] = y * cos_TF[t, f] + x * sin_TF[t, f]
        for h in range(H):
            for f in range(half):
                x = x_T3HF[t, 1, h, f] + bias_3HF[1, h, f]
                y = x_T3HF[t, 1, h, half + f] + bias_3HF[1, h, half + f]
                k_HTF[h, t, f] = x * cos_TF[t, f] - y * sin_TF[t, f]
                k_HTF[h, t, half + f] = y * cos_TF[t, f] + x * sin_TF[t, f]
        for h in range(H):
            for f in range(F):
                v_HTF[h, t, f] = x_T3HF[t, 2, h, f] + bias_3HF[2, h, f]


@_plain
def _turn_back(g_q_HTF, g_k_HTF, g_v_HTF, turn_2TF, g_T3HF, g_bias_3HF):  # type: ignore[no-untyped-def]
    _wide()
    T, _, H, F = g_T3HF.shape
    half, cos_TF, sin_TF = F // 2, turn_2TF[0], turn_2TF[1]
    for t in range(T):
        for h in range(H):
            for f in range(half):
                x, y = g_q_HTF[h, t, f], g_q_HTF[h, t, half + f]
                g_T3HF[t, 0, h, f] = x * cos_TF[t, f] + y * sin_TF[t, f]
                g_T3HF[t, 0, h, half + f] = y * cos_TF[t, f] - x * sin_TF[t, f]
        for h in range(H):
            for f in range(half):
                x, y = g_k_HTF[h, t, f], g_k_HTF[h, t, half + f]
                g_T3HF[t, 1, h, f] = x * cos_TF[t, f] + y * sin_TF[t, f]
                g_T3HF[t, 1, h, half + f] = y * cos_TF[t, f] - x * sin_TF[t, f]
        for h in range(H):
            for f in range(F):
                g_T3HF[t, 2, h, f] = g_v_HTF[h, t, f]
        g_X, g_bias_X = g_T3HF[t].reshape(-1), g_bias_3HF.reshape(-1)
        for n in range(g_X.size):
            g_bias_X[n] += g_X[n]


@intrinsic
def _square(typingctx, a, a_at, a_row, c, c_at, c_row):  # type: ignore[no-untyped-def]
    """Transpose as many rows of a vector as it has lanes; arrays are flat."""
    signature = types.void(a, a_at, a_row, c, c_at, c_row)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        vector, size = ir.VectorType(ir.FloatType(), LANES), args[1].type

        def at(array: int, row: int) -> Any:
            made = context.make_array(signature.args[array])(context, builder, args[array])
            place = builder.add(args[array + 1], builder.mul(size(row), args[array + 2]))
            return builder.bitcast(builder.gep(made.data, [place]), vector.as_pointer())

        rows = [builder.load(at(0, row), align=4) for row in range(LANES)]
        n = 1
        while n < LANES:  # halves of what is 2 n wide change places across the diagonal
            lanes = [(k & n != 0, k) for k in range(LANES)]
            upper = [LANES + k - n if odd else k for odd, k in lanes]
            lower = [LANES + k if odd else k + n for odd, k in lanes]
            for r in (r for r in range(LANES) if not r & n):
                pair = rows[r], rows[r + n]
                for row, chosen in ((r, upper), (r + n, lower)):
                    mask = ir.VectorType(ir.IntType(32), LANES)(chosen)
                    rows[row] = builder.shuffle_vector(*pair, mask)
            n *= 2
        for row, x in enumerate(rows):
            builder.store(x, at(3, row), align=4)
        return context.get_dummy_value()

    return signature, generate


@_plain
def _transpose(work_X, from_at, P, F, to_at):  # type: ignore[no-untyped-def]
    for t in range(0, P, LANES):
        for f in range(0, F, LANES):
            _square(work_X, from_at + t * F + f, F, work_X, to_at + f * P + t, P)


@_summing
def _softmax(  # type: ignore[no-untyped-def]
    rows, columns, s_QP, t, first, T, context, seen_P, sunk_Q, scale_Q,
):  # fmt: skip
    """Scores, in bits, of the queries from t on to shares of the keys from ``first`` on.

    Nothing at all for a key that may not be seen, and for one whose share is too small to be a
    normal number, with which some processors take a hundred times as long. All queries go through
    each loop before the next, or each would wait for the end of its own.
    """
    _wide()
    for n in range(rows):
        low, high = 0, T - first
        if context > 0:
            low, high = t + n - context + 1 - first, t + n + 1 - first
        # Of floats that are not negative (the sink has 0) the largest has the largest bits, and a
        # largest integer is sought many lanes at a time.
        top = np.int32(0)
        for p in range(columns):
            x = s_QP[n, p] if seen_P[p] and low <= p and p < high else np.float32(-np.inf)
            s_QP[n, p] = x
            top = max(top, np.float32(x).view(np.int32))
        sunk_Q[n] = np.int32(top).view(np.float32)
    for n in range(rows):
        most, total = sunk_Q[n], np.float32(0)
        for p in range(columns):
            below = s_QP[n, p] - most
            x = _exp2(below) if below > np.float32(-100) else np.float32(0)
            s_QP[n, p] = x
            total += x
        sunk = _exp2(-most)
        scale_Q[n] = np.float32(1) / (total + sunk)
        sunk_Q[n] = sunk * scale_Q[n]
    for n in range(rows):
        for p in range(columns):
            s_QP[n, p] *= scale_Q[n]


@_summing
def _softmax_back(  # type: ignore[no-untyped-def]
    rows, columns, share_QP, g_QP, scale, g_out_QF, sink_F, sunk_Q, g_sink_F, along_Q,
):  # fmt: skip
    """Gradients of shares to those of scores, in place; and that of the sink."""
    _wide()
    for n in range(rows):
        along, sunk = np.float32(0), sunk_Q[n]
        for f in range(sink_F.size):
            along += g_out_QF[n, f] * sink_F[f]
            g_sink_F[f] += sunk * g_out_QF[n, f]
        along *= sunk
        for p in range(columns):
            along += share_QP[n, p] * g_QP[n, p]
        along_Q[n] = along
    for n in range(rows):
        for p in range(columns):
            g_QP[n, p] = scale * share_QP[n, p] * (g_QP[n, p] - along_Q[n])


@_plain
def _add_sink(o_HTF, sunk_HT, sink_HF, out_THF):  # type: ignore[no-untyped-def]
    _wide()
    T, H, F = out_THF.shape
    for t in range(T):
        for h in range(H):
            for f in range(F):
                out_THF[t, h, f] = o_HTF[h, t, f] + sunk_HT[h, t] * sink_HF[h, f]


@_plain
def _heads(work_X, n, H, P, F):  # type: ignore[no-untyped-def]
    """The n-th array of work space for all heads of a window."""
    return work_X[n * H * P * F : (n + 1) * H * P * F].reshape(H, P, F)


@_plain
def work_space(T, H, F):  # type: ignore[no-untyped-def]
    """For attention in one window."""
    P, F = up(T, PAIR), up(F, PAIR)
    return np.empty(7 * H * P * F + P * F + QUERIES * (P + 1), np.float32)


@_plain
def attend(  # type: ignore[no-untyped-def]
    qkv_BT3HF, bias_3HF, turn_2TF, sink_HF, seen_BP, context, work_X, share_X, sunk_BHT, out_BTHF,
):  # fmt: skip
    """What attention mixes for every bin of every window, all heads.

    Context 0 is for all keys, later ones too.
    """
    B, T, _, H, F = qkv_BT3HF.shape
    P, Fp, at = up(T, PAIR), up(F, PAIR), 0
    size = H * P * Fp
    q_HTF, k_HTF, v_HTF, o_HTF = (
        _heads(work_X, 0, H, P, Fp), _heads(work_X, 1, H, P, Fp), _heads(work_X, 2, H, P, Fp),
        _heads(work_X, 3, H, P, Fp),
    )  # fmt: skip
    k_at = 4 * size
    scale_Q = work_X[k_at + Fp * P :]
    scale = np.float32(math.log2(math.e) / math.sqrt(F))
    for b in range(B):
        _turn(qkv_BT3HF[b], bias_3HF, turn_2TF, scale, q_HTF, k_HTF, v_HTF)
        for h in range(H):
            _transpose(work_X, size + h * P * Fp, P, Fp, k_at)
            for t in range(0, T, QUERIES):
                rows, of_t = min(QUERIES, T - t), (h * P + t) * Fp
                low, high, first, columns = _in_reach(t, T, context)
                _mix(
                    rows, columns, work_X, of_t, Fp, 1, work_X, k_at + first, P, F,
                    share_X, at, columns, 0,
                )  # fmt: skip
                _softmax(
                    rows, columns, share_X[at : at + QUERIES * columns].reshape(QUERIES, columns),
                    t, first, T, context, seen_BP[b, first:], sunk_BHT[b, h, t:], scale_Q,
                )  # fmt: skip
                _mix(
                    rows, Fp, share_X, at + low - first, columns, 1,
                    work_X, 2 * size + (h * P + low) * Fp, Fp, high - low,
                    work_X, 3 * size + of_t, Fp, 0,
                )  # fmt: skip
                at += QUERIES * columns
        _add_sink(o_HTF, sunk_BHT[b], sink_HF, out_BTHF[b])


@_plain
def attend_back(  # type: ignore[no-untyped-def]
    g_out_BTHF, qkv_BT3HF, bias_3HF, turn_2TF, sink_HF, context, work_X, share_X, sunk_BHT,
    g_qkv_BT3HF, g_bias_3HF, g_sink_HF,
):  # fmt: skip
    """Gradients of what :func:`attend` was given: queries and keys are turned again."""
    B, T, _, H, F = qkv_BT3HF.shape
    P, Fp, at = up(T, PAIR), up(F, PAIR), 0
    size = H * P * Fp
    q_HTF, k_HTF, v_HTF, g_HTF = (
        _heads(work_X, 0, H, P, Fp), _heads(work_X, 1, H, P, Fp), _heads(work_X, 2, H, P, Fp),
        _heads(work_X, 6, H, P, Fp),
    )  # fmt: skip
    g_q_HTF, g_k_HTF, g_v_HTF = (
        _heads(work_X, 3, H, P, Fp), _heads(work_X, 4, H, P, Fp), _heads(work_X, 5, H, P, Fp),
    )  # fmt: skip
    v_at = 7 * size
    s_at = v_at + Fp * P
    s_X = work_X[s_at:]
    along_Q = work_X[s_at + QUERIES * P :]
    scale = np.float32(1 / math.sqrt(F))
    v_HTF[:, T:] = np.float32(0)  # a share of 0 times what was left beyond T might not be 0
    for b in range(B):
        _turn(qkv_BT3HF[b], bias_3HF, turn_2TF, np.float32(1), q_HTF, k_HTF, v_HTF)
        for t in range(T):
            for h in range(H):
                for f in range(F):
                    g_HTF[h, t, f] = g_out_BTHF[b, t, h, f]
        g_k_HTF[:] = np.float32(0)
        g_v_HTF[:] = np.float32(0)
        for h in range(H):
            _transpose(work_X, 2 * size + h * P * Fp, P, Fp, v_at)
            for t in range(0, T, QUERIES):
                rows, of_t, of_keys = min(QUERIES, T - t), (h * P + t) * Fp, h * P * Fp
                low, high, first, columns = _in_reach(t, T, context)
                _mix(
                    rows, columns, work_X, 6 * size + of_t, Fp, 1, work_X, v_at + first, P, F,
                    work_X, s_at, columns, 0,
                )  # fmt: skip
                _softmax_back(
                    rows, columns, share_X[at : at + QUERIES * columns].reshape(QUERIES, columns),
                    s_X[: QUERIES * columns].reshape(QUERIES, columns), scale, g_HTF[h, t:],
                    sink_HF[h], sunk_BHT[b, h, t:], g_sink_HF[h], along_Q,
                )  # fmt: skip
                _mix(
                    rows, Fp, work_X, s_at + low - first, columns, 1,
                    work_X, size + of_keys + low * Fp, Fp, high - low,
                    work_X, 3 * size + of_t, Fp, 0,
                )  # fmt: skip
                low = low // ROWS * ROWS
                of_keys += low * Fp
                _mix(
                    high - low, Fp, work_X, s_at + low - first, 1, columns, work_X, of_t, Fp, rows,
                    work_X, 4 * size + of_keys, Fp, 1,
                )  # fmt: skip
                _mix(
                    high - low, Fp, share_X, at + low - first, 1, columns,
                    work_X, 6 * size + of_t, Fp, rows, work_X, 5 * size + of_keys, Fp, 1,
                )  # fmt: skip
                at += QUERIES * columns
        _turn_back(g_q_HTF, g_k_HTF, g_v_HTF, turn_2TF, g_qkv_BT3HF[b], g_bias_3HF)
