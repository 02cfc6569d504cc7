"""Whatever a trigger does is done over the real protocol, and no two rules share a line."""

import socket

import pytest
from msgspec.structs import replace

from rt_neds import actuators as actuators_module
from rt_neds.actuators import WAITING, Actuators, prepare
from rt_neds.bundle import load_spec
from rt_neds.errors import ConfigError
from rt_neds.serve_config import ServeConfig
from rt_neds.trigger_config import (
    NidoConfig,
    TriggerConfig,
    TtlConfig,
    refuse_shared_lines,
    rules_of,
)
from tests.actuators.checking import (
    WAIT_S,
    CommandServer,
    NetworkEvents,
    fire,
    rule,
    until,
)


def test_a_ttl_pulse_is_what_open_ephys_own_client_sends(act):
    server, said = NetworkEvents(), []
    actuators = act(said, ttl=TtlConfig(line=3, to=server.address, pulse_ms=30.0))
    until(lambda: server.heard == ["TTL Line=3 State=0"])  # low, whatever was before
    for n in (1, 2):
        fire(actuators)
        until(lambda n=n: len(server.heard) == 1 + 2 * n)
    assert server.heard[1:] == ["TTL Line=3 State=1", "TTL Line=3 State=0"] * 2
    assert server.at[2] - server.at[1] >= 0.025
    until(lambda: actuators.status("p")["go.ttl"]["done"] == 2)
    status = actuators.status("p")["go.ttl"]
    assert (status["late"], status["failed"], status["dropped"]) == (0, 0, 0)
    assert status["took_ms"] > 0
    assert said == []

    control = pytest.importorskip("open_ephys.control", reason="no open-ephys-python-tools")
    client = control.NetworkControl("127.0.0.1", int(server.address.rsplit(":", 1)[1]))
    client.send_ttl(line=3, state=1)
    client.send_ttl(line=3, state=0)
    assert server.heard[-2:] == server.heard[1:3]
    server.close()


def test_nobody_there_is_counted_said_once_and_made_up_for(act):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    said = []
    actuators = act(said, ttl=TtlConfig(line=7, to=f"tcp://127.0.0.1:{port}"))
    for _ in range(2):
        fire(actuators)
    until(lambda: actuators.status("p")["go.ttl"]["failed"] == 2)
    assert len(said) == 1
    assert said[0].startswith(f"trigger go.ttl: tcp://127.0.0.1:{port} does not answer")
    server = NetworkEvents(port)
    until(lambda: server.heard)  # what could not be put low is put low now
    assert server.heard[0] == "TTL Line=7 State=0"
    until(lambda: len(said) == 2)
    assert said[1] == "trigger go.ttl: answers again"
    fire(actuators)
    until(lambda: actuators.status("p")["go.ttl"]["done"] == 1)
    assert len(said) == 2
    server.close()


def test_the_digital_output_of_spikeglx(act):
    server = CommandServer()
    nido = NidoConfig(lines="Dev6/port0/line0:3", bits=5, to=server.address, pulse_ms=5.0)
    actuators = act(nido=nido)
    until(lambda: len(server.heard) == 1)
    fire(actuators)
    until(lambda: len(server.heard) == 3)
    off = "NIDOSET Dev6/port0/line0:3 0\n"
    assert server.heard == [off, "NIDOSET Dev6/port0/line0:3 5\n", off]
    assert server.connections == 1
    until(lambda: actuators.status("p")["go.nido"]["done"] == 1)
    actuators.end()
    server.shutdown()
    server.server_close()


def test_a_rule_does_all_that_it_names(act):
    events, server = NetworkEvents(), CommandServer()
    actuators = act(
        ttl=TtlConfig(line=1, to=events.address),
        nido=NidoConfig(lines="x", bits=1, to=server.address),
    )
    fire(actuators)
    until(lambda: [of["done"] for of in actuators.status("p").values()] == [1, 1])
    server.close()
    events.close()


def test_spikeglx_refuses_or_is_not_there(act):
    server, said = CommandServer(b"ERROR NIDOSET: no such line\n"), []
    actuators = act(said, nido=NidoConfig(lines="x", bits=1, to=server.address))
    fire(actuators)
    until(lambda: actuators.status("p")["go.nido"]["failed"] == 1)
    assert len(said) == 1
    assert "answers 'ERROR NIDOSET: no such line' to NIDOSET x" in said[0]
    server.shutdown()
    server.server_close()
    gone = []
    actuators = act(gone, nido=NidoConfig(lines="x", bits=1, to=server.address))
    fire(actuators)
    until(lambda: actuators.status("p")["go.nido"]["failed"] == 1)
    assert "is its command server on?" in gone[0]


def test_nothing_that_goes_wrong_ends_a_thread(act):
    def full(line):
        raise OSError("no space left on device")

    server = NetworkEvents()
    actuators = act(full, ttl=TtlConfig(line=1, to="tcp://127.0.0.1:1"))
    fire(actuators)
    until(lambda: actuators.status("p")["go.ttl"]["failed"] == 1)
    actuators._hands[0][1]._device._to = server.address
    until(lambda: server.heard)
    odd = act(nido=NidoConfig(lines="x", bits=1, to="a..b:4142"))  # a name that cannot be encoded
    fire(odd)
    until(lambda: odd.status("p")["go.nido"]["failed"] == 1)
    server.close()


def test_two_rules_do_not_share_a_line():
    def both(**options):
        left, right = ({key: make(n) for key, make in options.items()} for n in (0, 1))
        return rules_of({"p": {"left": rule(**left), "right": rule(**right)}})

    refuse_shared_lines(both(ttl=lambda n: TtlConfig(line=1 + n)))
    refuse_shared_lines(both(nido=lambda n: NidoConfig(lines=f"Dev6/port0/line{n}", bits=1 + n)))
    with pytest.raises(ConfigError, match="trigger right: its ttl has a line of trigger left"):
        refuse_shared_lines(both(ttl=lambda n: TtlConfig(line=1)))
    refuse_shared_lines(both(ttl=lambda n: TtlConfig(line=1, to=f"tcp://rig{n}:5556")))
    refuse_shared_lines(both(nido=lambda n: NidoConfig(lines="x", bits=1, to=f"rig{n}:4142")))
    for ranges in [
        ("Dev6/port0/line0:3", "dev6/port0/line3"),
        ("Dev6/port0", "Dev6/port0/line7"),
        ("Dev6/port0/line3:1", "Dev6/port0/line2"),
        ("Dev6/port0/line9,Dev6/port0/line2", "Dev6/port0/line2"),
    ]:
        with pytest.raises(ConfigError, match="trigger right: its nido has a line of trigger left"):
            refuse_shared_lines(both(nido=lambda n, of=ranges: NidoConfig(lines=of[n], bits=255)))
    NidoConfig(lines="Dev6/port0/line0,something", bits=2)  # who knows
    with pytest.raises(ConfigError, match="trigger right: its nido has a line of trigger left"):
        Actuators(both(nido=lambda n: NidoConfig(lines="stimulator", bits=1)), print)


def test_a_pulse_is_ended_before_the_end(act):
    server = NetworkEvents()
    actuators = act(ttl=TtlConfig(line=1, to=server.address, pulse_ms=10_000.0))
    fire(actuators)
    until(lambda: server.heard[-1:] == ["TTL Line=1 State=1"])
    actuators.end()
    assert server.heard[-1] == "TTL Line=1 State=0"
    server.close()


def test_what_was_handed_over_before_the_end_is_done(monkeypatch):
    monkeypatch.setattr(actuators_module, "END_S", WAIT_S)
    server = NetworkEvents()
    apart = Actuators(
        rules_of({"p": {"go": rule(ttl=TtlConfig(line=1, to=server.address))}}), print
    )
    apart.connect()
    fire(apart)
    apart.run(lambda: True)
    assert apart.status("p")["go.ttl"]["done"] == 1
    server.close()


def test_what_waits_is_bounded_and_handing_over_never_waits(act):
    silent = socket.create_server(("127.0.0.1", 0))  # connects, and never answers
    to = f"127.0.0.1:{silent.getsockname()[1]}"
    actuators = act(nido=NidoConfig(lines="x", bits=1, to=to))
    for _ in range(WAITING + 40):
        fire(actuators)
    assert actuators.status("p")["go.nido"]["dropped"] >= 30

    lines = {name: rule(ttl=TtlConfig(line=n)) for n, name in enumerate(("stay", "go"), 1)}
    apart = Actuators(rules_of({"p": lines}), print)
    apart.connect()  # and nobody at the other end
    for _ in range(100_000):
        fire(apart, rule=1)
        if dropped := apart.status("p")["go.ttl"]["dropped"]:
            break
    assert dropped == 1
    assert apart.status("p")["stay.ttl"]["dropped"] == 0
    silent.close()


def test_each_probe_has_its_own_rules_and_each_rule_its_own_line(tiny):
    server, spec = NetworkEvents(), load_spec(tiny[1] / "bundle")

    def one(probe, name, line, **options):
        does = TriggerConfig(
            when="speed > 1", refractory_ms=50.0, ttl=TtlConfig(line=line, to=server.address)
        )
        return ServeConfig(probe=probe, bundle="b", trigger={name: does}, **options)

    both = [one("p", "a", 1), one("q", "b", 2)]
    triggers, actuators = prepare(both, {"b": spec}, print)
    assert {probe: list(of.status()) for probe, of in triggers.items()} == {"p": ["a"], "q": ["b"]}
    assert [list(actuators.status(probe)) for probe in "pq"] == [["a.ttl"], ["b.ttl"]]
    actuators._rows[0]["took_ns"] = 2_500_000
    assert actuators.status("p")["a.ttl"]["took_ms"] == 2.5
    actuators.start()
    fire(actuators, rule=1)
    until(lambda: actuators.status("q")["b.ttl"]["done"] == 1)
    actuators.end()
    assert actuators.status("p")["a.ttl"]["done"] == 0
    assert "TTL Line=1 State=1" not in server.heard
    server.close()

    session = spec.sessions[0]
    blind = replace(session, id="blind", behaviours=["choice"])
    spec = replace(spec, sessions=[session, blind])
    prepare([one("p", "a", 1)], {"b": spec}, print)  # one of them can answer
    with pytest.raises(ConfigError, match="trigger a: 'speed'"):
        prepare([one("p", "a", 1, session="blind")], {"b": spec}, print)


def test_a_rule_asks_for_what_is_decoded_and_not_for_what_is_shown(tiny):
    spec = load_spec(tiny[1] / "bundle")
    speed, choice = spec.behaviours
    blind = replace(spec.session(), id="blind", behaviours=["choice"])
    spec = replace(
        spec, sessions=[blind, spec.session()], behaviours=[replace(speed, live=True), choice]
    )

    def serve_if(when):
        rules = {"go": TriggerConfig(when=when)}
        prepare(
            [ServeConfig(probe="p", bundle="b", live=["speed"], trigger=rules)], {"b": spec}, print
        )

    serve_if("choice.left > 0.5")  # of the session that can be shown the speed
    with pytest.raises(ConfigError, match="trigger go: 'speed'.*outputs choice.left, choice.right"):
        serve_if("speed > 1")


def test_rules_of_a_probe_share_its_marker_stream(monkeypatch):
    monkeypatch.setattr(actuators_module, "_check_pylsl", lambda rule: None)
    rules = rules_of({"p": {"a": rule(lsl="x"), "b": rule(lsl="y")}, "q": {"c": rule(lsl="z")}})
    a, b, c = (device._stream for _, _, device in Actuators(rules, print)._things)
    assert a is b is not c


def test_markers_are_heard_through_liblsl(act):
    pylsl = pytest.importorskip("pylsl", reason="pylsl is not installed", exc_type=ImportError)
    actuators = act(lsl="go left!")
    found = []

    def find():
        found[:] = pylsl.resolve_byprop("name", "rt-neds-p", timeout=1)
        return found

    until(find)
    inlet = pylsl.StreamInlet(found[0], recover=False)
    inlet.open_stream(timeout=WAIT_S)
    before = pylsl.local_clock()
    fire(actuators)
    sample, stamp = inlet.pull_sample(timeout=WAIT_S)
    assert sample == ["go left!"]
    assert before <= stamp <= pylsl.local_clock()
    assert found[0].type() == "Markers"
    assert found[0].nominal_srate() == pylsl.IRREGULAR_RATE


def test_lsl_without_pylsl_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rules = rules_of({"p": {"go": TriggerConfig(when="a > 1", lsl="x")}})
    with pytest.raises(ConfigError, match=r"trigger go: lsl without pylsl; .*rt-neds\[lsl\]"):
        Actuators(rules, print)
