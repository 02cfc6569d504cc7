"""Runs of SpikeGLX that end, begin and stall: told apart, and nothing of one in another."""

import time

import pytest

import rt_neds.stream.acquisitions as acquisitions
import rt_neds.stream.spikeglx as module
from rt_neds.stream.spikeglx import SpikeGLXSource
from tests import naive_spikeglx as naive
from tests.spikeglx.checking import (
    AP,
    LAG,
    PATIENCE_S,
    WIDTH,
    agree,
    expected,
    frames_of,
    read_until,
    read_until_told,
)


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


def ticks(samples):
    def on(server):
        server.count += samples

    return on


def begins_anew(server):
    server.count = 1


def stops(server):
    server.running, server.count = False, 0


BETWEEN = {  # what happens between two processes; is it the same run, and is all of it read?
    "nothing": (ticks(0), True, True),
    "a tenth of a second": (ticks(3_000), True, True),
    "more samples than are held": (ticks(8_000), True, False),
    "another run": (begins_anew, False, False),
    "the end of the run": (stops, False, False),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_whoever_takes_a_place_reads_on_where_the_other_was(serve, monkeypatch, what):
    monkeypatch.setattr(acquisitions, "TOLD_NS", 0)
    monkeypatch.setattr(acquisitions, "SAME_S", 0.05)  # these runs are short
    happens, same, whole = BETWEEN[what]
    data, settle = naive.recording(90_000, AP), 90
    detector = naive.Threshold(AP, lag=LAG, settle=settle)
    first, server, _ = serve(data, steps=(300,), ring=5_000, detector=detector)
    server.count = 1
    before = read_until(first, 45_000)
    bins, epoch = frames_of(before)[0], before[-1].epoch
    first.close()
    happens(server)
    end = (bins[-1][0] + 1) * WIDTH
    second = SpikeGLXSource(
        f"spikeglx://127.0.0.1:{server.port}", "s", detector, first._acquisitions,
        lambda of: end if of == epoch else None,
    )  # fmt: skip
    try:
        if not server.running:
            read_until_told(second, "no run is going")
            server.running = True
        after = read_until(second, len(data) - LAG)
    finally:
        second.close()
    assert {batch.epoch for batch in after} == {after[0].epoch}
    assert (after[0].epoch == epoch) == same
    assert (after[0].first == end) == whole
    if whole:
        agree([*bins, *frames_of(after)[0]], expected(data, [(1, len(data))], settle=settle))
    assert (second.counters["epochs"], second.counters["lost"]) == (1, 0)
