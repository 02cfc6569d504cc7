"""In which region is a unit, by what the network learned about it? And by what it must beat.

A unit's embedding is what the network has of its own: its columns of the spike read-in (one for
each width of the history), its row of the spike read-out, and the bias of that row. A linear
support vector machine that names the region from it says how far units of a region are alike to
the network (NEDS, arXiv 2504.08201, section 5).

Shape suffixes: N units of a session, U units of all sessions, E numbers of an embedding, K widths
of the history, D model width, R regions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from rt_neds.errors import SessionError
from rt_neds.model.neds import NEDS
from rt_neds.session import Session

FIELDS = ("region", "region_beryl")
"""Fields of ``units`` in which regions are looked for when none is named."""

NOWHERE = ("", "nan", "none", "unknown", "root", "void")
"""Labels, in lower case, that say no region."""

FOLDS = 5
LEAST_UNITS = 10
"""Units a region needs to be decoded: two in each fold."""

SHUFFLES = 5
PENALTY = 0.01
"""C of the support vector machine; embeddings have about as many numbers as there are units."""


def regions_of(session: Session, field: str | None = None) -> NDArray[np.str_] | None:
    """Region of each unit, ``""`` where it has none; None for a session that says nothing of it.

    Raises
    ------
    SessionError
        If a field of ``units`` is named that is not there, or has not one value for each unit.
    """
    if field is None:
        field = next((name for name in FIELDS if session.has(f"units.{name}")), None)
    if field is None:
        return None
    region_N = np.atleast_1d(session.column(f"units.{field}")).astype(str)
    if region_N.shape != (len(session.unit_ids),):
        raise SessionError(
            f"{session.path}: units.{field} has shape {region_N.shape} for "
            f"{len(session.unit_ids)} units; name a field with one region for each unit"
        )
    return np.array(["" if name.lower() in NOWHERE else name for name in region_N])


def unit_embeddings(model: NEDS, session: str) -> NDArray[np.float64]:
    """What the network has learned about each unit of a session, shape (N, K * D + D + 1)."""
    parts = model.parts(session)
    widths = len(parts.spikes_in.history)
    into_DKN = parts.spikes_in.linear.weight.detach().unflatten(1, (widths, parts.units))
    out = parts.spikes_out.linear
    columns = (
        into_DKN.permute(2, 1, 0).flatten(1),
        out.weight.detach(),
        out.bias.detach()[:, None],
    )
    return np.concatenate([column.cpu().double().numpy() for column in columns], axis=1)


def decode_regions(
    model: NEDS, region_of: Mapping[str, NDArray[np.str_]], *, shuffles: int = SHUFFLES
) -> dict[str, Any] | None:
    """Name each unit's region from its embedding, five-fold over the units of all sessions.

    Where a region was recorded in one session only, what tells the session tells the region too;
    for the floor, labels are therefore shuffled within each session.

    Parameters
    ----------
    model : NEDS
    region_of : mapping of str to ndarray
        Region of each unit, by session id.
    shuffles : int
        Times the labels are shuffled for the floor.

    Returns
    -------
    dict or None
        ``embedding``, ``rate`` (from the bias alone, which begins as the unit's mean log rate: what
        a region's firing rate gives away) and ``shuffled`` (the floor: mean over shuffles, and
        ``macro_f1_sd``, ``balanced_accuracy_sd``), each with ``macro_f1`` and
        ``balanced_accuracy``; ``units``; ``regions``: units by region; ``confusion``: rows the true
        region, columns the named one, in that order; ``left_out``: units of regions with too few.
        None with fewer than two regions that have enough.
    """
    if not region_of:
        return None
    embedding_UE = np.concatenate([unit_embeddings(model, name) for name in region_of])
    region_U = np.concatenate(list(region_of.values()))
    session_U = np.repeat(np.arange(len(region_of)), [len(r) for r in region_of.values()])
    count = {str(r): int(np.sum(region_U == r)) for r in np.unique(region_U[region_U != ""])}
    kept = [name for name, units in count.items() if units >= LEAST_UNITS]
    if len(kept) < 2:
        return None
    use_U = np.isin(region_U, kept)
    embedding_UE, region_U, session_U = embedding_UE[use_U], region_U[use_U], session_U[use_U]
    named_U = name_regions(embedding_UE, region_U)
    rng = np.random.default_rng(0)
    floors = []
    for _ in range(shuffles):
        shuffled_U = region_U.copy()
        for session in np.unique(session_U):
            shuffled_U[session_U == session] = rng.permutation(region_U[session_U == session])
        floors.append(_scores(shuffled_U, name_regions(embedding_UE, shuffled_U)))
    floor = {key: [scores[key] for scores in floors] for key in floors[0]}
    return {
        "embedding": _scores(region_U, named_U),
        "rate": _scores(region_U, name_regions(embedding_UE[:, -1:], region_U)),
        "shuffled": {key: float(np.mean(values)) for key, values in floor.items()}
        | {f"{key}_sd": float(np.std(values)) for key, values in floor.items()},
        "units": len(region_U),
        "regions": {name: count[name] for name in kept},
        "left_out": {name: units for name, units in count.items() if name not in kept},
        "confusion": confusion_matrix(region_U, named_U, labels=kept).tolist(),
    }


def name_regions(embedding_UE: NDArray[np.float64], region_U: NDArray[np.str_]) -> NDArray[np.str_]:
    """Region of each unit, named by a machine that was fitted on the other folds."""
    machine = make_pipeline(
        StandardScaler(), LinearSVC(C=PENALTY, class_weight="balanced", random_state=0)
    )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    return cross_val_predict(machine, embedding_UE, region_U, cv=folds)


def _scores(true_U: NDArray[np.str_], named_U: NDArray[np.str_]) -> dict[str, float]:
    return {
        "macro_f1": float(f1_score(true_U, named_U, average="macro")),
        "balanced_accuracy": float(balanced_accuracy_score(true_U, named_U)),
    }
