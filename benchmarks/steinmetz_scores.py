"""How well left is told from right: scores, their spread over sessions and seeds, intervals.

Shape suffixes: K trials, B bootstrap draws, R seeds, M sessions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rt_neds.result import machine

Scored = tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]
"""Sides of a session's test trials, and each method's scores of them, (R, K)."""

DRAWS = 2000
"""Times that test trials are drawn again for an interval."""

COMPARED = (
    *((name, "logistic") for name in ("majority", "contrasts", "rrr", "neds")),
    *((f"{name}_pretrained", alone) for name in ("rrr", "neds") for alone in ("logistic", name)),
    ("neds_full", "neds"),
)
"""Methods whose difference gets an interval: the first less the second."""


def balanced_accuracy(side_K: NDArray, score_K: NDArray, weight_BK: NDArray) -> NDArray[np.float64]:
    """Mean recall of both sides; ``weight_BK`` counts the trials; a score of 0 is half right."""
    right_K = 0.5 * (1.0 + np.sign(score_K) * side_K)
    with np.errstate(invalid="ignore"):
        recall = [
            (weight_BK[:, side_K == side] @ right_K[side_K == side])
            / weight_BK[:, side_K == side].sum(axis=1)
            for side in (-1.0, 1.0)
        ]
    return np.mean(recall, axis=0)


def auc(side_K: NDArray, score_K: NDArray, weight_BK: NDArray) -> NDArray[np.float64]:
    """Chance that a right trial scores above a left one, ties by half; weights as above."""
    left, right = side_K < 0, side_K > 0
    above = 0.5 * (1.0 + np.sign(score_K[right][:, None] - score_K[left][None, :]))
    pairs_B = np.einsum(
        "br,rl,bl->b", weight_BK[:, right], above, weight_BK[:, left], optimize=True
    )
    with np.errstate(invalid="ignore"):
        return pairs_B / (weight_BK[:, right].sum(axis=1) * weight_BK[:, left].sum(axis=1))


METRICS = {"balanced_accuracy": balanced_accuracy, "auc": auc}


def summarise(found: dict[str, list[Scored]]) -> dict[str, Any]:
    """Means and sds over sessions, seeds' and sessions' own, and intervals, all by protocol."""
    scores: dict[str, Any] = {}
    by_seed: dict[str, dict[str, list[float]]] = {}
    by_session: dict[str, dict[str, list[float]]] = {}
    differences: dict[str, dict[str, list[NDArray]]] = {}
    of_sessions: dict[str, dict[str, list[NDArray]]] = {}
    for protocol, scored in found.items():
        rng = np.random.default_rng(0)  # the same draws of the same trials in each protocol
        draws = [rng.multinomial(len(s), np.full(len(s), 1 / len(s)), DRAWS) for s, _ in scored]
        for label, metric in METRICS.items():
            place, drawn_B, mean_M = f"{protocol}/{label}", {}, {}
            for name in scored[0][1]:
                point_RM = np.stack([_points(metric, s, of[name]) for s, of in scored], axis=1)
                drawn_MB = [
                    np.mean([metric(s, score_K, w) for score_K in of[name]], axis=0)
                    for (s, of), w in zip(scored, draws, strict=True)
                ]
                drawn_B[name] = np.nanmean(drawn_MB, axis=0)
                mean_M[name] = point_RM.mean(axis=0)
                # Pooled trials have no sessions to spread over: their sd is the bootstrap's.
                sd = point_RM.mean(axis=0).std() if len(scored) > 1 else np.nanstd(drawn_B[name])
                entry = [round(float(point_RM.mean()), 4), round(float(sd), 4)]
                scores.setdefault(place, {})[name] = entry
                if len(point_RM) > 1:
                    each = point_RM.mean(axis=1).round(4).tolist()
                    by_seed.setdefault(place, {})[name] = each
                if len(scored) > 1:
                    each = point_RM.mean(axis=0).round(4).tolist()
                    by_session.setdefault(place, {})[name] = each
            kind, _, *labelled = protocol.split("/")
            for name, other in COMPARED:
                if name in drawn_B and other in drawn_B:
                    for key in (protocol, "/".join([kind, "mean", *labelled])):
                        of_key = differences.setdefault(f"{key}/{label}", {})
                        pair = f"{name} - {other}"
                        of_key.setdefault(pair, []).append(drawn_B[name] - drawn_B[other])
                        apart_M = of_sessions.setdefault(f"{key}/{label}", {})
                        apart_M.setdefault(pair, []).append(mean_M[name] - mean_M[other])
    return {
        **scores,
        "by_seed": by_seed,
        "by_session": by_session,
        "intervals": {key: _intervals(of) for key, of in differences.items()},
        "between_sessions": {key: _between(of) for key, of in of_sessions.items()},
    }


def _points(metric: Callable[..., NDArray], side_K: NDArray, score_RK: NDArray) -> NDArray:
    """A session's score with each seed."""
    every = np.ones((1, len(side_K)))
    return np.array([metric(side_K, score_K, every)[0] for score_K in score_RK])


def _intervals(differences: dict[str, list[NDArray]]) -> dict[str, list[float]]:
    """The middle 95 % of drawn differences, of their mean where there are several."""
    found = {}
    for pair, drawn in differences.items():
        between = np.nanpercentile(np.mean(drawn, axis=0), [2.5, 97.5])
        found[pair] = [round(float(end), 4) for end in between]
    return found


def _between(differences: dict[str, list[NDArray]]) -> dict[str, list[float]]:
    """Mean of the differences in each session, and its 95 % interval by Student's t."""
    found = {}
    for pair, of_M in differences.items():
        each_M = np.mean(of_M, axis=0)
        if len(each_M) > 1:
            half = stats.sem(each_M) * stats.t.ppf(0.975, len(each_M) - 1)
            mean = each_M.mean()
            found[pair] = [round(float(value), 4) for value in (mean, mean - half, mean + half)]
    return found


# -- files -----------------------------------------------------------------------------------------


DETAILS = ("by_seed", "by_session", "intervals", "between_sessions")
"""What stands beside the protocols."""


def beside_others(path: Path, scores: dict[str, Any]) -> dict[str, Any]:
    """Scores, beside those in a file of protocols that were not run now."""
    old = json.loads(path.read_text()) if path.is_file() else {}
    kept = {part: {**old.get(part, {}), **scores[part]} for part in DETAILS}
    return {**old, **scores, **kept, "machine": machine()}


IN_ALL = {"neds": "neds_causal", "neds_pretrained": "neds_causal_pretrained"}
"""What methods are called where those of all recordings stand."""


def among_all(path: Path, scores: dict[str, Any]) -> dict[str, Any]:
    """The file of all recordings' scores with ours in it: dataset, protocol, method, target."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    ours = results.setdefault("steinmetz", {})
    for place in [key for key in scores if key not in DETAILS]:
        protocol, metric = place.rsplit("/", 1)
        for method, (mean, _) in scores[place].items():
            each = scores["by_seed"].get(place, {}).get(method, [mean])
            entry = ours.setdefault(protocol, {}).setdefault(IN_ALL.get(method, method), {})
            entry |= {metric: [mean, round(float(np.std(each)), 4)], "seeds": len(each)}
    return results
