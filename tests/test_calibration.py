"""Probabilities no surer than validation bears out: a temperature, found and folded in."""

import copy

import numpy as np
import pytest
import torch

from offline.batches import prepare
from offline.beginning import build, fit_linear
from offline.calibration import calibrate, categorical_d2, temperature_of
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


def test_the_share_explained_is_that_of_the_written_formula():
    raw_SC, class_S, trial_S = drawn(np.random.default_rng(3), 500, 3, 1.0)
    p_SC = np.exp(raw_SC) / np.exp(raw_SC).sum(axis=1, keepdims=True)
    surprise = -np.log(p_SC[np.arange(len(class_S)), class_S]).mean()
    assert temperature_of(raw_SC, class_S, trial_S) == pytest.approx(1.0, abs=0.2)
    assert categorical_d2(raw_SC, class_S, trial_S) == pytest.approx(
        1 - surprise / np.log(2), abs=2e-3
    )
    assert categorical_d2(0 * raw_SC, class_S, trial_S) == pytest.approx(0.0, abs=1e-12)
    right_SC = 20.0 * np.eye(2, dtype=np.float32)[class_S]
    assert categorical_d2(right_SC, class_S, trial_S) == pytest.approx(1.0, abs=1e-6)


def test_being_too_sure_costs_nothing_that_calibration_mends_and_being_wrong_does():
    raw_SC, class_S, trial_S = drawn(np.random.default_rng(4), 4000, 1, 1.0)
    fair = categorical_d2(raw_SC, class_S, trial_S)
    assert categorical_d2(5 * raw_SC, class_S, trial_S) == pytest.approx(fair, abs=1e-3)
    assert categorical_d2(-raw_SC, class_S, trial_S) < 0.05 < fair


def test_a_long_trial_counts_as_a_short_one():
    raw_SC, class_S, trial_S = drawn(np.random.default_rng(5), 40, 1, 1.0)
    bins_K = np.where(np.arange(40) % 2, 30, 1)
    long = [np.repeat(of, bins_K, axis=0) for of in (raw_SC, class_S, trial_S)]
    assert categorical_d2(*long) == pytest.approx(categorical_d2(raw_SC, class_S, trial_S))


def test_bins_outside_trials_count_each_by_itself():
    raw_SC, class_S, trial_S = drawn(np.random.default_rng(6), 300, 1, 4.0)
    outside_S = np.where(trial_S < 200, -1, trial_S)
    for of in (temperature_of, categorical_d2):
        assert of(raw_SC, class_S, outside_S) == pytest.approx(of(raw_SC, class_S, trial_S))


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
    (temperatures,) = calibrate(model, [subject], 100).values()
    assert set(temperatures) == {"choice"}
    assert temperatures["choice"] > 1.5
    spans = subject.binned.spans("test")
    for name, times in (("choice", temperatures["choice"]), ("speed", 1.0)):
        before, after = (
            decode_spans(net, subject.binned, spans, wanted=[name], window=300)[name]
            for net in (sure, model)
        )
        np.testing.assert_allclose(after * times, before, rtol=1e-3, atol=1e-3)
    kept = copy.deepcopy(model.state_dict())
    subject.binned.split_T[subject.binned.of_split("val")] = -1
    assert calibrate(model, [subject], 100) == {}
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_a_network_is_calibrated_on_windows_as_it_was_trained_on(tmp_path, monkeypatch):
    session = write_session(tmp_path / "s.h5", seconds=300.0, units=8)
    config = tiny_config(model={"attention": "full"}, masking={"ahead": False})
    subject, windows = prepare(session, config), []

    def noted(*args, **keywords):
        windows.append(keywords["window"])
        return decode_spans(*args, **keywords)

    monkeypatch.setattr("offline.decoded.decode_spans", noted)
    calibrate(build(config, [subject]).eval(), [subject], config.data.window_bins)
    assert windows == [config.data.window_bins]
