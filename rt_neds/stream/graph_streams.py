"""What a GPU computes in one go: one bin of each of some streams that share a trunk.

Every shape and address is fixed, so that it can be captured once as a CUDA graph: nothing is
allocated, moved or decided on the host in between. A stream that has no bin just now is computed
all the same, and what comes of it goes where nobody looks: the state of a stream changes only when
it has a bin.

The same function runs uncaptured on tensors of any device.

Shape suffixes: P streams, N units, K boxcar widths, C bins of the longest boxcar and a row for
nothing, D model width, H heads, F width of a head (of rotary angles: half of it), R rows of the
ring, the sink and a row for nothing, U numbers that a linear decoder says, O numbers read out (of
behaviours, then log-rates of the next bin's spikes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from rt_neds.model.attention import NEVER, rotate
from rt_neds.model.memory import Memory
from rt_neds.model.neds import NEDS, SCHEMES
from rt_neds.stream.graph_kernel import OneLaunch

WARM_UPS = 3
OF_LAYERS = ("keys_LPHRF", "values_LPHRF")
"""State of which each layer has its own."""
TRUNK = ("spikes_shared", "linear_in", "layers", "memory", "norm")
"""Modules that all sessions share."""


class Stream:
    """What belongs to one stream, on the device: parts of the network, and what it knows of before.

    Parameters
    ----------
    model : NEDS
        On the device; its tensors are used as they are.
    session : str
    wanted : sequence of str
        Behaviours to decode.
    missing_N : ndarray of bool
        Units that are not in the stream.

    Attributes
    ----------
    outputs : int
        Numbers of all wanted behaviours.
    state : dict of str to tensor
        What is known of before, all streams of a call side by side on the second axis of keys and
        values and the first of all else; here those of this stream.
    """

    def __init__(
        self, model: NEDS, session: str, wanted: Sequence[str], missing_N: NDArray[np.bool_]
    ) -> None:
        parts: Any = model.parts(session)
        self.units = parts.units
        session_D = model.session_XD[model.session_ids.index(session)]
        self.dark_D = model.hidden_D + session_D + model.scheme_XD[SCHEMES.index("decoding")]
        self.spikes_D = model.modality_MD[0]
        self.read_in, self.linear = parts.spikes_in, parts.linear
        device = self.dark_D.device
        self.history_K1 = torch.tensor(self.read_in.history, device=device)[:, None]
        self.missing_N = torch.from_numpy(missing_N.copy()).to(device)
        heads = [parts.behaviour_out[name].linear for name in wanted]
        self.outputs = sum(head.out_features for head in heads)
        spikes = parts.spikes_out.linear  # of the next bin: two maps in a row are one
        next_ND, next_N = spikes.weight @ model.next.weight, spikes(model.next.bias)
        self.head_OD = torch.cat([*(head.weight for head in heads), next_ND])
        self.bias_O = torch.cat([*(head.bias for head in heads), next_N])
        self._set_said(wanted)
        self._set_state(model)

    def _set_said(self, wanted: Sequence[str]) -> None:
        """The outputs of what a linear decoder says, as one map."""
        self.said_OU: Tensor | None = None
        self.said_O: Tensor | None = None
        if self.linear is None:
            return
        outs = [self.linear.out[name] for name in wanted]
        self.said_OU = self.head_OD.new_zeros(self.outputs, len(self.linear.bias_U))
        first = 0
        for name, out in zip(wanted, outs, strict=True):
            rows = slice(first, first + out.out_features)
            self.said_OU[rows, self.linear.where[name]] = out.weight
            first = rows.stop
        self.said_O = torch.cat([out.bias for out in outs])

    def _set_state(self, model: NEDS) -> None:
        c, new = model.config, self.dark_D.new_zeros
        R, F = c.context + 2, c.dim // c.heads
        self.state: dict[str, Tensor] = {
            "bin_P": new(1, dtype=torch.int64),
            "bin_of_row_PR": new(1, R, dtype=torch.int64),
            "memory_PD": new(1, c.dim),
            "keys_LPHRF": new(c.layers, 1, c.heads, R, F),
            "values_LPHRF": new(c.layers, 1, c.heads, R, F),
        }
        for layer, values_PHRF in zip(
            model.stack(), self.state["values_LPHRF"].unbind(), strict=True
        ):
            values_PHRF[:, :, c.context] = layer.attention.sink_value_HF
        self.counts_CN = new(max(c.history) + 1, self.units)
        self.age_C = torch.arange(max(c.history), device=self.dark_D.device)

    def reset(self, first_bin: int) -> None:
        """Forget the past."""
        self.state["bin_P"].fill_(first_bin)
        self.state["bin_of_row_PR"].fill_(NEVER)
        self.state["memory_PD"].zero_()
        self.counts_CN.zero_()

    def features(self, counts_N: Tensor, due_1: Tensor) -> Tensor:
        """Standardised roots of the boxcar sums, which are of integers and so exact."""
        bins, bin_P = len(self.age_C), self.state["bin_P"]
        row_P = torch.where(due_1 > 0, bin_P % bins, bins)
        self.counts_CN.index_copy_(0, row_P, counts_N[None])
        age_C = (bin_P - self.age_C) % bins
        sums_KN = (age_C < self.history_K1).float() @ self.counts_CN[:bins]
        z_KN = (sums_KN.sqrt() - self.read_in.mean_KN) / self.read_in.sd_KN
        return torch.where(self.missing_N, self.read_in.missing_KN, z_KN).flatten()

    def read_out(self, x_D: Tensor, said_U: Tensor | None, spikes_1: Tensor) -> Tensor:
        """Numbers of the wanted behaviours, and log-rates of the next bin's spikes."""
        raw_O = nnf.linear(x_D, self.head_OD, self.bias_O)
        if said_U is None or self.said_OU is None:
            return raw_O
        more_O = nnf.linear(said_U, self.said_OU, self.said_O) * spikes_1
        return raw_O + nnf.pad(more_O, (0, len(raw_O) - self.outputs))


class Streams:
    """Some streams that share a trunk: one bin of each in one go.

    Parameters
    ----------
    model : NEDS
        Whose trunk it is.
    streams : list of Stream
        Their state moves into tensors of all of them.
    captured : bool
        Whether to capture a CUDA graph.
    one_launch : bool
        Whether to compute all in one launch (:mod:`rt_neds.stream.graph_kernel`) where that can be.

    Attributes
    ----------
    many_because : str
        Why PyTorch launches it kernel by kernel; empty if it does not, or was to.
    host : list of dict of str to ndarray
        For each stream what goes up: ``counts_N``, ``live_D``, ``spikes_1`` and ``seen_1`` (whether
        spikes, and whether anything is shown), ``due_1`` (whether it has a bin), ``table_2F``
        (cosines, then sines of its bin); and what comes down, ``raw_O``.
    """

    def __init__(
        self, model: NEDS, streams: list[Stream], captured: bool, one_launch: bool
    ) -> None:
        self.model, self.streams, self._captured = model, streams, captured
        self._device = streams[0].dark_D.device
        self._layers, self._context = model.stack(), model.config.context
        self._linear_in: Any = model.linear_in
        self._dark_PD = torch.stack([stream.dark_D for stream in streams])
        self._spikes_PD = torch.stack([stream.spikes_D for stream in streams])
        self._join_states()
        self._set_transfers(model.config.dim, model.config.dim // model.config.heads // 2)
        nothing = torch.arange(self._context + 2, device=self._device)
        self._nothing_R, self._sink_R = nothing > self._context, nothing == self._context
        self._one_launch: OneLaunch | None = None
        self.many_because = ""
        if one_launch:
            try:
                # Outputs go straight to the host: that is 4 us less than a copy of its own.
                self._one_launch = OneLaunch(
                    model, streams, self._given_PX, self._counts, self._raw_host.split(self._down)
                )
            except RuntimeError as error:
                self.many_because = str(error).splitlines()[0]
        self._graph: torch.cuda.CUDAGraph | None = None
        if captured:
            self._capture()

    def _join_states(self) -> None:
        """Put what each stream knows side by side; what it has from now on are views of that."""
        axis = dict.fromkeys(self.streams[0].state, 0) | dict.fromkeys(OF_LAYERS, 1)
        self._state = {
            name: torch.cat([stream.state[name] for stream in self.streams], dim=axis[name])
            for name in axis
        }
        for p, stream in enumerate(self.streams):
            stream.state = {name: self._state[name].narrow(axis[name], p, 1) for name in axis}

    def _set_transfers(self, dim: int, half: int) -> None:
        """What goes up in one copy, and what comes down in another."""
        sizes = {"live_D": dim, "spikes_1": 1, "seen_1": 1, "due_1": 1, "table_2F": 2 * half}
        width, P = sum(sizes.values()), len(self.streams)
        units = [stream.units for stream in self.streams]
        self._down = down = [len(stream.bias_O) for stream in self.streams]
        self._up_host = torch.zeros(P * width + sum(units), pin_memory=self._device.type == "cuda")
        self._raw_host = torch.zeros(sum(down), pin_memory=self._device.type == "cuda")
        self._up = torch.zeros(len(self._up_host), device=self._device)
        self._raw = torch.zeros(sum(down), device=self._device)
        self._given_PX = self._up[: P * width].view(P, width)
        self._parts = dict(zip(sizes, self._given_PX.split([*sizes.values()], 1), strict=True))
        self._table_2PF = self._parts["table_2F"].view(P, 2, half).transpose(0, 1)
        self._counts = self._up[P * width :].split(units)
        beside = self._up_host[: P * width].view(P, width)
        counts, raws = self._up_host[P * width :].split(units), self._raw_host.split(down)
        self.host: list[dict[str, NDArray[np.float32]]] = []
        for p in range(P):
            split = beside[p].split([*sizes.values()])
            own = {name: part.numpy() for name, part in zip(sizes, split, strict=True)}
            self.host.append({**own, "counts_N": counts[p].numpy(), "raw_O": raws[p].numpy()})

    def _capture(self) -> None:
        """Record all kernels of a step; streams have no bin meanwhile, and so stay as they are."""
        self._up_host.zero_()
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

    def start(self) -> None:
        """From the host's buffers to the host's buffers, once :meth:`wait` has returned."""
        if self._graph is not None:
            self._graph.replay()
            self._done.record()
        else:
            self._step()

    def wait(self) -> None:
        """Until the outputs are there."""
        if self._graph is not None:
            self._done.synchronize()
        elif self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    # -- what is captured ------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self) -> None:
        """One bin of every stream that is due, without a decision on the way."""
        self._up.copy_(self._up_host, non_blocking=True)
        if self._one_launch is not None:
            self._one_launch()
        else:
            self._kernel_by_kernel()
            self._raw_host.copy_(self._raw, non_blocking=True)

    def _kernel_by_kernel(self) -> None:
        """All between the two copies, by PyTorch."""
        part, state = self._parts, self._state
        due_P1, seen_P1 = part["due_1"], part["seen_1"]
        bin_P1 = state["bin_P"][:, None]
        row_P1 = torch.where(due_P1 > 0, bin_P1 % self._context, self._context + 1)
        state["bin_of_row_PR"].scatter_(1, row_P1, torch.where(seen_P1 > 0, bin_P1, NEVER))
        hidden_PR = bin_P1 - state["bin_of_row_PR"] >= self._context
        hidden_PR = hidden_PR & ~self._sink_R | self._nothing_R
        mask_P11R = torch.where(hidden_PR, -torch.inf, 0.0)[:, None, None]
        x_PD, said = self._tokens()
        _, _, H, _, F = state["keys_LPHRF"].shape
        row_PH1F = row_P1[:, None, None].expand(-1, H, 1, F)
        for layer, keys_PHRF, values_PHRF in zip(
            self._layers, state["keys_LPHRF"], state["values_LPHRF"], strict=True
        ):
            attended_PD = self._attend(
                layer, layer.norm1(x_PD), row_PH1F, mask_P11R, keys_PHRF, values_PHRF
            )
            x_PD = layer.add(x_PD, attended_PD)
        if self.model.memory is not None:
            in_sight_P1 = (~(hidden_PR | self._sink_R)).any(dim=1, keepdim=True)
            x_PD = x_PD + self._remember(self.model.memory, x_PD, in_sight_P1)
        raws = [
            stream.read_out(x_D, said_U, spikes_1)
            for stream, x_D, said_U, spikes_1 in zip(
                self.streams, self.model.norm(x_PD), said, part["spikes_1"], strict=True
            )
        ]
        torch.cat(raws, out=self._raw)
        state["bin_P"].add_(due_P1[:, 0].long())

    def _tokens(self) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Tokens of all streams, and what linear decoders say of each."""
        z = [
            stream.features(counts_N, due_1)
            for stream, counts_N, due_1 in zip(
                self.streams, self._counts, self._parts["due_1"], strict=True
            )
        ]
        read_PD = torch.stack(
            [s.read_in.linear(z_F) for s, z_F in zip(self.streams, z, strict=True)]
        )
        token_PD = self.model.spikes_shared(nnf.softsign(read_PD)) + self._spikes_PD
        said: Sequence[Tensor | None] = [None] * len(z)
        if self._linear_in is not None:
            said_PU = torch.stack(
                [s.linear(z_F[None, None])[0, 0] for s, z_F in zip(self.streams, z, strict=True)]
            )
            token_PD, said = token_PD + self._linear_in(said_PU), said_PU.unbind()
        return (
            self._dark_PD + token_PD * self._parts["spikes_1"] + self._parts["live_D"],
            said,
        )

    def _attend(
        self, layer: Any, x_PD: Tensor, row_PH1F: Tensor, mask_P11R: Tensor, keys_PHRF: Tensor,
        values_PHRF: Tensor,
    ) -> Tensor:  # fmt: skip
        """Put keys and values into the rings, and let each query look at all of its own."""
        P, H, _, F = keys_PHRF.shape
        qkv_3PHF = layer.attention.qkv(x_PD).view(P, 3, H, F).transpose(0, 1)
        turned_2PHF = rotate(qkv_3PHF[:2], self._table_2PF)
        keys_PHRF.scatter_(2, row_PH1F, turned_2PHF[1, :, :, None])
        values_PHRF.scatter_(2, row_PH1F, qkv_3PHF[2, :, :, None])
        mixed_PH1F = nnf.scaled_dot_product_attention(
            turned_2PHF[0, :, :, None], keys_PHRF, values_PHRF, attn_mask=mask_P11R
        )
        return layer.attention.out(mixed_PH1F.flatten(1))

    def _remember(self, memory: Memory, x_PD: Tensor, in_sight_P1: Tensor) -> Tensor:
        """Move memories on, in place, and read them; in the dark they forget."""
        due_P1, memory_PD = self._parts["due_1"], self._state["memory_PD"]
        normed_PD = memory.norm(x_PD)
        pace_PD = 1.0 - memory.longest * torch.sigmoid(memory.gate(normed_PD))
        memory_PD.mul_(in_sight_P1 | (due_P1 == 0))
        memory_PD.lerp_(memory.value(normed_PD), pace_PD * self._parts["seen_1"] * due_P1)
        return memory.out(memory_PD)
