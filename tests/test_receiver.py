"""Each message of the native stream is counted once, and one absurd number does not stop it."""

import numpy as np
import pytest
import zmq

from rt_neds.errors import WireError
from rt_neds.frames import SPIKE_DTYPE, SpikeBatch
from rt_neds.stream.live import LiveBehaviours
from rt_neds.stream.receiver import Announcement, Receiver
from rt_neds.wire import (
    LEAP_MESSAGES,
    MAX_MESSAGE_S,
    MAX_SPIKES,
    BehaviourBatch,
    TaskEvent,
    pack_behaviour,
    pack_event,
    pack_source,
    pack_spikes,
    unpack_spikes,
)

RATE, MS = 30_000, 30


@pytest.fixture
def receiver():
    one = Receiver("tcp://127.0.0.1:9", "p")  # nobody is there: messages are given by hand
    yield one
    one.close()


@pytest.fixture
def observing():
    one = Receiver("tcp://127.0.0.1:9", "p", LiveBehaviours({"choice": ("left", "right"), "x": ()}))
    yield one
    one.close()


def observed(first, value, epoch=1):
    """A state of the task and a value, from one sample on."""
    batch = BehaviourBatch("x", epoch, 0, first, 1000.0, np.array([value], np.float32))
    return [pack_event("p", TaskEvent(epoch, first, "choice", "right")), pack_behaviour(batch)]


def message(seq, first, *, epoch=1, length=MS):
    return pack_spikes(
        "p", SpikeBatch(epoch, seq, first, first + length, RATE, 1, 0, np.zeros(1, SPIKE_DTYPE))
    )


class Waiting:
    """A socket on which messages lie already."""

    def __init__(self, messages):
        self.messages = messages

    def set(self, option, value):
        pass

    def recv_multipart(self):
        if not self.messages:
            raise zmq.Again
        return self.messages.pop(0)

    def close(self):
        pass


def came(receiver, *messages):
    """The ``(seq, lost)`` of what comes out."""
    out = []
    for frames in messages:
        receiver.take(frames, 2)
        while (batch := receiver.read(0)) is not None:
            out.append((batch.seq, batch.lost))
    return out


def counts(receiver, *names):
    return tuple(receiver.counters[name] for name in names)


FAR = 3600 * RATE


@pytest.mark.parametrize(
    "absurd", [message(1 << 62, 30), message(1, FAR), message(1 << 62, 1 << 49), message(9, FAR)]
)
def test_a_leap_that_the_next_message_contradicts_is_skipped(receiver, absurd):
    stream = [message(n, n * MS) for n in range(5)]
    assert came(receiver, stream[0], absurd, *stream[1:]) == [(n, 0) for n in range(5)]
    assert counts(receiver, "messages", "malformed", "lost", "repeated") == (5, 1, 0, 0)


def test_a_leap_that_the_next_message_agrees_with_is_believed_and_nothing_of_it_is_lost(receiver):
    pause = [message(1, FAR), message(2, FAR + MS), message(3, FAR + 2 * MS)]
    assert came(receiver, message(0, 0), *pause) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    away = LEAP_MESSAGES * 2
    outage = [message(away, 2 * FAR), message(away + 2, 2 * FAR + 2 * MS)]
    assert came(receiver, *outage) == [(away, away - 4), (away + 2, 1)]
    assert counts(receiver, "messages", "malformed", "lost") == (6, 0, away - 3)


def test_a_repetition_says_nothing_of_a_leap(receiver):
    leap = message(1, FAR)
    got = came(receiver, message(0, 0), leap, message(0, 0), leap, message(2, FAR + MS))
    assert got == [(0, 0), (1, 0), (2, 0)]
    assert counts(receiver, "messages", "repeated", "malformed") == (5, 2, 0)


def test_another_epoch_is_no_leap_near_its_beginning(receiver):
    assert came(receiver, message(7, 5 * MS), message(3, MS, epoch=2)) == [(7, 0), (3, 0)]
    assert counts(receiver, "epochs", "lost") == (2, 0)


def test_a_run_that_is_joined_late_is_believed_once_two_messages_agree(receiver):
    joined = [message(1 << 40, FAR), message((1 << 40) + 2, FAR + 2 * MS)]
    assert came(receiver, *joined) == [(1 << 40, 0), ((1 << 40) + 2, 1)]
    assert counts(receiver, "epochs", "messages", "lost", "malformed") == (1, 2, 1, 0)


@pytest.mark.parametrize("absurd", [message(1 << 40, 0), message(0, 10**13)])
def test_one_absurd_number_at_the_very_beginning_is_skipped(receiver, absurd):
    stream = [message(n, n * MS) for n in range(5)]
    assert came(receiver, absurd, *stream) == [(n, 0) for n in range(5)]
    assert counts(receiver, "messages", "malformed", "lost", "epochs") == (5, 1, 0, 1)


def test_one_absurd_epoch_does_not_end_the_run(receiver):
    stream = [message(LEAP_MESSAGES + n, FAR + n * MS) for n in range(1, 6)]
    absurd = message(LEAP_MESSAGES + 4, FAR + 4 * MS, epoch=77)
    got = came(receiver, *stream[:3], absurd, *stream[3:])
    assert [seq for seq, _ in got] == [LEAP_MESSAGES + n for n in range(1, 6)]
    assert counts(receiver, "epochs", "malformed", "lost") == (1, 1, 0)


def test_spikes_that_came_with_another_announcement_wait_for_the_next_read(receiver):
    def source(*units):
        return pack_source("p", epoch=1, rate=RATE, session="s", units=units)

    sent = [source("a", "b"), message(0, 0), source("b", "a"), message(1, MS)]
    receiver.socket = Waiting(sent)
    assert receiver.read(0) is None
    assert receiver.announced.units == ("a", "b")
    assert receiver.read(0).seq == 0
    assert receiver.read(0) is None
    assert receiver.announced.units == ("b", "a")
    assert receiver.read(0).seq == 1


def test_a_topic_that_ours_begins_is_somebody_elses(receiver):
    for frames in (pack_spikes("p0", SpikeBatch(1, 0, 0, MS, RATE, 1, 0, np.zeros(1, SPIKE_DTYPE))),
                   pack_source("p0", epoch=1, rate=RATE, session="s", units=["x"])):  # fmt: skip
        assert came(receiver, frames) == []
    assert receiver.announced is None
    assert counts(receiver, "malformed", "others") == (0, 2)


def test_spikes_of_a_sender_that_says_nothing_say_their_rate(receiver):
    receiver.assume(Announcement("s", RATE, ("a", "b")))
    empty = np.zeros(0, SPIKE_DTYPE)
    receiver.take(pack_spikes("p", SpikeBatch(1, 0, 0, 20, 20_000.0, 1, 0, empty)), 2)
    assert receiver.announced == Announcement("s", 20_000.0, ("a", "b"))
    assert receiver.read(0).seq == 0
    receiver.assume(receiver.announced)
    receiver.take(pack_spikes("p", SpikeBatch(2, 0, 0, 25, 25_000.0, 1, 0, empty)), 2)
    assert receiver.announced.rate == 25_000.0


def test_spikes_at_another_rate_than_was_announced_are_malformed(receiver):
    came(receiver, pack_source("p", epoch=1, rate=RATE, session="s", units=["a"]))
    batch = SpikeBatch(1, 0, 0, MS, RATE * 1.0005, 1, 0, np.zeros(0, SPIKE_DTYPE))
    assert came(receiver, pack_spikes("p", batch)) == [(0, 0)]  # measured, not nominal
    batch = SpikeBatch(1, 1, MS, 2 * MS, 20_000.0, 1, 0, np.zeros(0, SPIKE_DTYPE))
    assert came(receiver, pack_spikes("p", batch)) == []
    assert counts(receiver, "messages", "malformed") == (1, 1)


def test_what_is_observed_is_of_the_run_of_the_spikes(observing):
    came(observing, message(0, 0), *observed(5, 3.0), message(1, MS))
    assert observing.live.at(1, 2 * MS, 2 * MS).tolist() == [1, 3.0]
    came(observing, message(0, 0, epoch=2), *observed(7, 4.0, epoch=2))
    assert observing.live.at(2, MS, MS).tolist() == [1, 4.0]
    came(observing, pack_event("p", TaskEvent(2, 8, "a kind that nobody asked for", 1)))
    assert counts(observing, "observed", "malformed") == (5, 0)


def test_what_is_observed_before_a_run_that_is_joined_late_is_believed_is_not_lost(observing):
    came(
        observing, message(1 << 40, FAR), *observed(FAR + 5, 3.0), message((1 << 40) + 1, FAR + MS)
    )
    assert observing.live.at(1, FAR + 2 * MS, 2 * MS).tolist() == [1, 3.0]


def test_no_message_may_take_more_memory_than_one_of_the_protocol_can(receiver):
    assert receiver.socket.get(zmq.MAXMSGSIZE) == MAX_SPIKES * SPIKE_DTYPE.itemsize
    assert receiver.socket.get(zmq.RCVHWM) > 0  # nor all that wait


def test_every_message_is_counted_in_one_place(receiver):
    good = message(0, 0)
    came(receiver, good, good, [b"spikes/p"], [b"\xff"], [good[0], good[1], b"x"], message(3, 90),
         pack_source("p", epoch=1, rate=3e4, session="s", units=["a"]),
         [b"source/p", b"\xc1"])  # fmt: skip
    assert counts(receiver, "messages", "announcements", "malformed") == (3, 1, 3)
    assert counts(receiver, "repeated", "lost", "others") == (1, 2, 1)


def test_a_message_of_thousands_of_bins_is_refused():
    longest = round(MAX_MESSAGE_S * RATE)
    assert unpack_spikes(*message(0, 5, length=longest)[1:], 0).end == 5 + longest
    with pytest.raises(WireError, match="at most 10 s"):
        unpack_spikes(*message(0, 5, length=longest + 1)[1:], 0)
