"""Whoever listens and does not read costs the others nothing, and memory only so much."""

import itertools
import sys
import time
from pathlib import Path

import pytest

from rt_neds.children import free_port
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
