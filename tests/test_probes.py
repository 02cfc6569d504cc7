"""Several probes in one serve: each gets what it would get alone."""

import threading
import time

import numpy as np
import pytest

from rt_neds.assemble import assemble
from rt_neds.bundle import build_model, load_spec
from rt_neds.children import free_port
from rt_neds.config import parse_config
from rt_neds.errors import ConfigError
from rt_neds.frames import DecodedFrame
from rt_neds.replay import batches
from rt_neds.serve import serve
from rt_neds.serve_config import ServeConfig, each_probe
from rt_neds.session import load_session
from rt_neds.stream.loop import run_together
from rt_neds.stream.publisher import DecodedListener, Note
from rt_neds.stream.receiver import Announcement
from rt_neds.stream.sender import Sender
from tests.test_loop import ListSink, ListSource

SECONDS = {"imec0": 4, "imec1": 6}


def test_each_probe_has_what_is_said_of_it_and_else_what_is_said_of_all():
    table = {
        "bundle": "b",
        "stale_ms": 100.0,
        "probes": {"imec0": {}, "imec1": {"bundle": "c", "source": "rtneds://there:1"}},
    }
    config = parse_config(table, ServeConfig, "test")
    first, second = each_probe(config)
    assert (first.probe, first.bundle, first.source) == ("imec0", "b", ServeConfig().source)
    assert (second.probe, second.bundle, second.source) == ("imec1", "c", "rtneds://there:1")
    assert first.stale_ms == second.stale_ms == 100.0
    named = parse_config({**table, "probe": "imec1 imec7"}, ServeConfig, "test")
    assert [(one.probe, one.bundle) for one in each_probe(named)] == [
        ("imec1", "c"),
        ("imec7", "b"),
    ]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"bundle": "b"}, r"\(none\); serve needs --probe"),
        ({"bundle": "b", "probe": "a a"}, "each name once"),
        ({"probe": "a b", "probes": {"a": {"bundle": "b"}}}, "probe b has no bundle"),
    ],
)
def test_mistakes_are_told(table, words):
    with pytest.raises(ConfigError, match=words):
        each_probe(parse_config(table, ServeConfig, "test"))


@pytest.fixture(scope="module")
def alone(tiny):
    """Each probe's frames when it is served alone."""
    spec = load_spec(tiny[1] / "bundle")
    model, session = build_model(tiny[1] / "bundle", spec), load_session(tiny[0])
    frames = {}
    for probe, seconds in SECONDS.items():
        source = ListSource(batches(session, 20.0, epoch=1, end=seconds * 30_000))
        sink, config = ListSink(), ServeConfig(probe=probe, bundle="b")
        assemble(config, spec, model, source, sink, None).run(lambda s=source: not s.items)
        frames[probe] = sink.frames
    return frames


def equal(frames, expected):
    assert [f.bin for f in frames] == [f.bin for f in expected]
    for a, b in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(a.values_V, b.values_V)


def test_loops_take_turns_and_do_not_disturb_each_other(tiny, alone):
    spec = load_spec(tiny[1] / "bundle")
    model, session = build_model(tiny[1] / "bundle", spec), load_session(tiny[0])
    sources, sinks, loops = [], [], []
    for probe, seconds in SECONDS.items():
        sources.append(ListSource(batches(session, 20.0, epoch=1, end=seconds * 30_000)))
        sinks.append(ListSink())
        config = ServeConfig(probe=probe, bundle="b")
        loops.append(assemble(config, spec, model, sources[-1], sinks[-1], None))
    stop = lambda: not any(source.items for source in sources)  # noqa: E731
    assert run_together(loops, lambda ms: None, stop) is None
    for probe, sink in zip(SECONDS, sinks, strict=True):
        equal(sink.frames, alone[probe])
        assert {frame.probe for frame in sink.frames} == {probe}
    sources[1].announced = Announcement("tiny", 30_000.0, ("tiny/0",))
    assert run_together(loops, lambda ms: None, lambda: False) == 1


def test_two_probes_over_sockets(tiny, alone):
    session, done = load_session(tiny[0]), threading.Event()
    ports = {probe: free_port() for probe in SECONDS}
    publish = f"tcp://127.0.0.1:{free_port()}"
    senders = {p: Sender(f"tcp://127.0.0.1:{port}", p) for p, port in ports.items()}
    table = {
        "bundle": str(tiny[1] / "bundle"),
        "publish": publish,
        "realtime": False,
        "probes": {p: {"source": f"rtneds://127.0.0.1:{port}"} for p, port in ports.items()},
    }
    config = parse_config(table, ServeConfig, "test")
    listeners = {probe: DecodedListener(publish, probe) for probe in SECONDS}
    serving = threading.Thread(target=serve, args=(config, done.is_set, lambda line: None))
    serving.start()
    try:
        assert all(sender.wait_for_subscriber(10) for sender in senders.values())
        for sender in senders.values():
            sender.announce(epoch=1, rate=3e4, session="tiny", units=session.unit_ids)
        for probe, listener in listeners.items():
            wait_for(listener, lambda m, p=probe: isinstance(m, Note) and m.fields["probe"] == p)
        plans = {
            p: batches(session, 20.0, epoch=1, end=seconds * 30_000)
            for p, seconds in SECONDS.items()
        }
        for _ in range(50 * max(SECONDS.values())):
            for probe, plan in plans.items():
                if (batch := next(plan, None)) is not None:
                    senders[probe].send(batch)
        for probe, listener in listeners.items():
            frames = []
            while len(frames) < len(alone[probe]):
                frames.append(wait_for(listener, lambda m: isinstance(m, DecodedFrame)))
            equal(frames, alone[probe])
    finally:
        done.set()
        serving.join(20)
        for socket in (*senders.values(), *listeners.values()):
            socket.close()
    assert not serving.is_alive()


def wait_for(listener, wanted):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        message = listener.read(100)
        if message is not None and wanted(message):
            return message
    raise AssertionError("nothing came")
