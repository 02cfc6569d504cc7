"""Behind the clock bins wait for each other, and for nothing else."""

import numpy as np
import pytest

from rt_neds.assemble import assemble
from rt_neds.bundle import build_model, load_spec
from rt_neds.frames import Flag
from rt_neds.serve_config import ServeConfig
from rt_neds.stream.loop import TOGETHER_MS, WAIT_MS, run_together
from rt_neds.stream.receiver import Announcement
from rt_neds.stream.validity import Validity
from tests.test_loop import RATE, ListSink, ListSource, silence


@pytest.fixture
def make(tiny):
    """A loop, its source and its sink."""
    spec = load_spec(tiny[1] / "bundle")
    model = build_model(tiny[1] / "bundle", spec)

    def make(items):
        source, sink = ListSource(items), ListSink()
        config = ServeConfig(probe="p", bundle="b")
        return assemble(config, spec, model, source, sink, None), source, sink

    return make


@pytest.fixture
def late(monkeypatch):
    """Whether bins come out late, from the next on."""
    now = [Flag.LATE]
    monkeypatch.setattr(Validity, "lateness", lambda *_: int(now[0]))
    return now


def bins(sink):
    return [(f.epoch, f.bin) for f in sink.frames]


def test_no_bin_waits_for_the_source(make, late, monkeypatch):
    waits, read = [], ListSource.read

    def noted(self, timeout_ms):
        waits.append(timeout_ms)
        return read(self, timeout_ms)

    monkeypatch.setattr(ListSource, "read", noted)
    loop, source, _ = make(silence(0, 3))
    loop.run(lambda: not source.items)
    assert waits == [WAIT_MS, WAIT_MS, 0]


def test_no_bin_of_several_probes_waits_for_the_sources(make, late):
    (one, source, sink), (other, _, _), waits = make(silence(0, 3)), make([]), []
    run_together([one, other], waits.append, lambda: not source.items)
    assert waits == [TOGETHER_MS, TOGETHER_MS, 0]
    assert bins(sink) == [(1, k) for k in range(3)]


def test_bins_come_out_once_nothing_more_is_to_be_read(make, late):
    loop, _, sink = make(silence(0, 5))
    for _ in range(5):
        loop.turn(0)
    assert bins(sink) == [(1, 0)]
    loop.turn(0)
    assert bins(sink) == [(1, k) for k in range(5)]


def test_bins_come_out_before_the_source_is_another(make, late):
    loop, source, sink = make(silence(0, 5))
    for _ in range(5):
        loop.turn(0)
    source.announced = Announcement("tiny", RATE, ("tiny/0",))
    assert not loop.turn(0)
    assert bins(sink) == [(1, k) for k in range(5)]


def test_a_run_that_begins_while_behind_begins_anew(make, late):
    loop, source, sink = make([*silence(0, 21), *silence(0, 21, epoch=2)])
    loop.run(lambda: not source.items)
    assert bins(sink) == [(epoch, k) for epoch in (1, 2) for k in range(21)]
    for a, b in zip(sink.frames[:21], sink.frames[21:], strict=True):
        np.testing.assert_array_equal(a.values_V, b.values_V)


def test_who_has_caught_up_does_not_wait_any_more(make, late):
    loop, _, sink = make(silence(0, 30))
    for _ in range(12):
        loop.turn(0)
    late[0] = Flag(0)
    for _ in range(10):
        loop.turn(0)
    for read in range(22, 30):
        loop.turn(0)
        assert len(sink.frames) == read + 1
