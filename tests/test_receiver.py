"""Each message of the native stream is counted once, and one absurd number does not stop it."""

import numpy as np
import pytest

from rt_neds.errors import WireError
from rt_neds.frames import SPIKE_DTYPE, SpikeBatch
from rt_neds.stream.receiver import Receiver
from rt_neds.wire import LEAP_MESSAGES, MAX_MESSAGE_S, pack_source, pack_spikes, unpack_spikes

RATE, MS = 30_000, 30


@pytest.fixture
def receiver():
    one = Receiver("tcp://127.0.0.1:9", "p")  # nobody is there: messages are given by hand
    yield one
    one.close()


def message(seq, first, *, epoch=1, length=MS):
    return pack_spikes(
        "p", SpikeBatch(epoch, seq, first, first + length, RATE, 1, 0, np.zeros(1, SPIKE_DTYPE))
    )


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


def test_another_epoch_is_no_leap(receiver):
    assert came(receiver, message(7, FAR), message(1 << 40, 3 * FAR, epoch=2)) == [
        (7, 0), (1 << 40, 0),
    ]  # fmt: skip
    assert counts(receiver, "epochs", "lost") == (2, 0)


def test_every_message_is_counted_in_one_place(receiver):
    good = message(0, 0)
    came(receiver, good, good, [b"spikes/p"], [b"\xff"], [good[0], good[1], b"x"], message(3, 90),
         pack_source("p", epoch=1, rate=3e4, session="s", units=["a"]),
         [b"source/p", b"\xc1"])  # fmt: skip
    assert counts(receiver, "messages", "announcements", "malformed") == (3, 1, 4)
    assert counts(receiver, "repeated", "lost") == (1, 2)


def test_a_message_of_thousands_of_bins_is_refused():
    longest = round(MAX_MESSAGE_S * RATE)
    assert unpack_spikes(*message(0, 5, length=longest)[1:], 0).end == 5 + longest
    with pytest.raises(WireError, match="at most 10 s"):
        unpack_spikes(*message(0, 5, length=longest + 1)[1:], 0)
