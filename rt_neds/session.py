"""One recorded session: a brainsets HDF5 file, read with temporaldata.

Seconds become samples once, here, at the door.

Shape suffixes: S spikes, K intervals, L values of a series.
"""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from rt_neds.errors import SessionError
from rt_neds.frames import SPIKE_DTYPE

DEFAULT_RATE = 30_000.0
"""Samples per second where a file does not say."""


@dataclass(frozen=True)
class Series:
    """A behaviour over time.

    Attributes
    ----------
    samples_L : ndarray of int64
        When each value was taken, in probe samples, ascending.
    values_L : ndarray of float64
    domain_K2 : ndarray of int64
        Where the series is defined, in samples; elsewhere its values are not behaviour.
    """

    samples_L: NDArray[np.int64]
    values_L: NDArray[np.float64]
    domain_K2: NDArray[np.int64]


@dataclass
class Session:
    """A session: spikes as wire records, everything else by name.

    What is asked for by name is read from the file at the first such question, unless it is there.

    Attributes
    ----------
    id : str
    rate : float
        Samples per second.
    unit_ids : list of str
        In the order of the ``unit`` field of the records.
    records_S : ndarray of SPIKE_DTYPE
        Sorted by sample.
    domain_K2 : ndarray of int64
        What was recorded, in samples; outside it "no spike" means nothing.
    """

    path: Path
    id: str
    rate: float
    unit_ids: list[str]
    records_S: NDArray[np.void]
    domain_K2: NDArray[np.int64]
    _data: Any = field(repr=False, default=None)

    @cached_property
    def end(self) -> int:
        """First sample after everything that was recorded."""
        return int(self.domain_K2[-1, 1])

    def samples(self, seconds: Any) -> NDArray[np.int64]:
        """Seconds of the session clock to the nearest sample; NaN becomes -1."""
        seconds = np.asarray(seconds, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(seconds), np.rint(seconds * self.rate), -1).astype(np.int64)

    def intervals(self, name: str) -> NDArray[np.int64]:
        """Start and end samples of a named Interval, shape (intervals, 2)."""
        interval = self._get(name)
        if not hasattr(interval, "start"):
            raise SessionError(f"{self.path}: {name} is not a set of intervals; name one that is")
        return np.stack([self.samples(interval.start), self.samples(interval.end)], axis=1)

    def names(self, of: str = "") -> list[str]:
        """Names of the groups in the file, or of what is inside one of them."""
        group = self._get(of) if of else self.data
        return sorted(str(key) for key in group.keys())  # noqa: SIM118

    def has(self, name: str) -> bool:
        """Whether a dotted name, such as ``wheel.wheel_speed``, is in the file."""
        try:
            self._get(name)
        except SessionError:
            return False
        return True

    def column(self, name: str) -> NDArray[Any]:
        """Values of a dotted name, such as ``trials.choice`` or ``units.region``, as stored."""
        values = np.asarray(self._get(name))
        return values.astype(str) if values.dtype.kind == "S" else values

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Values of a dotted name, which must be numbers."""
        values = self.column(name)
        if values.dtype.kind not in "fiub":
            first = next((str(value) for value in values.flat), "nothing")
            found = repr(first) if values.dtype.kind == "U" else "no column"
            raise SessionError(
                f"{self.path}: {name} holds {found}; numbers were expected: write it as numbers, "
                "such as 1 and 0"
            )
        if values.ndim != 1:
            raise SessionError(
                f"{self.path}: {name} has the shape {values.shape}; one number for each time or "
                "row was expected: keep its columns under names of their own"
            )
        return values.astype(np.float64)

    def series(self, name: str) -> Series:
        """A continuous behaviour by its dotted name, such as ``wheel.wheel_speed``."""
        self._get(name)  # says what is missing
        group_name, _, _ = name.rpartition(".")
        group = self._get(group_name) if group_name else None
        if group is None or not hasattr(group, "timestamps"):
            raise SessionError(
                f"{self.path}: {name} is not a time series; expected <group>.<name> of one; "
                f"there are: {', '.join(self.behaviours()) or 'none'}"
            )
        values = self.numbers(name)
        domain = np.stack(
            [self.samples(group.domain.start), self.samples(group.domain.end)], axis=1
        )
        return Series(self.samples(group.timestamps), values, domain)

    def behaviours(self) -> list[str]:
        """Dotted names of every time series but the spikes."""
        names = []
        data = self.data
        for group_name in sorted(data.keys()):
            group = getattr(data, group_name)
            if group_name != "spikes" and hasattr(group, "timestamps"):
                skip = ("timestamps", "domain")
                names += [f"{group_name}.{key}" for key in group.keys() if key not in skip]  # noqa: SIM118
        return names

    def _get(self, name: str) -> Any:
        found, known = self.data, []
        for part in name.split("."):
            known = [str(key) for key in found.keys()] if hasattr(found, "keys") else []  # noqa: SIM118
            if part not in known:
                nearest = difflib.get_close_matches(part, known, n=1)
                advice = f"did you mean {nearest[0]}?" if nearest else f"it has: {', '.join(known)}"
                raise SessionError(f"{self.path}: no {name} in this session; {advice}")
            found = getattr(found, part)
        return found

    @property
    def data(self) -> Any:
        """All of the file, as temporaldata has it."""
        if self._data is None:
            self._data = _open(self.path)
        return self._data


def load_session(path: str | Path) -> Session:
    """Read a session.

    Parameters
    ----------
    path : path
        A brainsets HDF5 file with at least ``spikes``, ``units`` and ``domain``.

    Returns
    -------
    Session

    Raises
    ------
    SessionError
        No such file, not HDF5, not a session, a time that is NaN, no spikes, spikes of units that
        are not listed, units of the same id, or pieces of the recording that are out of order.
    """
    path = Path(path)
    data = _open(path)
    for name in ("spikes", "units", "domain"):
        if not hasattr(data, name):
            raise SessionError(
                f"{path} has no {name}; a brainsets session has spikes, units and domain: "
                "make one with rt-neds prepare or rt-neds simulate"
            )
    rate = _rate(data)
    unit_ids = _unit_ids(path, data.units)
    session_id = str(getattr(getattr(data, "session", None), "id", path.stem))
    return Session(
        path=path,
        id=session_id,
        rate=rate,
        unit_ids=unit_ids,
        records_S=_records(path, data.spikes, len(unit_ids), rate),
        domain_K2=_domain(path, data.domain, rate),
        _data=data,
    )


def _open(path: Path) -> Any:
    from temporaldata import Data

    if not path.exists():
        raise SessionError(f"no such session file: {path}; check the path")
    if path.is_dir() or not h5py.is_hdf5(path):
        raise SessionError(f"{path} is not an HDF5 file; a brainsets session (.h5) was expected")
    try:
        with h5py.File(path, "r") as file:
            return Data.from_hdf5(file, lazy=False)
    except (OSError, KeyError, ValueError, AttributeError, TypeError, AssertionError) as error:
        if isinstance(error, AssertionError) and (place := _unknown_time(path)):
            raise SessionError(
                f"{path}: {place}; a time was expected: write when it was, or leave that row out"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SessionError(
            f"{path} is HDF5 but not a brainsets session ({reason}); "
            "make one with rt-neds prepare or rt-neds simulate"
        ) from None


def _unit_ids(path: Path, units: Any) -> list[str]:
    unit_ids = [str(unit) for unit in np.asarray(units.id).astype(str)]
    for unit, times in Counter(unit_ids).items():
        if times > 1:
            raise SessionError(
                f"{path}: unit id {unit} is listed {times} times; each once was expected, as a "
                "stream tells units by their ids: give every unit its own"
            )
    return unit_ids


def _domain(path: Path, domain: Any, rate: float) -> NDArray[np.int64]:
    seconds = np.stack([np.asarray(domain.start), np.asarray(domain.end)], axis=1)
    edges = seconds.astype(np.float64).ravel()
    wrong = np.flatnonzero(np.diff(edges) < 0)
    if not len(edges) or len(wrong):
        found = f"{edges[wrong[0]]:g} before {edges[wrong[0] + 1]:g} s" if len(wrong) else "nothing"
        raise SessionError(
            f"{path}: domain has {found}; expected the pieces that were recorded, each after the "
            "one before"
        )
    return np.maximum(np.rint(seconds * rate).astype(np.int64), 0)  # bins count from 0


def _unknown_time(path: Path) -> str | None:
    """Where in a file a time is NaN, which temporaldata refuses without saying where."""

    def look(name: str, item: Any) -> str | None:
        is_time = name.rpartition("/")[2] in ("timestamps", "start", "end")
        if not is_time or not isinstance(item, h5py.Dataset) or item.dtype.kind != "f":
            return None
        rows = np.flatnonzero(np.isnan(item))
        return f"{name.replace('/', '.')} is NaN in row {rows[0]}" if len(rows) else None

    with h5py.File(path, "r") as file:
        place: str | None = file.visititems(look)
    return place


def _rate(data: Any) -> float:
    rate = getattr(getattr(data, "session", None), "sampling_rate", None)
    return float(rate) if rate else DEFAULT_RATE


def _records(path: Path, spikes: Any, n_units: int, rate: float) -> NDArray[np.void]:
    seconds = np.asarray(spikes.timestamps, dtype=np.float64)
    unit = np.asarray(spikes.unit_index)
    if len(seconds) == 0:
        raise SessionError(f"{path} has no spikes in it; a session needs at least one")
    if not np.isfinite(seconds).all():
        raise SessionError(f"{path}: some spike times are not finite; sort or export it again")
    if len(wrong := unit[(unit < 0) | (unit >= n_units)]):
        raise SessionError(
            f"{path}: spikes of unit {wrong[0]} but {n_units} units are listed; "
            "spikes.unit_index must be a row of units"
        )
    records = np.zeros(len(seconds), SPIKE_DTYPE)
    records["sample"] = np.rint(seconds * rate)
    records["unit"] = unit
    return records[np.argsort(records["sample"], kind="stable")]
