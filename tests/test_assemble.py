"""The parts of a loop are put together for what was announced, and told what they must know."""

import math

import msgspec
import numpy as np
import pytest

from rt_neds.assemble import assemble
from rt_neds.bundle import BundleSession, BundleSpec
from rt_neds.drift import Expectation
from rt_neds.frames import SPIKE_DTYPE, Flag, SpikeBatch
from rt_neds.model.config import ModelConfig
from rt_neds.model.readout import Behaviour, Scale
from rt_neds.serve_config import ServeConfig
from rt_neds.stream.decoder import Silence
from rt_neds.stream.live import live_of
from rt_neds.stream.receiver import Announcement
from rt_neds.wire import BehaviourBatch, TaskEvent
from tests.test_loop import ListSink, ListSource

RATE, WIDTH, CONTEXT = 30_000.0, 600, 10
UNITS = ("a", "b", "c")
LACKING_B = Announcement("s", RATE, ("a", "c", "stranger"))

SESSION = BundleSession(
    id="s",
    units=list(UNITS),
    rate=RATE,
    scales={
        "x": Scale(low=-1.0, high=2.0),
        "y": Scale(low=5.0, high=6.0),
        "side": Scale(low=0.0, high=0.0),
    },
    behaviours=["x", "y", "side"],
    longest_silence=[0.1] * 3,
    expectation=Expectation(
        rates=[0.5] * 3, surprise=[0.0] * 3, sd=[1.0] * 3, bits_per_spike=0.0, seconds=2.0
    ),
)
SPEC = BundleSpec(
    format=4, version="0", sha256="0123456789ab" * 6, bin_ms=20.0,
    model=ModelConfig(dim=8, layers=1, heads=1, context=CONTEXT, history=(1, 4)),
    behaviours=[
        Behaviour(name="x", kind="continuous", unit="m", live=True),
        Behaviour(name="y", kind="continuous", unit="m"),
        Behaviour(name="side", kind="categorical", classes=("left", "right"), live=True),
    ],
    sessions=[SESSION], training={},
)  # fmt: skip


class Step(Silence):
    """Decodes nothing, expects half a spike in every bin, and keeps what it was asked."""

    def __init__(self):
        super().__init__(1000)
        self.asked, self.bins = [], 0

    def reset(self, first_bin=0):
        self.asked.append("reset")

    def steps(self, counts_TN, observed_T, live_TM=()):
        self.asked += [counts_N.tolist() for counts_N in counts_TN]
        self.bins = len(counts_TN)
        return self._raw_TO[: self.bins]

    def next_TN(self):
        return np.full((self.bins, len(UNITS)), math.log(0.5), np.float32)


@pytest.fixture
def made(monkeypatch):
    """What steps were asked for: their arguments."""
    made = []

    def make(*of):
        made.append(of)
        made[-1] += (Step(),)
        return made[-1][-1]

    monkeypatch.setattr("rt_neds.stream.decoder.make_step", make)
    return made


class Source(ListSource):
    """Remembers for whom it was told to take a sender that says nothing."""

    def __init__(self, items=(), announced=None, live=()):
        super().__init__(items, announced)
        self.live, self.assumed = live_of(SPEC.behaviours, live), []

    def assume(self, who):
        self.assumed.append(who)


def stream(bins, units=(0,), every=1):
    """Messages of a bin, in every so many of which each of some units fires."""
    for k in range(bins):
        records = np.zeros(len(units) * (k % every == 0), SPIKE_DTYPE)
        records["sample"] = k * WIDTH
        records["unit"] = units[: len(records)]
        received = round((k + 1) * WIDTH / RATE * 1e9)
        yield SpikeBatch(
            1, k, k * WIDTH, (k + 1) * WIDTH, RATE, received, received, records, 0
        )  # fmt: skip


def put_together(source, *, spec=SPEC, sink=None, say=lambda line: None, restarts=0, **options):
    config = ServeConfig(probe="p", bundle="folder/b", **options)
    sink = sink if sink is not None else ListSink()
    return assemble(config, spec, None, source, sink, source.announced, say, restarts)


def test_bins_after_a_replaced_process_say_so_until_the_context_is_full(made):
    source, sink = Source(stream(2 * CONTEXT)), ListSink()
    loop = put_together(source, sink=sink, restarts=2)
    loop.run(lambda: not source.items)
    told = [bool(frame.flags & Flag.RESTARTED) for frame in sink.frames]
    assert told == [True] * (CONTEXT - 1) + [False] * (CONTEXT + 1)
    assert loop.status(0)["frame_counters"]["restarts"] == 2


def test_a_unit_that_does_not_come_neither_falls_silent_nor_drifts(made):
    source = Source(stream(400, units=(0, 1), every=2), LACKING_B)
    loop = put_together(source)
    loop.run(lambda: not source.items)
    status = loop.status(0)
    assert status["units"] == {
        "bundle": 3, "missing": 1, "unknown": 1, "silent": [], "silent_count": 0,
    }  # fmt: skip
    assert status["drift"]["surprise"] < 0.1
    assert not status["drift"]["drifted"]


def test_a_unit_that_comes_and_stops_firing_falls_silent_after_three_seconds(made):
    """Longer than its longest silence in training, and than the least that is waited."""
    for bins, silent in ((150, []), (152, ["b", "c"])):
        source = Source(stream(bins), Announcement("s", RATE, UNITS))
        loop = put_together(source)
        loop.run(lambda source=source: not source.items)
        assert loop.status(0)["units"]["silent"] == silent


def test_a_limit_of_silence_is_no_shorter_than_the_history(made):
    model = msgspec.structs.replace(SPEC.model, history=(1, 200))
    source = Source(stream(190), Announcement("s", RATE, UNITS))
    loop = put_together(source, spec=msgspec.structs.replace(SPEC, model=model))
    loop.run(lambda: not source.items)
    assert loop.status(0)["units"]["silent"] == []


@pytest.mark.parametrize("announced", [None, LACKING_B])
def test_a_source_is_told_whom_to_take_a_silent_sender_for(made, announced):
    source = Source(announced=announced)
    put_together(source)
    assert source.assumed == [announced or Announcement("s", RATE, UNITS)]


def test_the_step_has_run_on_nothing_and_forgotten_it_before_the_first_bin(made):
    said = []
    put_together(Source(announced=LACKING_B), device="cuda", say=said.append)
    ((_, spec, session, missing_N, device, say, live, step),) = made
    assert (spec, session, device, live) == (SPEC, SESSION, "cuda", [])
    assert missing_N.tolist() == [False, True, False]
    say("no such card")
    assert said == ["no such card"]
    bins = [asked for asked in step.asked if asked != "reset"]
    assert bins
    assert all(counts_N == [0.0] * 3 for counts_N in bins)
    assert step.asked[-1] == "reset"


def test_the_control_makes_no_step(made):
    source, sink = Source(stream(3)), ListSink()
    put_together(source, sink=sink, control=True).run(lambda: not source.items)
    assert made == []
    assert len(sink.frames) == 3


def test_the_schema_says_what_was_put_together(made):
    announced = Announcement("s", 2 * RATE, UNITS)
    source, sink = Source(announced=announced, live=["x"]), ListSink()
    put_together(source, sink=sink, live=["x"]).note_if_due()
    schema = dict(sink.notes)["schema"]
    assert [output["name"] for output in schema.pop("outputs")] == ["y", "side"]
    assert schema == {
        "probe": "p", "bin_ms": 20.0, "rate": 2 * RATE, "model": "0123456789ab", "session": "s",
        "bundle": "folder/b", "live": ["x"],
    }  # fmt: skip


def test_what_is_observed_beyond_what_training_saw_is_counted_and_no_class_is(made):
    source = Source(live=["x", "side"])
    put_together(source, live=["x", "side"])
    live = source.live
    live.begin_run(1)
    for k, (x, side) in enumerate([(2.5, "left"), (1.5, "right"), (-1.5, "right")]):
        sample = k * WIDTH
        live.take(BehaviourBatch("x", 1, k, sample, 50.0, np.array([x], np.float32)), RATE, sample)
        live.take_event(TaskEvent(1, sample, "side", side), RATE, sample)
        live.at(1, sample + WIDTH, WIDTH)
    beyond = {name: (of["shown"], of["beyond"]) for name, of in live.counters.items()}
    assert beyond == {"x": (3, 2), "side": (3, 0)}


@pytest.mark.parametrize(("options", "flag"), [({"stale_ms": 90.0}, Flag.STALE), ({}, Flag(0))])
def test_a_source_is_stale_after_the_time_that_was_said(made, options, flag):
    first, second = stream(2)
    second.received_ns += 80_000_000
    source, sink = Source([first, second]), ListSink()
    put_together(source, sink=sink, **options).run(lambda: not source.items)
    assert sink.frames[1].flags & Flag.STALE == flag
