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
from torch import Tensor, nn

from rt_neds.model.attention import ROTARY_BASE
from rt_neds.model.neds import NEDS, SCHEMES, SPIKES, Layer, SessionParts
from rt_neds.model.readin import SpikeReadIn

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


@numba.njit(error_model="numpy", boundscheck=False)
def _linear(weights, at, outputs, inputs, x, x_column, y, y_column, first, last):  # type: ignore[no-untyped-def]
    """Map columns of ``x`` to columns of ``y`` for tokens ``[first, last)``; return what follows.

    The map begins at ``weights[at]``: for each panel its bias, then its weights input by input.
    """
    x_stride, y_stride = x.shape[1], y.shape[1]
    for column in range(y_column, y_column + outputs, PANEL):
        m = first
        while m < last:
            tiles = (last - m + TILE_TOKENS - 1) // TILE_TOKENS
            tokens = (last - m + tiles - 1) // tiles
            a, b = m * x_stride + x_column, m * y_stride + column
            if tokens == 1:
                _tile(1, weights, at, inputs, x, a, x_stride, y, b, y_stride)
            elif tokens == 2:
                _tile(2, weights, at, inputs, x, a, x_stride, y, b, y_stride)
            elif tokens == 3:
                _tile(3, weights, at, inputs, x, a, x_stride, y, b, y_stride)
            elif tokens == 4:
                _tile(4, weights, at, inputs, x, a, x_stride, y, b, y_stride)
            elif tokens == 5:
                _tile(5, weights, at, inputs, x, a, x_stride, y, b, y_stride)
            else:
                _tile(6, weights, at, inputs, x, a, x_stride, y, b, y_stride)
            m += tokens
        at += PANEL * (1 + inputs)
    return at


# -- what is done to single numbers --------------------------------------------------------------
# "contract" lets a product and a sum be one instruction, which rounds once less. Sums over a token
# may also be reordered ("reassoc"), or they could not be taken many lanes at a time.

_EXP2 = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8))


def _fit_log2_tail(degree: int = 8, top: float = 6.0) -> tuple[np.float32, ...]:
    """Polynomial close to log2 of the upper tail of the normal distribution on [0, top].

    The logarithm is nearly a parabola, and an error in it hardly matters where the tail is thin.
    """
    chebyshev = np.polynomial.chebyshev
    a = (chebyshev.chebpts1(200) + 1) * top / 2
    tail = np.array([0.5 * math.erfc(float(v) / math.sqrt(2)) for v in a])
    fit = chebyshev.Chebyshev.fit(a, np.log2(tail), degree, [0, top], w=a * tail + 1e-3)
    return tuple(np.float32(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef)


_TAIL = _fit_log2_tail()


@numba.njit(error_model="numpy", fastmath={"contract"})
def _exp2(x):  # type: ignore[no-untyped-def]
    """2**x for x <= 0, to one part in 1e7; at least 2**-126."""
    x = x if x > np.float32(-126) else np.float32(-126)
    # Adding 1.5 * 2**23 leaves no bits for a fraction: what comes back is the nearest integer.
    n = (x + np.float32(12582912)) - np.float32(12582912)
    f, c = x - n, _EXP2
    p = ((c[7] * f + c[6]) * f + c[5]) * f + c[4]
    p = (((p * f + c[3]) * f + c[2]) * f + c[1]) * f + c[0]
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(error_model="numpy", fastmath={"contract"}, boundscheck=False)
def _gelu(x_MG, first, last, columns):  # type: ignore[no-untyped-def]
    """x times the normal distribution function of x, to 1e-7."""
    c = _TAIL
    for m in range(first, last):
        for g in range(columns):
            x = x_MG[m, g]
            size = abs(x)
            a = size if size < np.float32(6) else np.float32(6)
            p = (((c[8] * a + c[7]) * a + c[6]) * a + c[5]) * a + c[4]
            p = (((p * a + c[3]) * a + c[2]) * a + c[1]) * a + c[0]
            x_MG[m, g] = (x if x > 0 else np.float32(0)) - size * _exp2(p)


@numba.njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"}, boundscheck=False)
def _add_and_norm(x_MD, more_MD, normed_MD, first, last, dim, epsilon):  # type: ignore[no-untyped-def]
    """Add to the tokens, and scale each to mean 0 and variance 1."""
    for m in range(first, last):
        x_D, more_D, normed_D = x_MD[m], more_MD[m], normed_MD[m]
        total = np.float32(0)
        for d in range(dim):
            x_D[d] += more_D[d]
            total += x_D[d]
        mean, squares = total / np.float32(dim), np.float32(0)
        for d in range(dim):
            squares += (x_D[d] - mean) * (x_D[d] - mean)
        scale = np.float32(1) / np.sqrt(squares / np.float32(dim) + epsilon)
        for d in range(dim):
            normed_D[d] = (x_D[d] - mean) * scale


@numba.njit(error_model="numpy", fastmath={"nnan", "nsz"}, boundscheck=False)
def _top(x_R):  # type: ignore[no-untyped-def]
    """Largest number; "nnan" and "nsz" because otherwise it is sought one lane at a time."""
    top = x_R[0]
    for r in range(1, x_R.size):
        top = x_R[r] if x_R[r] > top else top
    return top


@numba.njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"}, boundscheck=False)
def _softmax(x_MR, first, last):  # type: ignore[no-untyped-def]
    """Logits, in bits, to shares; one of -inf gets as good as nothing."""
    for m in range(first, last):
        x_R = x_MR[m]
        top, total = _top(x_R), np.float32(0)
        for r in range(x_R.size):
            x_R[r] = _exp2(x_R[r] - top)
            total += x_R[r]
        scale = np.float32(1) / total
        for r in range(x_R.size):
            x_R[r] *= scale


@numba.njit(error_model="numpy", fastmath={"contract"}, boundscheck=False)
def _rotate(x_MD, first, last, heads, turn_2F):  # type: ignore[no-untyped-def]
    """Turn the two halves of each head."""
    half = turn_2F.shape[1]
    for m in range(first, last):
        for head in range(heads):
            a_F = x_MD[m, 2 * head * half : (2 * head + 1) * half]
            b_F = x_MD[m, (2 * head + 1) * half : (2 * head + 2) * half]
            for f in range(half):
                a, b = a_F[f], b_F[f]
                a_F[f] = a * turn_2F[0, f] - b * turn_2F[1, f]
                b_F[f] = b * turn_2F[0, f] + a * turn_2F[1, f]


# -- the step ------------------------------------------------------------------------------------


@numba.njit(error_model="numpy", boundscheck=False)
def _sum_counts(counts_N, observed, bin_, history_K, counts_CN, sums_KN):  # type: ignore[no-untyped-def]
    """Move the boxcars on by one bin; sums of integers are exact however long this goes on."""
    new_N = counts_CN[bin_ % counts_CN.shape[0]]
    for k in range(history_K.size):
        old_N, sums_N = counts_CN[(bin_ - history_K[k]) % counts_CN.shape[0]], sums_KN[k]
        for n in range(counts_N.size):
            sums_N[n] += (counts_N[n] if observed else np.float32(0)) - old_N[n]
    for n in range(counts_N.size):
        new_N[n] = counts_N[n] if observed else np.float32(0)


@numba.njit(error_model="numpy", fastmath={"contract"}, boundscheck=False)
def _read_in(weights, at, sums_KN, found_X, token_D):  # type: ignore[no-untyped-def]
    """Softsign of the linear map of root sums, reading only the weights of sums that are not 0."""
    sums_X, D, found = sums_KN.reshape(sums_KN.size), token_D.size, 0
    for x in range(sums_X.size):
        found_X[found] = x
        found += sums_X[x] != 0
    token_D[:] = weights[at : at + D]
    for i in range(0, found - 3, 4):
        x0, x1, x2, x3 = found_X[i], found_X[i + 1], found_X[i + 2], found_X[i + 3]
        r0, r1, r2, r3 = np.sqrt(sums_X[x0]), np.sqrt(sums_X[x1]), np.sqrt(sums_X[x2]), np.sqrt(sums_X[x3])
        w0, w1 = weights[at + (1 + x0) * D :], weights[at + (1 + x1) * D :]
        w2, w3 = weights[at + (1 + x2) * D :], weights[at + (1 + x3) * D :]
        for d in range(D):
            token_D[d] += r0 * w0[d] + r1 * w1[d] + (r2 * w2[d] + r3 * w3[d])
    for i in range(found - found % 4, found):
        root, w = np.sqrt(sums_X[found_X[i]]), weights[at + (1 + found_X[i]) * D :]
        for d in range(D):
            token_D[d] += root * w[d]
    for d in range(D):
        token_D[d] /= np.float32(1) + abs(token_D[d])


@numba.njit(error_model="numpy", boundscheck=False)
def _remember(kv_12D, row, observed, keys_HPFV, values_HPRV):  # type: ignore[no-untyped-def]
    """Put key and value of the spike token into one layer's ring, or make its row unseen."""
    width, half = keys_HPFV.shape[2] - 1, kv_12D.shape[1] // 2
    panel, lane = row // PANEL, row % PANEL
    for head in range(keys_HPFV.shape[0]):
        keys_HPFV[head, panel, 0, lane] = np.float32(0) if observed else np.float32(-np.inf)
        if observed:
            for f in range(width):
                keys_HPFV[head, panel, 1 + f, lane] = kv_12D[0, head * width + f]
                value = kv_12D[0, half + head * width + f]
                values_HPRV[head, f // PANEL, 1 + row, f % PANEL] = value


@numba.njit(error_model="numpy", boundscheck=False)
def _attend(keys_HPFV, values_HPRV, q_MD, scores_MR, mixed_MD, first, last):  # type: ignore[no-untyped-def]
    """Mix the values of one layer's ring for each query."""
    heads, width, rows = keys_HPFV.shape[0], keys_HPFV.shape[2] - 1, values_HPRV.shape[2] - 1
    keys, values = keys_HPFV.reshape(keys_HPFV.size), values_HPRV.reshape(values_HPRV.size)
    at_key = at_value = 0
    for head in range(heads):
        column = head * width
        at_key = _linear(
            keys, at_key, scores_MR.shape[1], width, q_MD, column, scores_MR, 0, first, last
        )
        _softmax(scores_MR, first, last)
        # A head narrower than a panel spills zeros over the next head, which comes later.
        at_value = _linear(
            values, at_value, width, rows, scores_MR, 0, mixed_MD, column, first, last
        )


@numba.njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"}, boundscheck=False)
def _read_out(normed_MD, heads_OX, token_of_O, dim, raw_O):  # type: ignore[no-untyped-def]
    """Each number read out: a row of weights, its bias last, times the token it is read from."""
    for o in range(raw_O.size):
        head_X, normed_D, total = heads_OX[o], normed_MD[token_of_O[o]], np.float32(0)
        for d in range(dim):
            total += head_X[d] * normed_D[d]
        raw_O[o] = total + head_X[dim]


_F4, _F4_2, _F4_5 = (numba.types.Array(numba.float32, n, "C") for n in (1, 2, 5))


@numba.njit(
    numba.void(
        numba.types.Array(numba.float32, 1, "C", readonly=True),  # counts_N
        numba.boolean,  # observed
        numba.int64,  # bin_
        _F4,  # weights
        _F4_2,  # tokens_MD
        _F4_2,  # queries_MD
        _F4_2,  # heads_OD
        numba.int64[::1],  # token_of_O
        numba.float64[::1],  # frequency_F
        numba.int64[::1],  # history_K
        numba.float32,  # epsilon
        numba.int64,  # dim
        numba.int64,  # widened
        _F4_2,  # counts_CN
        _F4_2,  # sums_KN
        _F4_5,  # keys_LHPFV
        _F4_5,  # values_LHPRV
        numba.int64[::1],  # found_X
        _F4_2,  # turn_2F
        _F4_2,  # x_MD
        _F4_2,  # normed_MD
        _F4_2,  # more_MD
        _F4_2,  # kv_12D
        _F4_2,  # q_MD
        _F4_2,  # mixed_MD
        _F4_2,  # wide_MG
        _F4_2,  # scores_MR
        _F4,  # raw_O
    ),
    cache=True,
    nogil=True,
    error_model="numpy",
    boundscheck=False,
)
def fused_step(  # type: ignore[no-untyped-def]
    counts_N, observed, bin_,
    weights, tokens_MD, queries_MD, heads_OD, token_of_O, frequency_F, history_K,
    epsilon, dim, widened,
    counts_CN, sums_KN, keys_LHPFV, values_LHPRV,
    found_X, turn_2F, x_MD, normed_MD, more_MD, kv_12D, q_MD, mixed_MD, wide_MG, scores_MR, raw_O,
):  # fmt: skip
    """One bin; :class:`FusedStep` owns all arrays."""
    M, D = x_MD.shape
    layers, heads = keys_LHPFV.shape[:2]
    row = bin_ % (values_LHPRV.shape[3] - 2)
    shown = 1 if observed else 0
    first = 1 - shown  # tokens [first, M) are worked on; that of an unseen bin matters to nobody
    for f in range(frequency_F.size):
        turn_2F[0, f] = math.cos(bin_ * frequency_F[f])
        turn_2F[1, f] = math.sin(bin_ * frequency_F[f])
    _sum_counts(counts_N, observed, bin_, history_K, counts_CN, sums_KN)
    if observed:
        _read_in(weights, 0, sums_KN, found_X, more_MD[0])
    at = more_MD.shape[1] * (1 + sums_KN.size)
    x_MD[:] = tokens_MD
    q_MD[:] = queries_MD
    at = _linear(weights, at, D, dim, more_MD, 0, x_MD, 0, 0, shown)
    more_MD[:] = 0
    for layer in range(layers):
        keys_HPFV, values_HPRV = keys_LHPFV[layer], values_LHPRV[layer]
        _add_and_norm(x_MD, more_MD, normed_MD, first, M, dim, epsilon)
        at = _linear(weights, at, 2 * D, dim, normed_MD, 0, kv_12D, 0, 0, shown)
        _rotate(kv_12D, 0, shown, heads, turn_2F)
        _remember(kv_12D, row, observed, keys_HPFV, values_HPRV)
        if layer == layers - 1:
            first = 1
        asking = M if layer else shown  # the first queries of behaviours are known
        at = _linear(weights, at, D, dim, normed_MD, 0, q_MD, 0, first, asking)
        _rotate(q_MD, first, M, heads, turn_2F)
        _attend(keys_HPFV, values_HPRV, q_MD, scores_MR, mixed_MD, first, M)
        at = _linear(weights, at, D, dim, mixed_MD, 0, more_MD, 0, first, M)
        _add_and_norm(x_MD, more_MD, normed_MD, first, M, dim, epsilon)
        at = _linear(weights, at, wide_MG.shape[1], dim, normed_MD, 0, wide_MG, 0, first, M)
        _gelu(wide_MG, first, M, widened)
        at = _linear(weights, at, D, widened, wide_MG, 0, more_MD, 0, first, M)
    _add_and_norm(x_MD, more_MD, normed_MD, 1, M, dim, epsilon)
    _read_out(normed_MD, heads_OD, token_of_O, dim, raw_O)


# -- its arrays ----------------------------------------------------------------------------------


def _zeros(*shape: int) -> Array:
    """Zeros that begin on a cache line, so that no vector of a panel lies on two."""
    size = math.prod(shape)
    raw = np.zeros(size + 16, np.float32)
    start = -raw.ctypes.data % 64 // raw.itemsize
    return raw[start : start + size].reshape(shape)


def _up(n: int) -> int:
    return -(-n // PANEL) * PANEL


def _f8(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().numpy().astype(np.float64)


def _after(norm: nn.LayerNorm, linear: nn.Linear) -> _Map:
    """The linear map, with the scale and shift of the norm before it folded in."""
    weight_OI, bias_O = _f8(linear.weight), _f8(linear.bias)
    return weight_OI * _f8(norm.weight), bias_O + weight_OI @ _f8(norm.bias)


def _panels(weight_OI: NDArray[np.float64], bias_O: NDArray[np.float64]) -> NDArray[np.float64]:
    """A linear map as the kernel reads it: panel by panel, its bias and then each input's weights."""
    outputs, inputs = weight_OI.shape
    rows_XO = np.zeros((1 + inputs, _up(outputs)))
    rows_XO[0, :outputs] = bias_O
    rows_XO[1:, :outputs] = weight_OI.T
    return rows_XO.reshape(1 + inputs, -1, PANEL).swapaxes(0, 1).ravel()


def _read_in_map(parts: SpikeReadIn, missing_N: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    """Bias, then the weights of each root sum; what is constant goes into the bias."""
    mean_KN, sd_KN, stand_in_KN = _f8(parts.mean_KN), _f8(parts.sd_KN), _f8(parts.missing_KN)
    weight_DKN = _f8(parts.linear.weight).reshape(-1, *mean_KN.shape)
    gone_N = np.zeros(mean_KN.shape[1], bool) if missing_N is None else missing_N
    constant_KN = np.where(gone_N, stand_in_KN, -mean_KN / sd_KN)
    bias_D = _f8(parts.linear.bias) + np.einsum("dkn,kn->d", weight_DKN, constant_KN)
    rows_XD = np.zeros((1 + mean_KN.size, _up(len(bias_D))))
    rows_XD[0, : len(bias_D)] = bias_D
    rows_XD[1:, : len(bias_D)] = np.where(gone_N, 0.0, weight_DKN / sd_KN).reshape(len(bias_D), -1).T
    return rows_XD.ravel()


_Map = tuple[NDArray[np.float64], NDArray[np.float64]]


def _constant_tokens(model: NEDS, session: str, wanted: Sequence[str]) -> NDArray[np.float64]:
    """Embeddings of the spike token, then the whole hidden token of each wanted behaviour."""
    use = [0, *(model.modalities.index(name) for name in wanted)]
    tokens_MD = _f8(model.modality_MD)[use] + _f8(model.session_XD)[model.session_ids.index(session)]
    tokens_MD += _f8(model.scheme_XD)[SCHEMES.index("decoding")]
    tokens_MD[1:] += _f8(model.hidden_D)
    return tokens_MD


def _query_map(layer: Layer) -> _Map:
    """Queries scaled such that softmax is of powers of two."""
    attention = layer.attention
    dim = attention.out.in_features
    scale = math.log2(math.e) / math.sqrt(dim // attention.heads)
    weight_ED, bias_E = _after(layer.norm1, attention.qkv)
    return weight_ED[:dim] * scale, bias_E[:dim] * scale


def _first_queries(model: NEDS, tokens_MD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Queries of constant tokens in the first layer, not yet rotated."""
    layer = model.layers[0]
    centred_MD = tokens_MD - tokens_MD.mean(axis=1, keepdims=True)
    variance_M1 = (centred_MD**2).mean(axis=1, keepdims=True)
    weight_DD, bias_D = _query_map(layer)
    return centred_MD / np.sqrt(variance_M1 + layer.norm1.eps) @ weight_DD.T + bias_D


def _blocks(
    model: NEDS,
    parts: SessionParts,
    spike_embedding_D: NDArray[np.float64],
    missing_N: NDArray[np.bool_] | None,
) -> Iterator[NDArray[np.float64]]:
    """All weights in the order the kernel reads them."""
    dim = model.config.dim
    shared = model.spikes_shared
    yield _read_in_map(parts.spikes_in, missing_N)
    yield _panels(_f8(shared.weight), _f8(shared.bias) + spike_embedding_D)
    for layer in model.layers:
        weight_ED, bias_E = _after(layer.norm1, layer.attention.qkv)
        for part in (slice(dim, 2 * dim), slice(2 * dim, None)):
            yield _panels(weight_ED[part], bias_E[part])
        yield _panels(*_query_map(layer))
        yield _panels(_f8(layer.attention.out.weight), _f8(layer.attention.out.bias))
        yield _panels(*_after(layer.norm2, layer.widen))
        yield _panels(_f8(layer.narrow.weight), _f8(layer.narrow.bias))


def _heads(
    model: NEDS, parts: SessionParts, wanted: Sequence[str]
) -> tuple[Array, NDArray[np.int64]]:
    """Read-outs, one row for each number, its bias last; and the token each number is read from."""
    maps = [_after(model.norm, parts.behaviour_out[name].linear) for name in wanted]
    rows_OX = np.concatenate([np.column_stack(weight_and_bias) for weight_and_bias in maps])
    token_of_O = np.repeat(np.arange(1, 1 + len(maps)), [len(bias_O) for _, bias_O in maps])
    return np.ascontiguousarray(rows_OX, np.float32), token_of_O.astype(np.int64)


class FusedStep:
    """The network, one bin at a time, for one stream that shows only spikes.

    Parameters
    ----------
    model : NEDS
        Its weights are copied; later changes to it are not seen.
    session : str
        Session id.
    wanted : sequence of str
        Behaviours to decode, at least one, in the order of their outputs.
    missing_N : ndarray of bool, shape (units,), optional
        Units to replace by their learned stand-in. Their counts must still be numbers.

    Attributes
    ----------
    raw_O : ndarray of float32, shape (numbers of all wanted outputs,)
        What the last step gave: the ``outputs`` numbers of each behaviour, one after the other.
    nbytes : int
        Bytes of weights, keys and values that a step reads if no count is zero.

    Examples
    --------
    >>> step = FusedStep(model, "session", ["speed"])  # doctest: +SKIP
    >>> step.reset(first_bin=1200)  # doctest: +SKIP
    >>> mean, log_variance = step.step(counts_N, observed=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: NEDS,
        session: str,
        wanted: Sequence[str],
        missing_N: NDArray[np.bool_] | None = None,
    ) -> None:
        model.start(session)  # refuses a model that cannot be streamed
        config, parts = model.config, model.sessions[model.session_ids.index(session)]
        if not wanted or SPIKES in wanted:
            raise ValueError("the fused step decodes at least one behaviour, and not spikes")
        tokens_MX = _constant_tokens(model, session, wanted)
        blocks = list(_blocks(model, parts, tokens_MX[0], missing_N))
        weights = _zeros(sum(block.size for block in blocks))
        np.concatenate(blocks, out=weights, casting="same_kind")

        M, D, G = len(tokens_MX), _up(config.dim), _up(config.widen * config.dim)
        width, longest = config.dim // config.heads, max(config.history)
        R, inputs = _up(config.context + 1), parts.units * len(config.history)
        self._units, self._bin = parts.units, 0
        self._sinks_LHF = np.stack([_f8(layer.attention.sink_value_HF) for layer in model.layers])
        self._counts_CN = _zeros(longest, parts.units)
        self._sums_KN = _zeros(len(config.history), parts.units)
        self._keys_LHPFV = _zeros(config.layers, config.heads, R // PANEL, 1 + width, PANEL)
        self._values_LHPRV = _zeros(
            config.layers, config.heads, _up(width) // PANEL, 2 + config.context, PANEL
        )
        self.nbytes = weights.nbytes + self._keys_LHPFV.nbytes + self._values_LHPRV.nbytes
        tokens_MD, queries_MD = _zeros(M, D), _zeros(M, D + PANEL)
        tokens_MD[1:, : config.dim] = tokens_MX[1:]
        queries_MD[1:, : config.dim] = _first_queries(model, tokens_MX[1:])
        heads_OD, token_of_O = _heads(model, parts, wanted)
        self.raw_O = np.zeros(len(token_of_O), np.float32)
        self._arguments = (
            weights,
            tokens_MD,
            queries_MD,
            heads_OD,
            token_of_O,
            ROTARY_BASE ** -(np.arange(0, width, 2, dtype=np.float64) / width),
            np.array(config.history, np.int64),
            model.norm.eps,
            config.dim,
            config.widen * config.dim,
            self._counts_CN,
            self._sums_KN,
            self._keys_LHPFV,
            self._values_LHPRV,
            np.zeros(inputs + 1, np.int64),  # found_X
            _zeros(2, width // 2),  # turn_2F
            _zeros(M, D),  # x_MD
            _zeros(M, D),  # normed_MD
            _zeros(M, D),  # more_MD
            _zeros(1, 2 * D),  # kv_12D
            _zeros(M, D + PANEL),  # q_MD
            _zeros(M, D + PANEL),  # mixed_MD
            _zeros(M, G),  # wide_MG
            _zeros(M, R),  # scores_MR
            self.raw_O,
        )
        self.reset()

    def reset(self, first_bin: int = 0) -> None:
        """Forget the past; the next bin has this number."""
        self._bin = first_bin
        self._counts_CN[:] = 0
        self._sums_KN[:] = 0
        L, H, _, rows, _ = self._values_LHPRV.shape
        context = rows - 2
        panel, lane = divmod(context, PANEL)
        self._keys_LHPFV[:] = 0
        self._keys_LHPFV[:, :, :, 0] = -np.inf
        self._keys_LHPFV[:, :, panel, 0, lane] = 0  # the sink, after the rows of the ring
        self._values_LHPRV[:] = 0
        sinks_LHPV = np.zeros((L, H, self._values_LHPRV.shape[2] * PANEL))
        sinks_LHPV[:, :, : self._sinks_LHF.shape[2]] = self._sinks_LHF
        self._values_LHPRV[:, :, :, 1 + context] = sinks_LHPV.reshape(L, H, -1, PANEL)

    def step(self, counts_N: Array, observed: bool) -> Array:
        """Decode the next bin.

        Parameters
        ----------
        counts_N : ndarray of float32, shape (units,)
            Spikes of each unit in the bin: whole numbers; ignored if the bin is not observed.
        observed : bool
            Whether the counts are what happened, rather than a hole in the recording.

        Returns
        -------
        ndarray of float32
            ``raw_O``, valid until the next step.
        """
        if len(counts_N) != self._units:
            raise ValueError(f"{len(counts_N)} counts for {self._units} units")
        fused_step(counts_N, observed, self._bin, *self._arguments)
        self._bin += 1
        return self.raw_O
