"""Behaviours of a session on their way out beside its spikes, as from a rig that observes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rt_neds.clock import monotonic_ns
from rt_neds.errors import ConfigError, SessionError
from rt_neds.session import Session
from rt_neds.wire import BehaviourBatch, TaskEvent


class Track:
    """One behaviour of a session on its way out: each value as soon as it is due.

    Parameters
    ----------
    session : Session
    name : str
        What the bundle calls it.
    source : str
        Series of the session.
    epoch : int
    """

    def __init__(self, session: Session, name: str, source: str, epoch: int) -> None:
        series = session.series(source)
        inside = np.isfinite(series.values_L)
        known = np.zeros(len(inside), bool)
        for start, end in series.domain_K2:
            known |= (series.samples_L >= start) & (series.samples_L <= end)
        self._samples_L = series.samples_L[inside & known]
        self._values_L = series.values_L[inside & known].astype("<f4")
        steps = np.diff(self._samples_L)
        if not len(steps) or np.median(steps) <= 0:
            raise SessionError(f"{session.path}: {source} has fewer than two values to send")
        self._rate = session.rate / float(np.median(steps))
        self._name, self._epoch, self._next, self._seq = name, epoch, 0, 0

    def due(self, first: int, end: int) -> Iterator[BehaviourBatch]:
        """Values up to a sample, the last of which may lie on the edge of a bin; none from before
        ``first``, where nobody was told that anything began.
        """
        low = max(self._next, int(np.searchsorted(self._samples_L, first)))
        self._next = max(low, int(np.searchsorted(self._samples_L, end, side="right")))
        for at in range(low, self._next):
            value = self._values_L[at : at + 1]
            sample = int(self._samples_L[at])
            yield BehaviourBatch(
                self._name, self._epoch, self._seq, sample, self._rate, value, monotonic_ns()
            )
            self._seq += 1


Change = tuple[int, str | None]
"""The sample from which on it is of a class, or is not known."""


class States:
    """A categorical behaviour on its way out: each change of it, and when it is no longer known.

    Of a trial variable an observer knows from ``known_from`` to the end of the trial.

    Parameters
    ----------
    session : Session
    name : str
        What the bundle calls it.
    config : mapping
        The bundle's ``source``, ``classes`` and ``known_from``.
    epoch : int
    """

    def __init__(self, session: Session, name: str, config: Mapping[str, Any], epoch: int) -> None:
        source = _source_of(config)
        class_of = {float(number): label for label, number in config["classes"].items()}
        if source.startswith("trials."):
            self._events = _of_trials(session, source, class_of, config["known_from"])
        else:
            self._events = _of_series(session, source, class_of)
        self._name, self._epoch, self._next = name, epoch, 0

    def due(self, first: int, end: int) -> Iterator[TaskEvent]:
        """Events before a sample; none from before ``first``."""
        while self._next < len(self._events) and self._events[self._next][0] < end:
            sample, value = self._events[self._next]
            self._next += 1
            if sample >= first:
                yield TaskEvent(self._epoch, sample, self._name, value)


def _source_of(config: Mapping[str, Any]) -> str:
    source = config["source"]
    return str(source if isinstance(source, str) else source[0])


def _of_trials(
    session: Session, source: str, class_of: Mapping[float, str], known_from: str
) -> list[Change]:
    seconds_2K = np.stack([session.numbers(f"trials.{column}") for column in (known_from, "end")])
    told_K = np.isfinite(seconds_2K[0])
    known_K, end_K = np.maximum(session.samples(seconds_2K), 0)
    changes: list[Change] = []
    for k, stored in enumerate(session.numbers(source)):
        known, end = known_K[k], end_K[k]
        if stored in class_of and told_K[k]:
            changes += [(int(known), class_of[stored]), (int(max(known, end)), None)]
    return sorted(changes, key=lambda change: change[0])


def _of_series(session: Session, source: str, class_of: Mapping[float, str]) -> list[Change]:
    series = session.series(source)
    changes: list[Change] = []
    for start, end in series.domain_K2:
        inside = slice(*np.searchsorted(series.samples_L, [start, end + 1]))
        state = None
        for sample, value in zip(series.samples_L[inside], series.values_L[inside], strict=True):
            if (now := class_of.get(float(value))) != state:
                # A value counts for a bin that ends where it was taken, an event where it lies.
                changes.append((max(0, int(sample) - 1), now))
                state = now
        changes.append((int(end), None))
    return changes


def tracks_of(
    session: Session, live: Mapping[str, str | None], bundle: str | None, epoch: int
) -> list[Track | States]:
    """What is sent beside the spikes.

    Parameters
    ----------
    session : Session
    live : mapping of str to str or None
        By name, the series of the session; None where the bundle says what it is.
    bundle : path, optional
    epoch : int

    Raises
    ------
    ConfigError, SessionError
        If neither the command line nor the bundle says what a behaviour is, or it is not there.
    """
    configs: Mapping[str, Any] = {}
    if bundle is not None:
        from rt_neds.bundle import load_spec  # brings torch

        configs = load_spec(bundle).training.get("config", {}).get("behaviour", {})
    found: list[Track | States] = []
    for name, series in live.items():
        config = configs.get(name, {})
        if series is None and not config:
            known = f"; the bundle has {', '.join(configs)}" if configs else ", or add --bundle B"
            raise ConfigError(
                f"--live {name}; expected NAME=SERIES, such as wheel_speed=wheel.wheel_speed{known}"
            )
        if series is None and config["transform"] != "none":
            raise ConfigError(
                f"--live {name} is made of {config['source']} and no series of the session; "
                "leave it out, or name a series: NAME=SERIES"
            )
        if series is None and config["kind"] == "categorical":
            found.append(States(session, name, config, epoch))
        else:
            found.append(Track(session, name, series or _source_of(config), epoch))
    return found


def named(pairs: Sequence[str]) -> dict[str, str | None]:
    """``NAME=SERIES``, or ``NAME`` alone, of the command line."""
    found: dict[str, str | None] = {}
    for pair in pairs:
        name, equals, series = pair.partition("=")
        if not name or (equals and not series):
            raise ConfigError(
                f"--live {pair}; expected NAME=SERIES, such as wheel_speed=wheel.wheel_speed"
            )
        found[name] = series or None
    return found
