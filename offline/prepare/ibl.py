"""Sessions from IBL ALF folders: spikes of every probe, trials, wheel, with BrainWideBench names.

What a folder lacks is left out. Of a file that was made anew, which lies in a folder called after
the day (``#2024-05-06#``), the newest is taken, as ONE does. The wheel's speed is how far it came
in the last 20 ms, by what its encoder had told by then; IBL's own is filtered both ways.

Shape suffixes: S spikes, U units, R trials.
"""

from __future__ import annotations

from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from temporaldata import Data, Interval, IrregularTimeSeries

from offline.prepare.writing import session_data, trials_of
from rt_neds.errors import ConfigError, SessionError

SILENCE_S = 1.0
SILENCE_STEPS = 30
"""No probe is silent on all its units for a second, nor a few units for so many times the mean
time between their spikes, which chance does once in e^30: nothing was recorded then."""
REVISION = "#*#"
"""Folder of files made anew, beside those they replace."""
TRIAL_TIMES = {
    "intervals_0": "start",
    "intervals_1": "end",
    "stimOn_times": "stim_on_time",
    "goCue_times": "go_cue_time",
    "firstMovement_times": "movement_onset_time",
    "response_times": "response_time",
    "feedback_times": "feedback_time",
    "stimOff_times": "stim_off_time",
}
CHOICE: dict[float, int] = {1: 1, -1: 0, 0: 2}  # IBL's: 1 left, -1 right, 0 none
BLOCK = {0.8: 1, 0.2: 0, 0.5: -1}


def from_alf(folder: str | Path, session_id: str | None = None) -> Data:
    """A session of an ALF folder.

    Parameters
    ----------
    folder : path
        The ``alf`` folder, or the one that holds it.
    session_id : str, optional
        The name of the folder that holds ``alf`` by default.

    Raises
    ------
    SessionError, ConfigError
        No spikes in it, or a file that does not fit the others; pyarrow is missing.
    """
    folder = Path(folder)
    alf = folder / "alf" if (folder / "alf").is_dir() else folder
    found = {path.parent for path in alf.rglob("spikes.times*.npy")}
    probes = sorted({path.parent if path.match(REVISION) else path for path in found})
    if not probes:
        raise SessionError(
            f"{folder} has no spikes.times.npy; expected the alf folder of an IBL session"
        )
    time, unit = [], []
    columns: list[dict[str, NDArray[Any]]] = []
    n_units = 0
    for probe in probes:
        time_S, unit_S, of_probe = _probe(alf, probe)
        unit.append(unit_S + n_units)
        n_units += len(of_probe["id"])
        time.append(time_S)
        columns.append(of_probe)
    shared = set(columns[0]).intersection(*columns)
    units = {name: np.concatenate([c[name] for c in columns]) for name in sorted(shared)}
    groups: dict[str, Any] = {}
    trials = _trials(alf)
    if trials is not None:
        groups["trials"] = trials
    wheel = _wheel(alf)
    if wheel is not None:
        groups["wheel"] = wheel
    pieces = [recorded(time_S) for time_S in time if len(time_S)]
    return session_data(
        session_id or (folder.resolve() if alf != folder else folder.resolve().parent).name,
        np.concatenate(time),
        np.concatenate(unit),
        units,
        common_to(pieces) if pieces else np.zeros((0, 2)),
        **groups,
    )


def recorded(time_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """Stretches with spikes, in seconds: between them all units are silent for too long."""
    time_S = np.sort(time_S[np.isfinite(time_S)])
    if not len(time_S):
        return np.zeros((0, 2))
    mean_s = (time_S[-1] - time_S[0]) / len(time_S)
    holes = np.flatnonzero(np.diff(time_S) > max(SILENCE_S, SILENCE_STEPS * mean_s))
    starts = time_S[np.concatenate([[0], holes + 1])]
    ends = np.nextafter(time_S[np.concatenate([holes, [len(time_S) - 1]])], np.inf)
    return np.stack([starts, ends], axis=1)


def common_to(pieces: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """What lies in a piece of each: a probe, or a unit, is not silent while others go on alone."""
    intervals = [
        Interval(start=of[:, 0].copy(), end=of[:, 1].copy())
        for of in (of_K2[np.argsort(of_K2[:, 0])] for of_K2 in pieces)
    ]
    common = reduce(and_, intervals)
    return np.stack([common.start, common.end], axis=1)


def _newest(folder: Path, *patterns: str) -> Path | None:
    """A file of a folder, of its newest revision; the first pattern that there is in that."""
    for place in [*sorted(folder.glob(REVISION), reverse=True), folder]:
        for pattern in patterns:
            if found := sorted(place.glob(pattern)):
                return found[0]
    return None


def _load(folder: Path, name: str) -> NDArray[Any] | None:
    """An ALF array, whatever revision or hash its file name carries; None if it is not there."""
    file = _newest(folder, f"{name}.npy", f"{name}.*.npy")
    if file is None:
        return None
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise SessionError(
            f"{file} cannot be read as an array of numbers; it may have come but in part: download "
            "it again"
        ) from None
    if values.ndim == 2 and values.shape[1] == 1:  # a column, as MATLAB writes it
        values = values[:, 0]
    if values.ndim != 1:
        raise SessionError(f"{file} has the shape {values.shape}; a row of numbers was expected")
    return values


def _table(folder: Path, name: str) -> Any:
    file = _newest(folder, f"{name}*.pqt")
    if file is None:
        return None
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(f"{file} needs pyarrow to be read; pip install 'rt-neds[ibl]'") from None
    try:
        table = parquet.read_table(file)
    except (OSError, ValueError):
        raise SessionError(
            f"{file} cannot be read as a table; it may have come but in part: download it again"
        ) from None
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def _probe(alf: Path, probe: Path) -> tuple[Any, Any, dict[str, NDArray[Any]]]:
    """Times and unit of each spike of a probe, and columns of its units."""
    time_S, unit_S = _load(probe, "spikes.times"), _load(probe, "spikes.clusters")
    if unit_S is None or time_S is None or len(time_S) != len(unit_S):
        raise SessionError(
            f"{probe}: spikes.times of {len(time_S) if time_S is not None else 0} and "
            f"spikes.clusters of {len(unit_S) if unit_S is not None else 0} spikes; they must be "
            "of one sorting"
        )
    unit_S = unit_S.astype(np.int64)
    if (least := int(unit_S.min(initial=0))) < 0:
        raise SessionError(f"{probe}: spikes of a unit {least}; units are counted from 0")
    metrics = _table(probe, "clusters.metrics") or {}
    number_U = np.asarray(metrics.get("cluster_id", ()), np.int64)
    n_units = 1 + max(int(unit_S.max(initial=-1)), int(number_U.max(initial=-1)))
    name = probe.relative_to(alf).parts[0] if probe != alf else "probe00"
    columns: dict[str, NDArray[Any]] = {
        "id": np.array([f"{name}/{unit}" for unit in range(n_units)]),
        "probe_id": np.full(n_units, name),
    }
    if (uuids := _newest(probe, "clusters.uuids*.csv")) is not None:
        ids = uuids.read_text().split()[1:]
        if len(ids) == n_units:
            columns["id"] = np.array(ids)
    for file, column in (("clusters.channels", "channels"), ("clusters.depths", "depths")):
        values = _load(probe, file)
        if values is not None and len(values) == n_units:
            columns[column] = values
    order = np.argsort(number_U, kind="stable")
    whole = np.array_equal(number_U[order], np.arange(n_units))  # a row for each
    for key in ("acronym", "label"):
        if whole and key in metrics:
            values = metrics[key][order]
            columns[key] = values.astype(str) if values.dtype == object else values
    finite_S = np.isfinite(time_S)
    return time_S[finite_S], unit_S[finite_S], columns


def _trials(alf: Path) -> Interval | None:
    table = _table(alf, "_ibl_trials.table")
    if table is None:
        return None
    if missing := {"intervals_0", "intervals_1"} - table.keys():
        raise SessionError(
            f"{alf}: the table of trials has no {' and no '.join(sorted(missing))}; expected when "
            "each begins and ends: download it again, or leave it out"
        )
    of = {old: column.astype(np.float64) for old, column in table.items() if column.dtype != object}
    columns = {new: of[old] for old, new in TRIAL_TIMES.items() if old in of}
    if "choice" in of:
        columns["choice"] = _codes(of["choice"], CHOICE, 2)
    if "probabilityLeft" in of:
        columns["probability_left"] = left_R = of["probabilityLeft"]
        columns["block_prior"] = _codes(left_R.round(2), BLOCK, -1)
    if "feedbackType" in of:
        type_R = of["feedbackType"]
        columns["feedback_type"] = _whole(type_R)
        columns["reward"] = _whole(np.where(np.isnan(type_R), np.nan, type_R > 0))
    for side in ("Left", "Right"):
        if f"contrast{side}" in of:
            columns[f"contrast_{side.lower()}"] = of[f"contrast{side}"]
    return trials_of(columns, list(TRIAL_TIMES.values()))


def _codes(values_R: NDArray[np.float64], code_of: dict[float, int], other: int) -> NDArray[Any]:
    return _whole(np.array([v if np.isnan(v) else code_of.get(v, other) for v in values_R]))


def _whole(values_R: NDArray[np.float64]) -> NDArray[Any]:
    """Integers, unless some are not known."""
    return values_R if np.isnan(values_R).any() else values_R.astype(np.int64)


def _wheel(alf: Path) -> IrregularTimeSeries | None:
    time_L, position_L = _load(alf, "_ibl_wheel.timestamps"), _load(alf, "_ibl_wheel.position")
    if time_L is None or position_L is None or len(time_L) != len(position_L):
        return None
    order = np.argsort(time_L, kind="stable")
    order = order[np.isfinite(time_L[order])]  # what has no time cannot be placed
    time_L, position_L = time_L[order], position_L[order]
    if not len(time_L):
        return None
    step = np.arange(np.ceil(time_L[0] * 50), np.floor(time_L[-1] * 50) + 1)
    if len(step) < 2:
        return None
    last = np.searchsorted(time_L, step / 50, side="right") - 1  # and none from later
    moved, grid = np.diff(position_L[np.maximum(last, 0)]), step[1:] / 50
    return IrregularTimeSeries(
        timestamps=grid,
        wheel_vel=(moved * 50).astype(np.float32),
        wheel_speed=np.abs(moved * 50).astype(np.float32),
        domain=Interval(start=np.array([grid[0] - 0.02]), end=np.array([grid[-1] + 1e-3])),
    )
