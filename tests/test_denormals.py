"""Numbers too small to be normal cost nothing in a training step, and are there again after it."""

import numpy as np
import pytest
import torch

from offline import train as module
from offline.denormals import flushed
from tests.making import tiny_config, write_session

SMALL = 2.0**-100


def product(x):
    return (torch.tensor([SMALL]) * x).item()


@pytest.fixture
def can():
    able = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    if not able:
        pytest.skip("this processor cannot count them as zero")


def test_they_count_as_zero_inside_and_not_outside(can):
    assert product(2.0**-40) != 0.0
    with flushed():
        assert product(2.0**-40) == 0.0
        assert product(2.0**-20) == SMALL * 2.0**-20  # what is normal stays
    assert product(2.0**-40) != 0.0
    assert np.float32(SMALL) * np.float32(2.0**-40) != 0.0


def test_they_are_there_again_after_an_error(can):
    with pytest.raises(KeyError), flushed():
        raise KeyError
    assert product(2.0**-40) != 0.0


def test_who_has_them_flushed_keeps_them_so(can):
    torch.set_flush_denormal(True)
    try:
        with flushed():
            pass
        assert product(2.0**-40) == 0.0
    finally:
        torch.set_flush_denormal(False)


def test_a_training_step_goes_without_them(can, tmp_path, monkeypatch):
    real, seen = module.train_step, []

    def step(*args):
        seen.append(product(2.0**-40))
        return real(*args)

    monkeypatch.setattr(module, "train_step", step)
    session = str(write_session(tmp_path / "s.h5", seconds=20))
    module.train(tiny_config(training={"steps": 2}), [session], tmp_path / "run")
    assert seen == [0.0, 0.0]
    assert product(2.0**-40) != 0.0
