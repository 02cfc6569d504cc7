"""The network: stream equals offline, the future cannot be seen, hidden means hidden."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_neds.model.attention import rotary_table, visible
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS, SCHEMES, SPIKES
from rt_neds.model.readin import (
    PLACES,
    CategoricalReadIn,
    ContinuousReadIn,
    SpikeReadIn,
    boxcar_sums,
)
from rt_neds.model.readout import STEPS, Behaviour, Scale, to_values, to_values_TV

BEHAVIOURS = (
    Behaviour(name="speed", kind="continuous", unit="rad/s"),
    Behaviour(name="choice", kind="categorical", classes=("left", "right")),
    Behaviour(name="licks", kind="poisson"),
)
UNITS = {"a": 7, "b": 12}


def random_model(seed: int = 0, **options) -> NEDS:
    """A small network with every parameter drawn, so that nothing is hidden behind a zero."""
    torch.manual_seed(seed)
    sizes = {"dim": 32, "layers": 3, "heads": 2, "context": 6, "history": (1, 3), "dropout": 0.3}
    model = NEDS(ModelConfig(**{**sizes, **options}), BEHAVIOURS, UNITS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for parts in model.sessions:
            parts.spikes_in.mean_KN.uniform_(0, 1)
            parts.spikes_in.sd_KN.uniform_(0.5, 2)
    return model


def random_inputs(session: str, bins: int, seed: int = 0, batch: int = 1, shown: float = 0.6):
    """Counts, values, what is observed, and schemes."""
    rng = torch.Generator().manual_seed(seed)
    counts = torch.poisson(torch.full((batch, bins, UNITS[session]), 0.7), generator=rng)
    values = torch.randn(batch, bins, 1 + len(BEHAVIOURS), generator=rng)
    values[..., 2] = (values[..., 2] > 0).float()
    observed = torch.rand(batch, bins, 1 + len(BEHAVIOURS), generator=rng) < shown
    scheme = torch.randint(len(SCHEMES), (batch,), generator=rng)
    return counts, values, observed, scheme


def stream(model, session, counts, values, observed, scheme, chunks, first_bin=0, **options):
    """Outputs of ``step`` over the whole sequence, cut as told."""
    state = model.start(
        session,
        batch=len(counts),
        first_bin=first_bin,
        chunk=max(chunks),
    )
    pieces, at = [], 0
    for size in chunks:
        cut = slice(at, at + size)
        pieces.append(
            model.step(
                session, state, counts[:, cut], values[:, cut], observed[:, cut], scheme, **options
            )
        )
        at += size
    assert at == counts.shape[1]
    return {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]}


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    session=st.sampled_from(["a", "b"]),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    context=st.integers(1, 8),
    first_bin=st.sampled_from([0, 5, 123_456_789]),
    memory=st.sampled_from([0, 2, 30]),
)
def test_stream_equals_offline(seed, session, chunks, context, first_bin, memory):
    model = random_model(seed, context=context, memory=memory)
    inputs = random_inputs(session, sum(chunks), seed, batch=2)
    missing = torch.rand(2, 1, UNITS[session]) < 0.3
    with torch.no_grad():
        offline = model(session, *inputs, missing_BTN=missing)
    streamed = stream(model, session, *inputs, chunks, first_bin, missing_BTN=missing)
    assert offline.keys() == streamed.keys() == set(model.modalities)
    for name in offline:
        torch.testing.assert_close(streamed[name], offline[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("memory", [0, 50])
def test_stream_equals_offline_after_1e5_bins(memory):
    # The receptive field is finite, so the offline run needs only the end of the long stream.
    model = random_model(dim=16, layers=2, context=8, memory=memory)
    bins, chunk = 100_000, 500
    counts, values, observed, scheme = random_inputs("a", bins)
    state = model.start("a", chunk=chunk)
    for at in range(0, bins - 10, chunk):
        cut = slice(at, min(at + chunk, bins - 10))
        model.step("a", state, counts[:, cut], values[:, cut], observed[:, cut], scheme)
    tail = {}
    for at in range(bins - 10, bins):
        cut = slice(at, at + 1)
        out = model.step("a", state, counts[:, cut], values[:, cut], observed[:, cut], scheme)
        for name, raw in out.items():
            tail.setdefault(name, []).append(raw)
    need = model.config.receptive_field + 10
    cut = slice(bins - need, bins)
    with torch.no_grad():
        offline = model("a", counts[:, cut], values[:, cut], observed[:, cut], scheme)
    for name, raws in tail.items():
        torch.testing.assert_close(
            torch.cat(raws, dim=1), offline[name][:, -10:], atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("context", [1, 3])
def test_a_bin_looks_at_itself_and_the_last_of_its_context_and_at_no_later_one(context):
    band = visible(torch.arange(5, 9), torch.arange(12), context, causal=True)
    for row, query in zip(band.tolist(), range(5, 9), strict=True):
        assert [s for s in range(12) if row[s]] == list(range(query - context + 1, query + 1))
    assert visible(torch.arange(5, 9), torch.arange(12), context, causal=False).all()


def test_receptive_field_is_what_it_says():
    model = random_model()
    bins = model.config.receptive_field + 5
    counts, values, observed, scheme = random_inputs("a", bins, shown=1.1)
    field = model.config.receptive_field
    with torch.no_grad():
        whole = model("a", counts, values, observed, scheme)["speed"][0, -1]
        cut = model("a", counts[:, -field:], values[:, -field:], observed[:, -field:], scheme)
        short = model(
            "a",
            counts[:, -field + 1 :],
            values[:, -field + 1 :],
            observed[:, -field + 1 :],
            scheme,
        )
    torch.testing.assert_close(cut["speed"][0, -1], whole, atol=1e-5, rtol=1e-5)
    assert (short["speed"][0, -1] - whole).abs().max() > 1e-7


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    at=st.integers(1, 29),
    tokens=st.sampled_from(["bin", "modality"]),
    memory=st.sampled_from([0, 20]),
)
def test_poking_the_future_changes_nothing_before_it(seed, at, tokens, memory):
    model = random_model(seed, tokens=tokens, memory=memory)
    counts, values, observed, scheme = random_inputs("b", 30, seed)
    poked = counts.clone(), values.clone(), observed.clone()
    poked[0][:, at:] += 3
    poked[1][:, at:, [1, 3]] -= 2.0
    poked[1][:, at:, 2] = 1 - poked[1][:, at:, 2]
    poked[2][:, at:] = ~poked[2][:, at:]
    if tokens == "bin":  # which tokens exist must not leak either; compare all outputs
        poked[2][:, at] = True
    with torch.no_grad():
        before = model("b", counts, values, observed, scheme)
        after = model("b", *poked, scheme)
    for name in before:
        torch.testing.assert_close(after[name][:, :at], before[name][:, :at], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(after[name][:, at:], before[name][:, at:], atol=1e-5)


def test_full_attention_does_see_the_future():
    model = random_model(attention="full")
    counts, values, observed, scheme = random_inputs("a", 30, shown=1.1)
    with torch.no_grad():
        before = model("a", counts, values, observed, scheme)["speed"][:, :10]
        counts[:, 20:] += 3
        after = model("a", counts, values, observed, scheme)["speed"][:, :10]
    assert (before - after).abs().max() > 1e-6


@pytest.mark.parametrize("tokens", ["bin", "modality"])
def test_what_is_hidden_has_no_influence(tokens):
    model = random_model(tokens=tokens)
    counts, values, observed, scheme = random_inputs("a", 25)
    poked_counts = torch.where(observed[:, :, :1], counts, counts + 5)
    poked_values = torch.where(observed, values, 1 - values)
    with torch.no_grad():
        one = model("a", counts, values, observed, scheme)
        two = model("a", poked_counts, poked_values, observed, scheme)
    for name in one:
        torch.testing.assert_close(one[name], two[name])


@pytest.mark.parametrize("tokens", ["bin", "modality"])
def test_a_bin_that_shows_behaviour_alone_is_seen_by_later_ones(tokens):
    model = random_model(tokens=tokens)
    counts, values, observed, scheme = random_inputs("a", 12, shown=0.0)
    observed[:, 5, 1] = True
    poked = values.clone()
    poked[:, 5, 1] += 2.0
    with torch.no_grad():
        before, after = (model("a", counts, v, observed, scheme)[SPIKES] for v in (values, poked))
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before - after)[:, 5:8].abs().amax(dim=2) > 1e-5).all()


def test_a_hidden_modality_is_a_token_that_others_see():
    model = random_model(tokens="modality")
    counts, values, observed, scheme = random_inputs("a", 12)
    observed[:, :, 2] = False
    with torch.no_grad():
        before = model("a", counts, values, observed, scheme)["speed"]
        model.modality_MD[2] += torch.randn(32)
        after = model("a", counts, values, observed, scheme)["speed"]
    assert (before - after).abs().max() > 1e-4


def test_counts_before_the_first_bin_feed_its_running_sums():
    model = random_model(context=1)  # so that no token sees another
    counts, values, observed, scheme = random_inputs("a", 20, shown=1.1)
    with torch.no_grad():
        whole = model("a", counts, values, observed, scheme)
        late = model("a", counts[:, 5:], values[:, 7:], observed[:, 7:], scheme)
        lacking = model("a", counts[:, 7:], values[:, 7:], observed[:, 7:], scheme)
    for name, raw in late.items():
        torch.testing.assert_close(raw, whole[name][:, 7:])
        assert not torch.allclose(lacking[name][:, 0], raw[:, 0])


@pytest.mark.parametrize("tokens", ["bin", "modality"])
def test_asking_for_less_changes_nothing(tokens):
    model = random_model(tokens=tokens)
    counts, values, observed, scheme = random_inputs("a", 25)
    observed[:, :, 1:] = False
    with torch.no_grad():
        everything = model("a", counts, values, observed, scheme)
        one = model("a", counts, values, observed, scheme, wanted=["choice"])
    assert set(one) == {"choice"}
    torch.testing.assert_close(one["choice"], everything["choice"], atol=1e-6, rtol=1e-5)


def test_a_missing_unit_is_neither_silent_nor_read():
    model = random_model()
    counts, values, observed, scheme = random_inputs("a", 25, shown=1.1)
    missing = torch.zeros(1, 1, UNITS["a"], dtype=torch.bool)
    missing[..., 3] = True
    other, silent = counts.clone(), counts.clone()
    other[..., 3] += 4
    silent[..., 3] = 0
    with torch.no_grad():
        out = model("a", counts, values, observed, scheme, missing_BTN=missing)[SPIKES]
        same = model("a", other, values, observed, scheme, missing_BTN=missing)[SPIKES]
        not_same = model("a", silent, values, observed, scheme)[SPIKES]
    torch.testing.assert_close(out, same)
    assert (out - not_same).abs().max() > 1e-4


def test_sessions_with_equal_unit_counts_do_not_share():
    model = NEDS(ModelConfig(dim=16, layers=1, heads=2), BEHAVIOURS, {"a": 5, "b": 5}).eval()
    counts = torch.ones(1, 4, 5)
    values = torch.zeros(1, 4, 4)
    observed = torch.ones(1, 4, 4, dtype=torch.bool)
    scheme = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        a = model("a", counts, values, observed, scheme)[SPIKES]
        b = model("b", counts, values, observed, scheme)[SPIKES]
    assert (a - b).abs().max() > 1e-3


def test_a_stream_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match="causal"):
        random_model(attention="full").start("a")
    with pytest.raises(ValueError, match="tokens"):
        random_model(tokens="modality").start("a")


@torch.no_grad()
def test_what_enters_is_what_is_written():
    spikes_in = SpikeReadIn(2, 3, (1, 2))
    spikes_in.mean_KN.copy_(torch.tensor([[0.5, 1.0], [0.0, 0.25]]))
    spikes_in.sd_KN.copy_(torch.tensor([[2.0, 4.0], [0.5, 1.0]]))
    spikes_in.missing_KN.copy_(torch.tensor([[7.0, 8.0], [9.0, 10.0]]))
    counts = torch.tensor([[[4.0, 0.0], [5.0, 1.0]]])
    first = [(2 - 0.5) / 2, (0 - 1.0) / 4, (2 - 0.0) / 0.5, (0 - 0.25) / 1]
    then = [(5**0.5 - 0.5) / 2, (1 - 1.0) / 4, (3 - 0.0) / 0.5, (1 - 0.25) / 1]
    torch.testing.assert_close(spikes_in.standardise(counts), torch.tensor([[first, then]]))
    second_is_missing = torch.tensor([[[False, True]]])
    first[1::2], then[1::2] = [8.0, 10.0], [8.0, 10.0]
    found = spikes_in.standardise(counts, second_is_missing)
    torch.testing.assert_close(found, torch.tensor([[first, then]]))

    value_in = ContinuousReadIn(1 + PLACES)
    value_in.linear.weight.copy_(torch.eye(1 + PLACES))
    value_in.linear.bias.zero_()
    (itself, *near), (far, *at_the_end) = value_in(torch.tensor([[0.25, 3.0]]))[0].tolist()
    assert (itself, far) == (0.25, 3.0)
    assert near == pytest.approx([math.exp(-0.5 * (j - 13) ** 2) for j in range(25)], abs=1e-6)
    assert at_the_end == pytest.approx([math.exp(-0.5 * (j - 24) ** 2) for j in range(25)])

    class_in = CategoricalReadIn(3, 4)
    found = class_in(torch.tensor([[2.0, 0.0]]))[0]
    assert torch.equal(found, class_in.embedding.weight[[2, 0]])


def test_boxcar_sums_against_a_loop():
    counts = torch.poisson(torch.full((2, 40, 3), 1.5))
    sums = boxcar_sums(counts, (1, 4, 9))
    for k, width in enumerate((1, 4, 9)):
        for t in range(40):
            expected = counts[:, max(0, t - width + 1) : t + 1].sum(dim=1)
            assert torch.equal(sums[:, t, k], expected)


def test_rotary_angles_keep_their_precision_for_days():
    bins = np.array([10_000_000, 10_000_001])
    table = rotary_table(bins, 32).double()
    relative = torch.atan2(table[1], table[0])
    frequency = 10_000.0 ** -(np.arange(0, 32, 2) / 32)
    step = np.exp(1j * (relative[1] - relative[0]).numpy())
    np.testing.assert_allclose(step, np.exp(1j * frequency), atol=1e-6)


def test_published_values_by_hand_and_in_bulk():
    scale = Scale(mean=10.0, sd=2.0, low=7.0, high=12.0)  # steps of 0.1 from 6.5 to 12.5
    raw = torch.full((3, STEPS), -30.0)
    raw[0, 10] = 0.0  # sure of one step
    raw[1, 10] = raw[1, 40] = 5.0  # torn between two
    raw[2] = 0.0  # no idea
    many = to_values_TV(raw, BEHAVIOURS[0], scale)
    smear = (1.5 * 0.1) ** 2
    expected = [
        [7.5, 0.05],
        [9.0, np.sqrt(1.5**2 - smear)],
        [9.5, np.sqrt(0.1**2 * (61**2 - 1) / 12 - smear)],
    ]
    torch.testing.assert_close(many, torch.tensor(expected).float(), atol=1e-4, rtol=1e-4)
    for row, values in zip(raw.numpy(), many.tolist(), strict=True):
        assert to_values(row, BEHAVIOURS[0], scale) == pytest.approx(values, rel=1e-4)
    logits = torch.tensor([[0.0, np.log(3.0)]], dtype=torch.float32)
    assert to_values(logits[0].numpy(), BEHAVIOURS[1], Scale()) == pytest.approx([0.25, 0.75])
    torch.testing.assert_close(
        to_values_TV(logits, BEHAVIOURS[1], Scale()), torch.tensor([[0.25, 0.75]])
    )


@pytest.mark.parametrize("tokens", ["bin", "modality"])
@pytest.mark.parametrize("shown", [0.0, 0.5, 1.0])
def test_tokens_are_made_as_they_are_meant(tokens, shown):
    model = random_model(tokens=tokens)
    counts, values, observed, scheme = random_inputs("a", 12, batch=3, shown=shown)
    z, said = model._features("a", counts, observed, None, None, 0)
    x, seen = model._tokens("a", z, said, values, observed, scheme)
    about = model.session_XD[model.session_ids.index("a")] + model.scheme_XD[scheme][:, None]
    dark, each = model.hidden_D + model.modality_MD, []
    for m in range(len(model.modalities)):
        token = dark[m].expand(3, 12, -1)
        if observed[:, :, m].any():
            token = model._token(m, "a", z, said, values) + model.modality_MD[m]
        each.append(torch.where(observed[:, :, m, None], token, dark[m]))
    if tokens == "modality":
        expected, expected_seen = torch.stack(each, dim=2), torch.ones_like(observed)
    else:
        shown_BTM1, all_BTMD = observed[..., None], torch.stack(each, dim=2)
        expected = model.hidden_D + torch.where(shown_BTM1, all_BTMD, 0.0).sum(2)[:, :, None]
        expected_seen = observed.any(2, keepdim=True)
    torch.testing.assert_close(x, expected + about[:, :, None], atol=1e-5, rtol=1e-5)
    assert torch.equal(seen, expected_seen)
