"""``rt-neds demo``: the whole path in one command, with nothing but this package.

Simulate a session, train on its first part, replay the held-out part at real speed over ZeroMQ into
a ``serve`` process, measure, and leave ``summary.json`` and ``decoded.png``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rt_neds.children import (
    ChildError,
    collect,
    command,
    finish_replay,
    free_port,
    serving,
    start_replay,
    wait_for_schema,
)
from rt_neds.config import config_path
from rt_neds.frames import DecodedFrame
from rt_neds.latency import Tally
from rt_neds.result import clean, machine
from rt_neds.simulate import simulate_file
from rt_neds.stream.publisher import DecodedListener

UNITS, MINUTES, SEED = 300, 20.0, 0
TEST_FROM = 0.8  # of the session: configs/demo.toml splits by time, 70/10/20
GAP_S = 2.0
LIVE_S, CONTROL_S = 30.0, 10.0


@dataclass
class Live:
    """What came out of ``serve``.

    Attributes
    ----------
    real_time, control, whole : list of DecodedFrame
        Frames of the real-time stretch, of the control, and of the whole test split at full speed.
    outputs : list of dict
        The schema's.
    latency : dict
        As ``rt-neds bench latency --json``.
    tallies : tuple of Tally
        Decoder and control.
    """

    real_time: list[DecodedFrame]
    whole: list[DecodedFrame]
    outputs: list[dict[str, Any]]
    latency: dict[str, Any]
    tallies: tuple[Tally, Tally]


def demo(out: Path, *, seed: int = SEED, quiet: bool = False) -> dict[str, Any]:
    """Run the whole path.

    Parameters
    ----------
    out : path
        Folder for the session, the run, ``summary.json`` and ``decoded.png``.
    seed : int
        Of the simulated session.
    quiet : bool

    Returns
    -------
    dict
        ``evaluate``, ``ideal``, ``latency``, ``live``, ``seconds``: what ``summary.json`` says.
    """
    say = (lambda line: None) if quiet else (lambda line: print(line, flush=True))
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    session = out / "session.h5"
    say(f"1/5 simulating a mouse: {UNITS} units, {MINUTES:g} minutes")
    made = simulate_file(session, units=UNITS, minutes=MINUTES, seed=seed)
    say(f"    {made['spikes']} spikes, {made['trials']} trials -> {session}")
    say("2/5 training on the first 70 % of it")
    call("train", "--config", str(config_path("demo.toml")), "--sessions", str(session),
         "--out", str(out / "run"), quiet=quiet)  # fmt: skip
    bundle = out / "run" / "bundle"
    say(f"3/5 replaying the held-out part into serve: {LIVE_S:g} s at real speed, then all of it")
    live = play(session, bundle, out)
    say("4/5 evaluating the held-out part, beside ridge, logistic and the ideal observer")
    call("evaluate", "--bundle", str(bundle), "--session", str(session),
         "--json", str(out / "evaluate.json"), quiet=True)  # fmt: skip
    scores = json.loads((out / "evaluate.json").read_text())
    summary = {
        "evaluate": scores,
        "ideal": {name: headline(s)[1] for name, s in scores["ideal"].items()},
        "latency": live.latency,
        "live": {
            "bins_expected": round(LIVE_S * 1000 / live.latency["bin_ms"]),
            "bins_published": len(live.real_time),
            "flagged": sum(1 for frame in live.real_time if frame.flags),
        },
        "seconds": round(time.monotonic() - started, 1),
    }
    (out / "summary.json").write_text(json.dumps(clean(summary), indent=1) + "\n")
    say("5/5 drawing")
    from rt_neds.picture import draw

    draw(out / "decoded.png", session, live, scores)
    return summary


def call(*args: str, quiet: bool) -> None:
    """Run another command to its end; its progress is shown unless quiet."""
    child = subprocess.run(
        command(*args, *(["--quiet"] if quiet else [])), stderr=subprocess.PIPE if quiet else None,
        text=True, check=False,
    )  # fmt: skip
    if child.returncode:
        raise ChildError(f"rt-neds {args[0]} failed: {(child.stderr or '').strip() or 'see above'}")


def play(session: Path, bundle: Path, out: Path) -> Live:
    """Send the held-out part to ``serve`` and to its control, and listen."""
    from rt_neds.bundle import load_spec

    spec = load_spec(bundle)
    spikes = free_port()
    address = f"tcp://127.0.0.1:{spikes}"
    start = TEST_FROM * MINUTES * 60 + GAP_S
    decoded, control = Tally(spec.bin_ms), Tally(spec.bin_ms)

    def turn(listener: DecodedListener, probe: str, *options: str) -> tuple[list, dict, dict]:
        report = out / "replay.json"
        sending = start_replay("--session", str(session), "--probe", probe,
                               "--bind", address, *options, out=report)  # fmt: skip
        frames, notes = collect(listener, sending)
        return frames, notes, finish_replay(sending, report)

    ports = free_port(), free_port()
    listeners = [DecodedListener(f"tcp://127.0.0.1:{port}", "imec0") for port in ports]
    common = (
        "--probe",
        "imec0",
        "--bundle",
        str(bundle),
        "--source",
        f"rtneds://127.0.0.1:{spikes}",
    )
    with serving(*common, "--publish", f"tcp://127.0.0.1:{ports[0]}") as child:
        schema = wait_for_schema(listeners[0], child)
        clip = ("--from", str(start), "--to", str(start + LIVE_S))
        frames, _, sent = turn(listeners[0], "imec0", *clip)
        decoded.take(frames, sent)
        whole, _, _ = turn(
            listeners[0], "imec0", "--from", str(start), "--speed", "0", "--batch-ms", "20"
        )
    with serving(*common, "--publish", f"tcp://127.0.0.1:{ports[1]}", "--control") as child:
        wait_for_schema(listeners[1], child)
        clip = ("--from", str(start), "--to", str(start + CONTROL_S))
        empty, _, sent = turn(listeners[1], "imec0", *clip)
        control.take(empty, sent)
    expected = round(LIVE_S * 1000 / spec.bin_ms)
    latency = {
        "machine": machine(),
        "bin_ms": spec.bin_ms,
        "units": UNITS,
        "spikes_per_s": round(sum(f.spikes for f in frames) / LIVE_S, 1),
        **decoded.report(control, expected),
    }
    return Live(frames, whole, schema.fields["outputs"], latency, (decoded, control))


def headline(scores: dict[str, Any]) -> tuple[str, float]:
    """The one score of an output that a person asks for first."""
    for key in ("r2", "balanced_accuracy", "d2"):
        if key in scores:
            return key, scores[key]
    raise KeyError("an output without a score")


# -- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="(runs/demo)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of session and training ({SEED})")


def run(args: argparse.Namespace) -> dict[str, Any]:
    out = Path(args.out)
    summary = demo(out, seed=args.seed, quiet=args.quiet)
    if not args.quiet:
        show(summary, out)
    return summary


def show(summary: dict[str, Any], out: Path) -> None:
    """Say what was seen."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout)
    scores = Table(title="held-out part, streamed")
    for column in ("decoded", "rt-neds", "linear", "ideal observer"):
        scores.add_column(column, justify="left" if column == "decoded" else "right")
    linear = {
        n: s for method in summary["evaluate"]["baselines"].values() for n, s in method.items()
    }
    for name, s in summary["evaluate"]["decoding"].items():
        key, value = headline(s)
        ideal = summary["ideal"].get(name)
        scores.add_row(
            f"{name} ({key.replace('_', ' ')})",
            f"{value:.3f}",
            f"{linear[name][key]:.3f}" if name in linear else "",
            f"{ideal:.3f}" if ideal is not None else "",
        )
    console.print(scores)
    latency = Table(title="live, milliseconds")
    latency.add_column("from")
    for column in ("p50", "p99", "p99.9", "max"):
        latency.add_column(column, justify="right")
    for name, marks in summary["latency"]["stages_ms"].items():
        latency.add_row(name.replace("_", " "), *(f"{ms:.2f}" for ms in marks.values()))
    console.print(latency)
    live = summary["live"]
    console.print(
        f"{live['bins_published']} of {live['bins_expected']} bins decoded live, "
        f"{summary['latency']['missed']} later than a bin, "
        f"{summary['latency']['lost']} messages lost; "
        f"stream against offline {summary['evaluate']['stream_vs_offline_max_abs']:.1e}\n"
        f"{out / 'decoded.png'}, {out / 'summary.json'} ({summary['seconds']} s in all)"
    )
