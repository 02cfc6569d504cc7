"""What the SpikeGLX emulator plays: one run of a recording, and all else that a client can change.

Shape suffixes: S samples, C channels.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rt_neds.clock import monotonic_ns
from rt_neds.spikeglx_recording import Failure, Recording

PACKET = 12
HELD_S = 8.0


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


@dataclass
class Rig:
    """A SpikeGLX that runs.

    Attributes
    ----------
    run : Run
    probes : int
        They all play the same.
    name : str
        Of the run.
    saving : bool
    digital : list of (str, int)
        What ``NIDOSET`` was told last: lines and bits.
    commands : dict of str to int
        How often each was heard.
    params : dict of str to str
        What a client has set.
    began : float
        When the program started, in seconds.
    """

    run: Run
    probes: int
    name: str
    saving: bool = False
    digital: list[tuple[str, int]] = field(default_factory=list)
    commands: dict[str, int] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
