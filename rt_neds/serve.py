"""``rt-neds serve``: decode one probe's spikes, live."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rt_neds.clock import ClockFit, monotonic_ns, samples_per_bin
from rt_neds.config import load_config
from rt_neds.errors import BundleError, ConfigError, StreamError
from rt_neds.wire import DEFAULT_DECODED, DEFAULT_SPIKES

ANNOUNCEMENT_WAIT_S = 2.5
REALTIME_PRIORITY = 50


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What ``serve`` can be told; bin width, units and outputs are the bundle's.

    Attributes
    ----------
    probe : str
    bundle : str
        Folder of the bundle.
    session : str
        Session of the bundle whose units will come; empty for the only one, or the one announced.
    source : str
        ``rtneds://host:port``.
    publish : str
        Address of the decoded stream.
    device : {"cpu", "cuda"}
    lateness_ms : float
        How long bins are held open for spikes that come late.
    stale_ms : float
        A source silent for longer is stale.
    slip_ms : float
        A lasting jump of the sample clock against the host clock by more is a slip.
    realtime : bool
        Ask the system for real-time priority; going without it is no error.
    control : bool
        Publish zeros without decoding, to learn the latency of machine and transport alone.
    """

    probe: str = ""
    bundle: str = ""
    session: str = ""
    source: str = DEFAULT_SPIKES.replace("tcp://", "rtneds://")
    publish: str = DEFAULT_DECODED
    device: str = "cpu"
    lateness_ms: float = 0.0
    stale_ms: float = 250.0
    slip_ms: float = 5.0
    realtime: bool = True
    control: bool = False

    def __post_init__(self) -> None:
        if self.lateness_ms < 0 or self.stale_ms <= 0 or self.slip_ms <= 0:
            raise ValueError("lateness_ms >= 0, stale_ms > 0 and slip_ms > 0 are needed")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device!r}; expected 'cpu' or 'cuda'")


def source_endpoint(url: str) -> str:
    """ZeroMQ endpoint of a source URL.

    Raises
    ------
    ConfigError
        If the scheme is not one that is served.
    """
    scheme, found, rest = url.partition("://")
    if not found or scheme != "rtneds" or not rest:
        raise ConfigError(f"source {url}; expected rtneds://HOST:PORT")
    return f"tcp://{rest}"


def unit_map(announced: tuple[str, ...] | None, known: list[str]) -> NDArray[np.int32]:
    """For each unit number of the stream, its place in the bundle, or -1.

    A stream that announces nothing is taken to number units as the bundle does.

    Raises
    ------
    StreamError
        If not one announced unit is known to the bundle.
    """
    if announced is None:
        return np.arange(len(known), dtype=np.int32)
    place = {unit: index for index, unit in enumerate(known)}
    rows = np.array([place.get(unit, -1) for unit in announced], dtype=np.int32)
    if not (rows >= 0).any():
        came = ", ".join(announced[:3]) or "none"
        raise StreamError(
            f"the stream announces units {came} ... and the bundle knows "
            f"{', '.join(known[:3])} ...: none in common; serve the bundle of this session "
            "or fine-tune one on it"
        )
    return rows


def serve(config: ServeConfig, stop: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Decode until told to stop.

    Parameters
    ----------
    config : ServeConfig
    stop : callable
        Asked between messages.
    say : callable
        Takes a line for a person.

    Raises
    ------
    BundleError, ConfigError, StreamError
    """
    endpoint = source_endpoint(config.source)
    if not config.probe or not config.bundle:
        raise ConfigError("serve needs --probe NAME and --bundle FOLDER (or a --config with both)")
    # Torch comes in here, so that wrong options are told at once.
    from rt_neds.bundle import build_model, load_spec
    from rt_neds.stream.publisher import Publisher
    from rt_neds.stream.receiver import Receiver

    spec = load_spec(config.bundle)
    if spec.model.attention != "causal" or spec.model.masked != "queries":
        raise BundleError(
            f"{config.bundle} has attention = {spec.model.attention!r}, masked = "
            f'{spec.model.masked!r}; serving needs "causal" and "queries": train it so'
        )
    model = build_model(config.bundle, spec)
    publisher = Publisher(config.publish, config.probe)
    receiver = Receiver(endpoint, config.probe)
    try:
        say(
            f"starting with {config.bundle}; the first start on a machine compiles for some seconds"
        )
        announced = _wait_for_announcement(receiver, stop)
        why = "source changed"
        while why == "source changed" and not stop():
            loop = assemble(config, spec, model, receiver, publisher, announced)
            say(f"serving {config.probe}: {config.source} -> {config.publish}, bundle {spec.name}")
            with quiet_machine(config.realtime):
                why = loop.run(stop)
            announced = receiver.announced
    finally:
        receiver.close()
        publisher.close()


def _wait_for_announcement(receiver: Any, stop: Callable[[], bool]) -> Any:
    """Who sends, if they say so within a moment; spikes that come first are not thrown away."""
    deadline = monotonic_ns() + round(ANNOUNCEMENT_WAIT_S * 1e9)
    while receiver.announced is None and monotonic_ns() < deadline and not stop():
        if receiver.peek_spikes(50):
            break
    return receiver.announced


def assemble(
    config: ServeConfig, spec: Any, model: Any, source: Any, sink: Any, announced: Any
) -> Any:
    """Put the parts of the loop together for what the source announced."""
    import torch

    from rt_neds.stream.binner import Binner
    from rt_neds.stream.decoder import Decoder, Silence, make_step, schema_outputs
    from rt_neds.stream.loop import Loop
    from rt_neds.stream.receiver import Announcement
    from rt_neds.stream.validity import Validity

    torch.set_num_threads(1)
    wanted = config.session or None
    if wanted is None and announced and any(s.id == announced.session for s in spec.sessions):
        wanted = announced.session
    session = spec.session(wanted)
    rate = announced.rate if announced else session.rate
    width = samples_per_bin(spec.bin_ms, rate)
    rows = unit_map(announced.units if announced else None, session.units)
    missing_N = np.ones(len(session.units), bool)
    missing_N[rows[rows >= 0]] = False
    if config.control:
        step: Any = Silence(sum(b.outputs for b in spec.behaviours))
    else:
        step = make_step(model, spec, session, missing_N, config.device)
    decoder = Decoder(spec, session, step)
    decoder.warm_up(len(session.units))
    fit = ClockFit(rate, config.slip_ms)
    lateness = round(config.lateness_ms / 1000 * rate)
    return Loop(
        probe=config.probe,
        model=spec.name,
        source=source,
        binner=Binner(rows, len(session.units), width, spec.model.context, lateness),
        decoder=decoder,
        validity=Validity(
            spec.model.context,
            round(width / rate * 1e9),
            fit,
            config.stale_ms,
            bool(missing_N.any()),
        ),
        sink=sink,
        # A source that says nothing is taken for the session itself; it may yet say otherwise.
        assumed=announced or Announcement(session.id, rate, tuple(session.units)),
        schema={
            "probe": config.probe,
            "bin_ms": spec.bin_ms,
            "rate": rate,
            "model": spec.name,
            "session": session.id,
            "bundle": str(config.bundle),
            "outputs": schema_outputs(spec, session),
        },
    )


@contextlib.contextmanager
def quiet_machine(realtime: bool) -> Any:
    """No garbage collection (one with torch loaded stalls 150 ms); real-time priority if we may."""
    gc.collect()
    gc.freeze()
    gc.disable()
    before = None
    if realtime and hasattr(os, "sched_setscheduler"):
        with contextlib.suppress(OSError):
            before = os.sched_getscheduler(0)
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(REALTIME_PRIORITY))
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, before, os.sched_param(0))
        gc.enable()
        gc.unfreeze()


# -- command -------------------------------------------------------------------------------------


TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--probe", help="name of the probe, such as imec0")
    parser.add_argument("--bundle", metavar="DIR", help="folder that rt-neds train left")
    parser.add_argument(
        "--source", metavar="URL", help="where spikes come from: rtneds://HOST:PORT"
    )
    parser.add_argument(
        "--publish", metavar="URL", help=f"decoded stream (default {DEFAULT_DECODED})"
    )
    parser.add_argument("--session", metavar="ID", help="session of a bundle that has several")
    parser.add_argument(
        "--control", action="store_true", default=None, help="publish without decoding"
    )


def run(args: argparse.Namespace) -> None:
    options = ("probe", "bundle", "source", "publish", "session", "control")
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    config = msgspec.structs.replace(load_config(args.config, ServeConfig, args.set), **given)
    stopped = False

    def on_signal(*_: object) -> None:
        nonlocal stopped
        stopped = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    say = (lambda line: None) if args.quiet else (lambda line: print(line, file=sys.stderr))
    serve(config, lambda: stopped, say)
