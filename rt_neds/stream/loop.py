"""The loop: read, bin, decode, write. One thread; it waits only in ``source.read``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from rt_neds.clock import monotonic_ns
from rt_neds.frames import BinnedFrame, DecodedFrame, SpikeBatch
from rt_neds.stream.binner import Binner
from rt_neds.stream.decoder import Decoder
from rt_neds.stream.receiver import Announcement
from rt_neds.stream.validity import Validity

NOTE_NS = 1_000_000_000
WAIT_MS = 100


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
    ) -> None:
        self._source, self._binner, self._decoder = source, binner, decoder
        self._validity, self._sink, self._schema = validity, sink, schema
        self._probe, self._model = probe, model
        self._assumed = assumed
        self._published = 0
        self._started_ns = monotonic_ns()
        self._next_note_ns = 0
        self._last_batch_ns = 0

    def run(self, stop: Callable[[], bool]) -> str:
        """Run until told to stop; returns why: ``stopped``, or ``source changed``.

        A source that announces other units, or another rate, than these parts were put together
        for ends the run: whoever called decides whether the bundle fits it.
        """
        while not stop():
            batch = self._source.read(WAIT_MS)
            announced = self._source.announced
            if announced is not None and announced != self._assumed:
                return "source changed"
            if batch is not None:
                self._take(batch)
            self._note_if_due()
        return "stopped"

    def _take(self, batch: SpikeBatch) -> None:
        self._last_batch_ns = batch.received_ns
        self._validity.take(batch)
        for binned in self._binner.frames(batch):
            self._decode(binned)

    def _decode(self, binned: BinnedFrame) -> None:
        flags = self._validity.flags(binned)
        values_V = self._decoder.decode(binned)
        decoded_ns = monotonic_ns()
        published_ns = monotonic_ns()
        flags |= self._validity.lateness(binned.end, published_ns)
        self._sink.write(
            DecodedFrame(
                probe=self._probe,
                epoch=binned.epoch,
                bin=binned.bin,
                end=binned.end,
                values_V=values_V,
                flags=flags,
                spikes=binned.spikes,
                late=binned.late,
                unknown=binned.unknown,
                lost=binned.lost,
                model=self._model,
                stamps={
                    "sent": binned.sent_ns,
                    "received": binned.received_ns,
                    "binned": binned.binned_ns,
                    "decoded": decoded_ns,
                    "published": published_ns,
                },
            )
        )
        self._published += 1

    def _note_if_due(self) -> None:
        now = monotonic_ns()
        if now < self._next_note_ns:
            return
        self._next_note_ns = now + NOTE_NS
        self._sink.note("schema", self._schema)
        self._sink.note("status", self.status(now))

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
            "published": self._published,
            "realtime": self._validity.realtime,
            "source_counters": self._source.counters,
            "bin_counters": self._binner.counters,
            "frame_counters": self._validity.counters,
        }
