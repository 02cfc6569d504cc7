"""Published values: the compiled call equals the formula, whatever the network says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_neds.model.readout import Behaviour, Scale, to_values, to_values_TV
from rt_neds.stream.values import Values, values_of, write_values

BEHAVIOURS = [
    Behaviour(name="speed", kind="continuous"),
    Behaviour(name="choice", kind="categorical", classes=("left", "right", "none")),
    Behaviour(name="licks", kind="poisson"),
    Behaviour(name="position", kind="continuous"),
]
SCALES = [Scale(mean=3.0, sd=2.0, low=-1.0, high=90.0), Scale(), Scale(), Scale(low=0.0, high=1e-3)]
BINS = 5


def raw_of(seed, spread):
    rng = np.random.default_rng(seed)
    return (spread * rng.standard_normal((BINS, sum(b.outputs for b in BEHAVIOURS)))).astype("f4")


def one_by_one(raw_TO):
    rows = []
    for raw_O in raw_TO:
        row, at = [], 0
        for behaviour, scale in zip(BEHAVIOURS, SCALES, strict=True):
            row += to_values(raw_O[at : at + behaviour.outputs], behaviour, scale)
            at += behaviour.outputs
        rows.append(row)
    return np.array(rows, np.float32)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), spread=st.floats(0, 300))
def test_equals_the_formula(seed, spread):
    raw_TO = raw_of(seed, spread)
    got_TV = Values(BEHAVIOURS, SCALES, BINS).of(raw_TO)
    assert got_TV.shape == (BINS, sum(values_of(b.kind, len(b.classes)) for b in BEHAVIOURS))
    np.testing.assert_allclose(got_TV, one_by_one(raw_TO), rtol=2e-4, atol=2e-6)


def test_equals_the_formula_for_sequences():
    raw_TO, at = raw_of(0, 2.0), 0
    parts = []
    for behaviour, scale in zip(BEHAVIOURS, SCALES, strict=True):
        raw_TC = torch.from_numpy(raw_TO[:, at : at + behaviour.outputs])
        parts.append(to_values_TV(raw_TC, behaviour, scale).numpy())
        at += behaviour.outputs
    got_TV = Values(BEHAVIOURS, SCALES, BINS).of(raw_TO)
    np.testing.assert_allclose(got_TV, np.concatenate(parts, axis=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("only", range(len(BEHAVIOURS)))
def test_one_behaviour_alone_and_compiled_once(only):
    values = Values(BEHAVIOURS[only : only + 1], SCALES[only : only + 1], 2)
    raw_1O = raw_of(1, 1.0)[:1, : BEHAVIOURS[only].outputs].copy()
    expected = to_values(raw_1O[0], BEHAVIOURS[only], SCALES[only])
    np.testing.assert_allclose(values.of(raw_1O)[0], expected, rtol=1e-4)
    assert len(write_values.signatures) == 1
