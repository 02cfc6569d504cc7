"""Each bin goes out once and in order, whatever becomes of the two workers that decode it."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rt_neds.clock import monotonic_ns
from rt_neds.frames import DecodedFrame, Flag
from rt_neds.stream import gate
from rt_neds.stream.board import Accounted, Board
from rt_neds.stream.gate import Counts, Frame, Gate, GateSink, Turns, datagrams
from rt_neds.stream.trigger import Triggers
from rt_neds.trigger_config import TriggerConfig, rules_of
from rt_neds.wire import unpack_decoded, unpack_map

HOLD = 10
ACTIVE, OTHER = 0, 1


def frame(bin_, writer=ACTIVE, epoch=1):
    return Frame(epoch, bin_, writer, (b"decoded/p", bytearray()))


def bins(frames):
    return [(f.epoch, f.bin, f.writer) for f in frames]


def test_the_standby_waits_and_takes_over_at_the_first_bin_that_is_missed():
    turns = Turns(HOLD)
    assert bins(turns.take(ACTIVE, frame(0), 0)) == [(1, 0, ACTIVE)]
    assert turns.take(OTHER, frame(0, OTHER), 1) == []
    assert turns.take(OTHER, frame(1, OTHER), 20) == []
    assert turns.due_ns == 20 + HOLD
    assert turns.overdue(29) == []
    assert bins(turns.take(ACTIVE, frame(1), 29)) == [(1, 1, ACTIVE)]
    assert turns.due_ns is None
    assert turns.take(OTHER, frame(2, OTHER), 40) == []
    assert turns.take(OTHER, frame(3, OTHER), 45) == []
    assert bins(turns.overdue(50)) == [(1, 2, OTHER), (1, 3, OTHER)]
    assert turns.active == OTHER
    assert bins(turns.take(OTHER, frame(4, OTHER), 60)) == [(1, 4, OTHER)]
    # The one that had only paused comes again with what it owes: nobody needs it any more.
    assert [turns.take(ACTIVE, frame(n), 61) for n in (2, 3, 4)] == [[], [], []]
    assert turns.take(ACTIVE, frame(5), 62) == []
    assert bins(turns.take(OTHER, frame(5, OTHER), 63)) == [(1, 5, OTHER)]


def test_what_the_active_one_leaves_out_comes_from_the_other():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(0), 0)
    for n in (1, 2, 3):
        turns.take(OTHER, frame(n, OTHER), 1)
    came = turns.take(ACTIVE, frame(3), 2)
    assert bins(came) == [(1, 1, OTHER), (1, 2, OTHER), (1, 3, ACTIVE)]
    assert turns.active == ACTIVE


def test_a_replacement_waits_behind_the_one_whose_context_is_full():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(0), 0)
    turns.take(OTHER, frame(0, OTHER), 0)
    assert turns.take(ACTIVE, frame(1, writer=2), 1) == []
    assert bins(turns.take(OTHER, frame(1, OTHER), 2)) == [(1, 1, OTHER)]
    assert turns.active == OTHER
    alone = Turns(HOLD)
    alone.take(ACTIVE, frame(0), 0)
    assert bins(alone.take(ACTIVE, frame(5, writer=2), 1)) == [(1, 5, 2)]


def test_a_replacement_is_known_by_the_first_thing_it_says():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(0), 0)
    turns.take(OTHER, frame(0, OTHER), 0)
    assert turns.take(OTHER, frame(1, OTHER), 1) == []
    assert bins(turns.meet(ACTIVE, 2)) == [(1, 1, OTHER)]
    assert turns.active == OTHER
    assert turns.meet(OTHER, OTHER) == turns.meet(ACTIVE, 2) == []


def test_an_acquisition_that_is_over_does_not_come_back():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(7), 0)
    turns.take(OTHER, frame(8, OTHER), 1)
    came = turns.take(ACTIVE, frame(0, epoch=2), 2)
    assert bins(came) == [(1, 8, OTHER), (2, 0, ACTIVE)]
    assert turns.refused == 0
    assert turns.take(OTHER, frame(8, OTHER), 3) == []  # it went out already
    assert turns.refused == 0
    assert turns.take(OTHER, frame(9, OTHER), 3) == []
    assert turns.refused == 1
    assert turns.due_ns is None
    assert turns.overdue(100) == []


def test_a_replacement_that_is_behind_brings_no_acquisition_back():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(7), 0)
    turns.take(ACTIVE, frame(0, epoch=2), 1)
    assert turns.take(ACTIVE, frame(8, writer=2), 2) == []
    assert turns.refused == 1


def test_acquisitions_that_are_over_are_not_remembered_for_ever():
    turns = Turns(HOLD)
    for epoch in range(100):
        assert bins(turns.take(ACTIVE, frame(3, epoch=epoch), 0)) == [(epoch, 3, ACTIVE)]
    assert turns.take(OTHER, frame(4, OTHER, epoch=98), 0) == []
    assert len(turns._over) < 20


@given(st.lists(st.sampled_from([ACTIVE, OTHER]), max_size=60), st.integers(2, 4))
def test_an_acquisition_that_is_sent_again_is_published_again(who, times):
    """As of two captures that are replayed in turn; either worker may be a little ahead."""
    sent = [(epoch, bin_) for epoch in [1, 2] * times for bin_ in range(3)]
    turns, at, out = Turns(HOLD), [0, 0], []

    def step(place):
        if at[place] < len(sent):
            epoch, bin_ = sent[at[place]]
            out.extend(turns.take(place, frame(bin_, place, epoch), 0))
            at[place] += 1

    step(ACTIVE)
    for place in who:
        if abs(at[place] + 1 - at[1 - place]) <= 2:
            step(place)
    while at[ACTIVE] < len(sent):
        step(ACTIVE)
    assert [(f.epoch, f.bin) for f in out] == sent
    assert turns.refused == 0


def test_a_gate_in_the_place_of_another_repeats_nothing():
    turns = Turns(HOLD, last=(1, 4))
    assert turns.take(OTHER, frame(4, OTHER), 0) == []
    assert bins(turns.take(OTHER, frame(5, OTHER), 1)) == [(1, 5, OTHER)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["active", "other", "both", "restart", "wait"]), st.integers(1, 25)
        ),
        max_size=80,
    )
)
def test_every_bin_that_anyone_delivered_goes_out_once_and_in_order(events):
    """Workers that pause, leave out bins, and are replaced; both number bins alike."""
    turns, now, out, delivered = Turns(HOLD), 0, [], set()
    next_bin, writer = [0, 0], [ACTIVE, OTHER]
    for what, amount in events:
        now += amount
        out += turns.overdue(now)
        places = {"active": [0], "other": [1], "both": [0, 1]}.get(what, [])
        for place in places:
            at = next_bin[place]
            next_bin[place] += 1
            delivered.add(at)
            out += turns.take(place, frame(at, writer[place]), now)
        if what == "restart":
            place = amount % 2
            writer[place] += 2
            next_bin[place] = max(next_bin)
    out += turns.overdue(now + HOLD)
    numbers = [f.bin for f in out]
    assert numbers == sorted(set(numbers))
    assert set(numbers) <= delivered
    if delivered:
        assert {n for n in delivered if n > numbers[0]} <= set(numbers)


class Nowhere:
    def __init__(self):
        self.notes = []

    def write(self, frame):
        pass

    def note(self, kind, fields):
        self.notes.append(fields)

    def beside(self, probe):
        return self


def test_the_board_knows_how_long_there_was_nothing_and_which_bins_are_missing():
    board, sink = Board(["a", "b"], 1), Nowhere()

    def write(writer, probe, epoch, bin_):
        decoded = DecodedFrame(probe, epoch, bin_, 0, None, 0, 0, 0, 0, 0, "m")
        Accounted(sink, board, writer, "a").beside(probe).write(decoded)

    assert board.status("a")["recovery_ms"] is None
    assert board.last("a") is None
    write(0, "a", 1, 5)
    write(0, "a", 1, 8)  # a hole of the stream's own is no matter of ours
    assert board.status("a") == {
        "restarts": 0, "handovers": 0, "bins_missed": 0, "recovery_ms": None, "handover": None,
    }  # fmt: skip
    board.note_restart()
    write(1, "a", 1, 11)
    Accounted(sink, board, 1, "a").note("status", {"x": 1})
    told = sink.notes[-1]["supervision"]
    assert (told["restarts"], told["handovers"], told["bins_missed"]) == (1, 1, 2)
    assert told["recovery_ms"] > 0
    assert told["handover"] == {"from": {"epoch": 1, "bin": 8}, "to": {"epoch": 1, "bin": 11}}
    write(2, "a", 2, 40)  # another acquisition: no bins of it are missing
    assert board.status("a")["bins_missed"] == 2
    assert board.last("a") == (2, 40)
    assert board.last("b") is None


BIN_NS, HELD_NS = 20_000_000, 300_000_000
LONG_AGO_NS = 700_000_000
OUTPUTS = [{"name": "x", "kind": "poisson", "classes": [], "offset": 0, "size": 1}]
SCHEMA = {"bin_ms": 20.0, "rate": 3e4, "outputs": OUTPUTS}


class Passed:
    """In the place of the publisher of a gate."""

    def __init__(self, *_):
        self.frames, self.notes, self.probes = [], [], []

    def pass_on(self, parts):
        kind = parts[0].partition(b"/")[0].decode()
        if kind == "decoded":
            self.frames.append(unpack_decoded(parts[1]))
        else:
            self.notes.append((kind, unpack_map(parts[1])))

    def note(self, kind, fields):
        self.notes.append((kind, fields))

    def beside(self, probe):
        self.probes.append(probe)
        return self

    def close(self):
        pass


class Gated:
    """A gate and the sinks of its two workers, all in this process."""

    def __init__(self, monkeypatch, probes="p", **triggers):
        self.passed, self.probes = Passed(), list(probes)
        monkeypatch.setattr(gate, "Publisher", lambda *_: self.passed)
        self.pairs, board, self.counts = datagrams(2), Board(self.probes, 3), Counts(self.probes)
        board.also["gate"] = self.counts.status
        self.board, self._triggers = board, triggers
        self.heard, self.told = {}, 0
        self.replace()

    def replace(self):
        """Another gate, of which every process before it is gone."""
        workers = [ours for ours, _ in self.pairs]
        heard = json.loads(json.dumps(self.heard))
        self.gate = Gate(
            "nowhere", dict.fromkeys(self.probes, BIN_NS), dict.fromkeys(self.probes, HELD_NS),
            workers, self.board, self.counts, self._triggers, heard, self.remember,
        )  # fmt: skip

    def remember(self, key, value):
        self.heard[key] = value
        self.told += 1

    def sink(self, place, writer, probe="p"):
        return GateSink(self.pairs[place][1], self.probes, self.board, writer, probe)

    def turn(self):
        self.gate.run(lambda: True)

    def close(self):
        for pair in self.pairs:
            for end in pair:
                end.close()


@pytest.fixture
def gated(monkeypatch):
    made = []

    def make(**options):
        made.append(Gated(monkeypatch, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def decoded(bin_, ended_ago_ns, flags=0, epoch=1, x=0.9):
    now = monotonic_ns()
    stamps = dict.fromkeys(("sent", "received", "binned", "decoded", "published"), now)
    if ended_ago_ns is not None:
        stamps["ended"] = now - ended_ago_ns
    values_V = np.array([x], np.float32)
    return DecodedFrame("p", epoch, bin_, 0, values_V, flags, 3, 0, 0, 0, "m", stamps)


@pytest.mark.parametrize("flags", [0, 2, 8, 125, 128, 253, 255])
@pytest.mark.parametrize("ended_ago_ns", [None, -LONG_AGO_NS, HELD_NS, LONG_AGO_NS])
def test_when_a_frame_goes_out_and_whether_that_is_late_is_the_gates_to_say(
    gated, flags, ended_ago_ns
):
    one = gated()
    sent = decoded(5, ended_ago_ns, flags)
    one.sink(0, 0).write(sent)
    before = monotonic_ns()
    one.turn()
    came = one.passed.frames[0]
    assert before <= came.stamps["published"] <= monotonic_ns()
    late = ended_ago_ns == LONG_AGO_NS
    assert came.flags == (flags | Flag.LATE if late else flags)
    assert one.counts.status("p")["late"] == (late and not flags & Flag.LATE)
    was, is_ = asdict(sent), asdict(came)
    was["stamps"]["published"] = is_["stamps"]["published"]
    assert was | {"flags": 0, "values_V": 0} == is_ | {"flags": 0, "values_V": 0}
    assert came.values_V == sent.values_V


def test_a_frame_waits_half_a_bin_for_the_active_worker_and_no_longer(gated, monkeypatch):
    now, waits = [10**15], []
    monkeypatch.setattr(gate, "monotonic_ns", lambda: now[0])
    one, turned = gated(), iter([False, True])
    one.gate._poller = SimpleNamespace(poll=waits.append)
    one.sink(0, 0).note("status", {})
    one.sink(1, 1).write(decoded(5, None))
    one.turn()
    assert one.passed.frames == []
    now[0] += BIN_NS // 2 - 1_000_000
    one.gate.run(lambda: next(turned))
    assert waits == [2]  # milliseconds, rounded up
    assert one.passed.frames == []
    now[0] += 1_000_000
    one.turn()
    assert [came.bin for came in one.passed.frames] == [5]


def test_a_gate_in_the_place_of_another_publishes_no_bin_again(gated):
    one = gated()
    sink = one.sink(0, 0)
    sink.write(decoded(5, None))
    one.turn()
    one.replace()
    sink.write(decoded(5, None))
    sink.write(decoded(6, None))
    one.turn()
    assert [came.bin for came in one.passed.frames] == [5, 6]


def test_what_was_held_up_in_the_gate_does_not_fire(gated):
    triggers = Triggers(rules_of({"p": {"go": TriggerConfig(when="x > 0.5")}}))
    one = gated(p=triggers)
    sink = one.sink(0, 0)
    sink.note("schema", SCHEMA)
    sink.write(decoded(5, LONG_AGO_NS))
    one.turn()
    told = [(of["bin"], of["refused"]) for kind, of in one.passed.notes if kind == "trigger"]
    assert told == [(5, ["late"])]
    assert one.passed.probes == ["p"]
    sink.note("status", {})
    one.turn()
    assert one.passed.notes[-1][1]["gate"]["late"] == 1


def test_nothing_fires_while_the_worker_whose_frames_go_out_says_that_units_drifted(gated):
    one = gated(p=Triggers(rules_of({"p": {"go": TriggerConfig(when="x > 0.5")}})))
    sinks = one.sink(0, 0), one.sink(1, 1)
    for sink, surprise in zip(sinks, (2.5, 1.0), strict=True):
        sink.note("schema", SCHEMA)
        sink.note("status", {"drift": {"surprise": surprise, "drifted": surprise > 2}})
        sink.write(decoded(5, None))
    one.turn()
    told = [of["refused"] for kind, of in one.passed.notes if kind == "trigger"]
    assert told == [["drifted"]]


def test_a_gate_in_the_place_of_another_decides_from_its_first_frame_on(gated):
    """It hears a schema only once a second, and an event may be under way."""
    one = gated(p=Triggers(rules_of({"p": {"go": TriggerConfig(when="x > 0.5")}})))
    sinks = one.sink(0, 0), one.sink(1, 1)

    def decisions(*values):
        for x in values:
            decisions.bin += 1
            for sink in sinks:
                sink.write(decoded(decisions.bin, None, x=x))
            one.turn()
        told = [of["bin"] for kind, of in one.passed.notes if kind == "trigger"]
        one.passed.notes.clear()
        return told

    decisions.bin = 0
    for sink in sinks:
        sink.note("schema", SCHEMA)
    assert decisions(0, 1, 1) == [2]
    one.replace()
    assert decisions(1, 0, 1, 1) == [6]
    one.replace()
    one.replace()
    assert decisions(1, 0) == []
    for sink in sinks:
        sink.note("schema", SCHEMA)
    assert decisions(0, 1) == [11]
    assert list(one.heard) == ["schema of p 0", "schema of p 1"]
    assert one.told == 2  # what has not changed is not told again


def test_each_frame_is_decided_by_the_schema_of_who_decoded_it(gated):
    one = gated(probes="pq", q=Triggers(rules_of({"q": {"go": TriggerConfig(when="x > 0.5")}})))
    behind = [{**OUTPUTS[0], "name": "y"}, {**OUTPUTS[0], "offset": 1}]
    one.sink(0, 0, "q").note("schema", {**SCHEMA, "outputs": behind})
    one.sink(1, 1, "q").note("schema", SCHEMA)
    one.turn()
    one.replace()  # and who comes next knows both
    one.sink(1, 1, "q").write(decoded(5, None))
    one.turn()
    assert [of["bin"] for kind, of in one.passed.notes if kind == "trigger"] == [5]
    assert one.passed.probes == ["q"]


def test_somebody_speaks_after_the_active_worker_is_lost_while_no_spikes_come(gated):
    one = gated()
    first, other, replacement = one.sink(0, 0), one.sink(1, 1), one.sink(0, 2)

    def heard(*sinks):
        one.passed.notes.clear()
        for sink in sinks:
            sink.note("status", {"writer": sink._writer})
            one.turn()
        return [fields["writer"] for _, fields in one.passed.notes]

    assert heard(first, other) == [0]
    first.write(decoded(5, None))
    other.write(decoded(5, None))
    assert heard(first, other) == [0]
    assert heard(replacement, other, replacement) == [1]


def test_what_the_gate_refuses_is_counted(gated):
    one = gated()
    first, other = one.sink(0, 0), one.sink(1, 1)
    first.write(decoded(5, None))
    first.write(decoded(0, None, epoch=2))
    one.turn()
    other.write(decoded(6, None))
    other.write(decoded(7, None))
    other.note("status", {})
    first.note("status", {})
    one.turn()
    first.note("status", {})
    one.turn()
    assert one.passed.notes[-1][1]["gate"] == {"late": 0, "refused": 2}
