"""``rt-neds bench``: what this machine manages; ``latency`` end to end, ``step`` the network."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rt_neds.bench_input import SIZES, poisson_session, random_bundle
from rt_neds.bench_step import bench_step, device_name, paced, served_step
from rt_neds.errors import ConfigError
from rt_neds.latency import Tally, stolen_ms
from rt_neds.priority import quiet_machine
from rt_neds.result import machine

BLOCK_S = 10.0
PACED_BINS = 40
"""Bins of the step alone between two turns of bench latency."""
P50_STEPS, P99_9_STEPS = 1.2, 3.0
"""Paced steps by which a decoded bin may come out later than the control's."""

# -- what is measured ----------------------------------------------------------------------------


def bench_latency(
    *,
    bundle: str | None,
    seconds: float,
    size: str,
    units: int,
    spikes_per_s: float,
    bin_ms: float,
    device: str,
) -> dict[str, Any]:
    """Latency through real processes and sockets, decoder and control in turns of ten seconds.

    The control is the same path with a decoder that does nothing: what it shows is the machine's
    and the transport's, not ours. Latency runs from a bin's intended end by the sender's clock, so
    a stall anywhere cannot hide.

    Returns
    -------
    dict
        As ``rt-neds bench latency --json``; ``missed`` counts bins that came more than one bin
        width after their end, or never; ``late_when`` where those that came were first late, in how
        many ``stalls`` (runs of late bins); ``stolen_ms`` what the host of a virtual machine took
        from it meanwhile.
    """
    from rt_neds.bundle import load_spec

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = Path(bundle) if bundle else random_bundle(folder / "b", size, units, bin_ms, 4)
        spec = load_spec(path)
        session = spec.sessions[0]
        turn_s = min(BLOCK_S, seconds)
        file = poisson_session(folder / "s.h5", session.id, session.units, spikes_per_s, turn_s)
        turns = max(1, round(seconds / turn_s))
        paced_step = _PacedStep(path, spec, spikes_per_s, device)
        decoded, control = _in_turns(path, file, turns, spec.bin_ms, paced_step.take, device)
    expected = turns * round(turn_s * 1000 / spec.bin_ms)
    control_missed = control.missed + max(0, expected - control.bins)
    report = decoded.report(control, expected)
    return {
        "machine": machine(),
        "device": device_name(device),
        "bin_ms": spec.bin_ms,
        "units": len(session.units),
        "spikes_per_s": spikes_per_s,
        "model": f"{spec.model.layers} layers of {spec.model.dim}, "
        f"{len(spec.behaviours)} behaviours",
        "control_missed": control_missed,
        "control_late_when": control.late_when,
        "control_stalls": control.stalls,
        "control_longest_stalls": control.longest,
        "control_stolen_ms": control.stolen_ms,
        **report,
        "stolen_ms": decoded.stolen_ms,
        "terms": terms(report, control_missed, statistics.median(paced_step.us) / 1e3),
    }


def terms(report: dict[str, Any], control_missed: int, step_ms: float) -> dict[str, Any]:
    """Whether a decoded bin comes out as soon after its end as the step alone allows.

    Parameters
    ----------
    report : dict
        ``missed`` and ``stages_ms`` of bench latency.
    control_missed : int
        Bins of the control that came more than a bin late, or never.
    step_ms : float
        Median of the step alone, one per bin, measured between the turns.

    Returns
    -------
    dict
        ``paced_step_ms``, and for ``p50_ms``, ``p99_9_ms`` and ``missed`` what ``came``, what it
        ``may`` be at most, and whether it is ``met``.
    """
    ours, control = (report["stages_ms"][name] for name in ("bin_end_to_publish", "control"))
    pairs = {
        "p50_ms": (ours["p50"], control["p50"] + P50_STEPS * step_ms),
        "p99_9_ms": (ours["p99_9"], control["p99_9"] + P99_9_STEPS * step_ms),
        "missed": (report["missed"], control_missed),
    }
    return {
        "paced_step_ms": round(step_ms, 4),
        **{
            name: {"came": came, "may": round(may, 4), "met": bool(came <= may)}
            for name, (came, may) in pairs.items()
        },
    }


class _PacedStep:
    """The step that serve would run, alone in this process, one per bin."""

    def __init__(self, bundle: Path, spec: Any, spikes_per_s: float, device: str) -> None:
        import torch

        from rt_neds.bundle import build_model

        torch.set_num_threads(1)
        n = len(spec.sessions[0].units)
        self._step = served_step(build_model(bundle, spec), spec, device)
        self._period_s = spec.bin_ms / 1e3
        per_bin = spikes_per_s * self._period_s / n
        self._counts_TN = np.random.default_rng(0).poisson(per_bin, (512, n)).astype(np.float32)
        self.us: list[float] = []

    def take(self) -> None:
        """Measure a few bins."""
        with quiet_machine(True):
            took = paced({"step": self._step}, self._counts_TN, PACED_BINS, self._period_s)
        self.us += took["step"]


def _in_turns(
    bundle: Path, file: Path, turns: int, bin_ms: float, between: Callable[[], None], device: str
) -> tuple[Tally, Tally]:
    from rt_neds.children import collect, finish_replay, free_port, serving, start_replay
    from rt_neds.children import wait_for_schema as ready
    from rt_neds.stream.publisher import DecodedListener

    tallies = Tally(bin_ms), Tally(bin_ms)
    spikes, ports = free_port(), (free_port(), free_port())
    probes, extra = ("bench", "control"), ((), ("--control",))
    options = [
        ("--probe", probes[i], "--bundle", str(bundle), "--source", f"rtneds://127.0.0.1:{spikes}",
         "--publish", f"tcp://127.0.0.1:{ports[i]}", "--device", device, *extra[i])
        for i in range(2)
    ]  # fmt: skip
    listeners = [DecodedListener(f"tcp://127.0.0.1:{ports[i]}", probes[i]) for i in range(2)]
    with serving(*options[0]) as first, serving(*options[1]) as second:
        for listener, child in zip(listeners, (first, second), strict=True):
            ready(listener, child)
        for turn in range(2 * turns):
            which = turn % 2
            out, before = file.with_suffix(f".{turn}.json"), stolen_ms()
            sending = start_replay(
                "--session", str(file), "--probe", probes[which],
                "--bind", f"tcp://127.0.0.1:{spikes}", out=out,
            )  # fmt: skip
            frames, _ = collect(listeners[which], sending)
            tallies[which].take(frames, finish_replay(sending, out))
            tallies[which].steal(before, stolen_ms())
            between()
    for listener in listeners:
        listener.close()
    return tallies


# -- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=["latency", "step", "soak"],
        help="bin end to publication; the network alone; hours with faults",
    )
    parser.add_argument("--bundle", metavar="DIR", help="a trained one; random weights by default")
    parser.add_argument("--seconds", type=float, default=None, help="60 for latency, 10 for step")
    parser.add_argument("--minutes", type=float, default=60.0, help="of soak (60)")
    parser.add_argument("--size", choices=list(SIZES), default=None, help="of the random bundle")
    parser.add_argument("--units", type=int, default=400, help="of the random bundle (400)")
    parser.add_argument("--behaviours", type=int, default=4, help="decoded, for step (4)")
    parser.add_argument(
        "--spikes-per-s",
        type=float,
        default=None,
        help="in all: 10 000 for latency, 4 000 for soak",
    )
    parser.add_argument("--bin-ms", type=float, default=20.0, help="of the random bundle")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="what decodes (cpu)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.units < 1 or args.behaviours < 1 or (args.spikes_per_s or 0) < 0:
        raise ConfigError("units >= 1, behaviours >= 1 and spikes-per-s >= 0 are needed")
    if args.seconds is not None and args.seconds < 1:
        raise ConfigError(f"seconds {args.seconds:g}; at least 1 was expected")
    if args.what == "soak":
        return run_soak(args)
    if args.what == "step":
        result = bench_step(
            bundle=args.bundle,
            size=args.size or "base",
            units=args.units,
            behaviours=args.behaviours,
            seconds=args.seconds or 10.0,
            device=args.device,
        )
    else:
        result = bench_latency(
            bundle=args.bundle,
            seconds=args.seconds or 60.0,
            size=args.size or "small",
            units=args.units,
            spikes_per_s=10_000.0 if args.spikes_per_s is None else args.spikes_per_s,
            bin_ms=args.bin_ms,
            device=args.device,
        )
    if not args.quiet:
        show(result)
    return result


def run_soak(args: argparse.Namespace) -> dict[str, Any]:
    """Bench soak: :mod:`rt_neds.soak`."""
    from rt_neds.soak import soak
    from rt_neds.soak_screen import Screen
    from rt_neds.soak_screen import show as show_soak

    if args.device != "cpu":
        raise ConfigError(f"--device {args.device}; soak decodes on the CPU: leave it out")
    if not 1 <= args.minutes < 1e5:
        raise ConfigError(f"minutes {args.minutes:g}; at least 1 was expected")
    with Screen(args.minutes, args.quiet) as shown:
        result = soak(
            minutes=args.minutes,
            bundle=args.bundle,
            size=args.size or "base",
            units=args.units,
            spikes_per_s=4000.0 if args.spikes_per_s is None else args.spikes_per_s,
            bin_ms=args.bin_ms,
            show=shown,
        )
    if not args.quiet:
        show_soak(result)
    return result


def show(result: dict[str, Any]) -> None:
    """Print the result as a table."""
    from rich.console import Console
    from rich.table import Table

    named = {"hot": "hot", "paced": "paced", "fetched": "paced, fetched before"}
    rows = result.get("stages_ms") or {
        **{f"step, {named[key]}": marks for key, marks in result["step_us"].items()},
        "PyTorch eager, hot": result["eager_us"]["hot"],
        "PyTorch eager, paced": result["eager_us"]["paced"],
        "window run anew": result["window_us"],
    }
    unit = "ms" if "stages_ms" in result else "us"
    where = result["machine"]["cpu"] if result["device"] == "cpu" else result["device"]
    table = Table(title=f"{result['model']}, {result['units']} units ({where})")
    table.add_column(unit)
    columns = list(next(iter(rows.values())))
    for column in columns:
        table.add_column(column.replace("p99_9", "p99.9"), justify="right")
    for name, marks in rows.items():
        cells = (str(m) if isinstance(m, int) else f"{m:.2f}" for m in map(marks.get, columns))
        table.add_row(name.replace("_", " "), *cells)
    console = Console()
    console.print(table)
    if "stages_ms" in result:
        console.print(
            f"{result['bins']} of {result['expected']} bins published, {result['repeated']} twice, "
            f"{result['missed']} later than a bin or never (control {result['control_missed']}), "
            f"{result['lost']} messages lost"
        )
        for path, of in (("decoded", ""), ("control", "control_")):
            keys = ("late_when", "stalls", "longest_stalls", "stolen_ms")
            console.print(late_line(path, *(result[of + key] for key in keys)))
        for line in term_lines(result["terms"]):
            console.print(line)
    else:
        console.print(
            f"window / step {result['window_over_step']}, eager / step {result['eager_over_step']} "
            f"(paced {result['eager_over_step_paced']}), max error {result['max_abs_error']:.1e}"
        )


def late_line(
    path: str,
    late_when: dict[str, int],
    stalls: int,
    longest: list[dict[str, Any]],
    stolen: float | None,
) -> str:
    """Where the late bins of a path were first late, and what the machine was without."""
    line = f"{path}: " + ", ".join(f"{n} late when {stage}" for stage, n in late_when.items())
    line += f", in {stalls} stall{'s' * (stalls != 1)}"
    if longest:
        line += f" (at most {longest[0]['ms']:.0f} ms, {longest[0]['s']:.1f} s into a turn)"
    return line if stolen is None else f"{line}; {stolen:.0f} ms of processor stolen by the host"


def term_lines(said: dict[str, Any]) -> list[str]:
    """One line for each acceptance term."""
    step = f"steps of {said['paced_step_ms']:.2f} ms"
    words = {
        "p50_ms": f"p50 at most the control's and {P50_STEPS:g} {step}",
        "p99_9_ms": f"p99.9 at most the control's and {P99_9_STEPS:g} {step}",
        "missed": "bins later than a bin at most the control's",
    }
    return [
        f"{'met' if said[name]['met'] else 'NOT met'}: {what}: "
        f"{said[name]['came']:g}, may be {said[name]['may']:g}"
        for name, what in words.items()
    ]
