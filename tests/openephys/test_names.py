"""Open Ephys: which electrodes are units, and which of several streams is ours."""

import time

import numpy as np
import pytest

from rt_neds.assemble import open_source, unit_map
from rt_neds.bundle import load_spec
from rt_neds.errors import StreamError
from rt_neds.serve_config import ServeConfig
from rt_neds.stream.openephys import UNKNOWN, OpenEphysSource
from rt_neds.stream.watermark import TAIL
from tests import naive_openephys as naive
from tests.openephys.checking import BLOCK, accounted, fed, known


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
