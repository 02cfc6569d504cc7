"""A step of some streams as one launch: what ``graph_kernel.cu`` is told, and where things lie.

Shape suffixes: as in :mod:`rt_neds.stream.graph_streams`; E numbers read of the spikes (a token to
be, and what a linear decoder says), X numbers of many shapes in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from rt_neds.model.neds import NEDS
from rt_neds.stream.cuda_driver import Kernel, compile_cuda

if TYPE_CHECKING:
    from rt_neds.stream.graph_streams import Stream

WARPS, LANES = 8, 32
TEAMS = ((64, 1), (32, 1), (16, 1), (16, 2), (8, 2), (4, 2))
"""Blocks of a stream, and of all streams on one multiprocessor: the first that fits. As measured; a
second block on a multiprocessor costs more than a team of twice the size gains."""


class Launcher(Protocol):
    """What runs it: a kernel of a GPU, or in a test threads."""

    def launch(self, grid: tuple[int, int], *addresses: int) -> None:
        """Run ``grid`` blocks: of each stream's team, and streams."""


class OneLaunch:
    """All of a step after the copy up.

    Parameters
    ----------
    model : NEDS
        Whose trunk it is, on the device.
    streams : sequence of Stream
        With their state where it will stay.
    given_PX, counts, raws : tensor, sequences of tensors
        Where what comes up is: for each stream a row of the live token, whether there are spikes,
        whether anything is seen, whether there is a bin, cosines and sines; its counts; and where
        its outputs go, which may be pinned memory of the host.

    Raises
    ------
    RuntimeError
        If this GPU cannot have all blocks at once, or there is no NVRTC.
    """

    def __init__(
        self,
        model: NEDS,
        streams: Sequence[Stream],
        given_PX: Tensor,
        counts: Sequence[Tensor],
        raws: Sequence[Tensor],
    ) -> None:
        device = given_PX.device
        self.team, self._launcher = find_launcher(model, [s.units for s in streams], device)
        self._trunk_X = torch.cat([part.reshape(-1) for part in _trunk(model)])
        self._kept = [own_weights(stream) for stream in streams]
        table, c = [], model.config
        of_layer = (3 + c.heads + c.widen + 1) * c.dim
        for p, stream in enumerate(streams):
            words = 4 * c.dim + _said(model) + c.layers * of_layer + len(c.history) * stream.units
            words_X = torch.zeros(words, dtype=torch.int64, device=device)
            launch_2 = torch.tensor([1, 0], dtype=torch.int32, device=device)
            state, keys_LPHRF = stream.state, stream.state["keys_LPHRF"]
            table.append(
                [
                    stream.units, stream.outputs, keys_LPHRF.stride(0),
                    given_PX[p].data_ptr(), counts[p].data_ptr(), self._kept[p].data_ptr(),
                    stream.missing_N.data_ptr(), stream.counts_CN.data_ptr(),
                    keys_LPHRF.data_ptr(), state["values_LPHRF"].data_ptr(),
                    state["memory_PD"].data_ptr(), state["bin_P"].data_ptr(),
                    state["bin_of_row_PR"].data_ptr(), words_X.data_ptr(), raws[p].data_ptr(),
                    launch_2.data_ptr(),
                ]
            )  # fmt: skip
            self._kept += [words_X, launch_2]
        self._table_PX = torch.tensor(table, dtype=torch.int64, device=device)

    def __call__(self) -> None:
        """Launch it."""
        grid = self.team, len(self._table_PX)
        self._launcher.launch(grid, self._table_PX.data_ptr(), self._trunk_X.data_ptr())


def find_launcher(model: NEDS, units: Sequence[int], device: torch.device) -> tuple[int, Launcher]:
    """The largest team for which a GPU can hold all blocks of all streams at once."""
    properties, streams = torch.cuda.get_device_properties(device), len(units)
    architecture = f"sm_{properties.major}{properties.minor}"
    features_bytes = 4 * len(model.config.history) * max(units)
    for team, at_once in TEAMS:
        if team * streams > at_once * properties.multi_processor_count:
            continue
        code = compile_cuda(source_of(model, team, at_once), architecture)
        kernel = Kernel(
            code, "one_bin_of_each", "bytes_of_block", features_bytes, WARPS * LANES, device
        )
        if team * streams <= kernel.blocks_at_once() * properties.multi_processor_count:
            return team, kernel
    raise RuntimeError(f"{streams} streams are too many for one launch on this GPU")


def source_of(
    model: NEDS, team: int, at_once: int = 1, warps: int = WARPS, lanes: int = LANES
) -> str:
    """The text to compile, all sizes defined."""
    c, memory = model.config, model.memory
    constants = {
        "DIM": c.dim, "HEADS": c.heads, "LAYERS": c.layers, "CONTEXT": c.context,
        "HIDDEN": c.widen * c.dim, "SAID": _said(model), "WIDTHS": len(c.history),
        "HISTORY": ", ".join(map(str, c.history)), "OLDEST": max(c.history),
        "REMEMBERS": int(memory is not None),
        "LONGEST": f"{memory.longest if memory is not None else 0.0!r}f",
        "TEAM": team, "AT_ONCE": at_once, "WARPS": warps, "LANES": lanes,
    }  # fmt: skip
    here = resources.files("rt_neds.stream")
    parts = [here.joinpath(f"graph_{part}.cu").read_text("utf-8") for part in ("team", "kernel")]
    return "".join([*(f"#define {name} {value}\n" for name, value in constants.items()), *parts])


def _said(model: NEDS) -> int:
    return 0 if model.linear_in is None else model.linear_in.in_features


def _map(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight, linear.bias


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


def _turned(model: NEDS, part_X: Tensor) -> Tensor:
    """Rows of queries, keys and values: each beside the one that it is turned with."""
    half = model.config.dim // model.config.heads // 2
    return part_X.unflatten(0, (3, model.config.heads, 2, half)).transpose(2, 3)


def _trunk(model: NEDS) -> Iterator[Tensor]:
    """Weights that all sessions share, as they lie."""
    weight_DE, bias_D = _map(model.spikes_shared)
    if model.linear_in is not None:
        more_DU, more_D = _map(model.linear_in)
        weight_DE, bias_D = torch.cat([weight_DE, more_DU], dim=1), bias_D + more_D
    yield from (weight_DE, bias_D)
    for layer in model.stack():
        yield from _norm(layer.norm1)
        yield from (_turned(model, part_X) for part_X in _map(layer.attention.qkv))
        yield from _map(layer.attention.out)
        yield from _norm(layer.norm2)
        yield from _map(layer.widen)
        yield from _map(layer.narrow)
    if model.memory is not None:
        yield from _norm(model.memory.norm)
        gate, value = _map(model.memory.gate), _map(model.memory.value)
        yield from (torch.stack(pair, dim=1) for pair in zip(gate, value, strict=True))
        yield from _map(model.memory.out)
    yield from _norm(model.norm)


def own_weights(stream: Stream) -> Tensor:
    """Weights of a session, as they lie."""
    read_in = stream.read_in
    read, read_bias = [read_in.linear.weight], [read_in.linear.bias]
    head = [stream.head_OD, stream.bias_O]
    if stream.linear is not None and stream.said_OU is not None and stream.said_O is not None:
        read.append(stream.linear.weight_UF)
        read_bias.append(stream.linear.bias_U)
        head += [stream.said_OU, stream.said_O]
    parts = [
        *(stream.dark_D, stream.spikes_D, read_in.mean_KN, read_in.sd_KN, read_in.missing_KN),
        *(*read, *read_bias, *head),
    ]
    return torch.cat([part.reshape(-1) for part in parts])
