"""A run gives the same losses however its windows are parted: in turns, in processes, or not."""

import copy
import json
import math
import multiprocessing
import os
import socket
import sys

import pytest
import torch

from offline.average import touched
from offline.optimiser import make_optimiser
from offline.processes import join, leave
from offline.shards import Shards
from offline.train import train
from offline.windows import behaviours_of
from rt_neds.bundle import build_model, load_spec
from rt_neds.cli import main
from rt_neds.errors import ConfigError, DeviceError
from rt_neds.model.neds import NEDS
from tests.making import multiplies_bf16, stopped_at_eight, tiny_config, write_session


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


def same_weights(run, other):
    ours, theirs = (
        build_model(of / "bundle", load_spec(of / "bundle")).state_dict() for of in (run, other)
    )
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def one_of(number, count, port, work):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE=str(count)
    )
    work()
    leave()


def in_processes(count, work):
    """Do the same in several processes, as ``torchrun`` would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=one_of, args=(n, count, port, work)) for n in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0


def together(count, sessions, out, resume=False, **settings):
    in_processes(count, lambda: train(config(**settings), sessions, out, resume=resume))


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
    same_weights(run, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked here")
@pytest.mark.parametrize("linear", [False, True])
def test_a_process_may_keep_no_session(alone, tmp_path, monkeypatch, linear):
    monkeypatch.setattr("rt_neds.model.neds.ALONE", 0.0)
    sessions, _ = alone
    for out, count in (("one", 1), ("two", 2)):
        together(count, sessions[:1], tmp_path / out, linear=linear)
    same(tmp_path / "one", tmp_path / "two")
    same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked here")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
def test_a_run_goes_on_in_another_number_of_processes(alone, tmp_path, monkeypatch, before, after):
    sessions, _ = alone
    settings = {"steps": 12, "batch": 6, "validate_every": 3}
    train(config(**settings), sessions, tmp_path / "one")

    def interrupted():
        with stopped_at_eight(monkeypatch):
            train(config(**settings), sessions, tmp_path / "parted")

    in_processes(before, interrupted)
    files = {path.name for path in (tmp_path / "parted" / "checkpoint").iterdir()}
    assert files == {
        "checkpoint.safetensors",
        *(f"step-6-process-{n}.safetensors" for n in range(1, before)),
    }
    together(after, sessions, tmp_path / "parted", resume=True, **settings)
    (losses, val), (losses_one, val_one) = (logged(tmp_path / n) for n in ("parted", "one"))
    assert [of["total"] for of in losses] == pytest.approx([of["total"] for of in losses_one])
    assert len(losses) == 12
    for scores, scores_one in zip(val, val_one, strict=True):
        for session, of in scores.items():
            assert of == pytest.approx(scores_one[session], rel=1e-3, abs=1e-3)
    same_weights(tmp_path / "one", tmp_path / "parted")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked here")
def test_a_missing_part_of_a_checkpoint_is_told(alone, tmp_path):
    sessions, _ = alone
    together(2, sessions, tmp_path)
    (tmp_path / "checkpoint" / "step-5-process-1.safetensors").unlink()
    with pytest.raises(ConfigError, match="is damaged.*step-5-process-1"):
        train(config(), sessions, tmp_path, resume=True)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked here")
def test_each_process_keeps_its_own_sessions_and_borrows_the_others(alone):
    def work():
        processes = join(config().training)
        torch.manual_seed(0)
        units = {"a": 5, "b": 6, "c": 7}
        model = NEDS(config().model, behaviours_of(config().behaviour), units)
        whole = copy.deepcopy(model)
        shards = Shards(model, processes)
        mine = processes.own(["a", "b", "c"])
        assert mine == [["a", "c"], ["b"]][processes.number]

        def held():
            return [s for s in units if any(p.numel() for p in model.parts(s).parameters())]

        assert held() == mine
        optimiser = make_optimiser(model, config().training)
        optimised = sum(p.numel() for group in optimiser.param_groups for p in group["params"])
        assert optimised == sum(p.numel() for p in model.parameters())
        kept = sum(p.numel() for s in mine for p in whole.parts(s).parameters())
        assert optimised == kept + sum(p.numel() for p in touched(whole, []))
        with shards.borrowed(model, ["b", "c"]):
            for session in ("b", "c"):
                ours, theirs = (of.parts(session).state_dict() for of in (model, whole))
                for name, tensor in theirs.items():
                    assert torch.equal(ours[name], tensor)
            for p in model.parts("b").parameters():
                p.grad = torch.ones_like(p)
                p.data.add_(1.0 + processes.number)
        assert held() == mine
        assert all((p.grad is None) == ("b" not in mine) for p in model.parts("b").parameters())
        shards.gather(model)
        assert held() == (mine if processes.number else ["a", "b", "c"])
        for s in held():
            for ours, theirs in zip(
                model.parts(s).parameters(), whole.parts(s).parameters(), strict=True
            ):
                assert torch.equal(ours, theirs + 2.0 * (s == "b"))

    in_processes(2, work)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked here")
def test_processes_share_the_fitting_of_regressions(alone, tmp_path, monkeypatch):
    monkeypatch.setattr("rt_neds.model.neds.ALONE", 0.0)  # drawn by each process for itself
    sessions, _ = alone
    train(config(linear=True), sessions, tmp_path / "one")
    together(2, sessions, tmp_path / "two", linear=True)
    same(tmp_path / "one", tmp_path / "two")
    same_weights(tmp_path / "one", tmp_path / "two")
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
        assert a["total"] != b["total"] or not multiplies_bf16()


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
