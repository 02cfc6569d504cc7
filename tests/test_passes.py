"""The passes of training equal the lines of PyTorch that they stand for; dropout is left to chance.

Those lines run wherever the passes do not pay, so a network made to believe that is the slow twin.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rt_neds.model import passes
from rt_neds.model.attention import Attention, rotary_table
from rt_neds.model.config import ModelConfig
from rt_neds.model.memory import Memory, in_sight
from rt_neds.model.neds import Layer
from tests.test_model import random_inputs, random_model


@pytest.fixture
def in_pytorch(monkeypatch):
    """A function that gives what another gives without the passes."""

    def run(function, *arguments):
        with monkeypatch.context() as patched:
            patched.setattr(passes, "pay", lambda module, x: False)
            return function(*arguments)

    return run


def with_gradients(outputs, inputs, seed: int = 0):
    """Outputs, and gradients of a random sum of them."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(out.shape, generator=rng) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights, allow_unused=True)]


def assert_close(ours, theirs, within: float = 2e-5, least: float = 1e-3):
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            size = float(other.detach().abs().max()) if other.numel() else 1.0
            torch.testing.assert_close(one, other, rtol=0, atol=within * max(size, least))


def slow_attention(attention: Attention, x_BTD, table_2TF, seen_BT, context: int):
    """One query, one head and one window after the other, in float64."""
    (B, T, D), H = x_BTD.shape, attention.heads
    F = D // H
    q, k, v = attention.qkv(x_BTD).double().view(B, T, 3, H, F).unbind(2)
    cos_TF, sin_TF = table_2TF.double()

    def turned(x_BTHF):
        a, b = x_BTHF.chunk(2, dim=-1)
        cos, sin = cos_TF[:, None], sin_TF[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    q, k, rows = turned(q), turned(k), []
    for b in range(B):
        for t in range(T):
            reach = range(T) if context == 0 else range(max(0, t - context + 1), t + 1)
            keys = [s for s in reach if seen_BT[b, s]]
            for h in range(H):
                scores = torch.cat([k[b, keys, h] @ q[b, t, h] / F**0.5, q.new_zeros(1)])
                values = torch.cat([v[b, keys, h], attention.sink_value_HF[None, h].double()])
                rows.append(scores.softmax(dim=0) @ values)
    return torch.stack(rows).view(B, T, D).float()


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.integers(1, 20)),
    context=st.integers(0, 45),
    shown=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_attention_of_any_shape(sizes, context, shown, seed):
    torch.manual_seed(seed)
    B, T, H, half = sizes
    attention = Attention(2 * half * H, H).train()
    nn.init.normal_(attention.sink_value_HF)
    x_BTD = torch.randn(B, T, 2 * half * H, requires_grad=True)
    table_2TF, seen_BT = rotary_table(range(7, T + 7), 2 * half), torch.rand(B, T) < shown
    inputs = [x_BTD, attention.qkv.weight, attention.qkv.bias, attention.sink_value_HF]
    ours = passes.attended(
        x_BTD, attention.qkv, attention.sink_value_HF, table_2TF, seen_BT, context
    )
    theirs = slow_attention(attention, x_BTD, table_2TF, seen_BT, context)
    assert_close(with_gradients(ours, inputs), with_gradients(theirs, inputs))


@pytest.mark.parametrize(("bins", "context"), [(100, 100), (250, 75), (70, 0), (33, 33)])
def test_attention_as_it_is_trained(bins, context, in_pytorch):
    torch.manual_seed(0)
    attention = Attention(64, 2).train()
    x_BTMD = torch.randn(2, bins, 1, 64, requires_grad=True)
    seen_BTM = torch.rand(2, bins, 1) < 0.9
    inputs = [x_BTMD, *attention.qkv.parameters(), attention.sink_value_HF]

    def run():
        table_2TF = rotary_table(range(bins), 32)
        return attention.sequence(
            x_BTMD, table_2TF, seen_BTM, [0], context or bins, causal=context > 0
        )

    theirs = with_gradients(in_pytorch(run), inputs)
    assert_close(with_gradients(run(), inputs), theirs)


def test_large_scores_neither_overflow_nor_vanish():
    torch.manual_seed(0)
    attention = Attention(8, 1).train()
    x_BTD = 100 * torch.randn(1, 20, 8, requires_grad=True)
    arguments = x_BTD, rotary_table(range(20), 8), torch.ones(1, 20, dtype=torch.bool), 5
    ours = passes.attended(x_BTD, attention.qkv, attention.sink_value_HF, *arguments[1:])
    theirs = slow_attention(attention, *arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 20), dim=st.integers(9, 70), inner=st.integers(1, 50))
def test_sum_and_norm_of_any_shape(rows, dim, inner):
    torch.manual_seed(0)
    linear, norm = nn.Linear(inner, dim), nn.LayerNorm(dim)
    nn.init.normal_(norm.weight)
    x, more = torch.randn(rows, dim, requires_grad=True), torch.randn(rows, inner)
    more.requires_grad_()
    total = x + linear(more)
    inputs = [x, more, *linear.parameters(), *norm.parameters()]
    ours = passes.added_and_normed(x, more, linear, 0.0, norm)
    assert_close(with_gradients(ours, inputs), with_gradients((total, norm(total)), inputs))


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 20), dim=st.integers(9, 70), wide=st.booleans())
def test_tokens_and_their_norm(rows, dim, wide):
    torch.manual_seed(0)
    norm, one = nn.LayerNorm(dim), torch.randn(1 if wide else rows, dim, requires_grad=True)
    nn.init.normal_(norm.weight)
    inputs = [one, *norm.parameters()]
    total = one.expand(rows, dim) + 0.0
    theirs = with_gradients((total, norm(total)), inputs)
    x = one.expand(rows, dim) if wide else one + 0.0
    assert_close(with_gradients(passes.dropped_and_normed(x, 0.0, norm), inputs), theirs)


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    shown=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_memory_of_any_shape(sizes, shown, seed):
    torch.manual_seed(seed)
    (B, T, D), memory = sizes, Memory(sizes[2], 20).train()
    nn.init.normal_(memory.gate.bias, std=3.0)
    x_BTMD, seen_BTM = torch.randn(B, T, 1, D, requires_grad=True), torch.rand(B, T, 1) < shown
    inputs = [x_BTMD, *memory.gate.parameters(), *memory.value.parameters()]

    def run():
        held = memory.sequence(x_BTMD, seen_BTM, in_sight(seen_BTM, 3))
        return with_gradients(held, inputs)

    ours = run()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passes, "pay", lambda module, x: False)
        assert_close(ours, run(), least=0.1)  # a sum may all but vanish


@pytest.mark.parametrize("name", ["gelu", "softsign"])
@settings(deadline=None, max_examples=25)
@given(rows=st.integers(0, 20), dim=st.integers(1, 70), inner=st.integers(1, 50))
def test_curves_of_any_shape(name, rows, dim, inner):
    torch.manual_seed(0)
    linear, x = nn.Linear(inner, dim), torch.randn(2, rows, inner, requires_grad=True)
    inputs = [x, *linear.parameters()]
    theirs = getattr(nnf, name)(linear(x))
    ours = getattr(passes, name)(x, linear)
    assert_close(with_gradients(ours, inputs), with_gradients(theirs, inputs), least=0.1)


@pytest.mark.parametrize("name", ["gelu", "softsign"])
def test_curves_and_slopes_everywhere(name):
    x = torch.cat([torch.linspace(-15, 15, 100_001), torch.tensor([-1e30, -40.0, 0.0, 40.0, 1e30])])
    x = x[:, None].requires_grad_()
    linear = nn.Linear(1, 1)
    nn.init.ones_(linear.weight)
    nn.init.zeros_(linear.bias)
    y = getattr(passes, name)(x, linear)
    exact = x.detach().double().requires_grad_()
    z = getattr(nnf, name)(exact)
    (slope,), (steep,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(z.sum(), exact)
    torch.testing.assert_close(y.double(), z, rtol=2e-7, atol=6e-7)
    torch.testing.assert_close(slope.double(), steep, rtol=2e-7, atol=6e-7)


@pytest.mark.parametrize("name", ["gelu", "softsign"])
def test_what_is_no_number_stays_none(name):
    x, linear = torch.zeros(2, 3), nn.Linear(3, 40)
    x[1, 1] = torch.nan
    y = getattr(passes, name)(x, linear)
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1]).all()


def test_no_graph_goes_backwards_twice():
    x, linear = torch.randn(3, 8), nn.Linear(8, 8)
    attention, table = Attention(8, 1), rotary_table(range(3), 8)
    seen_BT = torch.ones(1, 3, dtype=torch.bool)
    for out in (
        passes.gelu(x, linear),
        passes.attended(x[None], attention.qkv, attention.sink_value_HF, table, seen_BT, 3),
    ):
        out.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="backwards once"):
            out.sum().backward()


@pytest.mark.parametrize("options", [{}, {"memory": 8}, {"attention": "full"}, {"context": 40}])
def test_a_network_in_training(options, in_pytorch):
    model = random_model(dropout=0.0, **options).train()
    arguments = "a", *random_inputs("a", 25, batch=3)
    wanted = ("speed", "choice") if options.get("attention") else ("speed", "choice", "ahead")

    def run():
        model.zero_grad()
        outputs = model(*arguments, wanted=wanted)
        sum((out * torch.arange(out.shape[-1])).sin().mean() for out in outputs.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [*outputs.values(), *(g.clone() for g in gradients)]

    assert_close(run(), in_pytorch(run), within=1e-4)


def test_nothing_wanted_is_nothing_given():
    assert random_model().train()("a", *random_inputs("a", 5), wanted=()) == {}


def test_what_differs_in_size_is_not_added():
    linear, norm = nn.Linear(8, 8), nn.LayerNorm(8)
    with pytest.raises(AssertionError):
        passes.added_and_normed(torch.zeros(2, 8), torch.zeros(3, 8), linear, 0.0, norm)


def test_training_sees_no_future():
    model = random_model(dropout=0.0).train()
    counts, values, observed, scheme = random_inputs("a", 30)
    before = model("a", counts, values, observed, scheme)
    counts[:, 20:] += 5
    after = model("a", counts, values, observed, scheme)
    for name in before:
        assert torch.equal(before[name][:, :20], after[name][:, :20])


# -- dropout -------------------------------------------------------------------------------------


def dropped(p: float, rows: int = 1000, dim: int = 512):
    """Which numbers were dropped; and what became of the others."""
    linear, norm = nn.Linear(1, dim), nn.LayerNorm(dim)
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, 3.0)
    total, _ = passes.added_and_normed(
        torch.zeros(rows, dim), torch.zeros(rows, 1), linear, p, norm
    )
    total = total.detach()
    return total == 0, total[total != 0]


@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.999])
def test_drops_as_many_as_it_says_and_keeps_the_mean(p):
    torch.manual_seed(0)
    gone, rest = dropped(p)
    sd = (p * (1 - p) / gone.numel()) ** 0.5
    assert abs(float(gone.float().mean()) - p) < 5 * sd
    torch.testing.assert_close(rest, torch.full_like(rest, 3 / (1 - p)), rtol=1e-5, atol=0)


def test_numbers_rows_and_draws_are_dropped_apart():
    torch.manual_seed(0)
    one, two = (dropped(0.5)[0].float() for _ in range(2))
    n, shifts = one.numel(), [(0, 1), (0, 2), (0, 16), (1, 0), (2, 0), (1, 1), (1, -1), (0, 256)]
    pairs = [(one, one.roll(shift, (0, 1))) for shift in shifts]
    pairs += [(one, two.roll(shift, (0, 1))) for shift in [(0, 0), *shifts]]
    for x, y in pairs:
        correlation = float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])
        assert abs(correlation) < 5 / n**0.5


def test_as_many_of_each_row_and_column():
    torch.manual_seed(0)
    gone = dropped(0.4)[0].float()
    for axis, count in ((0, len(gone)), (1, gone.shape[1])):
        share = gone.mean(dim=axis)
        chi2 = float(((share - 0.4) ** 2).sum() / (0.4 * 0.6 / count))
        degrees = len(share)
        assert abs(chi2 - degrees) < 5 * (2 * degrees) ** 0.5


def test_gradients_go_where_numbers_went():
    torch.manual_seed(0)
    linear, norm, x = nn.Linear(9, 13), nn.LayerNorm(13), torch.randn(50, 13, requires_grad=True)
    more = torch.randn(50, 9)
    total, _ = passes.added_and_normed(x, more, linear, 0.4, norm)
    factor = (total - x).detach() / linear(more).detach()  # 0, or what the rest is scaled up by
    inputs = [x, *linear.parameters()]
    ours = torch.autograd.grad(total, inputs, torch.ones_like(total))
    theirs = torch.autograd.grad(x + factor * linear(more), inputs, torch.ones_like(total))
    assert_close(ours, theirs)


def test_the_same_seed_drops_the_same():
    gone = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        gone.append(dropped(0.3)[0])
    assert torch.equal(gone[0], gone[1])
    assert not torch.equal(gone[0], gone[2])


# -- where they run ------------------------------------------------------------------------------


def test_pay_only_in_training_on_a_cpu_in_float32(monkeypatch):
    layer, x = Layer(ModelConfig()), torch.zeros(1)
    assert passes.pay(layer.train(), x)
    assert not passes.pay(layer, x.double())
    assert not passes.pay(layer, torch.zeros(1, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not passes.pay(layer, x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: passes.MOST_THREADS + 1)
    assert not passes.pay(layer, x)
    monkeypatch.undo()
    assert not passes.pay(layer.eval(), x)


def test_a_network_that_does_not_train_needs_no_compiler():
    code = (
        "import sys, torch\n"
        "from tests.test_model import random_inputs, random_model\n"
        "model = random_model()\n"
        "model('a', *random_inputs('a', 5))\n"
        "print('numba' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"


def test_what_two_files_of_passes_each_have_is_the_same():
    from inspect import getsource

    from rt_neds.model import passes_attention, passes_rows

    assert getsource(passes_attention._exp2.py_func) == getsource(passes_rows._exp2.py_func)
    assert passes_attention._EXP2 == passes_rows._EXP2
