"""How weights, and what a stream remembers, lie in memory for the fused step.

Weights of the trunk lie in one array in the order they are read; what is constant is folded into
the read-in. What one step leaves to the next lies in one room, which may outlive the process.

Shape suffixes: as in :mod:`rt_neds.stream.fused_kernel`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import SCHEMES
from rt_neds.model.rounding import to_bytes
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.fused_products import DOT_PANEL, DOTS, HALF, LANES, PAIR, PANEL

F4 = NDArray[np.float32]
F8 = NDArray[np.float64]
HUGE = 1 << 21
LINE = 16
"""Numbers of a cache line."""


def zeros(*shape: int) -> F4:
    """Zeros that begin on a cache line, so that no vector of a panel lies on two.

    On pages of 2 MB, where there are such: a step walks through thousands of small ones.
    """
    numbers = math.prod(shape)
    if 4 * numbers >= HUGE // 2 and hasattr(mmap, "MADV_HUGEPAGE"):
        # Private, which is not Python's default: kernels grant shared memory none.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        room = mmap.mmap(-1, (1 + -(-4 * numbers // HUGE)) * HUGE, flags=private)
        with contextlib.suppress(OSError):  # a kernel without them
            room.madvise(mmap.MADV_HUGEPAGE)
        raw, line = np.frombuffer(room, np.float32), HUGE
    else:
        raw, line = np.zeros(numbers + LINE, np.float32), 4 * LINE
    start = -raw.ctypes.data % line // raw.itemsize
    return raw[start : start + numbers].reshape(shape)


def aligned(array: NDArray) -> F4:
    """The same numbers, on cache lines."""
    copied = zeros(*array.shape)
    copied[...] = array
    return copied


def round_up(n: int, to: int = PAIR) -> int:
    return -(-n // to) * to


def f8(tensor: Tensor) -> F8:
    return tensor.detach().cpu().numpy().astype(np.float64)


def map_of(linear: nn.Linear) -> tuple[F8, F8]:
    return f8(linear.weight), f8(linear.bias)


def rows_of(weight_EI: F8, bias_E: F8) -> F8:
    """Bias, then the weights of each input."""
    rows_IE = np.zeros((1 + weight_EI.shape[1], round_up(len(bias_E))))
    rows_IE[0, : len(bias_E)] = bias_E
    rows_IE[1:, : len(bias_E)] = weight_EI.T
    return rows_IE


def _panels(packed: bool, *maps: tuple[F8, F8]) -> Iterator[F4]:
    """The same for one panel of outputs after the other; maps of the same inputs, side by side.

    Packed weights are multiples of a scale for each output, which lies between.
    """
    scale_E = np.zeros(0)
    if packed:
        split = [(*to_bytes(torch.from_numpy(weight_EI)), bias_E) for weight_EI, bias_E in maps]
        scale_E = np.concatenate(
            [rows_of(of[:, None].numpy(), bias_E)[1] for _, of, bias_E in split]
        )
        maps = tuple((whole_EI.numpy(), bias_E) for whole_EI, _, bias_E in split)
    rows_IE = np.concatenate([rows_of(*one) for one in maps], axis=1).astype(np.float32)
    most = DOT_PANEL if packed and DOTS else PANEL
    for panel in range(0, rows_IE.shape[1], most):
        rows_IP = np.ascontiguousarray(rows_IE[:, panel : panel + most])
        yield rows_IP[0]
        if packed:
            yield scale_E[panel : panel + most].astype(np.float32)
            yield from _bytes(rows_IP[1:].astype(np.int8))
        else:
            yield rows_IP[1:].ravel()


def _bytes(whole_IP: NDArray[np.int8]) -> Iterator[F4]:
    """One-byte weights of a panel, as words, in the order they are multiplied in."""
    if DOTS:
        fours = -(-len(whole_IP) // 4)
        padded_IP = np.pad(whole_IP, ((0, 4 * fours - len(whole_IP)), (0, 0)))
        yield (-(HALF >> 16) * padded_IP.sum(axis=0, dtype=np.int32)).view(np.float32)
        whole_IP = np.ascontiguousarray(padded_IP.reshape(fours, 4, -1).swapaxes(1, 2))
    yield whole_IP.view(np.float32).ravel()


def _norm(norm: nn.LayerNorm) -> F4:
    scale_D, shift_D = norm.weight.detach().cpu().numpy(), norm.bias.detach().cpu().numpy()
    padding = (0, round_up(len(scale_D)) - len(scale_D))
    return np.concatenate([np.pad(scale_D, padding), np.pad(shift_D, padding)])


def read_in_of(parts: Any) -> tuple[F8, F8]:
    """What is made of the features: the token to be, and below it what a linear decoder says."""
    weight_EI, bias_E = map_of(parts.spikes_in.linear)
    if parts.linear is None:
        return weight_EI, bias_E
    weights = (weight_EI, f8(parts.linear.weight_UF))
    return np.concatenate(weights), np.concatenate([bias_E, f8(parts.linear.bias_U)])


def _shared(model: Any) -> tuple[F8, F8]:
    """What all sessions make of that."""
    weight_EI, bias_E = map_of(model.spikes_shared)
    return weight_EI, bias_E if model.linear_in is None else bias_E + map_of(model.linear_in)[1]


def _of_said(model: Any) -> tuple[F8, F8]:
    """And of what a linear decoder says, if there is one; its bias is in the map before."""
    nothing_D = np.zeros(model.config.dim)
    return f8(model.linear_in.weight) if model.linear_in else nothing_D[:, None][:, :0], nothing_D


def head_of(parts: Any, name: str, said: int) -> F8:
    """A row for each number read out: of token and a constant, of what is said and a constant."""
    weight_OD, bias_O = map_of(parts.behaviour_out[name].linear)
    of_said_OU = np.zeros((len(bias_O), said + 1))
    if parts.linear is not None:
        weight_OU, more_O = map_of(parts.linear.out[name])
        of_said_OU[:, parts.linear.where[name]], of_said_OU[:, -1] = weight_OU, more_O
    return np.concatenate([np.column_stack([weight_OD, bias_O]), of_said_OU], axis=1)


def read_in_arrays(
    parts: Any, missing_N: NDArray[np.bool_] | None, packed: bool
) -> dict[str, NDArray]:
    """A session's read-in, of root sums: rows of weights, their factors, and a bias.

    Standardisation is in the factors, and what is constant in the bias; so is, if weights are in
    bytes, the scale of each row.
    """
    read_in = parts.spikes_in
    mean_KN, sd_KN, stand_in_KN = map(f8, (read_in.mean_KN, read_in.sd_KN, read_in.missing_KN))
    missing_KN = np.broadcast_to(False if missing_N is None else missing_N, mean_KN.shape)
    constant_KN = np.where(missing_KN, stand_in_KN, -mean_KN / sd_KN)
    weight_EI, bias_E = read_in_of(parts)
    dim, (E, inputs) = len(read_in.linear.bias), weight_EI.shape
    D, U = round_up(dim), round_up(E - dim, LANES)
    factor_I, rows_IW = np.where(missing_KN, 0, 1 / sd_KN).ravel(), np.zeros((inputs, D + U))
    rows_IW[:, :dim], rows_IW[:, D : D + E - dim] = weight_EI[:dim].T, weight_EI[dim:].T
    rows_IX: NDArray = rows_IW.astype(np.float32)
    if packed:
        whole_ID, scale_I = map(Tensor.numpy, to_bytes(torch.from_numpy(rows_IW[:, :D])))
        factor_I, rows_IW = factor_I * scale_I, rows_IW / scale_I[:, None]
        of_said_IU = rows_IW[:, D:].astype(np.float32)
        rows_IX = np.concatenate([whole_ID.view(np.float32), of_said_IU], axis=1)
    bias = spread(bias_E + weight_EI @ constant_KN.ravel(), dim)
    return {
        "factor_I": np.pad(factor_I, (0, 3)).astype(np.float32),
        "bias_E": aligned(bias),
        "read_in": aligned(rows_IX),
    }


def spread(numbers_E: F8, dim: int) -> F8:
    """What a read-in makes, as it lies in the step: the token to be, and after it what is said."""
    D, U = round_up(dim), round_up(numbers_E.shape[-1] - dim, LANES)
    spread_E = np.zeros((*numbers_E.shape[:-1], D + U))
    spread_E[..., :dim] = numbers_E[..., :dim]
    spread_E[..., D : D + numbers_E.shape[-1] - dim] = numbers_E[..., dim:]
    return spread_E


def instead_of(parts: Any, missing_N: NDArray[np.bool_] | None) -> F8:
    """What each unit's stand-in adds to the read-in over its silence; zero for missing ones."""
    read_in = parts.spikes_in
    mean_KN, sd_KN, stand_in_KN = map(f8, (read_in.mean_KN, read_in.sd_KN, read_in.missing_KN))
    weight_EKN = read_in_of(parts)[0].reshape(-1, *mean_KN.shape)
    instead_NE = np.einsum("ekn,kn->ne", weight_EKN, stand_in_KN + mean_KN / sd_KN)
    if missing_N is not None:
        instead_NE[missing_N] = 0.0
    return spread(instead_NE, len(read_in.linear.bias))


def trunk_blocks(model: Any, packed: bool) -> Iterator[F4]:
    """Weights that all sessions share, in the order they are read."""
    yield from _panels(packed, _shared(model))
    yield from _panels(False, _of_said(model))
    for layer in model.layers:
        yield _norm(layer.norm1)
        weight_EI, bias_E = map_of(layer.attention.qkv)
        yield from _panels(packed, *zip(np.split(weight_EI, 3), np.split(bias_E, 3), strict=True))
        yield from _panels(packed, map_of(layer.attention.out))
        yield _norm(layer.norm2)
        yield from _panels(packed, map_of(layer.widen))
        yield from _panels(packed, map_of(layer.narrow))
    if model.memory is not None:
        yield _norm(model.memory.norm)
        yield from _panels(packed, map_of(model.memory.gate), map_of(model.memory.value))
        yield from _panels(packed, map_of(model.memory.out))
    yield _norm(model.norm)


def dark_of(model: Any, session: str) -> F8:
    """Token of a bin that shows nothing, in a session that is decoded."""
    session_D = f8(model.session_XD)[model.session_ids.index(session)]
    return f8(model.hidden_D) + session_D + f8(model.scheme_XD)[SCHEMES.index("decoding")]


def padded(vector_D: F8) -> F4:
    return aligned(np.pad(vector_D, (0, round_up(len(vector_D)) - len(vector_D))))


def _past_shapes(config: ModelConfig, units: int) -> dict[str, tuple[int, ...]]:
    """What a stream's past is: arrays that a step finds and leaves changed."""
    rows, width = config.context + CHUNK, config.dim // config.heads
    return {  # a whole chunk sees so many rows, and the sink
        "keys_LHX": (config.layers, config.heads, round_up(rows, LANES) * (1 + width)),
        "values_LHX": (config.layers, config.heads, round_up(width, LANES) * (1 + rows)),
        "memory_D": (round_up(config.dim),),
        "dark_1": (2,),  # words of one integer
        "counts_CN": (max(config.history), units),
        "sums_KN": (len(config.history), units),
    }


def past_words(config: ModelConfig, units: int) -> int:
    """Words of 4 bytes that the past of a stream takes."""
    return sum(round_up(math.prod(shape), LINE) for shape in _past_shapes(config, units).values())


def past_in(room: F4, config: ModelConfig, units: int) -> dict[str, NDArray]:
    """The arrays, each on a cache line, one after the other."""
    arrays: dict[str, NDArray] = {}
    at = 0
    for name, shape in _past_shapes(config, units).items():
        size = math.prod(shape)
        arrays[name] = room[at : at + size].reshape(shape)
        at += round_up(size, LINE)
    arrays["dark_1"] = arrays["dark_1"].view(np.int64)
    return arrays
