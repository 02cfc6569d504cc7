"""Whatever a trigger does is done over the real protocol, late or failed acts are counted."""

import socket
import socketserver
import threading
import time
from types import SimpleNamespace

import pytest
import zmq
from msgspec.structs import replace

from rt_neds import actuators as actuators_module
from rt_neds import devices
from rt_neds.actuators import COUNTS, WAITING, Actuators, Hand, prepare
from rt_neds.bundle import load_spec
from rt_neds.children import free_port
from rt_neds.devices import Marker, Nido, NoAnswerError, TooLateError, Ttl, UnansweredError
from rt_neds.errors import ConfigError
from rt_neds.serve_config import ServeConfig
from rt_neds.stream.trigger import HANDED
from rt_neds.trigger_config import (
    NidoConfig,
    TriggerConfig,
    TtlConfig,
    refuse_shared_lines,
    rules_of,
)

WAIT_S = 20.0


def until(true, seconds=WAIT_S):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class NetworkEvents(threading.Thread):
    """Answers as the plugin does."""

    def __init__(self, port=0):
        super().__init__(daemon=True)
        self.heard, self.at, self.done = [], [], threading.Event()
        self.acquires, self.held_up, self.answer = True, threading.Event(), ""
        self.socket = zmq.Context.instance().socket(zmq.REP)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.address = self.socket.get_string(zmq.LAST_ENDPOINT)
        self.start()

    def run(self):
        while not self.done.is_set():
            if self.socket.poll(20):
                text = self.socket.recv().decode()
                while self.held_up.is_set() and not self.done.is_set():
                    time.sleep(0.005)
                if text == "IsAcquiring":
                    self.socket.send_string(str(int(self.acquires)))
                    continue
                self.heard.append(text)
                self.at.append(time.monotonic())
                words = dict(word.split("=") for word in text.split()[1:])
                answer = f"TTLHandled: Line={words['Line']} State={words['State']}"
                self.socket.send_string(self.answer or answer)
        self.socket.close()

    def close(self):
        self.done.set()
        self.join()


class CommandServer(socketserver.ThreadingTCPServer):
    """Answers as SpikeGLX's command server does: a line in, ``OK`` or ``ERROR ...`` out.

    None for an answer hangs up.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, answer=b"OK\n"):
        self.heard, self.connections, self.answer = [], 0, answer
        self.open = []
        super().__init__(("127.0.0.1", 0), CommandHandler)
        self.address = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def hang_up(self):
        for connection in self.open:
            connection.shutdown(socket.SHUT_RDWR)


class CommandHandler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self):
        self.server.connections += 1
        self.server.open.append(self.connection)
        for line in self.rfile:
            self.server.heard.append(line.decode())
            if self.server.answer is None:
                return
            self.wfile.write(self.server.answer[:1])  # in two pieces, as TCP may
            self.wfile.write(self.server.answer[1:])


@pytest.fixture
def act():
    """Start the actuators of one rule; ends them after the test."""
    running = []

    def act(said=None, **options):
        say = said if callable(said) else (said if said is not None else []).append
        actuators = Actuators(rules_of({"p": {"go": rule(**options)}}), say)
        actuators.start()
        running.append(actuators)
        return actuators

    yield act
    for actuators in running:
        actuators.end()


def rule(**options):
    return TriggerConfig(when="a > 1", refractory_ms=10_000.0, **options)


def fire(actuators, rule=0, left_s=WAIT_S):
    now = time.monotonic_ns()
    actuators.hand_over(HANDED.pack(rule, now, now + round(left_s * 1e9)))


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


def ttl(to, pulse_ms=50.0):
    return Ttl(TtlConfig(line=1, to=to, pulse_ms=pulse_ms))


def nido(to, pulse_ms=10.0):
    return Nido(NidoConfig(lines="x", bits=1, to=to, pulse_ms=pulse_ms))


class Outlet:
    """A marker stream on which nobody needs LSL."""

    def __init__(self):
        self.heard = []

    def outlet(self):
        return self

    def push_sample(self, texts):
        self.heard += texts

    def close(self):
        pass


@pytest.mark.parametrize("make", [ttl, nido, Marker])
def test_no_device_does_anything_that_is_too_late(make):
    server = {ttl: NetworkEvents, nido: CommandServer, Marker: Outlet}[make]()
    device = Marker(server, "go") if make is Marker else make(server.address)
    with pytest.raises(TooLateError):
        device.on(time.monotonic_ns() - 1)
    assert server.heard == []
    device.on(time.monotonic_ns() + round(WAIT_S * 1e9))
    until(lambda: len(server.heard) == 1)
    device.close()
    server.close()


def test_a_pulse_is_as_long_as_it_was_told_to_be():
    assert ttl("tcp://127.0.0.1:1", pulse_ms=5.0).pulse_s == 0.005
    assert nido("127.0.0.1:1", pulse_ms=5.0).pulse_s == 0.005


@pytest.mark.parametrize(
    ("answer", "answer_s", "error", "words"),
    [
        (b"", 0.05, UnansweredError, "does not answer"),
        (None, WAIT_S, UnansweredError, "closed the connection"),
        (b"x" * 2000, WAIT_S, NoAnswerError, "answers 'xxx"),
    ],
    ids=["silent", "hangs up", "never ends"],
)
def test_whether_spikeglx_may_have_done_it_is_known(monkeypatch, answer, answer_s, error, words):
    monkeypatch.setattr(devices, "ANSWER_S", answer_s)
    server = CommandServer(answer)
    device = nido(server.address)
    with pytest.raises(NoAnswerError, match=words) as told:
        device.on(time.monotonic_ns() + round(WAIT_S * 1e9))
    assert told.type is error
    device.close()
    server.close()


@pytest.mark.parametrize("make", [ttl, nido])
def test_who_is_not_there_is_asked_nothing_that_could_be_done_later(monkeypatch, make):
    monkeypatch.setattr(devices, "ANSWER_S", 0.02)
    address = f"127.0.0.1:{free_port()}"
    device = make(f"tcp://{address}" if make is ttl else address)
    with pytest.raises(NoAnswerError) as told:
        device.on(time.monotonic_ns() + round(WAIT_S * 1e9))
    assert told.type is NoAnswerError
    device.close()


@pytest.mark.parametrize("acquires", [0, 2])
def test_who_is_reached_anew_is_asked_anew_whether_it_acquires(monkeypatch, acquires):
    monkeypatch.setattr(devices, "ANSWER_S", WAIT_S)
    server, until_ns = NetworkEvents(), time.monotonic_ns() + round(WAIT_S * 1e9)
    device = ttl(server.address)
    device.on(until_ns)
    device.close()  # as after anything that went wrong
    server.acquires = acquires
    with pytest.raises(NoAnswerError, match="does not acquire"):
        device.on(until_ns)
    assert server.heard == ["TTL Line=1 State=1"]
    device.close()
    server.close()


def test_a_connection_to_spikeglx_is_kept_from_falling_asleep():
    server = CommandServer()
    device = nido(server.address)
    device.keep()
    assert server.heard == ["NOOP\n"]
    device.close()
    server.close()


def test_what_comes_too_late_is_not_done(act):
    server = NetworkEvents()
    actuators = act(ttl=TtlConfig(line=1, to=server.address))
    fire(actuators, left_s=-0.001)
    until(lambda: actuators.status("p")["go.ttl"]["late"] == 1)
    fire(actuators)
    until(lambda: actuators.status("p")["go.ttl"]["done"] == 1)
    assert server.heard.count("TTL Line=1 State=1") == 1
    server.close()


def test_who_can_be_reached_only_when_it_is_too_late_is_not_asked(act):
    port = free_port()
    actuators = act(ttl=TtlConfig(line=1, to=f"tcp://127.0.0.1:{port}"))
    until(lambda: actuators._hands[0][1]._in_trouble)  # the first attempt to put it low is over
    fire(actuators, left_s=0.03)
    time.sleep(0.06)
    server = NetworkEvents(port)
    until(lambda: server.heard)
    time.sleep(0.3)
    assert server.heard == ["TTL Line=1 State=0"]
    status = actuators.status("p")["go.ttl"]
    assert (status["done"], status["late"] + status["failed"]) == (0, 1)
    server.close()


def test_who_is_held_up_does_one_thing_late_and_puts_the_line_low_at_once(act):
    server = NetworkEvents()
    actuators = act(ttl=TtlConfig(line=1, to=server.address, pulse_ms=10.0))
    until(lambda: actuators._hands[0][1]._device._acquires)  # nor is it asked that any more
    server.held_up.set()  # as a dialog or an open menu does with the GUI
    for n in range(6):
        fire(actuators)
        until(lambda n=n: actuators.status("p")["go.ttl"]["failed"] == n + 1)
    time.sleep(1.5)
    server.held_up.clear()
    until(lambda: "TTL Line=1 State=1" in server.heard)
    until(lambda: server.heard[-1] == "TTL Line=1 State=0")
    assert server.heard.count("TTL Line=1 State=1") == 1
    up = server.heard.index("TTL Line=1 State=1")
    assert server.at[up + 1] - server.at[up] < 0.1  # it waited there already
    until(lambda: not actuators._hands[0][1]._unsure)
    fire(actuators)
    until(lambda: actuators.status("p")["go.ttl"]["done"] == 1)
    server.close()


def test_what_a_gui_that_does_not_acquire_would_not_do_is_not_done(act, monkeypatch):
    monkeypatch.setattr(actuators_module, "KEEP_S", 0.1)
    server, said = NetworkEvents(), []
    server.acquires = False
    actuators = act(said, ttl=TtlConfig(line=1, to=server.address))
    until(lambda: server.heard)
    fire(actuators)
    until(lambda: actuators.status("p")["go.ttl"]["failed"] == 1)
    assert "does not acquire" in said[0]
    assert "TTL Line=1 State=1" not in server.heard
    until(lambda: len(said) == 2)
    n = len(server.heard)
    server.acquires = True
    until(lambda: len(server.heard) == n + 1)  # what was not put low then is put low now
    assert server.heard[-1] == "TTL Line=1 State=0"
    fire(actuators)
    until(lambda: actuators.status("p")["go.ttl"]["done"] == 1)
    server.close()


def test_a_plugin_that_does_something_else_is_not_believed(act):
    server, said = NetworkEvents(), []
    server.answer = "TTLHandled: Channel=1 on=0"
    actuators = act(said, ttl=TtlConfig(line=3, to=server.address))
    fire(actuators)
    until(lambda: actuators.status("p")["go.ttl"]["failed"] == 1)
    assert "0.2.1 or newer" in said[0]
    server.close()


def test_a_firing_while_the_line_is_high_is_counted_as_none(act):
    server = NetworkEvents()
    actuators = act(ttl=TtlConfig(line=1, to=server.address, pulse_ms=300.0))
    fire(actuators)
    until(lambda: actuators.status("p")["go.ttl"]["done"] == 1)
    fire(actuators)
    until(lambda: actuators.status("p")["go.ttl"]["dropped"] == 1)
    until(lambda: server.heard[-1] == "TTL Line=1 State=0")
    assert server.heard.count("TTL Line=1 State=1") == 1
    server.close()


def test_a_connection_that_spikeglx_closed_costs_no_pulse(act):
    server = CommandServer()
    nido = NidoConfig(lines="Dev6/port0/line0", bits=1, to=server.address, pulse_ms=5.0)
    actuators = act(nido=nido)
    until(lambda: len(server.heard) == 1)
    server.hang_up()
    time.sleep(0.1)
    fire(actuators)
    until(lambda: actuators.status("p")["go.nido"]["done"] == 1)
    assert actuators.status("p")["go.nido"]["failed"] == 0
    assert server.connections == 2
    server.shutdown()
    server.server_close()


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


class Line:
    """A device without a rig."""

    def __init__(self, pulse_s=0.05):
        self.pulse_s, self.done, self.closed = pulse_s, 0, False

    def on(self, until_ns):
        self.done += 1

    def off(self):
        pass

    def close(self):
        self.closed = True


def hand_of(device):
    row = dict.fromkeys((*COUNTS, "took_ns"), 0)
    return Hand("go", device, row, print), row


def test_a_pulse_lasts_as_long_as_the_device_says(monkeypatch):
    monkeypatch.setattr(actuators_module, "time", SimpleNamespace(monotonic=lambda: 100.0))
    hand, row = hand_of(Line(pulse_s=0.05))
    hand._put_low()
    assert hand._off_at == float("inf")
    hand._act(0, 0)
    assert hand._off_at == 100.05
    assert (row["done"], row["took_ns"] > 0) == (1, True)


def test_what_is_answered_only_when_it_is_too_late_is_overdue(monkeypatch):
    monkeypatch.setattr(actuators_module, "monotonic_ns", lambda: 100)
    hand, row = hand_of(Line(pulse_s=0.0))
    for until_ns in (101, 100, 99):
        hand._act(0, until_ns)
    assert (row["done"], row["overdue"]) == (3, 1)


def test_what_waits_is_done_in_its_order_and_what_does_not_fit_is_counted():
    hand, row = hand_of(Line())
    for n in range(WAITING + 3):
        hand.give(n, n)
    assert row["dropped"] == 3
    assert [hand._wait(0.0) for _ in range(WAITING)] == [(n, n) for n in range(WAITING)]
    assert hand._wait(0.0) is None


def test_what_is_given_while_a_line_is_put_low_is_done_before_the_end():
    device = Line(pulse_s=0.0)
    hand, row = hand_of(device)

    def off():
        if not device.done:
            hand.give(0, 0)
            hand.give(0, 0)
            hand.end()

    device.off = off
    hand.start()
    hand.join(WAIT_S)
    assert (row["done"], device.done, device.closed) == (2, 2, True)


def test_what_waits_is_bounded_and_handing_over_never_waits(act):
    silent = socket.create_server(("127.0.0.1", 0))  # connects, and never answers
    to = f"127.0.0.1:{silent.getsockname()[1]}"
    actuators = act(nido=NidoConfig(lines="x", bits=1, to=to))
    for _ in range(WAITING + 40):
        fire(actuators)
    assert actuators.status("p")["go.nido"]["dropped"] >= 30

    rules = rules_of({"p": {"go": rule(ttl=TtlConfig(line=1))}})
    apart = Actuators(rules, print)
    apart.connect()  # and nobody at the other end
    for _ in range(100_000):
        fire(apart)
        if dropped := apart.status("p")["go.ttl"]["dropped"]:
            break
    assert dropped == 1
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
