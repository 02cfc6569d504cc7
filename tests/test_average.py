"""The running average: what a step does not touch is caught up with exactly."""

import copy

import numpy as np
import torch

from offline.average import RunningAverage, touched
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour

CONFIG = ModelConfig(dim=8, layers=1, heads=2, context=4, history=(1,))


def network():
    behaviours = (Behaviour(name="choice", kind="categorical", classes=("left", "right")),)
    return NEDS(CONFIG, behaviours, {"a": 3, "b": 3, "c": 5})


def test_it_is_the_average_over_every_step_of_every_weight():
    torch.manual_seed(0)
    model, rng = network(), np.random.default_rng(0)
    average, slow = RunningAverage(model), copy.deepcopy(model)
    for step in range(30):
        sessions = list(rng.choice(["a", "b"] if step < 20 else ["b", "c"], 1 + step % 2, False))
        decay = min(0.9, (1 + step) / (10 + step))
        average.before(sessions)
        with torch.no_grad():
            for parameter in touched(model, sessions):
                parameter += torch.randn_like(parameter)
            for mean, now in zip(slow.parameters(), model.parameters(), strict=True):
                mean.mul_(decay).add_(now, alpha=1 - decay)
        average.after(sessions, decay)
        if step in (4, 29):  # in between, c has been owed for long
            for mean, expected in zip(
                average.settle().parameters(), slow.parameters(), strict=True
            ):
                torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-4)


def test_a_step_touches_the_shared_and_its_own_and_nothing_else():
    model = network()
    others = {id(p) for name in ("a", "c") for p in model.parts(name).parameters()}
    found = {id(p) for p in touched(model, ["b"])}
    assert found == {id(p) for p in model.parameters()} - others
    average = RunningAverage(model)
    assert not average.mean.training  # validated without dropout
    before = copy.deepcopy(average.mean.parts("a"))
    for parameter in model.parameters():
        parameter.data += 1
    average.before(["b"])
    average.after(["b"], 0.5)
    for kept, now in zip(before.parameters(), average.mean.parts("a").parameters(), strict=True):
        assert torch.equal(kept, now)
