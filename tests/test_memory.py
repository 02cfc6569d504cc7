"""The memory: its definition bin by bin, what it outlasts, and what makes it forget."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_neds.model.memory import ROUNDING, Memory, in_sight

DIM, CONTEXT = 6, 3


def drawn(span: int = 20) -> Memory:
    torch.manual_seed(0)
    memory = Memory(DIM, span).eval()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return memory


def bin_by_bin(memory: Memory, x_BTMD: torch.Tensor, seen_BTM: torch.Tensor) -> torch.Tensor:
    """The definition, the slow way."""
    B, T, M, _ = x_BTMD.shape
    out = torch.zeros_like(x_BTMD)
    for b in range(B):
        for m in range(M):
            held, dark = torch.zeros(DIM), 0
            for t in range(T):
                dark = 0 if seen_BTM[b, t, m] else dark + 1
                if dark >= CONTEXT:
                    held = torch.zeros(DIM)
                if seen_BTM[b, t, m]:
                    normed = memory.norm(x_BTMD[b, t, m])
                    keep = memory.longest * torch.sigmoid(memory.gate(normed))
                    held = keep * held + (1 - keep) * memory.value(normed)
                out[b, t, m] = held
    return out


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 9999),
    bins=st.integers(1, 40),
    shown=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    cut=st.integers(0, 40),
)
def test_equals_its_definition_in_one_piece_and_in_two(seed, bins, shown, cut):
    memory, rng = drawn(), torch.Generator().manual_seed(seed)
    x = torch.randn(2, bins, 2, DIM, generator=rng)
    seen = torch.rand(2, bins, 2, generator=rng) < shown
    near = in_sight(seen, CONTEXT)
    with torch.no_grad():
        whole = memory.sequence(memory.norm(x), seen, near)
        torch.testing.assert_close(whole, bin_by_bin(memory, x, seen), atol=1e-5, rtol=1e-5)
        cut = min(cut, bins - 1)
        if cut:
            first = memory.sequence(memory.norm(x[:, :cut]), seen[:, :cut], near[:, :cut])
            rest = memory.sequence(
                memory.norm(x[:, cut:]), seen[:, cut:], near[:, cut:], first[:, -1]
            )
            torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)


@pytest.mark.parametrize("context", [1, 4])
def test_in_sight_is_any_of_the_last_bins(context):
    seen = torch.from_numpy(np.random.default_rng(0).random((3, 30, 2)) < 0.2)
    near = in_sight(seen, context)
    for t in range(30):
        assert torch.equal(near[:, t], seen[:, max(0, t - context + 1) : t + 1].any(dim=1))


def test_it_outlasts_the_context_and_ends_where_it_says():
    span = 20
    memory = drawn(span)
    with torch.no_grad():
        memory.gate.weight.zero_()
        memory.gate.bias.fill_(20.0)  # it keeps all it may
        x, seen = torch.randn(1, 400, 1, DIM), torch.ones(1, 400, 1, dtype=torch.bool)
        other = x.clone()
        other[:, 0] = torch.randn(1, 1, DIM)
        gap = (
            (
                memory.sequence(memory.norm(x), seen, seen)
                - memory.sequence(memory.norm(other), seen, seen)
            )
            .abs()
            .amax(3)
        )
    assert gap[0, 5 * CONTEXT] > 0.2 * gap[0, 0]
    assert gap[0, ROUNDING * span] < 2e-7 * gap[0, 0]
