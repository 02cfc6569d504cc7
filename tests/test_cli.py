"""The command line: the JSON contract, exit codes, and one line for each mistake."""

import argparse
import json
import subprocess
import sys

import pytest

from rt_neds import cli, stopping
from rt_neds.children import free_port
from tests.making import TINY, write_session


def run(capsys, *args):
    code = cli.main(list(args))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_toml(table):
    def value(item):
        if isinstance(item, dict):
            return "{ " + ", ".join(f"{k} = {value(v)}" for k, v in item.items()) + " }"
        return json.dumps(item)

    lines = []
    for section, fields in table.items():
        if section == "behaviour":
            for name, inner in fields.items():
                lines += [f"[behaviour.{name}]", *(f"{k} = {value(v)}" for k, v in inner.items())]
        else:
            lines += [f"[{section}]", *(f"{k} = {value(v)}" for k, v in fields.items())]
    return "\n".join(lines)


def test_train_and_evaluate_by_command_and_the_json_contract(capsys, tmp_path):
    session = str(write_session(tmp_path / "s.h5"))
    (tmp_path / "c.toml").write_text(as_toml(TINY))
    code, out, err = run(
        capsys, "train", "--config", str(tmp_path / "c.toml"), "--sessions", session,
        "--out", str(tmp_path / "run"), "--set", "training.steps=6", "--json", "-",
    )  # fmt: skip
    assert (code, err.count("Traceback")) == (0, 0)
    assert json.loads(out)["steps"] == 6
    bundle = str(tmp_path / "run" / "bundle")
    code, out, _ = run(capsys, "evaluate", "--bundle", bundle, "--session", session, "--json", "-")
    assert code == 0
    result = json.loads(out)
    assert set(result) >= {
        "session", "split", "decoding", "encoding", "baselines", "stream_vs_offline_max_abs",
    }  # fmt: skip
    assert set(result["decoding"]) == {"speed", "choice"}
    assert set(result["decoding"]["speed"]) >= {"r2", "r2_profile"}
    assert set(result["decoding"]["choice"]) >= {"balanced_accuracy", "auc"}
    assert set(result["encoding"]) == {
        "bits_per_spike", "forward", "forward_1", "co_smoothing", "intra_region", "inter_region",
    }  # fmt: skip
    assert result["encoding"]["bits_per_spike"]["mean50"] is not None
    assert result["baselines"]["ridge"]["speed"].keys() >= {"r2", "r2_profile"}
    assert result["baselines"]["logistic"]["choice"].keys() >= {"balanced_accuracy", "auc"}
    assert result["stream_vs_offline_max_abs"] <= 1e-4
    code, out, _ = run(capsys, "inspect", bundle)
    assert code == 0
    assert "tiny: 6" in out  # units of its session
    assert not set("{}[]'") & set(out), "that is for programs; --json has it"


def test_simulate_by_command_carries_its_ideal(capsys, tmp_path):
    path = str(tmp_path / "sim.h5")
    code, out, _ = run(
        capsys, "simulate", "--out", path, "--units", "20", "--minutes", "2", "--json", "-"
    )
    assert code == 0
    assert set(json.loads(out)["ideal"]) >= {"wheel_speed", "choice"}
    code, out, _ = run(capsys, "inspect", path)
    assert code == 0
    assert "wheel.wheel_speed, whisker.whisker_motion_energy" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tran"], "did you mean train"),
        (["xyzzy"], "there are demo"),
        (["train", "--sessions", "a.h5", "--out", "r"], "needs --config"),
        (
            ["train", "--config", "no.toml", "--sessions", "a.h5", "--out", "r"],
            "no such configuration",
        ),
        (["inspect", "no.h5"], "no such session file"),
        (["inspect", "no.h5", "--json", "/no/such/folder/r.json"], "folder that exists"),
        (["inspect", "no.h5", "--json", "/"], "folder that exists"),
        (["evaluate", "--bundle", "no", "--session", "a.h5"], "is not a bundle"),
        (["serve"], "--probe NAME and --bundle"),
        (["serve", "--probe", "p", "--bundle", "no"], "is not a bundle"),
        (["serve", "--probe", "p", "--bundle", "b", "--source", "x://y"], "expected rtneds://"),
        (["serve", "--set", "prob=1"], "did you mean probe"),
        (["serve", "--set", "stale_ms=-1"], "stale_ms"),
        (["replay", "--session", "no.h5", "--probe", "p"], "no such session file"),
        *(
            (["replay", "--session", "no.h5", "--probe", "p", f"--{key}", value], f"{key} {value}")
            for key, value in [
                ("speed", "-1"),
                ("speed", "1e-30"),
                ("batch-ms", "0"),
                ("batch-ms", "20000"),
                ("to", "1e+30"),
            ]
        ),
        (["watch", "--probe", "p", "--connect", "nonsense", "--seconds", "1"], "cannot connect"),
        (["watch", "--probe", "p", "--seconds", "0"], "seconds 0; more than 0 was expected"),
        (["bench", "step", "--units", "0"], "units >= 1"),
        (["simulate", "--out", "/no/such/folder/s.h5", "--units", "5", "--minutes", "1"], ""),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, args, words):
    code, _out, err = run(capsys, *args)
    assert code == 2
    assert err.startswith("rt-neds: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "args",
    [
        ["replay", "--session", "s.h5", "--probe", "p", "--speed"],
        ["bench", "step", "--seconds"],
        ["record", "--probe", "p", "--out", "o", "--min-free-gb"],
    ],
)
def test_numbers_are_finite(capsys, args, number):
    with pytest.raises(SystemExit) as ended:
        cli.main([*args[:-1], f"{args[-1]}={number}"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert f"{args[-1]}: {number} where a finite number was expected" in told
    assert told.count("\n") == 1


def test_watching_nothing_says_so(capsys, monkeypatch):
    monkeypatch.setattr(stopping.signal, "signal", lambda *_: None)
    url = f"tcp://127.0.0.1:{free_port()}"
    code, _, err = run(capsys, "watch", "--probe", "p", "--connect", url, "--seconds", "0.3")
    assert code == 2
    assert f"nothing of p came from {url}" in err
    assert err.count("\n") == 1


def test_a_place_that_cannot_be_written_is_one_line(capsys, tmp_path):
    session, file = write_session(tmp_path / "s.h5", seconds=60.0), tmp_path / "taken"
    file.write_text("")
    config = tmp_path / "tiny.toml"
    config.write_text(as_toml(TINY))
    args = ["train", "--config", str(config), "--sessions", str(session), "--out", str(file)]
    code, _out, err = run(capsys, *args, "--quiet")
    assert code == 2
    assert err.startswith(f"rt-neds: cannot write into {file}")
    assert err.count("\n") == 1


def test_overview_and_version(capsys):
    assert run(capsys, "--version")[1].startswith("rt-neds 0.")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in cli.COMMANDS)
    assert run(capsys)[0] == 2


def parsers(parser):
    """A command's, and those of what it is told to do."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_says_what_it_is(name):
    for parser in parsers(cli.command(name)[1]):
        assert [action.dest for action in parser._actions if not action.help] in ([], ["kind"])


def test_importing_the_package_is_quick_and_brings_no_torch():
    code = (
        "import sys, rt_neds, rt_neds.cli; "
        "print([m for m in ('torch', 'numpy', 'zmq') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_replay_and_watch_need_no_torch():
    code = (
        "import sys, rt_neds.replay, rt_neds.watch, rt_neds.stream.sender; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
