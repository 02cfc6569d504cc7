"""What people see while it trains."""

from __future__ import annotations

import math


class progress:
    """A bar on a terminal, nothing elsewhere. Calling it shows a step."""

    def __init__(self, steps: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn(
                "{task.completed}/{task.total}  loss {task.fields[loss]}  "
                "best validation score {task.fields[best]}"
            ),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, loss="-", best="-")

    def __enter__(self) -> progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, step: int, loss: float, best: float) -> None:
        shown = f"{best:.3f}" if math.isfinite(best) else "-"
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", best=shown)
