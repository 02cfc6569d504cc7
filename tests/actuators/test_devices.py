"""Each device by itself: what it believes, how long its pulses are, whom it asks anew."""

import socket
import time

import pytest

from rt_neds import devices
from rt_neds.children import free_port
from rt_neds.devices import Marker, NoAnswerError, TooLateError, UnansweredError
from tests.actuators.checking import WAIT_S, CommandServer, NetworkEvents, nido, ttl, until


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


def test_a_gui_that_no_longer_acquires_is_not_asked_for_more_pulses(monkeypatch):
    monkeypatch.setattr(devices, "ANSWER_S", WAIT_S)
    server, until_ns = NetworkEvents(), time.monotonic_ns() + round(WAIT_S * 1e9)
    device = ttl(server.address)
    device.on(until_ns)
    server.acquires = False
    device.off()
    with pytest.raises(NoAnswerError, match="does not acquire"):
        device.on(until_ns)
    device.close()
    server.close()


def test_spikeglx_may_be_named_by_an_ipv6_address():
    try:
        silent = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    device = nido(f"[::1]:{silent.getsockname()[1]}")
    with pytest.raises(UnansweredError):  # it was reached
        device.keep()
    device.close()
    silent.close()


def test_an_address_that_is_none_is_told_in_words():
    device = ttl("tcp://127.0.0.1:line1")
    with pytest.raises(NoAnswerError, match="tcp://127.0.0.1:line1: "):
        device.keep()


def test_a_line_that_is_high_stays_so_while_its_device_is_kept_awake(monkeypatch):
    monkeypatch.setattr(devices, "ANSWER_S", WAIT_S)
    server = NetworkEvents()
    device = ttl(server.address)
    device.on(time.monotonic_ns() + round(WAIT_S * 1e9))
    device.keep()
    assert server.heard == ["TTL Line=1 State=1"]
    device.close()
    server.close()


def test_whether_open_ephys_may_do_it_yet_is_known(monkeypatch):
    monkeypatch.setattr(devices, "ANSWER_S", WAIT_S)
    server, until_ns = NetworkEvents(), time.monotonic_ns() + round(WAIT_S * 1e9)
    device = ttl(server.address)
    device.on(until_ns)
    server.held_up.set()
    monkeypatch.setattr(devices, "ANSWER_S", 0.05)
    with pytest.raises(UnansweredError):
        device.on(until_ns)
    device.close()
    server.close()
