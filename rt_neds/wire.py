"""Wire protocol v1: what is inside the ZeroMQ frames. No sockets here.

Every message is ``[topic, map]`` or ``[topic, map, payload]``; maps are msgpack with string keys
and int64 values unless said. Whatever breaks these rules raises :class:`WireError`, which the
receiving end counts and skips. Nothing is allocated beyond the stated limits, whatever arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from rt_neds.errors import WireError
from rt_neds.frames import SPIKE_DTYPE, DecodedFrame, SpikeBatch

VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
MAX_SOURCE_BYTES = 4 * 1024 * 1024  # a source announcement lists every unit id
MAX_SPIKES = 1 << 18  # 4 MiB of records: ten seconds of a very loud probe in one message
MAX_MESSAGE_S = 10.0  # a longer one would have bins by the thousand published at once
LEAP_S = 60.0
LEAP_MESSAGES = 60_000
"""What leaps further ahead is believed once the next message agrees: one absurd number in one
message must not leave all that follow behind the watermark."""
MAX_VALUES = 1 << 16  # of a behaviour in one message
MAX_NAMED = 50  # units that a status names: all of a probe's would be more than it may be long
MIN_RATE, MAX_RATE = 1e3, 1e7  # no probe is slower; a bin of such a one would have no samples
MAX_SAMPLE = 1 << 50  # a thousand years at 30 kHz; leaves room for arithmetic in int64

DEFAULT_SPIKES = "tcp://127.0.0.1:5570"
DEFAULT_DECODED = "tcp://127.0.0.1:5580"

_SPIKE_KEYS = ("v", "epoch", "seq", "first", "end", "n", "sent_ns")


def topic(kind: str, name: str) -> bytes:
    """Topic frame, such as ``spikes/imec0``."""
    return f"{kind}/{name}".encode()


def pack_spikes(probe: str, batch: SpikeBatch) -> list[bytes]:
    """Frames of one spike message.

    Parameters
    ----------
    probe : str
    batch : SpikeBatch
        Its ``records_S`` become the payload as they are.

    Returns
    -------
    list of bytes
        Topic, map, payload.
    """
    header = {
        "v": VERSION,
        "epoch": batch.epoch,
        "seq": batch.seq,
        "first": batch.first,
        "end": batch.end,
        "rate": batch.rate,
        "n": len(batch.records_S),
        "sent_ns": batch.sent_ns,
    }
    return [topic("spikes", probe), msgpack.packb(header), batch.records_S.tobytes()]


def unpack_spikes(header: bytes, payload: Any, received_ns: int) -> SpikeBatch:
    """Parse and check one spike message.

    Parameters
    ----------
    header : bytes
        The msgpack map.
    payload : buffer
        ``n`` records of SPIKE_DTYPE; the batch views it, nothing is copied.
    received_ns : int
        Host time at which it came.

    Returns
    -------
    SpikeBatch

    Raises
    ------
    WireError
        Not a map, a key missing or of another type, another version, ``n`` that disagrees with the
        payload, negative or absurd samples in the map, more of them than ``MAX_MESSAGE_S``.
    """
    fields = unpack_map(header)
    v, epoch, seq, first, end, n, sent_ns = _integers(fields, _SPIKE_KEYS)
    rate = fields.get("rate")
    if not isinstance(rate, (int, float)) or not MIN_RATE <= rate <= MAX_RATE:
        raise WireError(f"rate {rate!r}; samples per second were expected")
    if v != VERSION:
        raise WireError(f"protocol version {v}; {VERSION} was expected: update the older side")
    if not 0 <= first <= end < MAX_SAMPLE:
        raise WireError(f"samples [{first}, {end}); 0 <= first <= end was expected")
    if end - first > MAX_MESSAGE_S * rate:
        raise WireError(f"samples [{first}, {end}); at most {MAX_MESSAGE_S:g} s were expected")
    if seq < 0 or not 0 <= n <= MAX_SPIKES:
        raise WireError(f"seq {seq}, n {n}; 0 <= seq and 0 <= n <= {MAX_SPIKES} were expected")
    if memoryview(payload).nbytes != n * SPIKE_DTYPE.itemsize:
        raise WireError(f"{memoryview(payload).nbytes} bytes of payload for n = {n} spikes")
    records = np.frombuffer(payload, SPIKE_DTYPE)
    return SpikeBatch(epoch, seq, first, end, float(rate), sent_ns, received_ns, records)


def leaps(batch: SpikeBatch, next_seq: int, end: int) -> bool:
    """Whether a message is so far ahead of what its run has come to that one must not believe it.

    Parameters
    ----------
    batch : SpikeBatch
    next_seq, end : int
        Number of the message that is due; first sample after those that came.
    """
    return batch.seq - next_seq > LEAP_MESSAGES or batch.first - end > LEAP_S * batch.rate


def follows(leap: SpikeBatch, batch: SpikeBatch) -> bool:
    """Whether a message is a little later than one that leapt, of the same acquisition."""
    return (
        batch.epoch == leap.epoch
        and batch.seq > leap.seq
        and batch.first >= leap.end
        and not leaps(batch, leap.seq, leap.end)
    )


def pack_source(
    probe: str, *, epoch: int, rate: float, session: str, units: Sequence[str]
) -> list[bytes]:
    """Announcement of who sends: the unit ids that the ``unit`` field of the records indexes."""
    fields = {"v": VERSION, "epoch": epoch, "rate": rate, "session": session, "units": list(units)}
    return [topic("source", probe), msgpack.packb(fields)]


def unpack_source(header: bytes) -> tuple[str, float, list[str]]:
    """Session id, rate and unit ids of a source announcement.

    Raises
    ------
    WireError
        If it is not one.
    """
    fields = unpack_map(header, MAX_SOURCE_BYTES)
    session, rate, units = fields.get("session"), fields.get("rate"), fields.get("units")
    if fields.get("v") != VERSION:
        raise WireError(f"protocol version {fields.get('v')}; {VERSION} was expected")
    if not isinstance(session, str) or not isinstance(units, list):
        raise WireError("a source announcement without session or units")
    if not isinstance(rate, (int, float)) or not MIN_RATE <= rate <= MAX_RATE:
        raise WireError(f"rate {rate!r}; samples per second were expected")
    if not all(isinstance(unit, str) for unit in units) or len(set(units)) != len(units):
        raise WireError("unit ids must be strings, each once")
    return session, float(rate), units


@dataclass(frozen=True, slots=True)
class BehaviourBatch:
    """Values of one behaviour as observed.

    Attributes
    ----------
    name : str
    epoch, seq : int
        As of spikes; behaviours count their own messages.
    first : int
        Probe sample of the first value.
    rate : float
        Values per second.
    values : ndarray of float32
        In the unit of the behaviour; NaN where it is not known.
    """

    name: str
    epoch: int
    seq: int
    first: int
    rate: float
    values: NDArray[np.float32]
    sent_ns: int = 0


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """Something that happened in the task: from ``sample`` on ``kind`` is ``value``."""

    epoch: int
    sample: int
    kind: str
    value: Any


def pack_behaviour(batch: BehaviourBatch) -> list[bytes]:
    """Frames of one message of a behaviour."""
    header = {
        "v": VERSION,
        "epoch": batch.epoch,
        "seq": batch.seq,
        "first": batch.first,
        "rate": batch.rate,
        "n": len(batch.values),
        "sent_ns": batch.sent_ns,
    }
    return [topic("behaviour", batch.name), msgpack.packb(header), batch.values.tobytes()]


def unpack_behaviour(name: str, header: bytes, payload: Any) -> BehaviourBatch:
    """Parse and check one message of a behaviour.

    Raises
    ------
    WireError
        If it is not one, or is longer than ``MAX_MESSAGE_S``.
    """
    fields = unpack_map(header)
    v, epoch, seq, first, n, sent_ns = _integers(
        fields, ("v", "epoch", "seq", "first", "n", "sent_ns")
    )
    rate = fields.get("rate")
    if v != VERSION:
        raise WireError(f"protocol version {v}; {VERSION} was expected: update the older side")
    if not isinstance(rate, (int, float)) or not 0 < rate <= MAX_RATE:
        raise WireError(f"rate {rate!r}; values per second were expected")
    if seq < 0 or not 0 <= first < MAX_SAMPLE or not 0 <= n <= MAX_VALUES:
        raise WireError(f"seq {seq}, first {first}, n {n}; 0 <= n <= {MAX_VALUES} was expected")
    if n > MAX_MESSAGE_S * rate + 1:
        raise WireError(f"{n} values at {rate:g} Hz; at most {MAX_MESSAGE_S:g} s were expected")
    if memoryview(payload).nbytes != 4 * n:
        raise WireError(f"{memoryview(payload).nbytes} bytes of payload for n = {n} values")
    return BehaviourBatch(
        name, epoch, seq, first, float(rate), np.frombuffer(payload, "<f4"), sent_ns
    )


def pack_event(probe: str, event: TaskEvent) -> list[bytes]:
    """Frames of one task event."""
    fields = {"epoch": event.epoch, "sample": event.sample, "kind": event.kind}
    return pack_map("events", probe, {**fields, "value": event.value})


def unpack_event(header: bytes) -> TaskEvent:
    """Parse and check one task event.

    Raises
    ------
    WireError
        If it is not one.
    """
    fields = unpack_map(header)
    v, epoch, sample = _integers(fields, ("v", "epoch", "sample"))
    if v != VERSION:
        raise WireError(f"protocol version {v}; {VERSION} was expected: update the older side")
    if not isinstance(fields.get("kind"), str) or not 0 <= sample < MAX_SAMPLE:
        raise WireError(f"event {fields.get('kind')!r} at sample {sample}; a name was expected")
    return TaskEvent(epoch, sample, fields["kind"], fields.get("value"))


def pack_decoded(frame: DecodedFrame) -> list[bytes]:
    """Frames of one decoded bin."""
    fields = {
        "v": VERSION,
        "probe": frame.probe,
        "epoch": frame.epoch,
        "bin": frame.bin,
        "end": frame.end,
        "values": frame.values_V.tolist(),
        "flags": frame.flags,
        "spikes": frame.spikes,
        "late": frame.late,
        "unknown": frame.unknown,
        "lost": frame.lost,
        "model": frame.model,
        "stamps": frame.stamps,
    }
    return [topic("decoded", frame.probe), msgpack.packb(fields)]


def unpack_decoded(header: bytes) -> DecodedFrame:
    """Parse one decoded bin.

    Raises
    ------
    WireError
        If it is not one.
    """
    fields = unpack_map(header)
    if fields.get("v") != VERSION:
        raise WireError(f"protocol version {fields.get('v')}; {VERSION} was expected")
    keys = ("epoch", "bin", "end", "flags", "spikes", "late", "unknown", "lost")
    epoch, bin_, end, flags, spikes, late, unknown, lost = _integers(fields, keys)
    try:
        with np.errstate(over="raise"):
            values = np.asarray(fields["values"], dtype=np.float32)
        stamps = {str(name): int(stamp) for name, stamp in fields["stamps"].items()}
        probe, model = str(fields["probe"]), str(fields["model"])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise WireError("a decoded frame without values, stamps, probe or model") from None
    return DecodedFrame(
        probe, epoch, bin_, end, values, flags, spikes, late, unknown, lost, model, stamps
    )


def pack_map(kind: str, name: str, fields: dict[str, Any]) -> list[bytes]:
    """Frames of a message that is only a map, such as ``status/imec0``."""
    return [topic(kind, name), msgpack.packb({"v": VERSION, **fields})]


def unpack_map(header: bytes, limit: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """Parse a msgpack map with string keys, of at most ``limit`` bytes.

    Raises
    ------
    WireError
        If it is not one.
    """
    if len(header) > limit:
        raise WireError(f"a header of {len(header)} bytes; at most {limit} were expected")
    try:
        fields = msgpack.unpackb(header, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"a header that is not msgpack ({type(error).__name__})") from None
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise WireError("a header that is not a map with string keys")
    return fields


def _integers(fields: dict[str, Any], keys: Sequence[str]) -> list[int]:
    values = []
    for key in keys:
        value = fields.get(key)
        if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            raise WireError(f"{key} is {value!r}; an int64 was expected")
        values.append(value)
    return values


def empty_records() -> NDArray[np.void]:
    """No spikes."""
    return np.zeros(0, SPIKE_DTYPE)
