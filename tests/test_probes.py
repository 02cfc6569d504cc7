"""Several probes in one serve: each gets what it would get alone."""

import threading
import time
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from rt_neds.assemble import assemble
from rt_neds.bundle import build_model, load_spec
from rt_neds.children import free_port
from rt_neds.cli import main
from rt_neds.config import parse_config
from rt_neds.drift import Expectation
from rt_neds.errors import ConfigError
from rt_neds.frames import BinnedFrame, DecodedFrame, Flag
from rt_neds.replay import batches
from rt_neds.serve import serve
from rt_neds.serve_config import ServeConfig, each_probe, refuse_overruled
from rt_neds.session import load_session
from rt_neds.stream.decoder import Decoder, decode_together, make_step
from rt_neds.stream.fused import FusedStep
from rt_neds.stream.loop import calls_of, run_together
from rt_neds.stream.publisher import DecodedListener, Note
from rt_neds.stream.receiver import Announcement
from rt_neds.stream.sender import Sender
from rt_neds.stream.validity import Validity
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
        (
            {"bundle": "b", "probe": "imec7", "probes": {"imec0": {}, "imec1": {}}},
            "probes imec7 with tables of imec0, imec1 alone",
        ),
    ],
)
def test_mistakes_are_told(table, words):
    with pytest.raises(ConfigError, match=words):
        each_probe(parse_config(table, ServeConfig, "test"))


def test_an_option_that_a_table_overrules_is_refused(tmp_path, capsys):
    (tmp_path / "rig.toml").write_text('bundle = "b"\n[probes.imec0]\nsource = "rtneds://a:1"\n')
    argv = ["serve", "--config", str(tmp_path / "rig.toml"), "--source", "rtneds://a:2"]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "--source rtneds://a:2 with probes.imec0.source = rtneds://a:1" in told


def test_only_what_says_something_else_is_said_in_vain():
    tables = {"a": {"source": "rtneds://a:1"}, "b": {"source": "rtneds://b:1"}, "c": {}}

    def refuse(probe, source):
        given = {"probe": probe, "source": source}
        table = {"bundle": "b", "probes": tables, **given}
        refuse_overruled(parse_config(table, ServeConfig, "test"), given)

    refuse("a", "rtneds://a:1")
    refuse("a b c", "rtneds://c:1")  # which is of c
    with pytest.raises(ConfigError, match="with probes.b.source = rtneds://b:1, which goes before"):
        refuse("a b", "rtneds://a:1")


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


def counting_calls(monkeypatch):
    """How many streams went through each call of the network that took several."""
    calls, together = [], FusedStep.together

    def spy(steps, *args):
        calls.append(len(steps))
        return together(steps, *args)

    monkeypatch.setattr(FusedStep, "together", staticmethod(spy))
    return calls


def test_loops_take_turns_and_do_not_disturb_each_other(tiny, alone, monkeypatch):
    calls = counting_calls(monkeypatch)
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
    assert calls == [2] * len(alone["imec0"])  # one bundle, so one call for the bins of both
    sources[1].announced = Announcement("tiny", 30_000.0, ("tiny/0",))
    assert run_together(loops, lambda ms: None, lambda: False) == 1


@pytest.mark.parametrize("probes", [["imec0"], ["imec0", "imec1"]])
def test_bins_that_wait_for_each_other_come_out_when_told_to_stop(tiny, monkeypatch, probes):
    monkeypatch.setattr(Validity, "lateness", lambda *_: int(Flag.LATE))  # always behind the clock
    spec = load_spec(tiny[1] / "bundle")
    model, session = build_model(tiny[1] / "bundle", spec), load_session(tiny[0])
    sources, sinks, loops = [], [], []
    for probe in probes:
        sources.append(ListSource(batches(session, 20.0, epoch=1, end=30_000)))
        sinks.append(ListSink())
        config = ServeConfig(probe=probe, bundle="b")
        loops.append(assemble(config, spec, model, sources[-1], sinks[-1], None))
    stop = lambda: not any(source.items for source in sources)  # noqa: E731
    run_together(loops, lambda ms: None, stop)
    for sink in sinks:
        assert [f.bin for f in sink.frames] == list(range(50))


def test_probes_of_other_weights_are_decoded_by_themselves(tiny, alone, monkeypatch):
    calls = counting_calls(monkeypatch)
    spec, session = load_spec(tiny[1] / "bundle"), load_session(tiny[0])
    models = [build_model(tiny[1] / "bundle", spec) for _ in range(3)]
    with torch.no_grad():
        models[1].layers[0].widen.bias[0] += 0.125
    loops, sinks, sources = [], [], []
    for model in models:
        sources.append(ListSource(batches(session, 20.0, epoch=1, end=4 * 30_000)))
        sinks.append(ListSink())
        config = ServeConfig(probe="imec0", bundle="b")
        loops.append(assemble(config, spec, model, sources[-1], sinks[-1], None))
    stop = lambda: not any(source.items for source in sources)  # noqa: E731
    assert run_together(loops, lambda ms: None, stop) is None
    assert set(calls) == {2}  # the first and the third
    for sink in (sinks[0], sinks[2]):
        equal(sink.frames, alone["imec0"])
    assert any(
        (a.values_V != b.values_V).any()
        for a, b in zip(sinks[0].frames, sinks[1].frames, strict=True)
    )


def test_a_unit_that_falls_silent_in_between_is_missed_from_its_bin_on(tiny):
    spec = load_spec(tiny[1] / "bundle")
    model, session = build_model(tiny[1] / "bundle", spec), spec.session()
    units = len(session.units)
    silent_N = np.arange(units) == 2
    usual = Expectation(
        rates=[1.0] * units, surprise=[0.0] * units, sd=[1.0] * units, bits_per_spike=0.0,
        seconds=0.2,
    )  # fmt: skip
    session = msgspec.structs.replace(session, expectation=usual)

    def frames(seed, fell_at):
        rng = np.random.default_rng(seed)
        for t in range(40):
            counts_N = rng.poisson(1.0, units).astype(np.float32)
            counts_N[2] = 0
            of = {"epoch": 1, "bin": t, "end": 600 * (t + 1), "counts_N": counts_N}
            yield BinnedFrame(
                **of, spikes=0, late=0, unknown=0, lost=0, observed=True, first_of_run=t == 0,
                sent_ns=0, received_ns=0, binned_ns=0, silent_N=silent_N if t >= fell_at else None,
            )  # fmt: skip

    def decoder():
        none_N = np.zeros(units, bool)
        return Decoder(spec, session, make_step(model, spec, session, none_N), none_N)

    streams = [list(frames(0, 13)), list(frames(1, 99))]
    alone, pair, expected = [decoder(), decoder()], [decoder(), decoder()], []
    for one, of in zip(alone, streams, strict=True):
        expected.append([])
        for f in of:
            expected[-1].append(one.decode(f).copy())
            one.look_back([f])
    assert pair[0].share(pair[1])
    for t in range(0, 40, 4):
        values = decode_together(pair, [of[t : t + 4] for of in streams])
        for got_TV, want in zip(values, expected, strict=True):
            np.testing.assert_array_equal(got_TV, want[t : t + 4])
        for one, of in zip(pair, streams, strict=True):
            one.look_back(of[t : t + 4])
    told = [one.drift() for one in pair]
    assert told == [one.drift() for one in alone]
    assert None not in [of["surprise"] for of in told]


@pytest.mark.parametrize(
    ("closed", "packed"),
    [([1] * 10, [8, 2]), ([8, 8], [8, 8]), ([3, 6, 1], [3, 7]), ([], [])],
)
def test_no_call_takes_more_bins_than_it_may(closed, packed):
    loops = [SimpleNamespace(_closed=[None] * bins) for bins in closed]
    calls = list(calls_of(loops))
    assert [sum(len(loop._closed) for loop in call) for call in calls] == packed
    assert [loop for call in calls for loop in call] == loops


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
