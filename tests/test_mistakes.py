"""A user's mistakes are told in one line before the work, and nothing is lost by them."""

from __future__ import annotations

import json

import h5py
import msgspec
import numpy as np
import pytest

from offline.config import TrainConfig
from offline.train import train
from rt_neds.cli import main
from rt_neds.config import load_config, parse_config
from rt_neds.errors import ConfigError, SessionError, StreamError
from rt_neds.result import write_json
from rt_neds.stream.sockets import check_port
from tests.making import stopped_at_eight, tiny_config, write_session

BEHAVIOUR = {
    "speed": {"source": "wheel.wheel_speed"},
    "choice": {
        "source": "trials.choice",
        "kind": "categorical",
        "classes": {"left": 1, "right": 0},
    },
}


def choice(**changes):
    return {**BEHAVIOUR, "choice": {**BEHAVIOUR["choice"], **changes}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("training.learning_rate=nan", "training.learning_rate is nan; a finite number"),
        ("data.bin_ms=inf", "data.bin_ms is inf"),
        ("training.weight_decay=-1", "weight_decay >= 0"),
        ("training.clip=-1", "clip > 0"),
        ("training.seed=-1", "0 <= seed"),
        ("training.precision=fp16", "precision: Invalid enum value 'fp16' (it may be fp32, bf16)"),
        ("behaviour.a={source='w.x', kind='word'}", "(it may be continuous, poisson, cat"),
        ("model.dropout=1.0", "0 <= dropout < 1"),
        ("masking.schemes={decoding=nan}", "masking.schemes.decoding is nan"),
        ("behaviour.a.source=trials.choice", 'trials.choice: one value a trial; kind = "cat'),
        ("behaviour.a.source=[]", "one source is needed"),
        ('behaviour.a={source=["w.x", "w.y"]}', "w.x, w.y: one source is needed"),
        ("behaviour.a={source='w.x', weight=-1}", "weight is -1"),
        ("behaviour.a={source='w.x', transform='speed', tau_s=-1}", "tau_s is -1"),
        ("behaviour.a={source='w.x', transform='speed', tau_s=0}", "tau_s is 0"),
        ("behaviour.a={source='w.x', scored=['a', 'b']}", "w.x: scored is for columns of trials"),
        ("behaviour.a={source='w.x', known_from='a'}", "w.x: known_from is for columns of trials"),
        (
            "behaviour.a={source='w.x', kind='poisson', transform='speed'}",
            'w.x: transform is for kind = "continuous"',
        ),
        (
            "behaviour.a={source='trials.c', kind='categorical', classes={l=1, r=1}}",
            "each stands for a value of its own",
        ),
    ],
)
def test_settings_that_cannot_work(change, says):
    base = "masking.schemes={neuron=1.0}"
    with pytest.raises(ConfigError) as told:
        load_config(None, TrainConfig, [base, change])
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_classes_that_stand_for_other_values_than_are_there(tmp_path):
    path = write_session(tmp_path / "s.h5")
    with pytest.raises(SessionError, match="trials.choice is 0, 1; classes left = -1, right = 1"):
        train(
            tiny_config(behaviour=choice(classes={"left": -1, "right": 1})), [str(path)], tmp_path
        )


def test_a_behaviour_of_which_nothing_can_be_learned(tmp_path):
    path = write_session(tmp_path / "s.h5")
    swapped = choice(scored=["feedback_time", "stim_on_time"])
    with pytest.raises(ConfigError, match="behaviour.choice: nothing of trials.choice can be"):
        train(tiny_config(behaviour=swapped), [str(path)], tmp_path / "a")
    with h5py.File(path, "r+") as file:
        file["wheel/wheel_speed"][:] = np.nan
    with pytest.raises(ConfigError, match="behaviour.speed: nothing of wheel.wheel_speed"):
        train(tiny_config(), [str(path)], tmp_path / "b")


def test_a_training_split_in_which_no_spike_was_recorded(tmp_path):
    path = write_session(tmp_path / "s.h5", domain=[(40.0, 60.0)])
    with h5py.File(path, "r+") as file:
        for name, (start, end) in {"train": (0, 40), "val": (42, 50), "test": (50, 60)}.items():
            split = file.create_group(f"x_{name}_domain")
            split.attrs.update(dict(file["domain"].attrs))
            split["start"], split["end"] = np.array([float(start)]), np.array([float(end)])
    with pytest.raises(ConfigError, match=r"s\.h5: no whole bin of the training split"):
        train(tiny_config(data={"split": "x"}), [str(path)], tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["spikes", "ahead", "next", "encoding", "neuron", "type", "forward", "half", "keys"]
)
def test_names_that_mean_something_else(name):
    behaviour = {name: {"source": "wheel.wheel_speed"}}
    with pytest.raises(ConfigError, match=f"behaviour.{name}: that name is taken; call it my_"):
        parse_config({"behaviour": behaviour}, TrainConfig, "a test")


def test_counts_that_are_negative(tmp_path):
    path = write_session(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        file["wheel/wheel_speed"][70] = -0.5
    licks = {"licks": {"source": "wheel.wheel_speed", "kind": "poisson"}}
    with pytest.raises(SessionError, match="wheel.wheel_speed goes down to -0.5; a count"):
        train(tiny_config(behaviour=licks), [str(path)], tmp_path / "run")


@pytest.mark.parametrize("score", [float("nan"), -float("inf")])
def test_a_validation_score_that_is_no_number(tmp_path, monkeypatch, score):
    path = str(write_session(tmp_path / "s.h5"))
    monkeypatch.setattr("offline.validation.r2", lambda *_: score)
    with pytest.raises(ConfigError, match="step 0: the validation score of speed in session tiny"):
        train(tiny_config(), [path], tmp_path / "run")
    assert not (tmp_path / "run" / "bundle").exists()


def test_a_result_has_no_numbers_that_json_lacks(tmp_path):
    write_json(str(tmp_path / "r.json"), {"a": [float("nan"), -float("inf"), 1.5], "b": np.inf})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": [None, None, 1.5], "b": None}


def test_a_run_goes_on_with_its_own_sessions_only(tmp_path, monkeypatch):
    mine = write_session(tmp_path / "s.h5")
    other = write_session(tmp_path / "t.h5", units=9, session_id="other")
    with stopped_at_eight(monkeypatch):
        train(tiny_config(), [str(mine)], tmp_path / "run")
    with pytest.raises(ConfigError, match="or on other sessions"):
        train(tiny_config(), [str(other)], tmp_path / "run", resume=True)
    with h5py.File(mine, "r+") as file:
        file["wheel/wheel_speed"][...] *= 2  # whose steps are others, then
    with pytest.raises(ConfigError, match="or on other sessions"):
        train(tiny_config(), [str(mine)], tmp_path / "run", resume=True)
    (checkpoint,) = (tmp_path / "run" / "checkpoint").iterdir()
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="is damaged"):
        train(tiny_config(), [str(mine)], tmp_path / "run", resume=True)


def test_a_run_goes_on_with_all_in_the_same_order(tmp_path, monkeypatch):
    a, b = (str(write_session(tmp_path / f"{n}.h5", session_id=n)) for n in "ab")
    config, behaviour = tiny_config(), tiny_config().behaviour
    with stopped_at_eight(monkeypatch):
        train(config, [a, b], tmp_path / "run")
    turned = [
        {"choice": behaviour["choice"], "speed": behaviour["speed"]},
        {
            **behaviour,
            "choice": msgspec.structs.replace(behaviour["choice"], classes={"right": 0, "left": 1}),
        },
    ]
    others = [(msgspec.structs.replace(config, behaviour=of), [a, b]) for of in turned]
    for other, sessions in [*others, (config, [b, a])]:
        with pytest.raises(ConfigError, match="in another order"):
            train(other, sessions, tmp_path / "run", resume=True)
    with h5py.File(b, "r+") as file:
        file["units/id"][...] = file["units/id"][()][::-1]
    with pytest.raises(ConfigError, match="in another order"):
        train(config, [a, b], tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "bundle").exists()


def test_what_is_there_is_not_overwritten(tiny, tmp_path, capsys):
    path, run, _ = tiny
    before = (run / "bundle" / "bundle.json").read_bytes()
    with pytest.raises(ConfigError, match="name another --out"):
        train(tiny_config(), [str(path)], run, init=run / "bundle")
    (tmp_path / "c.toml").write_text("")
    again = ["train", "--config", str(tmp_path / "c.toml"), "--sessions", str(path)]
    again += ["--set", "masking.schemes={neuron=1.0}", "--out", str(run)]
    assert main(again) == 2
    assert main(["simulate", "--out", str(path)]) == 2
    assert main(["prepare", "ibl", "--alf", str(tmp_path), "--out", str(path)]) == 2
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector" / "detector.json").write_text("{}")
    (tmp_path / "raw").mkdir()
    argv = ["detector", "--recording", str(tmp_path / "raw"), "--out", str(tmp_path / "detector")]
    assert main(argv) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4
    for line in told:
        assert "is there already; name another" in line
    assert (run / "bundle" / "bundle.json").read_bytes() == before


def test_a_report_that_cannot_be_written_is_told_before_the_work(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path, run, _ = tiny
    argv = ["evaluate", "--bundle", str(run / "bundle"), "--session", str(path)]
    assert main([*argv, "--report", str(tmp_path / "file"), "--json", str(tmp_path / "e.json")])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("argv", [["serve", "--badflag"], ["replay"], ["serve", "--device", "x"]])
def test_wrong_options_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"rt-neds {argv[0]} --help says more" in told


def test_ports_that_are_none():
    for endpoint in ("tcp://127.0.0.1:99999", "tcp://127.0.0.1:0"):
        with pytest.raises(StreamError, match="1 to 65535 was expected"):
            check_port(endpoint)
    for endpoint in ("tcp://127.0.0.1:5570", "ipc:///tmp/x", "tcp://*:5580"):
        check_port(endpoint)


def test_a_setting_says_where_it_is(tmp_path):
    (tmp_path / "c.toml").write_text("[training]\nlearning_rate = inf\n")
    with pytest.raises(ConfigError, match=r"c\.toml: training\.learning_rate is inf"):
        load_config(tmp_path / "c.toml", TrainConfig)


def test_a_slip_in_an_override_is_not_looked_for_in_the_file(tmp_path):
    (tmp_path / "c.toml").write_text("[training]\nbatch = 8\n")
    for change in ("training.step=3", "training.steps=few"):
        with pytest.raises(ConfigError, match=rf"c\.toml and --set {change}: .*training\.step"):
            load_config(tmp_path / "c.toml", TrainConfig, [change])
