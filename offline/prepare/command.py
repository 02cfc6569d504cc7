"""``rt-neds prepare``: a session from what other tools left."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rt_neds.errors import ConfigError
from rt_neds.result import refuse_existing

EXPECTED = {
    "spikeinterface": "--detector FOLDER --recording DIR, or --analyzer DIR",
    "ibl": "--alf DIR",
    "ibl-bwb": "--session ID, of a public session, and no --tables",
    "nwb": "a file: rt-neds prepare nwb FILE.nwb",
    "session": "a session file and what to add: rt-neds prepare session S.h5 --tables wheel.csv",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=list(EXPECTED), help="format of the source")
    parser.add_argument("file", nargs="?", help="nwb, session: the file")
    parser.add_argument("--alf", metavar="DIR", help="ibl: the alf folder of a session")
    parser.add_argument("--detector", metavar="FOLDER", help="spikeinterface: finds the spikes")
    parser.add_argument("--recording", metavar="DIR", help="spikeinterface: raw, as acquired")
    parser.add_argument("--stream", help="spikeinterface: the recording's, if it has several")
    parser.add_argument("--analyzer", metavar="DIR", help="spikeinterface: take a sorting as it is")
    parser.add_argument(
        "--tables",
        nargs="+",
        default=[],
        metavar="F.csv",
        help="behaviour and trials: columns time, ... or start, end, ..., in the probe's seconds",
    )
    parser.add_argument(
        "--session", metavar="ID", help="its id; else a name found (ibl-bwb: which)"
    )
    parser.add_argument("--out", required=True, metavar="S.h5", help="session file to write")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if not Path(args.out).parent.is_dir():
        raise ConfigError(f"{args.out} lies in no existing folder; create it or name another")
    refuse_existing(args.out)
    given = {
        "spikeinterface": bool(args.analyzer) != bool(args.detector and args.recording),
        "ibl": bool(args.alf),
        "ibl-bwb": bool(args.session) and not args.tables,
        "nwb": bool(args.file),
        "session": bool(args.file and args.tables),
    }
    if not given[args.what]:
        raise ConfigError(f"prepare {args.what} expects {EXPECTED[args.what]}")
    from offline.prepare.progress import telling

    with telling(args.quiet) as tell:
        summary = _fetched(args, tell) if args.what == "ibl-bwb" else _written(args, tell)
    if not args.quiet:
        print(
            f"{summary['out']}: {summary['units']} units, {summary['spikes']} spikes in "
            f"{summary['recorded_s']:.1f} s, {summary['trials']} trials",
            file=sys.stderr,
        )
        for name, of in summary["tables"].items():
            print(f"  {name}: {_rows(**of)}", file=sys.stderr)
    return summary


def _fetched(args: argparse.Namespace, tell: Any) -> dict[str, Any]:
    from offline.prepare.bwb import fetch_session

    return {**fetch_session(args.session, args.out, tell), "tables": {}}


def _written(args: argparse.Namespace, tell: Any) -> dict[str, Any]:
    from offline.prepare.tables import add_tables
    from offline.prepare.writing import write_session

    data = _data(args, tell)
    if args.session:
        _call(data, args.session)
    tables = add_tables(data, args.tables)
    return {**write_session(args.out, data), "tables": tables}


def _rows(rows: int, without_times: int, outside: int) -> str:
    words = f"{rows} rows"
    if outside:
        words += f", {outside} of them outside what was recorded"
    if without_times:
        words += f"; {without_times} left out, of no start or end"
    return words


def _call(data: Any, session_id: str) -> None:
    """Give a session another id."""
    from temporaldata import Data

    if not hasattr(data, "session"):  # then it was called after its file
        data.session = Data(id=session_id)
    data.session.id = session_id


def _data(args: argparse.Namespace, tell: Any) -> Any:
    if args.what == "ibl":
        from offline.prepare.ibl import from_alf

        return from_alf(args.alf, args.session)
    if args.what == "nwb":
        from offline.prepare.nwb import from_nwb

        return from_nwb(args.file)
    if args.what == "session":
        from rt_neds.session import load_session

        return load_session(args.file).data
    from offline.prepare.spikeinterface import from_analyzer, from_detector, load_analyzer

    session_id = args.session or Path(args.out).stem
    if args.analyzer:
        return from_analyzer(load_analyzer(args.analyzer), session_id)
    from offline.prepare.recording import open_recording
    from rt_neds.stream.detector import load_detector

    detector = load_detector(args.detector)
    return from_detector(open_recording(args.recording, args.stream), detector, session_id, tell)
