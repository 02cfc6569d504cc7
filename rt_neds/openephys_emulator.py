"""Open Ephys without Open Ephys: sends a session as the GUI's plugins would, disorder included.

The session is cut into blocks. Of each block go out, in this order: TTL events (line 0 is high
during trials); the spikes, electrode by electrode; the samples of the continuous channels. Spikes
in the last ``TAIL`` samples of a block come with the next. Outside the session's domain nothing is
sent.

Shape suffixes: S spikes.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from dataclasses import dataclass

import numpy as np
import zmq
from numpy.typing import NDArray

from rt_neds.clock import monotonic_ns
from rt_neds.errors import ConfigError
from rt_neds.openephys_wire import (
    Block,
    Event,
    Spike,
    electrode_of,
    pack_block,
    pack_broadcast_event,
    pack_broadcast_spike,
    pack_event,
    pack_spike,
    reply_to,
)
from rt_neds.session import Session
from rt_neds.stream.sender import LINGER_MS
from rt_neds.stream.sockets import bind
from rt_neds.stream.watermark import TAIL

BLOCK = 1024
PLUGIN_QUEUE = 1000
NODE = 105
THRESHOLD_UV = -50.0
BEFORE_PEAK, AFTER_PEAK = 8, 32
PROMPT_NS = 20_000_000


@dataclass
class Piece:
    """What goes out for one block."""

    first: int
    end: int
    records_S: NDArray[np.void]
    edges: list[tuple[int, int]]  # (sample, state) of line 0


def pieces(session: Session, block: int, first: int = 0, end: int | None = None) -> Iterator[Piece]:
    """Cut a session into blocks, spikes as late and as disordered as the GUI sends them."""
    edges = _trial_edges(session)
    stretches = []
    for low, high in session.domain_K2.tolist():
        low, high = max(low, first), high if end is None else min(high, end)
        if high > low:
            stretches.append((low, high))
    if not stretches:
        return
    samples_S = np.ascontiguousarray(session.records_S["sample"])
    bounds = np.searchsorted(samples_S, stretches)
    rows = np.concatenate([np.arange(*bound) for bound in bounds])
    records_S, samples_S = session.records_S[rows], samples_S[rows]
    sent = 0
    # One block more than was recorded, so that the last spikes come out too.
    after = (stretches[-1][1], stretches[-1][1] + max(block, TAIL))
    for low, high in [*stretches, after]:
        for start in range(low, high, block):
            stop = min(start + block, high)
            to = max(sent, int(np.searchsorted(samples_S, stop - TAIL)))
            of_block_S = records_S[sent:to]
            by_electrode = np.argsort(of_block_S["unit"], kind="stable")
            inside = [edge for edge in edges if start <= edge[0] < stop]
            yield Piece(start, stop, of_block_S[by_electrode], inside)
            sent = to


def _trial_edges(session: Session) -> list[tuple[int, int]]:
    if not session.has("trials"):
        return []
    trials = session.intervals("trials")
    return sorted(
        (int(sample), 1 - column)
        for column in (0, 1)
        for sample in trials[:, column]
        if sample >= 0
    )


class Emulator:
    """The ZMQ Interface (PUB, and REP on the next port) or the Event Broadcaster (PUB).

    Parameters
    ----------
    endpoint : str
        Address to bind, such as ``tcp://127.0.0.1:5556``.
    stream : str
    unit_ids : list of str
        Names of the electrodes; ``<name>#<k>`` is electrode ``<name>`` with sorted id ``k``.
    rate : float
        Samples per second.
    channels : int
        Continuous channels to send; one is what a lab that only wants spikes should choose.
    broadcaster : bool
    lossless : bool
        Wait for a subscriber that cannot keep up, instead of dropping as the plugin does.
    lose : container of int
        Numbers of messages that are counted but not sent, for tests.

    Raises
    ------
    StreamError
        If an address is in use or cannot be bound.
    """

    def __init__(
        self,
        endpoint: str,
        stream: str,
        unit_ids: list[str],
        rate: float,
        *,
        channels: int = 1,
        broadcaster: bool = False,
        lossless: bool = False,
        lose: Container[int] = (),
    ) -> None:
        self.message_num = 0
        self._stream, self._rate, self._channels = stream, rate, channels
        self._broadcaster, self._lose = broadcaster, lose
        self._electrodes = [electrode_of(unit) for unit in unit_ids]
        self._waveforms = _waveforms(len(unit_ids))
        self._noise = np.random.default_rng(0).normal(0, 8, 1 << 15).astype(np.float32)
        self._heartbeats: zmq.Socket | None = None
        self._socket: zmq.Socket = zmq.Context.instance().socket(zmq.XPUB)
        self._socket.set(zmq.SNDHWM, PLUGIN_QUEUE)
        self._socket.set(zmq.LINGER, LINGER_MS)
        if lossless:
            self._socket.set(zmq.XPUB_NODROP, 1)
        bind(self._socket, endpoint)
        if not broadcaster:
            self._heartbeats = zmq.Context.instance().socket(zmq.REP)
            self._heartbeats.set(zmq.LINGER, 0)
            bind(self._heartbeats, next_port(endpoint))

    def wait_for_subscriber(self, seconds: float) -> bool:
        """Wait until somebody subscribes; heartbeats are answered meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.answer(1)
            if self._socket.poll(10) and self._socket.recv()[:1] == b"\x01":
                return True
        return False

    def start_acquisition(self) -> None:
        """Count messages from 1 again, as the GUI does, without a word."""
        self.message_num = 0

    def send(self, piece: Piece) -> None:
        """Send one block."""
        for sample, state in piece.edges:
            event = Event(self._count(), self._stream, sample, 0, state)
            self._send(self._pack_event(event))
        for sample, unit, _ in piece.records_S.tolist():
            electrode, sorted_id = self._electrodes[unit]
            spike = Spike(self._count(), self._stream, electrode, sorted_id, sample)
            self._send(self._pack_spike(spike, unit))
        if not self._broadcaster:
            for channel in range(self._channels):
                self._send_channel(channel, piece)

    def answer(self, timeout_ms: int = 0) -> None:
        """Answer whoever sent a heartbeat."""
        if self._heartbeats is None:
            time.sleep(timeout_ms / 1000)
        elif self._heartbeats.poll(timeout_ms):
            self._heartbeats.send(reply_to(self._heartbeats.recv()))

    def close(self) -> None:
        """Close the sockets once what was sent has gone out."""
        self._socket.close()
        if self._heartbeats is not None:
            self._heartbeats.close()

    def _count(self) -> int:
        self.message_num += 1
        return self.message_num

    def _send(self, frames: list[bytes]) -> None:
        if self.message_num not in self._lose:
            self._socket.send_multipart(frames)

    def _pack_event(self, event: Event) -> list[bytes]:
        if self._broadcaster:
            return pack_broadcast_event(event, self._rate, node=NODE)
        return pack_event(event, event.state or 0, node=NODE, wall_ms=_wall_ms())

    def _pack_spike(self, spike: Spike, unit: int) -> list[bytes]:
        waveform = self._waveforms[unit]
        if self._broadcaster:
            return pack_broadcast_spike(spike, float(-waveform.min()), self._rate, node=NODE)
        return pack_spike(spike, waveform.tobytes(), THRESHOLD_UV, node=NODE, wall_ms=_wall_ms())

    def _send_channel(self, channel: int, piece: Piece) -> None:
        samples = np.resize(np.roll(self._noise, 997 * channel), piece.end - piece.first)
        block = Block(self._count(), self._stream, channel, piece.first, piece.end, self._rate)
        self._send(pack_block(block, samples.tobytes(), wall_ms=_wall_ms()))


def next_port(endpoint: str) -> str:
    """Where the ZMQ Interface listens for heartbeats: one port on.

    Raises
    ------
    ConfigError
        If the address has no port to add one to.
    """
    address, _, port = endpoint.rpartition(":")
    if not address.startswith("tcp://") or not port.isdigit() or not 0 < int(port) < 65535:
        raise ConfigError(f"address {endpoint}; expected something like tcp://127.0.0.1:5556")
    return f"{address}:{int(port) + 1}"


def send_session(
    emulator: Emulator,
    session: Session,
    *,
    block: int = BLOCK,
    speed: float = 1.0,
    first: int = 0,
    end: int | None = None,
) -> dict[str, int | float | None]:
    """Send a session, each block when its last sample would have been taken.

    Returns
    -------
    dict
        ``messages``, ``spikes``, ``first``, ``end`` (samples), ``zero_ns``: host time at which
        sample 0 would have been taken (None unless the speed is 1), ``seconds``,
        ``behind_ms_max``.

    Raises
    ------
    ConfigError
        If nothing was recorded in that part.
    """
    started = monotonic_ns()
    zero_ns: int | None = None
    spikes = behind = 0
    began: int | None = None
    ended = 0
    ns_per_sample = 1e9 / session.rate / speed if speed else 0.0
    emulator.start_acquisition()
    for piece in pieces(session, block, first, end):
        if began is None:
            began = piece.first
            zero_ns = started + PROMPT_NS - round(began * ns_per_sample)
        if speed:
            due = zero_ns + round(piece.end * ns_per_sample)  # type: ignore[operator]
            while (early := due - monotonic_ns()) > 0:
                # Answering may take the rest of a millisecond; the last one is slept.
                if early > 2_000_000:
                    emulator.answer(int(early // 1_000_000) - 1)
                else:
                    time.sleep(early / 1e9)
            behind = max(behind, -early)
        emulator.answer()
        emulator.send(piece)
        spikes, ended = spikes + len(piece.records_S), piece.end
    if began is None:
        raise ConfigError(
            f"{session.path} has nothing recorded in that part; widen --from and --to"
        )
    return {
        "messages": emulator.message_num,
        "spikes": spikes,
        "first": began,
        "end": ended,
        "zero_ns": zero_ns if speed == 1 else None,
        "seconds": round((monotonic_ns() - started) / 1e9, 3),
        "behind_ms_max": round(behind / 1e6, 3),
    }


def _waveforms(units: int) -> NDArray[np.float32]:
    """A trough and its slow rebound per unit, in microvolts, shape (units, samples)."""
    t = (np.arange(BEFORE_PEAK + AFTER_PEAK) - BEFORE_PEAK) / 30.0  # ms
    shape = -np.exp(-((t / 0.1) ** 2)) + 0.35 * np.exp(-(((t - 0.45) / 0.2) ** 2))
    amplitude = np.random.default_rng(1).uniform(70, 250, units)
    return (amplitude[:, None] * shape[None, :]).astype(np.float32)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
