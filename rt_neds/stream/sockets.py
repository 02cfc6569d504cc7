"""What both ends of all streams do with ZeroMQ's sockets."""

from __future__ import annotations

import zmq

from rt_neds.errors import StreamError


def next_message(socket: zmq.Socket, timeout_ms: int) -> list[bytes] | None:
    """The next message, or None if none came in time.

    Woken inside the one call that takes it: to wait for the socket first and take from it then
    costs some microseconds more, of code that has left the caches meanwhile.
    """
    socket.set(zmq.RCVTIMEO, int(timeout_ms))
    try:
        return socket.recv_multipart()
    except zmq.Again:
        return None


def check_port(endpoint: str) -> None:
    """StreamError for a port that is none: ZeroMQ would take what is left of it in 16 bits."""
    port = endpoint.rpartition(":")[2]
    if port.isdigit() and not 0 < int(port) < 1 << 16:
        raise StreamError(f"{endpoint}: port {port}; 1 to 65535 was expected")


def bind(socket: zmq.Socket, endpoint: str) -> None:
    """Bind a socket, or say in one line why not."""
    check_port(endpoint)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        if error.errno == zmq.EADDRINUSE:
            raise StreamError(
                f"{endpoint} is in use; stop what holds that port or choose another address"
            ) from None
        raise StreamError(
            f"cannot bind {endpoint} ({error}); expected something like tcp://127.0.0.1:5570"
        ) from None
