"""Training: deterministic, resumable to the same losses, honest about what it may see."""

import contextlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from offline import train as module
from offline.batches import draw_step, prepare
from offline.beginning import _statistics_sample, build
from offline.checkpoint import Best, load_checkpoint, open_log, save_checkpoint
from offline.losses import smeared
from offline.memory import keep_freed
from offline.optimiser import learning_rate, make_optimiser
from offline.predict import scales
from offline.processes import Processes
from offline.train import train
from rt_neds.bundle import build_model, load_spec
from rt_neds.cli import main
from rt_neds.errors import BundleError, ConfigError, DeviceError, SessionError
from rt_neds.model.readout import MARGIN_STEPS, STEPS
from tests.baselines.making import binned_session
from tests.making import TINY, drawn_model, stopped_at_eight, tiny_config, write_session


def losses(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"]["total"] for line in lines if "loss" in line]


def test_a_run_leaves_a_bundle_that_loads(tiny):
    _, run, summary = tiny
    spec = load_spec(run / "bundle")
    model = build_model(run / "bundle", spec)
    assert summary["steps"] == 12
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]
    assert [b.name for b in spec.behaviours] == ["speed", "choice"]
    assert spec.session().units == [f"tiny/{n}" for n in range(6)]
    assert spec.training["config"]["model"]["dim"] == 16
    assert spec.training["val"] == summary["val"]
    assert {session: set(of) for session, of in summary["temperature"].items()} == {
        "tiny": {"choice"}
    }


def begun_at(config, subject):
    torch.manual_seed(0)
    parts = build(config, [subject]).parts("tiny")
    return parts.spikes_in.mean_KN, parts.spikes_in.sd_KN, parts.spikes_out.linear.bias


def test_read_ins_begin_at_what_roots_of_counts_are_in_training(tmp_path):
    path = write_session(tmp_path / "s.h5", seconds=300)
    config = tiny_config(data={"window_bins": 400})
    with h5py.File(path, "r+") as file:
        spikes = file["spikes"]
        silent = (spikes["unit_index"][()] == 5) & (spikes["timestamps"][()] < 210.0)
        spikes["unit_index"][silent] = 4  # a unit that is silent in training
    subject = prepare(path, config)
    mean_KN, sd_KN, bias_N = begun_at(config, subject)
    train_T = subject.binned.of_split("train")
    counts_TN = subject.binned.counts_TN(0, subject.binned.bins)
    for k, width in enumerate(config.model.history):
        sums = [counts_TN[max(0, t - width + 1) : t + 1].sum(axis=0) for t in range(len(train_T))]
        root_TN = np.sqrt(np.array(sums)[train_T])
        np.testing.assert_allclose(mean_KN[k], root_TN.mean(axis=0), atol=0.05)
        expected_N = np.maximum(root_TN.std(axis=0), 0.2)
        np.testing.assert_allclose(sd_KN[k], expected_N, atol=0.05)
    assert sd_KN[:, 5].tolist() == pytest.approx([0.2, 0.2])
    assert bias_N[5].item() == pytest.approx(np.log(1e-4))
    rate_N = counts_TN[train_T].mean(axis=0)
    np.testing.assert_allclose(bias_N[:5].detach(), np.log(rate_N[:5]), atol=0.15)


def test_a_network_begins_knowing_nothing_of_what_is_held_out_or_was_not_recorded(tmp_path):
    config = tiny_config(model={"history": [1]})
    subject = prepare(write_session(tmp_path / "s.h5"), config)
    binned = subject.binned
    binned.shown_TM[:, 0] &= np.arange(binned.bins) % 50 < 30
    before = begun_at(config, subject)
    records_S = binned.session.records_S
    known_S = (binned.of_split("train") & binned.shown_TM[:, 0])[
        records_S["sample"] // binned.width
    ]
    records_S["unit"][~known_S] = 0
    for was, now in zip(before, begun_at(config, subject), strict=True):
        assert torch.equal(was, now)
    records_S["unit"][known_S] = 0
    assert not torch.equal(before[0], begun_at(config, subject)[0])


def test_read_ins_begin_at_sums_that_reach_back_before_their_windows():
    binned = binned_session(np.ones((500, 3), np.int64), np.zeros(500))
    binned.split_T[:30] = -1
    config = tiny_config(data={"window_bins": 12}, model={"history": [1, 25]})
    counts_TN, sums_TKN = _statistics_sample(binned, config, np.random.default_rng(0))
    assert (counts_TN == 1).all()
    assert (sums_TKN == np.array([1, 25])[:, None]).all()


def test_the_same_seed_gives_the_same_losses_and_weights(tiny, tmp_path):
    session, run, _ = tiny
    train(tiny_config(), [str(session)], tmp_path)
    assert losses(tmp_path) == losses(run)
    assert load_spec(tmp_path / "bundle").sha256 == load_spec(run / "bundle").sha256
    train(tiny_config(training={"seed": 1}), [str(session)], tmp_path / "other")
    assert losses(tmp_path / "other") != losses(run)


def test_resume_equals_not_having_stopped(tiny, tmp_path, monkeypatch):
    session, run, _ = tiny
    with stopped_at_eight(monkeypatch):
        train(tiny_config(), [str(session)], tmp_path)
    assert len(losses(tmp_path)) == 8
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')  # the power went
    train(tiny_config(), [str(session)], tmp_path, resume=True)
    # The checkpoint was at step 6: steps 7 and 8 were taken, and are told, anew.
    assert (tmp_path / "log.jsonl").read_text() == (run / "log.jsonl").read_text()
    assert load_spec(tmp_path / "bundle").sha256 == load_spec(run / "bundle").sha256


def test_a_run_that_is_there_is_gone_on_with_only_if_that_is_asked_for(tmp_path, capsys):
    tomli_w = pytest.importorskip("tomli_w")
    (tmp_path / "c.toml").write_text(tomli_w.dumps(TINY))
    session = str(write_session(tmp_path / "s.h5", seconds=20))
    argv = ["train", "--config", str(tmp_path / "c.toml"), "--sessions", session]
    argv += ["--out", str(tmp_path / "run"), "--quiet", "--set", "training.steps=2"]
    assert [main(argv), main(argv), main([*argv, "--resume"])] == [0, 2, 0]
    assert capsys.readouterr().err.count("is there already; name another --out") == 1


def test_a_checkpoint_is_wholly_of_one_step_whenever_writing_it_was_interrupted(
    tmp_path, monkeypatch
):
    model = torch.nn.Linear(1, 1)
    optimiser = torch.optim.AdamW(model.parameters())
    state = {"model": model, "averaged": model, "optimiser": optimiser, "config": {"dim": 16}}

    def save(step):
        torch.nn.init.constant_(model.weight, float(step))
        best = Best({n: tensor.clone() for n, tensor in model.state_dict().items()}, step=step)
        save_checkpoint(tmp_path, Processes(torch.device("cpu")), **state, best=best, step=step)

    def resumed():
        step, best = load_checkpoint(tmp_path, **state)
        return {step, best.step, int(best.weights["weight"]), int(model.weight)}

    real, renamed = Path.replace, []

    def replace(path, target):
        if len(renamed) == most:
            raise KeyboardInterrupt
        renamed.append(target)
        return real(path, target)

    save(100)
    monkeypatch.setattr(Path, "replace", replace)
    for most in range(4):  # interrupted before its first file is there, its second, ...
        renamed.clear()
        with contextlib.suppress(KeyboardInterrupt):
            save(200 + most)
        assert len(resumed()) == 1
    assert resumed() == {203}


def test_the_best_weights_stand_still_and_of_equals_are_the_last():
    model = torch.nn.Linear(1, 1)
    best = Best({})
    for step, (score, weight) in enumerate([(0.1, 1.0), (0.3, 2.0), (0.2, 3.0), (0.3, 4.0)]):
        torch.nn.init.constant_(model.weight, weight)
        best.offer(step, score, {"a": {"x": score}}, model)
        torch.nn.init.constant_(model.weight, 9.0)
        kept = [(0, 1.0), (1, 2.0), (1, 2.0), (3, 4.0)][step]
        assert (best.step, float(best.weights["weight"])) == kept
    assert (best.score, best.val) == (0.3, {"a": {"x": 0.3}})


def test_resume_refuses_another_configuration_and_an_empty_folder(tiny, tmp_path):
    session, run, _ = tiny
    with pytest.raises(ConfigError, match="another configuration"):
        train(tiny_config(training={"batch": 3}), [str(session)], run, resume=True)
    with pytest.raises(ConfigError, match="no checkpoint"):
        train(tiny_config(), [str(session)], tmp_path, resume=True)


def test_a_log_goes_on_where_its_run_does_and_is_begun_anew_where_that_is(tmp_path):
    lines = [f'{{"step": {step}}}\n' for step in (0, 1, 2, 3)]
    for step, kept in ((2, lines[:3]), (0, lines[:1]), (None, [])):
        (tmp_path / "log.jsonl").write_text("".join(lines))
        with open_log(tmp_path, step, first=False) as log:
            log.write("of another process")
        assert (tmp_path / "log.jsonl").read_text() == "".join(lines)
        open_log(tmp_path, step, first=True).close()
        assert (tmp_path / "log.jsonl").read_text() == "".join(kept)


def test_losses_are_weighed_and_gradients_clipped_as_configured(tmp_path):
    speed = {**TINY["behaviour"]["speed"], "weight": 3.0}
    weighed = tiny_config(behaviour={"speed": speed}, training={"spikes_weight": 0.5, "clip": 1e-3})
    subject = prepare(write_session(tmp_path / "s.h5"), weighed)
    model, losses_of = drawn_model(weighed, subject), []
    for config in (tiny_config(), weighed):
        rng = np.random.default_rng(0)
        step = draw_step([subject], config, rng, torch.device("cpu"))
        (batch,) = step.batches
        losses_of.append(module.batch_losses(model, batch, config))
    for name, factor in {"speed": 3.0, "choice": 1.0, "spikes": 0.5}.items():
        plain, mine = (of[name].item() for of in losses_of)
        assert mine == pytest.approx(factor * plain)
    optimiser = make_optimiser(model, weighed.training)
    step = draw_step([subject], weighed, rng, torch.device("cpu"))
    module.train_step(model, optimiser, step, weighed, Processes(torch.device("cpu")))
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    assert torch.cat(grads).norm() == pytest.approx(1e-3, rel=1e-2)


@torch.no_grad()
def test_spikes_that_are_learned_are_those_of_the_window_not_of_what_leads_up_to_it(tmp_path):
    config = tiny_config(model={"history": [1, 9]}, masking={"schemes": {"encoding": 1.0}})
    subject = prepare(write_session(tmp_path / "s.h5"), config)
    model, rng = drawn_model(config, subject), np.random.default_rng(0)
    (batch,) = draw_step([subject], config, rng, torch.device("cpu")).batches
    assert batch.counts_BTN.shape[1] == 48

    def lost():
        return module.batch_losses(model, batch, config)["spikes"].item()

    before = lost()
    batch.counts_BTN[:, :8] += 3
    assert lost() == before
    batch.counts_BTN[:, -1] += 3
    assert lost() != before


def test_nothing_of_validation_or_test_is_asked_for_or_shown_as_behaviour(tmp_path):
    config = tiny_config(masking={"schemes": {"encoding": 1.0, "decoding": 1.0}})
    subject = prepare(write_session(tmp_path / "s.h5"), config)
    binned = subject.binned
    held_out = ~binned.of_split("train")
    binned.values_TM[held_out, 1] = 1e6  # would show at once
    rng, asked = np.random.default_rng(0), 0
    for _ in range(20):
        batch = next(draw_step([subject], config, rng, torch.device("cpu")).batches)
        used = batch.asked_BTM[:, :, 1] | batch.observed_BTM[:, :, 1]
        assert batch.targets_BTM[:, :, 1][used].max() < 1e5
        asked += int(batch.asked_BTM[:, :, 1].sum())
    assert asked > 0


def test_learning_does_happen(tmp_path):
    session = write_session(tmp_path / "s.h5", seconds=200, units=12)
    config = tiny_config(
        masking={"schemes": {"decoding": 1.0}},
        training={"steps": 150, "batch": 8, "validate_every": 50, "learning_rate": 5e-3},
    )
    summary = train(config, [str(session)], tmp_path / "run")
    assert summary["val"]["tiny"]["speed"] > 0.3
    first, last = np.mean(losses(tmp_path / "run")[:10]), np.mean(losses(tmp_path / "run")[-10:])
    assert last < first - 0.2


def test_two_sessions_of_equal_unit_counts_train_together(tmp_path):
    paths = [
        str(write_session(tmp_path / f"{name}.h5", session_id=name, seed=seed))
        for seed, name in enumerate(("a", "b"))
    ]
    train(tiny_config(), paths, tmp_path / "run")
    spec = load_spec(tmp_path / "run" / "bundle")
    assert [s.id for s in spec.sessions] == ["a", "b"]
    model = build_model(tmp_path / "run" / "bundle", spec)
    a, b = (parts.spikes_in.linear.weight for parts in model.sessions)
    assert not torch.equal(a, b)
    with pytest.raises(BundleError, match="none is named"):
        spec.session()
    with pytest.raises(ConfigError, match="given twice"):
        train(tiny_config(), [paths[0], paths[0]], tmp_path / "run2")


def test_what_cannot_be_trained_is_told(tmp_path):
    session = write_session(tmp_path / "s.h5", leave_out=("wheel",))
    with pytest.raises(SessionError, match=r"no wheel\.wheel_speed"):
        train(tiny_config(), [str(session)], tmp_path / "run")
    if not torch.cuda.is_available():
        whole = write_session(tmp_path / "w.h5")
        with pytest.raises(DeviceError, match="no GPU"):
            train(tiny_config(training={"device": "cuda"}), [str(whole)], tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_what_a_cpu_does(tmp_path):
    session = write_session(tmp_path / "s.h5")
    summaries = [
        train(
            tiny_config(training={"device": device}, model={"dropout": 0.0}),
            [str(session)],
            tmp_path / device,
        )
        for device in ("cpu", "cuda")
    ]
    of_cpu, of_gpu = (
        build_model(tmp_path / device / "bundle", load_spec(tmp_path / device / "bundle"))
        for device in ("cpu", "cuda")
    )
    for (name, a), b in zip(of_cpu.state_dict().items(), of_gpu.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.0, msg=name)
    assert summaries[0].keys() == summaries[1].keys()


def test_learning_rate_is_one_cycle():
    settings = tiny_config(training={"steps": 100, "learning_rate": 1.0, "warmup": 0.2}).training
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[20] == pytest.approx(1.0)
    assert rates[-1] < 0.01
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_read_in_starts_standardised(tmp_path):
    config = tiny_config()
    subject = prepare(write_session(tmp_path / "s.h5", seconds=200), config)
    parts = build(config, [subject]).sessions[0]
    counts = torch.from_numpy(subject.binned.counts_TN(0, 5000))[None]
    from rt_neds.model.readin import boxcar_sums

    z = (boxcar_sums(counts, (1, 4)).sqrt() - parts.spikes_in.mean_KN) / parts.spikes_in.sd_KN
    assert z.mean(dim=(0, 1)).abs().max() < 0.2
    assert z.std(dim=(0, 1)).max() < 1.3


def test_what_is_validated_is_the_settled_average_also_after_the_last_step(tmp_path, monkeypatch):
    done, validated = [], module.validate_all

    class Noted(module.RunningAverage):
        def after(self, sessions, keep):
            done.append(keep)
            super().after(sessions, keep)

        def settle(self):
            done.append("settled")
            super().settle()

    def validate_all(*args):
        done.append("validated")
        return validated(*args)

    monkeypatch.setattr(module, "RunningAverage", Noted)
    monkeypatch.setattr(module, "validate_all", validate_all)
    path = write_session(tmp_path / "s.h5", seconds=20)
    settings = {"steps": 5, "validate_every": 4, "average": 0.2}
    train(tiny_config(training=settings), [str(path)], tmp_path / "run")
    keep = [1 / 10, 2 / 11, 0.2, 0.2]  # begins at the first step's weights, not at the beginning
    judged = ["settled", "validated"]
    assert done == ["validated", *keep, *judged, 0.2, *judged, "validated"]


def test_refit_keeps_the_last_weights(tmp_path):
    path = write_session(tmp_path / "s.h5")
    config = tiny_config(data={"refit": True})
    summary = train(config, [str(path)], tmp_path / "run")
    assert summary["best_step"] == summary["steps"] == config.training.steps
    assert summary["val"] == {"tiny": {}}


def test_an_artefact_is_no_part_of_the_range(tmp_path):
    config = tiny_config()
    binned = prepare(write_session(tmp_path / "s.h5", seconds=300), config).binned

    def scale(kind="continuous"):
        return scales(binned, ["speed", "choice"], [kind, "categorical"])[0]

    train, before = binned.of_split("train"), scale()
    values = binned.values_TM[train, 1]
    assert (before.low, before.high) == (values.min(), values.max())
    assert (before.mean, before.sd) == pytest.approx((values.mean(), values.std()))
    binned.values_TM[5000, 1] = 300 * before.sd
    after = scale()
    assert before.high < after.high < 2.1 * before.high
    assert after.sd == pytest.approx(before.sd, rel=0.05)
    outside = torch.tensor([binned.values_TM[5000, 1]])
    assert int(smeared(outside, after).argmax()) == STEPS - MARGIN_STEPS - 1
    assert scale("poisson").high == binned.values_TM[5000, 1]  # licks are rare, and no artefacts
    binned.values_TM[train, 1] = 0.0
    binned.values_TM[4000, 1] = 1.0
    assert (scale().low, scale().high) == (0.0, 1.0)


def test_a_library_that_cannot_be_told_to_keep_memory_is_left_alone(monkeypatch):
    keep_freed()
    for refusal in (OSError(), TypeError(), AttributeError()):

        def refuse(name, refusal=refusal):
            raise refusal

        monkeypatch.setattr("ctypes.CDLL", refuse)
        keep_freed()
