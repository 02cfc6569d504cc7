"""SpikeGLX over real sockets: bins are what was sent, reports are what was injected."""

import contextlib
import itertools
import socket
import sys
import time

import numpy as np
import pytest

import rt_neds.stream.spikeglx as module
import rt_neds.stream.spikeglx_line as line_module
from rt_neds.children import free_port
from rt_neds.errors import ConfigError, DetectorError, StreamError
from rt_neds.spikeglx_wire import LINK_ERRORS, MISSED, Question
from rt_neds.stream.binner import Binner
from rt_neds.stream.receiver import waiting_for
from rt_neds.stream.spikeglx import SpikeGLXSource
from tests import naive_spikeglx as naive

RATE, WIDTH, CONTEXT, AP = 30_000.0, 600, 200, 6
LAG = 20
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Shorter waits where the waiting itself is not what is tested."""
    monkeypatch.setattr(module, "PACE_NS", 0)
    monkeypatch.setattr(module, "BACKOFF_NS", 1_000_000)
    monkeypatch.setattr(module, "STALL_NS", 50_000_000)


@pytest.fixture
def serve():
    """Make a server of some data and a source that reads it; both are closed in the end."""
    made = []

    def make(data, *, lag=LAG, server=None, detector=None, query="", **options):
        lf = data.shape[1] - AP - 1
        server = server or naive.Server(data, ap=AP, lf=lf, **options)
        detector = detector or naive.Threshold(AP, lag=lag)
        source = SpikeGLXSource(f"spikeglx://127.0.0.1:{server.port}{query}", "s", detector)
        made.extend([source, server])
        return source, server, detector

    yield make
    for one in made:
        one.close()


def read_until(source, end, *, epochs=1, meanwhile=None):
    """Batches until some epoch, the n-th, is complete up to a sample."""
    got, deadline = [], time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        batch = source.read(50)
        if meanwhile is not None:
            meanwhile()
        if batch is None:
            continue
        got.append(batch)
        if len({one.epoch for one in got}) >= epochs and batch.end >= end:
            return got
    raise AssertionError(f"only {got[-1].end if got else 'nothing'}; {source.counters}")


def frames_of(batches_, units=AP):
    binner = Binner(np.arange(units, dtype=np.int32), units, WIDTH, CONTEXT)
    frames = [
        (f.bin, f.observed, f.counts_N.tolist(), f.lost)
        for batch in batches_
        for f in binner.frames(batch)
    ]
    assert binner.counters["spikes_late"] == binner.counters["spikes_far"] == 0
    return frames, binner


def expected(data, stretches, *, lag=LAG, settle=0, ap=AP):
    """Bins of the stretches ``[a, b)`` that came whole, by going through them sample by sample."""
    end = stretches[-1][1] - lag
    counts = np.zeros((end // WIDTH + 1, ap))
    seen = np.zeros(end, bool)
    for a, b in stretches:
        seen[a + settle : max(a + settle, b - lag)] = True
        for c in range(ap):
            for s in np.flatnonzero(data[:, c] < -200):
                if max(a + 1, a + settle) <= s < b - lag and data[s - 1, c] >= -200:
                    counts[s // WIDTH, c] += 1
    first = -(-(stretches[0][0] + settle) // WIDTH)
    return [
        (b, bool(seen[b * WIDTH : (b + 1) * WIDTH].all()), counts[b].tolist())
        for b in range(first, end // WIDTH)
    ]


def agree(frames, wanted):
    """Observed bins are equal to the bit, and the same bins are unobserved."""
    assert [f[:2] for f in frames] == [w[:2] for w in wanted]
    for frame, want in zip(frames, wanted, strict=True):
        if want[1]:
            assert frame[2] == want[2]


# -- equal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps", [(30,), (1, 0, 700, 12, 0, 0, 5000), (3000,), (60_000,), (599, 601)]
)
def test_bins_are_those_of_the_samples_however_they_come(serve, steps):
    data = naive.recording(60_000, AP)
    source, server, detector = serve(data, steps=steps, running=False)
    read_until_told(source, "no run is going")
    server.running = True
    got = read_until(source, len(data) - LAG)
    agree(frames_of(got)[0], expected(data, [(0, len(data))]))
    assert detector.resets == [0, 0]
    assert [batch.seq for batch in got] == list(range(len(got)))
    assert got[-1].newest == len(data)  # so far it has come, whatever the detector holds back
    assert sum(len(batch.records_S) for batch in got) == source.counters["spikes"] > 400
    counters = source.counters
    assert (counters["samples"], counters["lost"], counters["epochs"]) == (len(data), 0, 1)
    assert counters["connections"] == server.connections == 1
    assert source.trouble == ""


def test_what_the_server_says_of_the_probe_is_announced(serve):
    data = naive.recording(6000, AP)
    source, _, detector = serve(data, rate=30000.390639)
    while source.announced is None:
        assert source.read(50) is None  # no batch may come before its announcement has been seen
    assert source.announced.rate == 30000.390639
    assert source.announced.units == detector.units
    assert source.announced.session == "s"
    probe = source.probe
    assert (probe.ap, probe.lf, probe.status, probe.max_int) == (AP, 0, 1, 512)
    assert probe.uv_C == pytest.approx([2.34375] * AP)
    assert probe.sites_C[3] == (0, 59.0, 20.0, 1)
    assert probe.serial == "18005116811"
    assert probe.version.startswith("SpikeGLX")


@pytest.mark.parametrize("alike", [True, False])
def test_a_detector_is_asked_about_a_gain_that_all_channels_have(serve, alike):
    source, server, detector = serve(naive.recording(6000, AP))
    answer, asked = server.answer, []

    def of_two_gains(connection, line):
        if alike or line.split() != ["GETSTREAMI16TOVOLTS", "2", "0", "0"]:
            answer(connection, line)
        else:
            connection.sendall(b"4.6875e-06\nOK\n")

    server.answer = of_two_gains
    detector.check_source = lambda *what: asked.append(what)
    deadline = time.monotonic() + PATIENCE_S
    while source.announced is None:
        assert time.monotonic() < deadline
        source.read(50)
    assert asked == [(RATE, None, pytest.approx(2.34375) if alike else None)]


def test_channels_of_the_field_potential_are_not_fetched(serve):
    data = naive.recording(12_000, AP)
    with_lf = np.insert(data, [AP] * AP, 0, axis=1)
    with_lf[:, AP : 2 * AP] = -400  # would be spikes
    source, server, _ = serve(with_lf, steps=(500, 0))
    server.count = 1
    got = read_until(source, len(data) - LAG)
    agree(frames_of(got)[0], expected(data, [(1, len(data))]))
    assert source.counters["empty"] > 10
    assert source.counters["connections"] == 1


def test_whoever_comes_into_a_run_begins_at_the_newest_sample(serve):
    data = naive.recording(60_000, AP)
    source, server, detector = serve(data, steps=(100,))
    server.count = 31_234
    got = read_until(source, len(data) - LAG)
    assert got[0].first == 31_234
    assert detector.resets == [0, 31_234]
    agree(frames_of(got)[0], expected(data, [(31_234, len(data))]))
    assert source.counters["lost"] == 0


# -- faults --------------------------------------------------------------------------------------


def test_missed_samples_are_lost_and_no_silence(serve):
    data = naive.recording(60_000, AP)
    runs = [(7_000, 7_001), (20_000, 20_900), (29_990, 36_000), (40_000, 40_010), (40_011, 40_020)]
    for a, b in runs:
        data[a:b, :-1] = 0
        data[a:b, -1] |= MISSED
    source, server, detector = serve(data, steps=(777,))
    server.count = 1
    got = read_until(source, len(data) - LAG)
    ends = [a for a, _ in runs] + [len(data)]
    starts = [1] + [b for _, b in runs]
    stretches = list(zip(starts, ends, strict=True))
    frames, binner = frames_of(got)
    agree(frames, expected(data, stretches))
    missed = sum(b - a for a, b in runs)
    assert source.counters["missed"] == source.counters["lost"] == missed
    assert sum(batch.lost for batch in got) == missed
    assert source.counters["samples"] == len(data) - 1
    assert detector.resets == [0, *starts]
    # Of each stretch the detector keeps the last few samples to itself.
    assert binner.counters["samples_lost"] == missed + LAG * 4 + 1  # one stretch is one sample long


def test_until_the_detector_has_settled_bins_are_not_observed(serve):
    data = naive.recording(60_000, AP)
    runs = [(7_000, 7_100), (7_300, 7_400), (7_900, 8_000)]
    for a, b in runs:
        data[a:b, -1] |= MISSED
    detector = naive.Threshold(AP, lag=LAG, settle=300)
    source, server, _ = serve(data, detector=detector, steps=(77, 1, 400))
    server.count = 1
    got = read_until(source, len(data) - LAG)
    stretches = [(1, 7_000), (7_100, 7_300), (7_400, 7_900), (8_000, len(data))]
    frames, _ = frames_of(got)
    agree(frames, expected(data, stretches, settle=300))
    assert [f[0] for f in frames if not f[1]] == [11, 12, 13]
    assert source.counters["missed"] == 300


def test_a_long_miss_closes_bins_while_it_lasts(serve):
    data = naive.recording(9_000, AP)
    data[3000:, -1] |= MISSED
    source, server, _ = serve(data, steps=(600,))
    server.count = 1
    frames, _ = frames_of(read_until(source, len(data)))
    assert [f[0] for f in frames] == list(range(1, 15))
    assert [f[1] for f in frames] == [True] * 3 + [False] * 11


def test_errors_of_the_link_are_counted_by_kind(serve):
    data = naive.recording(6_000, AP)
    rng = np.random.default_rng(1)
    for bit in LINK_ERRORS.values():
        data[rng.random(len(data)) < 0.01, -1] |= bit
    source, server, _ = serve(data, steps=(100,))
    server.count = 1
    read_until(source, len(data) - LAG)
    for name, bit in LINK_ERRORS.items():
        assert source.counters[f"link_{name}"] == np.count_nonzero(data[1:, -1] & bit) > 20
    assert source.counters["lost"] == 0


def test_too_late_is_a_gap_of_exact_length(serve):
    data = naive.recording(120_000, AP)
    source, server, detector = serve(data, steps=(300,), ring=10_000)
    server.count = 1

    def stall(server, connection):
        server.count += 45_678
        connection.sendall(b"ERROR FETCH: Too late.\n")

    server.faults[50] = stall
    got = read_until(source, len(data) - LAG)
    at = 1 + 50 * 300
    resumed = at + 45_678
    agree(frames_of(got)[0], expected(data, [(1, at), (resumed, len(data))]))
    assert source.counters["too_late"] == 1
    assert source.counters["skipped"] == source.counters["lost"] == 45_678
    assert sum(batch.lost for batch in got) == 45_678
    assert detector.resets == [0, 1, resumed]
    assert source.counters["connections"] == 1


def test_too_late_before_the_detector_has_settled_begins_it_anew(serve):
    data = naive.recording(60_000, AP)
    detector = naive.Threshold(AP, lag=LAG, settle=300)
    source, server, _ = serve(data, steps=(77,), ring=10_000, detector=detector)
    server.count = 1

    def stall(server, connection):
        server.count += 30_000
        connection.sendall(b"ERROR FETCH: Too late.\n")

    server.faults[2] = stall
    got = read_until(source, len(data) - LAG)
    resumed = 1 + 2 * 77 + 30_000
    agree(frames_of(got)[0], expected(data, [(resumed, len(data))], settle=300))
    assert detector.resets == [0, 1, resumed]
    assert (source.counters["too_late"], source.counters["lost"]) == (1, 0)


def test_a_server_that_answers_from_further_on_has_left_out_what_is_between(serve):
    data = naive.recording(30_000, AP)
    source, server, _ = serve(data, steps=(300,))
    server.count = 1

    def ahead(server, connection):
        server.count += 1000
        head, body = server.reply(server.count - 300, 300)
        connection.sendall(head + body + b"OK\n")

    server.faults[20] = ahead
    got = read_until(source, len(data) - LAG)
    at = 1 + 20 * 300
    agree(frames_of(got)[0], expected(data, [(1, at), (at + 700, len(data))]))
    assert source.counters["skipped"] == source.counters["lost"] == 700
    assert source.counters["too_late"] == 0


BREAKS = {
    "half": (naive.half_a_reply, "disconnected"),
    "reset": (naive.hangs_up, "disconnected"),
    "silence": (naive.silence, "silent"),
    "garbage": (naive.says(b"\xff\xfe\x00" * 10 + b"\n"), "malformed_header"),
    "endless": (naive.says(b"x" * 9000), "malformed_line"),
    "truncated": (naive.says(b"BINARY_DATA 7\n"), "malformed_header"),
    "channels": (naive.says(b"BINARY_DATA 6 1 uint64(9999999)\n" + bytes(12)), "malformed_shape"),
    "many": (naive.says(b"BINARY_DATA 7 3001 uint64(9999999)\n"), "malformed_shape"),
    "before": (naive.says(b"BINARY_DATA 7 1 uint64(0)\n" + bytes(14)), "malformed_shape"),
    "tail": (
        naive.says(b"BINARY_DATA 7 1 uint64(30000)\n" + bytes(14) + b"KO\n"),
        "malformed_tail",
    ),
    "excess": (
        naive.says(b"BINARY_DATA 7 1 uint64(30000)\n" + bytes(14) + b"OK\nOK\n"),
        "malformed_excess",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_connection_is_made_again_and_nothing_is_lost(serve, monkeypatch, name):
    monkeypatch.setattr(line_module, "SILENT_NS", 150_000_000)
    data = naive.recording(30_000, AP)
    source, server, _ = serve(data, steps=(300,))
    server.count = 1
    fault, kind = BREAKS[name]
    server.faults = dict.fromkeys((20, 21, 50), fault)
    got = read_until(source, len(data) - LAG)
    agree(frames_of(got)[0], expected(data, [(1, len(data))]))
    counters = source.counters
    ends = ("disconnected", "silent", "refused", "unreachable")
    broken = {k: n for k, n in counters.items() if n and (k in ends or k.startswith("malformed_"))}
    assert broken == {kind: 3}
    assert counters["connections"] == server.connections == 4
    assert counters["samples"] == len(data) - 1
    assert (counters["lost"], counters["epochs"]) == (0, 1)


def test_what_the_server_forgot_while_the_connection_was_broken_is_a_gap(serve):
    data = naive.recording(60_000, AP)
    source, server, _ = serve(data, steps=(300,), ring=5_000)
    server.count = 1

    def away(server, connection):
        server.count += 20_000
        naive.reset(connection)

    server.faults[20] = away
    got = read_until(source, len(data) - LAG)
    at = 1 + 20 * 300
    agree(frames_of(got)[0], expected(data, [(1, at), (at + 20_000, len(data))]))
    assert source.counters["skipped"] == source.counters["lost"] == 20_000
    assert (source.counters["too_late"], source.counters["disconnected"]) == (1, 1)


def test_a_restart_is_a_new_epoch_with_the_same_bins(serve):
    data = naive.recording(30_000, AP)
    source, server, detector = serve(data, steps=(300,), running=False)
    read_until_told(source, "no run is going")
    server.running = True
    first = read_until(source, len(data) - LAG)
    server.running = False
    deadline = time.monotonic() + PATIENCE_S
    while not source.trouble and time.monotonic() < deadline:
        assert source.read(20) is None
    assert "ot running" in source.trouble
    server.count, server.running = 0, True
    second = read_until(source, len(data) - LAG)
    assert source.counters["epochs"] == 2
    assert second[0].epoch > first[-1].epoch
    assert second[0].seq == 0
    assert frames_of(first)[0] == frames_of(second)[0]
    assert detector.resets == [0, 0, 0]
    assert source.counters["lost"] == 0


@pytest.mark.parametrize("began", ["late", "soon", "told"])
def test_a_run_that_was_seen_to_end_does_not_go_on_however_the_next_counts(serve, began):
    data = naive.recording(30_000, AP)
    source, server, _ = serve(data, steps=(300,))
    server.count = 1
    read_until(source, 9_000)
    server.steps, answer = (0,), server.answer

    def ended(connection, line):
        if not line.startswith("GETSTREAMSAMPLECOUNT"):
            answer(connection, line)
            return
        server.answer = answer
        connection.sendall(b"0\nOK\n")

    if began == "late":
        server.running = False
        read_until_told(source, "no run is going")
        server.running = True
    elif began == "soon":
        server.answer = ended  # begun when we look again
    else:
        told = naive.says(b"ERROR FETCH: Not running or stream not enabled.\n")
        server.faults[server.fetched + 1] = told
    deadline = time.monotonic() + PATIENCE_S
    while source.counters["epochs"] < 2:
        assert time.monotonic() < deadline
        source.read(5)
    server.steps = (300,)
    got = read_until(source, len(data) - LAG)
    assert source.counters["epochs"] == 2
    assert len({batch.epoch for batch in got}) == 1


def test_a_run_that_we_waited_for_outlives_its_connection(serve):
    data = naive.recording(30_000, AP)
    source, server, _ = serve(data, steps=(300,), running=False)
    read_until_told(source, "no run is going")
    server.rate = 30_000.5  # what was said of the probe was said of the run before
    server.running, server.faults = True, {20: naive.hangs_up}
    got = read_until(source, len(data) - LAG)
    agree(frames_of(got)[0], expected(data, [(0, len(data))]))
    assert (source.announced.rate, got[0].rate) == (30_000.5, 30_000.5)
    assert (source.counters["epochs"], source.counters["disconnected"]) == (1, 1)


def test_a_restart_while_we_are_told_too_late_is_no_step_back(serve):
    data = naive.recording(30_000, AP)
    source, server, _ = serve(data, steps=(300,))
    server.count = 1

    def goes_to(count):
        def too_late(server, connection):
            server.count = count
            connection.sendall(b"ERROR FETCH: Too late.\n")

        return too_late

    server.faults |= {39: goes_to(1 + 39 * 300 + 5000), 40: goes_to(0)}
    got = read_until(source, len(data) - LAG, epochs=2)
    ours = [batch for batch in got if batch.epoch == got[-1].epoch]
    agree(frames_of(ours)[0], expected(data, [(0, len(data))]))
    assert (source.counters["too_late"], source.counters["lost"]) == (2, 5000)
    assert not any(batch.lost for batch in ours)  # that was of the run before


def test_a_restart_that_nobody_saw_is_noticed_by_the_count(serve):
    data = naive.recording(60_000, AP)
    source, server, _ = serve(data, steps=(300,))
    server.count = 30_000
    read_until(source, 50_000)

    def between(server, connection):
        server.count = 0  # a new run, while the connection is away
        naive.reset(connection)

    server.faults[server.fetched + 1] = between
    got = read_until(source, len(data) - LAG, epochs=2)
    ours = [batch for batch in got if batch.epoch == got[-1].epoch]
    assert ours[0].first == 0
    agree(frames_of(ours)[0], expected(data, [(0, len(data))]))
    assert source.counters["epochs"] == 2


@pytest.mark.parametrize(
    ("step", "away"),
    [(300, {20: 40_000, 23: 20_000}), (3000, {10: 20_000})],
    ids=["less than it had", "less than we have"],
)
def test_a_restart_that_nobody_saw_is_noticed_while_we_are_behind(serve, step, away):
    data = naive.recording(60_000, AP)
    source, server, _ = serve(data, steps=(step,))
    server.count = 1

    def breaks(server, connection):
        server.count = away[server.fetched - 1]
        naive.reset(connection)

    server.faults = dict.fromkeys(away, breaks)
    got = read_until(source, len(data) - LAG, epochs=2)
    ours = [batch for batch in got if batch.epoch == got[-1].epoch]
    agree(frames_of(ours)[0], expected(data, [(0, len(data))]))
    assert source.counters["epochs"] == 2


def test_a_restart_that_nobody_saw_is_noticed_by_the_clock(serve, monkeypatch):
    """The new run has counted further than the old, but not by as much as time has passed."""
    monkeypatch.setattr(module, "UNWATCHED_NS", 100_000_000)
    data = naive.recording(60_000, AP)
    source, server, _ = serve(data, steps=(300, 0))
    server.count = 1
    read_until(source, 6_000)
    time.sleep(0.8)  # our own stall: 24 000 samples at the probe's rate
    server.count += 900
    got = read_until(source, len(data) - LAG)
    assert source.counters["epochs"] == 2
    assert got[0].first == 0


def test_a_probe_that_resumes_while_nobody_looks_is_the_same_run(serve, monkeypatch):
    """It counted on by little, but no new run can have come so far in so short a time."""
    monkeypatch.setattr(module, "UNWATCHED_NS", 100_000_000)
    data = naive.recording(330_000, AP)
    source, server, _ = serve(data, steps=(300, 0))
    server.count = 300_000
    read_until(source, 306_000)
    time.sleep(0.5)
    server.count += 900
    read_until(source, len(data) - LAG)
    assert source.counters["epochs"] == 1
    assert source.counters["lost"] == 0


def test_a_probe_that_stalls_while_the_connection_breaks_is_the_same_run(serve, monkeypatch):
    monkeypatch.setattr(module, "UNWATCHED_NS", 100_000_000)
    monkeypatch.setattr(module, "BACKOFF_NS", 150_000_000)
    data = naive.recording(30_000, AP)
    source, server, _ = serve(data, steps=(300,))
    server.count = 1
    read_until(source, 9_000)
    server.steps = (0,)
    server.faults = dict.fromkeys(range(server.fetched + 1, server.fetched + 4), naive.hangs_up)
    deadline = time.monotonic() + PATIENCE_S
    while source.counters["disconnected"] < 3 or source.socket is source._idle:
        assert time.monotonic() < deadline
        source.read(20)
    server.steps = (300,)
    read_until(source, len(data) - LAG)
    assert source.counters["epochs"] == 1
    assert source.counters["lost"] == 0


def test_a_stall_of_the_probe_is_the_same_run(serve):
    data = naive.recording(30_000, AP)
    source, server, _ = serve(data, steps=(300,))
    server.count = 1
    read_until(source, 9_000)
    server.steps = (0,)
    server.heard.clear()
    for _ in range(10):
        for _ in iter(lambda: source.read(30), None):
            pass
    assert "GETSTREAMSAMPLECOUNT" in server.heard
    server.steps = (300,)
    read_until(source, len(data) - LAG)
    assert source.counters["epochs"] == 1
    assert source.counters["empty"] > 10
    assert source.counters["lost"] == 0


def test_a_server_that_hangs_does_not_hold_the_loop(serve, monkeypatch):
    monkeypatch.setattr(line_module, "SILENT_NS", 300_000_000)
    data = naive.recording(30_000, AP)
    source, server, _ = serve(data, steps=(300,))
    server.count = 1
    read_until(source, 6_000)
    server.faults = {n: naive.silence for n in range(server.fetched, server.fetched + 2)}
    longest, deadline = 0.0, time.monotonic() + PATIENCE_S
    while source.counters["silent"] < 2 and time.monotonic() < deadline:
        began = time.thread_time()
        source.read(5)
        longest = max(longest, time.thread_time() - began)
    assert source.counters["silent"] == 2
    assert longest < 1  # of our own time, whatever else the machine was busy with
    read_until(source, len(data) - LAG)
    assert source.counters["lost"] == 0


def waits_of(monkeypatch):
    """How long each wait for the connection may last, in seconds."""
    select, waits = line_module.select.select, []

    def watched(*sockets_and_wait):
        waits.append(sockets_and_wait[-1])
        return select(*sockets_and_wait)

    monkeypatch.setattr(line_module.select, "select", watched)
    return waits


def test_no_wait_is_longer_than_a_read_may_take(serve, monkeypatch):
    """However long ago the question went out: a worker that does not return is taken for hung."""
    monkeypatch.setattr(line_module, "SILENT_NS", 300_000_000)
    waits = waits_of(monkeypatch)
    source, server, _ = serve(naive.recording(9_000, AP), steps=(300,))
    server.count = 1
    server.faults = {5: naive.silence}
    deadline = time.monotonic() + PATIENCE_S
    while not source.counters["silent"]:
        assert time.monotonic() < deadline
        source.read(5)
    assert 0 < max(waits) <= 0.005


def test_a_server_that_answers_each_question_in_time_is_not_silent(serve, monkeypatch):
    ticks = itertools.count(step=10_000_000)
    monkeypatch.setattr(line_module, "monotonic_ns", lambda: time.monotonic_ns() + next(ticks))
    monkeypatch.setattr(line_module, "SILENT_NS", 3_000_000_000)
    data = naive.recording(18_000, AP)
    source, server, _ = serve(data, steps=(30,))
    server.count = 1
    read_until(source, len(data) - LAG)
    assert next(ticks) > 2 * line_module.SILENT_NS
    assert (source.counters["silent"], source.counters["connections"]) == (0, 1)


def test_a_reply_that_trickles_is_given_up(serve, monkeypatch):
    monkeypatch.setattr(line_module, "SILENT_NS", 200_000_000)
    data = naive.recording(9_000, AP)
    source, server, _ = serve(data, steps=(300,))
    server.count = 1

    def trickle(server, connection):
        for byte in b"BINARY_DATA 7 300 uint64(1501)\n" + bytes(4200):
            connection.sendall(bytes([byte]))
            time.sleep(0.01)

    server.faults[5] = trickle
    read_until(source, len(data) - LAG)
    assert source.counters["silent"] == 1
    assert source.counters["lost"] == 0


# -- mistakes ------------------------------------------------------------------------------------


def read_until_told(source, word):
    deadline = time.monotonic() + PATIENCE_S
    while word not in source.trouble:
        assert time.monotonic() < deadline, source.trouble
        assert source.read(20) is None


def test_nobody_listens(serve):
    port = free_port()
    source = SpikeGLXSource(f"spikeglx://127.0.0.1:{port}", "s", naive.Threshold(AP))
    read_until_told(source, "enable SpikeGLX's command server")
    while source.counters["refused"] < 3:
        source.read(10)
    data = naive.recording(9_000, AP)
    server = naive.Server(data, ap=AP, steps=(300,), port=port)
    server.count = 1
    read_until(source, len(data) - LAG)  # it comes up later, and all is well
    assert source.trouble == ""
    assert source._backoff_ns == module.BACKOFF_NS  # should it be lost once more
    source.close()
    server.close()


def test_who_asks_where_nobody_listens_any_more_is_told_so():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        line = line_module.Line(line_module.look_up(*listening.getsockname()))
        assert line.connect(PATIENCE_S * 10**9)
        accepted, _ = listening.accept()
    with accepted, contextlib.suppress(ConnectionResetError):
        naive.reset(accepted)
    line_module.select.select([line.socket], [], [], PATIENCE_S)
    with pytest.raises(line_module.LineError, match="disconnected"):
        line.ask(Question("NOOP"))
    line.close()
    assert line.socket.fileno() < 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a full queue refuses")
def test_nobody_answers(monkeypatch):
    monkeypatch.setattr(line_module, "CONNECT_NS", 50_000_000)
    waits = waits_of(monkeypatch)
    queue = [socket.socket() for _ in range(4)]
    full, *waiting = queue
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    for one in waiting:  # for somebody to accept them
        one.setblocking(False)
        one.connect_ex(full.getsockname())
    source = SpikeGLXSource(
        f"spikeglx://127.0.0.1:{full.getsockname()[1]}", "s", naive.Threshold(AP)
    )
    deadline = time.monotonic() + PATIENCE_S
    while source.counters["unreachable"] < 2:
        assert time.monotonic() < deadline
        assert source.read(5) is None
    assert "nobody answers at that address" in source.trouble
    assert 0 < max(waits) <= 0.005
    for one in (source, *queue):
        one.close()


def test_back_off_grows_and_is_bounded(serve, monkeypatch):
    monkeypatch.setattr(module, "MAX_BACKOFF_NS", 8_000_000)
    port = free_port()
    source = SpikeGLXSource(f"spikeglx://127.0.0.1:{port}", "s", naive.Threshold(AP))
    waits = []
    for _ in range(6):
        refused = source.counters["refused"]
        while source.counters["refused"] == refused:
            source.read(0)
        waits.append(source._backoff_ns)
    assert waits == [2e6, 4e6, 8e6, 8e6, 8e6, 8e6]
    source.close()


def test_no_run_is_going(serve):
    data = naive.recording(9_000, AP)
    source, server, _ = serve(data, running=False, steps=(300,))
    read_until_told(source, "no run is going")
    server.running = True
    got = read_until(source, len(data) - LAG)
    assert got[0].first == 0


def test_no_run_has_ever_been_configured(serve):
    data = naive.recording(9_000, AP)
    source, server, _ = serve(data, steps=(300,))
    server.answers["GETSTREAMSAMPLERATE"] = (
        b"ERROR GETSTREAMSAMPLERATE: Run parameters never validated.\n"
    )
    read_until_told(source, "never validated")
    server.answers.clear()
    server.count = 1
    read_until(source, len(data) - LAG)
    assert source.counters["errors"] >= 1
    assert source.counters["connections"] == 1


def test_a_wrong_number_of_the_probe_is_told_in_one_line(serve):
    source, server, _ = serve(naive.recording(9_000, AP), query="?probe=3")
    server.answers["GETSTREAMSAMPLERATE"] = (
        b"ERROR GETSTREAMSAMPLERATE: imec stream-ip must be in range[0..1].\n"
    )
    with pytest.raises(StreamError, match=r"no probe 3 .*range\[0..1\].*\?probe=N"):
        read_until(source, 1)


def test_a_detector_of_another_probe_is_told_in_one_line(serve):
    source, _, _ = serve(naive.recording(9_000, AP), detector=naive.Threshold(AP + 1))
    with pytest.raises(StreamError, match=f"has {AP} AP channels and the detector is for {AP + 1}"):
        read_until(source, 1)
    source, _, _ = serve(naive.recording(9_000, AP), detector=naive.Threshold(AP, rate=32000.0))
    with pytest.raises(DetectorError, match="has 30000 samples/s and the detector 32000"):
        read_until(source, 1)


def test_a_host_that_nobody_knows():
    with pytest.raises(StreamError, match="nobody knows the host"):
        SpikeGLXSource("spikeglx://no.such.host.invalid:1", "s", naive.Threshold(AP))
    with pytest.raises(ConfigError, match="expected spikeglx://HOST:4142"):
        SpikeGLXSource("spikeglx://h/p", "s", naive.Threshold(AP))


def test_a_name_of_both_kinds_of_address_is_looked_for_where_spikeglx_listens(serve, monkeypatch):
    """``localhost`` is ::1 first on Windows, and SpikeGLX's server listens on an IPv4 address."""
    ask = socket.getaddrinfo

    def both(host, port, *rest, **options):
        found = ask("127.0.0.1", port, *rest, **options)
        six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        return [six, *found] if host == "localhost" else found

    monkeypatch.setattr(line_module.socket, "getaddrinfo", both)
    data = naive.recording(9_000, AP)
    _, server, detector = serve(data, steps=(300,))
    server.count = 1
    source = SpikeGLXSource(f"spikeglx://localhost:{server.port}", "s", detector)
    read_until(source, len(data) - LAG)
    assert source.counters["refused"] == source.counters["unreachable"] == 0
    source.close()


def test_several_sources_take_turns_without_waiting(serve):
    """As several probes are served: wait for any of them, then ask each without waiting."""
    data = naive.recording(9_000, AP)
    made = [serve(data, steps=(300,)) for _ in range(2)]
    sources = [source for source, _, _ in made]
    nobody = SpikeGLXSource(f"spikeglx://127.0.0.1:{free_port()}", "s", naive.Threshold(AP))
    for _, server, _ in made:
        server.count = 1
    got = [[], []]
    wait = waiting_for([*sources, nobody])
    deadline = time.monotonic() + PATIENCE_S
    while not all(one and one[-1].end == len(data) - LAG for one in got):
        assert time.monotonic() < deadline
        wait(5)
        assert nobody.read(0) is None
        for source, batches in zip(sources, got, strict=True):
            batch = source.read(0)
            if batch is not None:
                batches.append(batch)
    for batches in got:
        agree(frames_of(batches)[0], expected(data, [(1, len(data))]))
    assert nobody.counters["refused"] > 0
    nobody.close()


def test_whoever_peeks_loses_nothing(serve):
    data = naive.recording(9_000, AP)
    source, server, _ = serve(data, steps=(300,))
    server.count = 1
    deadline = time.monotonic() + PATIENCE_S
    while not source.peek_spikes(10):
        assert time.monotonic() < deadline
    assert source.peek_spikes(0)
    got = read_until(source, len(data) - LAG)
    agree(frames_of(got)[0], expected(data, [(1, len(data))]))
