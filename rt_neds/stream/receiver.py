"""Source of the native stream: messages of wire protocol v1 over a ZeroMQ SUB socket."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import zmq

from rt_neds.clock import monotonic_ns, same_rate
from rt_neds.errors import StreamError, WireError
from rt_neds.frames import SPIKE_DTYPE, SpikeBatch
from rt_neds.stream.live import LiveBehaviours
from rt_neds.stream.sockets import check_port, next_message
from rt_neds.wire import (
    MAX_SPIKES,
    follows,
    leaps,
    topic,
    unpack_behaviour,
    unpack_event,
    unpack_source,
    unpack_spikes,
)

COUNTERS = (
    "messages",
    "announcements",
    "observed",
    "malformed",
    "repeated",
    "lost",
    "epochs",
    "others",
)
BESIDE = 64
"""Messages that are not spikes which one read looks past."""
QUEUE = 20_000
"""Messages held while we are busy: twenty seconds of 1 ms batches; then they count as lost."""


@dataclass(frozen=True)
class Announcement:
    """Who sends: the session, its rate, and the unit ids that records index."""

    session: str
    rate: float
    units: tuple[str, ...]


class Receiver:
    """Reads the spikes of one probe, and what is observed live.

    Parameters
    ----------
    endpoint : str
        Such as ``tcp://127.0.0.1:5570``.
    probe : str
    live : LiveBehaviours, optional
        Takes behaviours that come on the same socket; without it they are not asked for.

    Attributes
    ----------
    announced : Announcement or None
        The last announcement of the sender, if it makes any.
    counters : dict of str to int
        ``messages`` (of spikes), ``announcements``, ``observed`` (messages of behaviours and of the
        task) and ``malformed`` (bad bytes, another rate than was announced, or a leap that
        the next message contradicts, skipped), and ``others`` (of topics that ours begins) are all
        that came. ``repeated``: messages whose
        sequence number was seen before, skipped. ``lost``: sequence numbers that never came.
        ``epochs``.
    socket : zmq.Socket
        For whoever waits for several at once.

    Raises
    ------
    StreamError
        If the endpoint is not one.
    """

    def __init__(self, endpoint: str, probe: str, live: LiveBehaviours | None = None) -> None:
        self.endpoint, self.live = endpoint, live
        self.announced: Announcement | None = None
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._spikes, self._source = topic("spikes", probe), topic("source", probe)
        self._events = topic("events", probe)
        self._values = {topic("behaviour", name): name for name in live.classes} if live else {}
        self._topics = {self._spikes, self._source}
        if live is not None:
            self._topics |= {*self._values, self._events}
        self._rate = 0.0
        self._says = False  # who it is
        self._assumed: Announcement | None = None
        self._epoch: int | None = None
        self._next_seq = self._end = 0
        self._leap: SpikeBatch | None = None  # not believed yet
        self._ready: deque[SpikeBatch] = deque()
        self.socket: zmq.Socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.set(zmq.RCVHWM, QUEUE)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.MAXMSGSIZE, MAX_SPIKES * SPIKE_DTYPE.itemsize)
        for name in self._topics:
            self.socket.subscribe(name)
        try:
            check_port(endpoint)
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.socket.close()
            raise StreamError(
                f"cannot connect to {endpoint} ({error}); expected something like "
                "rtneds://127.0.0.1:5570"
            ) from None

    def read(self, timeout_ms: int) -> SpikeBatch | None:
        """The next batch, or None if none came in time. The only place where the loop waits."""
        for _ in range(BESIDE):
            if self._ready or (frames := next_message(self.socket, timeout_ms)) is None:
                break
            announced = self.announced
            self.take(frames, monotonic_ns())
            if self.announced is not announced:
                return None  # spikes returned together with another announcement would be lost
            timeout_ms = 0  # what comes beside the spikes must not make the wait longer
        return self._ready.popleft() if self._ready else None

    def take(self, frames: list[bytes], received_ns: int) -> None:
        """Take in one message; what it holds comes with the next reads."""
        if frames[0] not in self._topics:
            self.counters["others"] += 1  # topics that ours is the beginning of: imec10, of imec1
            return
        try:
            self._take(frames, received_ns)
        except WireError:
            self.counters["malformed"] += 1

    def assume(self, who: Announcement) -> None:
        """Take the sender for this until it says who it is; its spikes may yet say another rate."""
        self._assumed = who
        self._believe_rate()

    def _believe_rate(self) -> None:
        who = self.announced or self._assumed
        if not self._says and who and self._rate and not same_rate(self._rate, who.rate):
            self.announced = replace(who, rate=self._rate)

    def peek_spikes(self, timeout_ms: int) -> bool:
        """Whether a batch is here; it is kept for the next ``read``."""
        if not self._ready and (batch := self.read(timeout_ms)) is not None:
            self._ready.appendleft(batch)
        return bool(self._ready)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def _take(self, frames: list[bytes], received_ns: int) -> None:
        if frames[0] == self._source and len(frames) == 2:
            session, rate, units = unpack_source(frames[1])
            self.announced, self._says = Announcement(session, rate, tuple(units)), True
            self.counters["announcements"] += 1
            return
        if self.live is not None and frames[0] != self._spikes:
            self._take_live(self.live, frames)
            return
        if frames[0] != self._spikes or len(frames) != 3:
            raise WireError(f"{len(frames)} frames under topic {frames[0][:40]!r}")
        batch = unpack_spikes(frames[1], frames[2], received_ns)
        if self._says and self.announced and not same_rate(batch.rate, self.announced.rate):
            raise WireError(f"spikes at {batch.rate:g} Hz, {self.announced.rate:g} Hz announced")
        if self._had(batch):
            self.counters["messages"] += 1
            self.counters["repeated"] += 1
            return
        leap, self._leap = self._leap, None
        if leap is not None and not follows(leap, batch):
            self.counters["malformed"] += 1
            leap = None
        if leap is None and self._leaps(batch):
            self._leap = batch
            if self._epoch is None and self.live is not None:
                self.live.begin_run(batch.epoch)  # what comes before the next spikes is of use
            return
        if batch.epoch != self._epoch:
            self._begin(leap or batch)
        if leap is not None:
            self._pass_on(leap)
        self._pass_on(batch)

    def _take_live(self, live: LiveBehaviours, frames: list[bytes]) -> None:
        rate, end = self._rate, self._end
        if self._epoch is None and self._leap is not None:  # joined late: that is all we know
            rate, end = self._leap.rate, self._leap.end
        name = self._values.get(frames[0])
        if name is not None and len(frames) == 3:
            live.take(unpack_behaviour(name, frames[1], frames[2]), rate, end)
        elif frames[0] == self._events and len(frames) == 2:
            event = unpack_event(frames[1])
            if event.kind in live.classes:
                live.take_event(event, rate, end)
        else:
            raise WireError(f"{len(frames)} frames under topic {frames[0][:40]!r}")
        self.counters["observed"] += 1

    def _had(self, batch: SpikeBatch) -> bool:
        leap = self._leap
        key = (batch.epoch, batch.seq, batch.first)
        if leap is not None and key == (leap.epoch, leap.seq, leap.first):
            return True
        return batch.epoch == self._epoch and batch.seq < self._next_seq

    def _leaps(self, batch: SpikeBatch) -> bool:
        """Whether it is far ahead: of what was last, or in another run of its beginning."""
        known = batch.epoch == self._epoch
        seq, end = (self._next_seq, self._end) if known else (0, 0)
        return leaps(batch, seq, end)

    def _begin(self, batch: SpikeBatch) -> None:
        self._epoch, self._next_seq = batch.epoch, batch.seq
        self.counters["epochs"] += 1
        if self.live is not None:
            self.live.begin_run(batch.epoch)

    def _pass_on(self, batch: SpikeBatch) -> None:
        batch.lost = batch.seq - self._next_seq
        self.counters["messages"] += 1
        self.counters["lost"] += batch.lost
        self._next_seq, self._end, self._rate = batch.seq + 1, batch.end, batch.rate
        self._ready.append(batch)
        self._believe_rate()


def waiting_for(sources: Sequence[Any]) -> Callable[[int], None]:
    """A function that waits until any of several sources has something, at most so many ms."""

    def wait(timeout_ms: int) -> None:
        poller = zmq.Poller()
        for source in sources:  # anew, because a source that connects again has another socket
            poller.register(source.socket, zmq.POLLIN)
        poller.poll(timeout_ms)

    return wait
