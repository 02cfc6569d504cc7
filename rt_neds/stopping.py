"""A signal that asks a command to end, turned into a question its loop can ask."""

from __future__ import annotations

import signal
from collections.abc import Callable


def asked_to_stop() -> Callable[[], bool]:
    """From now on SIGINT and SIGTERM are requests, for commands that have something to finish.

    Returns
    -------
    callable
        Whether one has come.
    """
    stopped = False

    def on_signal(*_: object) -> None:
        nonlocal stopped
        stopped = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return lambda: stopped
