"""The loop in one process, between two lists: every flag is where it belongs."""

import itertools
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from rt_neds.assemble import assemble, unit_map
from rt_neds.awake import Awake
from rt_neds.bundle import build_model, load_spec
from rt_neds.clock import ClockFit
from rt_neds.errors import StreamError
from rt_neds.frames import SPIKE_DTYPE, BinnedFrame, Flag, SpikeBatch
from rt_neds.replay import batches
from rt_neds.serve_config import ServeConfig
from rt_neds.session import load_session
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.decoder import Decoder
from rt_neds.stream.loop import run_together
from rt_neds.stream.receiver import Announcement
from rt_neds.stream.validity import Validity

RATE, WIDTH, CONTEXT = 30_000.0, 600, 10
MS = 1_000_000


class ListSource:
    """A source that reads from a list; times are those of a perfect host."""

    def __init__(self, items, announced=None):
        self.items, self.announced, self.counters = list(items), announced, {}

    def read(self, timeout_ms):
        return self.items.pop(0) if self.items else None

    def assume(self, who):
        pass


class ListSink:
    def __init__(self):
        self.frames, self.notes = [], []

    def write(self, frame):
        frame.values_V = frame.values_V.copy()
        self.frames.append(frame)

    def note(self, kind, fields):
        self.notes.append((kind, fields))


def silence(first_bin, bins, epoch=1, seq=0, at_ns=None, lost=0, unit=0):
    """Batches of one bin each with one spike each, received 1 ms after they end."""
    out = []
    for k in range(bins):
        first = (first_bin + k) * WIDTH
        records = np.zeros(1, SPIKE_DTYPE)
        records["sample"], records["unit"] = first + 3, unit
        received = round((first + WIDTH) / RATE * 1e9) + MS if at_ns is None else at_ns(k)
        out.append(SpikeBatch(epoch, seq + k, first, first + WIDTH, RATE, received - MS, received,
                              records, lost if k == 0 else 0))  # fmt: skip
    return out


@pytest.fixture
def run(tiny):
    spec = load_spec(tiny[1] / "bundle")
    model = build_model(tiny[1] / "bundle", spec)

    def run(items, announced=None, **options):
        source, sink = ListSource(items, announced), ListSink()
        config = ServeConfig(probe="p", bundle="b", **options)
        loop = assemble(config, spec, model, source, sink, announced)
        loop.run(lambda: not source.items)
        return sink, loop

    return run


def flags(sink):
    return [frame.flags for frame in sink.frames]


def test_a_clean_stream_warms_up_and_is_then_to_be_acted_on(run):
    sink, _ = run(silence(0, 30))
    assert [f.bin for f in sink.frames] == list(range(30))
    assert flags(sink) == [Flag.WARMING] * (CONTEXT - 1) + [0] * (30 - CONTEXT + 1)
    assert [f.end for f in sink.frames] == [(k + 1) * WIDTH for k in range(30)]
    assert all(f.spikes == 1 for f in sink.frames)
    stamps = sink.frames[0].stamps
    assert list(stamps) == ["sent", "received", "binned", "decoded", "published"]
    assert stamps["binned"] <= stamps["decoded"] <= stamps["published"]
    assert {kind for kind, _ in sink.notes} == {"schema", "status"}


def test_a_frame_says_how_late_it_may_be(run):
    """By its own width, by what is held open, and by what the source holds back."""
    held = silence(0, 30)
    for batch in held:
        batch.newest = batch.end + WIDTH // 2
    for batches_, options, allowed in (
        (silence(0, 30), {}, 20 * MS),
        (silence(0, 30), {"lateness_ms": 30.0}, 50 * MS),
        (held, {}, 30 * MS),
    ):
        sink, _ = run(batches_, **options)
        assert {f.allowed_ns for f in sink.frames} == {allowed}


def test_the_schema_goes_out_before_the_first_frame(run, monkeypatch):
    order = []
    monkeypatch.setattr(ListSink, "write", lambda self, frame: order.append("decoded"))
    monkeypatch.setattr(ListSink, "note", lambda self, kind, fields: order.append(kind))
    run(silence(0, 3))
    assert order[:3] == ["schema", "status", "decoded"]


def test_a_hole_stays_flagged_while_it_is_in_the_context(run):
    sink, _ = run([*silence(0, 20), *silence(22, 20, seq=20, lost=2)])
    assert [f.bin for f in sink.frames] == list(range(42))
    gap = [f.bin for f in sink.frames if f.flags & Flag.GAP]
    assert gap == list(range(20, 22 + CONTEXT - 1))
    assert sum(f.lost for f in sink.frames) == 2


def test_a_hole_longer_than_the_context_restarts(run):
    sink, loop = run([*silence(0, 20), *silence(100, 20, seq=20)])
    assert [f.bin for f in sink.frames] == [*range(20), *range(100, 120)]
    again = sink.frames[20:]
    assert [bool(f.flags & Flag.RESTARTED) for f in again] == [True] * 9 + [False] * 11
    assert loop.status(0)["bin_counters"]["bins_skipped"] == 80


def test_a_new_epoch_restarts_bins_and_decoder(run):
    sink, _ = run([*silence(0, 15), *silence(0, 15, epoch=2)])
    first, second = sink.frames[:15], sink.frames[15:]
    assert [(f.epoch, f.bin) for f in second] == [(2, k) for k in range(15)]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.values_V, b.values_V)
    assert all(f.flags & Flag.RESTARTED for f in second[:9])
    assert not any(f.flags & Flag.RESTARTED for f in first)


def test_unknown_and_missing_units(run):
    sink, _ = run([*silence(0, 12), *silence(12, 1, seq=12, unit=77), *silence(13, 3, seq=13)])
    assert [f.bin for f in sink.frames if f.flags & Flag.UNKNOWN_UNITS] == [12]
    assert sink.frames[12].unknown == 1
    known = Announcement("tiny", RATE, tuple(f"tiny/{n}" for n in (5, 3, 1)))
    sink, _ = run(silence(0, 12), announced=known)
    assert all(f.flags & Flag.MISSING_UNITS for f in sink.frames)
    exchanged = Announcement("tiny", RATE, (*(f"tiny/{n}" for n in range(5)), "stranger"))
    sink, loop = run(silence(0, 12), announced=exchanged)
    without = sink.frames
    assert all(f.flags & Flag.MISSING_UNITS for f in without)
    told = loop.status(0)["units"]
    assert (told["bundle"], told["missing"], told["unknown"]) == (6, 1, 1)
    whole = Announcement("tiny", RATE, tuple(f"tiny/{n}" for n in range(6)))
    sink, _ = run(silence(0, 12), announced=whole)
    assert not any(f.flags & Flag.MISSING_UNITS for f in sink.frames)
    # It is not the same as to be silent.
    assert (without[-1].values_V != sink.frames[-1].values_V).any()


def test_a_spike_of_a_bin_that_is_closed_makes_the_next_one_late(run):
    stream = silence(0, 15)
    stream[12].records_S["sample"] = 5 * WIDTH
    sink, _ = run(stream)
    assert [(f.bin, f.late) for f in sink.frames if f.flags & Flag.LATE] == [(12, 1)]


def test_units_are_matched_by_id_not_by_number(run):
    order = (4, 0, 5, 1, 3, 2)
    shuffled = Announcement("tiny", RATE, tuple(f"tiny/{n}" for n in order))
    straight, _ = run(silence(0, 12, unit=4))
    crossed, _ = run(silence(0, 12, unit=0), announced=shuffled)
    for a, b in zip(straight.frames, crossed.frames, strict=True):
        np.testing.assert_array_equal(a.values_V, b.values_V)


def test_units_of_another_session_are_refused():
    with pytest.raises(StreamError, match="none in common"):
        unit_map(("x/0", "x/1"), ["tiny/0", "tiny/1"])
    assert unit_map(("tiny/1", "x"), ["tiny/0", "tiny/1"]).tolist() == [1, -1]
    assert unit_map(None, ["a", "b"]).tolist() == [0, 1]


def test_a_source_that_fell_silent_is_stale(run):
    late = silence(15, 5, seq=15, at_ns=lambda k: 20_000 * MS + k * 20 * MS)
    sink, loop = run([*silence(0, 15), *late])
    assert [f.bin for f in sink.frames if f.flags & Flag.STALE] == [15]
    assert loop.status(0)["frame_counters"]["stale"] == 1


def test_a_slip_of_the_clock_is_flagged_for_a_context_and_another_epoch_is_none(run):
    def at_ns(k):  # after fifteen seconds samples went missing without a word
        return (k + 1) * 20 * MS + (50 * MS if k >= 750 else 0)

    again = silence(0, 400, epoch=2, at_ns=lambda k: 30_000 * MS + at_ns(k))
    sink, loop = run([*silence(0, 1500, at_ns=at_ns), *again])
    slipped = [(f.epoch, f.bin) for f in sink.frames if f.flags & Flag.SLIPPED]
    first = slipped[0][1]
    assert 750 < first < 1000
    assert slipped == [(1, first + k) for k in range(CONTEXT)]
    assert loop.status(0)["frame_counters"]["slips"] == 1


def test_a_hole_of_another_run_is_none_of_this_one(run):
    sink, _ = run([*silence(0, 20), *silence(22, 3, seq=20), *silence(0, 15, epoch=2)])
    assert [(f.epoch, f.bin) for f in sink.frames if f.flags & Flag.GAP] == [
        (1, n) for n in range(20, 25)
    ]


def test_who_goes_on_distrusts_what_the_one_before_had_not_yet_said():
    def validity(fit):
        return Validity(CONTEXT, CONTEXT, 20 * MS, fit, stale_ms=100.0, units_missing=False)

    fit = ClockFit(RATE)
    before, after = validity(fit), validity(ClockFit(RATE))
    for batch in silence(0, 300):
        before.take(batch)
    fit.observe = lambda *_: True  # slipped, and silent for two seconds; no bin has closed since
    before.take(silence(300, 1, at_ns=lambda _: 8000 * MS)[0])
    del fit.observe
    after.go_on_from(before)
    after.take(silence(301, 1, at_ns=lambda _: 8001 * MS)[0])
    frame = BinnedFrame(1, 301, 302 * WIDTH, np.zeros(1), True, 0, 0, 0, 0, False, 0, 0)
    assert after.flags(frame) & (Flag.STALE | Flag.SLIPPED) == Flag.STALE | Flag.SLIPPED
    assert after.realtime  # the clock is the same, and so is what it was found to be
    assert after.counters["stale"] == after.counters["slips"] == 1


def pieces_of(batches_, parts):
    """The same stream in so many messages a batch, each a part of it later."""
    for batch in batches_:
        length = (batch.end - batch.first) // parts
        for k in range(parts):
            first = batch.first + k * length
            yield SpikeBatch(batch.epoch, batch.seq * parts + k, first, first + length, RATE, 0,
                             batch.received_ns + k * MS, batch.records_S[: k == 0])  # fmt: skip


@pytest.mark.parametrize("phase", range(0, 20, 3))
def test_a_stall_is_told_by_the_next_bin_however_short_messages_are(run, phase):
    stream = list(pieces_of(silence(0, 30), 20))
    for bin_ in (15, 25):
        for batch in stream[20 * bin_ + phase :]:
            batch.received_ns += 1000 * MS
    sink, loop = run(stream)
    stale = [f.bin for f in sink.frames if f.flags & Flag.STALE]
    assert stale == [15, 25]
    assert loop.status(0)["frame_counters"]["stale"] == 2


def test_bins_held_open_on_purpose_are_not_late(run, monkeypatch):
    now = {"ns": 0}
    monkeypatch.setattr("rt_neds.stream.loop.monotonic_ns", lambda: now["ns"])

    def read(self, timeout_ms):
        if not self.items:
            return None
        item = self.items.pop(0)
        now["ns"] = item.received_ns + (60 if item.seq == 399 else 0) * MS
        return item

    monkeypatch.setattr(ListSource, "read", read)
    sink, loop = run(silence(0, 400), lateness_ms=50.0)
    assert loop.status(0)["realtime"]
    assert [f.bin for f in sink.frames if f.flags & Flag.LATE] == [396]
    assert loop.status(0)["frame_counters"]["late"] == 1
    ended, published = (sink.frames[-1].stamps[which] for which in ("ended", "published"))
    assert (published - ended) / MS == pytest.approx(121, abs=1)  # the truth, all the same


def test_what_a_rigs_source_has_held_back_is_not_held_back_again(run):
    sink, _ = run(silence(0, 30), lateness_ms=50.0, source="openephys://127.0.0.1:5556")
    assert [f.bin for f in sink.frames] == list(range(30))


def test_what_does_not_run_in_real_time_has_no_end_to_be_late_after(run):
    sink, loop = run(silence(0, 400, at_ns=lambda k: (k + 1) * 10 * MS))  # twice as fast
    assert not loop.status(0)["realtime"]
    assert not any("ended" in f.stamps or f.flags & Flag.LATE for f in sink.frames)


def test_another_session_or_rate_restarts_and_counts_go_on(tiny):
    spec = load_spec(tiny[1] / "bundle")
    model = build_model(tiny[1] / "bundle", spec)
    units, sink, before = tuple(f"tiny/{n}" for n in range(6)), ListSink(), None
    for epoch, rate in ((1, RATE), (2, RATE * 2)):
        source = ListSource(silence(0, 30, epoch=epoch), Announcement("tiny", rate, units))
        config = ServeConfig(probe="p", bundle="b")
        loop = assemble(config, spec, model, source, sink, source.announced)
        if before is not None:
            loop.go_on_from(before)
        loop.run(lambda source=source: not source.items)
        before = loop
    assert len(sink.frames) == 30 + 15  # a bin is twice as many samples now
    assert all(f.flags & Flag.RESTARTED for f in sink.frames[30 : 30 + CONTEXT - 1])
    assert not any(f.flags & Flag.RESTARTED for f in sink.frames[:30])
    status = before.status(0)
    assert status["published"] == status["bin_counters"]["bins"] == 45
    assert status["frame_counters"]["restarts"] == 1


@pytest.mark.parametrize(("rate", "session", "bins"), [(2 * RATE, "tiny", 15), (RATE, "other", 30)])
def test_bins_of_another_session_or_rate_begin_anew_in_the_same_run_too(tiny, rate, session, bins):
    spec, units = load_spec(tiny[1] / "bundle"), tuple(f"tiny/{n}" for n in range(6))
    other = msgspec.structs.replace(spec.session(), id="other")
    spec = msgspec.structs.replace(spec, sessions=[spec.session(), other])
    sink, before = ListSink(), None
    for announced in (Announcement("tiny", RATE, units), Announcement(session, rate, units)):
        source = ListSource(silence(0, 30), announced)
        config = ServeConfig(probe="p", bundle="b", control=True)
        loop = assemble(config, spec, None, source, sink, announced)
        if before is not None:
            loop.go_on_from(before)
        loop.run(lambda source=source: not source.items)
        before = loop
    assert [f.bin for f in sink.frames] == [*range(30), *range(bins)]
    assert all(f.flags & Flag.RESTARTED for f in sink.frames[30 : 30 + CONTEXT - 1])


def test_units_that_had_fallen_silent_are_so_when_the_source_renumbers_them(tiny):
    spec = load_spec(tiny[1] / "bundle")
    session = msgspec.structs.replace(spec.session(), longest_silence=[0.1] * 6)
    spec = msgspec.structs.replace(spec, sessions=[session])
    config, loops = ServeConfig(probe="p", bundle="b", control=True), []
    units = tuple(session.units)
    for announced in (Announcement("tiny", RATE, units), Announcement("tiny", RATE, units[::-1])):
        source = ListSource(silence(0, 200), announced)
        loops.append(assemble(config, spec, None, source, ListSink(), announced))
    loops[0].run(lambda: not loops[0]._source.items)
    loops[1].go_on_from(loops[0])
    before, status = (loop.status(0) for loop in loops)
    assert status["units"]["silent"] == list(units[1:])  # but for the one that fires
    assert (status["source"], status["uptime_ns"]) == ("streaming", before["uptime_ns"])


@pytest.mark.parametrize("probes", [1, 2])
def test_a_long_message_leaves_signs_of_life(tiny, probes):
    spec = load_spec(tiny[1] / "bundle")
    model = build_model(tiny[1] / "bundle", spec)
    message = SpikeBatch(1, 0, 0, 300 * WIDTH, RATE, 0, 1, np.zeros(0, SPIKE_DTYPE))
    source, sink, published = ListSource([message]), ListSink(), []

    def stop():  # which is the sign of life
        published.append(len(sink.frames))
        return not source.items

    config = ServeConfig(probe="p", bundle="b")
    loops = [assemble(config, spec, model, source, sink, None)]
    loops += [
        assemble(config, spec, model, ListSource([]), ListSink(), None) for _ in range(1, probes)
    ]
    run_together(loops, lambda ms: None, stop)
    assert len(sink.frames) == 300
    assert np.diff(published).max() <= 2 * CHUNK


def test_once_a_second_it_says_whether_the_source_waits_streams_or_is_silent(run, monkeypatch):
    now = [10**15]
    monkeypatch.setattr("rt_neds.stream.loop.monotonic_ns", lambda: now[0])
    sink, loop = run([])
    for second in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5):
        now[0] = 10**15 + round(second * 1000) * MS
        if second == 1.5:
            loop._source.items = silence(0, 1, at_ns=lambda _: now[0])
        loop.turn(0)
    told = [fields["source"] for kind, fields in sink.notes if kind == "status"]
    assert told == ["waiting", "streaming", "streaming", "silent"]
    assert [kind for kind, _ in sink.notes] == ["schema", "status"] * 4


def test_cores_are_held_awake_while_a_stream_runs_in_real_time(run, monkeypatch):
    now, told = {"ns": 0}, []
    monkeypatch.setattr("rt_neds.stream.loop.monotonic_ns", lambda: now["ns"])
    monkeypatch.setattr("rt_neds.awake.Awake.hold", lambda self, hold: told.append(hold))

    def read(self, timeout_ms):
        if not self.items:
            return None
        now["ns"] = self.items[0].received_ns
        return self.items.pop(0)

    monkeypatch.setattr(ListSource, "read", read)
    _, loop = run(silence(0, 400))
    assert told[0] is False  # nobody knows yet
    assert told[-2:] == [True, False]  # and then it ended
    assert sum(a != b for a, b in itertools.pairwise(told)) == 2
    loop._source.items = silence(400, 100)
    while loop._source.items:
        loop.turn(0)
    assert told[-1] is True
    now["ns"] += 2000 * MS
    loop.turn(0)
    assert told[-1] is False


def test_cores_may_sleep_where_the_stream_is_not_in_real_time(run, monkeypatch):
    now, told = {"ns": 0}, []
    monkeypatch.setattr("rt_neds.stream.loop.monotonic_ns", lambda: now["ns"])
    monkeypatch.setattr("rt_neds.awake.Awake.hold", lambda self, hold: told.append(hold))

    def read(self, timeout_ms):
        now["ns"] += 20 * MS
        return self.items.pop(0)

    monkeypatch.setattr(ListSource, "read", read)
    run(silence(0, 400, at_ns=lambda k: k * 7 * MS))
    assert len(told) > 5
    assert not any(told)


@pytest.mark.parametrize("wanted", [True, False])
def test_whether_cores_may_be_held_awake_is_said_by_the_configuration(run, monkeypatch, wanted):
    asked = []
    real = Awake.__init__

    def init(self, may=True, device=None):
        asked.append(may)
        real(self, False)

    monkeypatch.setattr("rt_neds.awake.Awake.__init__", init)
    run([], realtime=wanted)
    assert asked == [wanted]


def test_a_source_that_changes_units_ends_the_run(tiny):
    spec = load_spec(tiny[1] / "bundle")
    model = build_model(tiny[1] / "bundle", spec)
    whole = Announcement("tiny", RATE, tuple(f"tiny/{n}" for n in range(6)))
    source = ListSource(silence(0, 5), whole)
    loop = assemble(ServeConfig(probe="p", bundle="b"), spec, model, source, ListSink(), whole)
    assert run_together([loop], lambda ms: None, lambda: not source.items) is None
    source.announced = Announcement("tiny", RATE, ("tiny/0",))
    assert loop.run(lambda: False) == "source changed"
    source.announced = Announcement("tiny", RATE, ("tiny/1",))
    assert run_together([loop], lambda ms: None, lambda: False) == 0


def test_a_source_that_renumbers_its_units_misses_no_bin_and_no_spike(tiny):
    session, spec = load_session(tiny[0]), load_spec(tiny[1] / "bundle")
    model = build_model(tiny[1] / "bundle", spec)
    stream = list(batches(session, 7, epoch=1, end=20 * 30_000))  # a bin has nearly three
    config, known = ServeConfig(probe="p", bundle="b"), Announcement("tiny", RATE, session.unit_ids)
    other = Announcement("tiny", RATE, session.unit_ids[::-1])

    def decode(parts):
        sink, before = ListSink(), None
        for announced, batches_ in parts:
            source = ListSource(batches_, announced)
            loop = assemble(config, spec, model, source, sink, announced)
            if before is not None:
                loop.go_on_from(before)
            loop.run(lambda source=source: not source.items)
            before = loop
        return sink.frames, before.status(0)

    undisturbed, _ = decode([(known, stream)])
    at = 1000  # in the middle of bin 350
    for n, batch in enumerate(stream):  # a second passes while it is put together anew
        batch.received_ns = 1 + n * 1000 + (n >= at) * 1000 * MS
    for batch in stream[at:]:
        batch.records_S = batch.records_S.copy()
        batch.records_S["unit"] = len(session.unit_ids) - 1 - batch.records_S["unit"]
    frames, status = decode([(known, stream[:at]), (other, stream[at:])])
    assert [f.bin for f in frames] == list(range(1000))
    assert [f.spikes for f in frames] == [f.spikes for f in undisturbed]
    assert all(f.flags == 0 for f in frames[CONTEXT:350])
    assert all(f.flags == Flag.RESTARTED | Flag.WARMING for f in frames[350 : 350 + CONTEXT - 1])
    assert all(f.flags == 0 for f in frames[350 + CONTEXT :])
    for a, b in zip(frames[400:], undisturbed[400:], strict=True):
        np.testing.assert_allclose(a.values_V, b.values_V, atol=1e-5)
    assert (status["published"], status["frame_counters"]["restarts"]) == (1000, 1)
    assert status["frame_counters"]["stale"] == 0
    assert status["bin_counters"]["bins"] == 1000


def test_each_bin_is_shown_what_was_observed_up_to_its_end(tiny):
    spec = load_spec(tiny[1] / "bundle")
    model, asked = build_model(tiny[1] / "bundle", spec), []
    source = ListSource(silence(0, 5))
    loop = assemble(ServeConfig(probe="p", bundle="b"), spec, model, source, ListSink(), None)
    loop._live = SimpleNamespace(counters={}, at=lambda *of: asked.append(of))
    loop.run(lambda: not source.items)
    assert asked == [(1, (k + 1) * WIDTH, WIDTH) for k in range(5)]


def test_a_source_that_speaks_late_is_heard(tiny):
    spec = load_spec(tiny[1] / "bundle")
    model = build_model(tiny[1] / "bundle", spec)
    units = tuple(f"tiny/{n}" for n in range(6))
    for said, why in [
        (Announcement("tiny", RATE, units), "stopped"),
        (Announcement("tiny", RATE, units[::-1]), "source changed"),
        (Announcement("tiny", RATE / 2, units), "source changed"),
    ]:
        source = ListSource(silence(0, 5))
        loop = assemble(ServeConfig(probe="p", bundle="b"), spec, model, source, ListSink(), None)
        source.announced = said
        assert loop.run(lambda source=source: not source.items) == why


@pytest.mark.parametrize("batch_ms", [1.0, 7.3, 500.0])
def test_the_loop_decodes_the_same_however_the_session_is_cut(run, tiny, batch_ms):
    session = load_session(tiny[0])
    frames = {}
    for ms in (20.0, batch_ms):
        sink, _ = run(list(batches(session, ms, epoch=1, end=8 * 30_000)))
        frames[ms] = sink.frames
    assert len(frames[20.0]) == 400
    for a, b in zip(frames[20.0], frames[batch_ms], strict=True):
        assert a.bin == b.bin
        np.testing.assert_array_equal(a.values_V, b.values_V)


def test_behind_the_clock_bins_wait_for_each_other_and_all_come_out(run, monkeypatch):
    # Real time for fifteen seconds, then a stall after which fifty bins are there at once.
    stall = 750
    seconds = 16

    def at_ns(k):
        on_time = round((k + 1) * WIDTH / RATE * 1e9) + MS
        return on_time if k < stall else max(on_time, round((stall + 50) * WIDTH / RATE * 1e9))

    clock = {"ns": 0}
    monkeypatch.setattr("rt_neds.stream.loop.monotonic_ns", lambda: clock["ns"])
    chunks = []
    decode_chunk = Decoder.decode_chunk

    def spy(self, frames):
        chunks.append([frame.bin for frame in frames])
        return decode_chunk(self, frames)

    monkeypatch.setattr(Decoder, "decode_chunk", spy)
    monkeypatch.setattr(
        ListSource, "read", lambda self, ms: clocked(self.items.pop(0)) if self.items else None
    )

    def clocked(item):
        clock["ns"] = item.received_ns
        return item

    sink, _ = run(silence(0, seconds * 50, at_ns=at_ns))
    assert [f.bin for f in sink.frames] == list(range(seconds * 50))
    assert all(len(chunk) == 1 for chunk in chunks[:stall])
    assert max(len(chunk) for chunk in chunks) == CHUNK
    late = [f.bin for f in sink.frames if f.flags & Flag.LATE]
    assert late == list(range(stall, stall + 48))
    assert [bin_ for chunk in chunks for bin_ in chunk] == list(range(seconds * 50))


def test_poking_future_spikes_changes_nothing_that_was_published(run, tiny):
    session = load_session(tiny[0])
    at = 5 * 30_000

    def frames():
        sink, _ = run(list(batches(session, 1.0, epoch=1, end=8 * 30_000)))
        return sink.frames

    before = frames()
    future = session.records_S["sample"] >= at
    session.records_S["unit"][future] = (session.records_S["unit"][future] + 1) % 6
    after = frames()
    same = [np.array_equal(a.values_V, b.values_V) for a, b in zip(before, after, strict=True)]
    assert all(same[: at // WIDTH])
    assert not all(same[at // WIDTH :])
