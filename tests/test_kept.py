"""Whoever takes a worker's place goes on with what it knew, and with nothing that may be wrong."""

import os
import signal
import time

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rt_neds.assemble import assemble
from rt_neds.bundle import BundleSession, build_model, load_spec, save_bundle
from rt_neds.frames import SPIKE_DTYPE, BinnedFrame, Flag, SpikeBatch
from rt_neds.model.readout import Scale
from rt_neds.serve_config import ServeConfig
from rt_neds.stream.board import Board
from rt_neds.stream.kept import Kept, Past
from rt_neds.stream.loop import run_together
from rt_neds.stream.receiver import Announcement
from rt_neds.stream.silent import LEAST_S, TIMES, FallenSilent
from rt_neds.supervise import Supervisor
from tests.test_fused import NAMES, random_model
from tests.test_loop import RATE, WIDTH, ListSink, ListSource

CONTEXT, MEMORY, UNITS, BIN_S = 12, 40, 5, 0.02
SIZE = (16, 2, 2, CONTEXT, (1, 4), 2, UNITS, MEMORY, True)


def save_untrained(folder, size, units):
    """Save a bundle of random weights, of a session "a" with these units and "other" with four."""
    sessions = [
        BundleSession(
            id=name,
            units=list(of),
            rate=RATE,
            scales=dict.fromkeys(NAMES, Scale()),
            behaviours=NAMES,
            longest_silence=[0.1] * len(of),
        )
        for name, of in (("other", "wxyz"), ("a", units))
    ]
    save_bundle(folder, random_model(size), bin_ms=20.0, sessions=sessions, training={})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A spec and its network, with a memory."""
    folder = tmp_path_factory.mktemp("kept")
    save_untrained(folder, SIZE, [f"a/{n}" for n in range(UNITS)])
    spec = load_spec(folder)
    return spec, build_model(folder, spec)


def stream(bins, seed=0, epoch=1):
    """A message for each of some bins, with what fires in it."""
    for bin_ in bins:
        rng = np.random.default_rng([seed, bin_])
        records_S = np.zeros(int(rng.integers(0, 9)), SPIKE_DTYPE)
        records_S["sample"] = bin_ * WIDTH + np.sort(rng.integers(0, WIDTH, len(records_S)))
        records_S["unit"] = rng.integers(0, UNITS, len(records_S))
        first, now = bin_ * WIDTH, 1 + bin_
        yield SpikeBatch(epoch, bin_, first, first + WIDTH, RATE, now, now, records_S)


def loop_of(bundle, batches, kept=None, session="a", restarts=0):
    """A loop over these messages, which says who sends, and its sink."""
    spec, model = bundle
    of = spec.session(session)
    known = Announcement(of.id, RATE, tuple(of.units))
    source, sink = ListSource(batches, known), ListSink()
    config = ServeConfig(probe="p", bundle="b")
    loop = assemble(config, spec, model, source, sink, known, restarts=restarts, kept=kept)
    return loop, source, sink


def run(bundle, batches, kept=None, **more):
    loop, source, sink = loop_of(bundle, batches, kept, **more)
    loop.run(lambda: not source.items)
    return sink.frames


@given(st.integers(1, 60), st.integers(0, CONTEXT - 1))
@example(50, CONTEXT - 1)
@example(50, 0)
@settings(deadline=None, max_examples=25)
def test_who_goes_on_decodes_as_after_a_hole_of_what_nobody_decoded(bundle, until, missed):
    kept, end = Kept(bundle[0]), until + missed + 70
    before = run(bundle, stream(range(3, 3 + until)), kept)
    first = 3 + until + missed
    after = run(bundle, stream(range(first, end)), kept, restarts=1)
    holed = run(bundle, [*stream(range(3, 3 + until)), *stream(range(first, end))])
    assert [f.bin for f in before + after] == [*range(3, 3 + until), *range(first, end)]
    of_hole = {frame.bin: frame for frame in holed}
    for frame in before + after:
        np.testing.assert_array_equal(frame.values_V, of_hole[frame.bin].values_V)
    for frame in after:
        ours, both = frame.bin - first + 1, frame.bin - 3 + 1
        expected = Flag.RESTARTED * (ours < CONTEXT) | Flag.WARMING * (both < MEMORY)
        assert frame.flags == expected | Flag.GAP * (ours < CONTEXT and missed > 0)


OTHERS = {
    "another acquisition": lambda kept, bundle: {"epoch": 2},
    "a hole as long as the context": lambda kept, bundle: {"first": 50 + CONTEXT},
    "earlier than what is known": lambda kept, bundle: {"first": 49},
    "killed in the middle of a step": lambda kept, bundle: Past(
        kept, bundle[0].session("a"), WIDTH
    ).change(BinnedFrame(1, 50, 0, np.zeros(UNITS), True, 0, 0, 0, 0, False, 0, 0)),
    "another session decoded since": lambda kept, bundle: (
        run(bundle, stream(range(40, 50)), kept, session="other") and None
    ),
    "bins of another width": lambda kept, bundle: kept.head.__setitem__("width", 300),
    "nothing decoded": lambda kept, bundle: kept.head.__setitem__("next_bin", 20),
}


@pytest.mark.parametrize("why", OTHERS)
def test_what_cannot_be_gone_on_with_is_forgotten(bundle, why):
    kept, spec = Kept(bundle[0]), bundle[0]
    run(bundle, stream(range(20, 50)), kept)
    of = OTHERS[why](kept, bundle) or {}
    bins, epoch = range(of.get("first", 50), 120), of.get("epoch", 1)
    after = run(bundle, stream(bins, epoch=epoch), kept, restarts=1)
    anew = run(bundle, stream(bins, epoch=epoch))
    for frame, other in zip(after, anew, strict=True):
        np.testing.assert_array_equal(frame.values_V, other.values_V)
    said = [frame.flags & (Flag.WARMING | Flag.RESTARTED | Flag.GAP) for frame in after]
    both = Flag.WARMING | Flag.RESTARTED
    assert said[:MEMORY] == [both] * (CONTEXT - 1) + [Flag.WARMING] * (MEMORY - CONTEXT) + [0]
    # And from there on it is kept again.
    again = run(bundle, stream(range(120, 125), epoch=epoch), kept, restarts=2)
    assert not again[0].flags & Flag.WARMING
    assert spec.session("a").units == bundle[0].session("a").units


def test_who_was_killed_in_a_step_of_a_runs_first_bins_leaves_nothing_either(bundle):
    kept = Kept(bundle[0])
    run(bundle, stream(range(0, 5)), kept)
    Past(kept, bundle[0].session("a"), WIDTH).change(silent_frame(np.zeros(UNITS)))
    after = run(bundle, stream(range(6, 60)), kept)
    for frame, other in zip(after, run(bundle, stream(range(6, 60))), strict=True):
        assert frame.flags == other.flags
        np.testing.assert_array_equal(frame.values_V, other.values_V)


def test_bins_that_are_decoded_together_are_kept_together(bundle):
    kept, batches = Kept(bundle[0]), list(stream(range(0, 60)))
    for first, second, third in zip(batches[::3], batches[1::3], batches[2::3], strict=True):
        first.end, first.seq = third.end, first.seq // 3
        first.records_S = np.concatenate([b.records_S for b in (first, second, third)])
    run(bundle, batches[::3], kept)
    assert kept.reached(1) == 60 * WIDTH
    after = run(bundle, stream(range(60, 90)), kept)
    whole = run(bundle, stream(range(0, 90)))
    for frame, undisturbed in zip(after, whole[60:], strict=True):
        np.testing.assert_array_equal(frame.values_V, undisturbed.values_V)


def test_a_source_is_told_how_far_an_acquisition_was_decoded(bundle):
    kept = Kept(bundle[0])
    assert kept.reached(7) is None
    run(bundle, stream(range(20, 50), epoch=7), kept)
    assert (kept.reached(7), kept.reached(8)) == (50 * WIDTH, None)
    Past(kept, bundle[0].session("a"), WIDTH).change(silent_frame(np.zeros(UNITS)))
    assert kept.reached(7) is None


def test_one_who_has_gone_on_is_gone_on_from(bundle):
    kept = Kept(bundle[0])
    pieces = [range(20, 40), range(40, 48), range(51, 100)]
    frames = [frame for bins in pieces for frame in run(bundle, stream(bins), kept)]
    holed = {f.bin: f for f in run(bundle, [b for bins in pieces for b in stream(bins)])}
    for frame in frames:
        np.testing.assert_array_equal(frame.values_V, holed[frame.bin].values_V)
        assert bool(frame.flags & Flag.WARMING) == (frame.bin - 20 < MEMORY - 1)


def test_probes_that_share_a_trunk_are_each_gone_on_from(bundle):
    keeps = [Kept(bundle[0]), Kept(bundle[0])]
    seeds, values = (1, 2), []
    for bins in (range(0, 60), range(63, 90)):
        made = [loop_of(bundle, stream(bins, s), k) for s, k in zip(seeds, keeps, strict=True)]
        run_together(
            [loop for loop, _, _ in made],
            lambda ms: None,
            lambda made=made: not any(source.items for _, source, _ in made),
        )
        values.append([sink.frames for _, _, sink in made])
    for n, seed in enumerate(seeds):
        both = [*stream(range(0, 60), seed), *stream(range(63, 90), seed)]
        holed = {f.bin: f for f in run(bundle, both)}
        assert [f.bin for f in values[1][n]] == list(range(63, 90))
        for frame in values[1][n]:
            np.testing.assert_array_equal(frame.values_V, holed[frame.bin].values_V)


@pytest.mark.parametrize("hole", [(), (47,)])
def test_units_that_are_renumbered_are_decoded_on(bundle, hole):
    """Columns are the bundle's, whatever the stream calls them: nothing need be forgotten."""
    kept, spec = Kept(bundle[0]), bundle[0]
    before = [bin_ for bin_ in range(50) if bin_ not in hole]
    loop, source, sink = loop_of(bundle, stream(before), kept)
    loop.run(lambda: not source.items)
    batches = list(stream(range(50, 100)))
    for batch in batches:
        batch.records_S["unit"] = UNITS - 1 - batch.records_S["unit"]
    other = Announcement("a", RATE, tuple(spec.session("a").units[::-1]))
    source, after = ListSource(batches, other), ListSink()
    config = ServeConfig(probe="p", bundle="b")
    renumbered = assemble(config, spec, bundle[1], source, after, other, kept=kept)
    renumbered.go_on_from(loop)
    renumbered.run(lambda: not source.items)
    whole = run(bundle, stream([*before, *range(50, 100)]))
    for frame, undisturbed in zip(sink.frames + after.frames, whole, strict=True):
        np.testing.assert_array_equal(frame.values_V, undisturbed.values_V)
    for frame in after.frames:
        expected = Flag.RESTARTED * (frame.bin - 50 < CONTEXT - 1)
        assert frame.flags == expected | Flag.GAP * (bool(hole) and frame.bin - 47 < CONTEXT)


# -- what has fallen silent ----------------------------------------------------------------------


def silent_frame(counts_N):
    return BinnedFrame(0, 0, 0, counts_N, True, 0, 0, 0, 0, False, 0, 0)


def test_who_takes_a_workers_place_knows_who_was_silent(bundle, tmp_path):
    kept, session = Kept(bundle[0]), bundle[0].session("a")
    dead_after = 1 + round(max(TIMES * 0.1, LEAST_S) / BIN_S)

    def work(line):
        silence = FallenSilent(session.longest_silence, BIN_S, 5, None, kept.silence(session))
        if line.writer:
            (tmp_path / "knew").write_text(repr(silence.now_N.tolist()))
        counts_N = np.array([0, *[1] * (UNITS - 1)], np.float32)
        for _ in range(dead_after):
            silence.take(silent_frame(counts_N))
        if not line.writer:
            os.kill(os.getpid(), signal.SIGKILL)
        while not line.stop():
            time.sleep(0.01)

    supervisor = Supervisor([("worker", work)], Board(["p"], 1), 60_000, lambda line: None)
    supervisor.run(lambda: (tmp_path / "knew").exists())
    assert (tmp_path / "knew").read_text() == repr([True] + [False] * (UNITS - 1))


def test_of_another_session_no_silence_is_kept(bundle):
    spec = bundle[0]
    first, second = spec.sessions
    kept = Kept(spec)
    kept.silence(first)[:] = 7
    assert kept.silence(first).tolist() == [7] * len(first.units)
    assert kept.silence(second).tolist() == [0] * len(second.units)
    kept.silence(second)[:] = 7
    assert kept.silence(first).tolist() == [0] * len(first.units)
    kept = Kept(spec)
    kept.silence(second)[2] = 1 << 40
    loop, _, _ = loop_of(bundle, [], kept)
    assert loop.status(0)["units"]["silent"] == [second.units[2]]


def test_a_bundle_that_knows_no_silence_keeps_none(bundle):
    spec = bundle[0]
    spec = msgspec.structs.replace(
        spec, sessions=[msgspec.structs.replace(s, longest_silence=[]) for s in spec.sessions]
    )
    assert len(Kept(spec).silence(spec.sessions[0])) == 0
