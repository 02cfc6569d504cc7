"""Behaviour and trials from CSV files, as a rig's own programs leave them.

A file is called after what it holds: ``wheel.csv`` becomes the group ``wheel``. Columns ``start``
and ``end`` make its rows intervals, such as ``trials``; a column ``time`` makes them values of the
other columns over time. Times are seconds of the probe's clock, as those of the spikes are.

Shape suffixes: R rows.
"""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from temporaldata import Data, Interval, IrregularTimeSeries

from offline.prepare.writing import series_of, trials_of
from rt_neds.errors import SessionError

NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
TAKEN = ("self", "timestamps", "domain", "timekeys")
"""What temporaldata calls something else."""


def add_tables(data: Data, paths: Iterable[str | Path]) -> dict[str, dict[str, int]]:
    """Put what some CSV files hold into a session, in place.

    An empty cell is a value that is not known. Words are kept as words in a table of intervals.
    A pause of more than a second, and of ten usual steps, is taken for time in which nobody looked.

    Parameters
    ----------
    data : temporaldata.Data
        With ``domain``.
    paths : iterable of path

    Returns
    -------
    dict of str to dict
        Of each group: ``rows`` it has, ``without_times`` of its file that it has not, and
        ``outside`` what was recorded of those that it has.

    Raises
    ------
    SessionError
        A file cannot be read as such a table, its name is taken, or most of it lies outside what
        was recorded.
    """
    taken = {}
    for path in map(Path, paths):
        name = path.stem
        if not NAME.fullmatch(name):
            raise SessionError(f"{path}: {name!r} names its group; use letters, digits and _")
        if hasattr(data, name):
            raise SessionError(f"{path}: the session has {name} already; call the file otherwise")
        columns, line_R = read_csv(path)
        read = len(next(iter(columns.values())))
        if {"start", "end"} <= columns.keys():
            group = _intervals(path, columns)
            begins_R = group.start
        elif "time" in columns:
            group = _series(path, columns, line_R)
            begins_R = group.timestamps
        else:
            raise SessionError(
                f"{path} has the columns {', '.join(columns)}; expected time, or start and end, in "
                "seconds of the probe's clock"
            )
        inside = _check_times(path, begins_R, data.domain)
        setattr(data, name, group)
        rows = len(begins_R)
        taken[name] = {"rows": rows, "without_times": read - rows, "outside": rows - inside}
    return taken


def read_csv(path: Path) -> tuple[dict[str, NDArray[Any]], array[int]]:
    """Columns by name: numbers, NaN where a cell is empty, or words if the first of them is one;
    and the line of the file that each row ends on.
    """
    if not path.is_file():
        raise SessionError(f"no such table: {path}; check the path")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = ((reader.line_num, row) for row in reader if any(map(str.strip, row)))
            return _columns(path, rows)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SessionError(f"{path} is not a CSV file ({error}); expected text in UTF-8") from None


def _columns(
    path: Path, rows: Iterator[tuple[int, list[str]]]
) -> tuple[dict[str, NDArray[Any]], array[int]]:
    names = [cell.strip() for cell in next(rows, (1, []))[1]]
    wrong = [name for name in names if not NAME.fullmatch(name) or names.count(name) > 1]
    if len(names) < 2 or wrong:
        found = f"a column {wrong[0]!r}" if wrong else f"{len(names)} columns"
        raise SessionError(
            f"{path}: {found}; expected a line of two names or more, each once and of letters, "
            "digits and _, separated by commas"
        )
    columns = [_Column() for _ in names]
    line_R = array("q")
    for line, row in rows:
        line_R.append(line)
        if len(row) != len(names):
            raise SessionError(
                f"{path}, line {line}: {len(row)} cells; expected {len(names)}, as the names have"
            )
        for name, column, cell in zip(names, columns, row, strict=True):
            if not column.add(cell.strip()):
                raise SessionError(
                    f"{path}, line {line}: {cell.strip()!r} in the column {name}; a number was "
                    "expected, as above"
                )
    if not line_R:
        raise SessionError(f"{path} has names and no rows; expected one or more")
    return {name: column.values() for name, column in zip(names, columns, strict=True)}, line_R


class _Column:
    """Cells as they come, eight bytes for each number: an hour of a wheel has millions."""

    def __init__(self) -> None:
        self._numbers, self._any = array("d"), False
        self._words: list[str] | None = None

    def add(self, cell: str) -> bool:
        """Whether the cell is of the kind of those before."""
        if self._words is not None:
            self._words.append(cell)
            return True
        try:
            self._numbers.append(float(cell) if cell else math.nan)
            self._any |= bool(cell)
        except ValueError:
            if self._any:
                return False
            self._words = [""] * len(self._numbers) + [cell]
        return True

    def values(self) -> NDArray[Any]:
        return np.array(self._numbers if self._words is None else self._words)


def _intervals(path: Path, columns: dict[str, NDArray[Any]]) -> Interval:
    _check_names(path, columns, Interval)
    _check_numbers(path, columns, ["start", "end"])
    found = trials_of(columns, ["start", "end", *(n for n in columns if n.endswith("_time"))])
    if not len(found) or (found.end <= found.start).any():
        raise SessionError(f"{path}: an interval ends before it begins, or there is none; mend it")
    return found


def _series(
    path: Path, columns: dict[str, NDArray[Any]], line_R: array[int]
) -> IrregularTimeSeries:
    _check_names(path, columns, IrregularTimeSeries)
    _check_numbers(path, columns, list(columns))
    time_R = columns.pop("time")
    wrong_R = ~np.isfinite(time_R)
    wrong_R[1:] |= ~(time_R[1:] > time_R[:-1])
    if len(time_R) < 2 or wrong_R.any():
        line = line_R[int(wrong_R.argmax())]
        raise SessionError(
            f"{path}, line {line}: expected two rows or more, the time of each later than the last"
        )
    return series_of(time_R, columns)


def _check_names(path: Path, columns: dict[str, NDArray[Any]], kind: type) -> None:
    for name in columns:
        if name in TAKEN or hasattr(kind, name):
            raise SessionError(
                f"{path}: a column {name!r}; a session keeps something else under that name: call "
                "it otherwise"
            )


def _check_numbers(path: Path, columns: dict[str, NDArray[Any]], names: list[str]) -> None:
    for name in names:
        if columns[name].dtype.kind != "f":
            word = next(str(cell) for cell in columns[name] if cell)
            raise SessionError(f"{path}: {word!r} in the column {name}; numbers were expected")


def _check_times(path: Path, time_R: NDArray[np.float64], domain: Any) -> int:
    """How many were recorded. Most in its span: other clocks, and units, are told by that."""
    start, end = float(np.min(domain.start)), float(np.max(domain.end))
    inside = int(np.count_nonzero((time_R >= start) & (time_R <= end)))
    if 2 * inside < len(time_R):
        raise SessionError(
            f"{path}: {inside} of {len(time_R)} rows, from {time_R[0]:.10g} to {time_R[-1]:.10g}, "
            f"lie within the recording of {start:g} to {end:g} s; expected seconds of the probe's "
            "clock (not samples or milliseconds), and no more than was recorded"
        )
    piece_R = np.searchsorted(domain.start, time_R, side="right") - 1
    return int(np.count_nonzero((piece_R >= 0) & (time_R <= np.asarray(domain.end)[piece_R])))
