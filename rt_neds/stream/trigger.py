"""Rules on decoded values: when to act, and when not to although the condition holds.

An *event* is an unbroken run of bins in which a rule's condition holds. It is decided once, at the
bin in which it has held for long enough: the rule fires, or refuses and says why. What was held in
a bin that is not to be believed is not to be believed either: flags of all held bins count. The
next event begins when the condition has been false in between. All of this is a pure function of
the frames, counted in bins; it lives in shared memory, so whoever decides next goes on where
another stopped.

Shape suffixes: V values, R rules, P operations of all conditions one after the other.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numba
import numpy as np

from rt_neds.clock import monotonic_ns
from rt_neds.condition import (
    AT_LEAST,
    AT_MOST,
    BOTH,
    EITHER,
    LESS,
    MORE,
    NOT,
    parse_condition,
    value_names,
)
from rt_neds.frames import DecodedFrame
from rt_neds.stream.board import shared
from rt_neds.trigger_config import DRIFTED, REFUSABLE, Rule, flags_of

TOO_OLD, AGE_UNKNOWN, REFRACTORY = 1 << 16, 1 << 17, 1 << 18
"""Reasons of a rule's own, beside the bits of :class:`Flag`."""
REASONS = {
    **{bit: name for name, bit in REFUSABLE.items()},
    TOO_OLD: "too_old",
    AGE_UNKNOWN: "age_unknown",
    REFRACTORY: "refractory",
}
NO_AGE = -(1 << 62)
UNLIMITED_NS = 1_000_000_000
"""How old the decision of a rule without ``max_age_ms`` may be when an actuator gets to it."""
HANDED = struct.Struct("<qqq")  # number of the rule, when decided, no later than

# Columns of a rule's state, and of the stream's.
HELD, MET, DECIDED, FIRED_BIN, FIRED, REFUSED, REASON, AT_NS = range(8)
EPOCH, BIN, DRIFT = range(3)


@numba.njit(
    numba.boolean(
        numba.types.Array(numba.float32, 1, "C", readonly=True),  # values_V
        numba.int64,  # flags
        numba.int64,  # epoch
        numba.int64,  # bin_
        numba.int64,  # age_ns
        numba.int64[:, ::1],  # operation_P2
        numba.float64[::1],  # number_P
        numba.int64[:, ::1],  # rule_R5
        numba.int64[::1],  # stream
        numba.int64[:, ::1],  # state_RC
        numba.int64[::1],  # decision_R
    ),
    cache=True,
    nogil=True,
    error_model="numpy",
)
def decide(  # type: ignore[no-untyped-def]
    values_V,
    flags,
    epoch,
    bin_,
    age_ns,
    operation_P2,
    number_P,
    rule_R5,
    stream,
    state_RC,
    decision_R,
):
    """Take one frame through all rules.

    Parameters
    ----------
    values_V, flags, epoch, bin_
        Of the frame.
    age_ns : int
        Of the frame; ``NO_AGE`` if it is not known.
    operation_P2 : int64 array
        ``Operation.what`` and ``.value`` of the conditions.
    number_P : float64 array
        ``Operation.number``.
    rule_R5 : int64 array
        Where its operations end; bins to hold; bins of refractoriness; greatest age in ns, 0 for
        none; flags that refuse.
    stream, state_RC : int64 arrays
        What is known of the frames before; changed.
    decision_R : int64 array
        Set to -1 (nothing to decide), 0 (fire) or the reasons to refuse.

    Returns
    -------
    bool
        Whether anything was decided.
    """
    another = stream[EPOCH] != epoch
    hole = another or bin_ != stream[BIN] + 1
    begin, any_decided = 0, False
    for r in range(rule_R5.shape[0]):
        end, hold, refractory, oldest, refuse = rule_R5[r]
        state = state_RC[r]
        decision_R[r] = -1
        if hole:
            state[HELD] = state[MET] = 0
        if another:
            state[DECIDED] = 0
            # The first bin of an acquisition comes after the last of the one before.
            state[FIRED_BIN] += bin_ - 1 - stream[BIN]
        found, usable = np.int64(0), True  # the last bit is the last thing found
        for p in range(begin, end):
            what = operation_P2[p, 0]
            if what < BOTH:
                value, number = np.float64(values_V[operation_P2[p, 1]]), number_P[p]
                usable = usable and np.isfinite(value)
                holds = (
                    (what == LESS and value < number)
                    or (what == AT_MOST and value <= number)
                    or (what == MORE and value > number)
                    or (what == AT_LEAST and value >= number)
                )
                found = found << 1 | np.int64(holds)
            elif what == NOT:
                found ^= 1
            elif what == BOTH:
                found = found >> 2 << 1 | (found & found >> 1 & 1)
            elif what == EITHER:
                found = found >> 2 << 1 | ((found | found >> 1) & 1)
        begin = end
        if not usable or not found & 1:
            state[HELD] = state[MET] = state[DECIDED] = 0
            continue
        state[HELD] += 1
        state[MET] |= flags
        if state[DECIDED] or state[HELD] < hold:
            continue
        state[DECIDED], any_decided = 1, True
        reasons = state[MET] & refuse
        if state[FIRED] and bin_ - state[FIRED_BIN] < refractory:
            reasons |= REFRACTORY
        if oldest and age_ns == NO_AGE:
            reasons |= AGE_UNKNOWN
        elif oldest and age_ns > oldest:
            reasons |= TOO_OLD
        decision_R[r] = reasons
        if reasons:
            state[REFUSED] += 1
            state[REASON] = reasons
        else:
            state[FIRED] += 1
            state[FIRED_BIN] = bin_
    stream[EPOCH], stream[BIN] = epoch, bin_
    return any_decided


class Triggers:
    """The rules of one probe. To be made before processes are forked: they share its state.

    Parameters
    ----------
    rules : sequence of Rule
        At least one.
    hand_over : callable, optional
        Takes ``HANDED`` bytes of a rule that fired to whoever acts; must not wait.
    """

    def __init__(
        self, rules: Sequence[Rule], hand_over: Callable[[bytes], None] | None = None
    ) -> None:
        self._rules, self._hand_over = list(rules), hand_over
        self._stream = shared(3, np.dtype(np.int64))
        self._state_RC = shared(8 * len(self._rules), np.dtype(np.int64)).reshape(-1, 8)
        self._decision_R = np.zeros(len(self._rules), np.int64)
        self._schema: Mapping[str, Any] | None = None

    def bind(self, schema: Mapping[str, Any]) -> None:
        """Learn where the values stand; frames before that decide nothing.

        Parameters
        ----------
        schema : mapping
            As in the schema message.

        Raises
        ------
        ConfigError
            A rule asks for what is not decoded.
        """
        if schema == self._schema:
            return
        names, bin_ms = value_names(schema["outputs"]), float(schema["bin_ms"])
        operations, rows = [], []
        for rule in self._rules:
            c = rule.config
            operations += parse_condition(c.when, names, f"trigger {rule.name}")
            hold, refractory = bins_of(c.hold_ms, bin_ms), bins_of(c.refractory_ms, bin_ms)
            oldest_ns = round(c.max_age_ms * 1e6)
            rows.append((len(operations), hold, refractory, oldest_ns, flags_of(c.refuse)))
        self._operation_P2 = np.array([one[:2] for one in operations], np.int64)
        self._number_P = np.array([one.number for one in operations], np.float64)
        self._rule_R5 = np.array(rows, np.int64)
        self._values = max((o["offset"] + o["size"] for o in schema["outputs"]), default=0)
        self._schema = schema

    def heed(self, status: Mapping[str, Any]) -> None:
        """Learn from a status whether units drifted; who has just begun does not know it yet."""
        drift = status.get("drift") or {}
        if drift.get("surprise") is not None:
            self._stream[DRIFT] = bool(drift["drifted"])

    def take(self, frame: DecodedFrame) -> Sequence[dict[str, Any]]:
        """Take a frame that has gone out; ``trigger`` messages of what it decided, rarely any."""
        if self._schema is None or len(frame.values_V) < self._values:
            return ()
        now, ended = monotonic_ns(), frame.stamps.get("ended")
        age = now - ended if ended is not None else NO_AGE
        any_decided = decide(
            frame.values_V,
            frame.flags | (DRIFTED if self._stream[DRIFT] else 0),
            frame.epoch,
            frame.bin,
            age,
            self._operation_P2,
            self._number_P,
            self._rule_R5,
            self._stream,
            self._state_RC,
            self._decision_R,
        )
        if not any_decided:
            return ()
        return [
            self._decided(rule, frame, int(reasons), now, age)
            for rule, reasons in enumerate(self._decision_R)
            if reasons >= 0
        ]

    def _decided(
        self, which: int, frame: DecodedFrame, reasons: int, now: int, age: int
    ) -> dict[str, Any]:
        rule = self._rules[which]
        if not reasons:
            self._state_RC[which, AT_NS] = now
            if self._hand_over is not None:
                oldest_ns = round(rule.config.max_age_ms * 1e6)
                left = oldest_ns - age if oldest_ns else UNLIMITED_NS
                self._hand_over(HANDED.pack(rule.number, now, now + left))
        return {
            "rule": rule.name,
            "epoch": frame.epoch,
            "bin": frame.bin,
            "sample": frame.end,
            "decoded_ns": frame.stamps["decoded"],
            "sent_ns": now,
            "refused": reasons_of(reasons),
        }

    def status(self) -> dict[str, dict[str, Any]]:
        """``triggers`` of the status message, by rule.

        Returns
        -------
        dict
            ``fired``, ``refused``: counts since the start. ``fired_ns``: host time of the last
            firing, 0 for never. ``why``: reasons of the last refusal.
        """
        return {
            rule.name: {
                "fired": int(state[FIRED]),
                "refused": int(state[REFUSED]),
                "fired_ns": int(state[AT_NS]),
                "why": reasons_of(int(state[REASON])),
            }
            for rule, state in zip(self._rules, self._state_RC, strict=True)
        }


class Triggered:
    """A sink that takes every frame through the rules after it went out.

    Parameters
    ----------
    sink : Publisher, or what stands for it
    triggers : mapping of str to Triggers
        By probe.
    probe : str
    """

    def __init__(self, sink: Any, triggers: Mapping[str, Triggers], probe: str) -> None:
        self._sink, self._all, self._triggers = sink, triggers, triggers.get(probe)

    def write(self, frame: DecodedFrame) -> None:
        """Publish one decoded bin, and what it decided."""
        self._sink.write(frame)
        if self._triggers is not None:
            for decided in self._triggers.take(frame):
                self._sink.note("trigger", decided)

    def note(self, kind: str, fields: dict[str, Any]) -> None:
        """Publish a map; a schema says where the values stand, a status whether units drifted."""
        if kind == "schema" and self._triggers is not None:
            self._triggers.bind(fields)
        elif kind == "status" and self._triggers is not None:
            self._triggers.heed(fields)
        self._sink.note(kind, fields)

    def beside(self, probe: str) -> Triggered:
        """The same for another probe."""
        return Triggered(self._sink.beside(probe), self._all, probe)

    def close(self) -> None:
        """Close the sink."""
        self._sink.close()


def bins_of(ms: float, bin_ms: float) -> int:
    """Whole bins that last at least so long."""
    return math.ceil(ms / bin_ms - 1e-6)


def reasons_of(bits: int) -> list[str]:
    """Names of reasons."""
    return [name for bit, name in REASONS.items() if bits & bit]
