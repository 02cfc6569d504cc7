"""One step of the network in one compiled call: how its arrays are laid out.

Equal to ``NEDS.step`` for one stream that shows spikes and asks for behaviours. Both read every
weight once per bin; what this saves is everything around that:

* Weights lie in one array in the order they are read, those of the trunk in a byte each where they
  fit, as a bundle's do; weights of units that were silent are not read at all.
* Standardisation, and what stands in for missing units, are folded into the read-in at load.

When the loop is behind the clock, a few bins go through one call, and so do those of several probes
whose networks share a trunk: a weight of it is then read once for all of them.

Shape suffixes: as in :mod:`rt_neds.stream.fused_kernel`.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rt_neds.model.attention import ROTARY_BASE
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS, SCHEMES
from rt_neds.model.readout import Scale
from rt_neds.model.rounding import is_rounded, to_bytes
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.fused_kernel import LANES, LIVE, PAIR, PANEL, STREAM, fused_step, place
from rt_neds.stream.live_tokens import LiveTokens

F4 = NDArray[np.float32]
F8 = NDArray[np.float64]
HUGE = 1 << 21
LINE = 16
"""Numbers of a cache line."""


def _zeros(*shape: int) -> F4:
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


def _aligned(array: NDArray) -> F4:
    """The same numbers, on cache lines."""
    copied = _zeros(*array.shape)
    copied[...] = array
    return copied


def _up(n: int, to: int = PAIR) -> int:
    return -(-n // to) * to


def _f8(tensor: Tensor) -> F8:
    return tensor.detach().cpu().numpy().astype(np.float64)


def _map(linear: nn.Linear) -> tuple[F8, F8]:
    return _f8(linear.weight), _f8(linear.bias)


def _rows(weight_EI: F8, bias_E: F8) -> F8:
    """Bias, then the weights of each input."""
    rows_IE = np.zeros((1 + weight_EI.shape[1], _up(len(bias_E))))
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
        scale_E = np.concatenate([_rows(of[:, None].numpy(), bias_E)[1] for _, of, bias_E in split])
        maps = tuple((whole_EI.numpy(), bias_E) for whole_EI, _, bias_E in split)
    rows_IE = np.concatenate([_rows(*one) for one in maps], axis=1).astype(np.float32)
    for panel in range(0, rows_IE.shape[1], PANEL):
        rows_IP = np.ascontiguousarray(rows_IE[:, panel : panel + PANEL])
        yield rows_IP[0]
        if packed:
            yield scale_E[panel : panel + PANEL].astype(np.float32)
            yield rows_IP[1:].astype(np.int8).view(np.float32).ravel()
        else:
            yield rows_IP[1:].ravel()


def _norm(norm: nn.LayerNorm) -> F4:
    scale_D, shift_D = norm.weight.detach().cpu().numpy(), norm.bias.detach().cpu().numpy()
    padding = (0, _up(len(scale_D)) - len(scale_D))
    return np.concatenate([np.pad(scale_D, padding), np.pad(shift_D, padding)])


def _read_in(parts: Any) -> tuple[F8, F8]:
    """What is made of the features: the token to be, and below it what a linear decoder says."""
    weight_EI, bias_E = _map(parts.spikes_in.linear)
    if parts.linear is None:
        return weight_EI, bias_E
    weights = (weight_EI, _f8(parts.linear.weight_UF))
    return np.concatenate(weights), np.concatenate([bias_E, _f8(parts.linear.bias_U)])


def _shared(model: Any) -> tuple[F8, F8]:
    """What all sessions make of that."""
    weight_EI, bias_E = _map(model.spikes_shared)
    return weight_EI, bias_E if model.linear_in is None else bias_E + _map(model.linear_in)[1]


def _of_said(model: Any) -> tuple[F8, F8]:
    """And of what a linear decoder says, if there is one; its bias is in the map before."""
    nothing_D = np.zeros(model.config.dim)
    return _f8(model.linear_in.weight) if model.linear_in else nothing_D[:, None][:, :0], nothing_D


def _head(parts: Any, name: str, said: int) -> F8:
    """A row for each number read out: of token and a constant, of what is said and a constant."""
    weight_OD, bias_O = _map(parts.behaviour_out[name].linear)
    of_said_OU = np.zeros((len(bias_O), said + 1))
    if parts.linear is not None:
        weight_OU, more_O = _map(parts.linear.out[name])
        of_said_OU[:, parts.linear.where[name]], of_said_OU[:, -1] = weight_OU, more_O
    return np.concatenate([np.column_stack([weight_OD, bias_O]), of_said_OU], axis=1)


def _of_root_sums(
    read_in: Any, weight_EI: F8, bias_E: F8, missing_N: NDArray[np.bool_] | None
) -> tuple[F8, F8]:
    """A map of standardised features as one of root sums; what is constant goes into the bias."""
    mean_KN, sd_KN, stand_in_KN = map(_f8, (read_in.mean_KN, read_in.sd_KN, read_in.missing_KN))
    missing_KN = np.broadcast_to(False if missing_N is None else missing_N, mean_KN.shape)
    constant_KN = np.where(missing_KN, stand_in_KN, -mean_KN / sd_KN)
    scale_KN = np.where(missing_KN, 0, 1 / sd_KN)
    return weight_EI * scale_KN.ravel(), bias_E + weight_EI @ constant_KN.ravel()


def _instead(parts: Any, missing_N: NDArray[np.bool_] | None) -> F8:
    """What each unit's stand-in adds to the read-in over its silence; zero for missing ones."""
    read_in = parts.spikes_in
    mean_KN, sd_KN, stand_in_KN = map(_f8, (read_in.mean_KN, read_in.sd_KN, read_in.missing_KN))
    weight_EKN = _read_in(parts)[0].reshape(-1, *mean_KN.shape)
    instead_NE = np.einsum("ekn,kn->ne", weight_EKN, stand_in_KN + mean_KN / sd_KN)
    if missing_N is not None:
        instead_NE[missing_N] = 0.0
    return instead_NE


def _blocks(model: Any, packed: bool) -> Iterator[F4]:
    """Weights that all sessions share, in the order they are read."""
    yield from _panels(packed, _shared(model))
    yield from _panels(False, _of_said(model))
    for layer in model.layers:
        yield _norm(layer.norm1)
        weight_EI, bias_E = _map(layer.attention.qkv)
        yield from _panels(packed, *zip(np.split(weight_EI, 3), np.split(bias_E, 3), strict=True))
        yield from _panels(packed, _map(layer.attention.out))
        yield _norm(layer.norm2)
        yield from _panels(packed, _map(layer.widen))
        yield from _panels(packed, _map(layer.narrow))
    if model.memory is not None:
        yield _norm(model.memory.norm)
        yield from _panels(packed, _map(model.memory.gate), _map(model.memory.value))
        yield from _panels(packed, _map(model.memory.out))
    yield _norm(model.norm)


def _dark(model: Any, session: str) -> F8:
    """Token of a bin that shows nothing, in a session that is decoded."""
    session_D = _f8(model.session_XD)[model.session_ids.index(session)]
    return _f8(model.hidden_D) + session_D + _f8(model.scheme_XD)[SCHEMES.index("decoding")]


def _padded(vector_D: F8) -> F4:
    return _aligned(np.pad(vector_D, (0, _up(len(vector_D)) - len(vector_D))))


def _past_shapes(config: ModelConfig, units: int) -> dict[str, tuple[int, ...]]:
    """What a stream's past is: arrays that a step finds and leaves changed."""
    rows, width = config.context + CHUNK, config.dim // config.heads
    return {  # a whole chunk sees so many rows, and the sink
        "keys_LHX": (config.layers, config.heads, _up(rows, LANES) * (1 + width)),
        "values_LHX": (config.layers, config.heads, _up(width, LANES) * (1 + rows)),
        "memory_D": (_up(config.dim),),
        "dark_1": (2,),  # words of one integer
        "counts_CN": (max(config.history), units),
        "sums_KN": (len(config.history), units),
    }


def past_words(config: ModelConfig, units: int) -> int:
    """Words of 4 bytes that the past of a stream takes."""
    return sum(_up(math.prod(shape), LINE) for shape in _past_shapes(config, units).values())


def _past_in(room: F4, config: ModelConfig, units: int) -> dict[str, NDArray]:
    """The arrays, each on a cache line, one after the other."""
    arrays: dict[str, NDArray] = {}
    at = 0
    for name, shape in _past_shapes(config, units).items():
        size = math.prod(shape)
        arrays[name] = room[at : at + size].reshape(shape)
        at += _up(size, LINE)
    arrays["dark_1"] = arrays["dark_1"].view(np.int64)
    return arrays


class _Trunk:
    """Weights that all sessions of a network share, and where the work on them is done."""

    def __init__(self, model: Any, said: int) -> None:
        c, T = model.config, CHUNK
        D, rows, width = _up(c.dim), c.context + CHUNK, c.dim // c.heads
        packed = is_rounded(model)
        blocks = list(_blocks(model, packed))
        self.weights = _zeros(sum(block.size for block in blocks))
        np.concatenate(blocks, out=self.weights, casting="same_kind")
        self.config = c, packed, said
        self.streams_P = np.zeros(T, STREAM)  # each has a bin at least
        self.fields_PX = self.streams_P.view(np.int64).reshape(T, -1)
        self.arguments = (
            self.weights,
            int(packed),
            c.layers,
            c.heads,
            ROTARY_BASE ** -(np.arange(0, width, 2, dtype=np.float64) / width),
            np.float32(math.log2(math.e) / math.sqrt(width)),  # softmax is of powers of two
            np.array(c.history, np.int64),
            c.context,
            np.float32(model.norm.eps),
            c.dim,
            c.widen * c.dim,
            np.float32(model.memory.longest if model.memory is not None else 0),
            np.zeros(T, bool),  # observed_T
            _zeros(T, 2, width // 2),  # turn_T2F
            _zeros(4, T, _up(c.dim + said) + PANEL),  # work_4TD
            _zeros(T, said + 1),  # said_TU
            _zeros(T, 3 * D),  # qkv_T3D
            _zeros(T, _up(c.widen * c.dim)),  # wide_TG
            _zeros(1, _up(rows, LANES)),  # scores_1R
        )

    def same_as(self, other: _Trunk) -> bool:
        """Whether nothing would change if the other took its place."""
        return self.config == other.config and np.array_equal(
            self.weights.view(np.uint32), other.weights.view(np.uint32)
        )


class FusedStep:
    """The network, one bin at a time, for one stream of spikes, and of behaviours observed live.

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
    live : mapping of str to Scale, optional
        Behaviours that may be shown, in the order of their values.

    Attributes
    ----------
    nbytes : int
        Bytes of weights, keys and values: what a step reads when no boxcar is empty.
    """

    def __init__(
        self,
        model: NEDS,
        session: str,
        wanted: Sequence[str],
        missing_N: NDArray[np.bool_] | None = None,
        *,
        live: Mapping[str, Scale] | None = None,
    ) -> None:
        model.start(session)  # refuses a model that cannot be streamed
        if not wanted or not set(wanted) <= set(model.modalities[1:]):
            raise ValueError(f"asked for {list(wanted)}; expected one or more behaviours")
        c, T = model.config, CHUNK
        parts: Any = model.sessions[model.session_ids.index(session)]
        said = 0 if parts.linear is None else len(parts.linear.bias_U)
        self._trunk = _Trunk(model, said)
        self._live = LiveTokens(model, session, live or {})
        dark_D = _dark(model, session)
        read_in = _of_root_sums(parts.spikes_in, *_read_in(parts), missing_N)
        heads_OI = np.concatenate([_head(parts, name, said) for name in wanted]).astype(np.float32)
        inputs = len(c.history) * parts.units + 4
        rows, width = c.context + T, c.dim // c.heads  # what a whole chunk sees, and the sink
        R, V = _up(rows, LANES), _up(width, LANES)
        self._arrays: dict[str, NDArray] = {
            "counts_TN": np.zeros((T, parts.units), np.float32),
            "shown_T": np.zeros(T, np.int64),
            "live_TD": _zeros(T, _up(c.dim)),
            "found_I": np.zeros(inputs, np.int64),
            "root_I": _zeros(inputs),
            "read_in": _aligned(_rows(*read_in)),
            "spikes_D": _padded(_f8(model.modality_MD)[0] + dark_D),
            "dark_D": _padded(dark_D),
            "heads_OI": heads_OI,
            "token_TD": _zeros(T, c.dim),
            "raw_TO": np.zeros((T, len(heads_OI)), np.float32),
        }
        self._stream_1 = np.zeros(1, STREAM)
        self._point_to(self._arrays)
        for name, size in (("units", parts.units), ("inputs", inputs), ("outputs", len(heads_OI))):
            self._stream_1[name] = size
        # What a step touches, ready to hand: looking it up costs more than it does.
        self._fields = self._stream_1.view(np.int64)
        self._counts_TN, self._shown_T = self._arrays["counts_TN"], self._arrays["shown_T"]
        self._raw_TO, self._bin, self._bins = self._arrays["raw_TO"], 0, 0
        self._config = c
        self.lie_in(_zeros(past_words(c, parts.units)))
        self._set_sinks(model, rows, R, V, width)
        self.nbytes = sum(
            self._arrays[name].nbytes for name in ("read_in", "keys_LHX", "values_LHX")
        )
        self.nbytes += self._trunk.weights.nbytes
        weight_DD, bias_D = _map(model.next)
        weight_ND, bias_N = _map(parts.spikes_out.linear)
        # Weights of a silent unit are not read: to take it for missing is to change the bias.
        self._bias_E = self._arrays["read_in"][0, : c.dim + said]
        self._instead_NE = _instead(parts, missing_N)
        self._believed_E = self._bias_E.astype(np.float64)
        self._next_DN = np.ascontiguousarray((weight_ND @ weight_DD).T, np.float32)
        self._next_N = (weight_ND @ bias_D + bias_N).astype(np.float32)
        self.reset()
        self.step(self._arrays["counts_TN"][0], False)  # compiles
        self.reset()

    def _set_sinks(self, model: Any, rows: int, R: int, V: int, width: int) -> None:
        """What keys and values of nobody but the sink are."""
        sinks = np.array([_f8(layer.attention.sink_value_HF) for layer in model.layers])
        self._sink_LHX = np.zeros_like(self._arrays["values_LHX"])
        for f in range(width):
            self._sink_LHX[:, :, place(f, rows - 1, V, rows)] = sinks[:, :, f]
        self._unseen_X = [place(r, -1, R, width) for r in range(R) if r != rows - 1]

    def reset(self, first_bin: int = 0) -> None:
        """Forget the past; the next bin has this number."""
        self._bin, self._bins = int(first_bin), 0
        for name in ("counts_CN", "sums_KN", "memory_D", "dark_1", "keys_LHX"):
            self._arrays[name][:] = 0
        self._arrays["keys_LHX"][:, :, self._unseen_X] = -np.inf
        self._arrays["values_LHX"][:] = self._sink_LHX

    def lie_in(self, room: F4) -> None:
        """Have the past lie in this memory, on a cache line, with what is there already.

        Parameters
        ----------
        room : ndarray of float32
            At least :func:`past_words` of them.
        """
        past = _past_in(room, self._config, self._counts_TN.shape[1])
        self._point_to(past)
        self._arrays |= past

    def go_on_at(self, bin_: int) -> None:
        """The past is that of a stream whose next bin has this number."""
        self._bin, self._bins = int(bin_), 0

    def _point_to(self, arrays: Mapping[str, NDArray]) -> None:
        for name, array in arrays.items():
            assert array.flags.c_contiguous, name
            self._stream_1[name] = array.ctypes.data

    def step(self, counts_N: F4, observed: bool) -> F4:
        """Decode the next bin; see :meth:`steps`."""
        return self.steps((counts_N,), (observed,))[0]

    def steps(
        self, counts_TN: Sequence[F4], observed_T: Sequence[bool], live_TM: Sequence[F4] = ()
    ) -> F4:
        """Decode the next bins, at most ``CHUNK``, with the values they would have one by one.

        Parameters
        ----------
        counts_TN : sequence of ndarray of float32, shape (units,)
            Spikes of each unit in each bin: whole numbers; ignored if the bin is not observed.
        observed_T : sequence of bool
            Whether the counts are what happened, rather than a hole in the recording.
        live_TM : sequence of ndarray of float32, shape (live behaviours,)
            What is observed of them in each bin, in physical units or class numbers, NaN where
            nothing is; empty if they are hidden.

        Returns
        -------
        ndarray of float32, shape (bins, numbers of all wanted outputs)
            The ``outputs`` numbers of each behaviour, one after the other; valid until the next
            call.
        """
        self._take(counts_TN, observed_T, live_TM)
        fused_step(self._stream_1, *self._trunk.arguments)
        return self._raw_TO[: self._bins]

    def _take(
        self, counts_TN: Sequence[F4], observed_T: Sequence[bool], live_TM: Sequence[F4]
    ) -> None:
        bins, kept_TN = len(counts_TN), self._counts_TN
        for t in range(bins):  # whatever came, the kernel meets one type of array
            if len(counts_TN[t]) != kept_TN.shape[1]:
                raise ValueError(f"{len(counts_TN[t])} counts for {kept_TN.shape[1]} units")
            kept_TN[t] = counts_TN[t]
            self._shown_T[t] = observed_T[t]
        for t, live_M in enumerate(live_TM):
            if self._live.write(live_M, self._arrays["live_TD"][t]):
                self._shown_T[t] |= LIVE
        self._bin += self._bins
        self._bins = bins
        self._fields[0], self._fields[1] = bins, self._bin

    def share(self, other: FusedStep) -> bool:
        """Use the other's trunk if it is the same, so that both can go through it in one call."""
        if self._trunk is not other._trunk and self._trunk.same_as(other._trunk):
            self._trunk = other._trunk
        return self._trunk is other._trunk

    @staticmethod
    def together(
        steps: Sequence[FusedStep],
        counts_PTN: Sequence[Sequence[F4]],
        observed_PT: Sequence[Sequence[bool]],
        live_PTM: Sequence[Sequence[F4]],
    ) -> list[F4]:
        """As :meth:`steps` of each of several streams that share a trunk, to the same bits.

        They have at most ``CHUNK`` bins, all together: each weight of the trunk is read once for
        all of them.
        """
        for step, counts_TN, observed_T, live_TM in zip(
            steps, counts_PTN, observed_PT, live_PTM, strict=True
        ):
            assert step._trunk is steps[0]._trunk, "streams of different trunks"
            step._take(counts_TN, observed_T, live_TM)
        assert sum(step._bins for step in steps) <= CHUNK, "more bins than one call takes"
        trunk = steps[0]._trunk
        for p, step in enumerate(steps):
            trunk.fields_PX[p] = step._fields
        fused_step(trunk.streams_P[: len(steps)], *trunk.arguments)
        return [step._raw_TO[: step._bins] for step in steps]

    def miss(self, silent_N: NDArray[np.bool_] | None) -> None:
        """From the next bin on take these units, too, for missing, until others are named.

        None of them may have fired within the read-in's history.
        """
        instead_NE = self._instead_NE[:0] if silent_N is None else self._instead_NE[silent_N]
        self._bias_E[:] = self._believed_E + instead_NE.sum(axis=0)

    def next_TN(self) -> F4:
        """Log-rates of the spikes of the bin after each of those last decoded.

        Computed when it is asked for: it can wait until the bins have gone out.

        Returns
        -------
        ndarray of float32, shape (bins, units)
        """
        return self._arrays["token_TD"][: self._bins] @ self._next_DN + self._next_N
