"""Messages as they are: what a recorder hears of any stream, and what a replay of it sends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import zmq

from rt_neds.clock import monotonic_ns
from rt_neds.errors import StreamError
from rt_neds.frames import SPIKE_DTYPE
from rt_neds.stream.receiver import QUEUE
from rt_neds.stream.sender import Sender
from rt_neds.stream.sockets import check_port
from rt_neds.wire import MAX_SPIKES


class RawListener:
    """Hears every topic of several streams and looks into nothing.

    Parameters
    ----------
    endpoints : sequence of str
        Addresses to connect to.
    queue : int
        Messages held for who does not read.

    Raises
    ------
    StreamError
        If one is not an address.
    """

    def __init__(self, endpoints: Sequence[str], queue: int = QUEUE) -> None:
        for endpoint in endpoints:
            check_port(endpoint)
        self._poller = zmq.Poller()
        self._sockets: list[zmq.Socket] = []
        for endpoint in endpoints:
            socket: zmq.Socket = zmq.Context.instance().socket(zmq.SUB)
            self._sockets.append(socket)
            socket.set(zmq.RCVHWM, queue)
            socket.set(zmq.LINGER, 0)
            # The same limit as that of serve: whoever breaks it is disconnected from both.
            socket.set(zmq.MAXMSGSIZE, MAX_SPIKES * SPIKE_DTYPE.itemsize)
            socket.subscribe(b"")
            try:
                socket.connect(endpoint)
            except zmq.ZMQError as error:
                self.close()
                raise StreamError(
                    f"cannot connect to {endpoint} ({error}); expected something like "
                    "tcp://127.0.0.1:5570"
                ) from None
            self._poller.register(socket, zmq.POLLIN)

    def read(self, timeout_ms: int) -> Iterator[tuple[int, int, list[bytes]]]:
        """At most one message of each stream: which one, when it was read (ns), its frames."""
        ready = dict(self._poller.poll(timeout_ms))
        for which, socket in enumerate(self._sockets):
            if socket in ready:
                frames = socket.recv_multipart()
                yield which, monotonic_ns(), frames

    def close(self) -> None:
        """Close the sockets."""
        for socket in self._sockets:
            socket.close()


class RawSender(Sender):
    """Publishes messages of which it knows nothing."""

    def wait_for_anyone(self, seconds: float) -> bool:
        """Wait until somebody subscribes to anything; False if nobody did in time."""
        return bool(self._socket.poll(round(seconds * 1000)))

    def send_frames(self, frames: Sequence[bytes]) -> None:
        """Send one message as it is."""
        self._socket.send_multipart(frames)
