"""Evaluation whole: the contract, several sessions, regions, and the report."""

import base64
import gc
import json
import re
import shutil
import weakref

import h5py
import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from offline import evaluate as module
from offline.config import TrainConfig
from offline.encoding import SCHEME_OF
from offline.evaluate import evaluate, tenth_of_trial
from offline.predict import decode_spans
from offline.train import train
from offline.windows import bin_session
from rt_neds import cli
from rt_neds.bundle import build_model, load_spec
from rt_neds.config import parse_config
from rt_neds.errors import BundleError, ConfigError, SessionError
from rt_neds.model.readout import to_values_TV
from rt_neds.result import clean
from rt_neds.session import load_session
from tests.making import TINY, tiny_config, write_session

ODD = "<b>mouse & co</b>"
SCHEMES = {name: 1.0 for name in ("decoding", *SCHEME_OF.values()) if name != "ahead"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two sessions, one with an awkward name, and a bundle trained a little on both."""
    folder = tmp_path_factory.mktemp("two")
    paths = [
        write_session(folder / "a.h5", seconds=40, units=24),
        write_session(folder / "b.h5", seconds=40, units=22, seed=1, session_id=ODD),
    ]
    config = tiny_config(
        masking={"schemes": SCHEMES, "ahead": True, "region": "region"}, training={"steps": 4}
    )
    train(config, [str(path) for path in paths], folder / "run")
    return paths, folder / "run" / "bundle"


@pytest.fixture(scope="module")
def both(two, tmp_path_factory):
    paths, bundle = two
    out = tmp_path_factory.mktemp("report")
    return evaluate(bundle, paths, report=out), (out / "report.html").read_text(encoding="utf-8")


def test_several_sessions_give_one_object_each_and_regions_of_all(two, both):
    (_, second), bundle = two
    result, _ = both
    assert set(result) == {"sessions", "regions"}
    assert [one["session"] for one in result["sessions"]] == ["tiny", ODD]
    assert result["regions"]["units"] == 46
    assert result["regions"]["regions"] == {"CA1": 23, "VISp": 23}
    alone = evaluate(bundle, second)
    assert alone["regions"]["units"] == 22
    shared = {key: value for key, value in alone.items() if key != "regions"}
    assert clean(shared) == clean(result["sessions"][1])
    assert alone["streamed"] is True
    assert alone["stream_vs_offline_max_abs"] < 1e-4


def test_every_metric_that_was_trained_has_a_number(both):
    result, _ = both
    for one in result["sessions"]:
        assert set(one["encoding"]) == set(SCHEME_OF)
        for metric, scores in one["encoding"].items():
            assert np.isfinite([scores["mean50"], scores["pooled"]]).all(), metric
        assert {"coverage_50", "coverage_95", "nll", "nll_profile"} <= set(one["decoding"]["speed"])
        assert {"ece", "reliability", "chance"} <= set(one["decoding"]["choice"])
        assert len(one["decoding"]["speed"]["error_by_time"]) == 10
    json.dumps(clean(result), allow_nan=False)


def test_a_state_over_time_is_decided_bin_by_bin(tmp_path):
    whole, out = write_session(tmp_path / "s.h5", seconds=40), tmp_path / "with-state.h5"
    rows = [f"{t / 10},{5 if t // 7 % 2 else 3}" for t in range(1, 400)]
    (tmp_path / "task.csv").write_text("\n".join(["time,state", *rows]))
    argv = ["prepare", "session", str(whole), "--tables", str(tmp_path / "task.csv"), "--quiet"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    state = {"source": "task.state", "kind": "categorical", "classes": {"up": 5, "down": 3}}
    table = {**TINY, "behaviour": {"state": state}, "masking": {"schemes": {"decoding": 1.0}}}
    table |= {"model": {**TINY["model"], "linear": True}}
    config = parse_config(table, TrainConfig, "a test")
    train(config, [str(out)], tmp_path / "run")
    scores = evaluate(tmp_path / "run" / "bundle", out, report=tmp_path)["decoding"]["state"]
    assert scores["balanced_accuracy"] == scores["balanced_accuracy_bins"]
    assert (scores["trials"], scores["by_time"], scores["chance"]) == (0, None, 0.5)
    assert "state" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_session_given_twice_is_refused_before_the_work(two, monkeypatch):
    (first, _), bundle = two
    monkeypatch.setattr(module, "evaluate_session", None)
    with pytest.raises(ConfigError, match="twice"):
        evaluate(bundle, [first, first], baselines="none")


def test_what_is_not_pictured_is_not_kept(two, monkeypatch):
    paths, bundle = two
    made, whole = [], module.evaluate_session

    def evaluate_session(*args, **fields):
        of = whole(*args, **fields)
        made.append(weakref.ref(of))
        return of

    def decode_regions(*_):
        gc.collect()
        return [of() for of in made]

    monkeypatch.setattr(module, "evaluate_session", evaluate_session)
    monkeypatch.setattr(module, "decode_regions", decode_regions)
    assert evaluate(bundle, paths, baselines="none")["regions"] == [None, None]


def test_no_baselines_and_a_region_field_that_is_not_there(two):
    (first, _), bundle = two
    assert evaluate(bundle, first, baselines="none")["baselines"] == {}
    with pytest.raises(SessionError, match=r"units\.regoin.*did you mean region"):
        evaluate(bundle, first, baselines="none", region="regoin")


def test_all_baselines_decode_and_predict_the_same(two, monkeypatch):
    (first, _), bundle = two
    monkeypatch.setattr("offline.baselines.gru.MOST_STEPS", 3)
    result = evaluate(bundle, first, baselines="all")
    baselines = result["baselines"]
    assert set(baselines) == {"ridge", "logistic", "gru", "glm"}
    assert set(baselines["gru"]) == {"speed", "choice"}
    assert set(baselines["glm"]) == {"bits_per_spike", "forward_1"}
    for metric, scores in baselines["glm"].items():
        assert scores["bins"] == result["encoding"][metric]["bins"]
        assert scores["units"] == result["encoding"][metric]["units"]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """The same spikes three times, with all behaviours, without choices and without speed."""
    folder = tmp_path_factory.mktemp("uneven")
    lacking = {"whole": (), "speed": ("trials",), "choice": ("wheel",)}
    paths = {
        name: write_session(folder / f"{name}.h5", seconds=40, session_id=name, leave_out=groups)
        for name, groups in lacking.items()
    }
    config = tiny_config(training={"steps": 2})
    train(config, [str(path) for path in paths.values()], folder / "run")
    return paths, folder / "run" / "bundle"


@pytest.mark.parametrize("has", ["speed", "choice"])
def test_a_session_that_lacks_a_behaviour_has_the_baselines_of_the_other(uneven, has, monkeypatch):
    paths, bundle = uneven
    monkeypatch.setattr("offline.baselines.gru.MOST_STEPS", 3)
    result = evaluate(bundle, paths[has], baselines="all")
    linear = {"speed": "ridge", "choice": "logistic"}[has]
    assert set(result["baselines"]) == {linear, "gru", "glm"}
    assert set(result["baselines"]["gru"]) == {has}
    of_whole = evaluate(bundle, paths["whole"])["baselines"][linear][has]
    mine = result["baselines"][linear][has]
    for score in ("r2", "auc"):  # no trials, no profile; but what was fitted is the same
        assert mine.get(score) == of_whole.get(score)


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_a_bundle_of_spikes_alone_is_scored_on_spikes(attention, tmp_path, capsys):
    session = write_session(tmp_path / "s.h5", seconds=40)
    table = {**TINY, "behaviour": {}, "masking": {"schemes": {"neuron": 1.0}}}
    table |= {"model": {**TINY["model"], "attention": attention}}
    train(parse_config(table, TrainConfig, "a test"), [str(session)], tmp_path / "run")
    bundle = tmp_path / "run" / "bundle"
    result = evaluate(bundle, session, baselines="all", report=tmp_path)
    assert np.isfinite(result["encoding"]["co_smoothing"]["pooled"])
    assert result["decoding"] == {}
    assert result["stream_vs_offline_max_abs"] is None  # nothing is decoded
    assert result["bins"] > 0
    assert "Behaviour from" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert cli.main(["evaluate", "--bundle", str(bundle), "--session", str(session)]) == 0
    shown = capsys.readouterr().out
    assert "co-smoothing" in shown
    assert "stream" not in shown


@pytest.mark.parametrize("model", [{"attention": "full"}, {"tokens": "modality"}])
def test_a_bundle_that_cannot_be_served_is_decoded_offline_and_says_so(model, tmp_path, capsys):
    session = write_session(tmp_path / "s.h5", seconds=40)
    config = tiny_config(model={**model, "history": [1], "linear": False})
    train(config, [str(session)], tmp_path / "run")
    bundle = tmp_path / "run" / "bundle"
    argv = ["evaluate", "--bundle", str(bundle), "--session", str(session)]
    assert cli.main([*argv, "--report", str(tmp_path), "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["streamed"] is False
    assert result["stream_vs_offline_max_abs"] is None
    assert "cannot be served" in capsys.readouterr().out
    assert "cannot be run bin by bin" in (tmp_path / "report.html").read_text(encoding="utf-8")

    spec = load_spec(bundle)
    binned = bin_session(load_session(session), config.data, config.behaviour)
    spans = binned.spans("test")
    at_T = np.concatenate([np.arange(a, b) for a, b in spans])
    raw_TC = decode_spans(
        build_model(bundle, spec), binned, spans, wanted=["speed"], window=config.data.window_bins
    )["speed"]
    of_speed = 1 + binned.present.index("speed")
    use_T = binned.scored_TM[at_T, of_speed]
    scale = spec.session("tiny").scales["speed"]
    mean_T = to_values_TV(torch.from_numpy(raw_TC), spec.behaviours[0], scale)[:, 0].numpy()
    expected = r2_score(binned.values_TM[at_T, of_speed][use_T], mean_T[use_T])
    assert result["decoding"]["speed"]["r2"] == pytest.approx(expected, abs=1e-5)
    assert 0.0 <= result["decoding"]["choice"]["auc"] <= 1.0
    assert "ridge" in result["baselines"]


def test_a_session_of_spikes_alone_is_scored_on_spikes(tmp_path):
    paths = [
        write_session(tmp_path / "a.h5", seconds=40, session_id="a"),
        write_session(tmp_path / "b.h5", seconds=40, session_id="b", leave_out=("wheel", "trials")),
    ]
    config = tiny_config(masking={"schemes": {"decoding": 1.0, "neuron": 1.0}})
    train(config, [str(path) for path in paths], tmp_path / "run")
    result = evaluate(tmp_path / "run" / "bundle", paths[1])
    assert (result["decoding"], result["baselines"]) == ({}, {})
    assert np.isfinite(result["encoding"]["co_smoothing"]["pooled"])


def test_only_scored_bins_count_beside_a_profile_of_training_and_choices_by_trial(two, tmp_path):
    path, bundle = tmp_path / "a.h5", two[1]
    shutil.copy(two[0][0], path)
    with h5py.File(path, "r+") as file:  # the wheel was lost in training and in test
        del file["wheel/domain/start"], file["wheel/domain/end"]
        file["wheel/domain/start"] = np.array([0.0, 14.0, 37.0])
        file["wheel/domain/end"] = np.array([10.0, 36.0, 40.0])
    spec = load_spec(bundle)
    of = module.evaluate_session(
        build_model(bundle, spec),
        spec,
        path,
        split="test",
        overrides=None,
        baselines="none",
        region=None,
    )
    binned, second_T = of.binned, np.arange(of.binned.bins) // 50
    test_T, asked_T = binned.of_split("test"), (second_T % 2 == 1) & (second_T < 38)
    lost_T = np.isin(second_T, [10, 11, 12, 13, 36])
    assert (test_T & lost_T).any()
    np.testing.assert_array_equal(of.bins["speed"], np.flatnonzero(test_T & ~lost_T))
    np.testing.assert_array_equal(of.bins["choice"], np.flatnonzero(test_T & asked_T))
    of_choice = of.result["decoding"]["choice"]
    assert of_choice["trials"] == len(np.unique(binned.trial_T[of.bins["choice"]]))
    # Trials begin at 1, 3, 5 ... s and last 75 bins; between them only the mean is known.
    value_T, at_T = binned.values_TM[:, 1], np.arange(binned.bins)
    train_T = binned.of_split("train") & ~lost_T
    phase_T = np.where((at_T >= 50) & ((at_T - 50) % 100 < 75), (at_T - 50) % 100, -1)
    phase_T[1950:] = -1  # the last trial began at 37 s
    profile_T = np.full(binned.bins, value_T[train_T].mean())
    for phase in range(75):
        profile_T[phase_T == phase] = value_T[train_T & (phase_T == phase)].mean()
    expected = r2_score(value_T[of.bins["speed"]], profile_T[of.bins["speed"]])
    scores = of.result["decoding"]["speed"]
    assert scores["r2_profile"] == pytest.approx(expected, rel=1e-4)
    sd = np.std((value_T - profile_T)[train_T])
    off_S = (value_T - profile_T)[of.bins["speed"]]
    nll = np.log(sd) + 0.5 * np.log(2 * np.pi) + 0.5 * np.mean((off_S / sd) ** 2)
    assert scores["nll_profile"] == pytest.approx(nll, rel=1e-4)
    tenth_S = np.where(phase_T < 0, -1, phase_T * 10 // 75)[of.bins["speed"]]
    errors = [
        np.mean(off_S[tenth_S == n] ** 2) / np.var(value_T[of.bins["speed"]]) for n in range(10)
    ]
    np.testing.assert_allclose(scores["error_by_time_profile"], errors, rtol=1e-4)
    assert of.result["bins"] == test_T.sum()


def test_a_session_whose_units_are_in_another_order_is_refused(two, tmp_path):
    paths, bundle = two
    shutil.copy(paths[0], tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["units/id"][...] = file["units/id"][()][::-1]
    with pytest.raises(BundleError, match="has 24, or others"):
        evaluate(bundle, tmp_path / "a.h5", baselines="none")


def test_another_split_and_the_region_that_training_used(two, monkeypatch):
    (first, _), bundle = two
    asked, regions_of = [], module.regions_of
    monkeypatch.setattr(
        module, "regions_of", lambda of, field: asked.append(field) or regions_of(of, field)
    )
    result = evaluate(bundle, first, split="val", overrides={"split": "trials"}, baselines="none")
    assert result["split"] == "trials/val"
    assert asked == ["region"]


def test_spikes_are_encoded_from_each_behaviour_in_its_own_scale(two, monkeypatch):
    (first, _), bundle = two
    given, predict = [], module.predict_spikes
    monkeypatch.setattr(
        module, "predict_spikes", lambda *of, **more: given.append(of[4]) or predict(*of, **more)
    )
    evaluate(bundle, first, baselines="none")
    spec, scales = load_spec(bundle), load_spec(bundle).session("tiny").scales
    assert given == [[scales[b.name] for b in spec.behaviours]]
    assert len({(scale.mean, scale.sd) for scale in given[0]}) == len(given[0]) > 1


def test_options_are_those_of_the_command_line(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "evaluate", lambda *args, **of: asked.append((args, of)) or {})
    argv = "evaluate --bundle B --session S T --split val --baselines all --region half --live x y"
    assert cli.main([*argv.split(), "--report", "R", "--quiet"]) == 0
    ((args, of),) = asked
    assert args == ("B", ["S", "T"])
    assert of == {
        "split": "val", "baselines": "all", "region": "half", "report": "R", "live": ["x", "y"]
    }  # fmt: skip


def test_tenths_of_trials(two):
    (first, _), _ = two
    config = tiny_config()
    binned = bin_session(load_session(first), config.data, config.behaviour)
    tenth_T = tenth_of_trial(binned)
    assert tenth_T[:50].tolist() == [-1] * 50  # the first trial begins at a second and lasts 1.5 s
    assert tenth_T[50:125].tolist() == [k * 10 // 75 for k in range(75)]
    assert tenth_T[125:150].tolist() == [-1] * 25


def test_the_report_needs_nothing_but_itself_and_escapes_every_name(both):
    _, page = both
    assert page.startswith("<!doctype html>")
    assert "<b>" not in page
    assert "&lt;b&gt;mouse &amp; co&lt;/b&gt;" in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert re.findall(r'(?:src|href)="(?!data:image/svg\+xml;base64,)', page) == []
    assert re.findall(r"url\(|@import|https?://", page) == []


def test_the_report_has_the_pictures_and_the_numbers(both):
    result, page = both
    pictures = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == 2 * 4 + 1  # traces, time, reliability, bits of each; and the regions
    for picture in pictures:
        assert b"<svg" in base64.b64decode(picture)[:1000]
    for one in result["sessions"]:
        assert f"{one['decoding']['choice']['balanced_accuracy']:.3f}" in page
        assert f"{one['decoding']['speed']['r2']:.3f}".replace("-", "−") in page
        forward = one["encoding"]["forward_1"]["pooled"]
        assert f"{forward:.3f}".replace("-", "−") in page


def test_a_report_where_nothing_can_be_written(two, tmp_path):
    (first, _), bundle = two
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        evaluate(bundle, first, baselines="none", report=tmp_path / "file")


def test_by_command(two, tmp_path, capsys):
    paths, bundle = two
    arguments = ["evaluate", "--bundle", str(bundle), "--session", *map(str, paths)]
    arguments += ["--baselines", "none", "--report", str(tmp_path), "--json", "-"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["sessions"]) == 2
    assert "co-smoothing" in err
    assert str(tmp_path / "report.html") in err
    assert (tmp_path / "report.html").is_file()
