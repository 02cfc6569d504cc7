"""One step of the network in one compiled call.

Equal to ``NEDS.step`` for one stream that shows spikes and asks for behaviours. Both read every
weight once per bin; what this saves is everything around that:

* Weights lie in one array in the order they are read, those of the trunk and of a session's read-in
  in a byte each where they fit, as a bundle's do; weights of units that were silent are not read.
* Standardisation, and what stands in for missing units, are folded into the read-in at load.

When the loop is behind the clock, a few bins go through one call, and so do those of several probes
whose networks share a trunk: a weight of it is then read once for all of them.

Shape suffixes: as in :mod:`rt_neds.stream.fused_kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rt_neds.model.attention import ROTARY_BASE
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Scale
from rt_neds.model.rounding import is_rounded
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.fused_arrays import (
    F4,
    LINE,
    dark_of,
    f8,
    head_of,
    instead_of,
    map_of,
    padded,
    past_in,
    past_words,
    read_in_arrays,
    round_up,
    trunk_blocks,
    zeros,
)
from rt_neds.stream.fused_kernel import LIVE, STREAM, TRUNK, fetch, fused_step
from rt_neds.stream.fused_products import LANES, PANEL, cut_words, place
from rt_neds.stream.live_tokens import LiveTokens

READ = ("read_in", "keys_LHX", "values_LHX")
"""What a step reads of a stream's own arrays, whole or nearly so."""


class _Trunk:
    """Weights that all sessions of a network share, and where the work on them is done."""

    def __init__(self, model: Any, said: int, packed: bool) -> None:
        c, T = model.config, CHUNK
        D, rows, width = round_up(c.dim), c.context + CHUNK, c.dim // c.heads
        blocks = list(trunk_blocks(model, packed))
        self.weights = zeros(sum(block.size for block in blocks))
        np.concatenate(blocks, out=self.weights, casting="same_kind")
        self.config = c, packed, said
        self.streams_P = np.zeros(T, STREAM)  # each has a bin at least
        self.streams_at = self.streams_P.ctypes.data
        self.fields_PX = self.streams_P.view(np.int64).reshape(T, -1)
        frequency_F = ROTARY_BASE ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        sizes = {
            "packed": packed,
            "layers": c.layers,
            "heads": c.heads,
            "context": c.context,
            "dim": c.dim,
            "widened": c.widen * c.dim,
            "said": said,
            "boxcars": len(c.history),
            "words": self.weights.size,
            "most": T,
            "D": D,
            "G": round_up(c.widen * c.dim),
            "R": round_up(rows, LANES),
            "X": D + round_up(said, LANES) + PANEL,
            "W": round_up(cut_words(c.widen * c.dim), LINE),
            "query_scale": math.log2(math.e) / math.sqrt(width),  # softmax is of powers of two
            "epsilon": model.norm.eps,
            "longest": model.memory.longest if model.memory is not None else 0,
        }
        self._arrays = {
            "weights": self.weights,
            "history_K": np.array(c.history, np.int64),
            "frequency_F": frequency_F,
            "observed_T": np.zeros(T, np.int8),
            "turn_T2F": zeros(T, 2, width // 2),
            "work_4TX": zeros(4, T, sizes["X"]),
            "said_TU": zeros(T, said + 1),
            "qkv_T3D": zeros(T, 3 * D),
            "wide_TG": zeros(T, sizes["G"]),
            "scores_1R": zeros(1, sizes["R"]),
            "cut_TW": zeros(T, sizes["W"]),
        }
        addresses = {name: array.ctypes.data for name, array in self._arrays.items()}
        self._record_1 = np.zeros(1, TRUNK)
        for name, value in (sizes | addresses).items():
            self._record_1[name] = value
        self.at = self._record_1.ctypes.data

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
        packed = is_rounded(model, session)
        self._trunk = _Trunk(model, said, packed)
        self._live = LiveTokens(model, session, live or {})
        dark_D = dark_of(model, session)
        heads_OI = np.concatenate([head_of(parts, name, said) for name in wanted]).astype(
            np.float32
        )
        inputs = len(c.history) * parts.units + 3
        rows, width = c.context + T, c.dim // c.heads  # what a whole chunk sees, and the sink
        R, V = round_up(rows, LANES), round_up(width, LANES)
        self._arrays: dict[str, NDArray] = {
            "counts_TN": np.zeros((T, parts.units), np.float32),
            "shown_T": np.zeros(T, np.int64),
            "live_TD": zeros(T, round_up(c.dim)),
            "found_I": np.zeros(inputs, np.int64),
            "root_I": zeros(inputs),
            **read_in_arrays(parts, missing_N, packed),
            "spikes_D": padded(f8(model.modality_MD)[0] + dark_D),
            "dark_D": padded(dark_D),
            "heads_OI": heads_OI,
            "token_TD": zeros(T, c.dim),
            "raw_TO": np.zeros((T, len(heads_OI)), np.float32),
        }
        self._stream_1 = np.zeros(1, STREAM)
        self._point_to(self._arrays)
        for name, size in (("units", parts.units), ("inputs", inputs), ("outputs", len(heads_OI))):
            self._stream_1[name] = size
        # What a step touches, ready to hand: looking it up costs more than it does.
        self._fields, self._at = self._stream_1.view(np.int64), self._stream_1.ctypes.data
        self._counts_TN, self._shown_T = self._arrays["counts_TN"], self._arrays["shown_T"]
        self._raw_TO, self._bin, self._bins = self._arrays["raw_TO"], 0, 0
        self._config = c
        self.lie_in(zeros(past_words(c, parts.units)))
        self._set_sinks(model, rows, R, V, width)
        self.nbytes = self._trunk.weights.nbytes + sum(self._arrays[name].nbytes for name in READ)
        weight_DD, bias_D = map_of(model.next)
        weight_ND, bias_N = map_of(parts.spikes_out.linear)
        # Weights of a silent unit are not read: to take it for missing is to change the bias.
        self._bias_E = self._arrays["bias_E"]
        self._instead_NE = instead_of(parts, missing_N)
        self._believed_E = self._bias_E.astype(np.float64)
        self._next_DN = np.ascontiguousarray((weight_ND @ weight_DD).T, np.float32)
        self._next_N = (weight_ND @ bias_D + bias_N).astype(np.float32)
        self.reset()
        self.step(self._arrays["counts_TN"][0], False)  # compiles
        self.reset()

    def _set_sinks(self, model: Any, rows: int, R: int, V: int, width: int) -> None:
        """What keys and values of nobody but the sink are."""
        sinks = np.array([f8(layer.attention.sink_value_HF) for layer in model.layers])
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
        past = past_in(room, self._config, self._counts_TN.shape[1])
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
        fused_step(self._at, 1, self._trunk.at)
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
        fused_step(trunk.streams_at, len(steps), trunk.at)
        return [step._raw_TO[: step._bins] for step in steps]

    def fetch(self, *, trunk: bool = True) -> None:
        """Read what the next step will, so that it lies near the processor when a bin closes.

        Changes nothing. After twenty milliseconds of other work it lies in memory, far off.
        ``trunk``: with what the streams share, which one of them does for all.
        """
        if trunk:
            fetch(self._trunk.weights.view(np.int32))
        for name in READ:
            fetch(self._arrays[name].reshape(-1).view(np.int32))

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
