"""Wire protocol v1: what is inside the ZeroMQ frames. No sockets here.

Every message is ``[topic, map]`` or ``[topic, map, payload]``; maps are msgpack with string keys
and int64 values unless said. Whatever breaks these rules raises :class:`WireError`, which the
receiving end counts and skips. Nothing is allocated beyond the stated limits, whatever arrives.

Maps whose keys are fixed are checked while they are parsed, by msgspec: a spike message comes once
a millisecond, and what is looked at in Python costs several times more than that. Statuses and
other notes, whose keys are not, are msgpack's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgpack
import msgspec
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

Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_encode = msgspec.msgpack.Encoder().encode


class _Spikes(msgspec.Struct, gc=False):
    v: Int64
    epoch: Int64
    seq: Int64
    first: Int64
    end: Int64
    rate: float
    n: Int64
    sent_ns: Int64


class _Source(msgspec.Struct, gc=False):
    v: Int64
    epoch: Int64
    rate: float
    session: str
    units: list[str]


class _Behaviour(msgspec.Struct, gc=False):
    v: Int64
    epoch: Int64
    seq: Int64
    first: Int64
    rate: float
    n: Int64
    sent_ns: Int64


class _Event(msgspec.Struct, gc=False):
    v: Int64
    epoch: Int64
    sample: Int64
    kind: str
    value: Any = None


class _Decoded(msgspec.Struct, gc=False):
    v: Int64
    probe: str
    epoch: Int64
    bin: Int64
    end: Int64
    values: list[float]
    flags: Int64
    spikes: Int64
    late: Int64
    unknown: Int64
    lost: Int64
    model: str
    stamps: dict[str, Int64]


_SPIKES = msgspec.msgpack.Decoder(_Spikes)
_SOURCE = msgspec.msgpack.Decoder(_Source)
_BEHAVIOUR = msgspec.msgpack.Decoder(_Behaviour)
_EVENT = msgspec.msgpack.Decoder(_Event)
_DECODED = msgspec.msgpack.Decoder(_Decoded)
T = TypeVar("T")


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
    header = _Spikes(
        VERSION, batch.epoch, batch.seq, batch.first, batch.end, batch.rate, len(batch.records_S),
        batch.sent_ns,
    )  # fmt: skip
    return [topic("spikes", probe), _encode(header), batch.records_S.tobytes()]


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
    said = _parse(_SPIKES, header)
    first, end, n, rate = said.first, said.end, said.n, said.rate
    _check_version(said.v)
    if not MIN_RATE <= rate <= MAX_RATE:
        raise WireError(f"rate {rate!r}; samples per second were expected")
    if not 0 <= first <= end < MAX_SAMPLE:
        raise WireError(f"samples [{first}, {end}); 0 <= first <= end was expected")
    if end - first > MAX_MESSAGE_S * rate:
        raise WireError(f"samples [{first}, {end}); at most {MAX_MESSAGE_S:g} s were expected")
    if said.seq < 0 or not 0 <= n <= MAX_SPIKES:
        raise WireError(f"seq {said.seq}, n {n}; 0 <= seq and 0 <= n <= {MAX_SPIKES} were expected")
    if memoryview(payload).nbytes != n * SPIKE_DTYPE.itemsize:
        raise WireError(f"{memoryview(payload).nbytes} bytes of payload for n = {n} spikes")
    records = np.frombuffer(payload, SPIKE_DTYPE)
    return SpikeBatch(said.epoch, said.seq, first, end, rate, said.sent_ns, received_ns, records)


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
    return [topic("source", probe), _encode(_Source(VERSION, epoch, rate, session, list(units)))]


def unpack_source(header: bytes) -> tuple[str, float, list[str]]:
    """Session id, rate and unit ids of a source announcement.

    Raises
    ------
    WireError
        If it is not one.
    """
    said = _parse(_SOURCE, header, MAX_SOURCE_BYTES)
    _check_version(said.v)
    if not MIN_RATE <= said.rate <= MAX_RATE:
        raise WireError(f"rate {said.rate!r}; samples per second were expected")
    if len(set(said.units)) != len(said.units):
        raise WireError("a unit id occurs twice; each once was expected")
    return said.session, said.rate, said.units


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
    header = _Behaviour(
        VERSION, batch.epoch, batch.seq, batch.first, batch.rate, len(batch.values), batch.sent_ns
    )
    return [topic("behaviour", batch.name), _encode(header), batch.values.tobytes()]


def unpack_behaviour(name: str, header: bytes, payload: Any) -> BehaviourBatch:
    """Parse and check one message of a behaviour.

    Raises
    ------
    WireError
        If it is not one, or is longer than ``MAX_MESSAGE_S``.
    """
    said = _parse(_BEHAVIOUR, header)
    seq, first, n, rate = said.seq, said.first, said.n, said.rate
    _check_version(said.v)
    if not 0 < rate <= MAX_RATE:
        raise WireError(f"rate {rate!r}; values per second were expected")
    if seq < 0 or not 0 <= first < MAX_SAMPLE or not 0 <= n <= MAX_VALUES:
        raise WireError(f"seq {seq}, first {first}, n {n}; 0 <= n <= {MAX_VALUES} was expected")
    if n > MAX_MESSAGE_S * rate + 1:
        raise WireError(f"{n} values at {rate:g} Hz; at most {MAX_MESSAGE_S:g} s were expected")
    if memoryview(payload).nbytes != 4 * n:
        raise WireError(f"{memoryview(payload).nbytes} bytes of payload for n = {n} values")
    values = np.frombuffer(payload, "<f4")
    return BehaviourBatch(name, said.epoch, seq, first, rate, values, said.sent_ns)


def pack_event(probe: str, event: TaskEvent) -> list[bytes]:
    """Frames of one task event."""
    said = _Event(VERSION, event.epoch, event.sample, event.kind, event.value)
    return [topic("events", probe), _encode(said)]


def unpack_event(header: bytes) -> TaskEvent:
    """Parse and check one task event.

    Raises
    ------
    WireError
        If it is not one.
    """
    said = _parse(_EVENT, header)
    _check_version(said.v)
    if not 0 <= said.sample < MAX_SAMPLE:
        raise WireError(
            f"event {said.kind!r} at sample {said.sample}; a sample of the probe was expected"
        )
    return TaskEvent(said.epoch, said.sample, said.kind, said.value)


def pack_decoded(frame: DecodedFrame) -> list[bytes]:
    """Frames of one decoded bin."""
    said = _Decoded(
        VERSION, frame.probe, frame.epoch, frame.bin, frame.end, frame.values_V.tolist(),
        frame.flags, frame.spikes, frame.late, frame.unknown, frame.lost, frame.model, frame.stamps,
    )  # fmt: skip
    return [topic("decoded", frame.probe), _encode(said)]


def unpack_decoded(header: bytes) -> DecodedFrame:
    """Parse one decoded bin.

    Raises
    ------
    WireError
        If it is not one.
    """
    said = _parse(_DECODED, header)
    _check_version(said.v)
    try:
        with np.errstate(over="raise"):
            values = np.array(said.values, np.float32)
    except ArithmeticError:
        raise WireError("values beyond those of float32") from None
    return DecodedFrame(
        said.probe, said.epoch, said.bin, said.end, values, said.flags, said.spikes, said.late,
        said.unknown, said.lost, said.model, said.stamps,
    )  # fmt: skip


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


def _parse(decoder: msgspec.msgpack.Decoder[T], header: bytes, limit: int = MAX_HEADER_BYTES) -> T:
    """A map of fixed keys; others in it are passed over."""
    if len(header) > limit:
        raise WireError(f"a header of {len(header)} bytes; at most {limit} were expected")
    try:
        return decoder.decode(header)
    except (ValueError, RecursionError) as error:  # msgspec's own, and of text that is not UTF-8
        raise WireError(f"a header that breaks the protocol: {error}") from None


def _check_version(v: int) -> None:
    if v != VERSION:
        raise WireError(f"protocol version {v}; {VERSION} was expected: update the older side")


def empty_records() -> NDArray[np.void]:
    """No spikes."""
    return np.zeros(0, SPIKE_DTYPE)
