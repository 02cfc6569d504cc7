"""``rt-neds serve``: decode one probe's spikes, live.

The process that was started loads everything and then forks a worker, which decodes; it replaces a
worker that dies or hangs (:mod:`rt_neds.supervise`). With ``standby`` two workers decode, and what
they publish goes through a gate (:mod:`rt_neds.stream.gate`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from rt_neds.assemble import assemble, is_rig, open_source
from rt_neds.clock import monotonic_ns
from rt_neds.config import load_config
from rt_neds.errors import ConfigError
from rt_neds.priority import WATCHER, give_back, quiet_machine, take_priority
from rt_neds.result import tell
from rt_neds.serve_config import ServeConfig, each_probe, refuse_overruled, source_endpoint
from rt_neds.spikeglx_wire import is_spikeglx
from rt_neds.stopping import asked_to_stop
from rt_neds.wire import DEFAULT_DECODED

if TYPE_CHECKING:
    from rt_neds.supervise import Lifeline

ANNOUNCEMENT_WAIT_S = 2.5


@dataclass(frozen=True)
class Loaded:
    """All that takes long to load, once for every worker.

    Attributes
    ----------
    configs : list of ServeConfig
        One for each probe.
    specs, models : dict
        By folder of the bundle.
    detectors : dict
        By probe, of those that need one.
    triggers : dict of str to Triggers
        By probe; none for a probe without rules.
    actuators : Actuators
    """

    configs: list[ServeConfig]
    specs: dict[str, Any]
    models: dict[str, Any]
    detectors: dict[str, Any]
    triggers: dict[str, Any]
    actuators: Any


def load(config: ServeConfig, say: Callable[[str], None]) -> Loaded:
    """Import, read and compile what decoding needs; leaves no open socket and no thread.

    Raises
    ------
    BundleError, ConfigError, DetectorError, StreamError
    """
    configs = each_probe(config)
    for one in configs:
        source_endpoint(one.source)
        if is_spikeglx(one.source) != bool(one.detector):
            raise ConfigError(
                f"probe {one.probe} of {one.source} has {one.detector or 'no'} detector; SpikeGLX "
                "sends samples and needs --detector FOLDER, other sources send spikes and take none"
            )
        if one.live and is_rig(one.source):
            raise ConfigError(
                f"live behaviours {', '.join(one.live)} with {one.source}; they come on the socket "
                "of a rtneds:// source, by the probe's clock: serve without them"
            )
    # Torch comes in here, so that wrong options are told at once.
    import threadpoolctl  # type: ignore[import-untyped]
    import torch

    from rt_neds.actuators import prepare
    from rt_neds.bundle import build_model, load_spec
    from rt_neds.stream.decoder import Decoder, check_streamable, make_step
    from rt_neds.stream.publisher import check_free

    # More would be threads, which a fork does not have. And of two workers with real-time priority,
    # each would keep from a core the threads that the other waits for: for ever.
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    specs = {one.bundle: load_spec(one.bundle) for one in configs}
    for spec in specs.values():
        check_streamable(spec)
    for one in configs:
        check_live(one, specs[one.bundle])
    triggers, actuators = prepare(configs, specs, say)
    models = {bundle: build_model(bundle, spec) for bundle, spec in specs.items()}
    check_free(config.publish)
    say(f"starting with {', '.join(specs)}; the first start on a machine compiles for some seconds")
    for bundle, spec in specs.items():
        session = next((session for session in spec.sessions if session.behaviours), None)
        if session is None or config.control:
            continue
        missing_N = np.zeros(len(session.units), bool)
        step = make_step(models[bundle], spec, session, missing_N)
        Decoder(spec, session, step).warm_up(len(session.units), bins=1)
    return Loaded(configs, specs, models, load_detectors(configs), triggers, actuators)


def check_live(config: ServeConfig, spec: Any) -> None:
    """BundleError unless a session that may come has learned with those behaviours shown."""
    from rt_neds.errors import BundleError
    from rt_neds.stream.decoder import outputs_of

    wrong: BundleError | None = None
    for session in [spec.session(config.session)] if config.session else spec.sessions:
        try:
            outputs_of(spec, session, config.live)
            return
        except BundleError as error:
            wrong = wrong or error
    if wrong is not None:
        raise wrong


def load_detectors(configs: list[ServeConfig]) -> dict[str, Any]:
    """A detector for each probe that needs one, compiled."""
    detectors: dict[str, Any] = {}
    for one in configs:
        if not one.detector:
            continue
        from rt_neds.stream.detector import load_detector

        detector = load_detector(one.detector)
        detector.detect(np.zeros((4096, detector.channels), np.int16), 0)
        detector.reset(0)
        detectors[one.probe] = detector
    return detectors


def serve(config: ServeConfig, stop: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Decode in this process until told to stop.

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
    loaded = load(config, say)
    from rt_neds.stream.board import Accounted, Board
    from rt_neds.stream.publisher import Publisher
    from rt_neds.stream.trigger import Triggered

    probes = [one.probe for one in loaded.configs]
    board, publisher = Board(probes, 1), Publisher(config.publish, probes[0])
    _tell_of_triggers(loaded, board)
    loaded.actuators.start()
    try:
        sink = Triggered(Accounted(publisher, board, 0, probes[0]), loaded.triggers, probes[0])
        decode(loaded, sink, stop, say)
    finally:
        loaded.actuators.end()


def serve_supervised(
    config: ServeConfig, stop: Callable[[], bool], say: Callable[[str], None]
) -> None:
    """Decode in processes of their own, and replace those that die or hang, until told to stop.

    Raises
    ------
    BundleError, ConfigError, StreamError, WorkerError
    """
    loaded = load(config, say)
    from rt_neds.stream.acquisitions import Acquisitions
    from rt_neds.stream.board import Accounted, Board
    from rt_neds.stream.gate import Counts, Gate, GateSink, datagrams
    from rt_neds.stream.publisher import Publisher, flush_sockets
    from rt_neds.stream.trigger import Triggered
    from rt_neds.supervise import Supervisor

    probes = [one.probe for one in loaded.configs]
    acts = bool(loaded.actuators)
    board = Board(probes, (3 if config.standby else 1) + acts)
    _tell_of_triggers(loaded, board)
    if acts:
        loaded.actuators.connect()
    pairs, counts = datagrams(2 if config.standby else 0), Counts(probes)
    if config.standby:
        board.also["gate"] = counts.status

    kept = [_kept(loaded) for _ in range(2 if config.standby else 1)]
    acquisitions = {probe: Acquisitions() for probe in probes}

    def alone(line: Lifeline) -> None:
        publisher = Publisher(config.publish, probes[0])
        accounted = Accounted(publisher, board, line.writer, probes[0])
        sink = Triggered(accounted, loaded.triggers, probes[0])
        decode(loaded, sink, line.stop, say, line, kept[0], acquisitions)
        flush_sockets()

    def gate(line: Lifeline) -> None:
        bin_ns = {one.probe: round(loaded.specs[one.bundle].bin_ms * 1e6) for one in loaded.configs}
        workers = [ours for ours, _ in pairs]
        known = loaded.triggers, line.heard, line.remember
        gate = Gate(config.publish, bin_ns, workers, board, counts, *known)
        with quiet_machine(config.realtime):
            gate.run(line.stop)
        flush_sockets()

    def behind_gate(which: int) -> Callable[[Lifeline], None]:
        def work(line: Lifeline) -> None:
            sink = GateSink(pairs[which][1], probes, board, line.writer, probes[0])
            decode(loaded, sink, line.stop, say, line, kept[which], acquisitions)

        return work

    def act(line: Lifeline) -> None:
        with quiet_machine(config.realtime):
            loaded.actuators.run(line.stop)

    roles: list[tuple[str, Callable[[Lifeline], None]]] = [("decoding worker", alone)]
    if config.standby:
        workers = [("first worker", behind_gate(0)), ("second worker", behind_gate(1))]
        roles = [("gate", gate), *workers]
    if acts:
        roles = [("actuators", act), *roles]
    # Every process that is begun from here inherits it: a replacement is put together with it.
    before = take_priority(WATCHER) if config.realtime else {}
    try:
        Supervisor(roles, board, config.hang_ms, say).run(stop)
    finally:
        give_back(before)


def _tell_of_triggers(loaded: Loaded, board: Any) -> None:
    """Have the status say what has become of rules, where there are any."""
    if loaded.triggers:
        board.also["triggers"] = lambda probe: (
            loaded.triggers[probe].status() if probe in loaded.triggers else {}
        )
        board.also["actuators"] = loaded.actuators.status


def _kept(loaded: Loaded) -> dict[str, Any]:
    """Where one worker after the other keeps what it knows of its stream, by probe."""
    from rt_neds.stream.kept import Kept

    return {one.probe: Kept(loaded.specs[one.bundle]) for one in loaded.configs}


def decode(
    loaded: Loaded,
    sink: Any,
    stop: Callable[[], bool],
    say: Callable[[str], None],
    line: Lifeline | None = None,
    kept: Mapping[str, Any] | None = None,
    acquisitions: Mapping[str, Any] | None = None,
) -> None:
    """Decode into a sink until told to stop; closes it in the end.

    Parameters
    ----------
    loaded : Loaded
    sink : Publisher, or what stands for it
    stop, say : callable
        As in :func:`serve`.
    line : Lifeline, optional
        What to know of those who decoded before us, and to tell those after us.
    kept : mapping of str to Kept, optional
        By probe, where they and we keep what we know of the stream.
    acquisitions : mapping of str to Acquisitions, optional
        By probe, what names those of rigs for all who read them.

    Raises
    ------
    StreamError
    """
    from rt_neds.stream.loop import run_together
    from rt_neds.stream.receiver import waiting_for

    configs, specs, heard = loaded.configs, loaded.specs, line.heard if line is not None else {}
    receivers = [
        open_source(
            one,
            specs[one.bundle],
            loaded.detectors.get(one.probe),
            heard.get(one.probe),
            kept[one.probe] if kept else None,
            acquisitions[one.probe] if acquisitions else None,
        )
        for one in configs
    ]
    try:

        def start(which: int) -> Any:
            one, receiver = configs[which], receivers[which]
            announced, restarts = receiver.announced, 0
            if line is not None:
                line.starting()
                restarts = line.restarts
                if announced is not None:
                    line.remember(one.probe, [announced.session, announced.rate, announced.units])
            spec, model = specs[one.bundle], loaded.models[one.bundle]
            mine, left = sink.beside(one.probe), kept[one.probe] if kept else None
            loop = assemble(one, spec, model, receiver, mine, announced, say, restarts, left)
            say(f"serving {one.probe}: {one.source} -> {one.publish}, bundle {spec.name}")
            if trouble := getattr(receiver, "trouble", ""):
                say(f"waiting: {trouble}")
            elif announced is None and not any(receiver.counters.values()):
                say(
                    f"waiting: nothing of {one.probe} comes from {one.source}; start the sender, "
                    "or check its address and the probe's name"
                )
            return loop

        for receiver in receivers:
            _wait_for_announcement(receiver, stop)
        loops = [start(which) for which in range(len(configs))]
        wait = waiting_for(receivers)
        while not stop():
            with quiet_machine(configs[0].realtime):
                changed = run_together(loops, wait, stop)
                if changed is not None:  # with the same priority: spikes are waiting
                    before, loops[changed] = loops[changed], start(changed)
                    loops[changed].go_on_from(before)
    finally:
        for receiver in receivers:
            receiver.close()
        sink.close()


def _wait_for_announcement(receiver: Any, stop: Callable[[], bool]) -> None:
    """Who sends, if they say so within a moment; spikes that come first are not thrown away.

    A source that can say what keeps it is given the moment for that, too.
    """
    deadline = monotonic_ns() + round(ANNOUNCEMENT_WAIT_S * 1e9)
    while monotonic_ns() < deadline and not stop():
        if receiver.announced is not None and getattr(receiver, "trouble", True):
            break
        if receiver.peek_spikes(50):
            break


# -- command -------------------------------------------------------------------------------------


TAKES_CONFIG = True
HAS_RESULT = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--probe", nargs="+", metavar="NAME", help="name of the probe, such as imec0, or of several"
    )
    parser.add_argument("--bundle", metavar="DIR", help="folder that rt-neds train left")
    parser.add_argument(
        "--source",
        metavar="URL",
        help="where spikes come from: rtneds://HOST:PORT, openephys://HOST:5556[?stream=NAME], "
        "spikeglx://HOST:4142[?probe=N]",
    )
    parser.add_argument(
        "--detector", metavar="DIR", help="folder that rt-neds detector left, for SpikeGLX"
    )
    parser.add_argument(
        "--live",
        nargs="+",
        metavar="NAME",
        help="behaviours that come beside the spikes, to be shown to the decoder",
    )
    parser.add_argument(
        "--publish", metavar="URL", help=f"decoded stream (default {DEFAULT_DECODED})"
    )
    parser.add_argument("--session", metavar="ID", help="session of a bundle that has several")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="what decodes (default cpu)")
    parser.add_argument(
        "--control", action="store_true", default=None, help="publish without decoding"
    )


def run(args: argparse.Namespace) -> None:
    options = (
        *("probe", "bundle", "source", "detector", "live", "publish", "session", "device"),
        "control",
    )
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    if args.probe is not None:
        given["probe"] = " ".join(args.probe)
    config = msgspec.structs.replace(load_config(args.config, ServeConfig, args.set), **given)
    refuse_overruled(config, given)
    stop = asked_to_stop()
    say = (lambda line: None) if args.quiet else tell
    from rt_neds.supervise import CAN_FORK

    if CAN_FORK:
        serve_supervised(config, stop, say)
        return
    if config.standby:
        raise ConfigError("standby on a system that cannot fork; it needs Linux: serve without it")
    say("this system cannot fork: nobody will replace this process if it dies or hangs")
    serve(config, stop, say)
