"""Behaviour and trials from CSV files, as a rig's own programs leave them.

A file is called after what it holds: ``wheel.csv`` becomes the group ``wheel``. Columns ``start``
and ``end`` make its rows intervals, such as ``trials``; a column ``time`` makes them values of the
other columns over time. Times are seconds of the probe's clock, as those of the spikes are.

Shape suffixes: R rows, K intervals.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from temporaldata import Data

from offline.prepare.writing import series_of, trials_of
from rt_neds.errors import SessionError

NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def add_tables(data: Data, paths: Iterable[str | Path]) -> None:
    """Put what some CSV files hold into a session, in place.

    An empty cell is a value that is not known. Words are kept as words in a table of intervals.
    A pause of more than a second, and of ten usual steps, is taken for time in which nobody looked.

    Parameters
    ----------
    data : temporaldata.Data
        With ``domain``.
    paths : iterable of path

    Raises
    ------
    SessionError
        A file cannot be read as such a table, its name is taken, or none of it lies within what was
        recorded.
    """
    for path in map(Path, paths):
        name = path.stem
        if not NAME.fullmatch(name):
            raise SessionError(f"{path}: {name!r} names its group; use letters, digits and _")
        if hasattr(data, name):
            raise SessionError(f"{path}: the session has {name} already; call the file otherwise")
        columns = read_csv(path)
        if {"start", "end"} <= columns.keys():
            group, within_K2 = _intervals(path, columns)
        elif "time" in columns:
            group, within_K2 = _series(path, columns)
        else:
            raise SessionError(
                f"{path} has the columns {', '.join(columns)}; expected time, or start and end, in "
                "seconds of the probe's clock"
            )
        _check_times(path, within_K2, data.domain)
        setattr(data, name, group)


def read_csv(path: Path) -> dict[str, NDArray[Any]]:
    """Columns by name: numbers where all of them are, NaN where a cell is empty, else words."""
    if not path.is_file():
        raise SessionError(f"no such table: {path}; check the path")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, strict=True) if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise SessionError(f"{path} is not a CSV file ({error}); expected text in UTF-8") from None
    names = [cell.strip() for cell in rows[0]] if rows else []
    wrong = [name for name in names if not NAME.fullmatch(name) or names.count(name) > 1]
    if len(names) < 2 or wrong or len(rows) < 2:
        found = f"a column {wrong[0]!r}" if wrong else f"{len(names)} columns, {len(rows)} rows"
        raise SessionError(
            f"{path}: {found}; expected a line of names, each once and of letters, digits and _, "
            "then rows, separated by commas"
        )
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise SessionError(
                f"{path}, row {number}: {len(row)} cells; expected {len(names)}, as the names have"
            )
    return {
        name: _numbers(cells)
        for name, cells in zip(names, zip(*rows[1:], strict=True), strict=True)
    }


def _numbers(cells: Iterable[str]) -> NDArray[Any]:
    stripped = [cell.strip() for cell in cells]
    try:
        return np.array([float(cell) if cell else np.nan for cell in stripped])
    except ValueError:
        return np.array(stripped)


def _intervals(path: Path, columns: dict[str, NDArray[Any]]) -> tuple[Any, NDArray[np.float64]]:
    _check_numbers(path, columns, ["start", "end"])
    found = trials_of(columns, ["start", "end", *(n for n in columns if n.endswith("_time"))])
    within_K2 = np.stack([found.start, found.end], axis=1)
    if not len(within_K2) or (within_K2[:, 1] <= within_K2[:, 0]).any():
        raise SessionError(f"{path}: an interval ends before it begins, or there is none; mend it")
    return found, within_K2


def _series(path: Path, columns: dict[str, NDArray[Any]]) -> tuple[Any, NDArray[np.float64]]:
    _check_numbers(path, columns, list(columns))
    time_R = columns.pop("time")
    back = np.flatnonzero(~((np.diff(time_R) > 0) & np.isfinite(time_R[1:])))
    if len(time_R) < 2 or len(back):
        row = int(back[0]) + 3 if len(back) else 2
        raise SessionError(
            f"{path}, row {row}: expected two rows or more, the time of each later than the last"
        )
    return series_of(time_R, columns), np.array([[time_R[0], time_R[-1]]])


def _check_numbers(path: Path, columns: dict[str, NDArray[Any]], names: list[str]) -> None:
    for name in names:
        if columns[name].dtype.kind != "f":
            word = next(str(cell) for cell in columns[name] if not _is_number(cell))
            raise SessionError(f"{path}: {word!r} in the column {name}; numbers were expected")


def _is_number(cell: str) -> bool:
    return _numbers([cell]).dtype.kind == "f"


def _check_times(path: Path, within_K2: NDArray[np.float64], domain: Any) -> None:
    """At least some of it was recorded: times of another clock are told by that."""
    first, last = float(within_K2.min()), float(within_K2.max())
    start, end = float(np.min(domain.start)), float(np.max(domain.end))
    if last <= start or first >= end:
        raise SessionError(
            f"{path} is of {first:g} to {last:g} s and the recording of {start:g} to {end:g} s; "
            "expected seconds of the probe's clock"
        )
