"""The other end of the native stream: what an acquisition, or a replay, binds."""

from __future__ import annotations

import time
from collections.abc import Sequence

import zmq

from rt_neds.frames import SpikeBatch
from rt_neds.stream.sockets import bind
from rt_neds.wire import (
    BehaviourBatch,
    TaskEvent,
    pack_behaviour,
    pack_event,
    pack_source,
    pack_spikes,
    topic,
)

LINGER_MS = 60_000
"""What was sent must arrive, even at a receiver that is busy; over at once if none is left."""

STRAGGLERS_S = 0.3
"""Three times as long as ZeroMQ waits before it tries to connect again."""


class Sender:
    """Publishes the spikes of one probe.

    Parameters
    ----------
    endpoint : str
        Address to bind.
    probe : str
    lossless : bool
        Wait for a subscriber that cannot keep up, instead of dropping as an acquisition does.

    Raises
    ------
    StreamError
        If the address is in use or cannot be bound.
    """

    def __init__(self, endpoint: str, probe: str, *, lossless: bool = False) -> None:
        self._probe = probe
        # XPUB is PUB that also hears who subscribes: how we know that somebody is listening.
        self._context = zmq.Context()
        self._socket: zmq.Socket = self._context.socket(zmq.XPUB)
        self._socket.set(zmq.LINGER, LINGER_MS)
        self._socket.set(zmq.SNDHWM, 20_000)
        if lossless:
            self._socket.set(zmq.XPUB_NODROP, 1)
        bind(self._socket, endpoint)

    def wait_for_subscriber(self, seconds: float) -> bool:
        """Wait until somebody subscribes to the spikes; False if nobody did in time.

        Others who wait for us, such as ``record``, connect a little sooner or later than the first.
        """
        deadline = time.monotonic() + seconds
        wants, heard = topic("spikes", self._probe), False
        while (left := deadline - time.monotonic()) > 0:
            if not self._socket.poll(max(1, int(left * 1000))):
                break
            message = self._socket.recv()
            if message[:1] == b"\x01" and wants.startswith(message[1:]):
                heard, deadline = True, time.monotonic() + STRAGGLERS_S
        return heard

    def announce(self, *, epoch: int, rate: float, session: str, units: Sequence[str]) -> None:
        """Say whose spikes these are and what the unit numbers mean."""
        self._socket.send_multipart(
            pack_source(self._probe, epoch=epoch, rate=rate, session=session, units=units)
        )

    def send(self, batch: SpikeBatch) -> None:
        """Send one batch."""
        self._socket.send_multipart(pack_spikes(self._probe, batch), copy=False)

    def observe(self, what: BehaviourBatch | TaskEvent) -> None:
        """Send values of a behaviour, or a task event; before the spikes whose bins it is for."""
        if isinstance(what, TaskEvent):
            self._socket.send_multipart(pack_event(self._probe, what))
        else:
            self._socket.send_multipart(pack_behaviour(what))

    def close(self) -> None:
        """Close the socket, and return once what was sent has gone out.

        A process that ends does not wait for the socket's linger; ending the context does.
        """
        self._socket.close()
        self._context.term()
