"""What ``rt-neds bench soak`` shows: how it goes, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rt_neds.soak import Watched

REFRESH_S = 1.0


class Screen:
    """Shows a run while it goes on, on a terminal."""

    def __init__(self, minutes: float, quiet: bool) -> None:
        self._console = Console(stderr=True)
        self._live = None
        if not quiet and self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
        self._minutes, self._next, self._began = minutes, 0.0, time.monotonic()

    def __enter__(self) -> Callable[[Watched], None]:
        if self._live is not None:
            self._live.start()
        return self.show

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, watched: Watched) -> None:
        """Show how it goes, once a second."""
        now = time.monotonic()
        if self._live is None or now < self._next:
            return
        self._next = now + REFRESH_S
        table = Table(box=None, padding=(0, 2))
        for column in ("fault", "injected", "reported", "at, s"):
            table.add_column(column, justify="left" if column == "fault" else "right")
        for fault in watched.faults.past[-8:]:
            style = "red" if fault.wrong or fault.injected != fault.reported else "green"
            table.add_row(fault.kind, str(fault.injected), str(fault.reported),
                          f"{fault.at_s:.0f}", style=style)  # fmt: skip
        if watched.faults.current is not None:
            table.add_row(watched.faults.current.kind, "...", "", "")
        minutes = (now - self._began) / 60
        table.title = Text(
            f"{watched.mode}: {minutes:.1f} of {self._minutes:g} min, "
            f"{len(watched.books.heard)} bins came, {watched.books.repeated} twice"
        )
        self._live.update(table, refresh=True)


def show(result: dict[str, Any]) -> None:
    """Print what came of it."""
    console = Console()
    console.print(
        f"\n[bold]{result['minutes']:g} minutes, {result['bins_expected']} bins[/bold]: "
        f"{result['bins_published']} published, {result['unaccounted']} unaccounted"
    )
    if result["ended_early"]:
        console.print(f"  [red]ended early: {result['ended_early']}[/red]")
    for name, count in result["fates"].items():
        if count and name not in ("published", "unaccounted"):
            console.print(f"  {count} {name}")
    wrong = {name: count for name, count in result["checks"].items() if count}
    console.print(f"  [red]{wrong}[/red]" if wrong else "  none twice, out of order or miscounted")
    console.print(_faults(result["faults"]))
    console.print(_latency(result["latency"]))
    recovery = ", ".join(
        f"{mode} {'-' if ms is None else f'{ms:.0f} ms'}"
        for mode, ms in result["recovery_ms"].items()
    )
    growth = result["rss_growth_mb"]
    console.print(f"from SIGKILL to the next bin, at most: {recovery}")
    console.print(f"memory grew by at most {'-' if growth is None else f'{growth:.1f} MB'}")
    if result["load"]:
        console.print(f"load of the machine: {result['load']['mean']:.1f} in the mean")


def _faults(faults: list[dict[str, Any]]) -> Table:
    table = Table(title="faults", title_justify="left")
    for column in ("kind", "times", "injected", "reported", ""):
        table.add_column(column, justify="left" if column in ("kind", "") else "right")
    for row in faults:
        well = row["injected"] == row["reported"] and not row["wrong"]
        table.add_row(row["kind"].replace("_", " "), str(row["times"]), str(row["injected"]),
                      str(row["reported"]),
                      "[green]exact[/green]" if well else "[red]not exact[/red]")  # fmt: skip
    return table


def _latency(latency: dict[str, Any]) -> Table:
    table = Table(title="from a bin's intended end to its publication, ms", title_justify="left")
    for column in ("", "p50", "p99", "p99.9", "max", "bins"):
        table.add_column(column, justify="left" if not column else "right")
    for mode, paths in latency.items():
        for path in ("decoded", "control"):
            for which in ("undisturbed", "all"):
                row = paths.get(path, {}).get(which)
                if row and row["n"]:
                    marks = [f"{row[mark]:.2f}" for mark in ("p50", "p99", "p99_9", "max")]
                    table.add_row(f"{mode}, {path}, {which}", *marks, str(row["n"]))
    return table
