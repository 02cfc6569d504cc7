"""What Open Ephys says over ZeroMQ: the messages of two of its plugins, read and written.

*ZMQ Interface*: ``[envelope, JSON header, payload]``, where the envelope is ``DATA`` (continuous
samples) or ``EVENT`` (spikes and TTL events) with a NUL behind it, and every header carries a
``message_num`` that counts all messages of an acquisition from 1. *Event Broadcaster*:
``[2-byte kind, JSON or packed binary]``, without a counter. No sockets here.

Whatever breaks the format raises :class:`Malformed`, whose ``kind`` the receiving end counts.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import msgspec

from rt_neds.errors import ConfigError, WireError
from rt_neds.wire import MAX_RATE, MAX_SAMPLE, MIN_RATE

DATA, EVENT = b"DATA\0", b"EVENT\0"
TTL_TYPE = 3
MAX_HEADER_BYTES = 64 * 1024
MAX_PAYLOAD_BYTES = 1 << 20  # a block of 262 144 samples; Neuropixels blocks have under 2000
MAX_SORTED_ID = 0xFFFF
KINDS = ("envelope", "frames", "json", "field", "payload")

_TTL = struct.Struct("<BBQ")  # line, state, word of the first 64 lines
_RAW_BASE = struct.Struct("<BBHHHqd")  # type, subtype, processor, stream, channel, sample, seconds
_RAW_SORTED_ID = struct.Struct("<H")


class Malformed(WireError):
    """A message that breaks the format.

    Attributes
    ----------
    kind : str
        One of ``KINDS``: what was wrong first.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Spike(NamedTuple):
    """One spike. ``number`` is the message's (None where the plugin counts none)."""

    number: int | None
    stream: str
    electrode: str
    sorted_id: int
    sample: int


class Event(NamedTuple):
    """One event; ``line`` and ``state`` are None unless it is a TTL."""

    number: int | None
    stream: str
    sample: int
    line: int | None
    state: int | None


class Block(NamedTuple):
    """One channel's samples ``[first, end)`` of one block; the samples themselves are not kept."""

    number: int
    stream: str
    channel: int
    first: int
    end: int
    rate: float


Message = Spike | Event | Block

_Number = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]
_Sample = Annotated[int, msgspec.Meta(ge=0, lt=MAX_SAMPLE)]
_Name = Annotated[str, msgspec.Meta(max_length=256)]
_SortedId = Annotated[int, msgspec.Meta(ge=0, le=MAX_SORTED_ID)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_PAYLOAD_BYTES)]
_Rate = Annotated[float, msgspec.Meta(ge=MIN_RATE, le=MAX_RATE)]


class _SpikeBody(msgspec.Struct):
    stream: _Name
    electrode: _Name
    sample_num: _Sample
    num_channels: Annotated[int, msgspec.Meta(ge=1, le=64)]
    num_samples: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    sorted_id: _SortedId = 0


class _SpikeHead(msgspec.Struct, tag="spike", tag_field="type"):
    message_num: _Number
    spike: _SpikeBody


class _EventBody(msgspec.Struct):
    stream: _Name
    type: int
    sample_num: _Sample


class _EventHead(msgspec.Struct, tag="event", tag_field="type"):
    message_num: _Number
    content: _EventBody
    data_size: _Bytes = 0


class _DataBody(msgspec.Struct):
    stream: _Name
    channel_num: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
    num_samples: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAYLOAD_BYTES // 4)]
    sample_num: _Sample
    sample_rate: _Rate


class _DataHead(msgspec.Struct, tag="data", tag_field="type"):
    message_num: _Number
    content: _DataBody
    data_size: _Bytes


class _BroadcastSpike(msgspec.Struct, tag="spike", tag_field="event_type"):
    stream: _Name
    electrode: _Name
    sample_number: _Sample
    sorted_id: _SortedId = 0


class _BroadcastTTL(msgspec.Struct, tag="ttl", tag_field="event_type"):
    stream: _Name
    sample_number: _Sample
    line: Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
    state: bool | int


_header = msgspec.json.Decoder(_SpikeHead | _EventHead | _DataHead)
_broadcast = msgspec.json.Decoder(_BroadcastSpike | _BroadcastTTL)


# -- read ----------------------------------------------------------------------------------------


def parse(frames: Sequence[bytes]) -> Message:
    """Read one message of the ZMQ Interface.

    Parameters
    ----------
    frames : sequence of bytes

    Returns
    -------
    Spike, Event or Block

    Raises
    ------
    Malformed
        Another envelope, a missing or superfluous frame, a header that is not JSON or lacks a
        field or has an absurd one, a payload of another length than the header says.
    """
    if not frames or frames[0] not in (DATA, EVENT):
        raise Malformed("envelope", f"envelope {frames[0][:20] if frames else b''!r}")
    if not 2 <= len(frames) <= 3:
        raise Malformed("frames", f"{len(frames)} frames; 2 or 3 were expected")
    head = _decode(_header, frames[1])
    payload = frames[2] if len(frames) == 3 else b""
    if isinstance(head, _DataHead) != (frames[0] == DATA):
        raise Malformed("envelope", f"a {type(head).__name__} under {frames[0]!r}")
    if isinstance(head, _SpikeHead):
        spike = head.spike
        _check_size(payload, 4 * spike.num_channels * spike.num_samples)
        return Spike(
            head.message_num, spike.stream, spike.electrode, spike.sorted_id, spike.sample_num
        )
    _check_size(payload, head.data_size)
    if isinstance(head, _DataHead):
        data = head.content
        _check_size(payload, 4 * data.num_samples)
        first = data.sample_num
        return Block(
            head.message_num,
            data.stream,
            data.channel_num,
            first,
            first + data.num_samples,
            data.sample_rate,
        )
    event = head.content
    line = state = None
    if event.type == TTL_TYPE:
        _check_size(payload, _TTL.size)
        line, state, _ = _TTL.unpack(payload)
    return Event(head.message_num, event.stream, event.sample_num, line, state)


def parse_broadcast(frames: Sequence[bytes]) -> Message:
    """Read one message of the Event Broadcaster, in whichever of its two formats it is.

    The packed format names neither stream nor electrode: their numbers become the names.

    Raises
    ------
    Malformed
    """
    if not frames or frames[0] not in (b"\0\0", b"\1\0"):
        raise Malformed("envelope", f"kind {frames[0][:20] if frames else b''!r}")
    if len(frames) != 2:
        raise Malformed("frames", f"{len(frames)} frames; 2 were expected")
    is_spike, body = frames[0] == b"\1\0", frames[1]
    if body[:1] == b"{":
        head = _decode(_broadcast, body)
        if isinstance(head, _BroadcastSpike) != is_spike:
            raise Malformed("envelope", f"a {type(head).__name__} under {frames[0]!r}")
        if isinstance(head, _BroadcastSpike):
            return Spike(None, head.stream, head.electrode, head.sorted_id, head.sample_number)
        return Event(None, head.stream, head.sample_number, head.line, int(head.state))
    base = _RAW_BASE.size
    if len(body) > MAX_PAYLOAD_BYTES or len(body) < base + _RAW_SORTED_ID.size:
        raise Malformed("payload", f"{len(body)} bytes of packed event")
    _, _, _, stream, electrode, sample, _ = _RAW_BASE.unpack_from(body)
    if not 0 <= sample < MAX_SAMPLE:
        raise Malformed("field", f"sample {sample}")
    if not is_spike:
        _check_size(body, base + _TTL.size)
        line, state, _ = _TTL.unpack_from(body, base)
        return Event(None, str(stream), sample, line, state)
    (sorted_id,) = _RAW_SORTED_ID.unpack_from(body, base)
    floats = len(body) - base - _RAW_SORTED_ID.size
    if floats % 4 or floats < 8:  # at least one threshold and one sample
        raise Malformed("payload", f"{floats} bytes of thresholds and waveform")
    return Spike(None, str(stream), str(electrode), sorted_id, sample)


def _decode(decoder: msgspec.json.Decoder[Any], text: bytes) -> Any:
    if len(text) > MAX_HEADER_BYTES:
        raise Malformed("json", f"a header of {len(text)} bytes")
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        raise Malformed("field", str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed("json", f"a header that is not JSON ({type(error).__name__})") from None


def _check_size(payload: bytes, expected: int) -> None:
    if len(payload) != expected:
        raise Malformed("payload", f"{len(payload)} bytes of payload; {expected} were expected")


# -- names ---------------------------------------------------------------------------------------


def unit_name(electrode: str, sorted_id: int) -> str:
    """Unit id of a spike: the electrode's name, and ``#<sorted_id>`` where it was sorted."""
    return f"{electrode}#{sorted_id}" if sorted_id else electrode


def electrode_of(unit: str) -> tuple[str, int]:
    """Electrode and sorted id (0 for none) of a unit id: the way back from :func:`unit_name`."""
    electrode, found, number = unit.rpartition("#")
    plain = number.isascii() and number.isdigit() and not number.startswith("0")
    if found and electrode and plain and int(number[:6]) <= MAX_SORTED_ID and len(number) < 6:
        return electrode, int(number)
    return unit, 0


class Address(NamedTuple):
    """Where Open Ephys is, and which of its streams is wanted (empty: whichever is ours)."""

    host: str
    port: int
    stream: str
    broadcaster: bool


def is_openephys(url: str) -> bool:
    """Whether a source URL is one of Open Ephys."""
    return url.partition("://")[0] in ("openephys", "openephys-events")


def parse_url(url: str) -> Address:
    """Read ``openephys://HOST:PORT[?stream=NAME]`` or ``openephys-events://HOST:PORT[?...]``.

    Raises
    ------
    ConfigError
    """
    parts = urlsplit(url)
    ports = {"openephys": 5556, "openephys-events": 5557}
    query = parse_qs(parts.query, keep_blank_values=True)
    try:
        default = ports[parts.scheme]
        port = parts.port or default
    except (ValueError, KeyError):
        port = 0
    if not port or not parts.hostname or parts.path.strip("/") or set(query) - {"stream"}:
        raise ConfigError(
            f"source {url}; expected openephys://HOST:5556 (ZMQ Interface) or "
            "openephys-events://HOST:5557 (Event Broadcaster), with ?stream=NAME for one of several"
        )
    stream = query.get("stream", [""])[0]
    return Address(parts.hostname, port, stream, parts.scheme == "openephys-events")


# -- write ---------------------------------------------------------------------------------------


def pack_spike(
    spike: Spike, waveform: bytes, threshold: float, *, node: int, wall_ms: int
) -> list[bytes]:
    """Frames of a spike on one channel, as the ZMQ Interface sends it."""
    body = {
        "stream": spike.stream,
        "source_node": node,
        "electrode": spike.electrode,
        "sample_num": spike.sample,
        "num_channels": 1,
        "num_samples": len(waveform) // 4,
        "sorted_id": spike.sorted_id,
        "threshold": [threshold],
    }
    head = {"message_num": spike.number, "type": "spike", "spike": body, "timestamp": wall_ms}
    return [EVENT, _pretty(head), waveform]


def pack_event(event: Event, word: int, *, node: int, wall_ms: int) -> list[bytes]:
    """Frames of a TTL event, as the ZMQ Interface sends it; ``word``: all lines after it."""
    body = {
        "stream": event.stream,
        "source_node": node,
        "type": TTL_TYPE,
        "sample_num": event.sample,
    }
    head = {
        "message_num": event.number,
        "type": "event",
        "content": body,
        "data_size": _TTL.size,
        "timestamp": wall_ms,
    }
    return [EVENT, _pretty(head), _TTL.pack(event.line, event.state, word)]


def pack_block(block: Block, samples: bytes, *, wall_ms: int) -> list[bytes]:
    """Frames of one channel of one block, as the ZMQ Interface sends it; ``samples``: float32."""
    body = {
        "stream": block.stream,
        "channel_num": block.channel,
        "channel_name": f"CH{block.channel + 1}",
        "num_samples": block.end - block.first,
        "sample_num": block.first,
        "sample_rate": block.rate,
    }
    head = {
        "message_num": block.number,
        "type": "data",
        "content": body,
        "data_size": len(samples),
        "timestamp": wall_ms,
    }
    return [DATA, _pretty(head), samples]


def pack_broadcast_spike(spike: Spike, amplitude: float, rate: float, *, node: int) -> list[bytes]:
    """Frames of a spike on one channel, as the Event Broadcaster sends it in JSON."""
    body = {
        "event_type": "spike",
        "stream": spike.stream,
        "source_node": node,
        "electrode": spike.electrode,
        "num_channels": 1,
        "sample_rate": rate,
        "sample_number": spike.sample,
        "sorted_id": spike.sorted_id,
        "amp1": amplitude,
    }
    return [b"\1\0", _pretty(body)]


def pack_broadcast_event(event: Event, rate: float, *, node: int) -> list[bytes]:
    """Frames of a TTL event, as the Event Broadcaster sends it in JSON."""
    body = {
        "event_type": "ttl",
        "stream": event.stream,
        "source_node": node,
        "sample_rate": rate,
        "channel_name": "trials",
        "sample_number": event.sample,
        "line": event.line,
        "state": bool(event.state),
    }
    return [b"\0\0", _pretty(body)]


def heartbeat(application: str, uuid: str) -> bytes:
    """What a client of the ZMQ Interface sends every two seconds to be listed as alive."""
    return json.dumps({"application": application, "uuid": uuid, "type": "heartbeat"}).encode()


def reply_to(request: bytes) -> bytes:
    """What the ZMQ Interface answers to a client."""
    try:
        asked = json.loads(request) if len(request) <= MAX_HEADER_BYTES else None
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        return b"JSON message could not be read"
    is_event = asked.get("type") == "event"
    return b"message correctly parsed" if is_event else b"heartbeat received"


def _pretty(fields: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(fields), indent=2)
