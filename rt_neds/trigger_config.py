"""What a trigger can be told, and what it can do: the ``[trigger.NAME]`` tables of ``serve``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec

from rt_neds.errors import ConfigError
from rt_neds.frames import Flag

NETWORK_EVENTS = "tcp://127.0.0.1:5556"
SPIKEGLX = "127.0.0.1:4142"
LONGEST_PULSE_MS = 10_000.0
LONGEST_MS = 86_400_000.0
"""A day."""

DRIFTED = 1 << 19
"""No flag of a frame, but what the status says of the last minutes; beside the bits of Flag."""

Line = Annotated[int, msgspec.Meta(ge=1, le=256)]
Bits = Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)]
NI_LINES = re.compile(r"/?(\w+)/port(\d+)(?:/line(\d+)(?::(\d+))?)?", re.ASCII | re.IGNORECASE)
PORT_LINES = 8
"""Lines of a port that SpikeGLX's bits reach; a port named without lines has them all."""


def flag_name(flag: Flag) -> str:
    """A flag as the configuration names it, such as ``missing_units``."""
    return str(flag.name).lower()


REFUSABLE = {**{flag_name(flag): int(flag) for flag in Flag}, "drifted": DRIFTED}
"""What ``refuse`` can name."""


class TtlConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A TTL line of Open Ephys, through its Network Events plugin.

    Attributes
    ----------
    line : int
        1 to 256.
    to : str
        Address of the plugin.
    pulse_ms : float
        How long the line stays high. The GUI stamps both edges with the first sample of a block:
        what is shorter than its blocks may have no length.
    """

    line: Line
    to: str = NETWORK_EVENTS
    pulse_ms: float = 50.0

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
        reach = sum({1 << (PORT_LINES * port + line) for _, port, line in ni_lines(self.lines)})
        if reach and not self.bits & reach:
            raise ValueError(
                f"bits {self.bits} raise none of {self.lines}; line L of port P is "
                f"2 to the power of {PORT_LINES} P + L"
            )


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
        Flags of a frame that forbid to fire (``docs/flags.md``), and ``drifted``, as the status
        says it; all of them unless told.
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
    refuse: list[str] = msgspec.field(default_factory=lambda: list(REFUSABLE))
    lsl: str = ""
    ttl: TtlConfig | None = None
    nido: NidoConfig | None = None

    def __post_init__(self) -> None:
        for name in ("hold_ms", "refractory_ms", "max_age_ms"):
            check_ms(name, getattr(self, name))
        flags_of(self.refuse)
        for name, pulsed in (("ttl", self.ttl), ("nido", self.nido)):
            if pulsed is not None and pulsed.pulse_ms > self.refractory_ms:
                raise ValueError(
                    f"refractory_ms {self.refractory_ms:g} and {name}.pulse_ms "
                    f"{pulsed.pulse_ms:g}; a firing within a pulse has no edge: make "
                    "refractory_ms as long"
                )


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


def ni_lines(lines: str) -> set[tuple[str, int, int]]:
    """Device, port and line of each line named; empty where they are named in another way."""
    found = set()
    for piece in lines.split(","):
        match = NI_LINES.fullmatch(piece.strip())
        if match is None:
            return set()
        device, port, first, last = match.groups()
        ends = (0, PORT_LINES - 1) if first is None else (int(first), int(last or first))
        found |= {(device.lower(), int(port), n) for n in range(min(ends), max(ends) + 1)}
    return found


def refuse_shared_lines(rules: Sequence[Rule]) -> None:
    """ConfigError where two rules would end, or overwrite, each other's pulses."""
    owners: dict[tuple[object, ...], str] = {}
    for rule in rules:
        ttl, nido = rule.config.ttl, rule.config.nido
        lines: list[tuple[object, ...]] = [("ttl", ttl.to, ttl.line)] if ttl else []
        if nido:
            of: set[object] = {*ni_lines(nido.lines)} or {nido.lines}
            lines += [("nido", nido.to, line) for line in of]
        for line in lines:
            if owners.setdefault(line, rule.name) != rule.name:
                raise ConfigError(
                    f"trigger {rule.name}: its {line[0]} has a line of trigger {owners[line]}; "
                    "give each its own, or make one rule with or"
                )


def flags_of(names: list[str]) -> int:
    """Sum of the flags of these names; ValueError for one that is none."""
    for name in names:
        if name not in REFUSABLE:
            raise ValueError(f"refuse {name!r}; there are {', '.join(REFUSABLE)}")
    return sum({REFUSABLE[name] for name in names})


def check_ms(name: str, ms: float, least: float = 0.0, most: float = LONGEST_MS) -> None:
    """ValueError for a time that nobody can wait for; such as NaN, which is no less than any."""
    if not least <= ms <= most:
        raise ValueError(f"{name} {ms:g}; {least:g} to {most:.0f} ms can be had")
