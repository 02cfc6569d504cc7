"""What a capture holds of its probe: spikes, decoded bins, triggers and events, on one clock.

Time is the probe's: seconds of samples since sample 0 of the first acquisition run. A run that
began later is placed by the host's clock, and never before the end of the one before it.

Shape suffixes: S spikes, U units, V values, K intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rt_neds.capture import Capture, Message, Stream
from rt_neds.errors import WireError
from rt_neds.frames import SpikeBatch
from rt_neds.wire import (
    MAX_SAMPLE,
    MAX_SOURCE_BYTES,
    BehaviourBatch,
    follows,
    leaps,
    topic,
    unpack_behaviour,
    unpack_decoded,
    unpack_map,
    unpack_source,
    unpack_spikes,
)

BEHAVIOUR, MOST_BEHAVIOURS = topic("behaviour", ""), 256
MAX_UNANNOUNCED = 1 << 16
"""Unit numbers beyond what a stream announced, or beyond this, name no unit."""


@dataclass
class Run:
    """One acquisition run, by its epoch.

    Attributes
    ----------
    rate : float
        Samples per second.
    zero_ns : int
        Host time of its sample 0, by the least delayed message.
    samples, units : list of arrays
        Of the spikes, message by message.
    numberings : list of int
        Which of the announced lists of units the numbers of each message index.
    spans : list of [first, end]
        Samples that messages completed.
    end : int
        Last sample of anything.
    """

    rate: float
    zero_ns: int
    samples: list[NDArray[np.int64]] = field(default_factory=list)
    units: list[NDArray[np.uint32]] = field(default_factory=list)
    numberings: list[int] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    first: int = 0
    end: int = 0


@dataclass
class Decoded:
    """What one model decoded: epoch, end of the bin, flags and values of every frame.

    ``next_bin`` is by epoch: bins of another model may be of another width.
    """

    epochs: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    values: list[NDArray[np.float32]] = field(default_factory=list)
    next_bin: dict[int, int] = field(default_factory=dict)


class Contents:
    """What a capture holds of its probe.

    Parameters
    ----------
    capture : Capture

    Attributes
    ----------
    runs : dict of int to Run
        By epoch, in the order of their beginning.
    announced : dict of int to list of list of str
        Unit ids, by epoch: a list whenever it was another than before.
    decoded : dict of str to Decoded
        By model.
    schemas : dict of str to list of dict
        Outputs, by model.
    marks : dict of str to list of (epoch, sample, text)
        ``triggers`` and ``events``.
    behaviours : dict of str to list of BehaviourBatch
        As observed, by name, in the order they came.
    skipped : dict of str to int
        ``malformed`` (also: far ahead, and the next one is not) and ``repeated`` messages;
        ``other``: of topics that are not exported; ``unplaced``: of a run of which nothing says
        when it was.
    """

    def __init__(self, capture: Capture) -> None:
        self.runs: dict[int, Run] = {}
        self.announced: dict[int, list[list[str]]] = {}
        self.decoded: dict[str, Decoded] = {}
        self.schemas: dict[str, list[dict[str, Any]]] = {}
        self.marks: dict[str, list[tuple[int, int, str]]] = {"triggers": [], "events": []}
        self.behaviours: dict[str, list[BehaviourBatch]] = {}
        self.skipped = dict.fromkeys(("malformed", "repeated", "other", "unplaced"), 0)
        self._due: dict[int, tuple[int, int]] = {}  # message and sample that come next, by epoch
        self._leaps: dict[int, tuple[SpikeBatch, int]] = {}  # not believed yet, by epoch
        self._rate = 0.0
        self._epoch: int | None = None  # of the frame decoded last: triggers do not say
        probe = capture.about["probe"]
        takers: dict[tuple[int, bytes], tuple[int, Callable[[Message], None]]] = {
            (Stream.SPIKES, topic("spikes", probe)): (3, self._take_spikes),
            (Stream.SPIKES, topic("source", probe)): (2, self._take_source),
            (Stream.SPIKES, topic("events", probe)): (2, self._take_event),
            (Stream.DECODED, topic("decoded", probe)): (2, self._take_decoded),
            (Stream.DECODED, topic("schema", probe)): (2, self._take_schema),
            (Stream.DECODED, topic("trigger", probe)): (2, self._take_trigger),
        }
        for message in capture:
            n, take = takers.get((message.stream, message.frames[0]), (0, None))
            if message.stream == Stream.SPIKES and message.frames[0].startswith(BEHAVIOUR):
                n, take = 3, self._take_behaviour
            if take is None:
                self.skipped["other"] += 1
                continue
            try:
                if len(message.frames) != n:
                    raise WireError(f"{len(message.frames)} frames; {n} were expected")
                take(message)
            except WireError:
                self.skipped["malformed"] += 1
        self.skipped["malformed"] += len(self._leaps)
        for which, marks in self.marks.items():
            self.marks[which] = [mark for mark in marks if mark[0] in self.runs]
            self.skipped["unplaced"] += len(marks) - len(self.marks[which])
        for name, batches in self.behaviours.items():
            self.behaviours[name] = [batch for batch in batches if batch.epoch in self.runs]
            self.skipped["unplaced"] += len(batches) - len(self.behaviours[name])

    def _run(self, epoch: int, rate: float, end: int, received_ns: int) -> Run:
        """The run of an epoch, which has come to ``end`` by now."""
        zero_ns = received_ns - round(end / rate * 1e9)
        run = self.runs.setdefault(epoch, Run(rate, zero_ns, first=end))
        run.zero_ns = min(run.zero_ns, zero_ns)
        run.end = max(run.end, end)
        return run

    def _take_spikes(self, message: Message) -> None:
        batch = unpack_spikes(message.frames[1], message.frames[2], message.received_ns)
        next_seq, end = self._due.get(batch.epoch, (0, 0))
        # What came before the first list is taken to be numbered by it.
        numbering = max(0, len(self.announced.get(batch.epoch, ())) - 1)
        leap, of_leap = self._leaps.get(batch.epoch, (None, 0))
        again = leap is not None and (batch.seq, batch.first) == (leap.seq, leap.first)
        if again or batch.seq < next_seq:
            self.skipped["repeated"] += 1
            return
        self._leaps.pop(batch.epoch, None)
        if leap is not None and follows(leap, batch):
            self._add_spikes(leap, of_leap)
        else:
            self.skipped["malformed"] += leap is not None
            if leaps(batch, next_seq, end):
                self._leaps[batch.epoch] = batch, numbering
                return
        self._add_spikes(batch, numbering)

    def _add_spikes(self, batch: SpikeBatch, numbering: int) -> None:
        self._due[batch.epoch], self._rate = (batch.seq + 1, batch.end), batch.rate
        run = self._run(batch.epoch, batch.rate, batch.end, batch.received_ns)
        run.first = min(run.first, batch.first)
        if run.spans and batch.first <= run.spans[-1][1]:
            run.spans[-1][1] = max(run.spans[-1][1], batch.end)
        else:
            run.spans.append([batch.first, batch.end])
        if len(batch.records_S):
            run.samples.append(batch.records_S["sample"].astype(np.int64))
            run.units.append(batch.records_S["unit"].astype(np.uint32))
            run.numberings.append(numbering)

    def _take_behaviour(self, message: Message) -> None:
        name = message.frames[0].removeprefix(BEHAVIOUR).decode(errors="replace")
        batch = unpack_behaviour(name, message.frames[1], message.frames[2])
        if name not in self.behaviours and len(self.behaviours) >= MOST_BEHAVIOURS:
            raise WireError(f"{MOST_BEHAVIOURS} behaviours, and {name}")
        self.behaviours.setdefault(name, []).append(batch)

    def _take_source(self, message: Message) -> None:
        _, self._rate, units = unpack_source(message.frames[1])
        epoch = unpack_map(message.frames[1], MAX_SOURCE_BYTES).get("epoch")
        if type(epoch) is int:
            lists = self.announced.setdefault(epoch, [])
            if not lists or lists[-1] != units:
                lists.append(units)

    def _take_decoded(self, message: Message) -> None:
        frame = unpack_decoded(message.frames[1])
        if not 0 <= frame.end < MAX_SAMPLE or frame.values_V.ndim != 1:
            raise WireError("a bin that is none")
        run = self.runs.get(frame.epoch)
        rate = run.rate if run else self._rate
        if not rate:
            self.skipped["unplaced"] += 1
            return
        self._run(frame.epoch, rate, frame.end, message.received_ns)
        decoded = self.decoded.get(frame.model, Decoded())
        if frame.bin < decoded.next_bin.get(frame.epoch, 0):
            self.skipped["repeated"] += 1
            return
        if decoded.values and len(decoded.values[0]) != len(frame.values_V):
            raise WireError("another number of values than the same model had")
        decoded.next_bin[frame.epoch], self._epoch = frame.bin + 1, frame.epoch
        self.decoded[frame.model] = decoded
        decoded.epochs.append(frame.epoch)
        decoded.ends.append(frame.end)
        decoded.flags.append(frame.flags)
        decoded.values.append(frame.values_V)

    def _take_schema(self, message: Message) -> None:
        fields = unpack_map(message.frames[1])
        rate, model, outputs = (fields.get(key) for key in ("rate", "model", "outputs"))
        if not isinstance(model, str) or not isinstance(outputs, list):
            raise WireError("a schema without model or outputs")
        if not isinstance(rate, (int, float)) or not 1.0 <= rate <= 1e7:
            raise WireError(f"rate {rate!r}")
        self._rate = self._rate or float(rate)
        self.schemas[model] = [_checked_output(output) for output in outputs]

    def _take_trigger(self, message: Message) -> None:
        fields = unpack_map(message.frames[1])
        refused = fields.get("refused")
        text = str(fields.get("rule")) + (f" (refused: {refused})" if refused else "")
        self._mark("triggers", self._epoch, fields.get("sample"), text)

    def _take_event(self, message: Message) -> None:
        fields = unpack_map(message.frames[1])
        text = f"{fields.get('kind')}: {fields.get('value')}"
        self._mark("events", fields.get("epoch"), fields.get("sample"), text)

    def _mark(self, which: str, epoch: Any, sample: Any, text: str) -> None:
        if type(sample) is not int or not 0 <= sample < MAX_SAMPLE:
            raise WireError(f"sample {sample!r}")
        # Events may come before the first spikes of their run: they are placed at the end.
        self.marks[which].append((epoch if type(epoch) is int else -1, sample, text))

    def starts_s(self) -> dict[int, float]:
        """Time of sample 0 of each run, in seconds since that of the first."""
        starts: dict[int, float] = {}
        ended, zero_ns = 0.0, next(iter(self.runs.values())).zero_ns
        for epoch, run in self.runs.items():
            by_clock = (run.zero_ns - zero_ns) / 1e9
            starts[epoch] = max(by_clock, ended - run.first / run.rate) if starts else 0.0
            ended = starts[epoch] + run.end / run.rate
        return starts

    def spikes(self) -> tuple[list[str], NDArray[np.float64], NDArray[np.int64], int]:
        """Ids of all units; time (s) and place in the ids of every spike, sorted by time.

        The last number counts the spikes of no unit, or of no sample that can be.
        """
        starts, dropped = self.starts_s(), 0
        place_of: dict[str, int] = {}
        times: list[NDArray[np.float64]] = [np.zeros(0)]
        places: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        for epoch, run in self.runs.items():
            samples_S = np.concatenate([np.zeros(0, np.int64), *run.samples])
            ids, row_S = _rows(run, self.announced.get(epoch))
            keep_S = (row_S >= 0) & (samples_S >= 0) & (samples_S < MAX_SAMPLE)
            dropped += int((~keep_S).sum())
            samples_S = samples_S[keep_S]
            place_U = np.array([place_of.setdefault(name, len(place_of)) for name in ids], int)
            places.append(place_U[row_S[keep_S]])
            times.append(starts[epoch] + samples_S / run.rate)
        time_S, place_S = np.concatenate(times), np.concatenate(places)
        order = np.argsort(time_S, kind="stable")
        return list(place_of), time_S[order], place_S[order], dropped

    def behaviour(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Times (s) and values of a behaviour as observed, sorted by time."""
        starts = self.starts_s()
        times: list[NDArray[np.float64]] = [np.zeros(0)]
        values: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]
        for batch in self.behaviours[name]:
            first_s = starts[batch.epoch] + batch.first / self.runs[batch.epoch].rate
            times.append(first_s + np.arange(len(batch.values)) / batch.rate)
            values.append(batch.values)
        time_L, value_L = np.concatenate(times), np.concatenate(values)
        order = np.argsort(time_L, kind="stable")
        return time_L[order], value_L[order]

    def observed_K2(self) -> NDArray[np.float64]:
        """Where spikes would have been heard, in seconds."""
        starts = self.starts_s()
        pieces = [
            np.array(run.spans, float).reshape(-1, 2) / run.rate + starts[epoch]
            for epoch, run in self.runs.items()
        ]
        return np.concatenate([np.zeros((0, 2)), *pieces])


def _rows(run: Run, lists: list[list[str]] | None) -> tuple[list[str], NDArray[np.int64]]:
    """Ids of all the lists of a run, one after another, and the row of every spike; -1 for none."""
    numbers_S = np.concatenate([np.zeros(0, np.int64), *run.units])
    numbering_S = np.repeat(np.array(run.numberings, int), [len(units) for units in run.units])
    if lists is None:
        numbers_U = np.unique(numbers_S[numbers_S < MAX_UNANNOUNCED])
        numbers_S = np.searchsorted(numbers_U, numbers_S)  # beyond the last where it is none
        lists = [[str(number) for number in numbers_U]]
    sizes = np.array([len(names) for names in lists])
    row_S = np.where(
        numbers_S < sizes[numbering_S], (np.cumsum(sizes) - sizes)[numbering_S] + numbers_S, -1
    )
    return [name for names in lists for name in names], row_S


def _checked_output(output: Any) -> dict[str, Any]:
    kinds = {"name": str, "kind": str, "unit": str, "classes": list, "offset": int, "size": int}
    if not isinstance(output, dict):
        raise WireError("an output that is no map")
    for key, kind in kinds.items():
        if not isinstance(output.get(key), kind):
            raise WireError(f"an output whose {key} is {output.get(key)!r}")
    if output["offset"] < 0 or output["size"] < 1:
        raise WireError("an output of no values")
    return output
