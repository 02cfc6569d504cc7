"""``rt-neds watch``: what is decoded, how late, and whether to believe it, on the screen."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rt_neds.errors import ConfigError, StreamError
from rt_neds.frames import DecodedFrame
from rt_neds.health import Health, counter
from rt_neds.latency import Latency
from rt_neds.stopping import asked_to_stop
from rt_neds.stream.publisher import DecodedListener, Note
from rt_neds.wire import DEFAULT_DECODED

REFRESH_HZ = 4
TRACE_BINS = 400
SPARKS = " ▁▂▃▄▅▆▇█"

STYLES = {"wrong": "red", "doubtful": "yellow", "note": "dim"}
SHOWN = 6
"""Findings on the screen; more would push the values off it."""


class View:
    """What has been heard, and how it looks.

    Parameters
    ----------
    probe : str
    """

    def __init__(self, probe: str) -> None:
        self.probe = probe
        self.schema: dict[str, Any] | None = None
        self.health = Health()
        self.frames = 0
        self.holes = 0
        self.receive_to_publish = Latency()
        self.publish_to_screen = Latency()
        self._last: DecodedFrame | None = None  # that was heard
        self._shown: DecodedFrame | None = None  # that is of the schema
        self._traces: dict[str, deque[float]] = {}
        self._range: dict[str, tuple[float, float]] = {}

    def take(self, message: DecodedFrame | Note | None) -> None:
        """Take in one message."""
        self.health.take(message, time.monotonic_ns())
        if isinstance(message, Note) and message.kind == "schema":
            self._take_schema(message.fields)
        elif isinstance(message, DecodedFrame):
            self._take_frame(message)

    def _take_schema(self, schema: dict[str, Any]) -> None:
        """When ``serve`` begins anew with another bundle, so does the screen."""
        now = self.schema or {}
        if any(schema[key] != now.get(key) for key in ("model", "outputs")):
            self._shown = None
            self._traces.clear()
            self._range.clear()
        self.schema = schema

    def _take_frame(self, frame: DecodedFrame) -> None:
        last = self._last
        if last is not None and frame.epoch == last.epoch:
            self.holes += max(0, frame.bin - last.bin - 1)
        self._last = frame
        self.frames += 1
        stamps = frame.stamps
        self.receive_to_publish.record(stamps["published"] - stamps["received"])
        self.publish_to_screen.record(time.monotonic_ns() - stamps["published"])
        if not self._is_of_schema(frame):
            return
        self._shown = frame
        for output in self.outputs():
            value = float(frame.values_V[output["offset"]])
            self._traces.setdefault(output["name"], deque(maxlen=TRACE_BINS)).append(value)
            low, high = self._range.get(output["name"], (value, value))
            self._range[output["name"]] = min(low, value), max(high, value)

    def _is_of_schema(self, frame: DecodedFrame) -> bool:
        """Not so the first frames that another bundle decodes, if its schema was not heard."""
        values = sum(output["size"] for output in self.outputs())
        of_model = self.schema is not None and frame.model == self.schema["model"]
        return of_model and len(frame.values_V) == values

    def outputs(self) -> list[dict[str, Any]]:
        """Outputs of the schema, once it is known."""
        return self.schema["outputs"] if self.schema else []

    def render(self, width: int) -> Group:
        """The whole screen."""
        return Group(self._head(), self._values(width), self._latency(), self._health())

    def _head(self) -> Text:
        if self.schema is None:
            return Text(f"{self.probe}: no serve heard yet", style="yellow")
        if self._shown is None:
            return Text(f"{self.probe}: serve is ready and waits for spikes", style="yellow")
        seconds = self._shown.end / self.schema["rate"]
        return Text.assemble(
            (self.probe, "bold"),
            f"  bin {self._shown.bin}  {seconds:.2f} s  {self._shown.spikes} spikes  ",
            (f"model {self.schema['model']}  {self.schema['bin_ms']:g} ms bins", "dim"),
        )

    def _values(self, width: int) -> Table:
        table = Table(box=None, padding=(0, 1), expand=True)
        table.add_column("decoded")
        table.add_column("now", justify="right", min_width=22)
        table.add_column("last seconds", ratio=1)
        if self._shown is None:
            return table
        for output in self.outputs():
            values = self._shown.values_V[output["offset"] : output["offset"] + output["size"]]
            trace = self._traces.get(output["name"], deque())
            low, high = self._range.get(output["name"], (0.0, 1.0))
            if output["kind"] == "categorical":
                low, high = 0.0, 1.0
            line = spark(list(trace), low, high, max(10, width - 48))
            table.add_row(output["name"], describe(output, values), Text(line, style="cyan"))
        return table

    def _latency(self) -> Table:
        table = Table(box=None, padding=(0, 1))
        for column in ("latency, ms", "p50", "p99", "p99.9", "max"):
            table.add_column(column, justify="left" if column.startswith("lat") else "right")
        rows = {
            "receive to publish": self.receive_to_publish,
            "publish to here": self.publish_to_screen,
        }
        for name, latency in rows.items():
            table.add_row(
                name,
                *(
                    f"{ms:.2f}" if latency.count else "-"
                    for ms in latency.percentiles_ms().values()
                ),
            )
        return table

    def _health(self) -> Panel:
        findings = self.health.findings(time.monotonic_ns())
        lines = [
            Text.assemble(
                (finding.says, STYLES[finding.level]), (f": {finding.do}" * bool(finding.do), "dim")
            )
            for finding in findings[:SHOWN]
        ]
        if len(findings) > SHOWN:
            lines.append(Text(f"and {len(findings) - SHOWN} more", style="dim"))
        well = "green" if self.frames else STYLES["note"]  # before the first there is none to trust
        if not findings:
            said = "all well: nothing is known against it" if self.frames else "nothing decoded yet"
            lines.append(Text(said, style=well))
        worst = STYLES[findings[0].level] if findings else well
        lines += [*self._triggers(), Text(self._counters(), style="dim")]
        return Panel(Group(*lines), title="health", border_style=worst)

    def _triggers(self) -> Iterator[Text]:
        now = time.monotonic_ns()
        for rule, of in (self.health.status.get("triggers") or {}).items():
            ago = f", the last {(now - of['fired_ns']) / 1e9:.1f} s ago" * bool(of["fired_ns"])
            yield Text(f"trigger {rule}: fired {of['fired']}{ago}; refused {of['refused']}")

    def _counters(self) -> str:
        status = self.health.status
        named = {
            "bins": "bin_counters.bins",
            "lost": "source_counters.lost",
            "malformed": "source_counters.malformed*",
            "late spikes": "bin_counters.spikes_late",
            "unknown": "bin_counters.spikes_unknown",
            "late frames": "frame_counters.late",
            "slips": "frame_counters.slips",
            "restarts": "frame_counters.restarts",
        }
        since = "  ".join(f"{name} {counter(status, path)}" for name, path in named.items())
        return f"since the start: {since}"

    def summary(self) -> dict[str, Any]:
        """For --json: what was seen."""
        return {
            "probe": self.probe,
            "frames": self.frames,
            "holes": self.holes,
            "receive_to_publish_ms": self.receive_to_publish.percentiles_ms(),
            "status": self.health.status,
            "findings": [asdict(one) for one in self.health.findings(time.monotonic_ns())],
        }


def describe(output: dict[str, Any], values: Any) -> str:
    """One output in words: mean and sd, a rate, or the likelier class."""
    if output["kind"] == "continuous":
        return f"{values[0]:.2f} ± {values[1]:.2f} {output['unit']}"
    if output["kind"] == "poisson":
        return f"{values[0]:.3f} per bin"
    best = int(max(range(len(values)), key=lambda c: values[c]))
    return f"{output['classes'][best]} {values[best]:.2f}"


def spark(values: list[float], low: float, high: float, width: int) -> str:
    """A line of blocks, newest at the right, each the mean of a few bins."""
    if not values or high <= low:
        return ""
    per = max(1, -(-len(values) // width))
    line = []
    for start in range(len(values) % per, len(values), per):
        piece = values[start : start + per]
        share = (sum(piece) / len(piece) - low) / (high - low)
        line.append(SPARKS[max(0, min(len(SPARKS) - 1, round(share * (len(SPARKS) - 1))))])
    return "".join(line)


def watch(probe: str, connect: str, seconds: float | None, quiet: bool) -> dict[str, Any]:
    """Listen and show until the time is up or the user ends it.

    Parameters
    ----------
    probe : str
    connect : str
        Address of the decoded stream.
    seconds : float or None
        None is for ever.
    quiet : bool
        Show nothing.

    Returns
    -------
    dict
        See :meth:`View.summary`.

    Raises
    ------
    StreamError
        Nothing was heard in all that time.
    """
    view, listener, console = View(probe), DecodedListener(connect, probe), Console()
    stop = asked_to_stop()
    deadline = None if seconds is None else time.monotonic() + seconds
    shown = 0.0
    try:
        with Live(console=console, auto_refresh=False, screen=False) as live:
            while not stop() and (deadline is None or time.monotonic() < deadline):
                view.take(listener.read(50))
                now = time.monotonic()
                if not quiet and console.is_terminal and now - shown > 1 / REFRESH_HZ:
                    live.update(view.render(console.width), refresh=True)
                    shown = now
    finally:
        listener.close()
    if view.schema is None and not view.frames:
        raise StreamError(
            f"nothing of {probe} came from {connect}; is rt-neds serve --probe {probe} running "
            "and publishing there?"
        )
    return view.summary()


# -- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--probe", required=True, help="name of the probe, such as imec0")
    parser.add_argument(
        "--connect", default=DEFAULT_DECODED, metavar="URL", help="where serve publishes"
    )
    parser.add_argument("--seconds", type=float, default=None, help="stop after so long")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.seconds is not None and args.seconds <= 0:
        raise ConfigError(f"seconds {args.seconds:g}; more than 0 was expected")
    summary = watch(args.probe, args.connect, args.seconds, args.quiet)
    if not args.quiet:
        p = summary["receive_to_publish_ms"]
        took = f"; receive to publish p50 {p['p50']:.2f} ms, p99.9 {p['p99_9']:.2f} ms"
        some = bool(summary["frames"])
        print(f"{summary['frames']} frames, {summary['holes']} missing{took * some}")
    return summary
