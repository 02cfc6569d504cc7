"""Source of the native stream: spike messages of wire protocol v1 over a ZeroMQ SUB socket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from rt_neds.clock import monotonic_ns
from rt_neds.errors import StreamError, WireError
from rt_neds.frames import SPIKE_DTYPE, SpikeBatch
from rt_neds.wire import MAX_SPIKES, topic, unpack_source, unpack_spikes

QUEUE = 20_000
"""Messages held while we are busy: twenty seconds of 1 ms batches; then they count as lost."""


@dataclass(frozen=True)
class Announcement:
    """Who sends: the session, its rate, and the unit ids that records index."""

    session: str
    rate: float
    units: tuple[str, ...]


class Receiver:
    """Reads the spikes of one probe.

    Parameters
    ----------
    endpoint : str
        Such as ``tcp://127.0.0.1:5570``.
    probe : str

    Attributes
    ----------
    announced : Announcement or None
        The last announcement of the sender, if it makes any.
    counters : dict of str to int
        ``messages``, ``malformed`` (bad bytes, skipped), ``repeated`` (a sequence number seen
        before, skipped), ``lost`` (sequence numbers that never came), ``epochs``.
    socket : zmq.Socket
        For whoever waits for several at once.

    Raises
    ------
    StreamError
        If the endpoint is not one.
    """

    def __init__(self, endpoint: str, probe: str) -> None:
        self.endpoint = endpoint
        self.announced: Announcement | None = None
        self.counters = dict.fromkeys(("messages", "malformed", "repeated", "lost", "epochs"), 0)
        self._spikes, self._source = topic("spikes", probe), topic("source", probe)
        self._epoch: int | None = None
        self._next_seq = 0
        self._held: SpikeBatch | None = None
        self.socket: zmq.Socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.set(zmq.RCVHWM, QUEUE)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.MAXMSGSIZE, MAX_SPIKES * SPIKE_DTYPE.itemsize)
        self.socket.subscribe(self._spikes)
        self.socket.subscribe(self._source)
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.socket.close()
            raise StreamError(
                f"cannot connect to {endpoint} ({error}); expected something like "
                "rtneds://127.0.0.1:5570"
            ) from None

    def read(self, timeout_ms: int) -> SpikeBatch | None:
        """The next batch, or None if none came in time. The only place where the loop waits."""
        if self._held is not None:
            batch, self._held = self._held, None
            return batch
        if not self.socket.poll(timeout_ms):
            return None
        frames = self.socket.recv_multipart()
        received_ns = monotonic_ns()
        try:
            return self._parse(frames, received_ns)
        except WireError:
            self.counters["malformed"] += 1
            return None

    def peek_spikes(self, timeout_ms: int) -> bool:
        """Whether a batch is here; it is kept for the next ``read``."""
        if self._held is None:
            self._held = self.read(timeout_ms)
        return self._held is not None

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def _parse(self, frames: list[bytes], received_ns: int) -> SpikeBatch | None:
        if frames[0] == self._source and len(frames) == 2:
            session, rate, units = unpack_source(frames[1])
            self.announced = Announcement(session, rate, tuple(units))
            return None
        if frames[0] != self._spikes or len(frames) != 3:
            raise WireError(f"{len(frames)} frames under topic {frames[0][:40]!r}")
        batch = unpack_spikes(frames[1], frames[2], received_ns)
        self.counters["messages"] += 1
        if batch.epoch != self._epoch:
            self._epoch = batch.epoch
            self.counters["epochs"] += 1
        elif batch.seq < self._next_seq:
            self.counters["repeated"] += 1
            return None
        else:
            batch.lost = batch.seq - self._next_seq
            self.counters["lost"] += batch.lost
        self._next_seq = batch.seq + 1
        return batch


def waiting_for(sources: Sequence[Any]) -> Callable[[int], None]:
    """A function that waits until any of several sources has something, at most so many ms."""

    def wait(timeout_ms: int) -> None:
        poller = zmq.Poller()
        for source in sources:  # anew, because a source that connects again has another socket
            poller.register(source.socket, zmq.POLLIN)
        poller.poll(timeout_ms)

    return wait
