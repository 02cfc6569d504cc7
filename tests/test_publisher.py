"""Whoever listens and does not read costs the others nothing, and memory only so much."""

import itertools
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rt_neds.children import free_port
from rt_neds.frames import DecodedFrame
from rt_neds.stream.publisher import DecodedListener, Publisher
from rt_neds.stream.raw import RawListener

PAD = bytes(4000)  # large, so that what sockets hold is soon full


def split(numbers, size):
    return [numbers[n : n + size] for n in range(0, len(numbers), size)]


def own_mb():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return float(line.split()[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_listener_that_does_not_read_loses_frames_and_nobody_else_does():
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    publisher = Publisher(endpoint, "p")
    good, deaf = DecodedListener(endpoint, "p"), RawListener((endpoint,), queue=1)

    def publish(numbers):
        """Publish, and hear what was published before going on."""
        heard = []
        for some in split(numbers, 100):
            for n in some:
                publisher.note("status", {"n": n, "pad": PAD})
            for _ in some:
                message = good.read(60_000)
                assert message is not None
                heard.append(message.fields["n"])
        return heard

    deadline = time.monotonic() + 60
    for trial in itertools.count():  # until both have connected
        assert time.monotonic() < deadline
        publisher.note("status", {"n": -1 - trial})
        if good.read(10) is not None and list(deaf.read(10)):
            break
    while good.read(200) is not None:
        pass
    assert publish(range(26_000)) == list(range(26_000))
    full = own_mb()
    assert publish(range(26_000, 32_000)) == list(range(26_000, 32_000))
    # 6000 more that were kept for the deaf one would be 24 MB.
    assert own_mb() - full < 10
    came = sum(1 for _ in iter(lambda: next(iter(deaf.read(1000)), None), None))
    assert came < 32_000
    for one in (good, deaf, publisher):
        one.close()


def test_a_listener_hears_no_probe_whose_name_only_begins_alike():
    """ZeroMQ passes on every topic that begins with what was asked for."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    publisher, listener = Publisher(endpoint, "imec1"), DecodedListener(endpoint, "imec1")

    def frame(probe, bin_):
        return DecodedFrame(probe, 1, bin_, 0, np.zeros(1, np.float32), 0, 0, 0, 0, 0, "m", {})

    deadline = time.monotonic() + 60
    while listener.read(10) is None:  # until it has connected
        assert time.monotonic() < deadline
        publisher.note("status", {})
    while listener.read(200) is not None:
        pass
    neighbour = publisher.beside("imec10")
    heard = []
    for n in range(3):
        neighbour.write(frame("imec10", n))
        neighbour.note("status", {"n": -1})
        publisher.write(frame("imec1", n))
        publisher.note("status", {"n": n})
    while (message := listener.read(1000)) is not None:
        heard.append(message)
    assert [m.fields["n"] for m in heard[1::2]] == [0, 1, 2]
    assert [(m.probe, m.bin) for m in heard[::2]] == [("imec1", n) for n in range(3)]
    assert listener.malformed == 0
    for one in (listener, publisher):
        one.close()


def test_a_message_that_breaks_the_protocol_does_not_look_like_silence():
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    publisher, listener = Publisher(endpoint, "p"), DecodedListener(endpoint, "p", ("status",))
    deadline = time.monotonic() + 60
    while listener.read(10) is None:  # until it has connected
        assert time.monotonic() < deadline
        publisher.note("status", {})
    while listener.read(200) is not None:
        pass
    for broken in ([b"status/p"], [b"status/p", b"\xff"], [b"status/p", bytes(9), b""]):
        publisher.pass_on(broken)
    publisher.note("status", {"n": 1})
    assert listener.read(60_000).fields["n"] == 1
    assert listener.malformed == 3
    for one in (listener, publisher):
        one.close()


def test_what_was_published_before_closing_still_comes():
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    publisher, listener = Publisher(endpoint, "p"), DecodedListener(endpoint, "p")
    deadline = time.monotonic() + 60
    while listener.read(10) is None:  # until it has connected
        assert time.monotonic() < deadline
        publisher.note("status", {"n": -1})
    for n in range(2000):
        publisher.note("status", {"n": n, "pad": PAD})
    publisher.close()
    heard = [m.fields["n"] for m in iter(lambda: listener.read(500), None)]
    assert [n for n in heard if n >= 0] == list(range(2000))
    listener.close()


def test_a_wait_need_not_be_a_whole_number_of_milliseconds():
    listener = DecodedListener(f"tcp://127.0.0.1:{free_port()}", "p")
    assert listener.read(1.5) is None
    listener.close()


def test_messages_of_others_make_no_wait_longer(monkeypatch):
    now, waits = [0], []
    monkeypatch.setattr("rt_neds.stream.publisher.monotonic_ns", lambda: now[0])
    listener = DecodedListener(f"tcp://127.0.0.1:{free_port()}", "imec1")

    def next_message(socket, timeout_ms):
        waits.append(timeout_ms)
        now[0] += 400_000_000
        return [b"status/imec10", b"\x80"] if len(waits) < 5 else None

    monkeypatch.setattr("rt_neds.stream.publisher.next_message", next_message)
    assert listener.read(1000) is None
    assert waits == [1000, 600, 200, 0, 0]
    listener.close()
