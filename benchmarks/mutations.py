"""Ways to spoil a message: a list of frames, each bytes. Seeded, and cheap: millions are made.

Some know nothing of what they spoil (bits, lengths, order), others take the map in a frame apart
and put something absurd into it, so that what is wrong lies deeper.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

Frames = list[bytes]

BOMBS = (
    b"\x91" * 3000,  # arrays in arrays
    b"\x81\xa1a" * 3000,  # maps in maps
    b"\xdd\xff\xff\xff\xff",  # an array of four milliards, and the like
    b"\xdf\xff\xff\xff\xff\xa1a\x01",
    b"\xc6\xff\xff\xff\xffabc",
    b"\xdb\xff\xff\xff\xffabc",
    b"\xc9\xff\xff\xff\xff\x01abc",
    b"\x81\xa1v\xa3\xff\xfe\xfd",  # no UTF-8
    b"\x81\xd7\xff" + b"\xff" * 8 + b"\x01",  # a date as a key
    b"\x81\x90\x01",
    b"\xd6\xff" + b"\xff" * 4,
    b"\xc1",
    b"",
    b"{" * 3000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b'{"type":"spike","message_num":1e999}',
    b'{"type":"data","content":null}',
    b'"\\ud800"',
    b'{"\\ud800":1}',
    b"\xff\xfe{\x00}\x00",
    b"NaN",
    b"-" + b"9" * 4000,
    b" " * 70_000,
)
ODD: tuple[Any, ...] = (
    0, -1, 1, 255, 65_536, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) + 1, 1 << 60, (1 << 63) - 1,
    -(1 << 63), (1 << 64) - 1, 0.0, -0.0, 0.5, 1e-300, 1e300, float("nan"), float("inf"),
    float("-inf"), True, False, None, "", "x", "x" * 300, "\u0000", [], [1], {}, {"a": 1}, b"",
)  # fmt: skip


def _which(rng: random.Random, frames: Frames) -> int:
    return rng.randrange(len(frames)) if frames else 0


def flip(rng: random.Random, frames: Frames) -> Frames:
    """A few bits are others."""
    at = _which(rng, frames)
    if not frames[at]:
        return frames
    spoiled = bytearray(frames[at])
    for _ in range(rng.choice((1, 1, 2, 8))):
        spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
    return [*frames[:at], bytes(spoiled), *frames[at + 1 :]]


def cut(rng: random.Random, frames: Frames) -> Frames:
    """A frame is cut short."""
    at = _which(rng, frames)
    return [*frames[:at], frames[at][: rng.randrange(len(frames[at]) + 1)], *frames[at + 1 :]]


def lengthen(rng: random.Random, frames: Frames) -> Frames:
    """A frame has something behind it."""
    at = _which(rng, frames)
    return [*frames[:at], frames[at] + rng.randbytes(rng.randrange(1, 40)), *frames[at + 1 :]]


def splice(rng: random.Random, frames: Frames) -> Frames:
    """A piece of a frame comes twice, or not at all."""
    at = _which(rng, frames)
    frame = frames[at]
    low, high = sorted((rng.randrange(len(frame) + 1), rng.randrange(len(frame) + 1)))
    middle = b"" if rng.random() < 0.5 else frame[low:high] * 2
    return [*frames[:at], frame[:low] + middle + frame[high:], *frames[at + 1 :]]


def lose_frame(rng: random.Random, frames: Frames) -> Frames:
    """A frame is missing."""
    at = _which(rng, frames)
    return [*frames[:at], *frames[at + 1 :]] or [b""]


def add_frame(rng: random.Random, frames: Frames) -> Frames:
    """A frame too many."""
    at = rng.randrange(len(frames) + 1)
    extra = rng.choice((b"", b"x", frames[0], rng.randbytes(20)))
    return [*frames[:at], extra, *frames[at:]]


def turn_round(rng: random.Random, frames: Frames) -> Frames:
    """The frames in another order."""
    return frames[::-1]


def noise(rng: random.Random, frames: Frames) -> Frames:
    """A frame of random bytes."""
    at = _which(rng, frames)
    return [*frames[:at], rng.randbytes(rng.choice((1, 3, 16, 100))), *frames[at + 1 :]]


def bomb(rng: random.Random, frames: Frames) -> Frames:
    """A frame that was made to hurt whoever parses it."""
    at = min(1, len(frames) - 1) if rng.random() < 0.8 else _which(rng, frames)
    return [*frames[:at], rng.choice(BOMBS), *frames[at + 1 :]]


def twist(rng: random.Random, frames: Frames) -> Frames:
    """A field of the map has an absurd value, another name, or is not there."""
    at = next((n for n, frame in enumerate(frames) if frame[:1] == b"{"), 1)
    if at >= len(frames):
        return flip(rng, frames)
    text = frames[at][:1] == b"{"
    try:
        fields = json.loads(frames[at]) if text else msgpack.unpackb(frames[at])
    except (ValueError, RecursionError, msgpack.UnpackException):
        return flip(rng, frames)
    if not isinstance(fields, dict) or not fields:
        return flip(rng, frames)
    holder = fields
    inner = [value for value in fields.values() if isinstance(value, dict) and value]
    if inner and rng.random() < 0.7:
        holder = rng.choice(inner)
    key = rng.choice(list(holder))
    how = rng.random()
    if how < 0.15:
        del holder[key]
    elif how < 0.25:
        holder[key + "\u00fc"] = holder.pop(key)
    elif how < 0.35 and isinstance(holder[key], int):
        holder[key] += rng.choice((-1, 1, 1000, 1 << 40))
    elif how < 0.4:
        nested: Any = holder[key]
        for _ in range(rng.choice((3, 200, 600))):
            nested = [nested]
        holder[key] = nested
    else:
        odd = rng.choice(ODD)
        holder[key] = "bytes" if text and isinstance(odd, bytes) else odd
    try:
        packed = json.dumps(fields).encode() if text else msgpack.packb(fields)
    except (ValueError, OverflowError, RecursionError):
        return flip(rng, frames)
    return [*frames[:at], packed, *frames[at + 1 :]]


Way = Callable[[random.Random, Frames], Frames]
SPOIL: Sequence[Way] = (
    flip, flip, flip, cut, lengthen, splice, lose_frame, add_frame, turn_round, noise, bomb, twist,
    twist, twist, twist,
)  # fmt: skip


class Fuzzer:
    """Spoils some of a stream of messages, repeats some, and lets some change places.

    Parameters
    ----------
    rng : random.Random
    share : float
        Of the messages that are spoiled.
    ways : sequence of callable
        How.
    """

    def __init__(self, rng: random.Random, share: float = 0.6, ways: Sequence[Way] = SPOIL) -> None:
        self._rng, self._share, self._ways = rng, share, ways
        self._old: list[Frames] = []
        self._held: Frames | None = None

    def take(self, frames: Frames) -> list[Frames]:
        """The messages that go out in the place of this one."""
        rng = self._rng
        if len(self._old) < 64:
            self._old.append(frames)
        elif rng.random() < 0.02:
            self._old[rng.randrange(64)] = frames
        how = rng.random()
        if how < 0.02:
            return [frames, rng.choice(self._old)]
        if how < 0.03:
            return [frames, frames]
        if how < 0.04 and self._held is None:
            self._held = frames
            return []
        out = [frames]
        if rng.random() < self._share:
            out = [rng.choice(self._ways)(rng, frames)]
            if rng.random() < 0.05:
                out = [rng.choice(self._ways)(rng, out[0])]
        if self._held is not None:
            out.append(self._held)
            self._held = None
        return out
