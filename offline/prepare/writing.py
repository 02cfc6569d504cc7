"""Writes a brainsets session: spikes, units, domain and whatever else a source knows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from temporaldata import ArrayDict, Data, Interval, IrregularTimeSeries

from rt_neds.errors import ConfigError, SessionError
from rt_neds.session import load_session


def session_data(
    session_id: str,
    time_S: NDArray[np.float64],
    unit_S: NDArray[np.int64],
    units: dict[str, NDArray[Any]],
    domain_K2: NDArray[np.float64],
    **groups: Any,
) -> Data:
    """Put a session together.

    Parameters
    ----------
    time_S, unit_S : ndarray
        Seconds and row of ``units`` of each spike, in any order.
    units : dict of str to ndarray
        Columns; ``id`` is one.
    domain_K2 : ndarray
        What was recorded, in seconds. Spikes outside are left out.
    **groups
        Other parts of the file, ready made.

    Raises
    ------
    SessionError
        No spike lies in the domain, or two units have one id.
    """
    ids = [str(unit) for unit in units["id"]]
    if len(set(ids)) < len(ids):
        raise SessionError(
            f"{session_id}: {len(ids)} units and {len(set(ids))} different ids; name units apart"
        )
    inside_S = np.zeros(len(time_S), bool)
    for start, end in domain_K2:
        inside_S |= (time_S >= start) & (time_S < end)
    if not inside_S.any():
        raise SessionError(f"{session_id}: no spike lies in what was recorded; check the source")
    time_S, unit_S = time_S[inside_S], unit_S[inside_S]
    order = np.argsort(time_S, kind="stable")
    domain = Interval(
        start=domain_K2[:, 0].astype(np.float64), end=domain_K2[:, 1].astype(np.float64)
    )
    seconds = float(np.diff(domain_K2, axis=1).sum())
    rate_U = np.bincount(unit_S, minlength=len(ids)) / seconds
    columns = {"firing_rate": rate_U, **units, "id": np.array(ids)}
    return Data(
        brainset=Data(id="rt_neds_prepared"),
        **({"session": Data(id=session_id)} | groups),
        units=ArrayDict(**columns),
        spikes=IrregularTimeSeries(
            timestamps=time_S[order], unit_index=unit_S[order].astype(np.int64), domain=domain
        ),
        domain=domain,
    )


def trials_of(columns: dict[str, NDArray[Any]], times: list[str]) -> Interval:
    """A trial table with ``start`` and ``end``, in order of start; trials without both left out."""
    whole_R = np.isfinite(columns["start"]) & np.isfinite(columns["end"])
    order = np.argsort(columns["start"][whole_R], kind="stable")
    kept = {name: values[whole_R][order] for name, values in columns.items()}
    return Interval(**kept, timekeys=[name for name in times if name in kept])


def series_of(time_L: NDArray[np.float64], columns: dict[str, NDArray]) -> IrregularTimeSeries:
    """Values over time, in order; where they are missing for long there is no behaviour."""
    steps = np.diff(time_L)
    holes = np.flatnonzero(steps > max(1.0, 10 * float(np.median(steps))))
    start = time_L[np.concatenate([[0], holes + 1])]
    end = time_L[np.concatenate([holes, [len(time_L) - 1]])] + 1e-6
    return IrregularTimeSeries(timestamps=time_L, **columns, domain=Interval(start=start, end=end))


def write_session(path: str | Path, data: Data) -> dict[str, Any]:
    """Write a session and read it back; the file is left alone if anything fails.

    Returns
    -------
    dict
        ``session``, ``out``, ``units``, ``spikes``, ``recorded_s``, ``trials``.

    Raises
    ------
    ConfigError
        The file cannot be written.
    SessionError
        A word in it has letters that such a file cannot hold.
    """
    path = Path(path)
    _refuse_other_letters(path, data)
    partial = path.with_name(f"{path.stem}.part-{os.getpid()}")  # may be called after it
    try:
        data.save(partial)
        return put_in_place(partial, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}); name another file") from None
    finally:
        partial.unlink(missing_ok=True)


def put_in_place(partial: Path, path: Path, session_id: str = "") -> dict[str, Any]:
    """Give a file that is whole its name, once it was read as a session (of that id, if given).

    Returns
    -------
    dict
        See :func:`write_session`.

    Raises
    ------
    SessionError
        It is no session, or another one.
    """
    session = load_session(partial)
    if session_id and session.id != session_id:
        raise SessionError(
            f"what came as session {session_id} is session {session.id}; fetch it again"
        )
    os.replace(partial, path)
    return {
        "session": session.id,
        "out": str(path),
        "units": len(session.unit_ids),
        "spikes": len(session.records_S),
        "recorded_s": float(np.diff(session.domain_K2, axis=1).sum() / session.rate),
        "trials": len(session.intervals("trials")) if session.has("trials") else 0,
    }


def _refuse_other_letters(path: Path, data: Data) -> None:
    """SessionError for words that are not ASCII, the only ones temporaldata can save."""
    for group in data.keys():  # noqa: SIM118
        columns = getattr(data, group)
        if not isinstance(columns, ArrayDict):
            continue
        for name in columns.keys():  # noqa: SIM118
            values = np.asarray(getattr(columns, name))
            words = map(str, values.flat) if values.dtype.kind == "U" else ()
            if (word := next((word for word in words if not word.isascii()), None)) is not None:
                raise SessionError(
                    f"{path} cannot be written: {word!r} in {group}.{name}; a session holds words "
                    "of ASCII letters, without accents: write it with those"
                )
