"""SpikeGLX for ``fuzz.py``: the source's own conversation, with spoiled replies to its questions.

All of the source is real but the socket: what it asks is answered here, rightly at first.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from mutations import BOMBS, Frames, cut, flip, lengthen, noise, splice
from numpy.typing import NDArray

import rt_neds.stream.spikeglx as module
from rt_neds.errors import StreamError
from rt_neds.frames import SPIKE_DTYPE
from rt_neds.spikeglx_wire import KINDS, Question, Reply, ReplyReader
from rt_neds.stream.spikeglx import SpikeGLXSource
from rt_neds.stream.spikeglx_line import LineError

AP, LF, STATUS = 3, 2, 1
ANSWERS = {
    "GETVERSION": "20240620",
    "GETSTREAMSAMPLERATE": "30000.000000",
    "GETSTREAMACQCHANS": f"{AP} {LF} {STATUS}",
    "GETSTREAMMAXINT": "512",
    "GETSTREAMSN": "18408406641 0",
    "GETSTREAMI16TOVOLTS": "4.6875e-06",
}
_TURNS = 200
_WAITS = ("PACE_NS", "WAIT_NS", "STALL_NS", "BACKOFF_NS", "MAX_BACKOFF_NS")


class _Quiet:
    """A detector that finds nothing."""

    units = ("a", "b")
    channels = AP
    settle = 10

    def check_source(self, rate: float, position_C2: Any = None, uv_per_bit: Any = None) -> None:
        pass

    def reset(self, first: int) -> None:
        pass

    def detect(self, samples_SC: NDArray[np.int16], first: int) -> tuple[NDArray[np.void], int]:
        return np.zeros(0, SPIKE_DTYPE), first + len(samples_SC)


class _Line:
    """Stands for the connection; the reader is the real one."""

    def __init__(self, target: SpikeGLX) -> None:
        self.target, self.reader = target, ReplyReader()
        target.question = None

    def connect(self, wait_ns: int) -> bool:
        return True

    def ask(self, question: Question) -> None:
        self.reader.expect(question.fetch)
        self.target.question = question

    def receive(self, wait_ns: int) -> Reply | None:
        data, self.target.data = self.target.data, None
        if data is None:
            return None
        self.target.question = None
        while data:
            space = self.reader.space()
            size = min(len(space), len(data), self.target.rng.choice((1, 7, 100, 5000)))
            space[:size] = data[:size]
            reply = self.reader.took(size)
            data = data[size:]
            if reply is not None:
                if data:  # more than one reply: the next question will find it
                    space = self.reader.space()
                    space[: len(data)] = data[: len(space)]
                    self.reader._end += min(len(space), len(data))
                self.target.refused = bool(reply.error)
                return reply._replace(received_ns=time.monotonic_ns())
        raise LineError("silent")

    def close(self) -> None:
        pass


class SpikeGLX:
    """The source, asking."""

    def __init__(self) -> None:
        # Until it is closed: no waiting, and no socket.
        self._as_it_was = {name: getattr(module, name) for name in (*_WAITS, "Line")}
        vars(module).update(dict.fromkeys(_WAITS, 0), Line=lambda where: _Line(self))
        self.rng = random.Random(0)
        self.question: Question | None = None
        self.data: bytes | None = None
        self.refused = False
        self.told = {"accepted": 0, "errors of the server": 0, "for a person": 0}
        self.source = SpikeGLXSource("spikeglx://127.0.0.1:9", "s", _Quiet())
        self._until_asked()

    def valid(self, rng: random.Random) -> Iterator[Frames]:
        self.rng = rng
        while True:
            assert self.question is not None
            yield [self._answer(self.question)]

    def _answer(self, question: Question) -> bytes:
        asked = question.fetch
        if asked is not None:
            if self.rng.random() < 0.01:
                return b"ERROR FETCH: Too late.\n"
            count = self.rng.choice((0, 1, 12, 30))
            head = f"BINARY_DATA {asked.channels} {count} uint64({asked.first})\n"
            return head.encode() + bytes(2 * count * asked.channels) + b"OK\n"
        command = question.command.split()[0]
        if command == "GETSTREAMSAMPLECOUNT":
            return f"{self.source._samples.next + self.rng.randrange(1000)}\nOK\n".encode()
        if command == "GETGEOMMAP":
            sites = (f"ch{c}_{key}={c}\n" for c in range(AP) for key in "sxzu")
            return "".join(sites).encode() + b"OK\n"
        return f"{ANSWERS[command]}\nOK\n".encode() if command in ANSWERS else b"OK\n"

    def feed(self, frames: Frames) -> None:
        line, self.data, self.refused = self.source._line, b"".join(frames), False
        try:
            self._until_asked()
        except StreamError:  # another probe, another gain: a person must look
            self.told["for a person"] += 1
            self.source._line = None
            self._until_asked()
            return
        if self.source._line is line:
            self.told["errors of the server" if self.refused else "accepted"] += 1

    def _until_asked(self) -> None:
        for _ in range(_TURNS):
            self.source.read(0)
            if self.data is None and self.question is not None:
                return
        raise AssertionError("it asks nothing any more")

    def counts(self) -> dict[str, int]:
        names = [*(f"malformed_{kind}" for kind in KINDS), "silent"]
        return {**self.told, **{name: self.source.counters[name] for name in names}}

    def close(self) -> None:
        self.source.close()
        vars(module).update(self._as_it_was)


def digits(rng: random.Random, frames: Frames) -> Frames:
    """Another number in the first line."""
    head, newline, rest = frames[0].partition(b"\n")
    words = head.replace(b"(", b" ( ").replace(b")", b" ) ").split()
    places = [n for n, word in enumerate(words) if word[:1].isdigit()]
    if not places:
        return flip(rng, frames)
    words[rng.choice(places)] = rng.choice(
        (b"0", b"-1", b"1", b"4", b"99999", b"1" * 19, b"9" * 30, b"1e9", b"nan", b"0x10", b"")
    )
    joined = b" ".join(words).replace(b" ( ", b"(").replace(b" )", b")")
    return [joined + newline + rest]


def text_bomb(rng: random.Random, frames: Frames) -> Frames:
    """Something quite else."""
    more = (b"OK\n" * 3, b"\n" * 20_000, b"A" * 5000, b"ERROR\n", b"ERR\nOK\n")
    return [rng.choice((*BOMBS, *more))]


SPOIL_BYTES: tuple[Callable[[random.Random, Frames], Frames], ...] = (
    flip, flip, cut, lengthen, splice, noise, digits, digits, text_bomb,
)  # fmt: skip
