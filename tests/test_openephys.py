"""Open Ephys over real sockets: bins are what was sent, reports are what was injected."""

import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rt_neds.stream.openephys as module
import rt_neds.stream.openephys_heartbeat as heartbeat_module
from rt_neds.assemble import open_source, unit_map
from rt_neds.bundle import load_spec
from rt_neds.children import free_port
from rt_neds.clock import ClockFit
from rt_neds.errors import ConfigError, StreamError
from rt_neds.openephys_emulator import Emulator, next_port, pieces, send_session
from rt_neds.replay import batches
from rt_neds.serve_config import ServeConfig
from rt_neds.session import load_session
from rt_neds.stream.binner import Binner
from rt_neds.stream.openephys import MAX_CHANNELS, UNKNOWN, OpenEphysSource
from rt_neds.stream.receiver import Announcement
from rt_neds.stream.validity import Validity
from rt_neds.stream.watermark import TAIL
from tests import naive_openephys as naive
from tests.making import write_session
from tests.test_openephys_wire import mutated

RATE, WIDTH, CONTEXT, BLOCK = 30_000.0, 600, 50, 1024
KINDS = ("spikes", "events", "blocks", "other_stream", "repeated")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return load_session(write_session(tmp_path_factory.mktemp("oe") / "s.h5", seconds=8))


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def source(port):
    """A source of five electrodes, to be fed by hand."""
    source = OpenEphysSource(f"openephys://127.0.0.1:{port}", known(["E0", "E1", "E2", "E3", "E4"]))
    yield source
    source.close()


def known(units):
    return Announcement("s", RATE, tuple(units))


def bins_of(batches_, units):
    """Every bin as ``{(epoch, bin): (observed, counts)}``, the frames in order, and the binner."""
    binner = Binner(np.arange(units, dtype=np.int32), units, WIDTH, CONTEXT)
    frames = [
        (f.epoch, f.bin, f.observed, f.counts_N.tolist(), f.lost, f.unknown)
        for batch in batches_
        for f in binner.frames(batch)
    ]
    return frames, binner


def native(session):
    frames, _ = bins_of(batches(session, 1.0, epoch=1), len(session.unit_ids))
    return {bin_: (observed, counts) for _, bin_, observed, counts, *_ in frames}


def through_sockets(session, port, send, *, lateness_ms=0.0, **options):
    """What a source gives of what ``send(emulator)`` sends, and the source."""
    endpoint = f"tcp://127.0.0.1:{port}"
    broadcaster = options.get("broadcaster", False)
    emulator = Emulator(
        endpoint, "ProbeA", session.unit_ids, session.rate, lossless=True, **options
    )
    url = f"openephys{'-events' if broadcaster else ''}://127.0.0.1:{port}"
    source = OpenEphysSource(url, known(session.unit_ids), lateness_ms)

    def work():
        assert emulator.wait_for_subscriber(10)
        send(emulator)

    sending = threading.Thread(target=work)
    sending.start()
    got = []
    while True:
        batch = source.read(200)
        if batch is not None:
            got.append(batch)
        elif not sending.is_alive():
            break
    sending.join()
    emulator.close()
    source.close()
    return got, source


def fed(source, messages):
    """Batches that messages complete, without sockets."""
    got = []
    for frames in messages:
        source.take(frames, time.monotonic_ns())
        while source._ready:
            got.append(source._ready.popleft())
    return got


def accounted(source):
    counters = source.counters
    malformed = sum(n for name, n in counters.items() if name.startswith("malformed_"))
    return counters["messages"] == malformed + sum(counters[kind] for kind in KINDS)


# -- equal to the native stream ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "block", "lateness_ms"),
    [(1, BLOCK, 0.0), (3, 700, 0.0), (0, BLOCK, 0.0), (0, 2048, 80.0)],
)
def test_bins_are_those_of_the_native_stream(session, port, channels, block, lateness_ms):
    got, source = through_sockets(
        session, port, lambda e: send_session(e, session, speed=0, block=block),
        channels=channels, lateness_ms=lateness_ms,
    )  # fmt: skip
    frames, binner = bins_of(got, 6)
    expected = native(session)
    begin = frames[0][1]
    assert begin == 0 if channels else begin < 10  # without blocks the first spike tells
    last = session.end // WIDTH - (0 if channels else 10)
    assert [f[1] for f in frames][: last - begin] == list(range(begin, last))
    for _, bin_, observed, counts, lost, unknown in frames:
        if bin_ < session.end // WIDTH:
            assert (observed, counts) == expected[bin_]
        assert lost == unknown == 0
    assert source.counters["spikes"] == len(session.records_S)
    assert source.counters["events"] == 2 * len(session.intervals("trials"))
    assert source.counters["lost"] == source.counters["discarded"] == 0
    assert binner.counters["spikes_late"] == 0
    assert accounted(source)


def test_what_was_not_recorded_is_a_hole_here_as_there(tmp_path, port):
    path = write_session(
        tmp_path / "s.h5", seconds=8, domain=[(0.0, 3.01), (3.333, 5.0), (7.0, 8.0)]
    )
    session = load_session(path)
    got, _ = through_sockets(session, port, lambda e: send_session(e, session, speed=0))
    frames, _ = bins_of(got, 6)
    ours = {f[1]: f[2:4] for f in frames if f[1] < session.end // WIDTH}
    assert ours == native(session)


def test_spikes_are_sent_out_of_order_as_the_detector_finds_them(session):
    sent = list(pieces(session, BLOCK))
    whole = np.concatenate([piece.records_S for piece in sent])
    assert sorted(whole.tolist()) == sorted(session.records_S.tolist())
    assert (np.diff(whole["sample"]) < 0).sum() > 50
    for piece in sent[1:]:
        samples, units = piece.records_S["sample"], piece.records_S["unit"]
        assert ((samples >= piece.first - TAIL) & (samples < piece.end - TAIL)).all()
        assert (np.diff(units.astype(int)) >= 0).all()


# -- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 0])
def test_lost_messages_are_reported_exactly_and_flagged_where_they_may_matter(
    session, port, channels
):
    lose = {200, 201, 202, 355, 400}
    got, source = through_sockets(
        session, port, lambda e: send_session(e, session, speed=0), channels=channels, lose=lose
    )
    frames, _ = bins_of(got, 6)
    assert source.counters["lost"] == len(lose) == sum(f[4] for f in frames)
    expected = native(session)
    wrong = [f[1] for f in frames if f[1] in expected and f[3] != expected[f[1]][1]]
    flagged = {f[1] for f in frames if not f[2]}
    assert wrong  # otherwise nothing of interest was lost
    assert set(wrong) <= flagged
    # By data a block and its tail; by spikes a lateness before, one after, and the time between.
    assert len(flagged) <= 3 * (5 if channels else 12)
    assert accounted(source)


def test_a_restart_is_a_new_epoch_with_the_same_bins(session, port):
    def twice(emulator):
        send_session(emulator, session, speed=0)
        send_session(emulator, session, speed=0)

    got, source = through_sockets(session, port, twice)
    frames, _ = bins_of(got, 6)
    epochs = sorted({f[0] for f in frames})
    assert source.counters["epochs"] == len(epochs) == 2
    first, second = ([f[1:4] for f in frames if f[0] == epoch] for epoch in epochs)
    assert first == second
    assert source.counters["lost"] == 0


def test_a_restart_whose_first_messages_were_lost_says_how_many(source):
    fed(source, [naive.data(1 + k, 0, k * BLOCK, BLOCK) for k in range(5)])
    got = fed(source, [naive.data(4 + k, 0, (3 + k) * BLOCK, BLOCK) for k in range(3)])
    assert source.counters["epochs"] == 2
    assert source.counters["lost"] == 3
    assert [batch.lost for batch in got] == [3, 0, 0]
    assert got[0].first == got[0].end == 4 * BLOCK - TAIL


def test_all_that_was_lost_before_a_batch_is_said_with_it(source):
    fed(source, [naive.data(1, 0, 0, BLOCK)])
    spikes = [naive.spike(number, "E1", BLOCK + number) for number in (4, 8)]
    got = fed(
        source, [*spikes, naive.data(9, 0, BLOCK, BLOCK), naive.data(10, 0, 2 * BLOCK, BLOCK)]
    )
    assert [batch.lost for batch in got] == [5, 0]


def test_a_message_that_comes_twice_is_a_repetition_unless_it_is_the_first(source):
    first, second = naive.data(1, 0, 0, BLOCK), naive.data(2, 0, BLOCK, BLOCK)
    fed(source, [first, first])
    assert (source.counters["epochs"], source.counters["repeated"]) == (2, 0)
    fed(source, [second, second])
    assert (source.counters["epochs"], source.counters["repeated"]) == (2, 1)
    assert source.counters["lost"] == 0


def test_an_acquisition_that_goes_back_without_counting_anew_is_another(source):
    fed(source, [naive.data(1 + k, 0, k * BLOCK, BLOCK) for k in range(5)])
    fed(source, [naive.data(6, 0, 0, BLOCK)])
    assert source.counters["epochs"] == 2


def test_by_spikes_an_acquisition_that_goes_back_is_joined_midway(source):
    samples = [*range(1_000_000, 1_020_000, 100), *range(5_000, 25_000, 100)]
    got = fed(source, [naive.spike(1 + k, "E1", sample) for k, sample in enumerate(samples)])
    last = [batch for batch in got if batch.epoch == got[-1].epoch]
    assert source.counters["epochs"] == 2
    assert last[0].seq == 0
    assert last[0].first >= 5_000 + 1500  # what came before may be missing


AWAY = {  # by the host's clock and by the numbers, in seconds; pace; epochs
    "another acquisition, further on than ours was": (40.0, 4.0, 1, 2),
    "the same, which went on": (40.0, 40.0, 1, 1),
    "the same, heard late": (20.0, 0.0, 1, 1),
    "the same, some of it lost and the rest late": (5.0, 1.5, 1, 1),
    "a replay at half speed": (40.0, 20.0, 2, 1),
}


@pytest.mark.parametrize("channels", [0, 1])
@pytest.mark.parametrize("name", AWAY)
def test_an_acquisition_that_began_anew_unseen_is_told_by_the_clock(source, channels, name):
    away_s, jump_s, pace, epochs = AWAY[name]
    number, got = 0, []
    for k in range(2000):  # blocks of 10 ms, and an outage after 15 s
        back = k >= 1500
        now = 10**12 + round(1e9 * (0.01 * k * pace + away_s * back))
        first = 300 * k + round(jump_s * RATE) * back
        number += 100 if k == 1500 and jump_s else 0
        blocks = [naive.data(number + 2, 0, first, 300)] * channels
        for frames in [naive.spike(number + 1, "E1", first + 99), *blocks]:
            source.take(frames, now)
        number += 1 + channels
        got.extend(source._ready)
        source._ready.clear()
    assert source.counters["epochs"] == len({batch.epoch for batch in got}) == epochs


def test_whoever_joins_late_misses_bins_but_publishes_none_that_is_wrong(session, port):
    endpoint = f"tcp://127.0.0.1:{port}"
    emulator = Emulator(endpoint, "ProbeA", session.unit_ids, session.rate, lossless=True)
    sent = list(pieces(session, BLOCK))
    for piece in sent[:100]:  # nobody listens
        emulator.send(piece)
    source = OpenEphysSource(f"openephys://127.0.0.1:{port}", known(session.unit_ids))
    assert emulator.wait_for_subscriber(10)
    for piece in sent[100:]:
        emulator.send(piece)
    got = []
    while (batch := source.read(200)) is not None:
        got.append(batch)
    frames, binner = bins_of(got, 6)
    assert frames[0][1] == -(-(101 * BLOCK - TAIL) // WIDTH)
    expected = native(session)
    assert all(f[2:4] == expected[f[1]] for f in frames if f[1] in expected)
    assert source.counters["lost"] == 0
    assert binner.counters["spikes_late"] == 0
    emulator.close()
    source.close()


@pytest.mark.parametrize("channels", [0, 1])
def test_when_a_bin_ended_is_known_though_it_was_held_back(source, channels):
    """Each block of 10 ms is there 0.2 ms after it ended; by spikes they wait for 50 ms more."""
    bins = Binner(np.arange(5, dtype=np.int32), 5, WIDTH, CONTEXT)
    validity = Validity(CONTEXT, 20_000_000, ClockFit(RATE), 250.0, False)
    rng, number, off_ms, late = np.random.default_rng(0), 0, [], 0
    for k in range(600):
        now = 10**12 + (k + 1) * 10_000_000 + 200_000
        messages = [("E1", int(s)) for s in np.sort(rng.integers(k * 300, (k + 1) * 300, 40))]
        for electrode, sample in messages:
            number += 1
            source.take(naive.spike(number, electrode, sample), now)
        for _ in range(channels):
            number += 1
            source.take(naive.data(number, 0, k * 300, 300), now)
        while source._ready:
            batch = source._ready.popleft()
            validity.take(batch)
            for frame in bins.frames(batch):
                if (ended := validity.ended_ns(frame.end, now)) is not None:
                    late += bool(validity.lateness(ended, now))
                    off_ms.append((ended - 10**12 - frame.end / RATE * 1e9) / 1e6)
    assert len(off_ms) > 150
    assert 0 <= min(off_ms) <= max(off_ms) < 1.0
    assert late == 0


def test_spikes_beyond_the_lateness_are_late_exactly(source):
    """By spikes, 50 ms: the naive twin decides message by message what has closed."""
    rng = np.random.default_rng(0)
    samples = np.arange(0, 300_000, 100) + rng.integers(0, 100, 3000)
    disordered = np.where(rng.random(3000) < 0.1, samples - rng.integers(0, 4000, 3000), samples)
    disordered = np.maximum(disordered, 0)
    messages = [naive.spike(1 + k, "E1", int(s)) for k, s in enumerate(disordered)]
    frames, binner = bins_of(fed(source, messages), 5)
    newest, late, closed, decided = -1, 0, 0, False
    for sample in disordered:
        late += bool(decided and sample // WIDTH < closed)
        newest = max(newest, int(sample))
        decided = decided or newest - disordered[0] > 3 * 1500
        if decided:
            closed = (newest - 1500) // 30 * 30 // WIDTH
    assert late > 20
    assert binner.counters["spikes_late"] == late
    assert [f[1] for f in frames] == list(range(frames[0][1], closed))
    total = sum(sum(f[3]) for f in frames) + binner._ring_RC[:, :-2].sum() + late
    assert total == 3000 - source._held - binner.counters["spikes_outside"]


def test_garbage_between_changes_no_bin_and_is_counted(session, port):
    rubbish = [[b"x"], [b"EVENT\0"], [b"EVENT\0", b"{"], [b"DATA\0", b"{}", b""]] * 20

    def send(emulator):
        for k, piece in enumerate(pieces(session, BLOCK)):
            emulator.send(piece)
            if k < len(rubbish):
                emulator._socket.send_multipart(rubbish[k])

    got, source = through_sockets(session, port, send)
    frames, _ = bins_of(got, 6)
    expected = native(session)
    assert all(f[2:4] == expected[f[1]] for f in frames if f[1] in expected)
    counters = source.counters
    assert [counters[f"malformed_{k}"] for k in ("envelope", "frames", "json", "field")] == [20] * 4
    assert counters["lost"] == 0
    assert accounted(source)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(messages=st.lists(st.one_of(mutated(), st.just(None)), min_size=1, max_size=40))
def test_every_message_is_accounted_for_and_time_never_goes_back(source, messages):
    end = epoch = 0
    for number, frames in enumerate(messages, 1):
        real = naive.data(number, 0, number * BLOCK, BLOCK)
        for batch in fed(source, [real if frames is None else frames]):
            if batch.epoch == epoch:
                assert batch.first >= end
            assert batch.epoch >= epoch
            assert batch.end >= batch.first
            epoch, end = batch.epoch, batch.end
    assert accounted(source)
    assert len(source._number_of) <= 5 + module.MAX_STRANGERS


def test_a_flood_of_samples_is_turned_off_and_loss_is_then_unknown(session, port):
    got, source = through_sockets(
        session, port, lambda e: send_session(e, session, speed=0), channels=MAX_CHANNELS + 4
    )
    assert source.counters["loss_unknown"] == 1
    assert source.counters["lost"] == 0
    assert source.counters["spikes"] == len(session.records_S)
    assert source.counters["blocks"] < 12 * 230
    frames, _ = bins_of(got, 6)
    expected = native(session)
    assert all(f[2:4] == expected[f[1]] for f in frames if f[1] in expected)
    assert frames[-1][1] > 350


# -- names and streams ---------------------------------------------------------------------------


def test_sorted_units_keep_their_names(port):
    source = OpenEphysSource(f"openephys://127.0.0.1:{port}", known(["A", "B#1", "B#2", "C#x"]))
    named = [("A", 0), ("A", 5), ("B", 1), ("B", 2), ("B", 0), ("B", 3), ("C#x", 0), ("D", 0)]
    fed(source, [naive.spike(1 + k, e, k, sorted_id=i) for k, (e, i) in enumerate(named)])
    got = fed(source, [naive.data(9, 0, 0, BLOCK)])
    assert got[0].records_S["unit"].tolist() == [0, 0, 1, 2, UNKNOWN, UNKNOWN, 3, UNKNOWN]
    assert source.counters["unknown_electrodes"] == 1
    source.close()


def test_a_renamed_electrode_is_unknown_and_its_unit_missing(source):
    def second(k, third="E2"):
        names = ["E0", "E1", third, "E3", "E4"]
        first = k * 30_000
        spikes = [naive.spike(6 * k + 1 + i, name, first + 9 * i) for i, name in enumerate(names)]
        return [*spikes, naive.data(6 * k + 6, 0, first, 30_000)]

    for k in range(40):
        fed(source, second(k))
        assert source.read(0) is None
    assert source.announced.units == ("E0", "E1", "E2", "E3", "E4")  # all names fit
    fed(source, [naive.data(1, 0, 0, BLOCK)])  # the acquisition begins anew, one name has changed
    source._heard.clear()
    source._number_of.clear()
    unknown = 0
    for k in range(40):
        for batch in fed(source, second(k, "renamed")):
            unknown += (batch.records_S["unit"] == UNKNOWN).sum()
        source.read(0)
    assert unknown == 40
    assert source.announced.units == ("E0", "E1", "E3", "E4")
    got = fed(source, second(40, "renamed"))
    assert got[-1].records_S["unit"].tolist() == [0, 1, UNKNOWN, 2, 3]


def hear(source, seconds, names):
    """Batches of some seconds in each of which every electrode has one spike, at 25 kHz."""
    got = []
    for k in seconds:
        first, number = k * 25_000, (len(names) + 1) * k + 1
        spikes = [naive.spike(number + i, name, first) for i, name in enumerate(names)]
        last = naive.data(number + len(names), 0, first, 25_000, rate=25_000.0)
        got += fed(source, [*spikes, last])
        source.read(0)
    return got


def test_who_takes_a_workers_place_knows_which_electrodes_are_missing(tiny, port):
    spec = load_spec(tiny[1] / "bundle")
    names = spec.sessions[0].units
    config = ServeConfig(probe="p", bundle="b", source=f"openephys://127.0.0.1:{port}")
    heard = [spec.sessions[0].id, 25_000.0, [*names[:2], *names[3:]]]
    source = open_source(config, spec, before=heard)
    assert [source.announced.session, source.announced.rate] == heard[:2]
    assert list(source.announced.units) == heard[2]
    got = hear(source, range(3), heard[2][:-1])
    assert got[-1].records_S["unit"].tolist() == [0, 1, 2, 3]
    # A unit that it found is not lost because it paused; one that is there again is announced.
    hear(source, range(3, 40), names[:-1])
    assert list(source.announced.units) == names
    source.close()


def test_a_worker_that_had_found_no_electrode_missing_tells_nothing(tiny, port):
    spec = load_spec(tiny[1] / "bundle")
    session, names = spec.sessions[0], spec.sessions[0].units
    config = ServeConfig(probe="p", bundle="b", source=f"openephys://127.0.0.1:{port}")
    source = open_source(config, spec, before=[session.id, 25_000.0, names])
    hear(source, range(40), [*names[1:], "strange"])
    assert list(source.announced.units) == names[1:]
    source.close()


def test_electrodes_of_which_none_is_known_end_the_run_with_both_names(source):
    for k in range(33):
        first = k * 30_000
        fed(source, [naive.spike(2 * k + 1, "CH1", first), naive.data(2 * k + 2, 0, first, 30_000)])
        assert source.read(0) is None
    with pytest.raises(StreamError, match=r"announces units CH1 .* knows E0, E1"):
        unit_map(source.announced.units, ["E0", "E1"])


def test_another_rate_is_announced_before_any_batch(source):
    source.take(naive.data(1, 0, 0, BLOCK, rate=25_000.0), 1)
    assert source.read(0) is None
    assert source.announced.rate == 25_000.0
    batch = source.read(0)
    assert (batch.rate, batch.first, batch.end) == (25_000.0, 0, BLOCK - TAIL)


def test_one_of_several_streams_is_taken(port):
    source = OpenEphysSource(f"openephys://127.0.0.1:{port}?stream=B", known(["E0"]))
    messages = [
        naive.spike(1, "E0", 5, stream="A"),
        naive.spike(2, "E0", 6, stream="B"),
        naive.data(3, 0, 0, BLOCK, stream="A"),
        naive.data(4, 0, 0, BLOCK, stream="B"),
    ]
    got = fed(source, messages)
    assert [batch.records_S["sample"].tolist() for batch in got] == [[6]]
    assert source.counters["other_stream"] == 2
    assert source.counters["lost"] == 0
    assert accounted(source)
    source.close()


def test_events_of_other_streams_do_not_choose_the_stream(port):
    """The Event Broadcaster sends all streams of the GUI; spikes come of the probe's alone."""
    source = OpenEphysSource(f"openephys-events://127.0.0.1:{port}", known(["E0"]))
    messages = []
    for k in range(100):
        messages.append(naive.broadcast_ttl(0, k % 2, 250 * k, stream="ProbeA-LFP"))
        messages.append(naive.broadcast_spike("E0", 3000 * k, stream="ProbeA-AP"))
    got = fed(source, messages)
    samples = np.concatenate([batch.records_S["sample"] for batch in got])
    assert samples.tolist() == list(range(0, 300_000, 3000))
    assert source.counters["other_stream"] == 100
    assert got[-1].end == 297_000 - 1500  # the events lag behind and hold nothing back
    assert accounted(source)
    source.close()


def test_the_stream_is_that_of_electrodes_that_the_bundle_knows(port):
    source = OpenEphysSource(f"openephys://127.0.0.1:{port}", known(["E0"]))
    messages = [
        naive.ttl(1, 0, 1, 10, stream="NI"),
        naive.spike(2, "X0", 20, stream="ProbeB"),
        naive.spike(3, "E0", 30, stream="ProbeA"),
        naive.data(4, 0, 0, BLOCK, stream="ProbeA"),
        naive.ttl(5, 0, 0, 40, stream="NI"),
    ]
    got = fed(source, messages)
    assert [batch.records_S["sample"].tolist() for batch in got] == [[30]]
    assert (source.counters["other_stream"], source.counters["lost"]) == (3, 0)
    source.close()


def test_where_no_electrode_is_known_a_stream_is_taken_after_all(port):
    """So that both names are told, instead of nothing being decoded without a word."""
    source = OpenEphysSource(f"openephys-events://127.0.0.1:{port}", known(["E0"]))
    start = time.monotonic_ns()
    for k in range(400):
        source.take(naive.broadcast_spike("CH1", 3000 * k), start + k * 100_000_000)
        while source.read(0) is not None:
            pass
    assert source.announced.units == ("CH1",)
    source.close()


# -- time and life -------------------------------------------------------------------------------


def test_in_silence_the_clock_closes_bins_for_a_quarter_of_a_second(source, monkeypatch):
    start, now = 10**12, [10**12]
    monkeypatch.setattr(module, "monotonic_ns", lambda: now[0])
    number, last = 0, None
    for ms in range(0, 15_000, 5):  # a spike every 5 ms, for 15 s
        number += 1
        now[0] = start + ms * 1_000_000
        source.take(naive.spike(number, "E1", ms * 30), now[0])
    while source._ready:
        last = source._ready.popleft()
    spoken = now[0]
    assert last.end == (14_995 * 30 - 1500) // 30 * 30
    now[0] = spoken + 40_000_000
    assert source.read(0) is None  # a block may take so long
    now[0] = spoken + 200_000_000
    batch = source.read(0)
    assert (batch.first, len(batch.records_S)) == (last.end, 0)
    assert batch.end == pytest.approx(last.end + 200 * 30, abs=31)
    now[0] = spoken + 300_000_000
    assert source.read(0) is None  # neither dead nor alive: nothing is published
    number += 1
    source.take(naive.spike(number, "E1", 15_295 * 30), now[0])
    assert source._ready.popleft().first == batch.end


def test_heartbeats_go_on_when_the_plugin_comes_back(port, source, monkeypatch):
    monkeypatch.setattr(heartbeat_module, "EVERY_NS", 20_000_000)
    monkeypatch.setattr(heartbeat_module, "UNANSWERED_NS", 60_000_000)

    def live(plugin, seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            source.read(5)
            if plugin:
                plugin.answer()

    live(None, 0.3)
    assert source.counters["heartbeats_unanswered"] >= 2
    plugin = naive.Plugin(port)
    try:
        live(plugin, 1.0)
        assert len(plugin.heard) > 5
        assert {beat["type"] for beat in plugin.heard} == {"heartbeat"}
        assert len({beat["uuid"] for beat in plugin.heard}) == 1
        plugin.send(*[naive.data(1 + k, 0, k * BLOCK, BLOCK) for k in range(3)])
        live(plugin, 0.2)
        assert source.counters["blocks"] == 3
    finally:
        plugin.close()
    unanswered = source.counters["heartbeats_unanswered"]
    live(None, 0.3)
    assert source.counters["heartbeats_unanswered"] > unanswered


@pytest.mark.parametrize("named", ["", "?stream=ProbeA"])
def test_it_is_told_why_nothing_of_ours_comes(port, monkeypatch, named):
    source = OpenEphysSource(f"openephys://127.0.0.1:{port}{named}", known(["E0"]))
    assert source.trouble == ""  # it may still come
    monkeypatch.setattr(module, "PATIENCE_NS", 0)
    assert f"nothing comes from Open Ephys at 127.0.0.1:{port}" in source.trouble
    plugin = naive.Plugin(port)
    try:
        deadline = time.monotonic() + 10
        while "answers but sends nothing" not in source.trouble and time.monotonic() < deadline:
            source.read(5)
            plugin.answer()
        assert "does it acquire?" in source.trouble
        fed(source, [naive.spike(1, "X0", 20, stream="ProbeB")])
        ours = "stream 'ProbeA'" if named else "the bundle's electrodes"
        assert f"sends, but nothing of {ours}" in source.trouble
        fed(source, [naive.spike(2, "E0", 30, stream="ProbeA")])
        assert source.trouble == ""
    finally:
        plugin.close()
        source.close()


def test_a_batch_that_was_looked_at_is_read_next(source):
    first = fed(source, [naive.data(1, 0, 0, BLOCK)])
    source._ready.extend(first)
    assert source.peek_spikes(0)
    assert source.read(0) is first[0]
    assert not source.peek_spikes(0)


def test_read_never_waits_longer_than_it_may(source):
    started = time.monotonic()
    assert source.read(0) is None
    assert source.read(50) is None
    assert time.monotonic() - started < 0.5


# -- the Event Broadcaster -----------------------------------------------------------------------


def test_bins_by_way_of_the_event_broadcaster(session, port):
    got, source = through_sockets(
        session, port, lambda e: send_session(e, session, speed=0), broadcaster=True
    )
    frames, _ = bins_of(got, 6)
    expected = native(session)
    assert len(frames) > 350
    assert all(f[2:4] == expected[f[1]] for f in frames if f[1] in expected)
    assert source.counters["loss_unknown"] == 1
    assert source.counters["spikes"] == len(session.records_S)


def test_open_ephys_own_listener_hears_the_event_broadcaster(session, port):
    listener = pytest.importorskip(
        "open_ephys.streaming", reason="pip install open-ephys-python-tools"
    ).EventListener(port=port)
    emulator = Emulator(
        f"tcp://127.0.0.1:{port}", "ProbeA", session.unit_ids, session.rate, broadcaster=True,
        lossless=True,
    )  # fmt: skip
    assert emulator.wait_for_subscriber(10)
    spikes, events = [], []

    def on_spike(info):
        spikes.append((info["sample_number"], info["electrode"]))
        if len(spikes) == 400:
            raise KeyboardInterrupt  # its own way to end

    sending = threading.Thread(target=send_session, args=(emulator, session), kwargs={"speed": 0})
    sending.start()
    listener.start(ttl_callback=events.append, spike_callback=on_spike)
    listener.context.destroy(linger=0)
    sending.join()
    emulator.close()
    sent = np.concatenate([piece.records_S for piece in pieces(session, BLOCK)])[:400]
    assert spikes == [(s, session.unit_ids[u]) for s, u, _ in sent.tolist()]
    assert events[0] == {
        "event_type": "ttl", "stream": "ProbeA", "source_node": 105, "sample_rate": 30000.0,
        "channel_name": "trials", "sample_number": 30_000, "line": 0, "state": True,
    }  # fmt: skip


# -- mistakes ------------------------------------------------------------------------------------


def test_ports_in_use_and_wrong_addresses_are_told_in_one_line(port):
    emulator = Emulator(f"tcp://127.0.0.1:{port}", "s", ["a"], RATE)
    with pytest.raises(StreamError, match="in use"):
        Emulator(f"tcp://127.0.0.1:{port}", "s", ["a"], RATE)
    emulator.close()
    for endpoint in ("ipc://x", "tcp://127.0.0.1", "tcp://127.0.0.1:65535"):
        with pytest.raises(ConfigError, match="5556"):
            next_port(endpoint)
