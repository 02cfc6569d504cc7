"""Each scheme hides exactly what its definition says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.config import MaskingConfig
from offline.losses import loss_of, smeared, spikes_loss
from offline.masking import UNIT_SCHEMES, draw_masks, hide, hide_units
from rt_neds.model.neds import SCHEMES
from rt_neds.model.readout import STEPS, Behaviour, Scale, to_values


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 9999), scheme=st.sampled_from(SCHEMES), ratio=st.floats(0.005, 0.95))
def test_what_each_scheme_hides(seed, scheme, ratio):
    hidden, silenced = hide(scheme, (50, 4), ratio, np.random.default_rng(seed))
    if scheme == "decoding":
        assert hidden[:, 1:].all()
        assert not hidden[:, 0].any()
        assert not silenced.any()
    elif scheme == "encoding":
        assert hidden[:, 0].all()
        assert not hidden[:, 1:].any()
        assert not silenced.any()
    elif scheme == "within_spikes":
        assert not hidden[:, 1:].any()
        assert silenced.tolist() == [False, True, True, True]
    elif scheme == "within_behaviour":
        assert not hidden[:, 0].any()
        assert silenced.tolist() == [True, False, False, False]
    elif scheme == "cross_modal":
        assert (hidden == hidden[:, :1]).all()
        assert not silenced.any()
    else:
        assert silenced.tolist() == [False, True, True, True]
        last = 50 - max(1, round(ratio * 50)) if scheme == "forward" else 50
        assert np.flatnonzero(hidden[:, 0]).tolist() == list(range(last, 50))
        assert not hidden[:, 1:].any()


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 9999),
    scheme=st.sampled_from(UNIT_SCHEMES),
    ratio=st.floats(0.01, 0.95),
    region=st.lists(st.integers(0, 3), min_size=2, max_size=20),
)
def test_what_the_schemes_of_units_hide(seed, scheme, ratio, region):
    region = np.array(region)
    missing, asked = hide_units(scheme, region, ratio, np.random.default_rng(seed))
    assert asked.any()
    assert not (asked & ~missing).any()
    if scheme == "neuron":
        assert (missing == asked).all()
    elif scheme == "inter_region":
        (only,) = np.unique(region[asked])
        assert (asked == (region == only)).all()
        assert (missing == asked).all()
    else:
        (only,) = np.unique(region[asked])
        assert missing[region != only].all()
        assert (missing[region == only] == asked[region == only]).all()


def test_units_are_hidden_by_the_stated_share_and_regions_evenly():
    rng, region = np.random.default_rng(0), np.repeat([0, 1], [4000, 1000])
    _, asked = hide_units("neuron", region, 0.3, rng)
    assert asked.mean() == pytest.approx(0.3, abs=0.02)
    drawn = [hide_units("inter_region", region, 0.3, rng)[1][0] for _ in range(400)]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.08)
    # Of two units one is hidden, where chance would hide none; no other is hidden beside it.
    drawn = [hide_units("neuron", np.zeros(2, int), 0.5, rng)[1].mean() for _ in range(400)]
    assert np.mean(drawn) == pytest.approx(0.25 * 1.0 + 0.75 * 0.5, abs=0.05)


def test_random_schemes_hide_the_stated_share_and_behaviours_independently():
    rng = np.random.default_rng(0)
    hidden, _ = hide("within_behaviour", (20_000, 3), 0.3, rng)
    assert hidden[:, 1:].mean(axis=0) == pytest.approx([0.3, 0.3], abs=0.02)
    assert np.corrcoef(hidden[:, 1], hidden[:, 2])[0, 1] == pytest.approx(0, abs=0.03)
    hidden, _ = hide("forward", (50, 3), 0.005, rng)
    assert np.flatnonzero(hidden[:, 0]).tolist() == [49]  # of any window the last bin, at least
    for scheme in ("within_spikes", "cross_modal"):
        hidden, _ = hide(scheme, (20_000, 3), 0.3, rng)
        assert hidden[:, 0].mean() == pytest.approx(0.3, abs=0.02)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 9999))
def test_asked_is_hidden_and_scored_and_never_shown(seed):
    rng = np.random.default_rng(seed)
    shown, scored = rng.random((2, 8, 30, 4)) < 0.7
    config = MaskingConfig(schemes=dict.fromkeys(SCHEMES, 1.0), ahead=bool(seed % 2))
    masks = draw_masks(config, shown, scored, rng.integers(0, 3, 11), rng)
    by_bins = ~np.isin(masks.scheme_B, [SCHEMES.index(s) for s in UNIT_SCHEMES])
    assert not (masks.asked_BTM & masks.observed_BTM)[by_bins].any()
    assert not (masks.asked_BTM & masks.observed_BTM)[:, :, 1:].any()
    assert not (masks.asked_BTM & ~scored).any()
    assert not (masks.observed_BTM & ~shown).any()
    for b, scheme in enumerate(masks.scheme_B):
        _, silenced = hide(SCHEMES[scheme], (30, 4), config.ratio, rng)
        assert not masks.observed_BTM[b][:, silenced].any()
        assert not masks.asked_BTM[b][:, silenced].any()
        if SCHEMES[scheme] == "decoding":
            assert (masks.asked_BTM[b, :, 1:] == scored[b, :, 1:]).all()
            assert (masks.observed_BTM[b, :, 0] == shown[b, :, 0]).all()
            assert (masks.ahead_BT[b] == (scored[b, :, 0] & config.ahead)).all()
        else:
            assert not masks.ahead_BT[b].any()
        if SCHEMES[scheme] in UNIT_SCHEMES:
            assert (masks.asked_BTM[b, :, 0] == scored[b, :, 0]).all()
            assert (masks.observed_BTM[b, :, 0] == shown[b, :, 0]).all()
            assert not (masks.asked_BN[b] & ~masks.missing_BN[b]).any()
        else:
            assert masks.asked_BN[b].all()


def test_schemes_are_drawn_by_their_weights_and_units_dropped_by_theirs():
    config = MaskingConfig(schemes={"decoding": 3.0, "encoding": 1.0}, unit_dropout=0.2)
    ones = np.ones((4000, 2, 2), bool)
    masks = draw_masks(config, ones, ones, np.zeros(50, int), np.random.default_rng(0))
    assert np.mean(masks.scheme_B == SCHEMES.index("decoding")) == pytest.approx(0.75, abs=0.02)
    assert masks.missing_BN.mean() == pytest.approx(0.2, abs=0.01)
    # Not the same share of each sample: a rig may have lost none, or twice as many.
    spread = np.sqrt(0.4**2 / 12 + np.mean(0.2 - 0.2**2 - 0.4**2 / 12) / 50)
    assert masks.missing_BN.mean(axis=1).std() == pytest.approx(spread, rel=0.1)


def test_losses_by_hand():
    asked = torch.tensor([[True, False, True]])
    target = torch.tensor([[1.0, 99.0, 0.0]])
    scale = Scale(mean=0.0, sd=1.0, low=0.0, high=10.0)  # steps of 0.2 from -1 to 11
    raw = torch.zeros(1, 3, STEPS)
    raw[0, 0, 6] = raw[0, 1, 0] = 2.0
    by_hand = []
    for value, logits in ((1.0, raw[0, 0]), (0.0, raw[0, 2])):
        share = np.exp(-0.5 * ((np.arange(-1.0, 11.01, 0.2) - value) / 0.3) ** 2)
        log_p = logits.log_softmax(0).numpy()
        by_hand.append(-(share / share.sum() * log_p).sum())
    loss = loss_of("continuous", raw, target, asked, scale).item()
    assert loss == pytest.approx(np.mean(by_hand), rel=1e-4)
    log_rate = torch.tensor([[[0.2], [5.0], [-0.3]]])
    by_hand = ((np.exp(0.2) - 0.2) + np.exp(-0.3)) / 2
    assert loss_of("poisson", log_rate, target, asked, Scale()).item() == pytest.approx(
        by_hand, rel=1e-5
    )
    logits = torch.tensor([[[0.0, 1.0], [9.0, 9.0], [2.0, 0.0]]])
    by_hand = (-np.log(np.e / (1 + np.e)) - np.log(np.e**2 / (1 + np.e**2))) / 2
    assert loss_of("categorical", logits, target, asked, Scale()).item() == pytest.approx(
        by_hand, rel=1e-5
    )
    counts = torch.tensor([[[1.0, 0.0], [9.0, 9.0], [0.0, 2.0]]])
    rates = torch.tensor([[[0.1, -0.2], [3.0, 3.0], [0.0, 0.4]]])
    first = np.mean([np.exp(0.1) - 0.1, 1.0])
    second = np.mean([np.exp(-0.2), np.exp(0.4) - 0.8])
    both, rate = torch.ones(1, 2, dtype=torch.bool), torch.tensor([0.5, 2.0])
    by_hand = (first / 0.5 + second / 2.0) / 2
    loss = spikes_loss(rates, counts, asked, both, rate).item()
    assert loss == pytest.approx(by_hand, rel=1e-5)
    loss = spikes_loss(rates, counts, asked, torch.tensor([[False, True]]), rate).item()
    assert loss == pytest.approx(second / 2.0, rel=1e-5)
    twice = [torch.cat([array, array]) for array in (rates, counts, asked)]
    each = torch.tensor([[True, False], [False, True]])  # of each sample its own unit
    twice[0][1] += 1.0
    second = np.mean([np.exp(0.8), np.exp(1.4) - 2 * 1.4])
    loss = spikes_loss(*twice, each, rate).item()
    assert loss == pytest.approx((first / 0.5 + second / 2.0) / 2, rel=1e-5)


def test_a_rate_beyond_those_that_are_published_costs_as_the_last_of_them():
    asked, count = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[3.0]])
    for log_rate, end in ((100.0, 8.0), (-100.0, -12.0)):
        expected = np.exp(end) - 3.0 * end
        raw = torch.tensor([[[log_rate]]])
        assert loss_of("poisson", raw, count, asked, Scale()).item() == pytest.approx(expected)
        loss = spikes_loss(raw, count[None], asked, asked, torch.ones(1)).item()
        assert loss == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["continuous", "poisson", "categorical"])
def test_nothing_asked_costs_nothing_and_still_has_a_gradient(kind):
    raw = torch.randn(2, 3, STEPS, requires_grad=True)
    loss = loss_of(kind, raw, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), Scale())
    loss.backward()
    assert loss.item() == 0
    assert raw.grad.abs().sum() == 0


@pytest.mark.parametrize("pair", [(3.0, 6.0), (0.0, 0.0), (0.0, 1.0), (9.8, 10.0), (0.0, 10.0)])
def test_the_best_answer_states_the_right_mean_and_sd(pair):
    # Two values, as likely: what minimises the loss must be published as their mean and sd.
    scale = Scale(mean=5.0, sd=2.0, low=0.0, high=10.0)
    target = torch.tensor([pair])
    best_C = smeared(target[0], scale).mean(dim=0)
    raw = best_C.clamp_min(1e-30).log()[None, None].expand(1, 2, -1)
    mean, sd = to_values(raw[0, 0].numpy(), Behaviour(name="x", kind="continuous"), scale)
    assert mean == pytest.approx(np.mean(pair), abs=0.01)
    assert sd == pytest.approx(max(np.std(pair), scale.step / 2), abs=0.01)
    worse = raw + 0.1 * torch.randn(STEPS, generator=torch.Generator().manual_seed(0))
    asked = torch.ones(1, 2, dtype=torch.bool)
    lower, higher = (loss_of("continuous", r, target, asked, scale) for r in (raw, worse))
    assert lower < higher


def test_a_behaviour_that_never_changed_is_published_as_it_was():
    scale = Scale(mean=2.0, sd=1e-6, low=2.0, high=2.0)
    raw_C = smeared(torch.tensor([2.0]), scale)[0].clamp_min(1e-30).log()
    values = to_values(raw_C.numpy(), Behaviour(name="x", kind="continuous"), scale)
    assert values == pytest.approx([2.0, 0.0], abs=1e-6)
