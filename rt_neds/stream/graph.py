"""One step of the network on a GPU: every shape and address fixed, so that it is captured once.

What a step costs on a GPU is launching its hundred small kernels; replaying one captured graph
launches them all. For that nothing may be allocated, moved or decided on the host in between:
counts, whether they were observed, and the rotary angles of the bin go up in one copy from a pinned
buffer, the number of the bin is counted on the device, and the outputs come down in one copy.

The same function runs uncaptured on tensors of any device.

Shape suffixes: T bins, N units, K boxcar widths, C bins of the longest boxcar, D model width, H
heads, F width of a head, R rows of the ring and the sink, O numbers read out (of
behaviours, then log-rates of the next bin's spikes).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from rt_neds.errors import BundleError
from rt_neds.model.attention import NEVER, ROTARY_BASE, rotate
from rt_neds.model.memory import Memory
from rt_neds.model.neds import NEDS, SCHEMES
from rt_neds.model.readout import Scale
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.live_tokens import LiveTokens

F4 = NDArray[np.float32]
WARM_UPS = 3


class GraphStep:
    """The network, one bin at a time, for one stream of spikes, and of behaviours observed live.

    Parameters
    ----------
    model : NEDS
        Copied; later changes to it are not seen.
    session : str
        Session id.
    wanted : sequence of str
        Behaviours to decode, at least one, in the order of their outputs.
    missing_N : ndarray of bool, shape (units,), optional
        Units to replace by their learned stand-in.
    device : torch.device or str
    live : mapping of str to Scale, optional
        Behaviours that may be shown, in the order of their values.
    captured : bool
        Replay a CUDA graph, rather than launch kernel by kernel.

    Raises
    ------
    BundleError
        If a tensor does not have the shape that the others imply; it is named.
    RuntimeError
        If the device is not there, has no memory left, or does not let itself be captured.
    """

    def __init__(
        self,
        model: NEDS,
        session: str,
        wanted: Sequence[str],
        missing_N: NDArray[np.bool_] | None = None,
        device: torch.device | str = "cuda",
        *,
        live: Mapping[str, Scale] | None = None,
        captured: bool = True,
    ) -> None:
        model.start(session)  # refuses a model that cannot be streamed
        if not wanted or not set(wanted) <= set(model.modalities[1:]):
            raise ValueError(f"asked for {list(wanted)}; expected one or more behaviours")
        units, c = model.parts(session).units, model.config
        if missing_N is not None:
            _check("missing_N", missing_N.shape, (units,))
        self._live = LiveTokens(model, session, live or {})
        model = copy.deepcopy(model).eval().requires_grad_(False).to(device)
        self._device, self._stack = torch.device(device), model.stack()
        self._context, self._heads = c.context, c.heads
        self._memory, self._norm = model.memory, model.norm
        self._shared, self._spikes_D = model.spikes_shared, model.modality_MD[0]
        self._linear_in: Any = model.linear_in
        session_D = model.session_XD[model.session_ids.index(session)]
        self._dark_D = model.hidden_D + session_D + model.scheme_XD[SCHEMES.index("decoding")]
        self._set_read_in(model.parts(session), missing_N)
        parts: Any = model.parts(session)
        heads = [parts.behaviour_out[name].linear for name in wanted]
        self._outputs = sum(head.out_features for head in heads)
        self._set_said(parts, wanted)
        spikes = parts.spikes_out.linear  # of the next bin: two maps in a row are one
        next_ND, next_N = spikes.weight @ model.next.weight, spikes(model.next.bias)
        self._head_OD = torch.cat([*(head.weight for head in heads), next_ND])
        self._bias_O = torch.cat([*(head.bias for head in heads), next_N])
        self._next_TN = np.zeros((CHUNK, units), np.float32)
        self._bins = 0
        self._set_state(c, units)
        self._set_transfers(units, c.dim, c.dim // c.heads, captured)
        self._graph: torch.cuda.CUDAGraph | None = None
        if captured:
            self._capture()
        self.reset()

    def _set_read_in(self, parts: Any, missing_N: NDArray[np.bool_] | None) -> None:
        read_in = parts.spikes_in
        missing = torch.from_numpy(np.zeros(parts.units, bool) if missing_N is None else missing_N)
        self._history_K1 = torch.tensor(read_in.history, device=self._device)[:, None]
        self._mean_KN, self._sd_KN = read_in.mean_KN, read_in.sd_KN
        self._never_N = missing.numpy()  # not in the stream
        self._missing_N = missing.clone().to(self._device)
        self._stand_in_KN = read_in.missing_KN
        self._read_in = read_in.linear
        self._linear: Any = parts.linear

    def _set_said(self, parts: Any, wanted: Sequence[str]) -> None:
        """The outputs of what a linear decoder says, as one map."""
        self._said_OU: Tensor | None = None
        if parts.linear is None:
            return
        outs = [parts.linear.out[name] for name in wanted]
        self._said_OU = self._mean_KN.new_zeros(self._outputs, len(parts.linear.bias_U))
        first = 0
        for name, out in zip(wanted, outs, strict=True):
            rows = slice(first, first + out.out_features)
            self._said_OU[rows, parts.linear.where[name]] = out.weight
            first = rows.stop
        self._said_O = torch.cat([out.bias for out in outs])

    def _set_state(self, config: Any, units: int) -> None:
        """Everything known of the past: counts for the boxcars, keys, values, whose they are."""
        W, H, F = config.context, config.heads, config.dim // config.heads
        new: dict[str, Any] = {"device": self._device}
        self._bin_1 = torch.zeros(1, dtype=torch.int64, **new)
        self._counts_CN = torch.zeros(max(config.history), units, **new)
        self._memory_D = torch.zeros(config.dim, **new)
        self._age_C = torch.arange(max(config.history), **new)
        self._bin_of_row_R = torch.full((W,), NEVER, dtype=torch.int64, **new)
        self._keys_LHRF = torch.zeros(config.layers, H, W + 1, F, **new)
        self._values_LHRF = torch.zeros(config.layers, H, W + 1, F, **new)
        for layer, values_HRF in zip(self._stack, self._values_LHRF, strict=True):
            values_HRF[:, W] = layer.attention.sink_value_HF

    def _set_transfers(self, units: int, dim: int, width: int, captured: bool) -> None:
        """What goes up: counts, what is live, whether spikes and whether anything is shown, cosines
        and sines. What comes down: outputs.
        """
        half = width // 2
        sizes = (units, dim, 1, 1, half, half)
        self._up_host = torch.zeros(sum(sizes), pin_memory=captured)
        self._raw_host_O = torch.zeros(len(self._bias_O), pin_memory=captured)
        host = [part.numpy() for part in self._up_host.split(sizes)]  # views
        self._host_counts_N, self._host_live_D, self._host_spikes_1 = host[:3]
        self._host_seen_1, self._host_cos_F, self._host_sin_F = host[3:]
        self._up = torch.zeros(sum(sizes), device=self._device)
        self._counts_N, self._live_D, self._spikes_1, self._seen_1, *_ = self._up.split(sizes)
        self._table_21F = self._up[-2 * half :].view(2, 1, half)
        self._frequency_F = ROTARY_BASE ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        self._raw_O = self._raw_host_O.numpy()
        self._units = units

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):  # libraries make their handles and workspaces now
                self._step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        self._done = torch.cuda.Event()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph

    def reset(self, first_bin: int = 0) -> None:
        """Forget the past; the next bin has this number."""
        self._bin = int(first_bin)
        self._bin_1.fill_(self._bin)
        self._counts_CN.zero_()
        self._memory_D.zero_()
        self._bin_of_row_R.fill_(NEVER)

    def steps(
        self, counts_TN: Sequence[F4], observed_T: Sequence[bool], live_TM: Sequence[F4] = ()
    ) -> F4:
        """Decode the next bins, one replay after the other.

        Parameters
        ----------
        counts_TN : sequence of ndarray of float32, shape (units,)
            Spikes of each unit in each bin; ignored if the bin is not observed.
        observed_T : sequence of bool
        live_TM : sequence of ndarray of float32, shape (live behaviours,)
            What is observed of them in each bin, NaN where nothing is; empty if they are hidden.

        Returns
        -------
        ndarray of float32, shape (bins, numbers of all wanted outputs)
        """
        raw_TO = np.empty((len(counts_TN), self._outputs), np.float32)
        for t in range(len(counts_TN)):
            raw_TO[t] = self.step(counts_TN[t], observed_T[t], live_TM[t] if live_TM else None)
            self._next_TN[t] = self._raw_O[self._outputs :]
        self._bins = len(counts_TN)
        return raw_TO

    def next_TN(self) -> F4:
        """Log-rates of the spikes of the bin after each of those last decoded."""
        return self._next_TN[: self._bins]

    def miss(self, silent_N: NDArray[np.bool_] | None) -> None:
        """From the next bin on take these units, too, for missing."""
        missing_N = self._never_N if silent_N is None else self._never_N | silent_N
        self._missing_N.copy_(torch.from_numpy(missing_N))  # in place: the graph has its address

    def step(self, counts_N: F4, observed: bool, live_M: F4 | None = None) -> F4:
        """Decode the next bin; the array is overwritten by the one after it."""
        _check("counts_N", np.shape(counts_N), (self._units,))
        self._host_counts_N[:] = counts_N if observed else 0
        self._host_spikes_1[:] = observed
        self._host_seen_1[:] = self._live.write(live_M, self._host_live_D) or observed
        angle_F = self._bin * self._frequency_F  # in float64, or it is off after some hours
        self._host_cos_F[:], self._host_sin_F[:] = np.cos(angle_F), np.sin(angle_F)
        if self._graph is not None:
            self._graph.replay()
            self._done.record()
            self._done.synchronize()
        else:
            self._step()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        self._bin += 1
        return self._raw_O[: self._outputs]

    # -- what is captured ------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self) -> None:
        """One bin, from the host's buffer to the host's buffer, without a decision on the way."""
        self._up.copy_(self._up_host, non_blocking=True)
        row_1 = self._bin_1 % self._context
        bin_or_never_1 = torch.where(self._seen_1 > 0, self._bin_1, NEVER)
        self._bin_of_row_R.index_copy_(0, row_1, bin_or_never_1)
        hidden_R = self._bin_1 - self._bin_of_row_R >= self._context
        # The sink is the last row, and always seen.
        mask_R = nnf.pad(torch.where(hidden_R, -torch.inf, 0.0), (0, 1))
        z_F = self._features()
        token_D = self._shared(nnf.softsign(self._read_in(z_F))) + self._spikes_D
        if self._said_OU is not None:
            said_U = self._linear(z_F[None, None])[0, 0]
            token_D = token_D + self._linear_in(said_U)
        x_D = self._dark_D + token_D * self._spikes_1 + self._live_D
        for layer, keys_HRF, values_HRF in zip(
            self._stack, self._keys_LHRF, self._values_LHRF, strict=True
        ):
            normed_D = layer.norm1(x_D)
            attended_D = self._attend(layer, normed_D, row_1, mask_R, keys_HRF, values_HRF)
            x_D = layer.add(x_D, attended_D)
        if self._memory is not None:
            x_D = x_D + self._remember(self._memory, x_D, ~hidden_R.all())
        raw_O = nnf.linear(self._norm(x_D), self._head_OD, self._bias_O)
        if self._said_OU is not None:
            more_O = nnf.linear(said_U, self._said_OU, self._said_O) * self._spikes_1
            raw_O = raw_O + nnf.pad(more_O, (0, len(raw_O) - self._outputs))
        self._raw_host_O.copy_(raw_O, non_blocking=True)
        self._bin_1 += 1

    def _features(self) -> Tensor:
        """Standardised roots of the boxcar sums, which are of integers and so exact."""
        bins = len(self._counts_CN)
        self._counts_CN.index_copy_(0, self._bin_1 % bins, self._counts_N[None])
        age_C = (self._bin_1 - self._age_C) % bins
        sums_KN = (age_C < self._history_K1).float() @ self._counts_CN
        z_KN = (sums_KN.sqrt() - self._mean_KN) / self._sd_KN
        return torch.where(self._missing_N, self._stand_in_KN, z_KN).flatten()

    def _remember(self, memory: Memory, x_D: Tensor, in_sight: Tensor) -> Tensor:
        """Move the memory on, in place, and read it; in the dark it forgets."""
        normed_D = memory.norm(x_D)
        pace_D = 1.0 - memory.longest * torch.sigmoid(memory.gate(normed_D))
        self._memory_D.mul_(in_sight)
        self._memory_D.lerp_(memory.value(normed_D), pace_D * self._seen_1)
        return memory.out(self._memory_D)

    def _attend(
        self, layer: Any, x_D: Tensor, row_1: Tensor, mask_R: Tensor, keys_HRF: Tensor,
        values_HRF: Tensor,
    ) -> Tensor:  # fmt: skip
        """Put the bin's key and value into the ring, and let its query look at all of it."""
        qkv_3H1F = layer.attention.qkv(x_D).view(3, self._heads, 1, -1)
        q_H1F, k_H1F = rotate(qkv_3H1F[:2, :, None], self._table_21F)[:, :, 0]
        keys_HRF.index_copy_(1, row_1, k_H1F)
        values_HRF.index_copy_(1, row_1, qkv_3H1F[2])
        mixed_H1F = nnf.scaled_dot_product_attention(
            q_H1F[None], keys_HRF[None], values_HRF[None], attn_mask=mask_R[None, None]
        )[0]
        return layer.attention.out(mixed_H1F.flatten())


def _check(name: str, came: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(came) != expected:
        raise BundleError(
            f"{name} is {tuple(came)} and {expected} was captured; "
            "serve the bundle of the session whose units come"
        )
