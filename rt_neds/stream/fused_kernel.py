"""The compiled part of the fused step: one call for one bin or a few, one CPU core, float32.

What lies in which array is :mod:`rt_neds.stream.fused`'s business; this file only computes. All of
it must stay in one file: numba's cache does not notice that a function changed in another.

* Weights lie in one array in the order they are read, as the prefetcher likes them; all tokens use
  a weight while it is in a register.
* Keys lie such that scores are one more linear map, whose bias says who is seen, and values such
  that mixing them is another; the sink is a row of both that never changes.
* Every number is summed in an order that does not depend on how many bins or tokens are worked on
  together: the same stream gives the same bits however it was cut into calls.

Shape suffixes: T bins of this call, N units, K boxcar widths, C bins of the longest boxcar, D model
width, E outputs and I inputs of a linear map, G width of the feed-forward layer, L layers, H heads,
F width of a head (of rotary angles: half of it), R rows of the ring and the sink, P panels, V
outputs of a panel, O numbers read out. D, G and R are padded to whole panels; what is beyond
``dim`` is zero or never read.
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
PANEL = 2 * LANES
"""Outputs of a linear map that are computed together: two vectors for each token."""
CHAINS = 2
"""Sums that each output is split into: one has to wait for itself, two keep a few tokens busy."""
TILE = 6 if LANES == 16 else 3
"""Most tokens computed together: sums, two weights and an input are 27 vectors of 32, 15 of 16."""

# "contract" lets a product and a sum be one instruction, which rounds once less. Sums over a token
# may also be taken in any order, or they could not be taken many lanes at a time.
_plain = numba.njit(error_model="numpy", fastmath={"contract"})
_summing = numba.njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})

# -- linear maps ---------------------------------------------------------------------------------


class _TileWriter:
    """Writes ``y = bias + weights x`` for one panel and a constant number of tokens.

    In vectors, by hand, because the sums must stay in registers over all inputs, which a compiler
    cannot promise for elements of arrays that might overlap.
    """

    def __init__(self, builder: Any, tokens: int, w: Any, x: Any, x_stride: Any) -> None:
        self.builder, self.tokens, self.w, self.x, self.x_stride = builder, tokens, w, x, x_stride
        self.vector = ir.VectorType(ir.FloatType(), LANES)
        self.size = x_stride.type

    def at(self, pointer: Any, *terms: Any) -> Any:
        """Pointer to the vector that begins so many numbers further."""
        for term in terms:
            pointer = self.builder.gep(pointer, [self.size(term) if type(term) is int else term])
        return self.builder.bitcast(pointer, self.vector.as_pointer())

    def multiply(self, i: Any, sums: dict[tuple[int, int], Any]) -> None:
        """Add the products of input ``i``."""
        b = self.builder
        row = b.mul(b.add(i, self.size(1)), self.size(PANEL))
        weights = [b.load(self.at(self.w, row, half * LANES), align=4) for half in (0, 1)]
        lane0, mask = ir.IntType(32)(0), ir.VectorType(ir.IntType(32), LANES)([0] * LANES)
        for m in range(self.tokens):
            number = b.load(b.gep(self.x, [b.add(i, b.mul(self.size(m), self.x_stride))]))
            spread = b.insert_element(self.vector(ir.Undefined), number, lane0)
            spread = b.shuffle_vector(spread, spread, mask)
            for half, weight in enumerate(weights):
                product = b.fmul(weight, spread, flags=["contract"])
                total = b.fadd(product, b.load(sums[m, half]), flags=["contract"])
                b.store(total, sums[m, half])

    def write(self, inputs: Any, y: Any, y_stride: Any) -> None:
        b, zero = self.builder, self.vector([0.0] * LANES)
        places = [(m, half) for m in range(self.tokens) for half in (0, 1)]
        chains = [
            {place: cgutils.alloca_once(b, self.vector) for place in places} for _ in range(CHAINS)
        ]
        for m, half in places:
            b.store(b.load(self.at(self.w, half * LANES), align=4), chains[0][m, half])
            for sums in chains[1:]:
                b.store(zero, sums[m, half])
        whole = b.sub(inputs, b.urem(inputs, self.size(CHAINS)))
        with cgutils.for_range_slice(b, self.size(0), whole, self.size(CHAINS)) as (i, _):
            for chain, sums in enumerate(chains):
                self.multiply(b.add(i, self.size(chain)), sums)
        with cgutils.for_range_slice(b, whole, inputs, self.size(1)) as (i, _):
            self.multiply(i, chains[0])
        for m, half in places:
            total = b.load(chains[0][m, half])
            for sums in chains[1:]:
                total = b.fadd(total, b.load(sums[m, half]))
            b.store(total, self.at(y, b.mul(self.size(m), y_stride), half * LANES), align=4)


@intrinsic
def _tile(typingctx, tokens, weights, at, inputs, x, x_at, x_stride, y, y_at, y_stride):  # type: ignore[no-untyped-def]
    """One panel of a linear map for 1 to TILE tokens; all places count numbers of flat arrays."""
    signature = types.void(tokens, weights, at, inputs, x, x_at, x_stride, y, y_at, y_stride)

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        def pointer(n: int) -> Any:
            array = context.make_array(signature.args[n])(context, builder, args[n])
            return builder.gep(array.data, [args[n + 1]])

        w, x, y = pointer(1), pointer(4), pointer(7)
        for count in range(1, TILE + 1):
            with builder.if_then(builder.icmp_signed("==", args[0], args[0].type(count))):
                _TileWriter(builder, count, w, x, args[6]).write(args[3], y, args[9])
        return context.get_dummy_value()

    return signature, generate


@_plain
def _linear(weights, at, outputs, inputs, x, x_column, y, y_column, first, last):  # type: ignore[no-untyped-def]
    """Map columns of ``x`` to columns of ``y`` for tokens [first, last); return where it ends.

    The map begins at ``weights[at]``: for each panel its bias, then its weights input by input.
    """
    tiles = (last - first + TILE - 1) // TILE
    for column in range(y_column, y_column + outputs, PANEL):
        for tile in range(tiles):
            m = first + (last - first) * tile // tiles
            tokens = first + (last - first) * (tile + 1) // tiles - m
            x_at, y_at = m * x.shape[1] + x_column, m * y.shape[1] + column
            _tile(tokens, weights, at, inputs, x, x_at, x.shape[1], y, y_at, y.shape[1])
        at += PANEL * (1 + inputs)
    return at


# -- everything between the linear maps ----------------------------------------------------------


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


@_plain
def _exp2(x):  # type: ignore[no-untyped-def]
    """2**x for x <= 0, to one part in 1e7; at least 2**-126."""
    x = x if x > np.float32(-126) else np.float32(-126)
    # Adding 1.5 * 2**23 leaves no bits for a fraction: what comes back is the nearest integer.
    n = (x + np.float32(12582912)) - np.float32(12582912)
    f, c = x - n, _EXP2
    p = ((c[7] * f + c[6]) * f + c[5]) * f + c[4]
    p = (((p * f + c[3]) * f + c[2]) * f + c[1]) * f + c[0]
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_plain
def _gelu(x_MG, first, last, columns):  # type: ignore[no-untyped-def]
    """Multiply each number by the normal distribution function of it, to 1e-7."""
    c = _TAIL
    for m in range(first, last):
        for g in range(columns):
            x = x_MG[m, g]
            size = abs(x)
            a = size if size < np.float32(6) else np.float32(6)
            p = (((c[8] * a + c[7]) * a + c[6]) * a + c[5]) * a + c[4]
            p = (((p * a + c[3]) * a + c[2]) * a + c[1]) * a + c[0]
            x_MG[m, g] = (x if x > 0 else np.float32(0)) - size * _exp2(p)


@_summing
def _add_and_norm(x_MD, more_MD, normed_MD, first, last, dim, epsilon):  # type: ignore[no-untyped-def]
    """Add to the tokens, and bring each to mean 0 and variance 1."""
    for m in range(first, last):
        x_D, more_D, normed_D = x_MD[m], more_MD[m], normed_MD[m]
        total = squares = np.float32(0)
        for d in range(dim):
            x_D[d] += more_D[d]
            total += x_D[d]
        mean = total / np.float32(dim)
        for d in range(dim):
            squares += (x_D[d] - mean) * (x_D[d] - mean)
        scale = np.float32(1) / np.sqrt(squares / np.float32(dim) + epsilon)
        for d in range(dim):
            normed_D[d] = (x_D[d] - mean) * scale


@_plain
def _top(x_R):  # type: ignore[no-untyped-def]
    """Bits of the largest number, which must not be negative.

    Such numbers are ordered as their bits are, with all negative ones below. A largest integer is
    sought many lanes at a time; a largest float is not, because it might not be a number.
    """
    bits_R, top = x_R.view(np.int32), np.int32(0)
    for r in range(bits_R.size):
        top = max(top, bits_R[r])
    return top


@_summing
def _softmax(x_MR, first, last):  # type: ignore[no-untyped-def]
    """Logits, in bits, to shares; one of -inf gets as good as nothing."""
    for m in range(first, last):
        x_R, total = x_MR[m], np.float32(0)
        top = np.int32(_top(x_R)).view(np.float32)  # not negative: the sink has 0
        for r in range(x_R.size):
            x_R[r] = _exp2(x_R[r] - top)
            total += x_R[r]
        scale = np.float32(1) / total
        for r in range(x_R.size):
            x_R[r] *= scale


@_plain
def _rotate(x_TD, bins, heads, turn_T2F):  # type: ignore[no-untyped-def]
    """Turn the two halves of each head by the angle of the token's bin."""
    half = turn_T2F.shape[2]
    for t in range(bins):
        turn_2F = turn_T2F[t]
        for at in range(0, 2 * half * heads, 2 * half):
            a_F, b_F = x_TD[t, at : at + half], x_TD[t, at + half : at + 2 * half]
            for f in range(half):
                a, b = a_F[f], b_F[f]
                a_F[f] = a * turn_2F[0, f] - b * turn_2F[1, f]
                b_F[f] = b * turn_2F[0, f] + a * turn_2F[1, f]


@_plain
def _sum_counts(counts_N, observed, bin_, history_K, counts_CN, sums_KN):  # type: ignore[no-untyped-def]
    """Move the boxcars on by one bin; sums of integers are exact however long this goes on."""
    for k in range(history_K.size):
        old_N, sums_N = counts_CN[(bin_ - history_K[k]) % len(counts_CN)], sums_KN[k]
        for n in range(counts_N.size):
            sums_N[n] += (counts_N[n] if observed else np.float32(0)) - old_N[n]
    new_N = counts_CN[bin_ % len(counts_CN)]
    for n in range(counts_N.size):
        new_N[n] = counts_N[n] if observed else np.float32(0)


@_plain
def _read_in(weights, sums_KN, found_I, root_I, token_D):  # type: ignore[no-untyped-def]
    """Softsign of the linear map of root sums, reading only the weights of sums that are not 0."""
    sums_I, D, found = sums_KN.reshape(sums_KN.size), token_D.size, 0
    for i in range(sums_I.size):
        found_I[found], root_I[found] = 1 + i, np.sqrt(sums_I[i])
        found += sums_I[i] != 0
    for i in range(found, found + 3):
        found_I[i], root_I[i] = 0, 0
    token_D[:] = weights[:D]
    for i in range(0, found, 4):  # four at once, or half the time goes into fetching the token
        r0, r1, r2, r3 = root_I[i], root_I[i + 1], root_I[i + 2], root_I[i + 3]
        w0_D, w1_D = weights[found_I[i] * D :], weights[found_I[i + 1] * D :]
        w2_D, w3_D = weights[found_I[i + 2] * D :], weights[found_I[i + 3] * D :]
        for d in range(D):
            token_D[d] += (r0 * w0_D[d] + r1 * w1_D[d]) + (r2 * w2_D[d] + r3 * w3_D[d])
    for d in range(D):
        token_D[d] /= np.float32(1) + abs(token_D[d])


@_plain
def _remember(kv_T2D, bins, bin_, observed_T, keys_HPFV, values_HPRV):  # type: ignore[no-untyped-def]
    """Put keys and values of the spike tokens into a layer's ring; nobody sees them yet."""
    width, half, rows = keys_HPFV.shape[2] - 1, kv_T2D.shape[1] // 2, values_HPRV.shape[2] - 2
    for t in range(bins):
        row = (bin_ + t) % rows
        panel, lane = row // PANEL, row % PANEL
        for head in range(len(keys_HPFV)):
            keys_HPFV[head, panel, 0, lane] = np.float32(-np.inf)
            if observed_T[t]:
                for f in range(width):
                    value = kv_T2D[t, half + head * width + f]
                    keys_HPFV[head, panel, 1 + f, lane] = kv_T2D[t, head * width + f]
                    values_HPRV[head, f // PANEL, 1 + row, f % PANEL] = value


@_plain
def _attend(  # type: ignore[no-untyped-def]
    keys_HPFV, values_HPRV, q_TD, scores_1R, mixed_TD, bins, bin_, observed_T, context
):
    """Mix the values of a layer's ring for each query."""
    width, rows, R = keys_HPFV.shape[2] - 1, values_HPRV.shape[2] - 1, scores_1R.shape[1]
    keys, values = keys_HPFV.reshape(keys_HPFV.size), values_HPRV.reshape(values_HPRV.size)
    key_size, value_size = keys.size // len(keys_HPFV), values.size // len(values_HPRV)
    for head in range(len(keys_HPFV)):
        for t in range(bins):
            # One row comes into sight, if it was observed, and one goes out of it.
            new, old = (bin_ + t) % (rows - 1), (bin_ + t - context) % (rows - 1)
            keys_HPFV[head, old // PANEL, 0, old % PANEL] = np.float32(-np.inf)
            if observed_T[t]:
                keys_HPFV[head, new // PANEL, 0, new % PANEL] = np.float32(0)
            at, at_key, at_value = head * width, head * key_size, head * value_size
            _linear(keys, at_key, R, width, q_TD[t : t + 1], at, scores_1R, 0, 0, 1)
            _softmax(scores_1R, 0, 1)
            # A head narrower than its panels spills zeros over the next one, which comes later.
            _linear(values, at_value, width, rows, scores_1R, 0, mixed_TD[t : t + 1], at, 0, 1)


@_plain
def _average(  # type: ignore[no-untyped-def]
    gates_TD, bins, observed_T, dim, context, longest, memory_D, dark_1, after_TD
):  # fmt: skip
    """Move the memory on, bin by bin; gates, in bits, lie before the values of each token.

    ``dark_1`` counts the bins since anything was observed.
    """
    half, one = gates_TD.shape[1] // 2, np.float32(1)
    for t in range(bins):
        dark_1[0] = 0 if observed_T[t] else dark_1[0] + 1
        if dark_1[0] >= context:
            memory_D[:] = 0
        if observed_T[t]:
            for d in range(dim):
                gate = gates_TD[t, d]
                e = _exp2(-abs(gate))
                keep = longest * (one if gate > 0 else e) / (one + e)
                memory_D[d] = keep * memory_D[d] + (one - keep) * gates_TD[t, half + d]
        after_TD[t, :dim] = memory_D[:dim]


@_summing
def _read_out(normed_TD, heads_OI, dim, raw_TO, bins):  # type: ignore[no-untyped-def]
    """Each number read out: a row of weights, its bias last, times the token of its bin."""
    for o in range(raw_TO.shape[1]):
        for t in range(bins):
            total, head_I, normed_D = np.float32(0), heads_OI[o], normed_TD[t]
            for d in range(dim):
                total += head_I[d] * normed_D[d]
            raw_TO[t, o] = total + head_I[dim]


@numba.njit(error_model="numpy", cache=True, nogil=True)
def fused_step(  # type: ignore[no-untyped-def]
    bins, bin_, counts_TN, observed_T,
    weights, dark_D, heads_OI,
    frequency_F, history_K, context, epsilon, dim, widened,
    counts_CN, sums_KN, keys_LHPFV, values_LHPRV,
    found_I, root_I, longest, memory_D, dark_1, turn_T2F, work_5TD, kv_T2D, wide_TG, scores_1R,
    raw_TO,
):  # fmt: skip
    """The first ``bins`` bins of the counts; :class:`FusedStep` owns all arrays."""
    L, H = keys_LHPFV.shape[:2]
    D, G = kv_T2D.shape[1] // 2, wide_TG.shape[1]
    x_TD, normed_TD, more_TD = work_5TD[0], work_5TD[1], work_5TD[2]
    q_TD, mixed_TD = work_5TD[3], work_5TD[4]
    more_TD[:] = 0
    for t in range(bins):
        for f in range(frequency_F.size):
            turn_T2F[t, 0, f] = math.cos((bin_ + t) * frequency_F[f])
            turn_T2F[t, 1, f] = math.sin((bin_ + t) * frequency_F[f])
        _sum_counts(counts_TN[t], observed_T[t], bin_ + t, history_K, counts_CN, sums_KN)
        normed_TD[t, :D] = 0
        if observed_T[t]:
            _read_in(weights, sums_KN, found_I, root_I, normed_TD[t, :D])
    at = D * (1 + sums_KN.size)
    at = _linear(weights, at, D, dim, normed_TD, 0, x_TD, 0, 0, bins)
    for t in range(bins):
        if not observed_T[t]:
            x_TD[t, :D] = dark_D
    for layer in range(L):
        keys_HPFV, values_HPRV = keys_LHPFV[layer], values_LHPRV[layer]
        _add_and_norm(x_TD, more_TD, normed_TD, 0, bins, dim, epsilon)
        at = _linear(weights, at, 2 * D, dim, normed_TD, 0, kv_T2D, 0, 0, bins)
        _rotate(kv_T2D, bins, H, turn_T2F)
        _remember(kv_T2D, bins, bin_, observed_T, keys_HPFV, values_HPRV)
        at = _linear(weights, at, D, dim, normed_TD, 0, q_TD, 0, 0, bins)
        _rotate(q_TD, bins, H, turn_T2F)
        _attend(
            keys_HPFV, values_HPRV, q_TD, scores_1R, mixed_TD, bins, bin_, observed_T, context
        )  # fmt: skip
        at = _linear(weights, at, D, dim, mixed_TD, 0, more_TD, 0, 0, bins)
        _add_and_norm(x_TD, more_TD, normed_TD, 0, bins, dim, epsilon)
        at = _linear(weights, at, G, dim, normed_TD, 0, wide_TG, 0, 0, bins)
        _gelu(wide_TG, 0, bins, widened)
        at = _linear(weights, at, D, widened, wide_TG, 0, more_TD, 0, 0, bins)
    if longest > 0:  # there is a memory
        _add_and_norm(x_TD, more_TD, normed_TD, 0, bins, dim, epsilon)
        at = _linear(weights, at, 2 * D, dim, normed_TD, 0, kv_T2D, 0, 0, bins)
        _average(kv_T2D, bins, observed_T, dim, context, longest, memory_D, dark_1, mixed_TD)
        at = _linear(weights, at, D, dim, mixed_TD, 0, more_TD, 0, 0, bins)
    _add_and_norm(x_TD, more_TD, normed_TD, 0, bins, dim, epsilon)
    _read_out(normed_TD, heads_OI, dim, raw_TO, bins)
