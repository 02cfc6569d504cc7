"""Fine-tuning: the trunk is carried over, frozen while it is said to be, and refused if another."""

import json

import h5py
import msgspec
import numpy as np
import pytest
import torch

from offline.batches import prepare
from offline.beginning import build
from offline.finetune import begin_at_bundle, keep_scales, refuse_other_units, trunk
from offline.optimiser import make_optimiser, set_rates
from offline.train import train
from rt_neds.bundle import build_model, load_spec
from rt_neds.errors import BundleError
from tests.making import TINY, stopped_at_eight, tiny_config, write_session


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    sessions = [
        str(write_session(folder / f"{name}.h5", session_id=name, units=units, seed=seed))
        for seed, (name, units) in enumerate({"a": 5, "b": 7}.items())
    ]
    train(tiny_config(), sessions, folder / "run")
    return folder / "run" / "bundle", sessions


def test_the_trunk_is_the_bundles_and_a_new_session_is_fresh(pretrained, tmp_path):
    bundle, _ = pretrained
    config = tiny_config()
    subject = prepare(write_session(tmp_path / "c.h5", session_id="c", units=6), config)
    fresh, model = build(config, [subject]), build(config, [subject])
    begin_at_bundle(model, bundle, config)
    known = build_model(bundle, load_spec(bundle))
    theirs = dict(known.named_parameters())
    for name, parameter in trunk(model).items():
        assert torch.equal(parameter, theirs[name]), name
    assert torch.equal(model.modality_MD, known.modality_MD)
    assert torch.allclose(model.session_XD[0], known.session_XD.mean(dim=0))
    assert model.parts("c").units == 6
    for buffer in ("mean_KN", "sd_KN"):  # of this session's own units
        own, built = (getattr(m.parts("c").spikes_in, buffer) for m in (model, fresh))
        assert torch.equal(own, built)


def test_a_session_the_bundle_knows_goes_on_where_it_was(pretrained):
    bundle, sessions = pretrained
    config = tiny_config()
    model = build(config, [prepare(sessions[1], config)])
    begin_at_bundle(model, bundle, config)
    known = build_model(bundle, load_spec(bundle)).parts("b").state_dict()
    for name, tensor in model.parts("b").state_dict().items():
        assert torch.equal(tensor, known[name]), name
    whole = build_model(bundle, load_spec(bundle))
    assert torch.equal(model.session_XD[0], whole.session_XD[whole.session_ids.index("b")])


@pytest.mark.parametrize("linear", [False, True])
def test_a_known_session_goes_on_as_it_was_though_its_range_has_grown(tmp_path, linear):
    path = write_session(tmp_path / "s.h5", seconds=120)
    with h5py.File(path, "r+") as file:  # the last minutes alone were there before
        file["wheel/wheel_speed"][1000:1050] *= 5
    early = {"data": {"train_minutes": 0.5}, "model": {"linear": linear}}
    train(tiny_config(**early, training={"steps": 40}), [str(path)], tmp_path / "a")
    config = tiny_config(model={"linear": linear}, training={"steps": 1, "learning_rate": 1e-9})
    train(config, [str(path)], tmp_path / "b", init=tmp_path / "a" / "bundle")
    before, after = (load_spec(tmp_path / run / "bundle") for run in "ab")
    assert after.session().scales == before.session().scales
    assert prepare(path, config).scales[0].high > 1.5 * before.session().scales["speed"].high
    log = (tmp_path / "b" / "log.jsonl").read_text().splitlines()
    first = json.loads(log[0])["val"]["tiny"]["speed"]
    kept = before.training["val"]["tiny"]["speed"]
    near = 0.1 if linear else 0.01  # regression is fitted anew
    assert first == pytest.approx(kept, rel=5e-3, abs=near)


def test_a_behaviour_may_be_left_out(pretrained, tmp_path):
    bundle, _ = pretrained
    only = list(TINY["behaviour"])[-1]  # which has another place then
    config = msgspec.structs.replace(tiny_config(), behaviour={only: tiny_config().behaviour[only]})
    subject = prepare(write_session(tmp_path / "c.h5", session_id="c"), config)
    model = build(config, [subject])
    begin_at_bundle(model, bundle, config)
    known = build_model(bundle, load_spec(bundle))
    assert torch.equal(model.modality_MD[1], known.modality_MD[known.modalities.index(only)])


def test_the_trunk_rests_while_it_is_frozen(pretrained, tmp_path):
    bundle, _ = pretrained
    config = tiny_config(training={"frozen_steps": 4, "steps": 4, "validate_every": 4})
    session = str(write_session(tmp_path / "c.h5", session_id="c", units=6))
    train(config, [session], tmp_path / "run", init=bundle)
    after, before = (build_model(f, load_spec(f)) for f in (tmp_path / "run/bundle", bundle))
    theirs = trunk(before)
    for name, parameter in trunk(after).items():
        # The kept weights are an average of equal ones.
        assert torch.allclose(parameter, theirs[name], atol=1e-6), name


def test_rates_of_trunk_and_sessions(pretrained, tmp_path):
    config = tiny_config(training={"frozen_steps": 3, "trunk_rate": 0.1, "steps": 10})
    model = build(config, [prepare(write_session(tmp_path / "c.h5"), config)])
    optimiser = make_optimiser(model, config.training)
    owned = sum(p.numel() for group in optimiser.param_groups for p in group["params"])
    assert owned == sum(p.numel() for p in model.parameters())
    assert {of["weight_decay"] for of in optimiser.param_groups} == {config.training.weight_decay}
    set_rates(optimiser, 2, config.training)
    assert optimiser.param_groups[0]["lr"] == 0 < optimiser.param_groups[1]["lr"]
    set_rates(optimiser, 3, config.training)
    rates = [group["lr"] for group in optimiser.param_groups]
    assert rates[0] == pytest.approx(0.1 * rates[1])


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "dim", 32),
        ("model", "layers", 1),
        ("model", "heads", 4),
        ("model", "widen", 1),
        ("model", "context", 11),
        ("model", "attention", "full"),
        ("model", "tokens", "modality"),
        ("model", "memory", 20),
        ("model", "history", [1, 9]),
        ("model", "linear", True),
        ("data", "bin_ms", 10.0),
        ("data", "bin_ms", 40.0),
    ],
)
def test_another_kind_of_network_is_refused_by_name(pretrained, tmp_path, section, field, value):
    bundle, sessions = pretrained
    config = tiny_config(**{section: {field: value}})
    with pytest.raises(BundleError, match=field):
        train(config, sessions[:1], tmp_path / "run", init=bundle)


def test_training_minutes_are_the_last_ones(tmp_path):
    session = write_session(tmp_path / "s.h5")
    whole = prepare(session, tiny_config()).binned.of_split("train")
    short = prepare(session, tiny_config(data={"train_minutes": 0.1})).binned
    kept = np.flatnonzero(short.of_split("train"))
    assert len(kept) == 300  # six seconds of 20 ms bins
    assert kept.tolist() == np.flatnonzero(whole)[-300:].tolist()
    assert (short.of_split("val") == prepare(session, tiny_config()).binned.of_split("val")).all()


def test_a_behaviour_of_another_kind_is_refused_by_name(pretrained, tmp_path):
    bundle, sessions = pretrained
    choice = msgspec.structs.replace(
        tiny_config().behaviour["choice"], classes={"right": 0, "left": 1}
    )
    behaviour = {**tiny_config().behaviour, "choice": choice}
    config = msgspec.structs.replace(tiny_config(), behaviour=behaviour)
    with pytest.raises(BundleError, match=r"behaviour\.choice as categorical left right"):
        train(config, sessions[:1], tmp_path / "run", init=bundle)


def test_a_known_session_with_other_units_is_refused(pretrained, tmp_path):
    bundle, _ = pretrained
    other = str(write_session(tmp_path / "b.h5", session_id="b", units=6))
    with pytest.raises(BundleError, match="knows session b with 7 units and it came with 6"):
        train(tiny_config(), [other], tmp_path / "run", init=bundle)
    with pytest.raises(BundleError, match="7 units and it came with 7, not the same"):
        refuse_other_units(bundle, {"b": [f"b/{n}" for n in (1, 0, 2, 3, 4, 5, 6)]})
    refuse_other_units(bundle, {"b": [f"b/{n}" for n in range(7)], "c": ["c/0"]})


def test_of_sessions_that_lack_a_behaviour_nothing_is_taken_for_it(tmp_path, monkeypatch):
    config = tiny_config(model={"linear": True}, training={"learning_rate": 1e-2})
    paths = [
        str(write_session(tmp_path / f"{name}.h5", session_id=name, seed=seed, leave_out=lack))
        for seed, (name, lack) in enumerate({"a": ("wheel",), "b": ()}.items())
    ]
    train(config, paths, tmp_path / "run")
    bundle = tmp_path / "run" / "bundle"
    known = build_model(bundle, load_spec(bundle))
    with torch.no_grad():  # whether it was kept or left to regression
        known.parts("b").behaviour_out["speed"].linear.bias.fill_(0.5)
        for session, bias in (("a", 1.0), ("b", 4.0)):
            known.parts(session).behaviour_out["choice"].linear.bias.fill_(bias)
    monkeypatch.setattr("offline.finetune.build_model", lambda *_: known)
    new = prepare(write_session(tmp_path / "c.h5", session_id="c"), config)
    model = build(config, [new])
    taken = begin_at_bundle(model, bundle, config)
    assert taken == {"a": ["choice"], "b": ["speed", "choice"]}
    assert (model.parts("c").behaviour_out["speed"].linear.bias == 0.5).all()
    assert (model.parts("c").behaviour_out["choice"].linear.bias == 2.5).all()
    # The new session's spikes say nothing yet but by its regression.
    assert not any(p.any() for p in model.parts("c").spikes_in.linear.parameters())
    # The same session with its wheel: that has a scale of its own, what was there keeps it.
    again = [
        prepare(write_session(tmp_path / "a.h5", session_id="a", seed=7), config),
        prepare(write_session(tmp_path / "b.h5", session_id="b", seed=7), config),
    ]
    own = [list(subject.scales) for subject in again]
    keep_scales(again, bundle, config)
    assert again[0].scales[0] == own[0][0]
    assert again[1].scales[0] == load_spec(bundle).sessions[1].scales["speed"] != own[1][0]


def test_fine_tuning_goes_on_as_if_it_had_never_stopped(pretrained, tmp_path, monkeypatch):
    bundle, _ = pretrained
    session = [str(write_session(tmp_path / "c.h5", session_id="c"))]
    config = tiny_config(training={"frozen_steps": 8, "trunk_rate": 0.3})
    train(config, session, tmp_path / "whole", init=bundle)
    with stopped_at_eight(monkeypatch):
        train(config, session, tmp_path / "stopped", init=bundle)
    train(config, session, tmp_path / "stopped", init=bundle, resume=True)
    whole, stopped = (load_spec(tmp_path / run / "bundle") for run in ("whole", "stopped"))
    assert whole.sha256 == stopped.sha256
