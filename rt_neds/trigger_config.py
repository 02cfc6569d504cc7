"""What a trigger can be told, and what it can do: the ``[trigger.NAME]`` tables of ``serve``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import msgspec

from rt_neds.frames import Flag

NETWORK_EVENTS = "tcp://127.0.0.1:5556"
SPIKEGLX = "127.0.0.1:4142"
LONGEST_PULSE_MS = 10_000.0
LONGEST_MS = 86_400_000.0
"""A day."""

Line = Annotated[int, msgspec.Meta(ge=1, le=256)]
Bits = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class TtlConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A TTL line of Open Ephys, through its Network Events plugin.

    Attributes
    ----------
    line : int
        1 to 256.
    to : str
        Address of the plugin.
    pulse_ms : float
        How long the line stays high.
    """

    line: Line
    to: str = NETWORK_EVENTS
    pulse_ms: float = 10.0

    def __post_init__(self) -> None:
        check_ms("pulse_ms", self.pulse_ms, 1, LONGEST_PULSE_MS)
        if not self.to.startswith("tcp://"):
            raise ValueError(f"to {self.to!r}; expected an address such as {NETWORK_EVENTS}")


class NidoConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Digital lines of an NI device, through SpikeGLX's command server.

    Attributes
    ----------
    lines : str
        As SpikeGLX names them, such as ``Dev6/port0/line2`` or ``Dev6/port0/line0:3``.
    bits : int
        State of the lines during the pulse, the lowest eight bits for port 0; zero otherwise.
    to : str
        ``host:port`` of the command server.
    pulse_ms : float
        How long the lines stay so.
    """

    lines: str
    bits: Bits
    to: str = SPIKEGLX
    pulse_ms: float = 10.0

    def __post_init__(self) -> None:
        check_ms("pulse_ms", self.pulse_ms, 1, LONGEST_PULSE_MS)
        if not self.lines or not self.lines.isprintable() or " " in self.lines:
            raise ValueError(f"lines {self.lines!r}; expected some such as Dev6/port0/line2")
        host, _, port = self.to.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ValueError(f"to {self.to!r}; expected HOST:PORT such as {SPIKEGLX}")


class TriggerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One rule.

    Attributes
    ----------
    when : str
        The condition, as in :mod:`rt_neds.condition`.
    probe : str
        Whose outputs; may be left out where one probe is served.
    hold_ms : float
        For how long the condition must hold: bins in which it does, times their width.
    refractory_ms : float
        No firing for so long after the last.
    max_age_ms : float
        How old a frame may be when the rule is decided, and its decision when an actuator gets to
        it, counted from the bin's end; 0 for however old.
    refuse : list of str
        Flags of a frame that forbid to fire (``docs/flags.md``); all of them unless told.
    lsl : str
        Text of an LSL marker; empty for none.
    ttl, nido : table
        See :class:`TtlConfig` and :class:`NidoConfig`.
    """

    when: str
    probe: str = ""
    hold_ms: float = 0.0
    refractory_ms: float = 0.0
    max_age_ms: float = 0.0
    refuse: list[str] = msgspec.field(default_factory=lambda: [flag_name(flag) for flag in Flag])
    lsl: str = ""
    ttl: TtlConfig | None = None
    nido: NidoConfig | None = None

    def __post_init__(self) -> None:
        for name in ("hold_ms", "refractory_ms", "max_age_ms"):
            check_ms(name, getattr(self, name))
        flags_of(self.refuse)


class Rule(NamedTuple):
    """A rule by name, and its number among all of a ``serve``."""

    number: int
    name: str
    probe: str
    config: TriggerConfig


def rules_of(triggers: Mapping[str, Mapping[str, TriggerConfig]]) -> list[Rule]:
    """Number the rules of each probe."""
    named = [(name, probe, c) for probe, rules in triggers.items() for name, c in rules.items()]
    return [Rule(number, *one) for number, one in enumerate(named)]


def flag_name(flag: Flag) -> str:
    """A flag as the configuration names it, such as ``missing_units``."""
    return str(flag.name).lower()


def flags_of(names: list[str]) -> int:
    """Sum of the flags of these names; ValueError for one that is none."""
    known = {flag_name(flag): flag for flag in Flag}
    for name in names:
        if name not in known:
            raise ValueError(f"refuse {name!r}; the flags are {', '.join(known)}")
    return sum({known[name] for name in names})


def check_ms(name: str, ms: float, least: float = 0.0, most: float = LONGEST_MS) -> None:
    """ValueError for a time that nobody can wait for; such as NaN, which is no less than any."""
    if not least <= ms <= most:
        raise ValueError(f"{name} {ms:g}; {least:g} to {most:.0f} ms can be had")
