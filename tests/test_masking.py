"""Each scheme hides exactly what its definition says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.config import MaskingConfig
from offline.losses import loss_of, spikes_loss
from offline.masking import draw_masks, hide
from rt_neds.model.neds import SCHEMES


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 9999), scheme=st.sampled_from(SCHEMES), ratio=st.floats(0.05, 0.95))
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
    else:
        assert (hidden == hidden[:, :1]).all()
        assert not silenced.any()


def test_random_schemes_hide_the_stated_share_and_behaviours_independently():
    rng = np.random.default_rng(0)
    hidden, _ = hide("within_behaviour", (20_000, 3), 0.3, rng)
    assert hidden[:, 1:].mean(axis=0) == pytest.approx([0.3, 0.3], abs=0.02)
    assert np.corrcoef(hidden[:, 1], hidden[:, 2])[0, 1] == pytest.approx(0, abs=0.03)
    hidden, _ = hide("within_spikes", (20_000, 3), 0.3, rng)
    assert hidden[:, 0].mean() == pytest.approx(0.3, abs=0.02)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 9999))
def test_asked_is_hidden_and_scored_and_never_shown(seed):
    rng = np.random.default_rng(seed)
    shown, scored = rng.random((2, 8, 30, 4)) < 0.7
    config = MaskingConfig(schemes=dict.fromkeys(SCHEMES, 1.0))
    masks = draw_masks(config, shown, scored, 11, rng)
    assert not (masks.asked_BTM & masks.observed_BTM).any()
    assert not (masks.asked_BTM & ~scored).any()
    assert not (masks.observed_BTM & ~shown).any()
    for b, scheme in enumerate(masks.scheme_B):
        if SCHEMES[scheme] == "decoding":
            assert (masks.asked_BTM[b, :, 1:] == scored[b, :, 1:]).all()
            assert (masks.observed_BTM[b, :, 0] == shown[b, :, 0]).all()


def test_schemes_are_drawn_by_their_weights_and_units_dropped_by_theirs():
    config = MaskingConfig(schemes={"decoding": 3.0, "encoding": 1.0}, unit_dropout=0.2)
    ones = np.ones((4000, 2, 2), bool)
    masks = draw_masks(config, ones, ones, 50, np.random.default_rng(0))
    assert np.mean(masks.scheme_B == SCHEMES.index("decoding")) == pytest.approx(0.75, abs=0.02)
    assert masks.missing_BN.mean() == pytest.approx(0.2, abs=0.01)


def test_losses_by_hand():
    asked = torch.tensor([[True, False, True]])
    target = torch.tensor([[1.0, 99.0, 0.0]])
    raw = torch.tensor([[[0.5, 0.0], [7.0, 7.0], [1.0, np.log(4.0)]]], dtype=torch.float32)
    residual = np.array([0.25, 1.0])
    by_hand = (
        0.5 * residual.mean() + (0.5 * (0 + residual[0]) + 0.5 * (np.log(4) + residual[1] / 4)) / 2
    )
    assert loss_of("gaussian", raw, target, asked).item() == pytest.approx(by_hand, rel=1e-5)
    log_rate = torch.tensor([[[0.2], [5.0], [-0.3]]])
    by_hand = ((np.exp(0.2) - 0.2) + np.exp(-0.3)) / 2
    assert loss_of("poisson", log_rate, target, asked).item() == pytest.approx(by_hand, rel=1e-5)
    logits = torch.tensor([[[0.0, 1.0], [9.0, 9.0], [2.0, 0.0]]])
    by_hand = (-np.log(np.e / (1 + np.e)) - np.log(np.e**2 / (1 + np.e**2))) / 2
    assert loss_of("categorical", logits, target, asked).item() == pytest.approx(by_hand, rel=1e-5)
    counts = torch.tensor([[[1.0, 0.0], [9.0, 9.0], [0.0, 2.0]]])
    rates = torch.tensor([[[0.1, -0.2], [3.0, 3.0], [0.0, 0.4]]])
    by_hand = np.mean([np.exp(0.1) - 0.1, np.exp(-0.2), 1.0, np.exp(0.4) - 0.8])
    assert spikes_loss(rates, counts, asked).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "poisson", "categorical"])
def test_nothing_asked_costs_nothing_and_still_has_a_gradient(kind):
    raw = torch.randn(2, 3, 2, requires_grad=True)
    loss = loss_of(kind, raw, torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert raw.grad.abs().sum() == 0


def test_the_mean_does_not_give_up_hard_bins_as_noise():
    # The gradient of the mean must not shrink where the stated variance is large.
    raw = torch.tensor([[[0.0, 4.0]]], requires_grad=True)
    loss_of("gaussian", raw, torch.tensor([[2.0]]), torch.tensor([[True]])).backward()
    assert raw.grad[0, 0, 0].item() == pytest.approx(-2.0)
