"""Millions of spoiled messages through the code that parses what comes from outside.

    python benchmarks/fuzz.py --messages 10000000 --json results/MACHINE/fuzz.json

Every protocol gets its share: the native spikes, the Open Ephys ZMQ Interface, its Event
Broadcaster, SpikeGLX's replies, and the decoded stream as its listeners read it. For each, what was
accepted and every kind that was refused must add up to what was sent, nothing may be raised, memory
must stay where it was. Some go over real sockets into a ``serve`` that is decoding, which must
count the same and decode on.

The same seed gives the same messages. What breaks is written down (``failed``), message and all.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fuzz_spikeglx import SPOIL_BYTES, SpikeGLX
from mutations import Frames, Fuzzer

from rt_neds.errors import WireError
from rt_neds.openephys_wire import KINDS
from rt_neds.result import machine, write_json
from rt_neds.stream.binner import Binner
from rt_neds.stream.live import LiveBehaviours
from rt_neds.stream.openephys import OpenEphysSource
from rt_neds.stream.receiver import Announcement, Receiver
from rt_neds.wire import unpack_decoded

RATE, MESSAGE, WIDTH = 30_000, 30, 600
UNITS = 20
NAMES = [f"bench/{n}" for n in range(UNITS)]
EVERY = 50_000
"""Messages between two looks at memory and sums."""
WARM = 4
"""Looks after which memory must stay where it is."""
MAX_GROWTH_MB = 20.0
_RECORD = struct.Struct("<qII")


class Broken(Exception):
    """What must hold did not."""


class Target(Protocol):
    """One protocol: valid messages of it, and the code that reads them."""

    def valid(self, rng: random.Random) -> Iterator[Frames]:
        """An endless stream of messages without fault."""

    def feed(self, frames: Frames) -> None:
        """Have one message read."""

    def counts(self) -> dict[str, int]:
        """What has become of all messages; they are each in one of these."""

    def close(self) -> None:
        """Close what is open."""


def records(rng: random.Random, first: int) -> bytes:
    """A few spikes of one message."""
    return b"".join(
        _RECORD.pack(first + rng.randrange(MESSAGE), rng.randrange(UNITS + 1), 0)
        for _ in range(rng.randrange(5))
    )


def observed(rng: random.Random, epoch: int, seq: int, sample: int, probe: str) -> Frames:
    """A message of a behaviour, or an event of the task."""
    if rng.random() < 0.2:
        value = rng.choice(["left", "right", None])
        event = {"v": 1, "epoch": epoch, "sample": sample, "kind": "choice", "value": value}
        return [f"events/{probe}".encode(), msgpack.packb(event)]
    n = rng.randrange(4)
    head = {
        "v": 1, "epoch": epoch, "seq": seq, "first": sample, "rate": 1000.0, "n": n, "sent_ns": 1,
    }  # fmt: skip
    values = [rng.choice([rng.gauss(0, 1), float("nan"), 1e30]) for _ in range(n)]
    return [b"behaviour/speed", msgpack.packb(head), struct.pack(f"<{n}f", *values)]


def native_stream(
    rng: random.Random, epoch: int, probe: str = "p", live: bool = False
) -> Iterator[Frames]:
    """Messages of spikes, one every millisecond of its clock, and now and then who sends; with
    ``live``, of behaviours beside them.
    """
    spikes, source = f"spikes/{probe}".encode(), f"source/{probe}".encode()
    seq = first = 0
    while True:
        if seq % 200 == 0:
            who = {"v": 1, "epoch": epoch, "rate": 30_000.0, "session": "bench", "units": NAMES}
            yield [source, msgpack.packb(who)]
        if live and rng.random() < 0.3:
            yield observed(rng, epoch, seq, first, probe)
        payload = records(rng, first)
        head = {
            "v": 1, "epoch": epoch, "seq": seq, "first": first, "end": first + MESSAGE,
            "rate": 30_000.0, "n": len(payload) // 16, "sent_ns": 1,
        }  # fmt: skip
        yield [spikes, msgpack.packb(head), payload]
        seq, first = seq + 1, first + MESSAGE
        if rng.random() < 1e-4:
            epoch, seq, first = epoch + 1, 0, rng.randrange(1_000_000)


class Native:
    """The native stream: receiver, what is live, and binner."""

    def __init__(self) -> None:
        self.live = LiveBehaviours({"speed": (), "choice": ("left", "right")})
        self.receiver = Receiver("tcp://127.0.0.1:9", "p", self.live)  # nobody is there
        self.binner = Binner(np.arange(UNITS, dtype=np.int32), UNITS, WIDTH, context=100)
        self.taken = self.closed = 0

    def valid(self, rng: random.Random) -> Iterator[Frames]:
        return native_stream(rng, epoch=1, live=True)

    def feed(self, frames: Frames) -> None:
        self.receiver.take(frames, 1)
        while (batch := self.receiver.read(0)) is not None:
            self.taken += len(batch.records_S)
            for frame in self.binner.frames(batch):
                self.live.at(frame.epoch, frame.end, WIDTH)
                self.closed += 1

    def counts(self) -> dict[str, int]:
        counted = self.binner.counters
        fates = ("spikes", "spikes_unknown", "spikes_late", "spikes_far", "spikes_outside")
        still_open = int(self.binner._ring_RC[:, -2:].sum())
        if self.taken != sum(counted[name] for name in fates) + still_open:
            raise Broken(f"{self.taken} spikes came; {counted}, {still_open} in open bins")
        if self.closed != counted["bins"]:
            raise Broken(f"{self.closed} bins came; {counted}")
        for name, of in self.live.counters.items():
            if of["shown"] + of["hidden"] != self.closed:
                raise Broken(f"{self.closed} bins came; {name}: {of}")
        names = ("messages", "announcements", "observed", "malformed", "others")
        told = {name: self.receiver.counters[name] for name in names}
        return {**told, "held back": int(self.receiver._leap is not None)}

    def close(self) -> None:
        self.receiver.close()


class OpenEphys:
    """Either plugin of Open Ephys: source, watermark, binner.

    Parameters
    ----------
    broadcaster : bool
    """

    def __init__(self, broadcaster: bool) -> None:
        self.broadcaster = broadcaster
        scheme = "openephys-events" if broadcaster else "openephys"
        known = Announcement("s", 30_000.0, tuple(NAMES))
        self.source = OpenEphysSource(f"{scheme}://127.0.0.1:9", known)
        self.binner = Binner(np.arange(UNITS, dtype=np.int32), UNITS, WIDTH, context=100)
        self.passed = self.fed = 0

    def valid(self, rng: random.Random) -> Iterator[Frames]:
        return broadcast_stream(rng) if self.broadcaster else interface_stream(rng)

    def feed(self, frames: Frames) -> None:
        self.source.take(frames, time.monotonic_ns())
        self.fed += 1
        if self.fed % 16 == 0:
            self._drain()

    def _drain(self) -> None:
        source = self.source
        while source._ready or source.announced is not source._said:
            batch = source.read(0)
            if batch is not None:
                self.passed += len(batch.records_S)
                if batch.end - batch.first <= 60 * batch.rate:
                    for _ in self.binner.frames(batch):
                        pass

    def counts(self) -> dict[str, int]:
        self._drain()
        counters = self.source.counters
        held = self.source._held
        if counters["spikes"] != self.passed + counters["discarded"] + held:
            raise Broken(f"{self.passed} spikes passed on, {held} held; {counters}")
        names = ("spikes", "events", "blocks", "other_stream", "repeated")
        malformed = (f"malformed_{kind}" for kind in KINDS)
        return {name: counters[name] for name in (*names, *malformed)}

    def close(self) -> None:
        self.source.close()


def interface_stream(rng: random.Random) -> Iterator[Frames]:
    """What the ZMQ Interface sends: spikes, events, and the samples of one channel."""
    number, at = 0, 0
    block, wave = 600, bytes(160)
    while True:
        for _ in range(rng.randrange(6)):
            number += 1
            body = {
                "stream": "A", "electrode": rng.choice(NAMES), "num_channels": 1,
                "sample_num": at + rng.randrange(block), "num_samples": 40, "sorted_id": 0,
            }  # fmt: skip
            head = {"message_num": number, "type": "spike", "spike": body}
            yield [b"EVENT\0", json.dumps(head).encode(), wave]
        if rng.random() < 0.2:
            number += 1
            content: dict[str, Any] = {"stream": "A", "type": 3, "sample_num": at}
            head = {
                "message_num": number, "type": "event", "content": content, "data_size": 10,
            }  # fmt: skip
            yield [b"EVENT\0", json.dumps(head).encode(), bytes(10)]
        number += 1
        content = {
            "stream": "A", "channel_num": 0, "num_samples": block, "sample_num": at,
            "sample_rate": 30_000.0,
        }  # fmt: skip
        size = 4 * block
        head = {"message_num": number, "type": "data", "content": content, "data_size": size}
        yield [b"DATA\0", json.dumps(head).encode(), bytes(size)]
        at += block
        if rng.random() < 1e-4:
            number, at = 0, 0


def broadcast_stream(rng: random.Random) -> Iterator[Frames]:
    """What the Event Broadcaster sends, in JSON or packed, for some thousands of events each."""
    at = 0
    while True:
        packed = rng.random() < 0.5
        for _ in range(3000):
            at += rng.randrange(60)
            is_spike = rng.random() < 0.9
            kind = b"\1\0" if is_spike else b"\0\0"
            if packed:
                base = struct.pack("<BBHHHqd", 4, 1, 104, 1, rng.randrange(UNITS), at, at / RATE)
                behind = struct.pack("<Hf", 0, -60.0) + bytes(160) if is_spike else bytes(10)
                yield [kind, base + behind]
                continue
            body: dict[str, Any] = {"stream": "1", "sample_number": at}
            if is_spike:
                body |= {"event_type": "spike", "electrode": rng.choice(NAMES), "sorted_id": 0}
            else:
                body |= {"event_type": "ttl", "line": 2, "state": True}
            yield [kind, json.dumps(body).encode()]
        if rng.random() < 0.05:
            at = 0


class Decoded:
    """The decoded stream, as whoever listens reads it."""

    def __init__(self) -> None:
        self.told = {"frames": 0, "malformed": 0}

    def valid(self, rng: random.Random) -> Iterator[Frames]:
        bin_ = 0
        while True:
            bin_ += 1
            stamps = dict.fromkeys(("sent", "received", "binned", "decoded", "published"), 1)
            fields = {
                "v": 1, "probe": "p", "epoch": 1, "bin": bin_, "end": bin_ * WIDTH,
                "values": [rng.random() for _ in range(4)], "flags": 0, "spikes": 3, "late": 0,
                "unknown": 0, "lost": 0, "model": "abc", "stamps": stamps,
            }  # fmt: skip
            yield [b"decoded/p", msgpack.packb(fields)]

    def feed(self, frames: Frames) -> None:
        try:
            if len(frames) != 2:
                raise WireError("frames")
            unpack_decoded(frames[1])
            self.told["frames"] += 1
        except WireError:
            self.told["malformed"] += 1

    def counts(self) -> dict[str, int]:
        return self.told

    def close(self) -> None:
        pass


TARGETS = {
    "native": Native,
    "open ephys interface": lambda: OpenEphys(False),
    "open ephys broadcaster": lambda: OpenEphys(True),
    "spikeglx": SpikeGLX,
    "decoded": Decoded,
}
HOW: dict[str, dict[str, Any]] = {"spikeglx": {"share": 0.12, "ways": SPOIL_BYTES}}
"""A conversation must often get as far as samples: less of it is spoiled."""


def resident_mb() -> float:
    """Memory of this process that is its own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return float(line.split()[1]) / 1024
    return float("nan")


def fuzz(name: str, messages: int, seed: int, say: Any = lambda line: None) -> dict[str, Any]:
    """Spoiled messages through one target.

    Raises
    ------
    Broken
        If something was raised, or sums or memory are not what they must be.
    """
    rng = random.Random(f"{seed} {name}")
    target, fuzzer = TARGETS[name](), Fuzzer(rng, **HOW.get(name, {}))
    sent, settled, grown, next_look = 0, None, 0.0, EVERY
    began = time.monotonic()
    try:
        for valid in target.valid(rng):
            for frames in fuzzer.take(valid):
                try:
                    target.feed(frames)
                except Exception as error:
                    shown = [frame[:500].hex() for frame in frames]
                    raise Broken(f"{type(error).__name__}: {error}; {name}: {shown}") from error
                sent += 1
            if sent >= min(next_look, messages):
                next_look += EVERY
                counted = sum(target.counts().values())
                if counted != sent:
                    raise Broken(f"{name}: {sent} sent, {counted} counted: {target.counts()}")
                looks, now_mb = sent // EVERY, resident_mb()
                if looks == WARM:
                    settled = now_mb
                elif settled is not None:
                    grown = max(grown, now_mb - settled)
                    if grown > MAX_GROWTH_MB:
                        raise Broken(f"{name}: memory grew by {grown:.1f} MB in {sent} messages")
                if looks % 10 == 0:
                    say(f"{name}: {sent} of {messages}")
            if sent >= messages:
                break
        counts = target.counts()
    finally:
        target.close()
    seconds = time.monotonic() - began
    return {
        "sent": sent,
        "counts": counts,
        "growth_mb": None if settled is None else round(grown, 2),
        "messages_per_s": round(sent / seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=10_000_000, help="in all, by hand")
    parser.add_argument("--live", type=int, default=200_000, help="more, over sockets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*TARGETS, "live"])
    parser.add_argument("--json", default="-")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "seed": args.seed, "messages": 0}
    result |= {"targets": {}, "live": {}, "failed": []}

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    share = -(-args.messages // len(TARGETS))
    for name in TARGETS:
        if args.only in (None, name):
            try:
                result["targets"][name] = fuzz(name, share, args.seed, say)
            except Broken as error:
                result["failed"].append(str(error))
                say(str(error))
    if args.only in (None, "live") and args.live:
        from fuzz_live import live

        with tempfile.TemporaryDirectory() as scratch:
            result["live"] = live(Path(scratch), args.live, args.seed, say)
        result["failed"] += [f for one in result["live"].values() for f in one["failed"]]
    done = [*result["targets"].values(), *result["live"].values()]
    result["messages"] = sum(one["sent"] for one in done)
    write_json(args.json, result)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
