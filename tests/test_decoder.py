"""The decoder: every way to step gives the same values, named as the schema says."""

import itertools

import msgspec
import numpy as np
import pytest

from offline.config import TrainConfig
from offline.evaluate import evaluate
from offline.train import train
from rt_neds.bundle import build_model, load_spec
from rt_neds.config import config_path, load_config
from rt_neds.drift import Expectation
from rt_neds.frames import BinnedFrame
from rt_neds.simulate import simulate_file
from rt_neds.stream.decoder import Decoder, EagerStep, Silence, make_step, schema_outputs


def frames(bins, units, seed=0, start=0):
    rng = np.random.default_rng(seed)
    for k in range(bins):
        counts = rng.poisson(0.4, units).astype(np.float32)
        seen = bool(rng.random() < 0.9)
        yield BinnedFrame(0, start + k, 0, counts, seen, 0, 0, 0, 0, k == 0, 0, 0)


@pytest.mark.parametrize("missing", [[], [1, 4]])
def test_the_fast_step_and_the_plain_one_publish_the_same(tiny, missing):
    spec = load_spec(tiny[1] / "bundle")
    session, model = spec.session(), build_model(tiny[1] / "bundle", spec)
    missing_N = np.isin(np.arange(6), missing)
    names = [b.name for b in spec.behaviours]
    fast = Decoder(spec, session, make_step(model, spec, session, missing_N))
    plain = Decoder(spec, session, EagerStep(model, session.id, names, missing_N))
    fast.warm_up(6)
    for frame in frames(60, 6, start=12_345):
        np.testing.assert_allclose(fast.decode(frame), plain.decode(frame), rtol=1e-4, atol=1e-4)


def test_a_queue_of_bins_decodes_to_the_same_values(tiny):
    spec = load_spec(tiny[1] / "bundle")
    session, model = spec.session(), build_model(tiny[1] / "bundle", spec)
    none, names = np.zeros(6, bool), [b.name for b in spec.behaviours]
    several = list(frames(40, 6, start=70))
    for step, atol in [
        (make_step(model, spec, session, none), 0),
        (EagerStep(model, session.id, names), 1e-5),
    ]:
        decoder = Decoder(spec, session, step)
        one_by_one_TV = np.stack([decoder.decode(frame).copy() for frame in several])
        at = [0, 8, 9, 12, 20, 25, 33, 40]
        chunks = [decoder.decode_chunk(several[a:b]).copy() for a, b in itertools.pairwise(at)]
        np.testing.assert_allclose(np.concatenate(chunks), one_by_one_TV, rtol=0, atol=atol)


def test_values_are_where_the_schema_says(tiny):
    spec = load_spec(tiny[1] / "bundle")
    session, model = spec.session(), build_model(tiny[1] / "bundle", spec)
    decoder = Decoder(spec, session, make_step(model, spec, session, np.zeros(6, bool)))
    outputs = schema_outputs(spec, session)
    assert sum(o["size"] for o in outputs) == len(decoder.values_V)
    choice = next(o for o in outputs if o["name"] == "choice")
    for frame in frames(20, 6):
        values = decoder.decode(frame)
        probabilities = values[choice["offset"] : choice["offset"] + choice["size"]]
        assert probabilities.sum() == pytest.approx(1.0, abs=1e-6)
        assert session.scales["speed"].low <= values[0] <= session.scales["speed"].high
        assert values[1] > 0


@pytest.mark.parametrize("breaks", ["restart", "behind", ""])
def test_of_the_first_bin_after_a_break_nothing_was_expected(tiny, breaks):
    spec = load_spec(tiny[1] / "bundle")
    model = build_model(tiny[1] / "bundle", spec)
    usual = Expectation(
        rates=[0.4] * 6, surprise=[0.0] * 6, sd=[1.0] * 6, bits_per_spike=0.0, seconds=0.2
    )
    session = msgspec.structs.replace(spec.session(), expectation=usual)  # ten bins
    decoder = Decoder(spec, session, make_step(model, spec, session, np.zeros(6, bool)))
    said = []
    for n, frame in enumerate(frames(15, 6)):
        frame.observed = True
        frame.first_of_run = n == 0 or (n == 6 and breaks == "restart")
        decoder.decode(frame)
        decoder.look_back([frame])
        if n == 5 and breaks == "behind":
            decoder.look_back()
        said.append(decoder.drift()["surprise"] is not None)
    assert said.index(True) == (11 if breaks else 10)
    frame.first_of_run, frame.silent_N = False, np.ones(6, bool)
    decoder.decode(frame)
    assert decoder.drift()["surprise"] is None  # of all of them it is known where they went


def test_the_control_decodes_nothing():
    step = Silence(3)
    step.reset(5)
    assert step.steps([np.ones(4, np.float32)] * 2, [True] * 2).tolist() == [[0, 0, 0]] * 2


def test_a_simulated_session_is_scored_beside_its_ideal(tmp_path):
    simulate_file(tmp_path / "s.h5", units=60, minutes=6, seed=3)
    config = load_config(
        config_path("demo.toml"), TrainConfig, ["training.steps=10", "training.batch=2"]
    )
    train(config, [str(tmp_path / "s.h5")], tmp_path / "run")
    result = evaluate(tmp_path / "run" / "bundle", tmp_path / "s.h5")
    assert set(result["ideal"]) == set(result["decoding"]) == {"wheel_speed", "whisker", "choice"}
    for name in ("wheel_speed", "whisker"):
        assert result["ideal"][name]["r2"] > result["decoding"][name]["r2"]
        assert result["ideal"][name]["r2"] > result["baselines"]["ridge"][name]["r2"]
    assert result["ideal"]["choice"]["balanced_accuracy_bins"] > 0.6
    assert result["stream_vs_offline_max_abs"] < 1e-4
