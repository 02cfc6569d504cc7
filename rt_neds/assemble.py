"""The parts of a loop, put together for what a source announced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rt_neds.clock import ClockFit, samples_per_bin
from rt_neds.errors import StreamError
from rt_neds.openephys_wire import is_openephys
from rt_neds.serve_config import ServeConfig, source_endpoint
from rt_neds.spikeglx_wire import is_spikeglx


def open_source(
    config: ServeConfig,
    spec: Any,
    detector: Any = None,
    before: list[Any] | None = None,
    kept: Any = None,
    acquisitions: Any = None,
) -> Any:
    """The source that a URL names; rigs do not say which session is on, so we do.

    ``before`` is what it had announced to the process whose place we take: session, rate, units;
    ``kept`` the :class:`rt_neds.stream.kept.Kept` that it left. ``acquisitions`` are named alike by
    all processes that read a rig.
    """
    from rt_neds.stream.receiver import Announcement, Receiver

    endpoint, heard = source_endpoint(config.source), None
    if before is not None:
        heard = Announcement(before[0], before[1], tuple(before[2]))
    if is_openephys(config.source):
        from rt_neds.stream.openephys import OpenEphysSource

        session = spec.session(config.session or None)
        known = Announcement(session.id, session.rate, tuple(session.units))
        return OpenEphysSource(endpoint, known, config.lateness_ms, heard, acquisitions)
    source: Any
    if is_spikeglx(config.source):
        from rt_neds.stream.spikeglx import SpikeGLXSource

        session = spec.session(config.session or None)
        reached = kept.reached if kept is not None else None
        source = SpikeGLXSource(endpoint, session.id, detector, acquisitions, reached)
    else:
        from rt_neds.stream.live import live_of

        source = Receiver(endpoint, config.probe, live_of(spec.behaviours, config.live))
    source.announced = heard
    return source


def is_rig(url: str) -> bool:
    """Whether a source is an acquisition program, which names no sessions and no runs."""
    return is_openephys(url) or is_spikeglx(url)


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


def assemble(
    config: ServeConfig,
    spec: Any,
    model: Any,
    source: Any,
    sink: Any,
    announced: Any,
    say: Callable[[str], None] = lambda line: None,
    restarts: int = 0,
    kept: Any = None,
) -> Any:
    """Put the parts of the loop together for what the source announced.

    ``restarts`` is how many processes ended before this one took their place, ``kept`` the
    :class:`rt_neds.stream.kept.Kept` that they left.
    """
    import torch

    from rt_neds.awake import Awake
    from rt_neds.stream.binner import Binner
    from rt_neds.stream.decoder import schema_outputs
    from rt_neds.stream.kept import Past
    from rt_neds.stream.loop import Loop
    from rt_neds.stream.receiver import Announcement
    from rt_neds.stream.silent import FallenSilent
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
    if config.live:
        tell_ranges(source.live, spec, session, config.live)
    # Sources of rigs hold back what may not be complete, not the binner.
    lateness = 0 if is_rig(config.source) else round(config.lateness_ms / 1000 * rate)
    validity = Validity(
        spec.model.context,
        max(spec.model.context, spec.model.memory),
        round(width / rate * 1e9),
        ClockFit(rate, config.slip_ms),
        config.stale_ms,
        bool(missing_N.any()),
        round(lateness / rate * 1e9),
    )
    validity.counters["restarts"] = restarts
    # A source that says nothing is taken for the session itself; it may yet say otherwise.
    assumed = announced or Announcement(session.id, rate, tuple(session.units))
    if not is_rig(config.source):
        source.assume(assumed)
    decoder = warm_decoder(config, spec, model, session, missing_N, say)
    if kept is not None:
        decoder.keep(Past(kept, session, width))
    return Loop(
        probe=config.probe,
        model=spec.name,
        source=source,
        binner=Binner(rows, len(session.units), width, spec.model.context, lateness),
        decoder=decoder,
        validity=validity,
        sink=sink,
        assumed=assumed,
        schema={
            "probe": config.probe,
            "bin_ms": spec.bin_ms,
            "rate": rate,
            "model": spec.name,
            "session": session.id,
            "bundle": str(config.bundle),
            "outputs": schema_outputs(spec, session, config.live),
            "live": list(config.live),
        },
        units={
            "bundle": len(missing_N),
            "missing": int(missing_N.sum()),
            "unknown": int((rows < 0).sum()),
        },
        silent=FallenSilent(
            session.longest_silence,
            spec.bin_ms / 1000,
            max(spec.model.history),
            missing_N,
            kept.silence(session) if kept is not None else None,
        ),
        live=source.live if config.live else None,
        awake=Awake(config.realtime),
    )


def tell_ranges(live: Any, spec: Any, session: Any, names: Iterable[str]) -> None:
    """Let what is observed know between which values training saw it."""
    live.learned(
        {
            b.name: (session.scales[b.name].low, session.scales[b.name].high)
            for b in spec.behaviours
            if b.name in names and not live.classes[b.name]
        }
    )


def warm_decoder(
    config: ServeConfig,
    spec: Any,
    model: Any,
    session: Any,
    missing_N: NDArray[np.bool_],
    say: Callable[[str], None],
) -> Any:
    """A decoder that has run on zeros; of the control, one that does nothing."""
    from rt_neds.stream.decoder import Decoder, Silence, make_step, outputs_of

    if config.control:
        step: Any = Silence(sum(b.outputs for b in outputs_of(spec, session, config.live)))
    else:
        step = make_step(model, spec, session, missing_N, config.device, say, config.live)
    decoder = Decoder(spec, session, step, missing_N, config.live)
    decoder.warm_up(len(session.units))
    return decoder
