"""The compiled part of the fused step: one call for a few bins of some streams, one CPU core.

What lies in which array is :mod:`rt_neds.stream.fused`'s business; this file only computes.

* All in float32 but the products of weights in bytes (:mod:`rt_neds.stream.fused_products`).
* A stream is a record of where its own arrays are, for streams differ in units and in outputs.
* Keys lie such that scores are one more linear map, whose bias says who is seen, and values such
  that mixing them is another; the sink is a row of both that never changes.
* Every number is summed input by input, whatever is computed beside it: the same stream gives the
  same bits however it was cut into calls.

Shape suffixes: P streams, T bins of this call, N units, K boxcar widths, C bins of the longest
boxcar, D model width, U numbers that a linear decoder says, E outputs and I inputs of a linear map,
G width of the feed-forward layer, L layers, H heads, F width of a head (of rotary angles: half of
it), R rows of the ring and the sink, X numbers of a linear map, O numbers read out. D, E and G are
padded to whole pairs of vectors, R and values to whole vectors; what is beyond ``dim`` is zero or
never read.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from rt_neds.stream import fused_between, fused_products
from rt_neds.stream.fused_between import add_and_norm, exp2, gelu, rotate, softmax, summing
from rt_neds.stream.fused_products import LANES, linear, mix, place, plain

STREAM = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("bins", "bin", "units", "inputs", "outputs"),
            *("counts_TN", "shown_T", "live_TD", "counts_CN", "sums_KN", "found_I", "root_I"),
            *("factor_I", "bias_E", "read_in", "spikes_D", "dark_D", "heads_OI"),
            *("keys_LHX", "values_LHX"),
            *("memory_D", "dark_1", "token_TD", "raw_TO"),
        )
    ]
)
"""One stream: how many bins it has now and the number of the first, its sizes, and the addresses of
its arrays."""
TRUNK = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("packed", "layers", "heads", "context", "dim", "widened", "said", "boxcars"),
            *("words", "most", "D", "G", "R", "X", "W"),
            *("weights", "history_K", "frequency_F", "observed_T", "turn_T2F", "work_4TX"),
            *("said_TU", "qkv_T3D", "wide_TG", "scores_1R", "cut_TW"),
        )
    ]
    + [(name, np.float64) for name in ("query_scale", "epsilon", "longest")]
)
"""What streams share: sizes (``words`` of weights, ``most`` bins of a call), and the addresses of
weights and work space. In a record, for twenty arguments cost more than a small layer's weights."""
SPIKES, LIVE = 1, 2
"""What a bin shows: bits of ``shown_T``."""


def digest_of(*modules: ModuleType) -> str:
    """Of their texts: numba's cache sees only the file of the function that is compiled."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


# -- streams -------------------------------------------------------------------------------------


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def pointer(typingctx, address):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), generate

    return pointer


_to_floats, _to_integers = _pointer_to(types.float32), _pointer_to(types.int64)
_to_bytes, _to_doubles = _pointer_to(types.int8), _pointer_to(types.float64)
_to_streams, _to_trunk = (_pointer_to(numba.from_dtype(kind)) for kind in (STREAM, TRUNK))


@plain
def _floats(address, rows, columns):  # type: ignore[no-untyped-def]
    """What lies at an address of a stream."""
    return numba.carray(_to_floats(address), (rows, columns))


@plain
def _integers(address, size):  # type: ignore[no-untyped-def]
    return numba.carray(_to_integers(address), (size,))


@plain
def _bytes(address, rows, columns):  # type: ignore[no-untyped-def]
    return numba.carray(_to_bytes(address), (rows, columns))


# -- a bin --------------------------------------------------------------------------------------


@plain
def _sum_counts(counts_N, observed, bin_, history_K, counts_CN, sums_KN):  # type: ignore[no-untyped-def]
    """Move the boxcars on by one bin; sums of integers are exact however long this goes on."""
    for k in range(history_K.size):
        old_N, sums_N = counts_CN[(bin_ - history_K[k]) % len(counts_CN)], sums_KN[k]
        for n in range(counts_N.size):
            sums_N[n] += (counts_N[n] if observed else np.float32(0)) - old_N[n]
    new_N = counts_CN[bin_ % len(counts_CN)]
    for n in range(counts_N.size):
        new_N[n] = counts_N[n] if observed else np.float32(0)


@plain
def _add_rows(rows_IX, at, columns, found_I, root_I, found, token_E, to):  # type: ignore[no-untyped-def]
    """Add some columns of the rows found, so many times each."""
    into_X = token_E[to : to + columns]
    for i in range(0, found, 4):  # four at once, or half the time goes into fetching the token
        r0, r1, r2, r3 = root_I[i], root_I[i + 1], root_I[i + 2], root_I[i + 3]
        w0_X, w1_X = rows_IX[found_I[i], at:], rows_IX[found_I[i + 1], at:]
        w2_X, w3_X = rows_IX[found_I[i + 2], at:], rows_IX[found_I[i + 3], at:]
        for x in range(columns):
            into_X[x] += (r0 * np.float32(w0_X[x]) + r1 * np.float32(w1_X[x])) + (
                r2 * np.float32(w2_X[x]) + r3 * np.float32(w3_X[x])
            )


@plain
def _read_in(stream, packed, D, dim, said, sums_KN, token_E):  # type: ignore[no-untyped-def]
    """Linear map of root sums, reading only the weights of sums that are not 0: to the token to be,
    squashed, and behind it to what a linear decoder says.

    An input has a row of weights: those of the token, in a byte each or in four, then the others.
    """
    inputs, U = stream.inputs, token_E.size - D
    sums_I, words = sums_KN.reshape(sums_KN.size), (D >> 2 * packed) + U
    found_I, root_I = _integers(stream.found_I, inputs), _floats(stream.root_I, 1, inputs)[0]
    factor_I = _floats(stream.factor_I, 1, inputs)[0]
    found = np.int64(0)
    for i in range(sums_I.size):
        found_I[found], root_I[found] = i, np.sqrt(sums_I[i]) * factor_I[i]
        found += sums_I[i] != 0
    for i in range(found, found + 3):
        found_I[i], root_I[i] = 0, 0
    token_E[:] = _floats(stream.bias_E, 1, token_E.size)[0]
    floats_IX = _floats(stream.read_in, inputs, words)
    if packed:
        bytes_IX = _bytes(stream.read_in, inputs, 4 * words)
        _add_rows(bytes_IX, 0, D, found_I, root_I, found, token_E, 0)
    else:
        _add_rows(floats_IX, 0, D, found_I, root_I, found, token_E, 0)
    _add_rows(floats_IX, words - U, said, found_I, root_I, found, token_E, D)
    for d in range(dim):
        token_E[d] /= np.float32(1) + abs(token_E[d])


@plain
def _remember(qkv_T3D, first, bins, bin_, observed_T, width, rows, keys_HX, values_HX):  # type: ignore[no-untyped-def]
    """Put keys and values of a stream's tokens into a layer's ring; nobody sees them yet."""
    D, R, V = (
        qkv_T3D.shape[1] // 3,
        keys_HX.shape[1] // (1 + width),
        values_HX.shape[1] // (1 + rows),
    )
    for t in range(bins):
        row = (bin_ + t) % (rows - 1)
        for head in range(len(keys_HX)):
            keys_HX[head, place(row, -1, R, width)] = np.float32(-np.inf)
            if observed_T[first + t]:
                for f in range(width):
                    at = head * width + f
                    keys_HX[head, place(row, f, R, width)] = qkv_T3D[first + t, D + at]
                    values_HX[head, place(f, row, V, rows)] = qkv_T3D[first + t, 2 * D + at]


@plain
def _attend(  # type: ignore[no-untyped-def]
    keys_HX, values_HX, qkv_T3D, scores_1R, mixed_TD, first, bins, bin_, observed_T, width, rows,
    context,
):  # fmt: skip
    """Mix the values of a layer's ring for each query; the sink is the last of the rows."""
    R, V = scores_1R.shape[1], values_HX.shape[1] // (1 + rows)
    for head in range(len(keys_HX)):
        at, keys_X, values_X = head * width, keys_HX[head], values_HX[head]
        for t in range(bins):
            # One row comes into sight, if it was observed, and one goes out of it.
            new, old = (bin_ + t) % (rows - 1), (bin_ + t - context) % (rows - 1)
            keys_X[place(old, -1, R, width)] = np.float32(-np.inf)
            if observed_T[first + t]:
                keys_X[place(new, -1, R, width)] = np.float32(0)
            mix(keys_X, R, width, qkv_T3D, first + t, at, scores_1R, 0, 0)
            softmax(scores_1R[0])
            # A head narrower than its vectors spills over the next one, which comes later.
            mix(values_X, V, rows, scores_1R, 0, 0, mixed_TD, first + t, at)


@plain
def _average(  # type: ignore[no-untyped-def]
    gates_T3D, first, bins, observed_T, dim, context, longest, memory_D, dark_1, after_TD
):  # fmt: skip
    """Move a stream's memory on, bin by bin; gates lie before the values of each token.

    ``dark_1`` counts the bins since anything was observed.
    """
    D, one, bits = gates_T3D.shape[1] // 3, np.float32(1), np.float32(math.log2(math.e))
    for t in range(first, first + bins):
        dark_1[0] = 0 if observed_T[t] else dark_1[0] + 1
        if dark_1[0] >= context:
            memory_D[:] = 0
        if observed_T[t]:
            for d in range(dim):
                gate = gates_T3D[t, d] * bits
                e = exp2(-abs(gate))
                keep = longest * (one if gate > 0 else e) / (one + e)
                memory_D[d] = keep * memory_D[d] + (one - keep) * gates_T3D[t, D + d]
        after_TD[t, :dim] = memory_D[:dim]


@summing
def _read_out(stream, first, normed_TD, said_TU, dim):  # type: ignore[no-untyped-def]
    """Each number a stream reads out: a row of weights, its bias after those of the token of its
    bin, then those of what a linear decoder said of it.
    """
    U = said_TU.shape[1]
    heads_OI = _floats(stream.heads_OI, stream.outputs, dim + 1 + U)
    raw_TO = _floats(stream.raw_TO, stream.bins, stream.outputs)
    token_TD = _floats(stream.token_TD, stream.bins, dim)
    for t in range(stream.bins):
        token_TD[t] = normed_TD[first + t, :dim]
    for o in range(stream.outputs):
        for t in range(stream.bins):
            total, head_I, normed_D = np.float32(0), heads_OI[o], normed_TD[first + t]
            for d in range(dim):
                total += head_I[d] * normed_D[d]
            total += head_I[dim]
            for u in range(U):
                total += head_I[dim + 1 + u] * said_TU[first + t, u]
            raw_TO[t, o] = total


@plain
def _enter(  # type: ignore[no-untyped-def]
    stream, first, packed, D, E, dim, history_K, frequency_F, observed_T, turn_T2F, normed_TD,
    said_TU,
):  # fmt: skip
    """What a stream's bins read in, on so many rows from ``first`` on; returns the row after."""
    said = said_TU.shape[1] - 1  # the last is whether anything is said
    counts_TN = _floats(stream.counts_TN, stream.bins, stream.units)
    counts_CN = _floats(stream.counts_CN, history_K.max(), stream.units)
    sums_KN = _floats(stream.sums_KN, history_K.size, stream.units)
    shown_T = _integers(stream.shown_T, stream.bins)
    for t in range(stream.bins):
        row, bin_ = first + t, stream.bin + t
        observed_T[row], spikes = shown_T[t] != 0, shown_T[t] & SPIKES != 0
        for f in range(frequency_F.size):
            turn_T2F[row, 0, f] = math.cos(bin_ * frequency_F[f])
            turn_T2F[row, 1, f] = math.sin(bin_ * frequency_F[f])
        _sum_counts(counts_TN[t], spikes, bin_, history_K, counts_CN, sums_KN)
        normed_TD[row, :E], said_TU[row] = 0, 0
        if spikes:
            _read_in(stream, packed, D, dim, said, sums_KN, normed_TD[row, :E])
            said_TU[row, :said], said_TU[row, said] = normed_TD[row, D : D + said], 1
    return first + stream.bins


@plain
def _begin(stream, first, x_TD, D):  # type: ignore[no-untyped-def]
    """Make tokens of a stream out of what its spikes, and what is live, read in as; returns the row
    after.
    """
    spikes_D, dark_D = _floats(stream.spikes_D, 1, D)[0], _floats(stream.dark_D, 1, D)[0]
    live_TD = _floats(stream.live_TD, stream.bins, D)
    shown_T = _integers(stream.shown_T, stream.bins)
    for t in range(stream.bins):
        x_D, live_D = x_TD[first + t], live_TD[t]
        for d in range(D):
            x_D[d] = x_D[d] + spikes_D[d] if shown_T[t] & SPIKES else dark_D[d]
        if shown_T[t] & LIVE:
            for d in range(D):
                x_D[d] += live_D[d]
    return first + stream.bins


@numba.njit("int32(int32[::1])", cache=True, nogil=True)
def fetch(words):  # type: ignore[no-untyped-def]
    """Read one word of every cache line, so that all of them lie near the processor."""
    total = np.int32(0)
    for i in range(0, words.size, 16):
        total += words[i]
    return total  # of no use; but what nobody asks for is not read


@plain
def _step(streams_P, trunk):  # type: ignore[no-untyped-def]
    packed, layers, heads, context = trunk.packed, trunk.layers, trunk.heads, trunk.context
    dim, widened, said, most = trunk.dim, trunk.widened, trunk.said, trunk.most
    D, G, R, width = trunk.D, trunk.G, trunk.R, dim // heads
    epsilon, longest = np.float32(trunk.epsilon), np.float32(trunk.longest)
    query_scale, one = np.float32(trunk.query_scale), np.float32(1)
    V, rows = (width + LANES - 1) // LANES * LANES, context + most  # of the ring, and the sink
    E = D + (said + LANES - 1) // LANES * LANES
    weights = _floats(trunk.weights, 1, trunk.words)[0]
    history_K = _integers(trunk.history_K, trunk.boxcars)
    frequency_F = numba.carray(_to_doubles(trunk.frequency_F), (width // 2,))
    turn_T2F = numba.carray(_to_floats(trunk.turn_T2F), (most, 2, width // 2))
    observed_T = _bytes(trunk.observed_T, 1, most)[0]
    said_TU, qkv_T3D = _floats(trunk.said_TU, most, said + 1), _floats(trunk.qkv_T3D, most, 3 * D)
    wide_TG, scores_1R = _floats(trunk.wide_TG, most, G), _floats(trunk.scores_1R, 1, R)
    work_4TX = numba.carray(_to_floats(trunk.work_4TX), (4, most, trunk.X))
    cut_TW = _floats(trunk.cut_TW, most, trunk.W)
    x_TD, normed_TD, more_TD, mixed_TD = work_4TX[0], work_4TX[1], work_4TX[2], work_4TX[3]
    # Not plain numbers: of those the compiler makes a copy of whatever is called with them.
    T = first = at = zero = np.int64(0)
    for stream in streams_P:
        T = _enter(
            stream, T, packed, D, E, dim, history_K, frequency_F, observed_T, turn_T2F, normed_TD,
            said_TU,
        )  # fmt: skip
    at = linear(weights, at, packed, D, dim, T, normed_TD, zero, x_TD, cut_TW)
    at = linear(weights, at, zero, D, said, T, normed_TD, D, more_TD, cut_TW)
    for stream in streams_P:
        first = _begin(stream, first, x_TD, D)
    keys_X, values_X = R * (1 + width), V * (1 + rows)
    for layer in range(layers):
        at = add_and_norm(weights, at, x_TD, more_TD, normed_TD, T, dim, D, epsilon)
        at = linear(weights, at, packed, 3 * D, dim, T, normed_TD, zero, qkv_T3D, cut_TW)
        rotate(qkv_T3D, 0, T, heads, turn_T2F, query_scale)
        rotate(qkv_T3D, D, T, heads, turn_T2F, one)
        first = 0
        for stream in streams_P:
            bins, bin_ = stream.bins, stream.bin
            keys_HX = _floats(stream.keys_LHX + 4 * layer * heads * keys_X, heads, keys_X)
            values_HX = _floats(stream.values_LHX + 4 * layer * heads * values_X, heads, values_X)
            _remember(qkv_T3D, first, bins, bin_, observed_T, width, rows, keys_HX, values_HX)
            _attend(
                keys_HX, values_HX, qkv_T3D, scores_1R, mixed_TD, first, bins, bin_, observed_T,
                width, rows, context,
            )  # fmt: skip
            first += bins
        at = linear(weights, at, packed, D, dim, T, mixed_TD, zero, more_TD, cut_TW)
        at = add_and_norm(weights, at, x_TD, more_TD, normed_TD, T, dim, D, epsilon)
        at = linear(weights, at, packed, G, dim, T, normed_TD, zero, wide_TG, cut_TW)
        gelu(wide_TG, T, widened)
        at = linear(weights, at, packed, D, widened, T, wide_TG, zero, more_TD, cut_TW)
    if longest > 0:  # there is a memory
        at = add_and_norm(weights, at, x_TD, more_TD, normed_TD, T, dim, D, epsilon)
        at = linear(weights, at, packed, 2 * D, dim, T, normed_TD, zero, qkv_T3D, cut_TW)
        first = 0
        for stream in streams_P:
            memory_D, dark_1 = _floats(stream.memory_D, 1, D)[0], _integers(stream.dark_1, 1)
            _average(
                qkv_T3D, first, stream.bins, observed_T, dim, context, longest, memory_D, dark_1,
                mixed_TD,
            )  # fmt: skip
            first += stream.bins
        at = linear(weights, at, packed, D, dim, T, mixed_TD, zero, more_TD, cut_TW)
    add_and_norm(weights, at, x_TD, more_TD, normed_TD, T, dim, D, epsilon)
    first = 0
    for stream in streams_P:
        _read_out(stream, first, normed_TD, said_TU, dim)
        first += stream.bins


def _compiled(texts: str) -> Any:
    @numba.njit(error_model="numpy", cache=True, nogil=True)
    def fused_step(streams, many, trunk):  # type: ignore[no-untyped-def]
        """The bins of so many streams, whose records lie at an address, with the trunk at another.

        :class:`FusedStep` owns a stream's arrays, its trunk all others.
        """
        texts  # noqa: B018  (what a function holds is looked at by the cache, other files are not)
        records = numba.carray(_to_streams(streams), (many,))
        _step(records, numba.carray(_to_trunk(trunk), (1,))[0])

    return fused_step


fused_step = _compiled(digest_of(fused_between, fused_products))
