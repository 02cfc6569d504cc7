"""The loop: read, bin, decode, write. One thread; it waits only in ``source.read``.

A bin is decoded when it closes. Bins that one batch closes are decoded together, and so are those
that piled up while the loop was behind the clock: they wait for each other, up to ``CHUNK``, as
long as more is there to be read. All of them are published.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rt_neds.awake import Awake
from rt_neds.clock import monotonic_ns
from rt_neds.frames import BinnedFrame, DecodedFrame, SpikeBatch
from rt_neds.stream.binner import CHUNK, Binner
from rt_neds.stream.decoder import Decoder, decode_together
from rt_neds.stream.live import LiveBehaviours
from rt_neds.stream.receiver import Announcement
from rt_neds.stream.silent import FallenSilent
from rt_neds.stream.validity import Validity
from rt_neds.wire import MAX_NAMED

NOTE_NS = 1_000_000_000
WAIT_MS = 100
TOGETHER_MS = 5
"""Longest wait of several loops together: a silent source, too, may have bins to close."""


class Source(Protocol):
    """Where spikes come from: the native stream, a rig, a list in a test."""

    announced: Announcement | None
    counters: dict[str, int]

    def read(self, timeout_ms: int) -> SpikeBatch | None:
        """The next batch, or None if none came in time."""


class Sink(Protocol):
    """Where decoded frames go."""

    def write(self, frame: DecodedFrame) -> None:
        """Take a frame; its arrays are overwritten by the next."""

    def note(self, kind: str, fields: dict[str, Any]) -> None:
        """Take a schema or a status."""


class Loop:
    """Moves spikes from a source through a binner and a decoder to a sink.

    Parameters
    ----------
    probe, model : str
        Written on every frame.
    source, binner, decoder, validity, sink
        The parts, in the order of the data.
    schema : dict
        What the schema message says; published at the start and once a second.
    assumed : Announcement
        Who the parts were put together for.
    units : mapping of str to int
        What the status says of units: of the ``bundle``, of these ``missing`` in the stream, and
        ``unknown`` ones of the stream.
    silent : FallenSilent, optional
        Notices units that fall silent.
    live : LiveBehaviours, optional
        What the source observes beside the spikes.
    awake : Awake, optional
        Holds cores awake while the stream runs in real time.
    """

    def __init__(
        self,
        *,
        probe: str,
        model: str,
        source: Source,
        binner: Binner,
        decoder: Decoder,
        validity: Validity,
        sink: Sink,
        schema: dict[str, Any],
        assumed: Announcement,
        units: Mapping[str, int] | None = None,
        silent: FallenSilent | None = None,
        live: LiveBehaviours | None = None,
        awake: Awake | None = None,
    ) -> None:
        self._source, self._binner, self._decoder = source, binner, decoder
        self._validity, self._sink, self._schema = validity, sink, schema
        self._probe, self._model = probe, model
        self._assumed, self._units = assumed, dict(units or {})
        self._silent, self._live, self._awake = silent, live, awake or Awake(wanted=False)
        self._heard: Announcement | None = None
        self._closed: list[tuple[BinnedFrame, int]] = []  # with their flags; not yet decoded
        self._behind = self.due = self.soon = False
        self._lead = math.ceil(decoder.fetch_s * assumed.rate)
        self._published = 0
        self._started_ns = monotonic_ns()
        self._next_note_ns = 0
        self._last_batch_ns = 0
        self._alive: Callable[[], object] = bool

    def run(self, stop: Callable[[], bool]) -> str:
        """Run until told to stop; returns why: ``stopped``, or ``source changed``.

        A source that announces other units, or another rate, than these parts were put together
        for ends the run: whoever called decides whether the bundle fits it.
        """
        self._alive = stop
        while not stop():
            if not self.turn(WAIT_MS):
                return "source changed"
        self.end()
        return "stopped"

    def end(self) -> None:
        """Decode what waits; nothing else will come."""
        self._decode()
        self._awake.hold(False)

    def go_on_from(self, before: Loop) -> None:
        """Go on where a loop ended whose source has renamed or renumbered its units.

        Of another session, or at another rate, the bins are others as well: only counts go on.
        """
        self._published, self._started_ns = before._published, before._started_ns
        if any(self._schema[key] != before._schema[key] for key in ("session", "rate")):
            self._binner.counters = before._binner.counters
            self._validity.follow(before._validity)
            return
        self._binner.go_on_from(before._binner)
        if self._silent is not None and before._silent is not None:
            self._silent.go_on_from(before._silent)
        self._validity.go_on_from(before._validity)
        self._last_batch_ns = before._last_batch_ns

    @property
    def pending(self) -> bool:
        """Whether closed bins wait to be decoded."""
        return bool(self._closed)

    def share(self, other: Loop) -> bool:
        """Whether bins of both can be decoded in one call."""
        return self._decoder.share(other._decoder)

    def turn(self, timeout_ms: int) -> bool:
        """Wait for one batch, and do all there is to do; False once the source changed."""
        if not self.gather(timeout_ms):
            return False
        if self.due:
            self._decode()
        elif self.soon:
            self._decoder.fetch()
        self.note_if_due()
        return True

    def gather(self, timeout_ms: int) -> bool:
        """Wait for one batch and bin it; False once the source changed.

        ``due`` says afterwards whether it is time to decode what closed, ``soon`` whether it is to
        fetch what that will take, before a bin closes.
        """
        if not self._next_note_ns:  # the schema goes out before the first frame
            self.note_if_due()
        batch = self._source.read(0 if self._closed else timeout_ms)
        announced = self._source.announced
        if announced is not self._heard:  # to compare hundreds of units takes long
            self._heard = announced
            if announced is not None and announced != self._assumed:
                self.end()
                return False
        self.soon = False
        if batch is not None:
            self._take(batch)
            self.soon = self._closes_soon(batch)
        self.due = self.pending and (batch is None or not self._behind)
        return True

    def _take(self, batch: SpikeBatch) -> None:
        self._last_batch_ns = batch.received_ns
        self._validity.take(batch)
        for binned in self._binner.frames(batch):
            if binned.first_of_run or len(self._closed) == CHUNK:
                self._decode()
                self._alive()  # a message can hold thousands of bins
            if binned.first_of_run and self._decoder.past is not None:
                self._decoder.past.join(binned)
            if self._silent is not None:
                self._silent.take(binned)
            if self._live is not None:
                binned.live_M = self._live.at(binned.epoch, binned.end, self._binner.width)
            self._closed.append((binned, self._validity.flags(binned)))

    def _closes_soon(self, batch: SpikeBatch) -> bool:
        """Whether this was the last batch of its length to leave time for fetching."""
        if not self._lead or self._closed or self._behind or not self._validity.realtime:
            return False
        return self._lead <= self._binner.left < self._lead + batch.end - batch.first

    def _decode(self) -> None:
        if self._closed:
            decode_loops((self,))

    def _publish(
        self, binned: BinnedFrame, flags: int, values_V: NDArray[np.float32], decoded_ns: int
    ) -> None:
        published_ns = monotonic_ns()
        ended_ns = self._validity.ended_ns(binned.end, published_ns)
        late = self._validity.lateness(ended_ns, published_ns)
        self._behind = bool(late)
        stamps = {
            "sent": binned.sent_ns,
            "received": binned.received_ns,
            "binned": binned.binned_ns,
            "decoded": decoded_ns,
            "published": published_ns,
        }
        if ended_ns is not None:
            stamps["ended"] = ended_ns
        self._sink.write(
            DecodedFrame(
                probe=self._probe,
                epoch=binned.epoch,
                bin=binned.bin,
                end=binned.end,
                values_V=values_V,
                flags=flags | late,
                spikes=binned.spikes,
                late=binned.late,
                unknown=binned.unknown,
                lost=binned.lost,
                model=self._model,
                stamps=stamps,
                allowed_ns=self._validity.allowed_ns,
            )
        )
        self._published += 1

    def note_if_due(self) -> None:
        """Publish schema and status, once a second."""
        now = monotonic_ns()
        if now < self._next_note_ns:
            return
        self._next_note_ns = now + NOTE_NS
        status = self.status(now)
        self._awake.hold(status["realtime"] and status["source"] == "streaming")
        self._sink.note("schema", self._schema)
        self._sink.note("status", status)

    def status(self, now: int) -> dict[str, Any]:
        """Counters since the start and the state of the source."""
        silent_ns = now - self._last_batch_ns
        if not self._last_batch_ns:
            state = "waiting"
        else:
            state = "silent" if silent_ns > NOTE_NS else "streaming"
        return {
            "probe": self._probe,
            "model": self._model,
            "pid": os.getpid(),
            "uptime_ns": now - self._started_ns,
            "source": state,
            "trouble": getattr(self._source, "trouble", ""),
            "published": self._published,
            "realtime": self._validity.realtime,
            "clock": self._validity.clock(),
            "units": {**self._units, **self._fallen_silent()},
            "live": self._live.counters if self._live is not None else {},
            "drift": self._decoder.drift(),
            "source_counters": self._source.counters,
            "bin_counters": self._binner.counters,
            "frame_counters": self._validity.counters,
        }

    def _fallen_silent(self) -> dict[str, Any]:
        """Ids of units that have fallen silent, as many as a status names, and their number."""
        now_N = self._silent.now_N if self._silent is not None else None
        units = self._decoder.session.units
        silent = [] if now_N is None else np.flatnonzero(now_N).tolist()
        named = [units[n] for n in silent[:MAX_NAMED]]
        return {"silent": named, "silent_count": len(silent)}


def run_together(
    loops: Sequence[Loop], wait: Callable[[int], None], stop: Callable[[], bool]
) -> int | None:
    """Run the loops of several probes, taking turns, in this one thread.

    What closed in one turn goes through the network in one call, where bundles share a trunk.
    Nobody waits for a neighbour's bin: while one is decoded the others close theirs, and those are
    decoded together.

    Parameters
    ----------
    loops : sequence of Loop
    wait : callable
        Waits until any of their sources has something, at most so many milliseconds.
    stop : callable

    Returns
    -------
    int or None
        Which loop's source changed; None if told to stop.
    """
    if len(loops) == 1:
        return 0 if loops[0].run(stop) == "source changed" else None
    groups: list[list[Loop]] = []
    for loop in loops:
        group = next((group for group in groups if loop.share(group[0])), None)
        if group is None:
            groups.append([loop])
        else:
            group.append(loop)
    for loop in loops:
        loop._alive = stop
    while not stop():
        wait(0 if any(loop.pending for loop in loops) else TOGETHER_MS)
        for which, loop in enumerate(loops):
            if not loop.gather(0):
                return which
        for group in groups:
            for together in calls_of([loop for loop in group if loop.due]):
                decode_loops(together)
            for which, loop in enumerate(loop for loop in group if loop.soon):
                loop._decoder.fetch(trunk=which == 0)
        for loop in loops:
            loop.note_if_due()
    for loop in loops:
        loop.end()
    return None


def calls_of(loops: Sequence[Loop]) -> Iterator[list[Loop]]:
    """Loops whose closed bins go through the network together, ``CHUNK`` of them at most."""
    together: list[Loop] = []
    for loop in loops:
        if sum(len(one._closed) for one in (*together, loop)) > CHUNK:
            yield together
            together = []
        together.append(loop)
    if together:
        yield together


def decode_loops(loops: Sequence[Loop]) -> None:
    """Decode, publish and forget what closed in some loops that share a trunk."""
    closed = [[binned for binned, _ in loop._closed] for loop in loops]
    values = decode_together([loop._decoder for loop in loops], closed)
    decoded_ns = monotonic_ns()
    for loop, values_TV in zip(loops, values, strict=True):
        for (binned, flags), values_V in zip(loop._closed, values_TV, strict=True):
            loop._publish(binned, flags, values_V, decoded_ns)
    for loop, frames in zip(loops, closed, strict=True):
        # Behind the clock there is no time to look back.
        loop._decoder.look_back([] if loop._behind else frames)
        loop._closed.clear()
        loop.due = False
