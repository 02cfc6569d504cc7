"""Sessions from NWB: the units table, the trials table, and one-dimensional behaviour.

Shape suffixes: S spikes, K intervals, R trials, L values.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from temporaldata import Data, Interval, IrregularTimeSeries

from offline.prepare.ibl import common_to, recorded
from offline.prepare.writing import series_of, session_data, trials_of
from rt_neds.errors import ConfigError, SessionError


def from_nwb(path: str | Path) -> Data:
    """A session of an NWB file.

    Units keep ``unit_name`` or their number as id. What was recorded is where all units were
    observed (``obs_intervals``), or, where the file does not say, where all devices have spikes,
    as ``electrode_group`` or ``electrodes`` tell whose a unit is. Every
    time series of ``processing/behavior`` with one value, or a few, per time becomes
    ``behavior_<name>.<name>`` (``_0``, ``_1`` ... for several); of series of one name all but the
    first become ``behavior_<container>_<name>.<name>``.

    Raises
    ------
    SessionError, ConfigError
        Not NWB, no units in it; pynwb is missing.
    """
    path = Path(path)
    try:
        import pynwb
    except ImportError:
        raise ConfigError(f"{path} needs pynwb to be read; pip install 'rt-neds[nwb]'") from None
    if not path.is_file():
        raise ConfigError(f"no such NWB file: {path}; check the path")
    try:
        with pynwb.NWBHDF5IO(str(path), "r", load_namespaces=True) as file:
            return _session(path, file.read())
    except (OSError, KeyError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SessionError(
            f"{path} cannot be read as NWB ({reason}); expected an .nwb file"
        ) from None


def _session(path: Path, nwb: Any) -> Data:
    if nwb.units is None or not len(nwb.units) or "spike_times" not in nwb.units.colnames:
        raise SessionError(f"{path} has no units with spike times; expected sorted spikes")
    units = nwb.units
    trains = [np.asarray(units["spike_times"][u], np.float64) for u in range(len(units))]
    named = "unit_name" in units.colnames
    ids = units["unit_name"][:] if named else units.id[:]
    groups = _behaviour(nwb)
    trials = _trials(nwb)
    if trials is not None:
        groups["trials"] = trials
    return session_data(
        str(nwb.identifier),
        np.concatenate(trains),
        np.repeat(np.arange(len(trains)), [len(train) for train in trains]),
        {"id": np.array([str(unit) for unit in ids])},
        _domain(path, units, trains),
        **groups,
    )


def _domain(path: Path, units: Any, trains: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Where every unit was observed of which the file says when, in seconds."""
    told = []
    if "obs_intervals" in units.colnames:
        of_unit = [np.asarray(units["obs_intervals"][u], np.float64) for u in range(len(units))]
        told = [of_K2.reshape(-1, 2) for of_K2 in of_unit if of_K2.size]
    if not told:
        return _spiking(units, trains)
    common_K2 = common_to(told)
    if not len(common_K2):
        raise SessionError(
            f"{path}: at no time were all units observed (obs_intervals); leave out those "
            "that were not recorded with the others"
        )
    return common_K2


def _spiking(units: Any, trains: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Where there are spikes of every device that has any, in seconds."""
    of_device: dict[str, list[NDArray[np.float64]]] = {}
    for u, train in enumerate(trains):
        of_device.setdefault(_device(units, u), []).append(train)
    pieces = [recorded(np.concatenate(theirs)) for theirs in of_device.values()]
    pieces = [piece_K2 for piece_K2 in pieces if len(piece_K2)]
    return common_to(pieces) if pieces else np.zeros((0, 2))


def _device(units: Any, unit: int) -> str:
    """What recorded a unit, as far as the file says."""
    if "electrode_group" in units.colnames:
        group = units["electrode_group"][unit]
    elif "electrodes" in units.colnames and len(of_unit := units["electrodes"][unit]):
        group = of_unit["group"].iloc[0]
    else:
        return ""
    return str(group.device.name)


def _trials(nwb: Any) -> Interval | None:
    if nwb.trials is None or not len(nwb.trials):
        return None
    columns, times = {}, ["start", "end"]
    for name in nwb.trials.colnames:
        column = nwb.trials[name]
        if hasattr(column, "target"):  # an index: of each trial some, or none
            continue
        values = np.asarray(column[:])
        if values.ndim != 1 or (values.dtype == object and not isinstance(values[0], str)):
            continue  # several numbers, and references, have no place in a trial table
        new = {"start_time": "start", "stop_time": "end"}.get(name, name)
        columns[new] = values.astype(str) if values.dtype == object else values
        if new.endswith("_time") and values.dtype.kind == "f":
            times.append(new)
    return trials_of(columns, times)


def _behaviour(nwb: Any) -> dict[str, Any]:
    """Every usable time series of processing/behavior, by a name that Python allows."""
    if "behavior" not in nwb.processing:
        return {}
    series: dict[str, Any] = {}
    for container in nwb.processing["behavior"].data_interfaces.values():
        inside = getattr(container, "time_series", getattr(container, "spatial_series", None))
        for one in inside.values() if inside is not None else [container]:
            made = _series(one)
            if made is None:
                continue
            name = f"behavior_{_name(one.name)}"
            if name in series:  # as of two eyes or two paws
                name = f"behavior_{_name(container.name)}_{_name(one.name)}"
            if name in series:
                raise SessionError(
                    f"two behaviours of the file would be called {name}; rename {one.name} of "
                    f"{container.name} in processing/behavior"
                )
            series[name] = made
    return series


def _name(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _series(one: Any) -> IrregularTimeSeries | None:
    if getattr(one, "data", None) is None:
        return None
    values = np.asarray(one.data[:])
    if values.dtype.kind not in "fiub" or values.ndim > 2 or len(values) < 2:
        return None
    if one.timestamps is not None:
        time_L = np.asarray(one.timestamps[:], np.float64)
    else:
        time_L = one.starting_time + np.arange(len(values)) / one.rate
    if len(time_L) != len(values):  # transposed, it may be
        return None
    order = np.argsort(time_L, kind="stable")
    order = order[np.isfinite(time_L[order])]  # what has no time cannot be placed
    if len(order) < 2:
        return None
    time_L, values = time_L[order], values[order]
    columns_LJ = values.reshape(len(values), -1).astype(np.float64) * float(one.conversion or 1)
    columns_LJ += float(one.offset or 0)
    name = _name(one.name)
    names = (
        [name] if columns_LJ.shape[1] == 1 else [f"{name}_{j}" for j in range(columns_LJ.shape[1])]
    )
    return series_of(time_L, {n: columns_LJ[:, j] for j, n in enumerate(names)})
