"""The connection to SpikeGLX: no wait is long, mistakes are told, several take turns."""

import contextlib
import itertools
import socket
import sys
import time

import pytest

import rt_neds.stream.spikeglx as module
import rt_neds.stream.spikeglx_line as line_module
from rt_neds.children import free_port
from rt_neds.errors import ConfigError, DetectorError, StreamError
from rt_neds.spikeglx_wire import Question
from rt_neds.stream.receiver import waiting_for
from rt_neds.stream.spikeglx import SpikeGLXSource
from tests import naive_spikeglx as naive
from tests.spikeglx.checking import (
    AP,
    LAG,
    PATIENCE_S,
    agree,
    expected,
    frames_of,
    read_until,
    read_until_told,
)


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
