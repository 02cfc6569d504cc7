"""A run gives the same losses however its windows are parted: in turns, in processes, or not."""

import json
import math
import multiprocessing
import os
import socket
import sys

import pytest
import torch

from offline.processes import join, leave
from offline.train import train
from rt_neds.bundle import load_spec
from rt_neds.cli import main
from rt_neds.errors import ConfigError, DeviceError
from tests.making import tiny_config, write_session


def config(linear=False, **training):
    return tiny_config(
        model={"dropout": 0.0, "linear": linear},
        masking={
            "schemes": {"decoding": 1.0, "encoding": 1.0, "neuron": 1.0},
            "ahead": True,
            "unit_dropout": 0.1,
        },
        training={"steps": 5, "batch": 8, "sessions": 2, "validate_every": 5, **training},
    )


def logged(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return (
        [line["loss"] for line in lines if "loss" in line],
        [line["val"] for line in lines if "val" in line],
    )


def same(run, other):
    (losses, val), (losses_other, val_other) = logged(run), logged(other)
    assert len(losses) == 5
    for a, b in zip(losses, losses_other, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert val[0].keys() == val_other[0].keys()
    for session in val[0]:
        assert val[0][session] == pytest.approx(val_other[0][session], rel=1e-3, abs=1e-3)


def one_of(number, count, port, sessions, out, settings):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE=str(count)
    )
    train(config(**settings), sessions, out)
    leave()


def together(count, sessions, out, **settings):
    """Train in several processes, as ``torchrun`` would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=one_of, args=(n, count, port, sessions, out, settings))
        for n in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    sessions = [
        str(write_session(folder / f"{n}.h5", session_id=n, units=units, seconds=30, seed=units))
        for n, units in (("a", 5), ("b", 6), ("c", 7))
    ]
    train(config(), sessions, folder / "run")
    return sessions, folder / "run"


def test_accumulating_changes_nothing(alone, tmp_path):
    sessions, run = alone
    train(config(accumulate=4), sessions, tmp_path)
    same(run, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked here")
def test_two_processes_are_one(alone, tmp_path):
    sessions, run = alone
    together(2, sessions, tmp_path, accumulate=2)
    same(run, tmp_path)
    assert [s.id for s in load_spec(tmp_path / "bundle").sessions] == ["a", "b", "c"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked here")
def test_processes_share_the_fitting_of_regressions(alone, tmp_path, monkeypatch):
    monkeypatch.setattr("rt_neds.model.neds.ALONE", 0.0)  # drawn by each process for itself
    sessions, _ = alone
    train(config(linear=True), sessions, tmp_path / "one")
    together(2, sessions, tmp_path / "two", linear=True)
    same(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "two" / "cache").glob("*/linear-*.safetensors"))) == 3


def test_only_the_first_process_tells_the_result(alone, tmp_path, monkeypatch):
    sessions, _ = alone
    (tmp_path / "c.toml").write_text("masking.schemes = {neuron = 1.0}\ntraining = {steps = 1}\n")
    argv = ["train", "--config", str(tmp_path / "c.toml"), "--sessions", sessions[0], "--quiet"]
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        out = ["--out", str(tmp_path / rank), "--json", str(tmp_path / f"{rank}.json")]
        assert main([*argv, *out]) == 0
    assert (tmp_path / "0.json").exists()
    assert not (tmp_path / "1.json").exists()


def test_steps_are_of_several_sessions(alone):
    _, run = alone
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert max(len(line["session"]) for line in lines if "loss" in line) == 2


def test_bf16_learns_nearly_the_same(alone, tmp_path):
    sessions, run = alone
    train(config(precision="bf16"), sessions, tmp_path)
    for a, b in zip(logged(run)[0], logged(tmp_path)[0], strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=0.03)
        assert a["total"] != b["total"]


def test_bf16_hears_regressions(alone, tmp_path):
    sessions, _ = alone
    train(config(precision="bf16", linear=True), sessions, tmp_path)
    assert all(math.isfinite(line["total"]) for line in logged(tmp_path)[0])


def test_what_cannot_be_shared_is_told(monkeypatch):
    with pytest.raises(ConfigError, match="multiple of 3"):
        join(config(accumulate=3).training)
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ConfigError, match="8 windows for 16 processes"):
        join(config().training)
    with pytest.raises(ConfigError, match="multiple of sessions"):
        config(sessions=3)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no GPU"):
            join(config(device="cuda").training)
