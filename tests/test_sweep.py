"""The search over settings: refused before it starts if it cannot work; ranked by validation."""

import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from offline import sweep as module
from offline.config import TrainConfig
from offline.sweep import SweepConfig, sweep
from rt_neds import cli
from rt_neds.config import config_path, load_config, parse_config
from rt_neds.errors import ConfigError
from tests.making import TINY, write_session


def search(space, **fields):
    table = {"sweep": {"config": "tiny.toml", "samples": 3, "space": space, **fields}}
    return parse_config(table, SweepConfig, "a test").sweep


@pytest.fixture
def base(tmp_path):
    tomli_w = pytest.importorskip("tomli_w", reason="pip install 'rt-neds[sweep]'")
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(TINY))
    return path


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({}, "give one of"),
        ({"uniform": [0, 1], "choice": [1]}, "give one of"),
        ({"uniform": [1, 1]}, "low < high"),
        ({"choice": []}, "at least one choice"),
        ({"log_uniform": [0, 1]}, "positive"),
        ({"chioce": [1]}, "choice"),
    ],
)
def test_a_rule_that_draws_nothing_is_refused(rule, said):
    with pytest.raises(ConfigError, match=said):
        search({"training.learning_rate": rule})


@pytest.mark.parametrize(
    ("key", "same"),
    [("schemes.encoding", True), ("schemes.neuron", True), ("schemes.decoding", False)],
)
def test_trials_are_ranked_by_scores_of_the_same_things(base, key, same):
    drawn = search({f"masking.{key}": {"choice": [0.0, 1.0]}})
    if same:
        assert module._longest(drawn, base) == 12
    else:
        with pytest.raises(ConfigError, match="scores of different things"):
            module._longest(drawn, base)


def test_without_behaviour_spikes_rank():
    val = {"a": {"neuron": 0.2, "forward": 0.4}, "b": {"neuron": 0.6}}
    config = parse_config({"masking": {"schemes": {"neuron": 1.0}}}, TrainConfig, "a test")
    assert module._ranked_by(config) == ["neuron"]
    assert module._score(val, ["neuron"]) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("training.learning_rat", [1e-3], "did you mean training.learning_rate"),
        ("training.learning_rate", [1e-3, -1.0], "learning_rate > 0"),
        ("model.layers", ["two"], "int"),
    ],
)
def test_settings_are_tried_before_anything_is_started(base, key, values, said):
    with pytest.raises(ConfigError, match=said):
        module._longest(search({key: {"choice": values}}), base)


def test_the_longest_trial_sets_the_last_rung(base):
    assert module._longest(search({"model.layers": {"choice": [1]}}), base) == 12
    steps = search({"training.steps": {"choice": [6, 40, 20]}})
    assert module._longest(steps, base) == 40


def test_a_search_without_validation_is_refused(base):
    with pytest.raises(ConfigError, match="data.refit = true leaves no validation"):
        module._longest(search({"data.refit": {"choice": [True, False]}}), base)
    base.write_text(base.read_text().replace("[data]", "[data]\nrefit = true"))
    with pytest.raises(ConfigError, match=r"tiny.toml: data.refit .* choice = \[false\]"):
        module._longest(search({"model.layers": {"choice": [1, 2]}}), base)
    mended = {"model.layers": {"choice": [1, 2]}, "data.refit": {"choice": [False]}}
    assert module._longest(search(mended), base) == 12


def test_a_missing_ray_is_one_line(base, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'rt-neds\[sweep\]'"):
        sweep(search({"model.layers": {"choice": [1]}}), base, ["s.h5"], tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown key model.layer"):  # told without it
        sweep(search({"model.layer": {"choice": [1]}}), base, ["s.h5"], tmp_path / "out")


def told_by_a_trial(monkeypatch, base, settings, sessions, out):
    """What a trial reports to Ray, without Ray."""
    told = []
    tune = SimpleNamespace(
        report=told.append, get_context=lambda: SimpleNamespace(get_trial_id=lambda: "a")
    )
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(tune=tune))
    drawn = {"settings": settings, "base": str(base), "sessions": sessions, "out": str(out)}
    module._trial(drawn)
    return told, SimpleNamespace(
        metrics=told[-1], config=drawn, path="/ray/a", error=None, metrics_dataframe=None
    )


def test_a_trial_reports_each_validation_and_leaves_a_run(base, monkeypatch, tmp_path):
    session = str(write_session(tmp_path / "s.h5"))
    settings = {"training.learning_rate": 3e-3, "model.layers": 1}
    told, result = told_by_a_trial(monkeypatch, base, settings, [session], tmp_path / "out")
    assert [metrics["step"] for metrics in told] == [0, 6, 12]
    lines = (tmp_path / "out" / "a" / "log.jsonl").read_text().splitlines()
    vals = [entry["val"]["tiny"] for entry in map(json.loads, lines) if "val" in entry]
    assert vals[0].keys() == {"speed", "choice", "encoding"}
    scores = [(val["speed"] + val["choice"]) / 2 for val in vals]  # bits per spike are another unit
    assert [metrics["score"] for metrics in told] == scores
    assert told[-1]["best"] == max(scores)
    assert (tmp_path / "out" / "a" / "bundle" / "bundle.json").is_file()
    outcome = module._outcome(result)
    assert (outcome["score"], outcome["settings"]) == (max(scores), settings)
    assert Path(outcome["trial"]) == tmp_path / "out" / "a"


def test_a_trial_that_cannot_be_trained_says_why(base, monkeypatch, tmp_path):
    told, result = told_by_a_trial(monkeypatch, base, {}, [str(tmp_path / "no.h5")], tmp_path)
    assert told[-1]["best"] == -float("inf")
    assert "no such session file" in module._outcome(result)["error"]


def test_a_trial_without_a_score_is_no_trial(base, monkeypatch, tmp_path):
    session = str(write_session(tmp_path / "s.h5"))
    settings = {"data.gap_s": 8.0}  # wider than the validation split
    told, result = told_by_a_trial(monkeypatch, base, settings, [session], tmp_path / "out")
    assert [metrics["best"] for metrics in told] == [-float("inf")]
    assert "no score of speed or choice" in module._outcome(result)["error"]


def test_a_trial_counts_by_its_best_validation_and_not_at_all_once_it_failed():
    metrics = {"step": 12, "score": 0.1, "best": 0.3, "best_step": 6}
    config = {"settings": {"model.layers": 1}, "out": "/out"}
    result = SimpleNamespace(metrics=metrics, config=config, path="/ray/a", error=None)
    expected = {"trial": "/out/a", "score": 0.3, "best_step": 6, "steps": 12}
    assert module._outcome(result) == {**expected, "settings": config["settings"]}
    result.metrics = {**metrics, "step": 0, "error": "no longer finite"}
    assert module._outcome(result) == {"settings": config["settings"], "error": "no longer finite"}
    result.metrics, result.error = metrics, RuntimeError("out of memory")  # after it had a score
    assert module._outcome(result) == {"settings": config["settings"], "error": "out of memory"}
    result.metrics, result.error = None, ValueError("of many\nlines")
    assert module._outcome(result)["error"] == "lines"


def test_ranges_are_drawn_from_as_they_are_written():
    tune = SimpleNamespace(
        choice=lambda of: ("choice", of),
        uniform=lambda low, high: ("uniform", low, high),
        loguniform=lambda low, high: ("loguniform", low, high),
    )
    rules = {"a": {"choice": [2, 1]}, "b": {"uniform": [0, 2]}, "c": {"log_uniform": [0.1, 2]}}
    space = search({f"model.{name}": rule for name, rule in rules.items()}).space
    assert [module._domain(tune, of) for of in space.values()] == [
        ("choice", [2, 1]),
        ("uniform", 0, 2),
        ("loguniform", 0.1, 2),
    ]


def test_what_is_varied_lies_beside_the_search(base, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "sweep", lambda *args, **of: asked.append((args, of)) or {})
    path = tmp_path / "sweep.toml"
    path.write_text('[sweep]\nconfig = "tiny.toml"\nspace = { "model.layers" = { choice = [1] } }')
    argv = ["sweep", "--config", str(path), "--sessions", "a", "b", "--out", "o", "--quiet"]
    assert cli.main([*argv, "--set", "sweep.samples=7"]) == 0
    (((of, varied, *rest), _),) = asked
    assert (of.samples, varied, rest) == (7, base, [["a", "b"], "o"])


def test_the_toml_of_the_best_is_the_run_it_names(base, tmp_path):
    settings = {"training.learning_rate": 1.25e-5, "model.layers": 3}
    config = module._with(base, settings)
    module._write_toml(tmp_path / "best.toml", config)
    assert load_config(tmp_path / "best.toml", TrainConfig) == config
    assert (config.training.learning_rate, config.model.layers) == (1.25e-5, 3)


def test_the_example_can_be_searched():
    path = config_path("sweep.toml")
    example = load_config(path, SweepConfig).sweep
    module._longest(example, path.parent / example.config)
    assert set(tomllib.loads(path.read_text())["sweep"]) <= set(msgspec.to_builtins(example))


@pytest.mark.data
def test_trials_of_the_example_have_scores(data_dir, monkeypatch, tmp_path):
    path = config_path("sweep.toml")
    example = load_config(path, SweepConfig).sweep
    settings = {key: of.ends[0] for key, of in example.space.items()} | {"training.steps": 20}
    session = str(data_dir / "ibl_probe_30_trials.h5")
    told, _ = told_by_a_trial(
        monkeypatch, path.parent / example.config, settings, [session], tmp_path
    )
    assert [metrics["step"] for metrics in told] == [0, 20]
    assert told[0]["score"] != told[1]["score"]


@pytest.mark.slow
def test_three_trials_through_ray(base, tmp_path, capsys):
    if importlib.util.find_spec("ray") is None:  # imported, it would not hear what sweep sets
        pytest.skip("no Ray: pip install 'rt-neds[sweep]'")
    session = write_session(tmp_path / "s.h5")
    (tmp_path / "sweep.toml").write_text(
        '[sweep]\nconfig = "tiny.toml"\nsamples = 3\ngrace = 6\n[sweep.space]\n'
        '"training.learning_rate" = { log_uniform = [1e-4, 3e-3] }\n'
    )
    out = tmp_path / "out"
    code = cli.main(
        ["sweep", "--config", str(tmp_path / "sweep.toml"), "--sessions", str(session),
         "--out", str(out), "--json", str(tmp_path / "result.json")]
    )  # fmt: skip
    assert code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    scores = [trial["score"] for trial in result["trials"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert "best.toml" in capsys.readouterr().out
    best = load_config(out / "best.toml", TrainConfig)
    assert best.training.learning_rate == result["best"]["settings"]["training.learning_rate"]
