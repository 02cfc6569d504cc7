"""The connection to a SpikeGLX server: one question is out at a time; waits no longer than told."""

from __future__ import annotations

import errno
import select
import socket

from rt_neds.clock import monotonic_ns
from rt_neds.errors import StreamError
from rt_neds.spikeglx_wire import Question, Reply, ReplyReader

CONNECT_NS = 3_000_000_000
SILENT_NS = 2_000_000_000
"""A server that has not answered in full by then is gone."""
_PENDING = (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EALREADY)


class LineError(Exception):
    """The connection ended.

    Attributes
    ----------
    kind : {"refused", "unreachable", "disconnected", "silent"}
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


Where = tuple[socket.AddressFamily, tuple]


def look_up(host: str, port: int) -> Where:
    """Address of a host. To be done once, before anything is read: a name may take seconds.

    Of a name that has addresses of both kinds it is the IPv4 one, where SpikeGLX listens.

    Raises
    ------
    StreamError
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise StreamError(
            f"nobody knows the host {host}; expected a name or a number, such as "
            "spikeglx://192.168.1.5:4142"
        ) from None
    family, _, _, _, where = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, where


class Line:
    """A TCP connection that is being made, or is made.

    Parameters
    ----------
    where : (family, address)
        As :func:`look_up` gives it.

    Attributes
    ----------
    socket : socket.socket
    connected : bool
    """

    def __init__(self, where: Where) -> None:
        family, address = where
        self.connected = False
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._begun_ns = self._asked_ns = monotonic_ns()
        self._reader = ReplyReader()
        self._error = self.socket.connect_ex(address)

    def connect(self, wait_ns: int) -> bool:
        """Whether the connection is made; waits for it no longer than told.

        Raises
        ------
        LineError
        """
        if self.connected:
            return True
        if self._error in _PENDING:
            _, writable, failed = select.select([], [self.socket], [self.socket], wait_ns / 1e9)
            if not writable and not failed:
                if monotonic_ns() - self._begun_ns > CONNECT_NS:
                    raise LineError("unreachable")
                return False
            self._error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if self._error:
            raise LineError("refused" if self._error == errno.ECONNREFUSED else "unreachable")
        self.connected = True
        return True

    def ask(self, question: Question) -> None:
        """Send a question.

        Raises
        ------
        LineError, Malformed
        """
        self._reader.expect(question.fetch)
        line = question.command.encode() + b"\n"
        try:
            sent = self.socket.send(line)
        except OSError:
            raise LineError("disconnected") from None
        if sent < len(line):  # a few kilobytes into an empty buffer: whoever takes less is gone
            raise LineError("disconnected")
        self._asked_ns = monotonic_ns()

    def receive(self, wait_ns: int) -> Reply | None:
        """The reply, if it is whole within the time.

        Raises
        ------
        LineError, Malformed
        """
        until_ns = monotonic_ns() + wait_ns
        while True:
            reply = self._receive_some()
            if reply is not None:
                return reply
            now = monotonic_ns()
            if now - self._asked_ns > SILENT_NS:
                raise LineError("silent")
            if now >= until_ns:
                return None
            select.select([self.socket], [], [], (until_ns - now) / 1e9)

    def _receive_some(self) -> Reply | None:
        try:
            size = self.socket.recv_into(self._reader.space())
        except BlockingIOError:
            return None
        except OSError:
            raise LineError("disconnected") from None
        if not size:
            raise LineError("disconnected")
        reply = self._reader.took(size)
        return None if reply is None else reply._replace(received_ns=monotonic_ns())

    def close(self) -> None:
        """End the connection; the server needs no farewell."""
        self.socket.close()
