"""Validation: what cannot be scored is left out, so that it decides nothing."""

import h5py
import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from temporaldata import Interval

from offline.alone import as_kept, left_to_regression, regressions_validated
from offline.batches import prepare
from offline.beginning import build, fit_linear
from offline.config import TrainConfig
from offline.masking import draw_masks
from offline.predict import decode_spans
from offline.processes import Processes
from offline.validation import in_words, mean_score, null_rates, refuse_nonfinite, validate
from rt_neds.config import parse_config
from rt_neds.errors import ConfigError
from rt_neds.model.neds import AHEAD, SCHEMES, SPIKES
from rt_neds.model.readout import to_values_TV
from rt_neds.session import load_session
from tests.making import TINY, drawn_model, tiny_config, write_session

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
    here = Processes(torch.device("cpu"))
    now, alone = validated(), regressions_validated(model, [subject], here, validated)
    assert set(now.scores["tiny"]) == set(now.losses["tiny"]) == {"choice"}
    assert mean_score(now.scores) == now.scores["tiny"]["choice"]
    left = left_to_regression(now, alone, [subject], here)
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


@torch.no_grad()
@pytest.mark.parametrize("asked", ["encoding", "neuron", "forward", AHEAD])
def test_bits_of_each_scheme_are_those_of_the_split_by_the_written_formula(tmp_path, asked):
    schemes = {"decoding": 1.0} | ({asked: 1.0} if asked != AHEAD else {})
    masking = {"schemes": schemes, "ahead": asked == AHEAD, "unit_dropout": 0.4}
    config = tiny_config(masking=masking)
    subject = prepare(write_session(tmp_path / "s.h5", units=9), config)
    model, binned, scale = drawn_model(config, subject), subject.binned, subject.scales[0]
    scheme, out = ("decoding", AHEAD) if asked == AHEAD else (asked, SPIKES)
    one = tiny_config(masking={**masking, "schemes": {scheme: 1.0}, "unit_dropout": 0.0}).masking
    ((first, stop),), rng, gain, spikes = binned.spans("val"), np.random.default_rng(0), 0.0, 0.0
    assert (stop - first) % 40  # the last window reaches beyond the split
    for at in range(first, stop, 40):
        bins, inside = np.arange(at, at + 40), np.arange(at, at + 40) < stop
        scored = binned.scored_TM[bins] & inside[:, None]
        masks = draw_masks(one, binned.shown_TM[bins][None], scored[None], subject.region_N, rng)
        counts, values = binned.counts_TN(at, at + 40), binned.values_TM[bins].copy()
        values[:, 1] = (values[:, 1] - scale.mean) / scale.sd
        raw = model(
            "tiny",
            torch.from_numpy(counts)[None],
            torch.from_numpy(values)[None],
            torch.from_numpy(masks.observed_BTM),
            torch.tensor([SCHEMES.index(scheme)]),
            missing_BTN=torch.from_numpy(masks.missing_BN)[:, None],
            wanted=[out],
        )
        rate, null = raw[out][0].exp().numpy(), null_rates(subject)
        where = masks.ahead_BT[0] if asked == AHEAD else masks.asked_BTM[0, :, 0]
        for t in np.flatnonzero(where):
            for n in np.flatnonzero(masks.asked_BN[0]):
                gain += counts[t, n] * np.log2(rate[t, n] / null[n])
                gain -= (rate[t, n] - null[n]) / np.log(2)
                spikes += counts[t, n]
    val = validate(model, [subject], config, "val", torch.device("cpu")).scores["tiny"]
    assert val[asked] == pytest.approx(gain / spikes, rel=1e-4)


def test_each_behaviour_is_scored_on_its_own_scale_where_it_is_scored(tmp_path):
    behaviour = {name: TINY["behaviour"][name] for name in ("choice", "speed")}
    behaviour["fast"] = {**behaviour["speed"], "transform": "speed", "tau_s": 0.1}
    config = parse_config({**TINY, "behaviour": behaviour}, TrainConfig, "a test")
    subject = prepare(write_session(tmp_path / "s.h5"), config)
    model, binned = drawn_model(config, subject), subject.binned
    binned.scored_TM[2200:2250, 2] = False
    binned.values_TM[2200:2250, 2] = 1e3
    val = validate(model, [subject], config, "val", torch.device("cpu"))
    (span,) = binned.spans("val")
    for m, name in enumerate(behaviour, start=1):
        raw = decode_spans(model, binned, [span], wanted=[name], window=40)[name]
        use = binned.scored_TM[slice(*span), m]
        true = binned.values_TM[slice(*span), m][use]
        said = to_values_TV(
            torch.from_numpy(raw[use]), model.behaviours[m - 1], subject.scales[m - 1]
        )
        if name == "choice":
            trials = binned.trial_T[slice(*span)][use]
            assert len(val.losses["tiny"][name]) == len(np.unique(trials))
            continue
        expected = r2_score(true, said[:, 0].numpy())
        assert val.scores["tiny"][name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["continuous", "poisson"])
def test_windows_of_a_behaviour_lose_what_is_written_and_are_as_many_as_they_are(tmp_path, kind):
    speed = {**TINY["behaviour"]["speed"], "kind": kind}
    config = tiny_config(behaviour={"speed": speed}, masking=DECODING)
    subject = prepare(write_session(tmp_path / "s.h5"), config)
    model, binned = drawn_model(config, subject), subject.binned
    (span,) = binned.spans("val")
    binned.scored_TM[span[0] + 100 : span[0] + 150, 1] = False
    lost = validate(model, [subject], config, "val", torch.device("cpu")).losses["tiny"]["speed"]
    bins = np.arange(*span)[binned.scored_TM[slice(*span), 1]]
    raw = decode_spans(model, binned, [span], wanted=["speed"], window=40)["speed"]
    raw = torch.from_numpy(raw[bins - span[0]])
    said = to_values_TV(raw, model.behaviours[0], subject.scales[0]).numpy()[:, 0]
    true = binned.values_TM[bins, 1]
    of_bin = {
        "continuous": (true - said) ** 2 / true.var(),
        "poisson": said - true * np.log(said),
    }[kind]
    expected = [of_bin[bins // 40 == window].sum() for window in np.unique(bins // 40)]
    np.testing.assert_allclose(np.sort(lost), np.sort(expected), rtol=1e-3)


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
    of_all = {"a": {"speed": 0.5, "choice": 0.1}, "b": {"speed": -0.9}}
    assert mean_score(of_all) == pytest.approx(-0.1)
    assert mean_score({"a": {}}) == 0.0


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused(score):
    with pytest.raises(ConfigError, match="step 3: the validation score of x in session b is"):
        refuse_nonfinite({"a": {"x": 0.5}, "b": {"y": -1e9, "x": score}}, 3)
    refuse_nonfinite({"a": {"x": 0.5}, "b": {"y": -1e9}}, 3)


@torch.no_grad()
def test_trials_lose_what_is_not_explained_of_them_once_it_is_calibrated(tmp_path):
    config = tiny_config(masking=DECODING)
    subject = prepare(write_session(tmp_path / "s.h5"), config)
    model = drawn_model(config, subject)
    for parameter in model.parts("tiny").behaviour_out["choice"].parameters():
        parameter *= 10.0  # much too sure
    val = validate(model, [subject], config, "val", torch.device("cpu"))
    lost = val.losses["tiny"]["choice"].mean() / np.log(2)
    assert val.scores["tiny"]["choice"] == pytest.approx(1 - lost, rel=1e-4)


def test_what_is_not_taught_is_not_scored(tmp_path):
    subject = prepare(write_session(tmp_path / "s.h5"), tiny_config())
    for schemes in ({"encoding"}, {"decoding"}):
        config = tiny_config(masking={"schemes": dict.fromkeys(schemes, 1.0)})
        val = validate(build(config, [subject]).eval(), [subject], config, "val", "cpu")
        expected = schemes if "encoding" in schemes else {"speed", "choice"}
        assert set(val.scores["tiny"]) == expected


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
    subject.binned.scored_TM[:100, 0] = False
    assert null_rates(subject)[5] == pytest.approx(0.5 / 2000)
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


def test_what_a_run_says_of_its_scores_is_one_line_however_many_sessions_it_had():
    one = {"a": {"wheel": 0.25, "choice": -0.5}}
    assert in_words(one) == "wheel 0.250, choice -0.500"
    # One session whose wheel hardly moved in validation does not say what the others did.
    many = one | {"b": {"wheel": 0.75}, "c": {"wheel": -1e6, "choice": 0.5}}
    assert in_words(many) == "wheel 0.250, choice 0.000 (medians of 3 sessions)"
    assert in_words({"a": {}, "b": {}}) == ""
