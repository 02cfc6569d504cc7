"""The compiled pass of training through attention, forwards and backwards.

One CPU core, float32. This file only computes; what it is the derivative of is
:mod:`rt_neds.model.passes`'s business. Products are small, of a head of a window, and need only
what causality leaves of a square; they go through a tile of their own.

Shape suffixes: B windows, T bins, H heads, F width of a head, P keys, Q queries that attend
together, X numbers of any array, flat. Work space has P and F padded to whole pairs of vectors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from rt_neds.model.passes_common import LANES, plain, summing, wide

PAIR = 2 * LANES
ROWS = 8 if LANES == 16 else 4
"""A tile is so many rows of two vectors: its sums stay in registers, of which there are 32 or 16,
and are as many as must be under way for none to wait for itself."""
QUERIES = 32
"""Bins that attend together."""

# -- products --------------------------------------------------------------------------------------


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


@plain
def _mix(rows, columns, a, a_at, a_row, a_step, b, b_at, b_row, count, c, c_at, c_row, more):  # type: ignore[no-untyped-def]
    """Whole tiles: what is beyond ``rows`` is written, too."""
    for p in range(0, columns, PAIR):
        for r in range(0, rows, ROWS):
            _tile(
                a, a_at + r * a_row, a_row, a_step, b, b_at + p, b_row, count,
                c, c_at + r * c_row + p, c_row, more,
            )  # fmt: skip


# -- attention -------------------------------------------------------------------------------------


@plain
def up(n, to):  # type: ignore[no-untyped-def]
    """The next multiple."""
    return (n + to - 1) // to * to


@plain
def _in_reach(t, T, context):  # type: ignore[no-untyped-def]
    """First key and end of those that the queries from t on reach; first and number stored."""
    if context == 0:
        return 0, T, 0, up(T, PAIR)
    low, high = max(0, t - context + 1), min(T, t + QUERIES)
    first = low // PAIR * PAIR
    return low, high, first, up(high - first, PAIR)


@plain
def shares_of_head(T, context):  # type: ignore[no-untyped-def]
    """Numbers that are kept of the shares of one head in one window."""
    total = 0
    for t in range(0, T, QUERIES):
        total += QUERIES * _in_reach(t, T, context)[3]
    return total


@plain
def _turn(x_T3HF, bias_3HF, turn_2TF, scale, q_HTF, k_HTF, v_HTF):  # type: ignore[no-untyped-def]
    """Queries, scaled, and keys, turned by the angle of their bin; values."""
    wide()
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


@plain
def _turn_back(g_q_HTF, g_k_HTF, g_v_HTF, turn_2TF, g_T3HF, g_bias_3HF):  # type: ignore[no-untyped-def]
    wide()
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


_EXP2 = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(7))


@plain
def _exp2(x):  # type: ignore[no-untyped-def]
    """2**x for x <= 0, to two parts in 1e7; at least 2**-126."""
    x = x if x > np.float32(-126) else np.float32(-126)
    # Adding 1.5 * 2**23 leaves no bits for a fraction: what comes back is the nearest integer.
    n = (x + np.float32(12582912)) - np.float32(12582912)
    f, c = x - n, _EXP2
    p = ((c[6] * f + c[5]) * f + c[4]) * f + c[3]
    p = ((p * f + c[2]) * f + c[1]) * f + c[0]
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


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


@plain
def _transpose(work_X, from_at, P, F, to_at):  # type: ignore[no-untyped-def]
    for t in range(0, P, LANES):
        for f in range(0, F, LANES):
            _square(work_X, from_at + t * F + f, F, work_X, to_at + f * P + t, P)


@summing
def _softmax(  # type: ignore[no-untyped-def]
    rows, columns, s_QP, t, first, T, context, seen_P, sunk_Q, scale_Q,
):  # fmt: skip
    """Scores, in bits, of the queries from t on to shares of the keys from ``first`` on.

    Nothing at all for a key that may not be seen, and for one whose share is too small to be a
    normal number, with which some processors take a hundred times as long. All queries go through
    each loop before the next, or each would wait for the end of its own.
    """
    wide()
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


@summing
def _softmax_back(  # type: ignore[no-untyped-def]
    rows, columns, share_QP, g_QP, scale, g_out_QF, sink_F, sunk_Q, g_sink_F, along_Q,
):  # fmt: skip
    """Gradients of shares to those of scores, in place; and that of the sink."""
    wide()
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


@plain
def _add_sink(o_HTF, sunk_HT, sink_HF, out_THF):  # type: ignore[no-untyped-def]
    wide()
    T, H, F = out_THF.shape
    for t in range(T):
        for h in range(H):
            for f in range(F):
                out_THF[t, h, f] = o_HTF[h, t, f] + sunk_HT[h, t] * sink_HF[h, f]


@plain
def _heads(work_X, n, H, P, F):  # type: ignore[no-untyped-def]
    """The n-th array of work space for all heads of a window."""
    return work_X[n * H * P * F : (n + 1) * H * P * F].reshape(H, P, F)


@plain
def work_space(T, H, F):  # type: ignore[no-untyped-def]
    """For attention in one window."""
    P, F = up(T, PAIR), up(F, PAIR)
    return np.empty(7 * H * P * F + P * F + QUERIES * (P + 1), np.float32)


@plain
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


@plain
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
