"""What the fused step does between its linear maps: norms, activations, shares of attention.

All in float32, many lanes at a time. Shape suffixes: as in :mod:`rt_neds.stream.fused_kernel`.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from rt_neds.stream.fused_products import plain

# Sums over a token may be taken in any order, or they could not be taken many lanes at a time.
summing = numba.njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


def _log2_tail(degree: int = 8, top: float = 6.0) -> tuple[np.float32, ...]:
    """Polynomial close to log2 of the upper tail of the normal distribution on [0, top].

    The logarithm is nearly a parabola, and an error in it hardly matters where the tail is thin.
    """
    a = (np.polynomial.chebyshev.chebpts1(200) + 1) * top / 2
    tail = np.array([0.5 * math.erfc(float(v) / math.sqrt(2)) for v in a])
    fit = np.polynomial.Chebyshev.fit(a, np.log2(tail), degree, [0, top], w=a * tail + 1e-3)
    return tuple(np.float32(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef)


_TAIL = _log2_tail()
_EXP2 = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8))


@plain
def exp2(x):  # type: ignore[no-untyped-def]
    """2**x for x <= 0, to one part in 1e7; at least 2**-126."""
    x = x if x > np.float32(-126) else np.float32(-126)
    # Adding 1.5 * 2**23 leaves no bits for a fraction: what comes back is the nearest integer.
    n = (x + np.float32(12582912)) - np.float32(12582912)
    f, c = x - n, _EXP2
    p = ((c[7] * f + c[6]) * f + c[5]) * f + c[4]
    p = (((p * f + c[3]) * f + c[2]) * f + c[1]) * f + c[0]
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@plain
def gelu(x_TG, bins, columns):  # type: ignore[no-untyped-def]
    """Multiply each number by the normal distribution function of it, to 1e-7."""
    c = _TAIL
    for t in range(bins):
        for g in range(columns):
            x = x_TG[t, g]
            a = abs(x) if abs(x) < np.float32(6) else np.float32(6)
            p = (((c[8] * a + c[7]) * a + c[6]) * a + c[5]) * a + c[4]
            p = (((p * a + c[3]) * a + c[2]) * a + c[1]) * a + c[0]
            x_TG[t, g] = (np.float32(0) if x < 0 else x) - a * exp2(p)  # a NaN stays one


@summing
def add_and_norm(weights, at, x_TD, more_TD, normed_TD, bins, dim, D, epsilon):  # type: ignore[no-untyped-def]
    """Add to the tokens, and norm each by the scale and shift at ``at``; return where they end."""
    scale_D, shift_D = weights[at : at + dim], weights[at + D : at + D + dim]
    for t in range(bins):
        x_D, more_D, normed_D = x_TD[t], more_TD[t], normed_TD[t]
        total = squares = np.float32(0)
        for d in range(dim):
            x_D[d] += more_D[d]
            total += x_D[d]
        mean = total / np.float32(dim)
        for d in range(dim):
            squares += (x_D[d] - mean) * (x_D[d] - mean)
        scale = np.float32(1) / np.sqrt(squares / np.float32(dim) + epsilon)
        for d in range(dim):
            normed_D[d] = (x_D[d] - mean) * scale * scale_D[d] + shift_D[d]
    return at + 2 * D


@plain
def _top(x_R):  # type: ignore[no-untyped-def]
    """Bits of the largest number, which must not be negative.

    Such numbers are ordered as their bits are, with all negative ones below. A largest integer is
    sought many lanes at a time; a largest float is not, because it might not be a number.
    """
    bits_R, top = x_R.view(np.int32), np.int32(0)
    for r in range(bits_R.size):
        top = max(top, bits_R[r])
    return top


@summing
def softmax(x_R):  # type: ignore[no-untyped-def]
    """Logits, in bits, to shares; one of -inf gets nothing.

    Nothing at all, for with numbers too small to be normal some processors take a hundred times as
    long, and a share that was as small as it can be would become one when it is scaled.
    """
    total, least = np.float32(0), np.float32(-126)
    top = np.int32(_top(x_R)).view(np.float32)  # not negative: the sink has 0
    for r in range(x_R.size):
        below = x_R[r] - top
        x_R[r] = exp2(below) if below > least else np.float32(0)
        total += x_R[r]
    scale = np.float32(1) / total
    for r in range(x_R.size):
        x_R[r] *= scale


@plain
def rotate(x_TD, column, bins, heads, turn_T2F, scale):  # type: ignore[no-untyped-def]
    """Turn the two halves of each head by the angle of the token's bin, and scale them."""
    half = turn_T2F.shape[2]
    for t in range(bins):
        cos_F, sin_F = turn_T2F[t, 0], turn_T2F[t, 1]
        for at in range(column, column + 2 * half * heads, 2 * half):
            a_F, b_F = x_TD[t, at : at + half], x_TD[t, at + half : at + 2 * half]
            for f in range(half):
                a, b = a_F[f] * scale, b_F[f] * scale
                a_F[f] = a * cos_F[f] - b * sin_F[f]
                b_F[f] = b * cos_F[f] + a * sin_F[f]
