"""The bundle: a damaged or foreign one is told by name."""

import copy
import json
import re
import shutil

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rt_neds.bundle import _sha256, build_model, load_spec, save_bundle
from rt_neds.errors import BundleError
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour
from rt_neds.model.rounding import (
    LEAST,
    from_bytes,
    is_rounded,
    round_weights,
    rounded_weights,
    to_bytes,
)


@pytest.fixture
def bundle(tiny, tmp_path):
    return shutil.copytree(tiny[1] / "bundle", tmp_path / "bundle")


def change(bundle, **fields):
    path = bundle / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_damage_is_told_in_one_line(bundle, tmp_path):
    cases = [
        (lambda: shutil.rmtree(bundle), "is not a bundle"),
        (lambda: (bundle / "bundle.json").write_text("{"), "cannot be read"),
        (lambda: (bundle / "bundle.json").write_text("[1]"), "cannot be read"),
        (lambda: (bundle / "bundle.json").write_bytes(b'{"version": "\xff"}'), "cannot be read"),
        (lambda: change(bundle, format=99), "format 99"),
        (lambda: change(bundle, sha256="0" * 64), "missing or damaged"),
        (lambda: (bundle / "model.safetensors").unlink(), "missing or damaged"),
        (lambda: (bundle / "model.safetensors").write_bytes(b"x" * 100), "missing or damaged"),
    ]
    shutil.copytree(bundle, tmp_path / "whole")
    for damage, words in cases:
        damage()
        with pytest.raises(BundleError, match=words) as caught:
            load_spec(bundle)
        assert "\n" not in str(caught.value)
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", bundle)


def test_the_folder_of_a_run_is_told_from_its_bundle(tiny):
    with pytest.raises(BundleError) as told:
        load_spec(tiny[1])
    assert str(told.value).endswith(f"name {tiny[1] / 'bundle'}")


BIAS = "sessions.0.spikes_out.linear.bias"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda weights: weights | {BIAS: weights[BIAS][:3]}, f"{BIAS} is (3,) in"),
        (lambda weights: {n: w for n, w in weights.items() if n != BIAS}, f"{BIAS} is nothing in"),
        (lambda weights: weights | {"more": weights[BIAS].clone()}, "more is (6,) in the weights"),
    ],
)
def test_weights_of_another_shape_are_refused_by_name(bundle, spoil, words):
    weights = load_file(bundle / "model.safetensors")
    save_file(spoil(weights), bundle / "model.safetensors")
    change(bundle, sha256=_sha256(bundle / "model.safetensors"))
    with pytest.raises(BundleError, match=re.escape(words)):
        build_model(bundle, load_spec(bundle))


def test_weights_that_are_none_are_told(bundle):
    (bundle / "model.safetensors").write_bytes(b"x" * 100)
    change(bundle, sha256=_sha256(bundle / "model.safetensors"))
    with pytest.raises(BundleError, match="weights cannot be read"):
        build_model(bundle, load_spec(bundle))


def test_a_bundle_that_could_not_be_written_is_none(bundle, monkeypatch):
    spec = load_spec(bundle)
    model = build_model(bundle, spec)
    assert not model.training  # no dropout in what decodes

    def save(weights, path):
        raise OSError("disk full")

    monkeypatch.setattr("rt_neds.bundle.save_file", save)
    with pytest.raises(OSError, match="disk full"):
        save_bundle(bundle, model, bin_ms=20.0, sessions=spec.sessions, training={})
    with pytest.raises(BundleError, match="is not a bundle"):
        load_spec(bundle)


def test_weights_of_the_trunk_are_rounded_for_everyone(bundle):
    spec = load_spec(bundle)
    model = build_model(bundle, spec)
    assert is_rounded(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    assert not is_rounded(model)
    save_bundle(bundle, model, bin_ms=20.0, sessions=spec.sessions, training={})
    again = build_model(bundle, load_spec(bundle)).state_dict()
    for name, weight in round_weights(model).state_dict().items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=0)


def test_every_matrix_that_each_bin_reads_whole_is_rounded():
    behaviours = (Behaviour(name="speed", kind="continuous"),)
    size = {"dim": 8, "layers": 1, "heads": 2, "context": 4}
    model = NEDS(ModelConfig(**size, memory=20, linear=True), behaviours, {"a": 3})
    names = {name for name, _ in rounded_weights(model)}
    assert {name.partition(".")[0] for name in names} == {
        "layers", "spikes_shared", "memory", "sessions"
    }  # fmt: skip
    assert "sessions.0.spikes_in.linear.weight" in names
    for name, module in model.named_modules():
        few = ("sessions.", "next", "linear_in")  # of a session, or as few as behaviours
        if isinstance(module, torch.nn.Linear) and not name.startswith(few):
            assert f"{name}.weight" in names
    assert not is_rounded(model)
    before = copy.deepcopy(model.state_dict())
    assert is_rounded(round_weights(model))
    for name, tensor in model.state_dict().items():
        if name not in names:
            assert torch.equal(tensor, before[name]), name
            continue
        of_input = name.startswith("sessions.")  # a unit's weights share a scale, not an output's
        steps = before[name].abs().amax(dim=0 if of_input else 1, keepdim=True) / 127
        assert ((tensor - before[name]).abs() <= 0.501 * steps).all(), name


numbers = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=6))
def test_weights_are_the_nearest_multiples_of_a_scale_and_stay_so(rows):
    weight_EI = torch.tensor(rows)
    whole_EI, scale_E = to_bytes(weight_EI)
    rounded_EI = from_bytes(whole_EI, scale_E)
    assert torch.equal(rounded_EI.double(), whole_EI.double() * scale_E.double()[:, None])
    small_E = weight_EI.abs().amax(dim=1) < LEAST
    assert (whole_EI.abs().amax(dim=1) == torch.where(small_E, 0, 127)).all()
    error_EI = (rounded_EI.double() - weight_EI.double()).abs()
    assert (error_EI <= torch.where(small_E, LEAST, scale_E.double() / 2)[:, None]).all()
    most_E = weight_EI.double().abs().amax(dim=1)
    assert (scale_E[~small_E] <= most_E[~small_E] / 127 * (1 + 2.0**-10)).all()
    again_EI, same_E = to_bytes(rounded_EI)
    assert torch.equal(again_EI, whole_EI)
    assert torch.equal(same_E, scale_E)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_written(bundle, tmp_path, bad):
    spec = load_spec(bundle)
    model = build_model(bundle, spec)
    with torch.no_grad():
        model.layers[0].widen.weight[0, 0] = bad
    with pytest.raises(BundleError, match=r"layers.0.widen.weight has weights that are no numbers"):
        save_bundle(tmp_path / "b", model, bin_ms=20.0, sessions=spec.sessions, training={})
    assert not (tmp_path / "b").exists()


def test_a_read_in_lies_in_bytes_with_a_row_for_each_input(bundle):
    name = "sessions.0.spikes_in.linear.weight"
    weights, model = load_file(bundle / "model.safetensors"), build_model(bundle, load_spec(bundle))
    weight_DI = model.get_parameter(name)
    assert weights[name].dtype == torch.int8
    assert weights[name].shape == weight_DI.T.shape
    scaled_ID = weights[name].float() * weights[name + ".scale"][:, None]
    assert torch.equal(scaled_ID.T, weight_DI)
    few = {n for n, w in weights.items() if w.dtype == torch.int8}
    assert few == {n for n, _ in rounded_weights(model)}


def test_a_scale_that_is_missing_is_named(bundle):
    spec, weights = load_spec(bundle), load_file(bundle / "model.safetensors")
    del weights["layers.0.widen.weight.scale"]
    save_file(weights, bundle / "model.safetensors")
    with pytest.raises(BundleError, match=r"layers.0.widen.weight.scale is nothing in the weights"):
        build_model(bundle, spec)


def test_sessions_are_chosen_by_id(bundle):
    spec = load_spec(bundle)
    assert spec.session().id == "tiny"
    assert spec.session("tiny").id == "tiny"
    with pytest.raises(BundleError, match="session other with a bundle of tiny"):
        spec.session("other")
    two = [spec.session(), msgspec.structs.replace(spec.session(), id="second")]
    several = msgspec.structs.replace(spec, sessions=two)
    assert several.session("second").id == "second"
    with pytest.raises(BundleError, match=r"sessions, tiny, second, and none .* --session"):
        several.session()


def test_of_a_bundle_of_hundreds_of_sessions_some_are_named(bundle):
    spec = load_spec(bundle)
    many = [msgspec.structs.replace(spec.session(), id=f"s{i}") for i in range(400)]
    with pytest.raises(BundleError, match=r"s0, s1, s2, s3, s4 and 395 more, and none is named"):
        msgspec.structs.replace(spec, sessions=many).session()
    with pytest.raises(BundleError, match=r"session x with .* s4 and 395 more; .*train --init"):
        msgspec.structs.replace(spec, sessions=many).session("x")
