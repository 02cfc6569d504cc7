"""Acting on triggers, beside the hot path.

Whoever decides hands over a few bytes and never waits. Each thing to be done has a thread of its
own, so that one which does not answer keeps no other waiting; what waits is bounded, and what comes
too late is not done. Everything is counted, in memory that outlives this process.

What is pulsed is put low at the start: a line must not stay high because somebody died.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rt_neds.bundle import BundleSpec
from rt_neds.clock import monotonic_ns
from rt_neds.condition import parse_condition, value_names
from rt_neds.devices import (
    Device,
    Marker,
    MarkerStream,
    Nido,
    NoAnswerError,
    TooLateError,
    Ttl,
    UnansweredError,
)
from rt_neds.errors import BundleError, ConfigError, RtNedsError
from rt_neds.serve_config import ServeConfig
from rt_neds.stream.board import shared
from rt_neds.stream.decoder import schema_outputs
from rt_neds.stream.trigger import HANDED, Triggers
from rt_neds.trigger_config import Rule, refuse_shared_lines, rules_of

RETRY_S = 1.0
KEEP_S = 4.0
WAITING = 16
LISTEN_S = 0.1
END_S = 1.0

COUNTS = ("done", "overdue", "late", "failed", "dropped")
_ROW = np.dtype([(name, "<i8") for name in (*COUNTS, "took_ns")])


class Hand(threading.Thread):
    """Does one thing for one rule.

    Parameters
    ----------
    name : str
        For people.
    device : Device
    row : record of int64
        Counts: ``done``; of these ``overdue``, known to be done only when it was too late;
        ``late``, not done because it was; ``failed``; ``dropped``, too many waited, or the line was
        high; and ``took_ns`` from the last decision until it was done.
    say : callable
        Takes a line for a person.
    """

    def __init__(self, name: str, device: Device, row: Any, say: Callable[[str], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._device, self._row, self._say = device, row, say
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, int]] = deque()
        self._ending = self._in_trouble = False
        self._high = False
        self._unsure = False  # whether it was done, or will be once who was asked wakes up
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
            if time.monotonic() >= self._off_at:
                self._put_low()
            if wanted is not None:
                self._act(*wanted)
            elif self._ending and not self._waiting:  # it may have come while a line was put low
                break
            elif time.monotonic() >= keep_at:
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

    def _put_low(self) -> None:
        if self._try(self._device.off):
            self._off_at = time.monotonic() + RETRY_S
        else:
            self._off_at, self._high, self._unsure = float("inf"), False, False

    def _act(self, decided_ns: int, until_ns: int) -> None:
        if self._unsure:  # more of it would all be done at once when who was asked wakes up
            self._row["failed"] += 1
            return
        if self._high:  # no edge would be seen
            self._row["dropped"] += 1
            return
        error = self._try(lambda: self._device.on(until_ns))
        if isinstance(error, TooLateError):
            self._row["late"] += 1
        elif error is not None:
            self._row["failed"] += 1
            self._unsure = isinstance(error, UnansweredError)
            self._off_at = time.monotonic()
        else:
            now = monotonic_ns()
            self._row["took_ns"] = now - decided_ns
            self._row["overdue"] += now > until_ns
            self._row["done"] += 1
            if self._device.pulse_s:
                self._high, self._off_at = True, time.monotonic() + self._device.pulse_s

    def _try(self, do: Callable[[], None]) -> Exception | None:
        """Do it, or say in words why not; no error may end this thread, nor what says it."""
        try:
            do()
        except TooLateError as error:
            return error
        except Exception as error:
            with contextlib.suppress(Exception):
                self._device.close()
            words = str(error) if isinstance(error, NoAnswerError) else repr(error)
            if not self._in_trouble:
                self._tell(words)
            self._in_trouble = True
            return error
        if self._in_trouble:
            self._tell("answers again")
        self._in_trouble = False
        return None

    def _tell(self, words: str) -> None:
        with contextlib.suppress(Exception):
            self._say(f"{self.name}: {words}")


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
        LSL is asked for and pylsl is not there, or two rules have a line in common.
    """

    def __init__(self, rules: Sequence[Rule], say: Callable[[str], None]) -> None:
        refuse_shared_lines(rules)
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
            ``COUNTS``: see :class:`Hand`; ``took_ms``: from the last decision until it was done.
        """
        return {
            name: {
                **{count: int(row[count]) for count in COUNTS[:-1]},
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
    BundleError
        No session can be shown the live behaviours.
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
    """Which session comes may not be known yet: one of them must have what is asked for.

    A session that cannot be shown the live behaviours will not be served, and is not asked.
    """
    sessions = [spec.session(config.session)] if config.session else spec.sessions
    wrong: RtNedsError | None = None
    for session in sessions:
        try:
            names = value_names(schema_outputs(spec, session, config.live))
            for rule in rules:
                parse_condition(rule.config.when, names, f"trigger {rule.name}")
            return
        except BundleError as error:
            wrong = wrong or error
        except ConfigError as error:
            wrong = wrong if isinstance(wrong, ConfigError) else error
    assert wrong is not None
    raise wrong


def _check_pylsl(rule: str) -> None:
    from importlib.util import find_spec

    if find_spec("pylsl") is None:
        raise ConfigError(
            f"trigger {rule}: lsl without pylsl; install it: pip install 'rt-neds[lsl]'"
        )
