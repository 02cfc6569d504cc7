"""``rt-neds export``: a capture as an NWB file, for everyone who never heard of us.

Units with the spikes that came, behaviours as they were observed, the decoded outputs at the ends
of their bins, flags, triggers and events.

Shape suffixes: S spikes, K intervals, T bins, V values.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline.captured import Contents
from rt_neds import __version__
from rt_neds.capture import Capture
from rt_neds.errors import ConfigError
from rt_neds.frames import Flag


def export(folder: Path, out: Path, subject: dict[str, str] | None = None) -> dict[str, Any]:
    """Write a capture as NWB.

    Parameters
    ----------
    folder : Path
        The capture.
    out : Path
        File to write; it must not exist.
    subject : dict of str to str, optional
        ``subject_id``, ``species``, ``sex``, ``age``, as NWB has them: a capture does not know.

    Returns
    -------
    dict
        ``capture``, ``out``, ``epochs``, ``units``, ``spikes``, ``spikes_of_no_unit``, ``bins``,
        ``observed`` (values of behaviours), ``triggers``, ``events``, ``skipped`` (see
        :class:`Contents`), ``damage``, ``unread_bytes``.

    Raises
    ------
    ConfigError
        pynwb is missing, nothing is there to export, or the file cannot be written.
    """
    if out.exists() or out.suffix != ".nwb":
        raise ConfigError(f"{out}; expected the name of a new .nwb file: name another")
    if not out.parent.is_dir():
        raise ConfigError(f"{out} lies in no existing folder; create it or name another")
    pynwb = _pynwb()
    capture = Capture(folder)
    contents = Contents(capture)
    if not contents.runs:
        raise ConfigError(
            f"{folder} has no spikes and nothing decoded of {capture.about['probe']}, which it was "
            "recorded for; was anything running then?"
        )
    nwb = pynwb.NWBFile(
        session_description=f"Spikes of {capture.about['probe']} as they came, and what rt-neds "
        "decoded from them meanwhile.",
        identifier=capture.about["capture"],
        session_start_time=_start_time(capture, contents),
        was_generated_by=[["rt-neds", __version__]],
        subject=pynwb.file.Subject(**subject) if subject else None,
    )
    names, time_S, place_S, dropped = contents.spikes()
    if names:
        resolution_s = max(1 / run.rate for run in contents.runs.values())
        units = pynwb.misc.Units(
            name="units", description="As they came over the stream.", resolution=resolution_s
        )
        _fill(units, names, time_S, place_S, contents.observed_K2())
        nwb.units = units
    module = None
    if contents.decoded or contents.behaviours:
        module = nwb.create_processing_module("behavior", "Observed, or decoded online.")
    bins = _add_decoded(pynwb, module, contents)
    _add_observed(pynwb, module, contents)
    _add_marks(pynwb, nwb, contents)
    _write(pynwb, nwb, out)
    return {
        "capture": str(folder),
        "out": str(out),
        "epochs": len(contents.runs),
        "units": len(names),
        "spikes": len(time_S),
        "spikes_of_no_unit": dropped,
        "bins": bins,
        "observed": sum(len(b.values) for of in contents.behaviours.values() for b in of),
        **{which: len(marks) for which, marks in contents.marks.items()},
        "skipped": contents.skipped,
        "damage": capture.damage,
        "unread_bytes": capture.unread_bytes,
    }


def _pynwb() -> Any:
    try:
        import pynwb
        import pynwb.event
        import pynwb.misc
    except ImportError as error:
        raise ConfigError(
            f"rt-neds export needs pynwb ({error}); pip install 'rt-neds[nwb]'"
        ) from None
    return pynwb


def _start_time(capture: Capture, contents: Contents) -> datetime.datetime:
    """When time 0 was, by the wall clock; when recording began, where that cannot be."""
    about, began_ns = capture.about, next(iter(contents.runs.values())).zero_ns
    unix_ns = about["started_unix_ns"] + began_ns - about["started_ns"]
    if unix_ns < 0:
        unix_ns = about["started_unix_ns"]
    return datetime.datetime.fromtimestamp(unix_ns / 1e9, datetime.UTC)


def _fill(
    units: Any,
    names: list[str],
    time_S: NDArray[np.float64],
    place_S: NDArray[np.int64],
    observed_K2: NDArray[np.float64],
) -> None:
    units.add_column("unit_name", "Id of the unit in the stream.")
    order = np.argsort(place_S, kind="stable")
    ends = np.cumsum(np.bincount(place_S, minlength=len(names)))
    for name, times in zip(names, np.split(time_S[order], ends[:-1]), strict=True):
        units.add_unit(unit_name=_printable(name), spike_times=times, obs_intervals=observed_K2)


def _add_observed(pynwb: Any, module: Any, contents: Contents) -> None:
    """Add behaviours as they were observed."""
    taken: set[str] = set()
    for name in contents.behaviours:
        time_L, value_L = contents.behaviour(name)
        if len(time_L):
            series = pynwb.TimeSeries(
                name=_new_name(f"observed_{name}", taken),
                data=value_L,
                unit="unknown",
                timestamps=time_L,
                description="As it came beside the spikes; where it is not a number it was not "
                "known.",
            )
            module.add(series)


def _add_decoded(pynwb: Any, module: Any, contents: Contents) -> int:
    """Add what was decoded, bin by bin; return the number of bins."""
    starts, bins = contents.starts_s(), 0
    taken: set[str] = set()
    for model, decoded in contents.decoded.items():
        of_model = f"_{model}" if len(contents.decoded) > 1 else ""
        rate_T = np.array([contents.runs[epoch].rate for epoch in decoded.epochs])
        start_T = np.array([starts[epoch] for epoch in decoded.epochs])
        bits = ", ".join(f"{flag.value} {flag.name}" for flag in Flag if flag.name)
        flags = pynwb.TimeSeries(
            name=_new_name(f"decoded_flags{of_model}", taken),
            data=np.array(decoded.flags, np.int64),
            unit="bits",
            timestamps=start_T + np.array(decoded.ends) / rate_T,
            description=f"Reasons to distrust a bin, 0 for none: the sum of {bits}. Timestamps are "
            "the ends of the bins.",
        )
        module.add(flags)
        values_TV = np.stack(decoded.values)
        for name, unit, description, columns in _columns(contents.schemas.get(model), values_TV):
            series = pynwb.TimeSeries(
                name=_new_name(f"decoded_{name}{of_model}", taken),
                data=values_TV[:, columns],
                unit=_printable(unit),
                timestamps=flags,
                description=_printable(f"{description} Model {model}."),
            )
            module.add(series)
        bins += len(values_TV)
    return bins


def _columns(
    outputs: list[dict[str, Any]] | None, values_TV: NDArray[np.float32]
) -> list[tuple[str, str, str, Any]]:
    """Name, unit, description and columns of each series to write."""
    width = values_TV.shape[1]
    if outputs is None or any(o["offset"] + o["size"] > width for o in outputs):
        return [("values", "unknown", "All values; no schema was recorded.", slice(None))]
    series: list[tuple[str, str, str, Any]] = []
    for output in outputs:
        name, at, size = output["name"], output["offset"], output["size"]
        unit = output["unit"] or "unknown"
        if output["kind"] == "continuous" and size == 2:
            series.append((name, unit, f"Expected {name}.", at))
            series.append((f"{name}_sd", unit, f"Stated standard deviation of {name}.", at + 1))
        elif output["kind"] == "poisson" and size == 1:
            series.append((name, "count per bin", f"Expected count of {name}.", at))
        else:
            classes = ", ".join(map(str, output["classes"]))
            what = f"Probabilities of {name}: {classes}."
            series.append((name, "probability", what, slice(at, at + size)))
    return series


def _printable(text: str) -> str:
    """Without the characters that HDF5 cannot store."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _new_name(name: str, taken: set[str]) -> str:
    """A name that NWB allows and no other series has."""
    name = _printable(name).replace("/", "_").replace(":", "_")
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _add_marks(pynwb: Any, nwb: Any, contents: Contents) -> None:
    starts = contents.starts_s()
    words = {"triggers": "Rules on decoded values that held.", "events": "Events of the task."}
    for which, marks in contents.marks.items():
        if not marks:
            continue
        table = pynwb.event.EventsTable(name=which, description=words[which])
        table.add_column("annotation", "What it was.")
        timed = [
            (starts[epoch] + sample / contents.runs[epoch].rate, text)
            for epoch, sample, text in marks
        ]
        for timestamp, text in sorted(timed):
            table.add_event(timestamp=timestamp, annotation=_printable(text))
        nwb.add_events_table(table)


def _write(pynwb: Any, nwb: Any, out: Path) -> None:
    part = out.with_name(f".{out.stem}.part.nwb")
    try:
        with pynwb.NWBHDF5IO(str(part), "w") as file:
            file.write(nwb)
        os.replace(part, out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {out} ({error}); name another file") from None


# -- command -------------------------------------------------------------------------------------

AGE = re.compile(r"P(?=[\dT])(\d+[YMWD])*(T(\d+[HMS])+)?(/(P(\d+[YMWD])+)?)?")
"""A duration, or with a stroke from one to another, or from one on."""

SKIPPED = {
    "malformed": "malformed",
    "repeated": "repeated",
    "other": "of the status or of other probes",
    "unplaced": "of a run of which nothing says when it was",
}
"""What :class:`Contents` has left out, in words."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("capture", metavar="DIR", help="folder that rt-neds record wrote")
    parser.add_argument("--out", required=True, metavar="X.nwb", help="file to write")
    parser.add_argument("--subject", metavar="ID", help="whose spikes these were")
    parser.add_argument("--species", help='with --subject: such as "Mus musculus"')
    parser.add_argument("--sex", choices=["F", "M", "O", "U"], help="with --subject (U: unknown)")
    parser.add_argument("--age", help="with --subject: an ISO 8601 duration, such as P90D")


def run(args: argparse.Namespace) -> dict[str, Any]:
    about = {"species": args.species, "sex": args.sex, "age": args.age}
    given = {key: value for key, value in about.items() if value is not None}
    if given and args.subject is None:
        raise ConfigError(f"{', '.join(given)} of no subject; add --subject ID")
    if args.age is not None and not AGE.fullmatch(args.age):
        raise ConfigError(f"age {args.age!r}; expected a duration of ISO 8601, such as P90D or P3M")
    subject = None if args.subject is None else {"subject_id": args.subject, **given}
    summary = export(Path(args.capture), Path(args.out), subject)
    if not args.quiet:
        print(
            f"{summary['spikes']} spikes of {summary['units']} units and {summary['bins']} decoded "
            f"bins of {summary['epochs']} run{'s' * (summary['epochs'] != 1)} to {summary['out']}",
            file=sys.stderr,
        )
        left = {key: n for key, n in summary["skipped"].items() if n}
        if left:
            words = ", ".join(f"{n} {SKIPPED[key]}" for key, n in left.items())
            print(f"messages left out: {words}", file=sys.stderr)
        if summary["damage"]:
            print(
                f"the capture is damaged ({summary['damage']}): {summary['unread_bytes']} bytes "
                "were not read",
                file=sys.stderr,
            )
    return summary
