"""Scores, each as the field defines it, each beside what a trivial guess would get.

Shape suffixes: S scored bins, K trials, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import r2_score, roc_auc_score

TIME_STEPS = 10


def r2(true_S: NDArray, predicted_S: NDArray) -> float:
    """scikit-learn's coefficient of determination, flattened over time, unclipped."""
    return float(r2_score(true_S, predicted_S)) if len(true_S) > 1 else float("nan")


def mean_profile(
    train_S: NDArray, train_phase_S: NDArray, test_phase_S: NDArray
) -> NDArray[np.float64]:
    """Trial-mean profile of the training trials, read at the phase (bin in trial) of test bins.

    Where a phase never occurred in training, or there are no trials (phase -1), it is the mean.
    """
    overall = float(np.mean(train_S)) if len(train_S) else 0.0
    profile: dict[int, float] = {}
    for phase in np.unique(train_phase_S[train_phase_S >= 0]):
        profile[int(phase)] = float(train_S[train_phase_S == phase].mean())
    return np.array([profile.get(int(phase), overall) for phase in test_phase_S])


def gaussian_scores(
    true_S: NDArray, mean_S: NDArray, sd_S: NDArray | None, profile_S: NDArray
) -> dict:
    """R2, what the mean profile alone gets, and whether the stated sd can be believed.

    Parameters
    ----------
    true_S, mean_S : ndarray
        Physical units.
    sd_S : ndarray or None
        Stated standard deviation; None for methods that state none.
    profile_S : ndarray
        The trivial guess.

    Returns
    -------
    dict
        ``r2``, ``r2_profile``, ``gain``; with an sd also ``coverage_68``: the share of true values
        within one stated sd (0.68 if it is honest).
    """
    scores = {"r2": r2(true_S, mean_S), "r2_profile": r2(true_S, profile_S)}
    scores["gain"] = scores["r2"] - scores["r2_profile"]
    if sd_S is not None:
        scores["coverage_68"] = float(np.mean(np.abs(true_S - mean_S) <= sd_S))
    return scores


def categorical_scores(
    true_S: NDArray[np.int64], probability_SC: NDArray, trial_S: NDArray[np.int64]
) -> dict[str, Any]:
    """Decisions by trial, taken at its last scored bin, and how they grow with time in the trial.

    Parameters
    ----------
    true_S : ndarray of int
        Class number at each scored bin.
    probability_SC : ndarray
    trial_S : ndarray of int
        Trial of each bin.

    Returns
    -------
    dict
        ``balanced_accuracy``, ``auc`` (two classes), ``majority`` (its balanced accuracy is
        1 / classes by definition, so here the plain accuracy of always guessing it), ``accuracy``,
        ``trials``, ``balanced_accuracy_bins`` (all scored bins pooled), ``by_time``: balanced
        accuracy at tenths of the scored stretch, ``brier``.
    """
    order = np.argsort(trial_S, kind="stable")
    trials, first, length = np.unique(trial_S[order], return_index=True, return_counts=True)
    last = order[first + length - 1]
    truth, chance = true_S[last], np.bincount(true_S[last]).max() / len(trials)
    guess_S = probability_SC.argmax(axis=1)
    scores: dict[str, Any] = {
        "balanced_accuracy": _balanced(truth, guess_S[last]),
        "accuracy": float(np.mean(truth == guess_S[last])),
        "majority": float(chance),
        "auc": _auc(truth, probability_SC[last]),
        "trials": len(trials),
        "balanced_accuracy_bins": _balanced(true_S, guess_S),
        "brier": float(
            np.mean(np.sum((np.eye(probability_SC.shape[1])[true_S] - probability_SC) ** 2, axis=1))
        ),
    }
    steps = []
    for tenth in range(1, TIME_STEPS + 1):
        at = order[first + np.maximum(0, (length * tenth) // TIME_STEPS - 1)]
        steps.append(_balanced(true_S[at], guess_S[at]))
    scores["by_time"] = steps
    return scores


def _balanced(true: NDArray, guess: NDArray) -> float:
    """Mean recall over the classes that occur; a guess of one that never occurs is simply wrong."""
    return float(np.mean([np.mean(guess[true == c] == c) for c in np.unique(true)]))


def _auc(true: NDArray, probability_KC: NDArray) -> float | None:
    if probability_KC.shape[1] != 2 or len(np.unique(true)) < 2:
        return None
    return float(roc_auc_score(true, probability_KC[:, 1]))


def poisson_d2(count_S: NDArray, rate_S: NDArray) -> float:
    """Deviance explained by a Poisson rate, against the mean of the very data scored."""
    count_S, rate_S = np.asarray(count_S, float), np.maximum(np.asarray(rate_S, float), 1e-9)

    def deviance(rate: NDArray) -> float:
        log_ratio = np.log(np.maximum(count_S, 1e-300) / rate)
        return float(np.sum(np.where(count_S > 0, count_S * log_ratio, 0.0) - (count_S - rate)))

    null = deviance(np.full_like(count_S, max(count_S.mean(), 1e-9)))
    return 1.0 - deviance(rate_S) / null if null > 0 else float("nan")


def bits_per_spike(count_TN: NDArray, rate_TN: NDArray) -> dict[str, float]:
    """Poisson bits per spike over each unit's mean rate (Neural Latents Benchmark's definition).

    Parameters
    ----------
    count_TN, rate_TN : ndarray
        Counts, and predicted counts, of the scored bins.

    Returns
    -------
    dict
        ``mean50``: mean over units with at least 50 spikes (the one to compare), ``pooled``: all
        units' likelihood over all their spikes, ``mean``: unweighted mean over units that spiked.
    """
    rate = np.maximum(np.where(np.isfinite(rate_TN), rate_TN, 1e-9), 1e-9)
    null = np.maximum(count_TN.mean(axis=0), 1e-9)
    spikes_N = count_TN.sum(axis=0)
    gain_N = np.sum(count_TN * (np.log(rate) - np.log(null)) - (rate - null), axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        bits_N = gain_N / (spikes_N * np.log(2))
    fired, often = spikes_N > 0, spikes_N >= 50
    return {
        "mean50": float(bits_N[often].mean()) if often.any() else float("nan"),
        "pooled": float(gain_N.sum() / (max(spikes_N.sum(), 1) * np.log(2))),
        "mean": float(bits_N[fired].mean()) if fired.any() else float("nan"),
    }
