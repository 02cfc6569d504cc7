"""With ``precision = "bf16"`` a CPU multiplies in bfloat16 in training steps, and nowhere else."""

import argparse

import pytest
import torch

from offline import train as module
from offline.precision import bf16_products, rounds_factors
from tests.making import multiplies_bf16, tiny_config, write_session

BF16, SUMMARY = {"precision": "bf16"}, {"val": {}, "bundle": "b"}


@pytest.fixture
def factors():
    torch.manual_seed(0)
    return torch.randn(64, 512), torch.randn(512, 96)


def test_factors_are_rounded_and_sums_are_not(factors):
    x, y = factors
    exact = x.double() @ y.double()
    of_rounded = x.bfloat16().double() @ y.bfloat16().double()
    with bf16_products(True):
        product = x @ y
    assert product.dtype == torch.float32
    assert rounds_factors() or not multiplies_bf16()
    if not rounds_factors():
        error = (product - exact).abs().max()
        assert error < 1e-3 < (of_rounded - exact).abs().max()
        pytest.skip("PyTorch goes on in float32 on this processor")
    assert (product - of_rounded).abs().max() < 1e-4 < (product - exact).abs().max()


def test_not_wanted_they_are_as_ever(factors):
    x, y = factors
    before = x @ y
    with bf16_products(False):
        assert torch.equal(x @ y, before)
        assert torch.get_float32_matmul_precision() == "highest"


def test_after_an_error_they_are_as_before(factors):
    x, y = factors
    before = x @ y
    with pytest.raises(KeyError), bf16_products(True):
        raise KeyError
    assert torch.equal(x @ y, before)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("precision", "inside"), [("bf16", "medium"), ("fp32", "highest")])
def test_steps_have_them_and_validation_has_not(precision, inside, tmp_path, monkeypatch):
    seen = {}

    def watched(name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            seen.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return real(*args, **kwargs)

        return call

    for name in ("batch_losses", "validate"):
        monkeypatch.setattr(module, name, watched(name))
    session = str(write_session(tmp_path / "s.h5", seconds=20))
    config = tiny_config(training={"steps": 2, "precision": precision})
    module.train(config, [session], tmp_path / "run")
    assert seen == {"batch_losses": {inside}, "validate": {"highest"}}


@pytest.mark.parametrize("can", [False, True])
def test_a_user_is_told_where_it_changes_nothing(can, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "rounds_factors", lambda: can)
    monkeypatch.setattr(module, "train", lambda *args, **kwargs: SUMMARY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "load_config", lambda *args: tiny_config(training=BF16))
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args(["--sessions", "s.h5", "--out", str(tmp_path / "run")])
    args.config, args.set, args.quiet = "c.toml", [], True
    module.run(args)
    assert capsys.readouterr().err.count("multiplies in float32") == (not can)
