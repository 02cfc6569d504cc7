"""Telling the ZMQ Interface of Open Ephys that we live, and hearing that it does."""

from __future__ import annotations

import uuid

import zmq

from rt_neds.openephys_wire import heartbeat

EVERY_NS = 2_000_000_000
UNANSWERED_NS = 6_000_000_000


class Heartbeat:
    """A request every two seconds, without ever waiting for the answer.

    Parameters
    ----------
    endpoint : str
        Where the plugin listens for them.
    counters : dict of str to int
        ``heartbeats`` and ``heartbeats_unanswered`` are counted there.
    now : int
        Host monotonic, ns.

    Attributes
    ----------
    answered : bool
        Whether one ever was.
    """

    def __init__(self, endpoint: str, counters: dict[str, int], now: int) -> None:
        self._endpoint, self._counters = endpoint, counters
        self._application, self._uuid = f"rt-neds {uuid.uuid4().hex[:4]}", str(uuid.uuid4())
        self._sent_ns = self._answered_ns = now - EVERY_NS
        self._socket: zmq.Socket | None = None
        self._awaiting = self.answered = False

    def keep(self, now: int) -> None:
        """Take the answer, if it is here, and ask again, if it is time."""
        if self._awaiting and self._socket is not None and self._socket.poll(0):
            self._socket.recv()
            self._awaiting, self._answered_ns, self.answered = False, now, True
        if now - self._sent_ns < EVERY_NS:
            return
        if self._awaiting and now - self._answered_ns < UNANSWERED_NS:
            return
        if self._awaiting or self._socket is None:
            # A request without a reply blocks its socket for ever: begin with a new one.
            self._counters["heartbeats_unanswered"] += self._awaiting
            self.close()
            self._socket = zmq.Context.instance().socket(zmq.REQ)
            self._socket.set(zmq.LINGER, 0)
            self._socket.set(zmq.MAXMSGSIZE, 64 * 1024)
            self._socket.connect(self._endpoint)
            self._answered_ns = now
        self._socket.send(heartbeat(self._application, self._uuid))  # queued: it has a connection
        self._counters["heartbeats"] += 1
        self._awaiting, self._sent_ns = True, now

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close(linger=0)
