"""One step of the network in one compiled call: how its arrays are laid out.

Equal to ``NEDS.step`` for one stream that shows spikes and asks for behaviours. Both read every
weight once per bin; what this saves is everything around that:

* Spikes are the only keys, so only their token needs keys and values; the last layer needs no more
  of it than those, and a bin that is not observed needs nothing of it at all.
* The tokens of behaviours are hidden, hence constant: their first queries are computed at load.
* Scales, shifts and means (of the norms, of the standardisation, of missing units, of the softmax)
  are folded into the linear maps at load.

Shape suffixes: as in :mod:`rt_neds.stream.fused_kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from rt_neds.model.attention import ROTARY_BASE
from rt_neds.model.neds import NEDS, SCHEMES, SPIKES
from rt_neds.stream.fused_kernel import PANEL, fused_step

F4 = NDArray[np.float32]
F8 = NDArray[np.float64]


def _zeros(*shape: int) -> F4:
    """Zeros that begin on a cache line, so that no vector of a panel lies on two."""
    raw = np.zeros(math.prod(shape) + 16, np.float32)
    start = -raw.ctypes.data % 64 // raw.itemsize
    return raw[start : start + math.prod(shape)].reshape(shape)


def _up(n: int) -> int:
    return -(-n // PANEL) * PANEL


def _f8(tensor: Tensor) -> F8:
    return tensor.detach().cpu().numpy().astype(np.float64)


def _map(linear: nn.Linear, norm: nn.LayerNorm | None = None) -> tuple[F8, F8]:
    """Weights and biases of a linear map, with scale and shift of the norm before it folded in."""
    weight_EI, bias_E = _f8(linear.weight), _f8(linear.bias)
    if norm is None:
        return weight_EI, bias_E
    return weight_EI * _f8(norm.weight), bias_E + weight_EI @ _f8(norm.bias)


def _rows(weight_EI: F8, bias_E: F8) -> F8:
    """Bias, then the weights of each input."""
    rows_IE = np.zeros((1 + weight_EI.shape[1], _up(len(bias_E))))
    rows_IE[0, : len(bias_E)] = bias_E
    rows_IE[1:, : len(bias_E)] = weight_EI.T
    return rows_IE


def _panels(weight_EI: F8, bias_E: F8) -> F8:
    """The same for one panel of outputs after the other."""
    rows_IE = _rows(weight_EI, bias_E)
    return rows_IE.reshape(len(rows_IE), -1, PANEL).swapaxes(0, 1).ravel()


def _of_root_sums(
    read_in: Any, weight_EI: F8, bias_E: F8, missing_N: NDArray[np.bool_] | None
) -> tuple[F8, F8]:
    """A map of standardised features as one of root sums; what is constant goes into the bias."""
    mean_KN, sd_KN, stand_in_KN = map(_f8, (read_in.mean_KN, read_in.sd_KN, read_in.missing_KN))
    missing_KN = np.broadcast_to(False if missing_N is None else missing_N, mean_KN.shape)
    constant_KN = np.where(missing_KN, stand_in_KN, -mean_KN / sd_KN)
    scale_KN = np.where(missing_KN, 0, 1 / sd_KN)
    return weight_EI * scale_KN.ravel(), bias_E + weight_EI @ constant_KN.ravel()


def _shortcut(parts: Any, wanted: Sequence[str], sizes: Sequence[int], missing_N: Any) -> F4:
    """Constants, then the weights of each root sum, for each number read out."""
    features = parts.spikes_in.linear.in_features
    weights = [
        _f8(parts.shortcut[name].weight) if name in parts.shortcut else np.zeros((size, features))
        for name, size in zip(wanted, sizes, strict=True)
    ]
    weight_OI, constant_O = _of_root_sums(
        parts.spikes_in, np.concatenate(weights), np.zeros(sum(sizes)), missing_N
    )
    return np.ascontiguousarray(np.concatenate([constant_O[None], weight_OI.T]), np.float32)


def _query_map(layer: Any) -> tuple[F8, F8]:
    """Queries scaled such that softmax is of powers of two."""
    (dim, _), heads = layer.attention.out.weight.shape, layer.attention.heads
    weight_EI, bias_E = _map(layer.attention.qkv, layer.norm1)
    scale = math.log2(math.e) / math.sqrt(dim // heads)
    return weight_EI[:dim] * scale, bias_E[:dim] * scale


def _blocks(model: Any, parts: Any, spikes_D: F4, missing_N: Any) -> Iterator[F8]:
    """All weights in the order they are read; ``spikes_D`` is added to the spike token."""
    dim = model.config.dim
    read_in = _map(parts.spikes_in.linear)
    yield _rows(*_of_root_sums(parts.spikes_in, *read_in, missing_N)).ravel()
    weight_EI, bias_E = _map(model.spikes_shared)
    yield _panels(weight_EI, bias_E + spikes_D)
    for layer in model.layers:
        weight_EI, bias_E = _map(layer.attention.qkv, layer.norm1)
        for part in (slice(dim, 2 * dim), slice(2 * dim, None)):
            yield _panels(weight_EI[part], bias_E[part])
        yield _panels(*_query_map(layer))
        yield _panels(*_map(layer.attention.out))
        yield _panels(*_map(layer.widen, layer.norm2))
        yield _panels(*_map(layer.narrow))


def _constant(model: Any, session: str, wanted: Sequence[str], shape_2MD: tuple[int, ...]) -> F4:
    """What the tokens begin with, and the first queries of the hidden ones, not yet rotated."""
    use, dim = [0, *(model.modalities.index(name) for name in wanted)], model.config.dim
    x_MD = _f8(model.modality_MD)[use] + _f8(model.session_XD)[model.session_ids.index(session)]
    x_MD += _f8(model.scheme_XD)[SCHEMES.index("decoding")]
    x_MD[1:] += _f8(model.hidden_D)
    centred_MD = x_MD - x_MD.mean(axis=1, keepdims=True)
    variance_M1 = (centred_MD**2).mean(axis=1, keepdims=True)
    weight_EI, bias_E = _query_map(model.layers[0])
    constant_2MD = _zeros(*shape_2MD)
    constant_2MD[0, :, :dim] = x_MD
    constant_2MD[1, :, :dim] = centred_MD / np.sqrt(variance_M1 + model.norm.eps) @ weight_EI.T
    constant_2MD[1, :, :dim] += bias_E
    return constant_2MD


class FusedStep:
    """The network, one bin at a time, for one stream that shows only spikes.

    Making one compiles the step, unless an earlier run left it in the cache.

    Parameters
    ----------
    model : NEDS
        Its weights are copied; later changes to it are not seen.
    session : str
        Session id.
    wanted : sequence of str
        Behaviours to decode, at least one, in the order of their outputs.
    missing_N : ndarray of bool, shape (units,), optional
        Units to replace by their learned stand-in. Their counts must be numbers all the same.

    Attributes
    ----------
    raw_O : ndarray of float32, shape (numbers of all wanted outputs,)
        What the last step gave: the ``outputs`` numbers of each behaviour, one after the other.
    nbytes : int
        Bytes of weights, keys and values: what a step reads when no boxcar is empty.
    """

    def __init__(
        self,
        model: NEDS,
        session: str,
        wanted: Sequence[str],
        missing_N: NDArray[np.bool_] | None = None,
    ) -> None:
        model.start(session)  # refuses a model that cannot be streamed
        if not wanted or SPIKES in wanted:
            raise ValueError("the fused step decodes at least one behaviour, and never spikes")
        c = model.config
        parts: Any = model.sessions[model.session_ids.index(session)]
        layers: Any = model.layers
        sinks = [_f8(layer.attention.sink_value_HF) for layer in layers]
        M, D, R, width = 1 + len(wanted), _up(c.dim), _up(c.context + 1), c.dim // c.heads
        constant_2MD = _constant(model, session, wanted, (2, M, D + PANEL))
        blocks = list(_blocks(model, parts, constant_2MD[0, 0, : c.dim], missing_N))
        weights = _zeros(sum(block.size for block in blocks))
        np.concatenate(blocks, out=weights, casting="same_kind")
        maps = [_map(parts.behaviour_out[name].linear, model.norm) for name in wanted]
        outputs = [len(bias_E) for _, bias_E in maps]
        heads_OI = np.concatenate([np.column_stack(pair) for pair in maps]).astype(np.float32)
        self.raw_O = np.zeros(len(heads_OI), np.float32)
        self._counts_N, self._bin = np.zeros(parts.units, np.float32), 0
        self._counts_CN = _zeros(max(c.history), parts.units)
        self._sums_KN = _zeros(len(c.history), parts.units)
        self._keys_LHPFV = _zeros(c.layers, c.heads, R // PANEL, 1 + width, PANEL)
        self._values_LHPRV = _zeros(c.layers, c.heads, _up(width) // PANEL, 2 + c.context, PANEL)
        self._sink_LHPV = _zeros(c.layers, c.heads, _up(width) // PANEL, PANEL)
        self._sink_LHPV.reshape(c.layers, c.heads, -1)[:, :, :width] = sinks
        self.nbytes = weights.nbytes + self._keys_LHPFV.nbytes + self._values_LHPRV.nbytes
        self._arguments = (
            weights,
            constant_2MD,
            _shortcut(parts, wanted, outputs, missing_N),  # shortcut_IO
            heads_OI,
            np.repeat(np.arange(1, M), outputs),  # token_of_O
            ROTARY_BASE ** -(np.arange(0, width, 2, dtype=np.float64) / width),
            np.array(c.history, np.int64),
            np.float32(model.norm.eps),
            c.dim,
            c.widen * c.dim,
            self._counts_CN,
            self._sums_KN,
            self._keys_LHPFV,
            self._values_LHPRV,
            np.zeros(self._sums_KN.size + 4, np.int64),  # found_I
            _zeros(self._sums_KN.size + 4),  # root_I
            _zeros(2, width // 2),  # turn_2F
            _zeros(5, M, D + PANEL),  # work_5MD
            _zeros(1, 2 * D),  # kv_12D
            _zeros(M, _up(c.widen * c.dim)),  # wide_MG
            _zeros(M, R),  # scores_MR
            self.raw_O,
        )
        self.reset()
        self.step(self._counts_N, False)  # compiles
        self.reset()

    def reset(self, first_bin: int = 0) -> None:
        """Forget the past; the next bin has this number."""
        self._bin = first_bin
        self._counts_CN[:], self._sums_KN[:] = 0, 0
        sink = self._values_LHPRV.shape[3] - 2  # its row, after those of the ring
        self._keys_LHPFV[:] = 0
        self._keys_LHPFV[:, :, :, 0] = -np.inf
        self._keys_LHPFV[:, :, sink // PANEL, 0, sink % PANEL] = 0
        self._values_LHPRV[:] = 0
        self._values_LHPRV[:, :, :, 1 + sink] = self._sink_LHPV

    def step(self, counts_N: F4, observed: bool) -> F4:
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
        if len(counts_N) != len(self._counts_N):
            raise ValueError(f"{len(counts_N)} counts for {len(self._counts_N)} units")
        self._counts_N[:] = counts_N  # whatever came, the kernel meets one type of array
        fused_step(self._counts_N, bool(observed), self._bin, *self._arguments)
        self._bin += 1
        return self.raw_O
