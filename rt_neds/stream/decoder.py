"""Counts to values: one cached step of the network per bin.

Shape suffixes: N units, O raw outputs of the network, V published values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rt_neds.bundle import BundleSession, BundleSpec
from rt_neds.errors import BundleError
from rt_neds.frames import BinnedFrame
from rt_neds.model.neds import NEDS, SCHEMES
from rt_neds.model.readout import to_values
from rt_neds.stream.fused import FusedStep


class Step(Protocol):
    """One bin of one stream: what differs between devices."""

    def reset(self, first_bin: int = 0) -> None:
        """Forget the past; the next bin has that number."""

    def step(self, counts_N: NDArray[np.float32], observed: bool) -> NDArray[np.float32]:
        """Raw outputs of the next bin, in an array that the next step overwrites."""


class EagerStep:
    """The network's own ``step``, in PyTorch: slow, plain, and what every other must equal."""

    def __init__(
        self,
        model: NEDS,
        session: str,
        wanted: Sequence[str],
        missing_N: NDArray[np.bool_] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model, self._session, self._wanted = model.to(device), session, tuple(wanted)
        self._device = torch.device(device)
        modalities = len(model.modalities)
        self._values = torch.zeros(1, 1, modalities, device=device)
        self._observed = torch.zeros(1, 1, modalities, dtype=torch.bool, device=device)
        self._scheme = torch.tensor([SCHEMES.index("decoding")], device=device)
        self._missing = None
        if missing_N is not None and missing_N.any():
            self._missing = torch.from_numpy(missing_N)[None, None].to(device)
        self.reset()

    def reset(self, first_bin: int = 0) -> None:
        """Forget the past; the next bin has that number."""
        self._state = self._model.start(self._session, first_bin=first_bin)

    def step(self, counts_N: NDArray[np.float32], observed: bool) -> NDArray[np.float32]:
        """Raw outputs of the next bin."""
        self._observed[0, 0, 0] = observed
        outputs = self._model.step(
            self._session,
            self._state,
            torch.from_numpy(counts_N)[None, None].to(self._device),
            self._values,
            self._observed,
            self._scheme,
            missing_BTN=self._missing,
            wanted=self._wanted,
        )
        return torch.cat([outputs[name][0, 0] for name in self._wanted]).cpu().numpy()


class Silence:
    """Decodes nothing: what is left of the latency is the machine's and the transport's own."""

    def __init__(self, outputs: int) -> None:
        self._raw_O = np.zeros(outputs, np.float32)

    def reset(self, first_bin: int = 0) -> None:
        """Nothing to forget."""

    def step(self, counts_N: NDArray[np.float32], observed: bool) -> NDArray[np.float32]:
        """Zeros."""
        return self._raw_O


class Decoder:
    """Decodes one session's stream with a bundle's network.

    Parameters
    ----------
    spec : BundleSpec
    session : BundleSession
        Whose units arrive.
    step : Step
        How; see :func:`make_step`.

    Attributes
    ----------
    values_V : ndarray of float32
        Values of the bin last decoded, in the order of the schema; overwritten by the next.
    """

    def __init__(self, spec: BundleSpec, session: BundleSession, step: Step) -> None:
        self.session = session
        self._behaviours = outputs_of(spec, session)
        self._scales = [session.scales[b.name] for b in self._behaviours]
        self._step = step
        self.values_V = np.zeros(
            sum(schema_size(b.kind, len(b.classes)) for b in self._behaviours), np.float32
        )

    def decode(self, frame: BinnedFrame) -> NDArray[np.float32]:
        """Decode a bin; bins must come in order, and a first of a run begins anew."""
        if frame.first_of_run:
            self._step.reset(frame.bin)
        raw_O = self._step.step(frame.counts_N, frame.observed)
        at = to = 0
        for behaviour, scale in zip(self._behaviours, self._scales, strict=True):
            values = to_values(raw_O[at : at + behaviour.outputs], behaviour, scale)
            self.values_V[to : to + len(values)] = values
            at, to = at + behaviour.outputs, to + len(values)
        return self.values_V

    def warm_up(self, units: int, bins: int = 20) -> None:
        """Run the whole step on silence, so that the first real bin is not the slow one."""
        counts_N = np.zeros(units, np.float32)
        self._step.reset(0)
        for _ in range(bins):
            self._step.step(counts_N, True)
        self._step.reset(0)


def make_step(
    model: NEDS,
    spec: BundleSpec,
    session: BundleSession,
    missing_N: NDArray[np.bool_],
    device: str = "cpu",
) -> Step:
    """The fastest faithful step for a device.

    Raises
    ------
    BundleError
        If the network cannot be run bin by bin.
    """
    if spec.model.attention != "causal" or spec.model.masked != "queries":
        raise BundleError(
            f"attention = {spec.model.attention!r} and masked = {spec.model.masked!r}; "
            'serving needs "causal" and "queries": train it so'
        )
    wanted = [b.name for b in outputs_of(spec, session)]
    if device == "cpu":
        return FusedStep(model, session.id, wanted, missing_N)
    return EagerStep(model, session.id, wanted, missing_N, device)


def outputs_of(spec: BundleSpec, session: BundleSession) -> list:
    """Behaviours that a session of the bundle has learned, in order."""
    return [b for b in spec.behaviours if b.name in session.behaviours]


def schema_size(kind: str, classes: int) -> int:
    """Published values of one output: mean and sd, a rate, or a probability per class."""
    return {"gaussian": 2, "poisson": 1, "categorical": classes}[kind]


def schema_outputs(spec: BundleSpec, session: BundleSession) -> list[dict]:
    """``outputs`` of the schema message: how to name the values."""
    outputs, offset = [], 0
    for b in outputs_of(spec, session):
        size = schema_size(b.kind, len(b.classes))
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
