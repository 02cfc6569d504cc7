"""The gate between two workers and those who listen; whose turn it is: test_turns.py."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from rt_neds.clock import monotonic_ns
from rt_neds.frames import DecodedFrame, Flag
from rt_neds.stream import gate
from rt_neds.stream.board import Board
from rt_neds.stream.gate import Counts, Gate, GateSink, datagrams
from rt_neds.stream.trigger import Triggers
from rt_neds.trigger_config import TriggerConfig, rules_of
from rt_neds.wire import MAX_HEADER_BYTES, unpack_decoded, unpack_map

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
            "nowhere", dict.fromkeys(self.probes, BIN_NS), workers, self.board, self.counts,
            self._triggers, heard, self.remember,
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


def decoded(bin_, ended_ago_ns, flags=0, epoch=1, x=0.9, held_ns=HELD_NS):
    now = monotonic_ns()
    stamps = dict.fromkeys(("sent", "received", "binned", "decoded", "published"), now)
    if ended_ago_ns is not None:
        stamps["ended"] = now - ended_ago_ns
    values_V = np.array([x], np.float32)
    allowed_ns = BIN_NS + held_ns
    return DecodedFrame("p", epoch, bin_, 0, values_V, flags, 3, 0, 0, 0, "m", stamps, allowed_ns)


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
    was, is_ = asdict(sent) | {"allowed_ns": 0}, asdict(came)
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


def test_frames_of_each_probe_are_its_own_and_late_by_its_own_rule(gated):
    one = gated(probes="pq")
    sink = one.sink(0, 0)
    of_q = sink.beside("q")
    sink.write(decoded(5, HELD_NS, held_ns=0))
    of_q.write(decoded(6, HELD_NS))
    one.turn()
    assert [bool(came.flags & Flag.LATE) for came in one.passed.frames] == [True, False]
    assert [one.counts.status(probe)["late"] for probe in "pq"] == [1, 0]
    assert [one.board.last(probe) for probe in "pq"] == [(1, 5), (1, 6)]


@pytest.mark.parametrize(
    ("bin_ns", "looked_ms", "wait_ms"),
    [(BIN_NS, 6, 5), (BIN_NS, 30, 0), (40 * BIN_NS, 6, 100)],
)
def test_the_gate_waits_for_the_frame_that_is_due_first(
    gated, monkeypatch, bin_ns, looked_ms, wait_ms
):
    """What is due already it does not wait for, and it gives signs of life."""
    now, waits = [10**15], []
    monkeypatch.setattr(gate, "monotonic_ns", lambda: now[0])
    monkeypatch.setattr("tests.test_gate.BIN_NS", bin_ns)
    one, turned = gated(probes="pq"), iter([False, True])
    one.gate._poller = SimpleNamespace(poll=waits.append)
    for probe in "qp":  # in this order they are due, 4 ms apart
        one.sink(0, 0, probe).note("status", {})
        one.sink(1, 1, probe).write(decoded(5, None))
        one.turn()
        now[0] += 4_000_000
    now[0] += (looked_ms - 8) * 1_000_000
    one.gate.run(lambda: next(turned))
    assert waits == [wait_ms]


def test_the_longest_message_goes_through_the_gate_whole(gated):
    one = gated()
    one.sink(0, 0).note("status", {"pad": bytes(MAX_HEADER_BYTES - 2000)})
    one.turn()
    assert len(one.passed.notes[0][1]["pad"]) == MAX_HEADER_BYTES - 2000


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


def test_frames_of_a_replacement_are_decided_too(gated):
    one = gated(p=Triggers(rules_of({"p": {"go": TriggerConfig(when="x > 0.5")}})))
    sink = one.sink(0, 7)  # it is told from those before it
    sink.note("schema", SCHEMA)
    for n, x in enumerate((0, 1, 0, 1)):
        sink.write(decoded(n, None, x=x))
        one.turn()
        if n == 1:
            one.replace()
    assert [of["bin"] for kind, of in one.passed.notes if kind == "trigger"] == [1, 3]


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
