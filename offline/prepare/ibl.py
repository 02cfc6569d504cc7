"""Sessions from IBL ALF folders: spikes of every probe, trials, wheel, with BrainWideBench names.

What a folder lacks is left out. The wheel's speed is that of the last 20 ms, taken causally from
its position; IBL's own is filtered forwards and backwards.

Shape suffixes: S spikes, U units, R trials.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from temporaldata import Data, Interval, IrregularTimeSeries

from offline.prepare.writing import session_data, trials_of
from rt_neds.errors import ConfigError, SessionError

SILENCE_S = 1.0
"""No probe is silent on all its units for so long: nothing was recorded then."""
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
CHOICE = {1: 1, -1: 0, 0: 2}  # IBL's: 1 left, -1 right, 0 none
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
    probes = sorted({path.parent for path in alf.rglob("spikes.times*.npy")})
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
    time_S = np.concatenate(time)
    return session_data(
        session_id or (folder.name if alf != folder else folder.resolve().parent.name),
        time_S,
        np.concatenate(unit),
        units,
        recorded(time_S),
        **groups,
    )


def recorded(time_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """Stretches with spikes, in seconds: between them all units are silent for SILENCE_S."""
    time_S = np.sort(time_S)
    holes = np.flatnonzero(np.diff(time_S) > SILENCE_S)
    starts = time_S[np.concatenate([[0], holes + 1])]
    ends = np.nextafter(time_S[np.concatenate([holes, [len(time_S) - 1]])], np.inf)
    return np.stack([starts, ends], axis=1)


def _load(folder: Path, name: str) -> NDArray[Any] | None:
    """An ALF array, whatever revision or hash its file name carries; None if it is not there."""
    found = sorted(folder.glob(f"{name}.npy")) or sorted(folder.glob(f"{name}.*.npy"))
    return np.load(found[0], allow_pickle=False) if found else None


def _table(folder: Path, name: str) -> Any:
    found = sorted(folder.glob(f"{name}*.pqt"))
    if not found:
        return None
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(
            f"{found[0]} needs pyarrow to be read; pip install 'rt-neds[ibl]'"
        ) from None
    table = parquet.read_table(found[0])
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
    metrics = _table(probe, "clusters.metrics") or {}
    n_units = max(int(unit_S.max(initial=0)) + 1, len(metrics.get("cluster_id", ())))
    name = probe.relative_to(alf).parts[0] if probe != alf else "probe00"
    columns: dict[str, NDArray[Any]] = {
        "id": np.array([f"{name}/{unit}" for unit in range(n_units)]),
        "probe_id": np.full(n_units, name),
    }
    uuids = sorted(probe.glob("clusters.uuids*.csv"))
    if uuids:
        ids = uuids[0].read_text().split()[1:]
        if len(ids) == n_units:
            columns["id"] = np.array(ids)
    for file, column in (("clusters.channels", "channels"), ("clusters.depths", "depths")):
        values = _load(probe, file)
        if values is not None and len(values) == n_units:
            columns[column] = values
    for key in ("acronym", "label"):
        if len(metrics.get(key, ())) == n_units:
            values = metrics[key]
            columns[key] = values.astype(str) if values.dtype == object else values
    finite_S = np.isfinite(time_S)
    return time_S[finite_S], unit_S[finite_S].astype(np.int64), columns


def _trials(alf: Path) -> Interval | None:
    table = _table(alf, "_ibl_trials.table")
    if table is None:
        return None
    columns = {
        new: table[old].astype(np.float64) for old, new in TRIAL_TIMES.items() if old in table
    }
    choice_R = table["choice"].astype(np.int64)
    columns["choice"] = np.array([CHOICE.get(int(choice), 2) for choice in choice_R])
    left_R = table["probabilityLeft"].astype(np.float64)
    columns["probability_left"] = left_R
    columns["block_prior"] = np.array([BLOCK.get(round(float(left), 2), -1) for left in left_R])
    columns["feedback_type"] = table["feedbackType"].astype(np.int64)
    columns["reward"] = (columns["feedback_type"] > 0).astype(np.int64)
    for side in ("Left", "Right"):
        columns[f"contrast_{side.lower()}"] = table[f"contrast{side}"].astype(np.float64)
    return trials_of(columns, list(TRIAL_TIMES.values()))


def _wheel(alf: Path) -> IrregularTimeSeries | None:
    time_L, position_L = _load(alf, "_ibl_wheel.timestamps"), _load(alf, "_ibl_wheel.position")
    if time_L is None or position_L is None or len(time_L) < 2 or len(time_L) != len(position_L):
        return None
    grid = np.arange(np.ceil(time_L[0] * 50) + 1, np.floor(time_L[-1] * 50) + 1) / 50
    moved = np.interp(grid, time_L, position_L) - np.interp(grid - 0.02, time_L, position_L)
    return IrregularTimeSeries(
        timestamps=grid,
        wheel_vel=(moved * 50).astype(np.float32),
        wheel_speed=np.abs(moved * 50).astype(np.float32),
        domain=Interval(start=np.array([grid[0] - 0.02]), end=np.array([grid[-1] + 1e-3])),
    )
