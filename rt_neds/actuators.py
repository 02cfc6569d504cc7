"""Acting on triggers, beside the hot path: LSL markers, TTL lines, digital outputs.

Whoever decides hands over a few bytes and never waits. Each thing to be done has a thread of its
own, so that one which does not answer keeps no other waiting; what waits is bounded, and what comes
too late is not done. Everything is counted, in memory that outlives this process.

What is pulsed is put low at the start: a line must not stay high because somebody died.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import zmq

from rt_neds.bundle import BundleSpec
from rt_neds.clock import monotonic_ns
from rt_neds.condition import parse_condition, value_names
from rt_neds.errors import ConfigError
from rt_neds.serve_config import ServeConfig
from rt_neds.stream.board import shared
from rt_neds.stream.decoder import schema_outputs
from rt_neds.stream.trigger import HANDED, Triggers
from rt_neds.trigger_config import NidoConfig, Rule, TtlConfig, rules_of

ANSWER_S = 0.2
RETRY_S = 1.0
KEEP_S = 4.0
"""SpikeGLX closes a connection that says nothing for ten seconds."""
WAITING = 16
LISTEN_S = 0.1
END_S = 1.0

_ROW = np.dtype([(name, "<i8") for name in ("done", "late", "failed", "dropped", "took_ns")])


class NoAnswerError(Exception):
    """The other side is not there, or refuses; the message is for a person."""


class Device(Protocol):
    """One thing that can be done.

    Attributes
    ----------
    pulse_s : float
        After so long ``off`` follows; 0 for never.
    """

    pulse_s: float

    def on(self) -> None:
        """Do it; NoAnswerError if it cannot be done within ``ANSWER_S`` or so."""

    def off(self) -> None:
        """Undo it."""

    def keep(self) -> None:
        """Called every ``KEEP_S``."""

    def close(self) -> None:
        """Let go."""


class Ttl:
    """A TTL line of Open Ephys: text to its Network Events plugin, which answers each."""

    def __init__(self, config: TtlConfig) -> None:
        self.pulse_s = config.pulse_ms / 1000
        self._to, self._line = config.to, config.line
        self._socket: zmq.Socket | None = None

    def on(self) -> None:
        self._ask(1)

    def off(self) -> None:
        self._ask(0)

    def keep(self) -> None:
        """Nothing to do: ZeroMQ connects again by itself."""

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, state: int) -> None:
        try:
            if self._socket is None:
                self._socket = zmq.Context.instance().socket(zmq.REQ)
                self._socket.set(zmq.LINGER, 0)
                self._socket.connect(self._to)
            self._socket.send(f"TTL Line={self._line} State={state}".encode(), zmq.NOBLOCK)
            if not self._socket.poll(round(ANSWER_S * 1000)):
                raise NoAnswerError(
                    f"{self._to} does not answer: is Network Events in the signal chain?"
                )
            answer = self._socket.recv().decode(errors="replace")
        except zmq.ZMQError as error:
            raise NoAnswerError(f"{self._to}: {error}") from None
        if not answer.startswith("TTLHandled"):
            raise NoAnswerError(f"{self._to} answers {answer[:60]!r}; TTLHandled was expected")


class Nido:
    """Digital lines of an NI device: one line of text to SpikeGLX, which answers ``OK``."""

    def __init__(self, config: NidoConfig) -> None:
        self.pulse_s = config.pulse_ms / 1000
        host, _, port = config.to.rpartition(":")
        self._to, self._address = config.to, (host.strip("[]"), int(port))
        self._lines, self._bits = config.lines, config.bits
        self._socket: socket.socket | None = None

    def on(self) -> None:
        self._ask(f"NIDOSET {self._lines} {self._bits}")

    def off(self) -> None:
        self._ask(f"NIDOSET {self._lines} 0")

    def keep(self) -> None:
        self._ask("NOOP")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, command: str) -> None:
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address, ANSWER_S)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.settimeout(ANSWER_S)
            self._socket.sendall(command.encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n") and len(answer) < 1024:
                came = self._socket.recv(1024)
                if not came:
                    raise NoAnswerError(f"SpikeGLX at {self._to} closed the connection")
                answer += came
        except OSError as error:
            raise NoAnswerError(
                f"SpikeGLX at {self._to} does not answer ({error}): is its command server on?"
            ) from None
        if answer.strip() != b"OK":
            words = answer.decode(errors="replace").strip()
            raise NoAnswerError(f"SpikeGLX at {self._to} answers {words[:80]!r} to {command}")


class MarkerStream:
    """The LSL marker stream of a probe, for all its rules; open from the first use on."""

    def __init__(self, probe: str) -> None:
        self._name = f"rt-neds-{probe}"
        self._outlet: Any = None
        self._making = threading.Lock()

    def outlet(self) -> Any:
        """The stream; NoAnswerError if LSL cannot be used."""
        with self._making:
            if self._outlet is None:
                try:
                    import pylsl

                    # A source id that is always the same: who listens finds it again.
                    about = (1, pylsl.IRREGULAR_RATE, pylsl.cf_string, self._name)
                    info = pylsl.StreamInfo(self._name, "Markers", *about)
                    self._outlet = pylsl.StreamOutlet(info)
                except (ImportError, RuntimeError) as error:
                    raise NoAnswerError(f"LSL cannot be used: {error}") from None
            return self._outlet


class Marker:
    """A text in the LSL marker stream of a probe."""

    pulse_s = 0.0

    def __init__(self, stream: MarkerStream, text: str) -> None:
        self._stream, self._text = stream, text

    def on(self) -> None:
        self._stream.outlet().push_sample([self._text])

    def off(self) -> None:
        """Open the stream, so that whoever records can find it before the first marker."""
        self._stream.outlet()

    def keep(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do: the stream is there as long as the process."""


class Hand(threading.Thread):
    """Does one thing for one rule.

    Parameters
    ----------
    name : str
        For people.
    device : Device
    row : record of int64
        Counts: ``done``; ``late``, not done because it was; ``failed``; ``dropped``, too many
        waited; and ``took_ns`` from the last decision until it was done.
    say : callable
        Takes a line for a person.
    """

    def __init__(self, name: str, device: Device, row: Any, say: Callable[[str], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._device, self._row, self._say = device, row, say
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, int]] = deque()
        self._ending = self._in_trouble = False
        self._off_at = time.monotonic()  # at once: it may have been left on

    def give(self, decided_ns: int, until_ns: int) -> None:
        """Have it done, but not after ``until_ns``; does not wait."""
        with self._changed:
            if len(self._waiting) >= WAITING:
                self._row["dropped"] += 1
                return
            self._waiting.append((decided_ns, until_ns))
            self._changed.notify()

    def end(self) -> None:
        """Finish what waits, put low what is high, and end."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    def run(self) -> None:
        keep_at = time.monotonic() + KEEP_S
        while True:
            wanted = self._wait(min(self._off_at, keep_at))
            now = time.monotonic()
            if wanted is not None:
                self._act(*wanted)
            elif self._ending:
                break
            elif now >= self._off_at:
                done = self._try(self._device.off)
                self._off_at = float("inf") if done else time.monotonic() + RETRY_S
            elif now >= keep_at:
                self._try(self._device.keep)
            keep_at = time.monotonic() + KEEP_S
        if self._off_at < float("inf") and self._device.pulse_s:
            self._try(self._device.off)
        self._device.close()

    def _wait(self, until: float) -> tuple[int, int] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._waiting or self._ending, max(0.0, until - time.monotonic())
            )
            return self._waiting.popleft() if self._waiting else None

    def _act(self, decided_ns: int, until_ns: int) -> None:
        if monotonic_ns() > until_ns:
            self._row["late"] += 1
            return
        if not self._try(self._device.on):
            self._row["failed"] += 1
            self._off_at = time.monotonic()  # who did not answer may have done it
            return
        self._row["took_ns"] = monotonic_ns() - decided_ns
        self._row["done"] += 1
        if self._device.pulse_s:
            self._off_at = time.monotonic() + self._device.pulse_s

    def _try(self, do: Callable[[], None]) -> bool:
        try:
            do()
        except NoAnswerError as error:
            self._device.close()
            if not self._in_trouble:
                self._say(f"{self.name}: {error}")
            self._in_trouble = True
            return False
        if self._in_trouble:
            self._say(f"{self.name}: answers again")
        self._in_trouble = False
        return True


class Actuators:
    """All that is to be done for the rules of a ``serve``. To be made before processes are forked.

    Parameters
    ----------
    rules : sequence of Rule
    say : callable
        Takes a line for a person.

    Raises
    ------
    ConfigError
        LSL is asked for and pylsl is not there.
    """

    def __init__(self, rules: Sequence[Rule], say: Callable[[str], None]) -> None:
        self._say = say
        self._things: list[tuple[Rule, str, Device]] = []
        streams: dict[str, MarkerStream] = {}
        for rule in rules:
            c = rule.config
            if c.lsl:
                _check_pylsl(rule.name)
                stream = streams.setdefault(rule.probe, MarkerStream(rule.probe))
                self._things.append((rule, f"{rule.name}.lsl", Marker(stream, c.lsl)))
            if c.ttl is not None:
                self._things.append((rule, f"{rule.name}.ttl", Ttl(c.ttl)))
            if c.nido is not None:
                self._things.append((rule, f"{rule.name}.nido", Nido(c.nido)))
        self._rows = shared(len(self._things) or 1, _ROW)
        self._undelivered_R = shared(len(rules) or 1, np.dtype(np.int64))
        self._hands: list[tuple[int, Hand]] = []
        self._out: socket.socket | None = None

    def __len__(self) -> int:
        return len(self._things)

    def connect(self) -> None:
        """Have what is handed over go to another process, which runs :meth:`run`."""
        self._in, self._out = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._in.settimeout(LISTEN_S)

    def hand_over(self, handed: bytes) -> None:
        """Have a rule's things done; never waits."""
        if self._out is None:
            self._dispatch(handed)
            return
        try:
            self._out.send(handed, socket.MSG_DONTWAIT)
        except OSError:
            self._undelivered_R[HANDED.unpack(handed)[0]] += 1

    def run(self, stop: Callable[[], bool]) -> None:
        """Do what is handed over until told to stop, and what has been by then."""
        self.start()
        while not stop():
            self._hear()
        self._in.settimeout(0.0)
        while self._hear():
            pass
        self.end()

    def start(self) -> None:
        """Start a thread for each thing; those of a process forked later are not ours."""
        self._hands = [
            (rule.number, Hand(f"trigger {name}", device, row, self._say))
            for (rule, name, device), row in zip(self._things, self._rows, strict=False)
        ]
        for _, hand in self._hands:
            hand.start()

    def end(self) -> None:
        """End the threads, after they have done what waits."""
        for _, hand in self._hands:
            hand.end()
        until = time.monotonic() + END_S
        for _, hand in self._hands:
            hand.join(max(0.0, until - time.monotonic()))

    def status(self, probe: str) -> dict[str, dict[str, Any]]:
        """``actuators`` of the status message, by rule and thing, such as ``go_left.ttl``.

        Returns
        -------
        dict
            ``done``, ``late``, ``failed``, ``dropped``: see :class:`Hand`; ``took_ms``: from the
            last decision until it was done.
        """
        return {
            name: {
                **{count: int(row[count]) for count in ("done", "late", "failed")},
                "dropped": int(row["dropped"]) + int(self._undelivered_R[rule.number]),
                "took_ms": row["took_ns"] / 1e6,
            }
            for (rule, name, _), row in zip(self._things, self._rows, strict=False)
            if rule.probe == probe
        }

    def _hear(self) -> bool:
        try:
            handed = self._in.recv(HANDED.size)
        except (TimeoutError, BlockingIOError):
            return False
        self._dispatch(handed)
        return True

    def _dispatch(self, handed: bytes) -> None:
        rule, decided_ns, until_ns = HANDED.unpack(handed)
        for number, hand in self._hands:
            if number == rule:
                hand.give(decided_ns, until_ns)


def prepare(
    configs: Sequence[ServeConfig], specs: Mapping[str, BundleSpec], say: Callable[[str], None]
) -> tuple[dict[str, Triggers], Actuators]:
    """Rules and what they do, for the probes of a ``serve``; before any process is forked.

    Raises
    ------
    ConfigError
        A condition that cannot be read, or that no session of the bundle can answer.
    """
    rules = rules_of({one.probe: one.trigger for one in configs})
    actuators, triggers = Actuators(rules, say), {}
    for one in configs:
        ours = [rule for rule in rules if rule.probe == one.probe]
        if ours:
            triggers[one.probe] = Triggers(ours, actuators.hand_over if actuators else None)
            _check(ours, one, specs[one.bundle])
    return triggers, actuators


def _check(rules: Sequence[Rule], config: ServeConfig, spec: BundleSpec) -> None:
    """Which session comes may not be known yet: one of them must have what is asked for."""
    sessions = [spec.session(config.session)] if config.session else spec.sessions
    wrong: ConfigError | None = None
    for session in sessions:
        names = value_names(schema_outputs(spec, session, config.live))
        try:
            for rule in rules:
                parse_condition(rule.config.when, names, f"trigger {rule.name}")
            return
        except ConfigError as error:
            wrong = wrong or error
    assert wrong is not None
    raise wrong


def _check_pylsl(rule: str) -> None:
    from importlib.util import find_spec

    if find_spec("pylsl") is None:
        raise ConfigError(
            f"trigger {rule}: lsl without pylsl; install it: pip install 'rt-neds[lsl]'"
        )
