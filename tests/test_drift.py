"""Running bits per spike: by the formula, in the stream as offline, and low when units changed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline import expectation
from offline.batches import prepare
from offline.expectation import expectation_of, mean_counts_N
from offline.predict import ahead_spans
from offline.train import train
from offline.windows import bin_session
from rt_neds.assemble import assemble
from rt_neds.bundle import build_model, load_spec
from rt_neds.drift import LEAST_RATE, Drift, Expectation
from rt_neds.model.neds import AHEAD
from rt_neds.replay import batches
from rt_neds.serve_config import ServeConfig
from rt_neds.session import load_session
from rt_neds.stream.decoder import EagerStep
from rt_neds.stream.fused import FusedStep
from rt_neds.stream.graph import GraphStep
from tests.making import drawn_model, tiny_config, write_session
from tests.naive import surprise_and_bits
from tests.test_fused import NAMES, SCHEME, SIZES, random_model, random_stream, shown_to_torch
from tests.test_loop import ListSink, ListSource


@given(st.integers(0, 2**32 - 1), st.integers(10, 60), st.floats(0.3, 1.0))
@settings(deadline=None, max_examples=30)
def test_is_the_formula_over_the_last_stretch(seed, bins, share):
    rng = np.random.default_rng(seed)
    bins -= bins % Drift.PARTS
    T, N = 3 * bins, 5
    rates_N = rng.uniform(0.1, 2, N)
    counts_TN = rng.poisson(rates_N, (T, N)).astype(np.float32)
    log_rate_TN = rng.normal(0, 1, (T, N)).astype(np.float32)
    observed_T, known_N = rng.random(T) < share, rng.random(N) < 0.7
    drift, used = Drift(rates_N, bins, known_N), []
    for t in range(T):
        drift.expect(log_rate_TN[t] if rng.random() < 0.9 else None)
        if drift._log_rate_N is not None and observed_T[t]:
            used.append(t)
        drift.take(counts_TN[t], bool(observed_T[t]))
    whole = len(used) - len(used) % (bins // Drift.PARTS)
    rows = np.ix_(used[whole - bins : whole], np.flatnonzero(known_N))
    if whole < bins:
        assert drift.now() is None
    elif counts_TN[rows].any():
        expected_N, bits = surprise_and_bits(
            counts_TN[rows], np.exp(log_rate_TN[rows]), rates_N[known_N]
        )
        got_N, got = drift.now()
        np.testing.assert_allclose(got_N, expected_N, rtol=1e-3, atol=1e-3)
        assert got == pytest.approx(bits, rel=1e-3, abs=1e-3)


def test_a_unit_that_was_silent_in_training_is_no_infinite_news():
    drift = Drift([0.0], 10)
    for _ in range(10):
        drift.expect(np.zeros(1, np.float32))
        drift.take(np.ones(1, np.float32), True)
    expected = -math.log2(LEAST_RATE) - (1 - LEAST_RATE) / math.log(2)
    assert drift.now()[1] == pytest.approx(expected, rel=1e-5)


def test_what_is_absurd_to_expect_is_a_large_surprise_and_no_infinite_one():
    drift = Drift([1.0, 1.0], 10)
    for _ in range(10):
        drift.expect(np.array([1e4, -1e4], np.float32))
        drift.take(np.ones(2, np.float32), True)
    surprise_N, bits = drift.now()
    assert np.isfinite([*surprise_N, bits]).all()
    assert (np.abs(surprise_N) > 2).all()


@pytest.mark.parametrize(
    ("off_N", "surprise", "units"), [((0, 6, -3), 3.87, ["c", "d"]), ((0.1, 3.2, 0), 1.85, [])]
)
def test_units_that_are_off_are_named_by_how_much_once_it_has_drifted(off_N, surprise, units):
    usual = Expectation(
        rates=[4.0] * 4, surprise=[0.0] * 4, sd=[1.0] * 4, bits_per_spike=0.0, seconds=2.0
    )
    drift = Drift(usual.rates, 100, np.array([True, False, True, True]))
    counts_N = np.full(4, 4, np.float32)
    counts_N[[0, 2, 3]] += np.array(off_N) * math.sqrt(400) / 100
    for _ in range(100):
        drift.expect(np.full(4, math.log(4), np.float32))
        drift.take(counts_N, True)
    said = drift.status(usual, list("abcd"))
    assert said["surprise"] == pytest.approx(surprise, abs=0.006)
    assert (said["drifted"], said["units"]) == (bool(units), units)


def test_a_stretch_without_spikes_and_without_news_is_no_surprise():
    drift = Drift([1.0], 10)
    for _ in range(10):
        drift.expect(np.zeros(1, np.float32))
        drift.take(np.zeros(1, np.float32), True)
    surprise_N, bits = drift.now()
    assert (surprise_N.tolist(), bits) == ([0.0], 0.0)


def test_stretches_that_are_forgotten_do_not_overlap():
    drift, complete = Drift([1.0], 20), []

    def take(bins):
        for _ in range(bins):
            drift.expect(np.zeros(1, np.float32))
            drift.take(np.ones(1, np.float32), True)
            complete.append(drift.complete)

    take(1)
    drift.forget()
    take(21)
    assert np.flatnonzero(complete).tolist() == [20]
    drift.forget()
    assert drift.now() is None
    take(20)
    assert np.flatnonzero(complete).tolist() == [20, 41]


def test_the_verdict_needs_a_whole_stretch_and_twice_the_usual():
    usual = Expectation(rates=[1.0], surprise=[0.5], sd=[0.1], bits_per_spike=0.5, seconds=0.2)
    for log_rate, drifted in ((math.log(0.2), True), (math.log(40), True), (math.log(4), False)):
        drift = Drift(usual.rates, 10)
        for _ in range(10):
            assert drift.status(usual, ["u"])["bits_per_spike"] is None
            assert not drift.status(usual, ["u"])["drifted"]
            drift.expect(np.full(1, log_rate, np.float32))
            drift.take(np.full(1, 4, np.float32), True)
        said = drift.status(usual, ["u"])
        assert said["drifted"] is drifted
        assert said["units"] == (["u"] if drifted else [])
        assert drift.status(usual, ["u"], np.array([True]))["surprise"] is None  # all left out


def test_a_unit_that_is_back_from_silence_has_not_drifted():
    usual = Expectation(
        rates=[1.0, 1.0], surprise=[0.0, 0.0], sd=[1.0, 1.0], bits_per_spike=0.5, seconds=20.0
    )
    rng, drift = np.random.default_rng(0), Drift(usual.rates, 1000)
    rate_N = np.array([3.0, 3.0])
    silent_N = np.array([True, False])
    for t in range(1500):
        counts_N = rng.poisson(rate_N).astype(np.float32)
        silent = 200 <= t < 1400
        counts_N[0] *= not silent
        drift.expect(np.log(rate_N).astype(np.float32))
        drift.take(counts_N, True, silent_N if silent else None)
    said = drift.status(usual, ["a", "b"])
    assert not said["drifted"]
    assert said["surprise"] > 0
    assert drift.now()[1] == pytest.approx(math.log2(3) - (2 / 3) / math.log(2), abs=0.05)


@pytest.mark.parametrize("size", SIZES)
def test_every_step_expects_of_the_next_bin_what_forward_asks_ahead(size):
    model = random_model(size)
    counts_TN, observed_T, missing_N = random_stream(model, 40)
    shown = shown_to_torch(model, counts_TN, observed_T)
    with torch.no_grad():
        missing = torch.from_numpy(missing_N)[None, None]
        ahead = model("a", *shown, SCHEME, missing_BTN=missing, wanted=(AHEAD,))[AHEAD][0].numpy()
    steps = [
        EagerStep(model, "a", NAMES, missing_N),
        FusedStep(model, "a", NAMES, missing_N),
        GraphStep(model, "a", NAMES, missing_N, "cpu", captured=False),
    ]
    for step in steps:
        got, at = [], 0
        for bins in (1, 1, 8, 3, 1, 8, 8, 8, 2):
            step.steps(list(counts_TN[at : at + bins]), list(observed_T[at : at + bins]))
            got.append(step.next_TN().copy())
            at += bins
        assert at == len(counts_TN)
        np.testing.assert_allclose(np.concatenate(got)[:-1], ahead[1:], atol=2e-4)


@pytest.fixture(scope="module")
def foreseeing(tmp_path_factory):
    """A session, its configuration, and a bundle that was taught to foresee spikes."""
    folder = tmp_path_factory.mktemp("foreseeing")
    session = write_session(folder / "s.h5", seconds=400, units=12)
    config = tiny_config(
        data={"fractions": [0.5, 0.3, 0.2]},
        masking={"schemes": {"decoding": 1.0}, "ahead": True},
        training={"steps": 150, "validate_every": 150, "learning_rate": 5e-3},
    )
    train(config, [str(session)], folder / "run")
    return session, config, folder / "run" / "bundle"


def served(bundle, items, announced=None):
    spec = load_spec(bundle)
    source, sink = ListSource(items, announced), ListSink()
    loop = assemble(
        ServeConfig(probe="p", bundle="b"), spec, build_model(bundle, spec), source, sink, announced
    )
    loop.run(lambda: not source.items)
    return loop.status(0)["drift"]


def test_the_stream_says_what_is_usual_as_offline_and_notices_exchanged_units(foreseeing):
    path, config, bundle = foreseeing
    session = load_session(path)
    usual = load_spec(bundle).sessions[0].expectation
    assert usual is not None
    assert min(usual.bits_per_spike, *usual.sd) > 0
    assert np.abs(usual.surprise).max() < 10
    binned = bin_session(session, config.data, config.behaviour)
    np.testing.assert_allclose(usual.rates, mean_counts_N(binned), atol=1e-6)

    calm = served(bundle, list(batches(session, 20.0, epoch=1)))
    assert not calm["drifted"]
    # The last stretch of the session, offline, is what the stream said last.
    bins = round(1000 * usual.seconds / config.data.bin_ms)
    T = binned.bins
    rate_TN = ahead_spans(build_model(bundle, load_spec(bundle)), binned, [(0, T)])
    drift = Drift(usual.rates, bins)
    for t in range(T):
        drift.expect(np.log(rate_TN[t]) if t else None)
        drift.take(binned.counts_TN(t, t + 1)[0], bool(binned.scored_TM[t, 0]))
    assert calm["bits_per_spike"] == pytest.approx(drift.now()[1], abs=2e-3)

    exchanged = list(batches(session, 20.0, epoch=1))
    for batch in exchanged:  # those that follow speed and those that follow choice
        batch.records_S = batch.records_S.copy()
        batch.records_S["unit"] = (batch.records_S["unit"] + 6) % 12
    wrong = served(bundle, exchanged)
    assert wrong["drifted"], (wrong, calm)


AHEAD_ALONE = {"schemes": {"decoding": 1.0}, "ahead": True}


@pytest.mark.parametrize(("longest", "most", "stretches"), [(30.0, 20, 5), (5.0, 8, 8)])
def test_what_is_usual_is_that_of_stretches_of_validation_where_it_was_recorded(
    tmp_path, monkeypatch, longest, most, stretches
):
    monkeypatch.setattr(expectation, "STRETCH_S", longest)
    monkeypatch.setattr(expectation, "MOST_STRETCHES", most)
    path = write_session(tmp_path / "s.h5", seconds=165, domain=[(0.0, 80.0), (85.0, 165.0)])
    config = tiny_config(data={"fractions": [0.3, 0.4, 0.3]}, masking=AHEAD_ALONE)
    subject = prepare(path, config)
    binned, model = subject.binned, drawn_model(config, subject)
    usual = expectation_of(model, binned, config)

    train_T = binned.of_split("train") & binned.scored_TM[:, 0]
    counts_TN = binned.counts_TN(0, binned.bins)
    rates_N = counts_TN[train_T].mean(axis=0)
    val_S = np.flatnonzero(binned.of_split("val"))
    assert usual.seconds == pytest.approx(min(longest, len(val_S) * 0.02 / 6))
    bins = Drift.PARTS * -(-round(usual.seconds / 0.02) // Drift.PARTS)
    spans = binned.spans("val")
    assert len(spans) == 2
    rate_SN = ahead_spans(model, binned, spans)
    use_S = binned.scored_TM[val_S, 0]
    use_S[round(most * usual.seconds / 0.02) :] = False
    val_S, rate_SN = val_S[use_S], rate_SN[use_S]
    surprises, bits = [], []
    for at in range(0, len(val_S) - bins + 1, bins):
        of = slice(at, at + bins)
        surprise_N, more = surprise_and_bits(counts_TN[val_S[of]], rate_SN[of], rates_N)
        surprises.append(surprise_N)
        bits.append(more)
    assert len(surprises) == stretches
    np.testing.assert_allclose(usual.rates, rates_N, atol=1e-6)
    np.testing.assert_allclose(usual.surprise, np.mean(surprises, axis=0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(usual.sd, np.std(surprises, axis=0, ddof=1), rtol=1e-3, atol=1e-3)
    assert usual.bits_per_spike == pytest.approx(np.mean(bits), rel=1e-3, abs=1e-4)


def test_half_a_minute_of_validation_says_what_is_usual_and_less_does_not(tmp_path):
    config = tiny_config(data={"fractions": [0.3, 0.4, 0.3]}, masking=AHEAD_ALONE)
    for seconds, said in ((80, True), (70, False)):  # 32 and 28 s of validation
        subject = prepare(write_session(tmp_path / f"{seconds}.h5", seconds=seconds), config)
        usual = expectation_of(drawn_model(config, subject), subject.binned, config)
        assert (usual is not None) == said


def test_nothing_is_usual_without_having_been_taught_or_held_out(foreseeing, tiny):
    path, _, bundle = foreseeing
    assert load_spec(tiny[1] / "bundle").sessions[0].expectation is None
    model = build_model(bundle, load_spec(bundle))
    refit = tiny_config(
        data={"fractions": [0.5, 0.3, 0.2], "refit": True},
        masking={"schemes": {"decoding": 1.0}, "ahead": True},
    )
    binned = bin_session(load_session(path), refit.data, refit.behaviour)
    assert expectation_of(model, binned, refit) is None
