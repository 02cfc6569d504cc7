"""What comes too late, or would not be done, is not asked for; lines do not stay high."""

import time

from rt_neds import actuators as actuators_module
from rt_neds.children import free_port
from rt_neds.trigger_config import (
    NidoConfig,
    TtlConfig,
)
from tests.actuators.checking import CommandServer, NetworkEvents, fire, until


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
