"""The bundle: the only thing the trainer hands the runtime. A folder, no pickle.

``bundle.json`` says everything that is not a weight (bin width, units, outputs, normalisers, how it
was trained), so that a serve configuration cannot disagree with the model; ``model.safetensors`` is
the weights. Its SHA-256 stands in the JSON, and its first letters name the model on every frame.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rt_neds import __version__
from rt_neds.drift import Expectation
from rt_neds.errors import BundleError
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour, Scale
from rt_neds.model.rounding import by_scale, from_bytes, rounded_weights, to_bytes

FORMAT = 6
JSON_NAME, WEIGHTS_NAME = "bundle.json", "model.safetensors"
NAMED = 5  # sessions that a message names: a bundle can have hundreds
SCALE = ".scale"
"""After the name of a matrix whose weights are multiples of scales: the scale of each row."""


class BundleSession(msgspec.Struct, frozen=True, kw_only=True):
    """One session a bundle can decode.

    Attributes
    ----------
    id : str
    units : list of str
        Unit ids, in the order of the read-in.
    rate : float
        Samples per second of its probe.
    scales : dict of str to Scale
        Of each behaviour, from the training split.
    behaviours : list of str
        What was recorded, and so learned, in this session.
    expectation : Expectation or None
        How well its spikes are predicted as long as nothing has drifted.
    longest_silence : list of float
        Seconds for which each unit was silent in training, at the most; empty if that is not known.
    """

    id: str
    units: list[str]
    rate: float
    scales: dict[str, Scale]
    behaviours: list[str]
    expectation: Expectation | None = None
    longest_silence: list[float] = []


class BundleSpec(msgspec.Struct, frozen=True, kw_only=True):
    """``bundle.json``, typed."""

    format: int
    version: str
    sha256: str
    bin_ms: float
    model: ModelConfig
    behaviours: list[Behaviour]
    sessions: list[BundleSession]
    training: dict[str, Any]

    @property
    def name(self) -> str:
        """Short name of the weights."""
        return self.sha256[:12]

    def session(self, session_id: str | None = None) -> BundleSession:
        """The named session, or the only one.

        Raises
        ------
        BundleError
            If there is none of that id, or none is named and there are several.
        """
        known = {session.id: session for session in self.sessions}
        if session_id is None and len(known) == 1:
            return next(iter(known.values()))
        if session_id not in known:
            others = len(known) - NAMED
            told = ", ".join(list(known)[:NAMED]) + (f" and {others} more" if others > 0 else "")
            if session_id is None:
                raise BundleError(
                    f"a bundle of several sessions, {told}, and none is named; "
                    "say which it is, with --session or session = in the probe's table"
                )
            raise BundleError(
                f"session {session_id} with a bundle of {told}; name one of them, or fine-tune "
                "the bundle on this session (train --init)"
            )
        return known[session_id]


def save_bundle(
    folder: str | Path,
    model: NEDS,
    *,
    bin_ms: float,
    sessions: list[BundleSession],
    training: dict[str, Any],
) -> BundleSpec:
    """Write a bundle; a half-written one never has a readable ``bundle.json``.

    The matrices of the trunk, and of the read-ins of spikes, are rounded to a byte for each weight,
    for whoever reads it alike (:mod:`rt_neds.model.rounding`); a read-in lies with a row for each
    input.

    Parameters
    ----------
    folder : path
        Made if need be.
    model : NEDS
    bin_ms : float
    sessions : list of BundleSession
        In the order of the model's sessions.
    training : dict
        How it came about: the configuration, seed, scores. For people, and for ``evaluate``.

    Returns
    -------
    BundleSpec

    Raises
    ------
    BundleError
        A weight that is no number; it is named, and nothing is written.
    """
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise BundleError(
                f"{name} has weights that are no numbers; train again with a smaller "
                "training.learning_rate"
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_NAME).unlink(missing_ok=True)
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, _ in rounded_weights(model):
        weights[name], weights[name + SCALE] = to_bytes(by_scale(name, weights[name]))
    save_file(weights, folder / WEIGHTS_NAME)
    spec = BundleSpec(
        format=FORMAT,
        version=__version__,
        sha256=_sha256(folder / WEIGHTS_NAME),
        bin_ms=bin_ms,
        model=model.config,
        behaviours=list(model.behaviours),
        sessions=sessions,
        training=training,
    )
    (folder / JSON_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(spec), indent=1))
    return spec


def load_spec(folder: str | Path) -> BundleSpec:
    """Read ``bundle.json`` and check that the weights beside it are the ones it speaks of.

    Raises
    ------
    BundleError
        No such folder, not a bundle, another format, or damaged weights.
    """
    folder = Path(folder)
    path = folder / JSON_NAME
    if not path.is_file():
        # The folder of a run, which has the bundle in it, is what is given by mistake most often.
        of_run = folder / "bundle"
        do = f"name {of_run}" if (of_run / JSON_NAME).is_file() else "rt-neds train leaves one"
        raise BundleError(f"{folder} is not a bundle (no {JSON_NAME}); {do}")
    try:
        spec = msgspec.json.decode(path.read_bytes(), type=BundleSpec)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{path} cannot be read ({error}); train or copy the bundle again"
        ) from None
    if spec.format != FORMAT:
        raise BundleError(
            f"{folder} is of bundle format {spec.format}; this rt-neds reads {FORMAT}: "
            "train it again or use the version that wrote it"
        )
    weights = folder / WEIGHTS_NAME
    if not weights.is_file() or _sha256(weights) != spec.sha256:
        raise BundleError(
            f"{weights} is missing or damaged (SHA-256 differs); copy the bundle again"
        )
    return spec


def build_model(folder: str | Path, spec: BundleSpec) -> NEDS:
    """The network of a bundle, in evaluation mode, on the CPU.

    Raises
    ------
    BundleError
        If a tensor is missing, superfluous, or of another shape than the JSON implies; it is named.
    """
    model = NEDS(spec.model, spec.behaviours, {s.id: len(s.units) for s in spec.sessions})
    try:
        weights = load_file(Path(folder) / WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{folder}: weights cannot be read ({error}); copy it again") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rounded = [name for name, _ in rounded_weights(model)]
    for name, weight in rounded_weights(model):
        expected[name] = tuple(by_scale(name, weight).shape)
        expected[name + SCALE] = expected[name][:1]
    for name in sorted(expected.keys() | weights.keys()):
        came = tuple(weights[name].shape) if name in weights else "nothing"
        wants = expected.get(name, "nothing")
        if came != wants:
            raise BundleError(
                f"{folder}: {name} is {came} in the weights and {wants} by the JSON; "
                "the two files are not of one bundle: copy it again"
            )
    for name in rounded:
        weights[name] = by_scale(name, from_bytes(weights[name], weights.pop(name + SCALE)))
    model.load_state_dict(weights)
    return model.eval()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
