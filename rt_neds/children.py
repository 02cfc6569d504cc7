"""Other rt-neds commands as processes of their own: what demo and bench are made of."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rt_neds.errors import RtNedsError
from rt_neds.frames import DecodedFrame
from rt_neds.stream.publisher import DecodedListener, Note

START_S = 300.0
"""A first start compiles, and the machine may be busy; this only bounds the wait for a failure."""
END_S = 30.0
PORTS = range(20_000, 30_000, 2)
"""Below those that systems give to connections: what is free when it is looked for stays so. Two
processes that look at once take them in orders of their own."""
_ports = itertools.cycle(random.sample(PORTS, len(PORTS)))


class ChildError(RtNedsError):
    """A process of ours failed; the message is its last line."""

    exit_code = 1


def free_port() -> int:
    """A TCP port of the loopback that is free now, and so is the next."""
    for port in itertools.islice(_ports, len(PORTS)):
        try:
            for each in (port, port + 1):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
        except OSError:
            continue
        return port
    raise ChildError(f"no port from {PORTS[0]} to {PORTS[-1]} is free; end what holds them")


def command(*args: str) -> list[str]:
    """Argument vector of an rt-neds command in this very Python."""
    return [sys.executable, "-m", "rt_neds.cli", *args]


@contextlib.contextmanager
def serving(*args: str) -> Iterator[subprocess.Popen]:
    """A ``serve`` process for the length of the block; ended gently, killed if it must be."""
    with tempfile.TemporaryFile("w+") as words:
        child = subprocess.Popen(command("serve", *args), stdout=words, stderr=words)
        try:
            yield child
        finally:
            if child.poll() is None:
                child.terminate()
            try:
                child.wait(timeout=END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if child.returncode not in (0, -15):
            words.seek(0)
            raise ChildError(last_line(words.read()) or f"serve ended with {child.returncode}")


def start_replay(*args: str, out: Path) -> subprocess.Popen:
    """Begin a ``replay`` process that leaves its summary in ``out``."""
    return subprocess.Popen(
        command("replay", *args, "--json", str(out), "--quiet"), stderr=subprocess.PIPE, text=True
    )


def finish_replay(child: subprocess.Popen, out: Path) -> dict[str, Any]:
    """Summary of a replay that has ended, or its error."""
    _, words = child.communicate()
    if child.returncode:
        raise ChildError(last_line(words))
    return json.loads(out.read_text())


def collect(
    listener: DecodedListener, sending: subprocess.Popen, quiet_s: float = 1.5
) -> tuple[list[DecodedFrame], dict[str, Note]]:
    """Every frame that comes until the sender has ended and nothing has come for a moment.

    A moment that the machine spent elsewhere does not count: ``serve`` must have said twice since,
    by its status, that it is at work (or nothing at all for ``END_S``).

    Returns
    -------
    list of DecodedFrame
    dict of str to Note
        The last schema and status.
    """
    frames, notes, last, statuses = [], {}, time.monotonic(), 0
    while True:
        message = listener.read(100)
        if isinstance(message, DecodedFrame):
            frames.append(message)
            last, statuses = time.monotonic(), 0
        elif isinstance(message, Note):
            notes[message.kind] = message
            statuses += message.kind == "status"
        if sending.poll() is None:
            statuses = 0
        elif time.monotonic() - last > (quiet_s if statuses >= 2 else END_S):
            return frames, notes


def wait_for_schema(listener: DecodedListener, child: subprocess.Popen) -> Note:
    """The first schema of a ``serve`` process: from then on it decodes.

    Raises
    ------
    ChildError
        If it ends or says nothing for too long.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        message = listener.read(100)
        if isinstance(message, Note) and message.kind == "schema":
            return message
        if child.poll() is not None:
            raise ChildError(f"serve ended with {child.returncode} before it began")
    raise ChildError(f"serve published nothing within {START_S:g} s")


def last_line(words: str) -> str:
    """The last line that is not empty."""
    lines = [line for line in words.splitlines() if line.strip()]
    return lines[-1] if lines else ""
