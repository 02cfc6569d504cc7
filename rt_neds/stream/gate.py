"""Two workers decode the same stream; the gate publishes each bin once.

It holds the publish address, so that no listener has to connect again when a worker is lost. Frames
of the active worker go out as they come. Those of the other wait half a bin: whichever bin the
active one has not delivered by then is taken from the other, which is active from then on.

Workers hand over whole datagrams: one that is killed while it writes leaves no half message. When a
frame goes out is known here alone, so ``published``, and whether that is late, are written anew.
"""

from __future__ import annotations

import copy
import itertools
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgpack
import numpy as np
import zmq

from rt_neds.clock import monotonic_ns
from rt_neds.frames import DecodedFrame, Flag
from rt_neds.stream.board import Board, shared
from rt_neds.stream.publisher import Publisher
from rt_neds.stream.trigger import Triggers
from rt_neds.wire import MAX_HEADER_BYTES, pack_decoded, pack_map, unpack_decoded, unpack_map

# Probe, writer, epoch, bin (-1: not a frame), until when it is in time (0: unknown), length of the
# topic.
_HEAD = struct.Struct("<qqqqqq")
_MAX_BYTES = 2 * MAX_HEADER_BYTES
_WAIT_MS = 100
_EPOCHS_KEPT = 16
_HELD = 1024
# Where a packed frame has what is written anew; nothing but integers and a hash comes after them.
_FLAGS = msgpack.packb("flags")
_PUBLISHED = msgpack.packb("published") + b"\xcf"
_STAMP = struct.Struct(">Q")
_UINT8 = 0xCC
_COUNTS = np.dtype([("late", "<i8"), ("refused", "<i8")])


class Counts:
    """What the gate counts, where its successors and the workers can read it.

    Parameters
    ----------
    probes : sequence of str
    """

    def __init__(self, probes: Sequence[str]) -> None:
        self._rows = dict(zip(probes, shared(len(probes), _COUNTS), strict=True))

    def add(self, probe: str, what: str, count: int = 1) -> None:
        """Count on."""
        self._rows[probe][what] += count

    def status(self, probe: str) -> dict[str, int]:
        """``gate`` of the status message.

        Returns
        -------
        dict
            ``late``: frames that were handed over in time and went out late. ``refused``: bins of
            an acquisition that was over, and of which nobody had delivered them before.
        """
        return {what: int(self._rows[probe][what]) for what in _COUNTS.names or ()}


class GateSink:
    """Sink of a worker behind the gate.

    Parameters
    ----------
    out : socket
        Datagrams to the gate.
    probes : sequence of str
        All that are served; the gate knows them by their place here.
    board : Board
    writer : int
        Who we are.
    probe : str
    """

    def __init__(
        self, out: socket.socket, probes: Sequence[str], board: Board, writer: int, probe: str
    ) -> None:
        self._out, self._probes, self._board = out, list(probes), board
        self._writer, self._probe = writer, probe

    def write(self, frame: DecodedFrame) -> None:
        """Hand over one decoded bin."""
        ended_ns = frame.stamps.get("ended", 0)
        until_ns = ended_ns + frame.allowed_ns if ended_ns else 0
        self._send(pack_decoded(frame), frame.epoch, frame.bin, until_ns)

    def note(self, kind: str, fields: dict[str, Any]) -> None:
        """Hand over a map."""
        if kind == "status":
            fields = {**fields, **self._board.notes(self._probe)}
        self._send(pack_map(kind, self._probe, fields), 0, -1, 0)

    def beside(self, probe: str) -> GateSink:
        """The same for another probe."""
        other = copy.copy(self)
        other._probe = probe
        return other

    def close(self) -> None:
        """Nothing to do: the socket outlives us, for whoever takes our place."""

    def _send(self, parts: list[bytes], epoch: int, bin_: int, until_ns: int) -> None:
        which = self._probes.index(self._probe)
        head = _HEAD.pack(which, self._writer, epoch, bin_, until_ns, len(parts[0]))
        self._out.send(b"".join((head, *parts)))


class Frame(NamedTuple):
    """A decoded bin as it is handed over, in time until ``until_ns``; 0 while that is not known."""

    epoch: int
    bin: int
    writer: int
    parts: tuple[bytes, bytearray]
    until_ns: int = 0


class Turns:
    """Whose frames of one probe go out, of two workers: each bin once, in order.

    Parameters
    ----------
    hold_ns : int
        How long a frame waits for the active worker to deliver the same bin.
    last : (int, int), optional
        Epoch and bin that went out last: a gate may be a replacement itself.

    Attributes
    ----------
    active : int or None
        Place of the worker whose frames go out as they come, and whose notes do.
    refused : int
        Bins that never went out, because their acquisition was over; for the caller to take.
    """

    def __init__(self, hold_ns: int, last: tuple[int, int] | None = None) -> None:
        self.active: int | None = None
        self.refused = 0
        self._hold_ns = hold_ns
        self._epoch: int | None = last[0] if last else None
        self._bin = last[1] if last else -1
        self._writers: dict[int, int] = {}  # by place
        self._at: dict[int, int] = {}  # epoch of the last frame, by place
        self._over: dict[int, int] = {}  # last bin, by epoch
        # When due, and what; only ever of the place that is not active.
        self._held: deque[tuple[int, Frame]] = deque(maxlen=_HELD)

    @property
    def due_ns(self) -> int | None:
        """When the oldest frame that waits must go out."""
        return self._held[0][0] if self._held else None

    def meet(self, place: int, writer: int) -> list[Frame]:
        """Whoever has said something is there; the frames to publish now.

        A replacement begins with an empty context: it waits behind whoever has been there.
        """
        if self._writers.get(place) == writer:
            return []
        self._writers[place] = writer
        self._at.pop(place, None)
        if self.active is None:
            self.active = place
        elif place == self.active and len(self._writers) > 1:
            return self._hand_over()
        return []

    def take(self, place: int, frame: Frame, now_ns: int) -> list[Frame]:
        """Take a frame from a worker; the frames to publish now."""
        out = self.meet(place, frame.writer)
        before, self._at[place] = self._at.get(place), frame.epoch
        if before == self._epoch:  # who has come as far as we is not behind: the source went back
            self._over.pop(frame.epoch, None)
        if not self._is_new(frame):
            self.refused += frame.bin > self._over.get(frame.epoch, frame.bin)
            return out
        if place != self.active:
            self._held.append((now_ns + self._hold_ns, frame))
            return out
        # What the active one has left out will not come from it any more.
        skipped = [
            held
            for _, held in self._held
            if held.epoch == self._epoch and (held.epoch != frame.epoch or held.bin < frame.bin)
        ]
        return out + self._go([*skipped, frame])

    def overdue(self, now_ns: int) -> list[Frame]:
        """The frames to publish because the active worker has not; the other is active then."""
        if not self._held or self._held[0][0] > now_ns:
            return []
        return self._hand_over()

    def _hand_over(self) -> list[Frame]:
        """The other place is active now, and all that was held is its."""
        self.active = next(other for other in self._writers if other != self.active)
        return self._go([frame for _, frame in self._held])

    def _go(self, frames: list[Frame]) -> list[Frame]:
        out = []
        for frame in frames:
            if not self._is_new(frame):
                continue
            if self._epoch is not None and frame.epoch != self._epoch:
                self._over[self._epoch] = self._bin
                if len(self._over) > _EPOCHS_KEPT:
                    del self._over[next(iter(self._over))]
            self._epoch, self._bin = frame.epoch, frame.bin
            out.append(frame)
        self._held = deque((held for held in self._held if self._is_new(held[1])), maxlen=_HELD)
        return out

    def _is_new(self, frame: Frame) -> bool:
        if frame.epoch == self._epoch:
            return frame.bin > self._bin
        return frame.epoch not in self._over


class Gate:
    """Publishes what workers hand over.

    Parameters
    ----------
    endpoint : str
        Address to bind.
    bin_ns : mapping of str to int
        Width of each probe's bins; what waits for the active worker does so for half of one.
    workers : sequence of socket
        One for each worker.
    board : Board
    counts : Counts
    triggers : mapping of str to Triggers
        By probe. Rules are decided here and not by the workers, so that each frame decides once.
    heard : mapping of str to list
        What gates before this one wished to be remembered.
    remember : callable
        Takes a key, and what gates after this one are to know by it.

    Raises
    ------
    StreamError
        If the address is in use or cannot be bound.
    """

    def __init__(
        self,
        endpoint: str,
        bin_ns: Mapping[str, int],
        workers: Sequence[socket.socket],
        board: Board,
        counts: Counts,
        triggers: Mapping[str, Triggers],
        heard: Mapping[str, list],
        remember: Callable[[str, list], None],
    ) -> None:
        self._triggers, self._remember = triggers, remember
        self._probes = list(bin_ns)
        self._schemas: dict[tuple[int, int], dict[str, Any]] = {}  # by probe and writer
        for which, place in itertools.product(range(len(bin_ns)), range(len(workers))):
            if (before := heard.get(self._schema_key(which, place))) is not None:
                self._schemas[which, before[0]] = before[1]
        self._board, self._counts, self._workers = board, counts, list(workers)
        self._publisher = Publisher(endpoint, self._probes[0])
        self._turns = [Turns(width // 2, board.last(probe)) for probe, width in bin_ns.items()]
        self._poller = zmq.Poller()
        for worker in self._workers:
            self._poller.register(worker.fileno(), zmq.POLLIN)

    def run(self, stop: Callable[[], bool]) -> None:
        """Publish until told to stop, and what has been handed over by then."""
        while not stop():
            dues = [due for turns in self._turns if (due := turns.due_ns) is not None]
            # Rounded up, not to spin through the last millisecond.
            wait_ms = (min(dues) - monotonic_ns()) // 1_000_000 + 1 if dues else _WAIT_MS
            self._poller.poll(max(0, min(wait_ms, _WAIT_MS)))
            self._turn()
        self._turn()
        self._publisher.close()

    def _turn(self) -> None:
        for place, worker in enumerate(self._workers):
            while (datagram := _receive(worker)) is not None:
                self._take(place, datagram)
        for which, turns in enumerate(self._turns):
            self._publish(which, turns.overdue(monotonic_ns()))

    def _take(self, place: int, datagram: bytes) -> None:
        which, writer, epoch, bin_, until_ns, length = _HEAD.unpack_from(datagram)
        middle = _HEAD.size + length
        parts = datagram[_HEAD.size : middle], datagram[middle:]
        turns = self._turns[which]
        if bin_ >= 0:
            frame = Frame(epoch, bin_, writer, (parts[0], bytearray(parts[1])), until_ns)
            self._publish(which, turns.take(place, frame, monotonic_ns()))
            if turns.refused:
                self._counts.add(self._probes[which], "refused", turns.refused)
                turns.refused = 0
            return
        if parts[0].startswith(b"schema/") and self._probes[which] in self._triggers:
            self._learn(which, place, writer, unpack_map(parts[1]))
        self._publish(which, turns.meet(place, writer))
        if turns.active != place:
            return
        if parts[0].startswith(b"status/") and self._probes[which] in self._triggers:
            self._triggers[self._probes[which]].heed(unpack_map(parts[1]))
        self._publisher.pass_on(parts)

    def _learn(self, which: int, place: int, writer: int, schema: dict[str, Any]) -> None:
        """A schema comes once a second: whoever takes our place could decide nothing until then."""
        if self._schemas.get((which, writer)) != schema:
            self._schemas[which, writer] = schema
            self._remember(self._schema_key(which, place), [writer, schema])

    def _schema_key(self, which: int, place: int) -> str:
        return f"schema of {self._probes[which]} {place}"

    def _publish(self, which: int, frames: list[Frame]) -> None:
        for frame in frames:
            self._stamp(which, frame)
            self._publisher.pass_on(frame.parts)
            self._board.note_published(self._probes[which], frame.writer, frame.epoch, frame.bin)
            if self._probes[which] in self._triggers:
                self._decide(which, frame)

    def _stamp(self, which: int, frame: Frame) -> None:
        """Say when it goes out and, by the worker's own rule, whether that is late."""
        body, now = frame.parts[1], monotonic_ns()
        _STAMP.pack_into(body, body.rindex(_PUBLISHED) + len(_PUBLISHED), now)
        if not frame.until_ns or now <= frame.until_ns:
            return
        at = body.rindex(_FLAGS) + len(_FLAGS)
        at += body[at] == _UINT8  # 128 and more take a byte of their own
        if not body[at] & Flag.LATE:
            body[at] |= Flag.LATE
            self._counts.add(self._probes[which], "late")

    def _decide(self, which: int, frame: Frame) -> None:
        schema, probe = self._schemas.get((which, frame.writer)), self._probes[which]
        if schema is None:  # whoever heard it was killed before telling us
            return
        triggers = self._triggers[probe]
        triggers.bind(schema)
        for decided in triggers.take(unpack_decoded(bytes(frame.parts[1]))):
            self._publisher.beside(probe).note("trigger", decided)


def datagrams(count: int) -> list[tuple[socket.socket, socket.socket]]:
    """Pairs of sockets (for the gate, for a worker), to be made before either is forked."""
    return [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]


def _receive(worker: socket.socket) -> bytes | None:
    try:
        return worker.recv(_MAX_BYTES, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
