"""SpikeGLX over real sockets: bins are what was sent, reports are what was injected."""

import time

import numpy as np
import pytest

import rt_neds.stream.spikeglx_line as line_module
from rt_neds.spikeglx_wire import LINK_ERRORS, MISSED
from tests import naive_spikeglx as naive
from tests.spikeglx.checking import (
    AP,
    LAG,
    PATIENCE_S,
    RATE,
    agree,
    expected,
    frames_of,
    read_until,
    read_until_told,
)

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
