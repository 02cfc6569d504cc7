"""The part of ``fuzz.py`` that goes over real sockets into a ``serve`` that is decoding.

A spoiled message that is still a valid announcement of other units, or of another rate, ends
``serve`` in one line, as it must; those are not sent. Neither are blocks of more channels than
``serve`` listens to, after which it would hear no more blocks.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz import NAMES, RATE, UNITS, WIDTH, interface_stream, native_stream
from mutations import Frames, Fuzzer

from rt_neds.bench_input import random_bundle
from rt_neds.children import ChildError, free_port, serving, wait_for_schema
from rt_neds.errors import WireError
from rt_neds.frames import DecodedFrame
from rt_neds.openephys_wire import KINDS, Block, Malformed, parse
from rt_neds.stream.publisher import DecodedListener
from rt_neds.stream.raw import RawSender
from rt_neds.wire import unpack_source

AFTER_BINS = 200
PATIENCE_S = 60.0
ONLY = ""


def native_may_go(frames: Frames) -> bool:
    """Whether a message of the native stream reaches ``serve`` and leaves it decoding."""
    if not frames[0].startswith((b"spikes/p", b"source/p")):
        return False
    if frames[0] != b"source/p" or len(frames) != 2:
        return True
    with contextlib.suppress(WireError):
        session, rate, units = unpack_source(frames[1])
        return (session, rate, units) == ("bench", RATE, NAMES)
    return True


def interface_may_go(frames: Frames) -> bool:
    """Whether a message of the ZMQ Interface leaves ``serve`` listening to everything."""
    with contextlib.suppress(Malformed):
        message = parse(frames)
        return not isinstance(message, Block) or message.channel < 8
    return True


def native_total(counters: dict[str, int]) -> int:
    """Messages that are accounted for."""
    names = ("messages", "announcements", "observed", "malformed", "others")
    return sum(counters[name] for name in names)


def interface_total(counters: dict[str, int]) -> int:
    """Messages that are accounted for."""
    names = ("spikes", "events", "blocks", "other_stream", "repeated")
    return sum(counters[name] for name in (*names, *(f"malformed_{kind}" for kind in KINDS)))


class Rig:
    """A ``serve``, whoever sends to it, and whoever listens.

    Parameters
    ----------
    endpoint : str
        Where spoiled messages go out.
    """

    def __init__(self, endpoint: str, listener: DecodedListener, child: subprocess.Popen) -> None:
        self.sender = RawSender(endpoint, "p", lossless=True)
        self.listener, self.child = listener, child
        self.status: dict[str, Any] = {}
        self.bins: list[tuple[int, int]] = []
        self.spikes: dict[tuple[int, int], int] = {}

    def hear(self, timeout_ms: int = 0) -> None:
        """Take in what has come."""
        while (message := self.listener.read(timeout_ms)) is not None:
            timeout_ms = 0
            if isinstance(message, DecodedFrame):
                self.bins.append((message.epoch, message.bin))
                self.spikes[message.epoch, message.bin] = message.spikes + message.unknown
            elif message.kind == "status":
                self.status = message.fields

    def wait(self, enough: Callable[[], bool]) -> bool:
        """Hear until then; False if that does not come."""
        deadline = time.monotonic() + PATIENCE_S
        while not enough():
            if time.monotonic() > deadline or self.child.poll() is not None:
                return False
            self.hear(100)
        return True


def resident_mb(pid: int) -> float:
    """Memory of a process that is its own."""
    with contextlib.suppress(OSError):  # it may have ended
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return float(line.split()[1]) / 1024
    return float("nan")


def spoil(
    rig: Rig, valid: Iterator[Frames], may_go: Any, total: Any, messages: int, rng: random.Random
) -> dict[str, Any]:
    """Send spoiled messages, see that each is counted, and that a good stream decodes after."""
    fuzzer, sent, failed, settled_mb = Fuzzer(rng), 0, [], None
    for frames in valid:
        for out in fuzzer.take(frames):
            if may_go(out):
                rig.sender.send_frames(out)
                sent += 1
        if sent % 64 == 0:
            rig.hear()
        if settled_mb is None and sent > messages / 5 and rig.status:
            settled_mb = resident_mb(rig.status["pid"])
        if sent >= messages or rig.child.poll() is not None:
            break
    counted = 0

    def all_counted() -> bool:
        nonlocal counted
        counted = total(rig.status["source_counters"]) if rig.status else 0
        return counted >= sent

    if not rig.wait(all_counted) or counted != sent:
        failed.append(f"{sent} sent, {counted} counted: {rig.status.get('source_counters')}")
    growth = resident_mb(rig.status["pid"]) - settled_mb if settled_mb else float("nan")
    return {"sent": sent, "counted": counted, "growth_mb": round(growth, 2), "failed": failed}


def decodes_on(rig: Rig, good: Iterator[Frames], bins: int) -> list[str]:
    """Send a stream without fault; what is wrong with the bins that come."""
    began = len(rig.bins)
    for frames in good:
        rig.sender.send_frames(frames)
    if rig.child.poll() is not None:
        return ["serve has ended"]
    if not rig.wait(lambda: len({key for key in rig.bins[began:]}) >= bins):
        return [f"{len(rig.bins) - began} bins of {bins} came after"]
    if rig.status["supervision"]["restarts"]:
        return [f"{rig.status['supervision']['restarts']} restarts of the worker"]
    return []


def live(folder: Path, messages: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Half of the messages as the native stream, half as the ZMQ Interface."""
    bundle = random_bundle(folder / "bundle", "small", UNITS, 1e3 * WIDTH / RATE, 1)
    told = {}
    for name, scheme in (("native", "rtneds"), ("open ephys interface", "openephys")):
        if ONLY and name != ONLY:
            continue
        rng = random.Random(f"{seed} live {name}")
        port, decoded = free_port(), f"tcp://127.0.0.1:{free_port()}"
        listener = DecodedListener(decoded, "p")
        options = ("--probe", "p", "--bundle", str(bundle), "--publish", decoded)
        try:
            with serving(*options, "--source", f"{scheme}://127.0.0.1:{port}") as child:
                wait_for_schema(listener, child)
                rig = Rig(f"tcp://127.0.0.1:{port}", listener, child)
                if not rig.sender.wait_for_anyone(PATIENCE_S):
                    raise ChildError("serve never subscribed")
                if name == "native":
                    told[name] = spoil(rig, native_stream(rng, 1), native_may_go, native_total,
                                       messages // 2, rng)  # fmt: skip
                    # It may begin anew in between, which cuts two bins short.
                    good = until(native_stream(rng, 1 << 40), AFTER_BINS * WIDTH // 30 + 200)
                else:
                    told[name] = spoil(rig, interface_stream(rng), interface_may_go,
                                       interface_total, messages // 2, rng)  # fmt: skip
                    good = until(interface_stream(rng), 6 * AFTER_BINS)
                told[name]["failed"] += decodes_on(rig, good, AFTER_BINS)
                rig.sender.close()
        except ChildError as error:
            told.setdefault(name, {"sent": 0, "failed": []})["failed"].append(str(error))
        finally:
            listener.close()
        say(f"live, {name}: {told[name]}")
    return told


def until(stream: Iterator[Frames], messages: int) -> Iterator[Frames]:
    """The first so many messages."""
    for _, frames in zip(range(messages), stream, strict=False):
        yield frames
