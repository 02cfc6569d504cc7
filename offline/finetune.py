"""Beginning at a bundle: what a network has learned of other sessions, carried to new ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from offline.batches import Subject
from offline.config import TrainConfig
from rt_neds.bundle import BundleSpec, build_model, load_spec
from rt_neds.errors import BundleError
from rt_neds.model.linear import where_said
from rt_neds.model.neds import NEDS, SessionParts

SHARED = (
    "dim",
    "layers",
    "heads",
    "widen",
    "context",
    "attention",
    "tokens",
    "memory",
    "history",
    "linear",
)
"""Fields of the model that a bundle and its continuation must have in common."""


@torch.no_grad()
def begin_at_bundle(model: NEDS, folder: str | Path, config: TrainConfig) -> dict[str, list[str]]:
    """Give a network the trunk of a bundle, and the parts of the sessions they have in common.

    The trunk is everything that belongs to no session. Modalities are matched by name, so that
    behaviours may be added or left out. A session that the bundle does not know begins with the
    mean of the known sessions' embeddings and keeps its fresh read-in and read-out; or, where a
    linear decoder is heard, with what others make of that and a read-in that says nothing yet.

    Parameters
    ----------
    model : NEDS
        Changed in place.
    folder : path
        The bundle.
    config : TrainConfig

    Returns
    -------
    dict of str to list of str
        Sessions that the bundle knows, and the behaviours it knows of each.

    Raises
    ------
    BundleError
        If the bundle's network or bins are of another kind than the configuration's.
    """
    spec = load_spec(folder)
    _refuse_another_kind(spec, folder, config)
    known = build_model(folder, spec)
    own, theirs = dict(model.named_parameters()), dict(known.named_parameters())
    for name in trunk(model).keys() - {"linear_in.weight"}:  # whose columns are of behaviours
        if name in theirs and theirs[name].shape == own[name].shape:
            own[name].copy_(theirs[name])
    for m, name in enumerate(model.modalities):
        if name in known.modalities:
            model.modality_MD[m] = known.modality_MD[known.modalities.index(name)]
    if model.linear_in is not None and known.linear_in is not None:
        theirs_at = where_said(known.behaviours)
        for name, at in where_said(model.behaviours).items():
            if name in theirs_at:
                model.linear_in.weight[:, at] = known.linear_in.weight[:, theirs_at[name]]
    for x, session in enumerate(model.session_ids):
        if session in known.session_ids:
            model.session_XD[x] = known.session_XD[known.session_ids.index(session)]
            _take_parts(model.parts(session), known.parts(session))
        else:
            model.session_XD[x] = known.session_XD.mean(dim=0)
            _begin_like_others(model, session, known, spec)
    return {session.id: session.behaviours for session in spec.sessions}


def keep_scales(subjects: list[Subject], folder: str | Path, config: TrainConfig) -> None:
    """Give sessions that a bundle knows its scales: its read-outs are of the steps of those.

    A range that has grown since, with more minutes, would make other values of the same steps; what
    lies outside the bundle's counts as its ends.
    """
    known = {session.id: session for session in load_spec(folder).sessions}
    for subject in subjects:
        if of := known.get(subject.id):
            subject.scales = [
                of.scales[name] if name in of.behaviours else scale
                for name, scale in zip(config.behaviour, subject.scales, strict=True)
            ]


def refuse_other_units(folder: str | Path, units: Mapping[str, list[str]]) -> None:
    """A session that the bundle knows must still have the units it was trained on."""
    for session in load_spec(folder).sessions:
        if session.id in units and units[session.id] != session.units:
            raise BundleError(
                f"{folder} knows session {session.id} with {len(session.units)} units and it came "
                f"with {len(units[session.id])}, not the same; give the file another session id"
            )


def trunk(model: NEDS) -> dict[str, nn.Parameter]:
    """Parameters that belong to no one session, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith("sessions.") and name not in ("session_XD", "modality_MD")
    }


def _begin_like_others(model: NEDS, session: str, known: NEDS, spec: BundleSpec) -> None:
    """Read out of a new session's tokens what is read out of other sessions' in the mean."""
    parts = model.parts(session)
    if parts.linear is None:
        return
    for parameter in parts.spikes_in.linear.parameters():
        parameter.zero_()
    for name, head in parts.behaviour_out.items():
        theirs = [
            known.parts(other.id).behaviour_out[name].state_dict()
            for other in spec.sessions
            if name in other.behaviours
        ]
        for key, tensor in head.state_dict().items() if theirs else ():
            tensor.copy_(torch.stack([of[key] for of in theirs]).mean(dim=0))


def _take_parts(own: SessionParts, known: SessionParts) -> None:
    """Read-ins and read-outs that both have, of the same shape."""
    theirs = known.state_dict()
    for name, tensor in own.state_dict().items():
        if name in theirs and theirs[name].shape == tensor.shape:
            tensor.copy_(theirs[name])


def _refuse_another_kind(spec: BundleSpec, folder: str | Path, config: TrainConfig) -> None:
    for field in SHARED:
        came, wanted = getattr(spec.model, field), getattr(config.model, field)
        if came != wanted:
            raise BundleError(
                f"{folder} has model.{field} = {came} and the configuration {wanted}; "
                "fine-tuning keeps what it was pretrained with: change the configuration"
            )
    for known in spec.behaviours:
        wanted = config.behaviour.get(known.name)
        if wanted and (wanted.kind, tuple(wanted.classes)) != (known.kind, known.classes):
            came = f"{known.kind} {' '.join(known.classes)}".strip()
            raise BundleError(
                f"{folder} knows behaviour.{known.name} as {came} and the configuration as "
                f"{' '.join((wanted.kind, *wanted.classes))}; use that, or another name"
            )
    if spec.bin_ms != config.data.bin_ms:
        raise BundleError(
            f"{folder} was trained on bins of {spec.bin_ms} ms and the configuration says "
            f"{config.data.bin_ms}; set data.bin_ms = {spec.bin_ms}"
        )
