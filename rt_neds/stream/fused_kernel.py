"""The compiled part of the fused step: one call for a few bins of some streams, one CPU core.

What lies in which array is :mod:`rt_neds.stream.fused`'s business; this file only computes. All of
it must stay in one file: numba's cache does not notice that a function changed in another.

* All in float32; weights that streams share lie in one array in the order they are read, as the
  prefetcher likes them, in four bytes each or in one, and all tokens, of whichever stream, use a
  weight while it is in a register.
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
"""Two vectors of outputs: widths are padded to whole ones."""
PANEL = 8 * LANES
"""Most outputs of a linear map that are computed together for one token: as many sums that need
not wait for each other as the processor can have under way."""
TILE = 8 if LANES == 16 else 6
"""Most tokens computed together, a pair at a time: 12 sums, two weights and an input are 15
vectors of 16; with 32 vectors, all of a chunk."""
FEW = 4 if LANES == 16 else 2
"""Most tokens for which twice as many outputs are computed together: with fewer sums under way
each waits for itself."""
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
            *("words", "most", "D", "G", "R", "X"),
            *("weights", "history_K", "frequency_F", "observed_T", "turn_T2F", "work_4TX"),
            *("said_TU", "qkv_T3D", "wide_TG", "scores_1R"),
        )
    ]
    + [(name, np.float64) for name in ("query_scale", "epsilon", "longest")]
)
"""What streams share: sizes (``words`` of weights, ``most`` bins of a call), and the addresses of
weights and work space. In a record, for twenty arguments cost more than a small layer's weights."""
SPIKES, LIVE = 1, 2
"""What a bin shows: bits of ``shown_T``."""
NEAR, FAR = (2048, 32), (16384, 16)
"""Bytes by which weights are fetched before their turn, into an outer cache, and words per fetch.
After a bin's sleep they lie in memory, which takes long, and processors do not look past a page by
themselves. Near for one-byte weights of one token: outer caches fetch two lines of 64 bytes
together, and asking for each costs more, of what is there already, than it gains. Far for more
tokens, which read a part of each row at a time, and for keys and values."""

# "contract" lets a product and a sum be one instruction, which rounds once less. Sums over a token
# may also be taken in any order, or they could not be taken many lanes at a time.
_plain = numba.njit(error_model="numpy", fastmath={"contract"})
_summing = numba.njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})

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


@_plain
def _floats(address, rows, columns):  # type: ignore[no-untyped-def]
    """What lies at an address of a stream."""
    return numba.carray(_to_floats(address), (rows, columns))


@_plain
def _integers(address, size):  # type: ignore[no-untyped-def]
    return numba.carray(_to_integers(address), (size,))


@_plain
def _bytes(address, rows, columns):  # type: ignore[no-untyped-def]
    return numba.carray(_to_bytes(address), (rows, columns))


# -- linear maps ---------------------------------------------------------------------------------


class _TileWriter:
    """Writes ``y = bias + weights x`` for some vectors of outputs and a constant number of tokens.

    In vectors, by hand, because the sums must stay in registers over all inputs, which a compiler
    cannot promise for elements of arrays that might overlap.
    """

    def __init__(self, builder: Any, packed: bool, tokens: int, vectors: int, size: Any) -> None:
        self.builder, self.packed, self.size = builder, packed, size
        self.tokens, self.vectors = tokens, vectors
        self.vector = ir.VectorType(ir.FloatType(), LANES)
        self.words = ir.VectorType(ir.IntType(32), LANES)
        self.bytes = ir.VectorType(ir.IntType(8), LANES)

    def at(self, pointer: Any, number: Any, kind: Any = None) -> Any:
        """Pointer to the vector that begins so many numbers further."""
        number = self.size(number) if type(number) is int else number
        pointer = self.builder.gep(pointer, [number])
        return self.builder.bitcast(pointer, (kind or self.vector).as_pointer())

    def weights(self, row: Any) -> list[Any]:
        """Those of one input, widened if need be."""
        b = self.builder
        if not self.packed:
            return [b.load(self.at(row, v * LANES), align=4) for v in range(self.vectors)]
        places = [self.at(row, v * LANES // 4, self.bytes) for v in range(self.vectors)]
        whole = [b.sext(b.load(place, align=4), self.words) for place in places]
        return [b.sitofp(words, self.vector) for words in whole]

    def fetch(self, row: Any) -> None:
        """Ask for what will be read later on; nearer caches are left to what is read now."""
        b, byte, i32 = self.builder, ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        prefetch = b.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        ahead, every = NEAR if self.tokens == 1 and self.packed else FAR
        for word in range(0, self.vectors * LANES // (4 if self.packed else 1), every):
            line = b.bitcast(b.gep(row, [self.size(word + ahead // 4)]), byte)
            b.call(prefetch, [line, i32(0), i32(1), i32(1)])

    def multiply(self, i: Any, weights: Any, stride: Any, x: Any, x_stride: Any) -> None:
        """Add the products of input ``i``."""
        b = self.builder
        row = b.gep(weights, [b.mul(i, stride)])
        self.fetch(row)
        lane0, mask = ir.IntType(32)(0), self.words([0] * LANES)
        of_row = self.weights(row)
        for m in range(self.tokens):
            number = b.load(b.gep(x, [b.add(i, b.mul(self.size(m), x_stride))]))
            spread = b.insert_element(self.vector(ir.Undefined), number, lane0)
            spread = b.shuffle_vector(spread, spread, mask)
            for v, weight in enumerate(of_row):
                product = b.fmul(weight, spread, flags=["contract"])
                total = b.fadd(product, b.load(self.sums[m, v]), flags=["contract"])
                b.store(total, self.sums[m, v])

    def write(
        self, bias: Any, weights: Any, stride: Any, inputs: Any, x: Any, x_stride: Any, y: Any,
        y_stride: Any,
    ) -> None:  # fmt: skip
        """``stride``: words from the weights of an input to those of the next.

        Packed weights are multiples of scales that lie behind the bias, of all of the panel.
        """
        b = self.builder
        places = [(m, v) for m in range(self.tokens) for v in range(self.vectors)]
        self.sums = {place: cgutils.alloca_once(b, self.vector) for place in places}
        biases = [b.load(self.at(bias, v * LANES), align=4) for v in range(self.vectors)]
        for m, v in places:
            b.store(self.vector([0.0] * LANES) if self.packed else biases[v], self.sums[m, v])
        with cgutils.for_range(b, inputs) as loop:
            self.multiply(loop.index, weights, stride, x, x_stride)
        if self.packed:
            scales = b.gep(bias, [b.mul(stride, self.size(4))])
        for m, v in places:
            total = b.load(self.sums[m, v])
            if self.packed:
                scale = b.load(self.at(scales, v * LANES), align=4)
                scaled = b.fmul(total, scale, flags=["contract"])
                total = b.fadd(scaled, biases[v], flags=["contract"])
            place = b.add(b.mul(self.size(m), y_stride), self.size(v * LANES))
            b.store(total, self.at(y, place), align=4)


def _tile_of(kinds: tuple[tuple[int, int, int], ...]) -> Any:
    """Some outputs of a linear map, for kinds of (packed or not, tokens, vectors of outputs).

    All places count words of flat arrays.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typingctx, packed, tokens, vectors, weights, bias, at, stride, inputs,
        x, x_at, x_stride, y, y_at, y_stride,
    ):  # fmt: skip
        signature = types.void(
            packed, tokens, vectors, weights, bias, at, stride, inputs,
            x, x_at, x_stride, y, y_at, y_stride,
        )  # fmt: skip

        def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
            def pointer(array: int, place: int) -> Any:
                made = context.make_array(signature.args[array])(context, b, args[array])
                return b.gep(made.data, [args[place]])

            bias, weights, x, y = pointer(3, 4), pointer(3, 5), pointer(8, 9), pointer(11, 12)
            size, after = args[0].type, b.append_basic_block("after")
            kind = b.add(b.mul(b.add(b.mul(args[0], size(16)), args[1]), size(16)), args[2])
            switch = b.switch(kind, after)
            for packed, tokens, vectors in kinds:
                block = b.append_basic_block("tile")
                switch.add_case(size((packed * 16 + tokens) * 16 + vectors), block)
                b.position_at_end(block)
                writer = _TileWriter(b, bool(packed), tokens, vectors, size)
                writer.write(bias, weights, args[6], args[7], x, args[10], y, args[13])
                b.branch(after)
            b.position_at_end(after)
            return context.get_dummy_value()

        return signature, generate

    return tile


_one = _tile_of(tuple((0, 1, vectors) for vectors in range(1, 9)))
_some = _tile_of(
    (
        *((packed, 1, vectors) for packed in (0, 1) for vectors in range(2, 9, 2)),
        *((packed, tokens, 2) for packed in (0, 1) for tokens in range(2, TILE + 1)),
        *((packed, tokens, 4) for packed in (0, 1) for tokens in range(2, FEW + 1)),
    )
)


@_plain
def _mix(weights, outputs, inputs, x, x_row, x_column, y, y_row, y_column):  # type: ignore[no-untyped-def]
    """As :func:`_linear` for one row and the whole of the weights, of any number of vectors."""
    at, x_at = 0, x_row * x.shape[1] + x_column
    for panel in range(0, outputs, PANEL):
        width, y_at = min(PANEL, outputs - panel), y_row * y.shape[1] + y_column + panel
        _one(0, 1, width // LANES, weights, at, at + width, width, inputs, x, x_at, 0, y, y_at, 0)
        at += width * (1 + inputs)


@_plain
def _linear(weights, at, packed, outputs, inputs, tokens, x, x_row, x_column, y, y_row, y_column):  # type: ignore[no-untyped-def]
    """Map so many rows of ``x`` to rows of ``y``, from a row and column on; return where it ends.

    The map begins at ``weights[at]``: for each panel its bias, then the scales of packed weights,
    then its weights input by input.
    """
    x_stride, y_stride, tiles = x.shape[1], y.shape[1], (tokens + TILE - 1) // TILE
    for panel in range(0, outputs, PANEL):
        width = min(PANEL, outputs - panel)
        w_at, stride = at + width * (1 + packed), width >> 2 * packed
        if tokens == 1:
            x_at, y_at = x_row * x_stride + x_column, y_row * y_stride + y_column + panel
            _some(
                packed, 1, width // LANES, weights, at, w_at, stride, inputs,
                x, x_at, x_stride, y, y_at, y_stride,
            )  # fmt: skip
        else:
            most = 2 * PAIR if tokens <= FEW else PAIR
            for part in range(0, width, most):
                vectors = min(most, width - part) // LANES
                for tile in range(tiles):
                    m, end = tokens * tile // tiles, tokens * (tile + 1) // tiles
                    x_at = (x_row + m) * x_stride + x_column
                    y_at = (y_row + m) * y_stride + y_column + panel + part
                    _some(
                        packed, end - m, vectors, weights, at + part, w_at + (part >> 2 * packed),
                        stride, inputs, x, x_at, x_stride, y, y_at, y_stride,
                    )  # fmt: skip
        at = w_at + stride * inputs
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
def _gelu(x_TG, bins, columns):  # type: ignore[no-untyped-def]
    """Multiply each number by the normal distribution function of it, to 1e-7."""
    c = _TAIL
    for t in range(bins):
        for g in range(columns):
            x = x_TG[t, g]
            a = abs(x) if abs(x) < np.float32(6) else np.float32(6)
            p = (((c[8] * a + c[7]) * a + c[6]) * a + c[5]) * a + c[4]
            p = (((p * a + c[3]) * a + c[2]) * a + c[1]) * a + c[0]
            x_TG[t, g] = (np.float32(0) if x < 0 else x) - a * _exp2(p)  # a NaN stays one


@_summing
def _add_and_norm(weights, at, x_TD, more_TD, normed_TD, bins, dim, D, epsilon):  # type: ignore[no-untyped-def]
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
def _softmax(x_R):  # type: ignore[no-untyped-def]
    """Logits, in bits, to shares; one of -inf gets nothing.

    Nothing at all, for with numbers too small to be normal some processors take a hundred times as
    long, and a share that was as small as it can be would become one when it is scaled.
    """
    total, least = np.float32(0), np.float32(-126)
    top = np.int32(_top(x_R)).view(np.float32)  # not negative: the sink has 0
    for r in range(x_R.size):
        below = x_R[r] - top
        x_R[r] = _exp2(below) if below > least else np.float32(0)
        total += x_R[r]
    scale = np.float32(1) / total
    for r in range(x_R.size):
        x_R[r] *= scale


@_plain
def _rotate(x_TD, column, bins, heads, turn_T2F, scale):  # type: ignore[no-untyped-def]
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


@_plain
def _read_in(stream, packed, D, dim, said, sums_KN, token_E):  # type: ignore[no-untyped-def]
    """Linear map of root sums, reading only the weights of sums that are not 0: to the token to be,
    squashed, and behind it to what a linear decoder says.

    An input has a row of weights: those of the token, in a byte each or in four, then the others.
    """
    inputs, U = stream.inputs, token_E.size - D
    sums_I, words = sums_KN.reshape(sums_KN.size), (D >> 2 * packed) + U
    found_I, root_I = _integers(stream.found_I, inputs), _floats(stream.root_I, 1, inputs)[0]
    factor_I = _floats(stream.factor_I, 1, inputs)[0]
    found = 0
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


@_plain
def place(output, i, outputs, inputs):  # type: ignore[no-untyped-def]
    """Where a linear map has the weight of an input for an output; of input -1, the bias."""
    panel = output // PANEL * PANEL
    return panel * (1 + inputs) + (1 + i) * min(PANEL, outputs - panel) + output - panel


@_plain
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


@_plain
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
            _mix(keys_X, R, width, qkv_T3D, first + t, at, scores_1R, 0, 0)
            _softmax(scores_1R[0])
            # A head narrower than its vectors spills over the next one, which comes later.
            _mix(values_X, V, rows, scores_1R, 0, 0, mixed_TD, first + t, at)


@_plain
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
                e = _exp2(-abs(gate))
                keep = longest * (one if gate > 0 else e) / (one + e)
                memory_D[d] = keep * memory_D[d] + (one - keep) * gates_T3D[t, D + d]
        after_TD[t, :dim] = memory_D[:dim]


@_summing
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


@_plain
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


@_plain
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


@_plain
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
    x_TD, normed_TD, more_TD, mixed_TD = work_4TX[0], work_4TX[1], work_4TX[2], work_4TX[3]
    T = first = 0
    for stream in streams_P:
        T = _enter(
            stream, T, packed, D, E, dim, history_K, frequency_F, observed_T, turn_T2F, normed_TD,
            said_TU,
        )  # fmt: skip
    at = _linear(weights, 0, packed, D, dim, T, normed_TD, 0, 0, x_TD, 0, 0)
    at = _linear(weights, at, 0, D, said, T, normed_TD, 0, D, more_TD, 0, 0)
    for stream in streams_P:
        first = _begin(stream, first, x_TD, D)
    keys_X, values_X = R * (1 + width), V * (1 + rows)
    for layer in range(layers):
        at = _add_and_norm(weights, at, x_TD, more_TD, normed_TD, T, dim, D, epsilon)
        at = _linear(weights, at, packed, 3 * D, dim, T, normed_TD, 0, 0, qkv_T3D, 0, 0)
        _rotate(qkv_T3D, 0, T, heads, turn_T2F, query_scale)
        _rotate(qkv_T3D, D, T, heads, turn_T2F, one)
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
        at = _linear(weights, at, packed, D, dim, T, mixed_TD, 0, 0, more_TD, 0, 0)
        at = _add_and_norm(weights, at, x_TD, more_TD, normed_TD, T, dim, D, epsilon)
        at = _linear(weights, at, packed, G, dim, T, normed_TD, 0, 0, wide_TG, 0, 0)
        _gelu(wide_TG, T, widened)
        at = _linear(weights, at, packed, D, widened, T, wide_TG, 0, 0, more_TD, 0, 0)
    if longest > 0:  # there is a memory
        at = _add_and_norm(weights, at, x_TD, more_TD, normed_TD, T, dim, D, epsilon)
        at = _linear(weights, at, packed, 2 * D, dim, T, normed_TD, 0, 0, qkv_T3D, 0, 0)
        first = 0
        for stream in streams_P:
            memory_D, dark_1 = _floats(stream.memory_D, 1, D)[0], _integers(stream.dark_1, 1)
            _average(
                qkv_T3D, first, stream.bins, observed_T, dim, context, longest, memory_D, dark_1,
                mixed_TD,
            )  # fmt: skip
            first += stream.bins
        at = _linear(weights, at, packed, D, dim, T, mixed_TD, 0, 0, more_TD, 0, 0)
    _add_and_norm(weights, at, x_TD, more_TD, normed_TD, T, dim, D, epsilon)
    first = 0
    for stream in streams_P:
        _read_out(stream, first, normed_TD, said_TU, dim)
        first += stream.bins


@numba.njit(error_model="numpy", cache=True, nogil=True)
def fused_step(streams, many, trunk):  # type: ignore[no-untyped-def]
    """The bins of so many streams, whose records lie at an address, with the trunk at another.

    :class:`FusedStep` owns a stream's arrays, its trunk all others.
    """
    _step(numba.carray(_to_streams(streams), (many,)), numba.carray(_to_trunk(trunk), (1,))[0])
