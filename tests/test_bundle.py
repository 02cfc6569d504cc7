"""The bundle: a damaged or foreign one is told by name."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rt_neds.bundle import _sha256, build_model, load_spec, save_bundle
from rt_neds.errors import BundleError
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour
from rt_neds.model.rounding import is_rounded, round_trunk, trunk_weights


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


def test_weights_of_another_shape_are_refused_by_name(bundle):
    weights = load_file(bundle / "model.safetensors")
    weights["sessions.0.spikes_out.linear.bias"] = weights["sessions.0.spikes_out.linear.bias"][:3]
    save_file(weights, bundle / "model.safetensors")
    change(bundle, sha256=_sha256(bundle / "model.safetensors"))
    with pytest.raises(BundleError, match=r"sessions\.0\.spikes_out\.linear\.bias is \(3,\)"):
        build_model(bundle, load_spec(bundle))


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
    for name, weight in round_trunk(model).state_dict().items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=0)


def test_every_matrix_that_each_bin_reads_whole_is_rounded():
    behaviours = (Behaviour(name="speed", kind="continuous"),)
    size = {"dim": 8, "layers": 1, "heads": 2, "context": 4}
    model = NEDS(ModelConfig(**size, memory=20, linear=True), behaviours, {"a": 3})
    names = {name for name, _ in trunk_weights(model)}
    assert {name.partition(".")[0] for name in names} == {
        "layers", "spikes_shared", "linear_in", "memory"
    }  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(("sessions.", "next")):
            assert f"{name}.weight" in names
    assert not is_rounded(model)
    before = copy.deepcopy(model.state_dict())
    assert is_rounded(round_trunk(model))
    for name, tensor in model.state_dict().items():
        expected = before[name].bfloat16().float() if name in names else before[name]
        assert torch.equal(tensor, expected), name


def test_sessions_are_chosen_by_id(bundle):
    spec = load_spec(bundle)
    assert spec.session().id == "tiny"
    assert spec.session("tiny").id == "tiny"
    with pytest.raises(BundleError, match="session other with a bundle of tiny"):
        spec.session("other")
