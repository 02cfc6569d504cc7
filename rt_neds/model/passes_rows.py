"""The compiled passes of training that go row by row: sums and norms, curves, the memory.

One CPU core, float32. This file only computes; what it is the derivative of is
:mod:`rt_neds.model.passes`'s business. Arrays are read and written from their beginning to their
end, whole: what is far takes long, and processors fetch by themselves only what lies ahead of what
was read. A number is dropped by a hash of a seed, its row and its place in it.

Shape suffixes: B windows, T bins, D model width, R rows (bins of all windows).
"""

from __future__ import annotations

import math

import numpy as np

from rt_neds.model.passes_common import plain, summing, wide

# -- dropout ---------------------------------------------------------------------------------------


@plain
def _key(seed, row):  # type: ignore[no-untyped-def]
    """Two random words for each row (splitmix64)."""
    x = np.uint64(seed) + np.uint64(row + 1) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return np.uint32(x & np.uint64(0xFFFFFFFF)), np.uint32(x >> np.uint64(32))


@plain
def _draw(key, d):  # type: ignore[no-untyped-def]
    """A random word for each number of a row: rounds of multiplying and shifting, keyed twice."""
    x = np.uint32(np.uint32(d) ^ key[0])
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) ^ key[1])
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


# -- sum and norm ----------------------------------------------------------------------------------


@summing
def add(x_RD, more_RD, bias_D, scale_D, shift_D, epsilon, seed, zeroed, normed_RD, sd_2R):  # type: ignore[no-untyped-def]
    """``more`` becomes ``x + dropout(more + bias)``, ``normed`` the norm of that."""
    wide()
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


@summing
def add_back(g_sum_RD, g_normed_RD, sum_RD, sd_2R, scale_D, seed, zeroed, g_x_RD, g_more_RD, g_3D):  # type: ignore[no-untyped-def]
    """Gradients of both summands, and in ``g_3D`` of bias, scale and shift."""
    wide()
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


# -- curves ----------------------------------------------------------------------------------------

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


@plain
def _polynomial(c, x):  # type: ignore[no-untyped-def]
    p = (((c[8] * x + c[7]) * x + c[6]) * x + c[5]) * x + c[4]
    return (((p * x + c[3]) * x + c[2]) * x + c[1]) * x + c[0]


@plain
def gelu(x_RD, bias_D, out_RD):  # type: ignore[no-untyped-def]
    """Gelu of ``x + bias``, to 5e-7; ``x`` becomes its slope there."""
    wide()
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


@plain
def softsign(x_RD, bias_D, out_RD):  # type: ignore[no-untyped-def]
    """Softsign of ``x + bias``; ``x`` becomes its slope there."""
    wide()
    (R, D), one = x_RD.shape, np.float32(1)
    for r in range(R):
        x_D, out_D = x_RD[r], out_RD[r]
        for d in range(D):
            x = x_D[d] + bias_D[d]
            share = one / (one + abs(x))
            out_D[d] = x * share
            x_D[d] = share * share


@plain
def curve_back(g_RD, slope_RD, g_bias_D):  # type: ignore[no-untyped-def]
    """``slope`` becomes the gradient of what the curve was of; in ``g_bias_D`` that of the bias."""
    wide()
    R, D = slope_RD.shape
    for r in range(R):
        g_D, slope_D = g_RD[r], slope_RD[r]
        for d in range(D):
            g = g_D[d] * slope_D[d]
            slope_D[d] = g
            g_bias_D[d] += g


# -- memory ----------------------------------------------------------------------------------------


@plain
def remember(gate_BTD, gate_bias_D, value_BTD, value_bias_D, seen_BT, near_BT, longest, held_BTD):  # type: ignore[no-untyped-def]
    """The memory after each bin; ``gate`` becomes what is kept, and bias is added to ``value``."""
    wide()
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


@plain
def remember_back(g_held_BTD, keep_BTD, value_BTD, seen_BT, near_BT, longest, held_BTD, g_2D):  # type: ignore[no-untyped-def]
    """``keep`` and ``value`` become the gradients of gate and value, ``g_2D`` those of biases."""
    wide()
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
