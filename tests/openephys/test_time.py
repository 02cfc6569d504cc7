"""Open Ephys: silence, heartbeats, and how long a read may wait."""

import time

import pytest

import rt_neds.stream.openephys as module
import rt_neds.stream.openephys_heartbeat as heartbeat_module
from rt_neds.stream.openephys import OpenEphysSource
from tests import naive_openephys as naive
from tests.openephys.checking import BLOCK, fed, known


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
