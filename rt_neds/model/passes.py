"""Training on a CPU in few passes: what a layer does between its matrix products.

Each function here does what some lines of PyTorch do that stand beside its use; those lines say
what is meant, and are what runs elsewhere: on a GPU, when not training. In PyTorch each
operation reads and writes whole arrays that no cache holds; here each is read once and written
once, forwards and backwards (``docs/decisions/0037``). What is compiled is in
:mod:`rt_neds.model.passes_attention` and :mod:`rt_neds.model.passes_rows`, imported when first
needed, for numba takes a second.

Results are written over what nobody needs after them: what a linear map gave, and going backwards
what was kept for that, so a graph goes backwards once. New memory would have to be read first.

Shape suffixes: B windows, T bins, D model width, H heads, F width of a head, P keys, R rows (bins
of all windows).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MOST_THREADS = 2
"""Passes run on one; PyTorch's operations, of which there are several for each, on all it has."""


def pay(module: nn.Module, x: Tensor) -> bool:
    """Whether the passes are to be used for such tensors."""
    return (
        module.training
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.get_num_threads() <= MOST_THREADS
    )


def attended(
    x_BTD: Tensor,
    linear: nn.Linear,
    sink_HF: Tensor,
    table_2TF: Tensor,
    seen_BT: Tensor,
    context: int,
) -> Tensor:
    """What attention mixes for each bin, shape (B, T, D).

    Parameters
    ----------
    x_BTD : tensor
    linear : nn.Linear
        Of queries, keys and values.
    sink_HF : tensor
        Value of the sink.
    table_2TF : tensor
        Rotary angles of the bins.
    seen_BT : tensor of bool
        Which bins serve as keys.
    context : int
        Bins that are seen, the bin itself included; 0 for all, later ones too.
    """
    qkv = nnf.linear(x_BTD, linear.weight)
    return _Attend.apply(qkv, linear.bias, sink_HF, table_2TF, seen_BT, context)


def added_and_normed(
    x: Tensor, inputs: Tensor, linear: nn.Linear, p: float, norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """``total = x + dropout(linear(inputs))``, and ``norm(total)``.

    What is dropped is drawn anew from a seed going backwards, and nowhere kept.
    """
    more = nnf.linear(inputs, linear.weight)
    return _Add.apply(x, more, linear.bias, norm.weight, norm.bias, norm.eps, p)


def dropped_and_normed(x: Tensor, p: float, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """``total = dropout(x)``, which may take the place of ``x``, and ``norm(total)``."""
    nothing, no_bias = torch.zeros(x.shape), torch.zeros(x.shape[-1])
    return _Add.apply(nothing, x, no_bias, norm.weight, norm.bias, norm.eps, p)


def gelu(x: Tensor, linear: nn.Linear) -> Tensor:
    """``gelu(linear(x))``."""
    return _Curve.apply(nnf.linear(x, linear.weight), linear.bias, "gelu")


def softsign(x: Tensor, linear: nn.Linear) -> Tensor:
    """``softsign(linear(x))``."""
    return _Curve.apply(nnf.linear(x, linear.weight), linear.bias, "softsign")


def remembered(
    x_BTD: Tensor,
    gate: nn.Linear,
    value: nn.Linear,
    seen_BT: Tensor,
    near_BT: Tensor,
    longest: float,
) -> Tensor:
    """The memory after each bin, shape (B, T, D): see :class:`rt_neds.model.memory.Memory`.

    Parameters
    ----------
    x_BTD : tensor
        Normed tokens.
    gate, value : nn.Linear
    seen_BT, near_BT : tensor of bool
        Whether anything was observed in a bin, and in its context.
    longest : float
        Most of the memory that a bin keeps.
    """
    gates, values = nnf.linear(x_BTD, gate.weight), nnf.linear(x_BTD, value.weight)
    return _Remember.apply(gates, gate.bias, values, value.bias, seen_BT, near_BT, longest)


@cache
def _attention() -> Any:
    from rt_neds.model import passes_attention

    return passes_attention


@cache
def _in_rows() -> Any:
    from rt_neds.model import passes_rows

    return passes_rows


def _array(x: Tensor) -> NDArray[Any]:
    return x.detach().contiguous().numpy()


def _rows(x: Tensor) -> NDArray[Any]:
    """One row for each token."""
    return _array(x).reshape(-1, x.shape[-1])


def _over(x: Tensor) -> Tensor:
    """A tensor in the same place, of which PyTorch does not know that it is."""
    return torch.from_numpy(_array(x))


def _once(ctx: Any) -> None:
    """What was kept is about to be written over."""
    if hasattr(ctx, "gone"):
        raise RuntimeError("a pass of training goes backwards once: call the network again")
    ctx.gone = True


Gradients = tuple[Tensor | None, ...]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        qkv, bias, sink_HF, table_2TF, seen_BT, context = inputs
        qkv, kernel, (B, T, _), (H, F) = qkv.contiguous(), _attention(), qkv.shape, sink_HF.shape
        share = torch.empty(B * H * kernel.shares_of_head(T, context))
        sunk, mixed = torch.empty(B, H, T), torch.empty(B, T, H, F)
        seen_BP = np.zeros((B, kernel.up(T, kernel.PAIR)), np.bool_)
        seen_BP[:, :T] = seen_BT.numpy()
        kernel.attend(
            qkv.detach().numpy().reshape(B, T, 3, H, F), _array(bias).reshape(3, H, F),
            _array(table_2TF), _array(sink_HF), seen_BP, context, kernel.work_space(T, H, F),
            share.numpy(), sunk.numpy(), mixed.numpy(),
        )  # fmt: skip
        ctx.context = context
        ctx.save_for_backward(qkv, bias, sink_HF, table_2TF, share, sunk)
        return mixed.view(B, T, H * F)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Gradients:
        _once(ctx)
        qkv, bias, sink_HF, table_2TF, share, sunk = ctx.saved_tensors
        kernel, (B, T, _), (H, F) = _attention(), qkv.shape, sink_HF.shape
        g_qkv = _over(qkv)
        g_bias, g_sink = torch.zeros(3, H, F), torch.zeros(H, F)
        kernel.attend_back(
            _array(gradients[0]).reshape(B, T, H, F), qkv.numpy().reshape(B, T, 3, H, F),
            _array(bias).reshape(3, H, F), _array(table_2TF), _array(sink_HF), ctx.context,
            kernel.work_space(T, H, F), share.numpy(), sunk.numpy(),
            g_qkv.numpy().reshape(B, T, 3, H, F), g_bias.numpy(), g_sink.numpy(),
        )  # fmt: skip
        return g_qkv, g_bias.flatten(), g_sink, None, None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, more, bias, scale, shift, epsilon, p = inputs
        assert x.shape == more.shape, "what is compiled asks nothing about sizes"
        total, normed = _over(more), torch.empty(x.shape)
        of_rows = torch.empty(2, x.numel() // x.shape[-1])
        ctx.chance = int(torch.randint(1 << 62, ())), round(p * (1 << 32))
        _in_rows().add(
            _rows(x), _rows(total), _array(bias), _array(scale), _array(shift),
            np.float32(epsilon), *ctx.chance, _rows(normed), of_rows.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(total, of_rows, scale)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Gradients:
        total, of_rows, scale = ctx.saved_tensors
        g_x, g_more = torch.empty_like(total), torch.empty_like(total)
        g_3D = torch.zeros(3, total.shape[-1])
        _in_rows().add_back(
            *map(_rows, gradients), _rows(total), of_rows.numpy(), _array(scale), *ctx.chance,
            _rows(g_x), _rows(g_more), g_3D.numpy(),
        )  # fmt: skip
        return g_x, g_more, *g_3D, None, None


class _Curve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, bias, name = inputs
        slope, out = _over(x), torch.empty(x.shape)
        getattr(_in_rows(), name)(_rows(slope), _array(bias), _rows(out))
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Gradients:
        _once(ctx)
        (slope,) = ctx.saved_tensors
        g_x, g_bias = _over(slope), torch.zeros(slope.shape[-1])
        _in_rows().curve_back(_rows(gradients[0]), _rows(g_x), g_bias.numpy())
        return g_x, g_bias, None


class _Remember(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        gates, gate_bias, values, value_bias, seen_BT, near_BT, longest = inputs
        keep, value, held = _over(gates), _over(values), torch.empty(gates.shape)
        ctx.longest = np.float32(longest)
        _in_rows().remember(
            keep.numpy(), _array(gate_bias), value.numpy(), _array(value_bias),
            _array(seen_BT), _array(near_BT), ctx.longest, held.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(keep, value, seen_BT, near_BT, held)
        return held

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Gradients:
        _once(ctx)
        keep, value, seen_BT, near_BT, held = ctx.saved_tensors
        g_gate, g_value, g_biases = _over(keep), _over(value), torch.zeros(2, keep.shape[-1])
        _in_rows().remember_back(
            _array(gradients[0]), g_gate.numpy(), g_value.numpy(), _array(seen_BT),
            _array(near_BT), ctx.longest, held.numpy(), g_biases.numpy(),
        )  # fmt: skip
        return g_gate, g_biases[0], g_value, g_biases[1], None, None, None
