"""The thread of one device: its order, its pulses, and what is left at the end."""

import time
from types import SimpleNamespace

import pytest

from rt_neds import actuators as actuators_module
from rt_neds.actuators import COUNTS, WAITING, Hand
from rt_neds.devices import NoAnswerError, UnansweredError
from tests.actuators.checking import WAIT_S, until


class Line:
    """A device without a rig."""

    def __init__(self, pulse_s=0.05):
        self.pulse_s, self.done, self.kept, self.closed = pulse_s, 0, 0, False

    def on(self, until_ns):
        self.done += 1

    def off(self):
        pass

    def keep(self):
        self.kept += 1

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


@pytest.mark.parametrize(("error", "tried"), [(NoAnswerError, 3), (UnansweredError, 1)])
def test_who_was_not_reached_is_tried_again_and_who_may_yet_do_it_is_not(error, tried):
    device, asked = Line(), []

    def on(until_ns):
        asked.append(until_ns)
        raise error("nobody there")

    device.on = on
    hand, row = hand_of(device)
    for n in range(3):
        hand._act(n, n)
    assert (len(asked), row["failed"]) == (tried, 3)
    hand._put_low()  # whoever was asked is awake, or there
    hand._act(3, 3)
    assert len(asked) == tried + 1


def test_a_device_is_kept_awake_now_and_then(monkeypatch):
    monkeypatch.setattr(actuators_module, "KEEP_S", 0.05)
    device = Line(pulse_s=0.0)
    hand, _ = hand_of(device)
    began = time.monotonic()
    hand.start()
    until(lambda: device.kept >= 3)
    hand.end()
    hand.join(WAIT_S)
    assert device.kept <= (time.monotonic() - began) / 0.05
