"""What a scheme hides stays hidden, in every mode; in a causal one, so does the future."""

import numpy as np
import pytest
import torch

from offline.config import MaskingConfig
from offline.masking import draw_masks
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import AHEAD, NEDS, SCHEMES, SPIKES
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
    size = {"dim": 16, "layers": 2, "heads": 2, "context": 12}
    config = ModelConfig(attention=attention, tokens=tokens, linear=True, **size, **fields)
    model = NEDS(config, BEHAVIOURS, {"s": N}).eval()
    for parameter in model.parameters():  # nothing may hide behind a zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.parts("s").linear.weight_UF.normal_()
    return model


def batch(asked, seed=1):
    rng = np.random.default_rng(seed)
    shown, ahead = np.ones((B, T, 3), bool), asked == AHEAD
    config = MaskingConfig(schemes={"decoding" if ahead else asked: 1.0}, ahead=ahead)
    masks = draw_masks(config, shown, shown, REGION_N, rng)
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


def wanted_of(asked, masks):
    if asked == AHEAD:
        return [AHEAD]
    names = (SPIKES, "wheel", "choice")
    return [name for m, name in enumerate(names) if masks.asked_BTM[:, :, m].any()]


@pytest.mark.parametrize(("attention", "tokens"), MODES)
@pytest.mark.parametrize("scheme", SCHEMES)
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


@pytest.mark.parametrize("asked", [*SCHEMES, AHEAD])
@pytest.mark.parametrize("tokens", ["bin", "modality"])
def test_the_future_reaches_nothing_in_a_causal_network(tokens, asked):
    model, (masks, counts, values) = network("causal", tokens), batch(asked)
    wanted = wanted_of(asked, masks)
    before = run(model, masks, counts, values, wanted)
    now = 25
    counts[:, now:] += 2
    values[:, now:] = 1 - values[:, now:]
    after = run(model, masks, counts, values, wanted)
    last = now + 1 if asked == AHEAD else now  # ahead: a bin is asked before it is known
    moved = False
    for name in wanted:
        assert torch.equal(before[name][:, :last], after[name][:, :last]), name
        moved |= not torch.equal(before[name][:, last:], after[name][:, last:])
    assert moved


@pytest.mark.parametrize("tokens", ["bin", "modality"])
def test_a_bin_asked_ahead_is_read_from_all_before_it_and_from_nothing_else(tokens):
    model, (masks, counts, values) = network("causal", tokens), batch(AHEAD)
    assert masks.ahead_BT.all()
    assert not masks.asked_BTM[:, :, 0].any()
    before = run(model, masks, counts, values, [AHEAD])[AHEAD]
    bias_N = model.parts("s").spikes_out.linear.bias
    assert torch.equal(before[:, 0], bias_N.detach().expand(B, N))  # nothing was before it
    for changed in (0, 10, 24):
        other = counts.clone()
        other[:, changed] += 2
        after = run(model, masks, other, values, [AHEAD])[AHEAD]
        same = (before == after).all(dim=2).all(dim=0)
        assert same[: changed + 1].all()
        assert not same[changed + 1 : changed + 3].any()
