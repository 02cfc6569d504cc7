"""What a spike costs before it is decoded: counting it, and the messages it comes and goes in.

Run by ``kernels.py counting messages``.
"""

from __future__ import annotations

import numpy as np
import zmq
from numpy.typing import NDArray
from turns import Contestant, take_turns

from rt_neds.frames import SPIKE_DTYPE, DecodedFrame, SpikeBatch
from rt_neds.stream.binner import Binner, count_spikes
from rt_neds.wire import pack_decoded, pack_spikes, unpack_decoded, unpack_spikes

UNITS, RING_BINS = 400, 100


def bench_counting(rounds: int) -> list[dict[str, object]]:
    """A million spikes, in one call, by the binner's kernel and by ``bincount``."""
    rng = np.random.default_rng(0)
    spikes, bins, width = 1_000_000, 5_000, 600
    samples_S = np.sort(rng.integers(0, bins * width, spikes))
    records_S2 = np.stack([samples_S, rng.integers(0, UNITS, spikes)], axis=1)
    row_of_unit_U = np.arange(UNITS, dtype=np.int32)
    ring_RC = np.zeros((bins, UNITS + 2), np.float32)

    def ours() -> NDArray[np.float32]:
        ring_RC[:] = 0
        count_spikes(records_S2, row_of_unit_U, ring_RC, 0, bins, width)
        return ring_RC[:, :UNITS]

    def theirs() -> NDArray[np.int64]:
        flat_S = records_S2[:, 0] // width * UNITS + records_S2[:, 1]
        return np.bincount(flat_S, minlength=bins * UNITS).reshape(bins, UNITS)

    np.testing.assert_array_equal(ours(), theirs())
    times = take_turns({"count_spikes": (ours, 3), "numpy.bincount": (theirs, 3)}, rounds)
    best = np.median(times["count_spikes"])
    return [
        {
            "who": who,
            "p50_us": float(np.median(us)),
            "million_spikes_per_s": float(spikes / np.median(us)),
            "times_ours": float(np.median(us) / best),
        }
        for who, us in times.items()
    ]


def bench_messages(rounds: int) -> list[dict[str, object]]:
    """A 1 ms batch of ten spikes, and a decoded bin of eight values, on their way."""
    records_S = np.zeros(10, SPIKE_DTYPE)
    records_S["sample"] = np.arange(10)
    batch = SpikeBatch(1, 5, 0, 30, 30_000.0, 7, 0, records_S)
    stamps = dict.fromkeys(("sent", "received", "binned", "decoded", "published"), 10**15)
    values_V = np.zeros(8, np.float32)
    frame = DecodedFrame("imec0", 1, 5, 600, values_V, 0, 10, 0, 0, 0, "0123456789ab", stamps)
    spikes, decoded = pack_spikes("imec0", batch), pack_decoded(frame)
    binners = {n: Binner(np.arange(n, dtype=np.int32), n, 600, RING_BINS) for n in (100, 1_600)}
    sample = dict.fromkeys(binners, 0)
    context = zmq.Context()
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    pull.connect(f"tcp://127.0.0.1:{push.bind_to_random_port('tcp://127.0.0.1')}")

    def through_a_socket() -> list[bytes]:
        push.send_multipart(spikes)
        return pull.recv_multipart()

    def into_bins(units: int) -> None:
        first = sample[units]
        sample[units] = first + 30
        records_S["sample"] = np.arange(first, first + 10)
        for _ in binners[units].frames(SpikeBatch(1, 0, first, first + 30, 3e4, 0, 0, records_S)):
            pass

    contestants: dict[str, tuple[Contestant, int]] = {
        "pack ten spikes": (lambda: pack_spikes("imec0", batch), 100),
        "parse ten spikes": (lambda: unpack_spikes(spikes[1], spikes[2], 0), 100),
        "ten spikes through tcp, to and fro": (through_a_socket, 100),
        "ten spikes into bins, 100 units": (lambda: into_bins(100), 100),
        "ten spikes into bins, 1600 units": (lambda: into_bins(1_600), 100),
        "pack a decoded bin": (lambda: pack_decoded(frame), 100),
        "parse a decoded bin": (lambda: unpack_decoded(decoded[1]), 100),
    }
    times = take_turns(contestants, rounds)
    context.destroy()
    return [
        {
            "who": who,
            "p50_us": float(np.median(us)),
            "p99_us": float(np.percentile(us, 99)),
        }
        for who, us in times.items()
    ]
