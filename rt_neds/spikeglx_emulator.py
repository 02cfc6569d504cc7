"""SpikeGLX without SpikeGLX: its command server, over a recording that is played as one run.

The run's samples come in packets of twelve and are held for eight seconds: whoever is slower is
told ``Too late``. Each connection has a thread, which answers one command at a time.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from rt_neds.clock import monotonic_ns
from rt_neds.errors import ConfigError, StreamError
from rt_neds.spikeglx_commands import Worker
from rt_neds.spikeglx_recording import Recording
from rt_neds.spikeglx_run import HELD_S, Rig, Run
from rt_neds.spikeglx_wire import DEFAULT_PORT

IDLE_S = 10.0
MAX_CONNECTIONS = 16


class Server:
    """Listens, and answers everyone who connects.

    Parameters
    ----------
    endpoint : str
        Address to bind, such as ``tcp://127.0.0.1:4142``.
    run : Run
    probe : int
        Number of the probe: the server has so many and one more, and all play the same.
    idle_s : float
        After so long without a command a connection is closed.

    Attributes
    ----------
    endpoint : str
        As it was bound.
    rig : Rig

    Raises
    ------
    ConfigError, StreamError
        If it is no address, or cannot be bound.
    """

    def __init__(self, endpoint: str, run: Run, *, probe: int = 0, idle_s: float = IDLE_S) -> None:
        self.rig = Rig(run, probe + 1, run.recording.name)
        self._idle_s = idle_s
        self._connections: set[socket.socket] = set()
        self._socket = _bound(endpoint)
        host, port = self._socket.getsockname()[:2]
        self.endpoint = f"tcp://{host}:{port}"
        self._closing = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Close every connection."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in accept
        self._socket.close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def attended(self) -> bool:
        """Whether anybody is connected."""
        return bool(self._connections)

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            if len(self._connections) >= MAX_CONNECTIONS:
                connection.close()
                continue
            self._connections.add(connection)
            threading.Thread(target=self._attend, args=(connection,), daemon=True).start()

    def _attend(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(self._idle_s)
            Worker(self.rig, connection).work()
        except OSError:
            pass
        finally:
            self._connections.discard(connection)
            connection.close()


def _bound(endpoint: str) -> socket.socket:
    parts = urlsplit(endpoint)
    try:
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        port = -1
    if parts.scheme != "tcp" or not parts.hostname or port < 0 or parts.path:
        raise ConfigError(f"address {endpoint}; expected something like tcp://127.0.0.1:4142")
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where SO_REUSEADDR would share it
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((parts.hostname, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise StreamError(
            f"cannot bind {endpoint} ({error.strerror or error}); stop what holds that port or "
            "choose another address"
        ) from None
    return listening


def play(
    recording: Recording,
    *,
    bind: str,
    probe: int = 0,
    speed: float = 1.0,
    from_s: float = 0.0,
    to_s: float | None = None,
    wait_s: float = 30.0,
) -> dict[str, Any]:
    """Serve a recording as one run of SpikeGLX, from its start until all of it has been taken.

    Parameters
    ----------
    recording : Recording
    bind : str
        Address to bind.
    probe : int
        Number of the probe.
    speed : float
        1 is real time; 0 is as fast as samples are fetched.
    from_s, to_s : float
        Part to play.
    wait_s : float
        The run starts once somebody has asked about samples, which must be within so long; with 0
        it starts at once.

    Returns
    -------
    dict
        ``session``, ``rate``, ``samples`` (that were there), ``fetches``, ``too_late``, ``taken``
        and ``end`` (samples), ``zero_ns``: host time at which sample 0 would have been taken (None
        unless the speed is 1), ``seconds``, ``commands``: how often each was heard.

    Raises
    ------
    ConfigError, StreamError
    """
    rate = recording.probe.rate
    first, end = round(from_s * rate), recording.end
    if to_s is not None:
        end = min(end, round(to_s * rate))
    if speed < 0 or not 0 <= first < end:
        raise ConfigError(
            f"speed {speed}, samples {first} to {end}; speed >= 0 and a part of the recording "
            "expected: mend --speed, --from or --to"
        )
    run = Run(recording, first, end, speed)
    server = Server(bind, run, probe=probe)
    try:
        if wait_s and not run.asked.wait(wait_s):
            raise StreamError(
                f"nobody asked for samples at {bind} within {wait_s:g} s; start rt-neds serve "
                "--source spikeglx://... or raise --wait"
            )
        began = monotonic_ns()
        run.start()
        played_ns = 0
        while run.running and not played_ns:
            time.sleep(0.01)
            played_ns = monotonic_ns() if run.over else 0
        # Whoever still comes for the last samples gets them, while the run would hold them.
        while run.running and run.taken < end and monotonic_ns() - played_ns < HELD_S * 1e9:
            if not server.attended:
                break
            time.sleep(0.01)
    finally:
        server.close()
    return {
        "session": recording.name,
        "rate": rate,
        "samples": run.taken - first,
        "fetches": run.fetches,
        "too_late": run.too_late,
        "first": first,
        "end": end,
        "zero_ns": run.zero_ns,
        "seconds": round((monotonic_ns() - began) / 1e9, 3),
        "commands": server.rig.commands,
    }
