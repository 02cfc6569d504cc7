"""SpikeGLX without SpikeGLX: its command server, over a recording that is played as one run.

The run's samples come in packets of twelve and are held for eight seconds: whoever is slower is
told ``Too late``. Each connection has a thread, which answers one command at a time.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from rt_neds.clock import monotonic_ns
from rt_neds.errors import ConfigError, StreamError
from rt_neds.spikeglx_commands import Worker
from rt_neds.spikeglx_recording import Failure, Recording
from rt_neds.spikeglx_wire import DEFAULT_PORT

PACKET = 12
HELD_S = 8.0
IDLE_S = 10.0
MAX_CONNECTIONS = 16


class Part(NamedTuple):
    """Samples as ``FETCH`` gives them."""

    first: int
    samples_SC: NDArray[np.int16]


class Run:
    """A recording that is being acquired.

    Parameters
    ----------
    recording : Recording
    first, end : int
        Part of it that is played; its sample numbers are the run's.
    speed : float
        1 is real time; 0 is as fast as samples are fetched.
    held_s : float
        How long samples are held.

    Attributes
    ----------
    running : bool
    zero_ns : int or None
        Host time at which sample 0 was, or would have been, taken; None unless the speed is 1.
    fetches, taken : int
        Fetches that gave samples, and the first sample behind all that were given.
    too_late : int
    asked : threading.Event
        Set once somebody has asked for samples, or whether there are any.
    """

    def __init__(
        self, recording: Recording, first: int, end: int, speed: float, held_s: float = HELD_S
    ) -> None:
        self.recording, self.first, self.end = recording, first, end
        self.running = False
        self.zero_ns: int | None = None
        self.fetches = self.too_late = 0
        self.taken = first
        self.asked = threading.Event()
        self._speed, self._held = speed, round(held_s * recording.probe.rate)
        self._ns_per_sample = 1e9 / recording.probe.rate / speed if speed else 0.0
        self._began_ns = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to acquire."""
        with self._lock:
            self.taken = self.first
            self._began_ns = monotonic_ns()
            if self._speed == 1:
                self.zero_ns = self._began_ns - round(self.first * self._ns_per_sample)
            self.running = True

    def stop(self) -> None:
        """Acquire no more; what was acquired is gone."""
        self.running = False

    @property
    def over(self) -> bool:
        """Whether the recording has been played to its end."""
        return self.running and self.count == self.end

    @property
    def count(self) -> int:
        """Samples since the start; 0 where nothing runs."""
        if not self.running:
            return 0
        if not self._speed:  # a little is always there, or nobody would come and take it
            return min(max(self.taken, self.first + PACKET), self.end)
        samples = int((monotonic_ns() - self._began_ns) / self._ns_per_sample)
        return min(self.first + samples // PACKET * PACKET, self.end)

    def fetch(self, first: int, most: int) -> Part:
        """Samples from ``first`` on that there are, at most so many, after a very short wait."""
        self.asked.set()
        for _ in range(3):
            if not self.running:
                raise Failure("FETCH: Not running or stream not enabled.")
            newest = self.count if self._speed else self.end
            # At speed 0 nobody is late: samples are given as they are asked for.
            if first < max(self.first, newest - self._held if self._speed else 0):
                self.too_late += 1
                raise Failure("FETCH: Too late.")
            end = min(first + most, newest)
            if end > first:
                samples_SC = self.recording.samples(first, end)
                with self._lock:
                    self.fetches += 1
                    self.taken = max(self.taken, end)
                return Part(first, samples_SC)
            missing = first + 2 * PACKET - newest
            wait_s = missing * self._ns_per_sample / 1e9
            time.sleep(min(max(wait_s, 0.00025), 0.002))
        return Part(first, np.zeros((0, self.recording.probe.channels), np.int16))


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
    digital : list of (str, int)
        What ``NIDOSET`` was told: lines and bits.
    commands : dict of str to int
        How often each was heard.

    Raises
    ------
    ConfigError, StreamError
        If it is no address, or cannot be bound.
    """

    def __init__(self, endpoint: str, run: Run, *, probe: int = 0, idle_s: float = IDLE_S) -> None:
        self.run, self.probes = run, probe + 1
        self.idle_s = idle_s
        self.name = run.recording.name
        self.saving = False
        self.digital: list[tuple[str, int]] = []
        self.commands: dict[str, int] = {}
        self.metadata: dict[str, str] = {}
        self.began = time.monotonic()
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
            connection.settimeout(self.idle_s)
            Worker(self, connection).work()
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
