"""What a scheme hides stays hidden, in every mode; in a causal one, so does the future."""

import numpy as np
import pytest
import torch

from offline.config import MaskingConfig
from offline.masking import draw_masks
from rt_neds.model.neds import AHEAD, NEDS, SCHEMES, SPIKES, ModelConfig
from rt_neds.model.readout import Behaviour

MODES = [("causal", "bin"), ("causal", "modality"), ("full", "bin"), ("full", "modality")]
BEHAVIOURS = (
    Behaviour(name="wheel", kind="continuous"),
    Behaviour(name="choice", kind="categorical", classes=("left", "right")),
)
B, T, N = 6, 40, 9
REGION_N = np.repeat([0, 1, 2], 3)


def network(attention, tokens, **fields):
    torch.manual_seed(0)
    config = ModelConfig(
        dim=16, layers=2, heads=2, context=12, attention=attention, tokens=tokens, **fields
    )
    model = NEDS(config, BEHAVIOURS, {"s": N}).eval()
    for parameter in model.parameters():  # nothing may hide behind a zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch(scheme, seed=1):
    rng = np.random.default_rng(seed)
    shown = np.ones((B, T, 3), bool)
    masks = draw_masks(MaskingConfig(schemes={scheme: 1.0}), shown, shown, REGION_N, rng)
    counts = rng.poisson(0.5, (B, T, N)).astype(np.float32)
    values = np.stack(
        [np.zeros((B, T)), rng.normal(size=(B, T)), rng.integers(0, 2, (B, T))], axis=2
    ).astype(np.float32)
    return masks, torch.from_numpy(counts), torch.from_numpy(values)


def run(model, masks, counts, values, wanted):
    with torch.no_grad():
        return model(
            "s",
            counts,
            values,
            torch.from_numpy(masks.observed_BTM),
            torch.from_numpy(masks.scheme_B),
            missing_BTN=torch.from_numpy(masks.missing_BN)[:, None],
            wanted=wanted,
        )


def wanted_of(scheme, masks):
    if scheme == "ahead":
        return [AHEAD]
    names = (SPIKES, "wheel", "choice")
    return [name for m, name in enumerate(names) if masks.asked_BTM[:, :, m].any()]


@pytest.mark.parametrize(("attention", "tokens"), MODES)
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "ahead"])
def test_what_is_hidden_does_not_reach_any_output(attention, tokens, scheme):
    model, (masks, counts, values) = network(attention, tokens), batch(scheme)
    wanted = wanted_of(scheme, masks)
    before = run(model, masks, counts, values, wanted)
    unseen = torch.from_numpy(~masks.observed_BTM[:, :, :1] | masks.missing_BN[:, None])
    hidden = torch.from_numpy(~masks.observed_BTM)
    hidden[:, :, 0] = False
    after = run(
        model,
        masks,
        torch.where(unseen, counts + 3, counts),
        torch.where(hidden, 1 - values, values),
        wanted,
    )
    assert unseen.any() or hidden.any()
    for name in wanted:
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", ["bin", "modality"])
def test_the_future_reaches_nothing_in_a_causal_network(tokens, scheme):
    model, (masks, counts, values) = network("causal", tokens), batch(scheme)
    wanted = wanted_of(scheme, masks)
    before = run(model, masks, counts, values, wanted)
    now = 25
    counts[:, now:] += 2
    values[:, now:] = 1 - values[:, now:]
    after = run(model, masks, counts, values, wanted)
    last = now + 1 if scheme == "ahead" else now  # ahead: a bin is asked before it is known
    moved = False
    for name in wanted:
        assert torch.equal(before[name][:, :last], after[name][:, :last]), name
        moved |= not torch.equal(before[name][:, last:], after[name][:, last:])
    assert moved


@pytest.mark.parametrize("tokens", ["bin", "modality"])
def test_asking_ahead_is_hiding_each_bin_in_turn(tokens):
    # The definition of the next-step prediction, the slow way: bin t hidden, all before it shown.
    model, (masks, counts, values) = network("causal", tokens, history=(1, 3)), batch("ahead")
    outputs = run(model, masks, counts, values, [AHEAD])[AHEAD]
    for t in (0, 7, 30):
        masks.observed_BTM[:, t, 0] = False
        hidden = run(model, masks, counts, values, [SPIKES])[SPIKES][:, t]
        masks.observed_BTM[:, t, 0] = True
        if tokens == "bin":
            assert torch.allclose(outputs[:, t], hidden, atol=1e-5)
        else:  # there the hidden token would see itself
            assert not torch.allclose(outputs[:, t], hidden, atol=1e-5)
