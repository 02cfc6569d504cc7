"""What ``rt-neds serve`` can be told."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from rt_neds.errors import ConfigError
from rt_neds.openephys_wire import is_openephys, parse_url
from rt_neds.spikeglx_wire import is_spikeglx, parse_spikeglx_url
from rt_neds.trigger_config import TriggerConfig, check_ms
from rt_neds.wire import DEFAULT_DECODED, DEFAULT_SPIKES

LEAST_MS = 0.001
LONGEST_LATENESS_MS = 60_000
"""All bins of this time are held in memory."""
LEAST_HANG_MS = 300
"""A worker gives a sign of life every 100 ms."""


class ProbeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One of several probes; what is empty is as for all of them.

    Attributes
    ----------
    bundle, session, source, detector : str
        As in :class:`ServeConfig`.
    """

    bundle: str = ""
    session: str = ""
    source: str = ""
    detector: str = ""


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What ``serve`` can be told; bin width, units and outputs are the bundle's.

    Attributes
    ----------
    probe : str
        Name of the probe; several names, with spaces between them, are served by one process.
    probes : dict of str to ProbeConfig
        What differs between several probes, by name; all of them, if ``probe`` names none.
    bundle : str
        Folder of the bundle.
    session : str
        Session of the bundle whose units will come; empty for the only one, or the one announced.
    source : str
        ``rtneds://host:port``, ``openephys://host:5556``, ``openephys-events://host:5557`` or
        ``spikeglx://host:4142``.
    detector : str
        Folder of the detector that finds spikes in what SpikeGLX sends.
    live : list of str
        Behaviours that come beside the spikes; they are shown to the decoder, not decoded.
    publish : str
        Address of the decoded stream.
    device : {"cpu", "cuda"}
        Without a GPU that works, "cuda" says so and decodes on the CPU.
    lateness_ms : float
        How long bins are held open for spikes that come late.
    stale_ms : float
        A source silent for longer is stale.
    slip_ms : float
        A lasting jump of the sample clock against the host clock by more is a slip.
    realtime : bool
        Ask the system for real-time priority, and to keep cores awake while the stream runs in
        real time; going without is no error.
    control : bool
        Publish zeros without decoding, to learn the latency of machine and transport alone.
    hang_ms : float
        A worker that gives no sign of life for longer is replaced.
    standby : bool
        A second worker decodes the same, and takes over at the next bin that is missed. Costs a
        second core, and every frame a hop between processes.
    trigger : dict of str to TriggerConfig
        When to act, by name of the rule.
    """

    probe: str = ""
    probes: dict[str, ProbeConfig] = {}
    bundle: str = ""
    session: str = ""
    source: str = DEFAULT_SPIKES.replace("tcp://", "rtneds://")
    detector: str = ""
    live: list[str] = []
    publish: str = DEFAULT_DECODED
    device: str = "cpu"
    lateness_ms: float = 0.0
    stale_ms: float = 250.0
    slip_ms: float = 5.0
    realtime: bool = True
    control: bool = False
    hang_ms: float = 1000.0
    standby: bool = False
    trigger: dict[str, TriggerConfig] = {}

    def __post_init__(self) -> None:
        check_ms("lateness_ms", self.lateness_ms, most=LONGEST_LATENESS_MS)
        check_ms("stale_ms", self.stale_ms, LEAST_MS)
        check_ms("slip_ms", self.slip_ms, LEAST_MS)
        check_ms("hang_ms", self.hang_ms, LEAST_HANG_MS)
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device!r}; expected 'cpu' or 'cuda'")


def source_endpoint(url: str) -> str:
    """ZeroMQ endpoint of a source URL; those of rigs find their endpoints themselves.

    Raises
    ------
    ConfigError
        If the scheme is not one that is served.
    """
    if is_openephys(url):
        parse_url(url)
        return url
    if is_spikeglx(url):
        parse_spikeglx_url(url)
        return url
    scheme, found, rest = url.partition("://")
    if not found or scheme != "rtneds" or not rest:
        raise ConfigError(
            f"source {url}; expected rtneds://HOST:PORT, openephys://HOST:5556, "
            "openephys-events://HOST:5557 or spikeglx://HOST:4142"
        )
    return f"tcp://{rest}"


def refuse_overruled(config: ServeConfig, given: Iterable[str]) -> None:
    """Refuse what the command line says in vain: of all probes, each of which has its own.

    Parameters
    ----------
    config : ServeConfig
        With what was given.
    given : iterable of str
        Keys that the command line gave.

    Raises
    ------
    ConfigError
    """
    names = config.probe.split() or list(config.probes)
    for key in given:
        said = getattr(config, key)
        own = {name: getattr(config.probes.get(name), key, "") for name in names}
        if all(own.values()) and (others := [name for name in names if own[name] != said]):
            which = f"probes.{others[0]}.{key}"
            raise ConfigError(
                f"--{key} {said} with {which} = {own[others[0]]}, which goes before it; leave one "
                f"out, or --set {which}=..."
            )


def each_probe(config: ServeConfig) -> list[ServeConfig]:
    """One configuration for each probe.

    Raises
    ------
    ConfigError
        If none is named, one twice, or one has no bundle.
    """
    names = config.probe.split() or list(config.probes)
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"probes {', '.join(names) or '(none)'}; serve needs --probe NAME and --bundle FOLDER, "
            "each name once, or a --config with them"
        )
    if config.probes and not config.probes.keys() & set(names):
        raise ConfigError(
            f"probes {', '.join(names)} with tables of {', '.join(config.probes)} alone, which say "
            "nothing of them; name one of those"
        )
    for rule, trigger in config.trigger.items():
        if (trigger.probe or len(names) > 1) and trigger.probe not in names:
            raise ConfigError(
                f"trigger {rule}: probe {trigger.probe or '(not named)'}; name one of "
                f"{', '.join(names)}: a rule listens to one probe"
            )
    configs = []
    for name in names:
        own = msgspec.structs.asdict(config.probes.get(name, ProbeConfig()))
        given = {key: value for key, value in own.items() if value}
        rules = {rule: t for rule, t in config.trigger.items() if t.probe in ("", name)}
        given |= {"probe": name, "probes": {}, "trigger": rules}
        configs.append(msgspec.structs.replace(config, **given))
        if not configs[-1].bundle:
            raise ConfigError(
                f"probe {name} has no bundle; serve needs --bundle FOLDER, or a --config with it"
            )
    return configs
