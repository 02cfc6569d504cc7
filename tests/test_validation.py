"""Validation: what cannot be scored is left out, so that it decides nothing."""

import h5py
import numpy as np
import pytest
import torch
from temporaldata import Interval

from offline.alone import as_kept, left_to_regression, regressions_validated
from offline.batches import prepare
from offline.beginning import build, fit_linear
from offline.processes import Processes
from offline.validation import mean_score, null_rates, validate
from rt_neds.session import load_session
from tests.making import TINY, tiny_config, write_session

DECODING = {"schemes": {"decoding": 1.0}}


@pytest.mark.parametrize("kind", ["continuous", "poisson"])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1.0])
def test_a_behaviour_that_does_not_change_is_not_scored(tmp_path, kind, constant):
    speed = {**TINY["behaviour"]["speed"], "kind": kind}
    config = tiny_config(behaviour={"speed": speed}, model={"linear": True}, masking=DECODING)
    subject = prepare(write_session(tmp_path / "s.h5"), config)
    model = build(config, [subject]).eval()
    fit_linear(model, [subject])

    def validated():
        return validate(model, [subject], config, "val", torch.device("cpu"))

    assert set(validated().scores["tiny"]) == {"speed", "choice"}
    subject.binned.values_TM[subject.binned.of_split("val"), 1] = constant
    now, alone = validated(), regressions_validated(model, [subject], validated)
    assert set(now.scores["tiny"]) == set(now.losses["tiny"]) == {"choice"}
    assert mean_score(now.scores) == now.scores["tiny"]["choice"]
    left = left_to_regression(now, alone, [subject], Processes(torch.device("cpu")))
    assert "speed" in left["tiny"]  # nothing shows that the network learned it
    assert set(as_kept(now, alone, left)["tiny"]) == {"choice"}


def test_one_class_is_scored_as_others_are(tmp_path):
    config = tiny_config()
    subject = prepare(write_session(tmp_path / "s.h5"), config)
    model = build(config, [subject]).eval()
    subject.binned.values_TM[subject.binned.of_split("val"), 2] = 1.0
    out = model.parts("tiny").behaviour_out["choice"]
    scores = {}
    with torch.no_grad():
        for bias in (-5.0, 0.0, 5.0):  # sure and wrong, nothing known, sure and right
            for parameter in out.parameters():
                parameter.zero_()
            out.linear.bias[1] = bias
            val = validate(model, [subject], config, "val", torch.device("cpu"))
            scores[bias] = val.scores["tiny"]["choice"]
    assert scores[0.0] == pytest.approx(0.0, abs=1e-9)
    assert scores[5.0] > 0.95
    assert -1.0 < scores[-5.0] < 0.0


def test_without_a_spike_there_are_no_bits_per_spike(tmp_path):
    config = tiny_config(masking={"schemes": {"encoding": 1.0, "decoding": 1.0}})
    subject = prepare(write_session(tmp_path / "s.h5"), config)
    model = build(config, [subject]).eval()

    def asked():
        return set(validate(model, [subject], config, "val", torch.device("cpu")).scores["tiny"])

    assert asked() == {"speed", "choice", "encoding"}
    binned = subject.binned
    bin_S = binned.session.records_S["sample"] // binned.width
    binned.session.records_S["sample"][np.isin(bin_S, np.flatnonzero(binned.of_split("val")))] = -1
    binned.session.records_S.sort(order="sample")
    assert asked() == {"speed", "choice"}


@pytest.mark.parametrize("live", [False, True])
def test_a_behaviour_is_judged_with_what_will_be_observed_shown(tmp_path, live):
    behaviour = {**TINY["behaviour"], "speed": {**TINY["behaviour"]["speed"], "live": live}}
    config = tiny_config(behaviour=behaviour, masking=DECODING)
    subject = prepare(write_session(tmp_path / "s.h5"), config)
    torch.manual_seed(0)
    model = build(config, [subject]).eval()

    def validated():
        return validate(model, [subject], config, "val", torch.device("cpu"))

    before = validated()
    subject.binned.values_TM[:, 1] *= -1.0
    after = validated()
    assert set(before.scores["tiny"]) == {"speed", "choice"}
    changed = before.scores["tiny"]["choice"] != after.scores["tiny"]["choice"]
    assert changed == live
    np.testing.assert_equal(
        (before.losses["tiny"]["choice"] == after.losses["tiny"]["choice"]).all(), not live
    )


def test_one_score_far_below_zero_does_not_choose_alone():
    still = -1.7e7  # R2 of a wheel that hardly moves in validation
    early = {"a": {"speed": 0.1}, "b": {"speed": still}}
    late = {"a": {"speed": 0.6}, "b": {"speed": 2 * still}}
    assert mean_score(late) > mean_score(early)
    assert mean_score({"a": {"speed": 0.5}, "b": {"speed": -0.5}}) == 0.0


def test_a_unit_silent_in_training_does_not_make_the_score(tmp_path):
    path = write_session(tmp_path / "s.h5")
    config = tiny_config(masking={"schemes": {"encoding": 1.0, "decoding": 1.0}})
    with h5py.File(path, "r+") as file:
        spikes = file["spikes"]
        silent = (spikes["unit_index"][()] == 5) & (spikes["timestamps"][()] < 42.0)
        spikes["unit_index"][silent] = 4
    subject = prepare(path, config)
    assert subject.rate_N[5] == 0.0
    null_N = null_rates(subject)
    assert null_N[5] == pytest.approx(0.5 / 2100)
    np.testing.assert_array_equal(null_N[:5], subject.rate_N[:5])
    model = build(config, [subject]).eval()
    scores = validate(model, [subject], config, "val", torch.device("cpu")).scores["tiny"]
    assert abs(scores["encoding"]) < 1.0


def test_mean_rates_are_of_recorded_bins(tmp_path):
    path = write_session(tmp_path / "s.h5", domain=[(2 * n, 2 * n + 0.8) for n in range(30)])
    data = load_session(path)
    for name, (start, end) in {"train": (0, 40), "val": (42, 50), "test": (50, 60)}.items():
        domain = Interval(start=np.array([float(start)]), end=np.array([float(end)]))
        setattr(data.data, f"x_{name}_domain", domain)
    with h5py.File(path, "w") as file:
        data.data.to_hdf5(file)
    subject = prepare(path, tiny_config(data={"split": "x"}))
    spikes = len(data.records_S[data.records_S["sample"] < 40 * data.rate])
    assert subject.rate_N.sum() == pytest.approx(spikes / (20 * 40))
