"""Probabilities no surer than validation bears out: a temperature, found and folded in."""

import copy

import numpy as np
import pytest
import torch

from offline.batches import prepare
from offline.beginning import build, fit_linear
from offline.calibration import calibrate, temperature_of
from offline.predict import decode_spans
from tests.making import tiny_config, write_session


def drawn(rng, trials, bins, sureness):
    """Logits of trials, the classes they tell the odds of, and the same logits made surer."""
    logit_S = np.repeat(rng.normal(size=trials) * 1.5, bins)
    odds = 1 / (1 + np.exp(-logit_S[::bins]))
    class_S = np.repeat((rng.random(trials) < odds).astype(np.int64), bins)
    raw_SC = np.stack([0 * logit_S, sureness * logit_S], axis=1).astype(np.float32)
    return raw_SC, class_S, np.repeat(np.arange(trials), bins)


@pytest.mark.parametrize("sureness", [2.0, 6.0])
def test_the_temperature_undoes_what_made_logits_surer(sureness):
    found = temperature_of(*drawn(np.random.default_rng(0), 4000, 3, sureness))
    assert found == pytest.approx(sureness, rel=0.1)


def test_nothing_is_made_surer_and_few_trials_change_little():
    rng = np.random.default_rng(1)
    assert temperature_of(*drawn(rng, 2000, 2, 0.3)) == 1.0
    few = temperature_of(*drawn(np.random.default_rng(2), 4, 50, 6.0))
    alone = temperature_of(*drawn(np.random.default_rng(2), 4, 1, 6.0))
    assert few == pytest.approx(alone, rel=1e-3)  # fifty bins of a trial are one piece of evidence
    assert few < 6.0


@pytest.mark.parametrize("linear", [False, True])
def test_it_goes_into_the_read_out_and_changes_no_decision(tmp_path, linear):
    session = write_session(tmp_path / "s.h5", seconds=300.0, units=8)
    config = tiny_config(model={"linear": linear})
    subject = prepare(session, config)
    torch.manual_seed(0)
    model = build(config, [subject]).eval()
    fit_linear(model, [subject])
    parts = model.parts("tiny")
    outs = [parts.behaviour_out["choice"].linear] + ([parts.linear.out["choice"]] if linear else [])
    with torch.no_grad():
        outs[0].weight.normal_()
        for parameter in (p for out in outs for p in out.parameters()):
            parameter.mul_(8.0)
    sure = copy.deepcopy(model)
    (temperatures,) = calibrate(model, [subject]).values()
    assert set(temperatures) == {"choice"}
    assert temperatures["choice"] > 1.5
    spans = subject.binned.spans("test")
    for name, times in (("choice", temperatures["choice"]), ("speed", 1.0)):
        before, after = (
            decode_spans(net, subject.binned, spans, wanted=[name])[name] for net in (sure, model)
        )
        np.testing.assert_allclose(after * times, before, rtol=1e-3, atol=1e-3)
    kept = copy.deepcopy(model.state_dict())
    subject.binned.split_T[subject.binned.of_split("val")] = -1
    assert calibrate(model, [subject]) == {}
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
