"""Both ends of the decoded stream: what serve publishes, and what anyone who listens uses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from rt_neds.clock import monotonic_ns
from rt_neds.errors import StreamError, WireError
from rt_neds.frames import DecodedFrame
from rt_neds.stream.sockets import bind, check_port, next_message
from rt_neds.wire import (
    MAX_HEADER_BYTES,
    pack_decoded,
    pack_map,
    topic,
    unpack_decoded,
    unpack_map,
)

LINGER_MS = 1000
RECONNECT_MS = 10
"""A serve whose worker was replaced is back at once: no need to wait the usual 100 ms."""


class Publisher:
    """Sink that publishes decoded frames, and once a second the schema and the status.

    Parameters
    ----------
    endpoint : str
        Address to bind; loopback unless asked otherwise.
    probe : str
    """

    def __init__(self, endpoint: str, probe: str) -> None:
        self._probe = probe
        self._socket: zmq.Socket = zmq.Context.instance().socket(zmq.PUB)
        self._socket.set(zmq.LINGER, LINGER_MS)
        self._socket.set(zmq.SNDHWM, 20_000)
        bind(self._socket, endpoint)

    def write(self, frame: DecodedFrame) -> None:
        """Publish one decoded bin."""
        self._socket.send_multipart(pack_decoded(frame))

    def note(self, kind: str, fields: dict[str, Any]) -> None:
        """Publish a map under ``schema``, ``status`` or ``trigger``."""
        self._socket.send_multipart(pack_map(kind, self._probe, fields))

    def pass_on(self, parts: Sequence[bytes | bytearray]) -> None:
        """Publish a message that another process has packed."""
        self._socket.send_multipart(parts)

    def beside(self, probe: str) -> Publisher:
        """The same socket, for the notes of another probe."""
        other = copy.copy(self)
        other._probe = probe
        return other

    def close(self) -> None:
        """Close the socket once what was written has gone out."""
        self._socket.close()


def check_free(endpoint: str) -> None:
    """StreamError if an address cannot be bound: now, and not after all that takes long."""
    with zmq.Context() as context:  # its own, so that not even its threads are left
        socket: zmq.Socket = context.socket(zmq.PUB)
        bind(socket, endpoint)
        socket.close(linger=0)


def flush_sockets() -> None:
    """Wait until all that closed sockets hold has gone out, before a forked process ends."""
    zmq.Context.instance().term()


@dataclass(frozen=True)
class Note:
    """A schema, status or trigger message."""

    kind: str
    fields: dict[str, Any]


class DecodedListener:
    """Reads the decoded stream of one probe.

    Parameters
    ----------
    endpoint : str
        Address to connect to.
    probe : str
    kinds : tuple of str
        Topics to hear.

    Attributes
    ----------
    malformed : int
        Messages that broke the protocol and were skipped.
    """

    def __init__(
        self,
        endpoint: str,
        probe: str,
        kinds: tuple[str, ...] = ("decoded", "schema", "status", "trigger"),
    ) -> None:
        self.malformed = 0
        self._socket: zmq.Socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.RCVHWM, 100_000)
        self._socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.set(zmq.MAXMSGSIZE, 64 * MAX_HEADER_BYTES)
        self._kinds = {topic(kind, probe): kind for kind in kinds}
        for asked in self._kinds:
            self._socket.subscribe(asked)
        try:
            check_port(endpoint)
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            raise StreamError(
                f"cannot connect to {endpoint} ({error}); expected something like "
                "tcp://127.0.0.1:5580"
            ) from None

    def read(self, timeout_ms: int) -> DecodedFrame | Note | None:
        """The next message, or None if none came in time."""
        ends_ns = monotonic_ns() + timeout_ms * 1_000_000
        while (frames := next_message(self._socket, timeout_ms)) is not None:
            # Topics are heard by how they begin: imec1 is sent what is for imec10, too.
            kind = self._kinds.get(frames[0])
            if kind is not None and (message := self._unpack(kind, frames)) is not None:
                return message
            timeout_ms = max(0, (ends_ns - monotonic_ns()) // 1_000_000)
        return None

    def _unpack(self, kind: str, frames: list[bytes]) -> DecodedFrame | Note | None:
        try:
            if len(frames) != 2:
                raise WireError(f"{len(frames)} frames; two were expected")
            if kind == "decoded":
                return unpack_decoded(frames[1])
            return Note(kind, unpack_map(frames[1]))
        except WireError:
            self.malformed += 1
            return None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
