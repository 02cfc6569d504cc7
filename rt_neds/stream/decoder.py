"""Counts to values: one cached step of the network per bin, or per few bins when there is a queue.

Shape suffixes: T bins, N units, O raw outputs of the network, V published values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rt_neds.bundle import BundleSession, BundleSpec
from rt_neds.drift import Drift
from rt_neds.errors import BundleError
from rt_neds.frames import BinnedFrame
from rt_neds.model.neds import NEDS, NEXT, SCHEMES
from rt_neds.model.readout import Behaviour, Scale
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.fused import FusedStep
from rt_neds.stream.graph import GraphStep
from rt_neds.stream.kept import Past
from rt_neds.stream.values import Values, values_of

SHARING = (FusedStep, GraphStep)
"""Steps of which several streams can go through one trunk together."""
FETCHED_PER_S = 5e9
"""Bytes that come out of memory in a second, or more: when there is to be time for it."""


class Step(Protocol):
    """The next bins of one stream: what differs between devices."""

    def reset(self, first_bin: int = 0) -> None:
        """Forget the past; the next bin has that number."""

    def steps(
        self,
        counts_TN: Sequence[NDArray[np.float32]],
        observed_T: Sequence[bool],
        live_TM: Sequence[NDArray[np.float32]] = (),
    ) -> NDArray[np.float32]:
        """Raw outputs (T, O) of the next 1 to ``CHUNK`` bins; overwritten by the next call.

        ``live_TM`` are values of the behaviours that are shown, NaN where one is not; empty if all
        are hidden.
        """

    def next_TN(self) -> NDArray[np.float32]:
        """Log-rates (T, N) of the spikes of the bin after each of those last decoded."""

    def miss(self, silent_N: NDArray[np.bool_] | None) -> None:
        """From the next bin on take these units, too, for missing, until others are named.

        None of them may have fired within the read-in's history.
        """


class EagerStep:
    """The network's own ``step``, in PyTorch: slow, plain, and what every other must equal."""

    def __init__(
        self,
        model: NEDS,
        session: str,
        wanted: Sequence[str],
        missing_N: NDArray[np.bool_] | None = None,
        device: torch.device | str = "cpu",
        live: Mapping[str, Scale] | None = None,
    ) -> None:
        self._model, self._session, self._wanted = model.to(device), session, tuple(wanted)
        self._live = live or {}
        self._next_TN = np.zeros((0, model.parts(session).units), np.float32)
        self._device = torch.device(device)
        modalities = len(model.modalities)
        self._values = torch.zeros(1, CHUNK, modalities, device=device)
        self._observed = torch.zeros(1, CHUNK, modalities, dtype=torch.bool, device=device)
        self._scheme = torch.tensor([SCHEMES.index("decoding")], device=device)
        never_N = np.zeros(model.parts(session).units, bool)
        self._missing_N = never_N if missing_N is None else missing_N
        self.miss(None)
        self.reset()

    def reset(self, first_bin: int = 0) -> None:
        """Forget the past; the next bin has that number."""
        self._state = self._model.start(self._session, first_bin=first_bin, chunk=CHUNK)

    def step(self, counts_N: NDArray[np.float32], observed: bool) -> NDArray[np.float32]:
        """Raw outputs of the next bin."""
        return self.steps((counts_N,), (observed,))[0]

    def steps(
        self,
        counts_TN: Sequence[NDArray[np.float32]],
        observed_T: Sequence[bool],
        live_TM: Sequence[NDArray[np.float32]] = (),
    ) -> NDArray[np.float32]:
        """Raw outputs of the next bins."""
        bins = len(counts_TN)
        self._observed[0, :bins] = False
        self._observed[0, :bins, 0] = torch.tensor(observed_T, device=self._device)
        for t, live_M in enumerate(live_TM):
            for (name, scale), value in zip(self._live.items(), live_M, strict=True):
                if np.isfinite(value):
                    m = self._model.modalities.index(name)
                    categorical = name in self._model.categorical_in
                    shown = value if categorical else scale.normalised(value)
                    self._values[0, t, m], self._observed[0, t, m] = float(shown), True
        outputs = self._model.step(
            self._session,
            self._state,
            torch.from_numpy(np.stack(counts_TN))[None].to(self._device),
            self._values[:, :bins],
            self._observed[:, :bins],
            self._scheme,
            missing_BTN=self._missing,
            wanted=(*self._wanted, NEXT),
        )
        self._next_TN = outputs[NEXT][0].cpu().numpy()
        return torch.cat([outputs[name][0] for name in self._wanted], dim=1).cpu().numpy()

    def next_TN(self) -> NDArray[np.float32]:
        """Log-rates of the spikes of the bin after each of those last decoded."""
        return self._next_TN

    def miss(self, silent_N: NDArray[np.bool_] | None) -> None:
        """From the next bin on take these units, too, for missing."""
        missing_N = self._missing_N if silent_N is None else self._missing_N | silent_N
        self._missing = torch.from_numpy(missing_N)[None, None].to(self._device)


class Silence:
    """Decodes nothing: what is left of the latency is the machine's and the transport's own."""

    def __init__(self, outputs: int) -> None:
        self._raw_TO = np.zeros((CHUNK, outputs), np.float32)

    def reset(self, first_bin: int = 0) -> None:
        """Nothing to forget."""

    def steps(
        self,
        counts_TN: Sequence[NDArray[np.float32]],
        observed_T: Sequence[bool],
        live_TM: Sequence[NDArray[np.float32]] = (),
    ) -> NDArray[np.float32]:
        """Zeros."""
        return self._raw_TO[: len(counts_TN)]

    def next_TN(self) -> NDArray[np.float32]:
        """Nothing is expected of anything."""
        return np.zeros((0, 0), np.float32)

    def miss(self, silent_N: NDArray[np.bool_] | None) -> None:
        """Nobody is listened to anyhow."""


class Decoder:
    """Decodes one session's stream with a bundle's network.

    Parameters
    ----------
    spec : BundleSpec
    session : BundleSession
        Whose units arrive.
    step : Step
        How; see :func:`make_step`.
    missing_N : ndarray of bool, optional
        Units that are not in the stream.
    live : sequence of str
        Behaviours that are observed, not decoded.

    Attributes
    ----------
    past : Past or None
        Where the step's past lies, if it outlives this process.
    values_V : ndarray of float32
        Values of the first of the bins last decoded, in the order of the schema; overwritten by
        the next.
    """

    def __init__(
        self,
        spec: BundleSpec,
        session: BundleSession,
        step: Step,
        missing_N: NDArray[np.bool_] | None = None,
        live: Sequence[str] = (),
    ) -> None:
        self.session, self._drift = session, None
        if (usual := session.expectation) is not None:
            bins = round(1000 * usual.seconds / spec.bin_ms)
            known_N = None if missing_N is None else ~missing_N
            self._drift = Drift(usual.rates, bins, known_N)
        behaviours = outputs_of(spec, session, live)
        self._values = Values(behaviours, [session.scales[b.name] for b in behaviours], CHUNK)
        self._step = step
        self._silent_N: NDArray[np.bool_] | None = None
        self._next_before: list[NDArray[np.float32]] = []
        self.past: Past | None = None
        self.values_V = self._values.values_TV[0]

    def keep(self, past: Past) -> None:
        """Decode in memory that outlives this process, if the step can; once it is warm."""
        if isinstance(self._step, FusedStep):
            self._step.lie_in(past.room)
            self.past = past

    @property
    def fetch_s(self) -> float:
        """Seconds before a bin closes at which to :meth:`fetch`; 0 for not at all."""
        return self._step.nbytes / FETCHED_PER_S if isinstance(self._step, FusedStep) else 0.0

    def fetch(self, *, trunk: bool = True) -> None:
        """Have what the next step reads lie near; see :meth:`FusedStep.fetch`."""
        if isinstance(self._step, FusedStep):
            self._step.fetch(trunk=trunk)

    def decode(self, frame: BinnedFrame) -> NDArray[np.float32]:
        """Decode a bin; bins must come in order, and a first of a run begins anew."""
        return self.decode_chunk((frame,))[0]

    def decode_chunk(self, frames: Sequence[BinnedFrame]) -> NDArray[np.float32]:
        """Decode at most ``CHUNK`` bins, to shape (T, V); only the first may begin a run."""
        self._begin(frames[0])
        raw_TO = self._raw_TO(frames)
        self._complete(frames[-1])
        return self._values.of(raw_TO)

    def _begin(self, frame: BinnedFrame) -> None:
        """What comes before the bins of a chunk: their past, if that is not the last chunk."""
        if self.past is not None:
            self.past.change(frame)
        if not frame.first_of_run:
            return
        if not (frame.known and isinstance(self._step, FusedStep)):
            self._step.reset(frame.bin)
            return
        self._step.go_on_at(frame.bin - frame.missed)
        nothing_N = np.zeros_like(frame.counts_N)
        for t in range(0, frame.missed, CHUNK):
            bins = min(CHUNK, frame.missed - t)
            self._step.steps((nothing_N,) * bins, (False,) * bins)

    def _complete(self, frame: BinnedFrame) -> None:
        if self.past is not None:
            self.past.complete(frame)

    def share(self, other: Decoder) -> bool:
        """Whether the bins of both can go through one call of the network."""
        mine: Any = self._step
        others: Any = other._step
        return type(mine) in SHARING and type(mine) is type(others) and mine.share(others)

    def _raw_TO(self, frames: Sequence[BinnedFrame]) -> NDArray[np.float32]:
        """Raw outputs; the step is told of units that fall silent, or fire again, in between."""
        before: list[NDArray[np.float32]] = []
        self._next_before.clear()
        first = 0
        for t, frame in enumerate(frames):
            if frame.silent_N is self._silent_N:
                continue
            if t > first:
                before.append(self._steps(frames[first:t]).copy())
                if self._drift is not None:
                    self._next_before.append(self._step.next_TN().copy())
            self._step.miss(frame.silent_N)
            self._silent_N, first = frame.silent_N, t
        last_TO = self._steps(frames[first:])
        return np.concatenate([*before, last_TO]) if before else last_TO

    def _steps(self, frames: Sequence[BinnedFrame]) -> NDArray[np.float32]:
        return self._step.steps(
            [frame.counts_N for frame in frames], [frame.observed for frame in frames], live(frames)
        )

    def look_back(self, frames: Sequence[BinnedFrame] = ()) -> None:
        """Compare the bins last decoded with what was expected of them; none breaks the thread.

        Time for it is when they have gone out.
        """
        if self._drift is None:
            return
        next_TN = itertools.chain(*self._next_before, self._step.next_TN() if frames else ())
        for frame, next_N in zip(frames, next_TN, strict=False):
            if frame.first_of_run:
                self._drift.expect(None)
            self._drift.take(frame.counts_N, frame.observed, frame.silent_N)
            self._drift.expect(next_N)
        if not frames:
            self._drift.expect(None)

    def drift(self) -> dict[str, Any]:
        """``drift`` of the status message; empty if the bundle does not know what is usual."""
        usual = self.session.expectation
        if self._drift is None or usual is None:
            return {}
        return self._drift.status(usual, self.session.units, self._silent_N)

    def warm_up(self, units: int, bins: int = 20) -> None:
        """Run the whole step on silence, so that the first real bin is not the slow one."""
        counts_N = np.zeros(units, np.float32)
        self._step.reset(0)
        for _ in range(bins):
            self._step.steps((counts_N,), (True,))
        self._step.steps((counts_N,) * CHUNK, (True,) * CHUNK)
        self._step.reset(0)


def live(frames: Sequence[BinnedFrame]) -> list[NDArray[np.float32]]:
    """What is observed live in some bins of one stream: of all of them, or nothing of any."""
    return [frame.live_M for frame in frames if frame.live_M is not None]


def decode_together(
    decoders: Sequence[Decoder], frames_of: Sequence[Sequence[BinnedFrame]]
) -> list[NDArray[np.float32]]:
    """As ``decode_chunk`` of each of several decoders that share a trunk, to the same bits.

    They have at most ``CHUNK`` bins, all together. Where a unit falls silent in between, one
    decodes after the other.
    """
    if len(decoders) == 1:
        return [decoders[0].decode_chunk(frames_of[0])]
    steady = all(
        frame.silent_N is decoder._silent_N
        for decoder, frames in zip(decoders, frames_of, strict=True)
        for frame in frames
    )
    if not steady:
        return [d.decode_chunk(frames) for d, frames in zip(decoders, frames_of, strict=True)]
    for decoder, frames in zip(decoders, frames_of, strict=True):
        decoder._next_before.clear()
        decoder._begin(frames[0])
    steps: list[Any] = [decoder._step for decoder in decoders]
    raws = steps[0].together(
        steps,
        [[frame.counts_N for frame in frames] for frames in frames_of],
        [[frame.observed for frame in frames] for frames in frames_of],
        [live(frames) for frames in frames_of],
    )
    for decoder, frames in zip(decoders, frames_of, strict=True):
        decoder._complete(frames[-1])
    return [decoder._values.of(raw) for decoder, raw in zip(decoders, raws, strict=True)]


def check_streamable(spec: BundleSpec) -> None:
    """BundleError if the network of a bundle cannot be run bin by bin."""
    if not spec.model.streams:
        raise BundleError(
            f"attention = {spec.model.attention!r} and tokens = {spec.model.tokens!r}; "
            'serving needs "causal" and "bin": train it so'
        )


def make_step(
    model: NEDS,
    spec: BundleSpec,
    session: BundleSession,
    missing_N: NDArray[np.bool_],
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    live: Sequence[str] = (),
) -> Step:
    """The fastest faithful step for a device.

    ``say`` hears why a GPU is not used after all, or not as it could be. ``live`` are behaviours
    that are observed, in the order of their values.

    Raises
    ------
    BundleError
        If the network cannot be run bin by bin, or has not learned with those behaviours shown.
    """
    check_streamable(spec)
    wanted = [b.name for b in outputs_of(spec, session, live)]
    shown = {name: session.scales[name] for name in live}
    if device != "cpu":
        try:
            if not torch.cuda.is_available():
                raise RuntimeError(f"device {device!r} asked for and no CUDA device is there")
            step = GraphStep(model, session.id, wanted, missing_N, device, live=shown)
            if step.many_because:
                say(f"{step.many_because}; a step is many launches, and takes several times longer")
            return step
        except RuntimeError as error:
            say(f"{str(error).splitlines()[0]}; decoding on the CPU")
    return FusedStep(model, session.id, wanted, missing_N, live=shown)


def outputs_of(
    spec: BundleSpec, session: BundleSession, live: Sequence[str] = ()
) -> list[Behaviour]:
    """Behaviours that a session of the bundle has learned, but for those observed live, in order.

    Raises
    ------
    BundleError
        If one of those cannot be observed, or nothing is left to decode.
    """
    learned = [b for b in spec.behaviours if b.name in session.behaviours]
    for name in live:
        if name not in [b.name for b in learned if b.live]:
            can = ", ".join(b.name for b in learned if b.live) or "none"
            do = f"put live = true under [behaviour.{name}] and train again"
            if name not in [b.name for b in learned]:
                do = "name one of those" if any(b.live for b in learned) else "leave it out"
            raise BundleError(
                f"live behaviour {name}; this bundle can be shown {can} of session {session.id}: "
                f"{do}"
            )
    if len(left := [b for b in learned if b.name not in live]) == 0 and live:
        raise BundleError(f"{', '.join(live)} observed live; that leaves nothing to decode")
    return left


def schema_outputs(
    spec: BundleSpec, session: BundleSession, live: Sequence[str] = ()
) -> list[dict]:
    """``outputs`` of the schema message: how to name the values."""
    outputs, offset = [], 0
    for b in outputs_of(spec, session, live):
        size = values_of(b.kind, len(b.classes))
        outputs.append(
            {
                "name": b.name,
                "kind": b.kind,
                "unit": b.unit,
                "classes": list(b.classes),
                "offset": offset,
                "size": size,
            }
        )
        offset += size
    return outputs
