"""What tests of the Open Ephys source share: what it gives of messages, and what the native stream
gives of the same spikes.
"""

import threading
import time

import numpy as np

from rt_neds.openephys_emulator import Emulator
from rt_neds.replay import batches
from rt_neds.stream.binner import Binner
from rt_neds.stream.openephys import OpenEphysSource
from rt_neds.stream.receiver import Announcement

RATE, WIDTH, CONTEXT, BLOCK = 30_000.0, 600, 50, 1024
KINDS = ("spikes", "events", "blocks", "other_stream", "repeated")


def known(units):
    return Announcement("s", RATE, tuple(units))


def bins_of(batches_, units):
    """Every bin as ``{(epoch, bin): (observed, counts)}``, the frames in order, and the binner."""
    binner = Binner(np.arange(units, dtype=np.int32), units, WIDTH, CONTEXT)
    frames = [
        (f.epoch, f.bin, f.observed, f.counts_N.tolist(), f.lost, f.unknown)
        for batch in batches_
        for f in binner.frames(batch)
    ]
    return frames, binner


def native(session):
    frames, _ = bins_of(batches(session, 1.0, epoch=1), len(session.unit_ids))
    return {bin_: (observed, counts) for _, bin_, observed, counts, *_ in frames}


def through_sockets(session, port, send, *, lateness_ms=0.0, **options):
    """What a source gives of what ``send(emulator)`` sends, and the source."""
    endpoint = f"tcp://127.0.0.1:{port}"
    broadcaster = options.get("broadcaster", False)
    emulator = Emulator(
        endpoint, "ProbeA", session.unit_ids, session.rate, lossless=True, **options
    )
    url = f"openephys{'-events' if broadcaster else ''}://127.0.0.1:{port}"
    source = OpenEphysSource(url, known(session.unit_ids), lateness_ms)

    def work():
        assert emulator.wait_for_subscriber(10)
        send(emulator)

    sending = threading.Thread(target=work)
    sending.start()
    got = []
    while True:
        batch = source.read(200)
        if batch is not None:
            got.append(batch)
        elif not sending.is_alive():
            break
    sending.join()
    emulator.close()
    source.close()
    return got, source


def fed(source, messages):
    """Batches that messages complete, without sockets."""
    got = []
    for frames in messages:
        source.take(frames, time.monotonic_ns())
        while source._ready:
            got.append(source._ready.popleft())
    return got


def accounted(source):
    counters = source.counters
    malformed = sum(n for name, n in counters.items() if name.startswith("malformed_"))
    return counters["messages"] == malformed + sum(counters[kind] for kind in KINDS)
