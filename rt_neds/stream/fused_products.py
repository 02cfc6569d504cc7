"""Linear maps of the fused step: ``y = bias + weights x`` for a few tokens, on one core.

Weights lie panel by panel: of each the bias, then, of weights in bytes, the scales of its outputs,
then the weights in the order they are read, as the prefetcher likes them. All tokens use a weight
while it is in a register. Each number is summed input by input, whatever is computed beside it.

Weights in bytes are multiplied by whichever way the processor has:

* **Dot products of bytes** (AVX-512 VNNI, AVX-VNNI). Four inputs of an output lie side by side, and
  one instruction adds the products of four pairs of bytes to a whole number. An input is cut into
  three bytes, of 23 bits, of which the greatest of its token needs all. So every sum is exact, and
  what the three are worth is put together once per output.
* **Widened to float32** in the register, where there are none: three times the instructions.

Shape suffixes: as in :mod:`rt_neds.stream.fused_kernel`; W words of a token cut into bytes.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_HAS = llvm.get_host_cpu_features()
LANES = 16 if _HAS.get("avx512f", False) else 8
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
DOTS = bool(_HAS.get("avx512vnni" if LANES == 16 else "avxvnni", False))
"""Whether there are dot products of bytes."""
DOT_PANEL = 4 * LANES
"""Most outputs computed together by dot products for one token: each vector of them is three sums,
and more would not stay in registers, as compilers keep all weights and inputs beside them."""
DOT_TILE = 4
"""Most tokens computed together by dot products."""
LEAST, MOST = np.float32(2.0**-100), np.float32(2**22 - 2)
"""A token of numbers all smaller than the first is taken for zero. The second is what the greatest
number of any other is taken for: a little less than would fit, for factors are rounded."""
HALF = 2**22
"""Added to an input before it is cut, so that its bytes have no sign."""
NEAR, FAR = (2048, 32), (16384, 16)
"""Bytes by which weights are fetched before their turn, into an outer cache, and words per fetch.
After a bin's sleep they lie in memory, which takes long, and processors do not look past a page by
themselves. Near for one-byte weights of one token: outer caches fetch two lines of 64 bytes
together, and asking for each costs more, of what is there already, than it gains. Far for more
tokens, which read a part of each row at a time, and for keys and values."""

# "contract" lets a product and a sum be one instruction, which rounds once less.
plain = numba.njit(error_model="numpy", fastmath={"contract"})


class _Floats:
    """Writes the map of a constant number of tokens to some vectors of outputs, in float32.

    In vectors, by hand, because the sums must stay in registers over all inputs, which a compiler
    cannot promise for elements of arrays that might overlap. All places count words.
    """

    def __init__(self, builder: Any, packed: bool, tokens: int, vectors: int, size: Any) -> None:
        self.builder, self.packed, self.size = builder, packed, size
        self.tokens, self.vectors = tokens, vectors
        self.floats = ir.VectorType(ir.FloatType(), LANES)
        self.words = ir.VectorType(ir.IntType(32), LANES)
        self.bytes = ir.VectorType(ir.IntType(8), LANES)

    def write(
        self, bias: Any, weights: Any, stride: Any, inputs: Any, x: Any, x_stride: Any, y: Any,
        y_stride: Any,
    ) -> None:  # fmt: skip
        """``stride``: words from the weights of an input to those of the next."""
        b = self.builder
        rows = [b.gep(x, [b.mul(self.size(m), x_stride)]) for m in range(self.tokens)]
        starts = self.starts(bias, stride)
        self.sums = {place: cgutils.alloca_once(b, start.type) for place, start in starts.items()}
        for place, start in starts.items():
            b.store(start, self.sums[place])
        with cgutils.for_range(b, inputs) as loop:
            row = b.gep(weights, [b.mul(loop.index, stride)])
            self.fetch(row)
            self.multiply(loop.index, row, rows, inputs)
        for m in range(self.tokens):
            for v in range(self.vectors):
                place = b.add(b.mul(self.size(m), y_stride), self.size(v * LANES))
                total = self.total(m, v, bias, stride, rows[m], inputs)
                b.store(total, self.at(y, place), align=4)

    def starts(self, bias: Any, stride: Any) -> dict[Any, Any]:
        """What each sum begins at."""
        zero = self.floats([0.0] * LANES)
        biases = [zero if self.packed else self.load(bias, v * LANES) for v in range(self.vectors)]
        return {(m, v): of for m in range(self.tokens) for v, of in enumerate(biases)}

    def weights(self, row: Any) -> list[Any]:
        """Those of one input, widened if need be."""
        b = self.builder
        if not self.packed:
            return [self.load(row, v * LANES) for v in range(self.vectors)]
        whole = [self.load(row, v * LANES // 4, self.bytes) for v in range(self.vectors)]
        return [b.sitofp(b.sext(vector, self.words), self.floats) for vector in whole]

    def multiply(self, i: Any, row: Any, rows: list[Any], inputs: Any) -> None:
        """Add the products of input ``i``."""
        b = self.builder
        weights = self.weights(row)
        for m in range(self.tokens):
            spread = self.spread(b.load(b.gep(rows[m], [i])))
            for v, weight in enumerate(weights):
                product = b.fmul(weight, spread, flags=["contract"])
                total = b.fadd(product, b.load(self.sums[m, v]), flags=["contract"])
                b.store(total, self.sums[m, v])

    def total(self, m: int, v: int, bias: Any, stride: Any, x: Any, inputs: Any) -> Any:
        """What a token's outputs are."""
        b, total = self.builder, self.builder.load(self.sums[m, v])
        if not self.packed:
            return total
        scale = self.load(b.gep(bias, [b.mul(stride, self.size(4))]), v * LANES)
        return self.scaled(total, scale, self.load(bias, v * LANES))

    def scaled(self, vector: Any, scale: Any, plus: Any) -> Any:
        product = self.builder.fmul(vector, scale, flags=["contract"])
        return self.builder.fadd(product, plus, flags=["contract"])

    def load(self, pointer: Any, number: Any, kind: Any = None) -> Any:
        """The vector that begins so many numbers further."""
        return self.builder.load(self.at(pointer, number, kind), align=4)

    def at(self, pointer: Any, number: Any, kind: Any = None) -> Any:
        number = self.size(number) if type(number) is int else number
        pointer = self.builder.gep(pointer, [number])
        return self.builder.bitcast(pointer, (kind or self.floats).as_pointer())

    def spread(self, number: Any) -> Any:
        """A vector of one number."""
        none = ir.VectorType(number.type, LANES)(ir.Undefined)
        first = self.builder.insert_element(none, number, ir.IntType(32)(0))
        return self.builder.shuffle_vector(first, first, self.words([0] * LANES))

    def fetch(self, row: Any) -> None:
        """Ask for what will be read later on; nearer caches are left to what is read now."""
        b, byte, i32 = self.builder, ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        prefetch = b.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        ahead, every = NEAR if self.tokens == 1 and self.packed else FAR
        for word in range(0, self.vectors * LANES // (4 if self.widens else 1), every):
            line = b.bitcast(b.gep(row, [self.size(word + ahead // 4)]), byte)
            b.call(prefetch, [line, i32(0), i32(1), i32(1)])

    @property
    def widens(self) -> bool:
        return self.packed


class _Dots(_Floats):
    """The same of weights in bytes, by dot products of four inputs with four weights of an output.

    A token's row is its bytes, the lowest of all inputs first, and behind them what a unit of the
    lowest is worth.
    """

    widens = False

    def starts(self, bias: Any, stride: Any) -> dict[Any, Any]:
        """Sums of the highest byte begin at what takes :data:`HALF` off all inputs again."""
        behind = self.builder.gep(bias, [self.builder.mul(stride, self.size(2))])
        less = [self.load(behind, v * LANES, self.words) for v in range(self.vectors)]
        none = self.words([0] * LANES)
        return {
            (m, v, byte): less[v] if byte == 2 else none
            for m in range(self.tokens)
            for v in range(self.vectors)
            for byte in range(3)
        }

    def multiply(self, i: Any, row: Any, rows: list[Any], inputs: Any) -> None:
        """Add the products of inputs ``4 i`` to ``4 i + 3``."""
        b = self.builder
        weights = [self.load(row, v * LANES, self.words) for v in range(self.vectors)]
        for m in range(self.tokens):
            for byte in range(3):
                at = b.add(b.mul(inputs, self.size(byte)), i)
                word = b.bitcast(b.gep(rows[m], [at]), ir.IntType(32).as_pointer())
                spread = self.spread(b.load(word))
                for v, weight in enumerate(weights):
                    place = self.sums[m, v, byte]
                    b.store(self.dot(b.load(place), spread, weight), place)

    def dot(self, total: Any, unsigned: Any, signed: Any) -> Any:
        kind, name = ir.FunctionType(self.words, [self.words] * 3), "llvm.x86.avx512.vpdpbusd."
        module = self.builder.module
        dot = cgutils.get_or_insert_function(module, kind, f"{name}{32 * LANES}")
        return self.builder.call(dot, [total, unsigned, signed])

    def total(self, m: int, v: int, bias: Any, stride: Any, x: Any, inputs: Any) -> Any:
        b, base = self.builder, self.floats([256.0] * LANES)
        low, middle, high = (b.sitofp(b.load(self.sums[m, v, k]), self.floats) for k in range(3))
        worth = self.spread(b.load(b.gep(x, [b.mul(inputs, self.size(3))])))
        total = b.fmul(self.scaled(self.scaled(high, base, middle), base, low), worth)
        scale = self.load(b.gep(bias, [stride]), v * LANES)
        return self.scaled(total, scale, self.load(bias, v * LANES))


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
                way = _Dots if packed and DOTS else _Floats
                writer = way(b, bool(packed), tokens, vectors, size)
                writer.write(bias, weights, args[6], args[7], x, args[10], y, args[13])
                b.branch(after)
            b.position_at_end(after)
            return context.get_dummy_value()

        return signature, generate

    return tile


def _vectors(tokens: int) -> int:
    """Most vectors of outputs that are computed together by dot products for so many tokens."""
    return 4 if tokens == 1 or (tokens == 2 and LANES == 16) else 2 if LANES == 16 else 1


def _kinds(packed: int) -> tuple[tuple[int, int, int], ...]:
    """Tokens and vectors that are computed together."""
    if packed and DOTS:
        of = range(1, DOT_TILE + 1)
        return tuple((1, m, v) for m in of for v in {min(2, _vectors(m)), _vectors(m)})
    return (
        *((packed, 1, vectors) for vectors in range(2, 9, 2)),
        *((packed, tokens, 2) for tokens in range(2, TILE + 1)),
        *((packed, tokens, 4) for tokens in range(2, FEW + 1)),
    )


_one = _tile_of(tuple((0, 1, vectors) for vectors in range(1, 9)))
_some = _tile_of(_kinds(0) + _kinds(1))
_AT_ONCE = tuple(_vectors(tokens) for tokens in range(1, DOT_TILE + 1))


def cut_words(inputs: int) -> int:
    """Words of 4 bytes that a token cut into bytes takes."""
    return 3 * -(-inputs // 4) + 1


@plain
def place(output, i, outputs, inputs):  # type: ignore[no-untyped-def]
    """Where a linear map has the weight of an input for an output; of input -1, the bias."""
    panel = output // PANEL * PANEL
    return panel * (1 + inputs) + (1 + i) * min(PANEL, outputs - panel) + output - panel


@plain
def mix(weights, outputs, inputs, x, x_row, x_column, y, y_row, y_column):  # type: ignore[no-untyped-def]
    """Map a row of ``x``, from a column on, to one of ``y``; the weights are in float32."""
    at, x_at = 0, x_row * x.shape[1] + x_column
    for panel in range(0, outputs, PANEL):
        width, y_at = min(PANEL, outputs - panel), y_row * y.shape[1] + y_column + panel
        _one(0, 1, width // LANES, weights, at, at + width, width, inputs, x, x_at, 0, y, y_at, 0)
        at += width * (1 + inputs)


@plain
def linear(weights, at, packed, outputs, inputs, tokens, x, x_column, y, cut_TW):  # type: ignore[no-untyped-def]
    """Map the first rows of ``x``, from a column on, to those of ``y``; return where it ends.

    The map begins at ``weights[at]``: for each panel its bias, then, of packed weights, their
    scales, then its weights input by input.
    """
    if packed and DOTS:
        for t in range(tokens):
            _cut(x[t, x_column : x_column + inputs], cut_TW[t])
        return _dotted(weights, at, outputs, inputs, tokens, cut_TW, y)
    x_stride, y_stride, tiles = x.shape[1], y.shape[1], (tokens + TILE - 1) // TILE
    for panel in range(0, outputs, PANEL):
        width = min(PANEL, outputs - panel)
        w_at, stride = at + width * (1 + packed), width >> 2 * packed
        most = PANEL if tokens == 1 else 2 * PAIR if tokens <= FEW else PAIR
        for part in range(0, width, most):
            vectors = min(most, width - part) // LANES
            for tile in range(tiles):
                m, end = tokens * tile // tiles, tokens * (tile + 1) // tiles
                _some(
                    packed, end - m, vectors, weights, at + part, w_at + (part >> 2 * packed),
                    stride, inputs, x, m * x_stride + x_column, x_stride,
                    y, m * y_stride + panel + part, y_stride,
                )  # fmt: skip
        at = w_at + stride * inputs
    return at


@plain
def _dotted(weights, at, outputs, inputs, tokens, cut_TW, y):  # type: ignore[no-untyped-def]
    """:func:`linear` by dot products, of tokens that are cut into bytes."""
    x_stride, y_stride, fours = cut_TW.shape[1], y.shape[1], (inputs + 3) // 4
    tiles = (tokens + DOT_TILE - 1) // DOT_TILE
    most = _AT_ONCE[(tokens + tiles - 1) // tiles - 1] * LANES
    for panel in range(0, outputs, DOT_PANEL):
        width = min(DOT_PANEL, outputs - panel)
        w_at = at + 3 * width
        for part in range(0, width, most):
            vectors = min(most, width - part) // LANES
            for tile in range(tiles):
                m, end = tokens * tile // tiles, tokens * (tile + 1) // tiles
                _some(
                    1, end - m, vectors, weights, at + part, w_at + part, width, fours,
                    cut_TW, m * x_stride, x_stride, y, m * y_stride + panel + part, y_stride,
                )  # fmt: skip
        at = w_at + width * fours
    return at


@plain
def _cut(x_I, cut_W):  # type: ignore[no-untyped-def]
    """A token's inputs as whole numbers of 23 bits, by bytes, and what one is worth."""
    bits_I, top, whole = x_I.view(np.int32), np.int32(0), 4 * ((x_I.size + 3) // 4)
    for i in range(x_I.size):  # floats without their sign are ordered as their bits are
        top = max(top, bits_I[i] & np.int32(0x7FFFFFFF))
    most = np.int32(top).view(np.float32)
    factor = np.float32(0) if most < LEAST else MOST / most
    cut_X = cut_W.view(np.int8)
    low_I, middle_I, high_I = cut_X[:whole], cut_X[whole : 2 * whole], cut_X[2 * whole :]
    # Beyond 2**23 a float has no fraction: its last 23 bits are the whole number, and HALF.
    beyond = np.float32(2**23 + HALF)
    for i in range(x_I.size):
        bits = np.float32(x_I[i] * factor + beyond).view(np.int32)
        low_I[i], middle_I[i], high_I[i] = bits, bits >> 8, (bits >> 16) & 127
    cut_W[3 * whole // 4] = most / MOST
