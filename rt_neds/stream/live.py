"""Behaviours that are observed while others are decoded: the value a bin is shown.

As in training a bin is shown the last value at or before its right edge. Nobody waits for it: what
has not come when the bin closes is not shown, and the network decodes without it.

Shape suffix: M live behaviours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rt_neds.errors import WireError
from rt_neds.stream.binner import CHUNK
from rt_neds.wire import LEAP_MESSAGES, MAX_MESSAGE_S, BehaviourBatch, TaskEvent

F4 = NDArray[np.float32]
COUNTERS = ("shown", "hidden", "beyond", "late", "skipped", "lost")
WAITING = 1 << 14
"""Values that may wait for their bins: sixteen seconds at a kilohertz; the oldest make room."""
PERIODS = 1.5
"""A value holds for so many of its own periods, or for a bin if that is longer."""


@dataclass
class _Track:
    """One behaviour: values that are ahead of the bins, and the last that is not."""

    waiting: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WAITING))
    last: tuple[int, float] = (-1, np.nan)
    hold: float = np.inf
    """Samples for which a value holds; a state of the task holds until the next."""
    learned: tuple[float, float] = (-np.inf, np.inf)
    next_seq: int | None = None
    newest: int = -1
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))


class LiveBehaviours:
    """What is observed of some behaviours of one acquisition run, bin by bin.

    Parameters
    ----------
    classes : mapping of str to sequence of str
        Behaviours, in the order of the values given, and the classes of categorical ones; those
        come as task events, all others as values.

    Attributes
    ----------
    counters : dict of str to dict
        By behaviour, bins in which it was ``shown`` and ``hidden``, and shown ``beyond`` the range
        of training; values that came ``late``, when a bin that they were for had closed;
        ``skipped`` ones, which were of another run, absurdly far ahead, or earlier than one before
        them; messages ``lost``.
    """

    def __init__(self, classes: Mapping[str, Sequence[str]]) -> None:
        self.classes = {name: tuple(of) for name, of in classes.items()}
        self._tracks = {name: _Track() for name in classes}
        self._value_of_frame = np.full((1 + CHUNK, len(classes)), np.nan, np.float32)
        self._bins, self._closed = 0, -1
        self._epoch: int | None = None

    @property
    def counters(self) -> dict[str, dict[str, int]]:
        return {name: dict(track.counters) for name, track in self._tracks.items()}

    def learned(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Say what range of values training saw, least and greatest, by behaviour."""
        for name, of in ranges.items():
            self._tracks[name].learned = of

    def begin_run(self, epoch: int) -> None:
        """Forget what was observed in another acquisition run."""
        if epoch == self._epoch:
            return
        self._epoch, self._closed = epoch, -1
        for track in self._tracks.values():
            track.waiting.clear()
            track.last, track.newest, track.next_seq = (-1, np.nan), -1, None

    def take(self, batch: BehaviourBatch, rate: float, end: int) -> None:
        """Take in values of a behaviour.

        Parameters
        ----------
        batch : BehaviourBatch
        rate : float
            Samples per second of the probe.
        end : int
            Where its spikes have come to.

        Raises
        ------
        WireError
            If its values are not numbers but classes, which come as task events.
        """
        track = self._tracks[batch.name]
        if self.classes[batch.name]:
            raise WireError(f"values of {batch.name}, which is categorical; send events")
        if batch.epoch != self._epoch:
            track.counters["skipped"] += len(batch.values)
            return
        if track.next_seq is not None and 0 < batch.seq - track.next_seq <= LEAP_MESSAGES:
            track.counters["lost"] += batch.seq - track.next_seq
        came_again = track.next_seq is not None and 0 < track.next_seq - batch.seq <= LEAP_MESSAGES
        if not came_again or batch.first > track.newest:  # a sender that begins anew goes on later
            track.next_seq = batch.seq + 1
        track.hold = PERIODS * rate / batch.rate
        for k, value in enumerate(batch.values.tolist()):
            sample = batch.first + round(k * rate / batch.rate)
            if sample == track.newest:
                track.counters["skipped"] += 1
            else:
                self._add(track, sample, value, rate, end)

    def take_event(self, event: TaskEvent, rate: float, end: int) -> None:
        """Take in the state of a categorical behaviour: a class, or None when it is not known."""
        track, classes = self._tracks[event.kind], self.classes[event.kind]
        if event.value is not None and event.value not in classes:
            raise WireError(
                f"{event.kind} is {event.value!r}; one of {', '.join(classes)} expected"
            )
        if event.epoch != self._epoch:
            track.counters["skipped"] += 1
            return
        value = np.nan if event.value is None else float(classes.index(event.value))
        self._add(track, event.sample + 1, value, rate, end)  # in force where it lies in the bin

    def _add(self, track: _Track, sample: int, value: float, rate: float, end: int) -> None:
        if sample < track.newest or sample > end + MAX_MESSAGE_S * rate:
            track.counters["skipped"] += 1
            return
        track.newest = sample
        track.counters["late"] += sample <= self._closed
        track.waiting.append((sample, value))

    def at(self, epoch: int, end: int, width: int) -> F4:
        """Values at the right edge of a bin that closes.

        Parameters
        ----------
        epoch : int
        end : int
            First sample after the bin.
        width : int
            Samples of it.

        Returns
        -------
        ndarray, shape (M,)
            NaN where nothing is observed. It lasts until ``CHUNK`` more bins closed.
        """
        value_M = self._value_of_frame[self._bins % len(self._value_of_frame)]
        self._bins += 1
        ours = epoch == self._epoch  # the run before may still have bins to close
        for m, track in enumerate(self._tracks.values()):
            while ours and track.waiting and track.waiting[0][0] <= end:
                track.last = track.waiting.popleft()
            sample, value = track.last
            held = ours and end - sample <= max(track.hold, width)
            value_M[m] = value if held and np.isfinite(value) else np.nan
            if np.isnan(value_M[m]):
                track.counters["hidden"] += 1
            else:
                track.counters["shown"] += 1
                track.counters["beyond"] += not track.learned[0] <= value <= track.learned[1]
        if ours:
            self._closed = end
        return value_M


def live_of(behaviours: Sequence[Any], names: Sequence[str]) -> LiveBehaviours | None:
    """Those of a bundle's behaviours, by name; None for none."""
    by_name = {b.name: b for b in behaviours}
    return LiveBehaviours({name: by_name[name].classes for name in names}) if names else None
