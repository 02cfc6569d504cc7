"""Units that fall silent: noticed as the rule says, taken for missing alike by all, and said."""

import itertools
import uuid

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.silence import longest_silences
from offline.train import train
from offline.windows import bin_session
from rt_neds.assemble import assemble
from rt_neds.bundle import build_model, load_spec
from rt_neds.frames import BinnedFrame, Flag
from rt_neds.health import Health
from rt_neds.replay import batches
from rt_neds.serve_config import ServeConfig
from rt_neds.session import load_session
from rt_neds.stream.binner import Binner
from rt_neds.stream.decoder import Decoder, EagerStep
from rt_neds.stream.fused import FusedStep
from rt_neds.stream.graph import GraphStep
from rt_neds.stream.publisher import Note
from rt_neds.stream.silent import LEAST_S, LONGEST_S, TIMES, FallenSilent
from rt_neds.wire import MAX_NAMED, pack_map, unpack_map
from tests.making import tiny_config, write_session
from tests.naive import fallen_silent, longest_silence
from tests.test_fused import NAMES, SCHEME, SIZES, random_model, random_stream, shown_to_torch
from tests.test_health import frame as decoded_frame
from tests.test_loop import ListSink, ListSource

BIN_S = 0.02


def frame(counts_N, observed=True):
    return BinnedFrame(0, 0, 0, counts_N, observed, 0, 0, 0, 0, False, 0, 0)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.5))
@settings(deadline=None, max_examples=40)
def test_is_the_rule_bin_by_bin(seed, rate):
    rng = np.random.default_rng(seed)
    T, N = 400, 6
    longest_N = rng.choice([0.02, 0.5, 1.5, LONGEST_S, LONGEST_S + 0.1], N)
    limit_N = np.where(longest_N > LONGEST_S, np.inf, np.maximum(TIMES * longest_N, LEAST_S))
    counts_TN = rng.poisson(rate * rng.random(N) ** 3, (T, N)).astype(np.float32)
    observed_T, missing_N = rng.random(T) < 0.9, rng.random(N) < 0.3
    limit_N[missing_N] = np.inf
    expected_TN = fallen_silent(counts_TN, observed_T, limit_N / BIN_S)
    tracker, before = FallenSilent(longest_N.tolist(), BIN_S, 5, missing_N), None
    for t in range(T):
        binned = frame(counts_TN[t], bool(observed_T[t]))
        tracker.take(binned)
        now_N = np.zeros(N, bool) if binned.silent_N is None else binned.silent_N
        np.testing.assert_array_equal(now_N, expected_TN[t])
        if t and np.array_equal(expected_TN[t], expected_TN[t - 1]):
            assert binned.silent_N is before  # whoever compares by identity sees no change
        before = binned.silent_N


def test_a_bundle_that_does_not_know_takes_nobody_for_silent():
    tracker = FallenSilent([], BIN_S, 5)
    for _ in range(100_000):
        tracker.take(binned := frame(np.zeros(4, np.float32)))
    assert binned.silent_N is None


def test_no_limit_is_shorter_than_what_the_read_in_looks_back():
    tracker = FallenSilent([0.1], 1.0, 10)
    said = []
    for _ in range(12):
        tracker.take(binned := frame(np.zeros(1, np.float32)))
        said.append(binned.silent_N is not None)
    assert said == [False] * 10 + [True] * 2


def test_who_goes_on_with_the_same_units_knows_who_was_silent():
    before, after, other = (FallenSilent([0.1] * n, BIN_S, 5) for n in (2, 2, 1))
    for _ in range(200):
        before.take(frame(np.array([0, 1], np.float32)))
    after.go_on_from(before)
    assert after.now_N.tolist() == [True, False]
    other.go_on_from(before)
    assert other.now_N is None


@pytest.mark.parametrize("size", SIZES)
def test_every_step_takes_silent_units_for_missing_as_forward_does(size):
    model = random_model(size)
    T, history = 90, max(model.config.history)
    counts_TN, observed_T, missing_N = random_stream(model, T)
    rng = np.random.default_rng(1)
    silent_TN = np.zeros(counts_TN.shape, bool)
    for n in rng.choice(np.flatnonzero(~missing_N), 3, replace=False):
        begin = int(rng.integers(history, 50))
        end = begin + int(rng.integers(1, 30))
        counts_TN[begin - history : end, n] = 0
        silent_TN[begin:end, n] = True
    missing = torch.from_numpy(missing_N | silent_TN)[None]
    shown = shown_to_torch(model, counts_TN, observed_T)
    with torch.no_grad():
        outputs = model("a", *shown, SCHEME, missing_BTN=missing, wanted=NAMES)
        believed = model("a", *shown, SCHEME, missing_BTN=missing_1(missing_N), wanted=NAMES)
    want, other = (torch.cat([of[n][0] for n in NAMES], 1).numpy() for of in (outputs, believed))
    assert np.abs(want - other).max() > 1e-2  # it does matter
    for step in (
        EagerStep(model, "a", NAMES, missing_N),
        FusedStep(model, "a", NAMES, missing_N),
        GraphStep(model, "a", NAMES, missing_N, "cpu", captured=False),
    ):
        got = []
        for t in range(T):
            step.miss(silent_TN[t] if silent_TN[t].any() else None)
            got.append(step.steps((counts_TN[t],), (observed_T[t],))[0].copy())
        np.testing.assert_allclose(np.stack(got), want, atol=2e-4)


@pytest.mark.parametrize("make", [FusedStep, EagerStep])
def test_units_that_fall_silent_in_the_middle_of_a_queue_change_nothing_but_their_bins(
    trained, make
):
    spec = load_spec(trained[2])
    model, session = build_model(trained[2], spec), spec.sessions[0]
    names = [b.name for b in spec.behaviours]
    rng = np.random.default_rng(0)
    counts_TN = rng.poisson(0.5, (64, len(session.units))).astype(np.float32)
    counts_TN[:40, 2] = 0
    gone_N, decoded, drifts = np.arange(len(session.units)) == 2, [], []
    for cuts in (range(65), [0, 1, 8, 16, 24, 32, 40, 48, 56, 64]):
        decoder = Decoder(spec, session, make(model, session.id, names))
        values = []
        for a, b in itertools.pairwise(cuts):
            several = [frame(counts_TN[t]) for t in range(a, b)]
            for t, binned in enumerate(several, start=a):
                binned.bin, binned.first_of_run = t, t == 0
                binned.silent_N = gone_N if 11 <= t < 37 else None
            values.append(decoder.decode_chunk(several).copy())
            decoder.look_back(several)
        decoded.append(np.concatenate(values))
        drifts.append(decoder._drift._sums_4N)
    np.testing.assert_allclose(decoded[1], decoded[0], atol=0 if make is FusedStep else 1e-5)
    np.testing.assert_allclose(drifts[1], drifts[0], rtol=1e-4, atol=1e-4)


def test_while_it_is_taken_for_missing_nothing_is_expected_of_a_unit(trained):
    spec = load_spec(trained[2])
    model, session = build_model(trained[2], spec), spec.sessions[0]
    step = FusedStep(model, session.id, [b.name for b in spec.behaviours])
    decoder, rng = Decoder(spec, session, step), np.random.default_rng(0)
    gone_N = np.arange(len(session.units)) == 2
    for t in range(2 * decoder._drift._part):
        binned = frame(np.where(gone_N, 0, rng.poisson(0.5, len(gone_N))).astype(np.float32))
        binned.bin, binned.first_of_run, binned.silent_N = t, t == 0, gone_N
        decoder.decode(binned)
        decoder.look_back([binned])
    assert (decoder._drift._parts[-1].any(axis=0) == ~gone_N).all()


def missing_1(missing_N):
    return torch.from_numpy(missing_N)[None, None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("silent")
    session = write_session(folder / "s.h5", seconds=500)
    config = tiny_config(masking={"schemes": {"decoding": 1.0}, "ahead": True})
    train(config, [str(session)], folder / "run")
    return session, config, folder / "run" / "bundle"


def test_the_bundle_says_how_long_each_unit_was_silent_in_training(trained):
    path, config, bundle = trained
    binned = bin_session(load_session(path), config.data, config.behaviour)
    fired = np.concatenate([binned.counts_TN(a, b) > 0 for a, b in binned.spans("train")])
    expected = [BIN_S * longest_silence(fired[:, n]) for n in range(fired.shape[1])]
    said = load_spec(bundle).sessions[0].longest_silence
    np.testing.assert_allclose(said, expected, atol=1e-3)
    assert longest_silences(binned) == said


def test_short_training_and_units_that_hardly_fire_say_nothing(tmp_path, tiny):
    assert load_spec(tiny[1] / "bundle").sessions[0].longest_silence == []
    path = write_session(tmp_path / "s.h5", seconds=500, units=2)
    config = tiny_config()
    binned = bin_session(load_session(path), config.data, config.behaviour)
    first = binned.session.records_S["unit"] == 0
    binned.session.records_S["sample"][first] //= 10**6  # all before training begins to count
    assert longest_silences(binned)[0] > LONGEST_S


def test_a_lost_unit_is_flagged_named_and_missing_until_it_fires_again(trained):
    path, _, bundle = trained
    spec = load_spec(bundle)
    model, of_bundle = build_model(bundle, spec), spec.sessions[0]
    lost, dead_from, back_at = 1, 3_000, 6_000  # bins
    width = 0.02 * of_bundle.rate
    items = list(batches(load_session(path), 20.0, epoch=1))
    for batch in items:
        sample_S, unit_S = batch.records_S["sample"], batch.records_S["unit"]
        dead = (unit_S == lost) & (sample_S >= dead_from * width) & (sample_S < back_at * width)
        batch.records_S = batch.records_S[~dead]
    source, sink = ListSource(items), ListSink()
    loop = assemble(ServeConfig(probe="p", bundle="b"), spec, model, source, sink, None)
    named = []
    loop.run(lambda: named.append(loop.status(0)["units"]["silent"]) or not source.items)
    flagged = np.array([f.bin for f in sink.frames if f.flags & Flag.MISSING_UNITS])
    limit = max(TIMES * of_bundle.longest_silence[lost], LEAST_S) / 0.02
    assert abs(flagged[0] - (dead_from + limit)) < 50  # it may not have fired in its last bins
    assert back_at <= flagged[-1] + 1 < back_at + 50
    np.testing.assert_array_equal(np.diff(flagged), 1)
    assert [of_bundle.units[lost]] in named
    assert named[-1] == []

    # While it is missing it is so as in a stream that never had it, once the context is past.
    without = list(batches(load_session(path), 20.0, epoch=1))
    for batch in without:
        batch.records_S = batch.records_S[batch.records_S["unit"] != lost]
    missing_N = np.arange(len(of_bundle.units)) == lost
    names = [b.name for b in spec.behaviours]
    plain = Decoder(spec, of_bundle, EagerStep(model, of_bundle.id, names, missing_N))
    rows_U, by_bin = np.arange(len(of_bundle.units), dtype=np.int32), {}
    binner = Binner(rows_U, len(rows_U), round(width), spec.model.context)
    for batch in without:
        for binned in binner.frames(batch):
            by_bin[binned.bin] = plain.decode(binned).copy()
    settled = flagged[0] + spec.model.receptive_field
    for f in sink.frames:
        if settled <= f.bin <= flagged[-1]:
            np.testing.assert_allclose(f.values_V, by_bin[f.bin], atol=1e-4)


def test_a_status_in_which_all_units_are_silent_can_still_be_read(trained):
    path, _, bundle = trained
    spec = load_spec(bundle)
    config = ServeConfig(probe="p", bundle="b")
    source = ListSource(batches(load_session(path), 20.0, epoch=1))
    loop = assemble(config, spec, build_model(bundle, spec), source, ListSink(), None)
    ids = [str(uuid.uuid4()) for _ in range(6000)]
    loop._decoder.session = msgspec.structs.replace(spec.sessions[0], units=ids)
    loop._silent.now_N = np.ones(len(ids), bool)
    _, packed = pack_map("status", "p", loop.status(0))
    told = unpack_map(packed)["units"]
    assert told["silent"] == ids[:MAX_NAMED]
    assert told["silent_count"] == len(ids)


def test_health_names_some_and_counts_them():
    health, now = Health(), 10**9
    units = {"bundle": 400, "missing": 0, "unknown": 0}
    units |= {"silent": ["a", "b", "c", "d"], "silent_count": 300}
    health.take(Note("status", {"source": "streaming", "uptime_ns": 1, "units": units}), now)
    health.take(decoded_frame(1, Flag.MISSING_UNITS), now)
    assert [f.says for f in health.findings(now)] == [
        "300 of 400 units have fallen silent (a, b, c ...)"
    ]
