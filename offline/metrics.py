"""Scores, each as the field defines it, each beside what a trivial guess would get.

Shape suffixes: S scored bins, K trials, C classes, T bins, N units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import r2_score, roc_auc_score

TIME_STEPS = 10
"""Parts of a trial by which scores against time are given."""

COVERAGE = {"50": 0.674490, "68": 1.0, "90": 1.644854, "95": 1.959964}
"""Per cent of a gaussian, and the sds around its mean that hold them."""

CONFIDENCE_BINS = 10
"""Equal parts of 0 to 1 by which stated and true chances are compared."""

LEAST_SPIKES = 50
"""Spikes a unit needs for its bits per spike to count in ``mean50``."""


def is_constant(true_S: NDArray) -> bool:
    """Whether there is no variance, or deviance, of which a share could be explained."""
    return len(true_S) == 0 or bool(np.min(true_S) == np.max(true_S))


def r2(true_S: NDArray, predicted_S: NDArray) -> float:
    """scikit-learn's coefficient of determination, flattened over time, unclipped.

    NaN of what is constant.
    """
    return float("nan") if is_constant(true_S) else float(r2_score(true_S, predicted_S))


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
    true_S: NDArray,
    mean_S: NDArray,
    sd_S: NDArray | None,
    profile_S: NDArray,
    *,
    profile_sd: float | None = None,
    tenth_S: NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """R2, what the mean profile alone gets, and whether the stated sd can be believed.

    Parameters
    ----------
    true_S, mean_S : ndarray
        Physical units.
    sd_S : ndarray or None
        Stated standard deviation; None for methods that state none.
    profile_S : ndarray
        The trivial guess.
    profile_sd : float, optional
        Sd of the training bins about it.
    tenth_S : ndarray of int, optional
        Tenth of its trial in which a bin lies, 0 to 9; -1 outside trials.

    Returns
    -------
    dict
        ``r2``, ``r2_profile``, ``gain``; ``error_by_time`` and ``error_by_time_profile``: mean
        squared error in each tenth of the trials, over the variance of all scored bins (a quiet
        moment has hardly a variance of its own to divide by); None without trials.
        With an sd also ``coverage_50``, ``_68``, ``_90``, ``_95``: the share of true values within
        the interval that states so many per cent; ``error_over_sd``: root mean square of the
        error over its stated sd, 1 if the sd is right, even where errors are not gaussian and the
        coverage is another; ``nll`` and ``nll_profile``: nats per bin of the stated gaussian, and
        of the profile with its training sd.
    """
    scores: dict[str, Any] = {"r2": r2(true_S, mean_S), "r2_profile": r2(true_S, profile_S)}
    scores["gain"] = scores["r2"] - scores["r2_profile"]
    if sd_S is not None:
        sd_S = np.asarray(sd_S, np.float64)
        for percent, width in COVERAGE.items():
            inside = np.abs(true_S - mean_S) <= width * sd_S
            scores[f"coverage_{percent}"] = float(np.mean(inside))
        over_S = (true_S - mean_S) / np.maximum(sd_S, 1e-12)
        scores["error_over_sd"] = float(np.sqrt(np.mean(over_S**2)))
        scores["nll"] = gaussian_nll(true_S, mean_S, sd_S)
        if profile_sd is not None:
            scores["nll_profile"] = gaussian_nll(true_S, profile_S, profile_sd)
    for key, guess_S in (("error_by_time", mean_S), ("error_by_time_profile", profile_S)):
        scores[key] = None
        if tenth_S is not None and (tenth_S >= 0).any():
            scores[key] = error_by_time(true_S, guess_S, tenth_S)
    return scores


def error_by_time(true_S: NDArray, guess_S: NDArray, tenth_S: NDArray[np.int64]) -> list[float]:
    """Mean squared error in each tenth, over the variance of all bins; NaN where there is none."""
    error_S = (true_S - guess_S) ** 2 / max(float(np.var(true_S)), 1e-300)
    tenths = [error_S[tenth_S == tenth] for tenth in range(TIME_STEPS)]
    return [float(e.mean()) if len(e) else float("nan") for e in tenths]


def gaussian_nll(true_S: NDArray, mean_S: NDArray, sd_S: NDArray | float) -> float:
    """Mean negative log-likelihood, in nats per bin; the unit of the values shifts it."""
    sd_S = np.maximum(sd_S, 1e-12)
    return float(
        np.mean(0.5 * np.log(2 * np.pi) + np.log(sd_S) + 0.5 * ((true_S - mean_S) / sd_S) ** 2)
    )


def reliability(
    true_S: NDArray[np.int64], probability_SC: NDArray
) -> tuple[float, dict[str, list[float]]]:
    """Is what is said with 80 % right 80 % of the time?

    Parameters
    ----------
    true_S : ndarray of int
        Class number at each scored bin.
    probability_SC : ndarray

    Returns
    -------
    float
        Expected calibration error: mean gap between the probability of the likeliest class and how
        often it is the true one, over ten equal parts of that probability, weighed by their bins.
    dict
        ``stated``, ``true`` and ``bins`` of each part that occurs.
    """
    stated_S = probability_SC.max(axis=1).astype(np.float64)
    right_S = probability_SC.argmax(axis=1) == true_S
    part_S = np.minimum((stated_S * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    count = np.bincount(part_S, minlength=CONFIDENCE_BINS)
    kept = count > 0
    stated = np.bincount(part_S, stated_S, CONFIDENCE_BINS)[kept] / count[kept]
    true = np.bincount(part_S, right_S, CONFIDENCE_BINS)[kept] / count[kept]
    error = float(np.sum(count[kept] * np.abs(stated - true)) / len(true_S))
    return error, {"stated": stated.tolist(), "true": true.tolist(), "bins": count[kept].tolist()}


def categorical_scores(
    true_S: NDArray[np.int64], probability_SC: NDArray, trial_S: NDArray[np.int64]
) -> dict[str, Any]:
    """Decisions by trial, taken at its last scored bin, and how they grow with time in the trial.

    Outside trials each bin is decided by itself.

    Parameters
    ----------
    true_S : ndarray of int
        Class number at each scored bin.
    probability_SC : ndarray
    trial_S : ndarray of int
        Trial of each bin; -1 for none.

    Returns
    -------
    dict
        ``balanced_accuracy``, ``chance`` (its floor: one over the classes that occur),
        ``accuracy``, ``majority`` (its floor: always the commonest class), ``auc`` (two classes),
        ``trials``, ``balanced_accuracy_bins`` (all scored bins pooled), ``by_time``: balanced
        accuracy at tenths of the scored stretch (None without trials), ``brier``, ``ece`` and
        ``reliability`` (all scored bins: :func:`reliability`).
    """
    alone_S = trial_S < 0
    trial_S = np.where(alone_S, trial_S.max() + 1 + np.arange(len(trial_S)), trial_S)
    order = np.argsort(trial_S, kind="stable")
    trials, first, length = np.unique(trial_S[order], return_index=True, return_counts=True)
    last = order[first + length - 1]
    truth, commonest = true_S[last], np.bincount(true_S[last]).max() / len(trials)
    guess_S = probability_SC.argmax(axis=1)
    scores: dict[str, Any] = {
        "balanced_accuracy": _balanced(truth, guess_S[last]),
        "accuracy": float(np.mean(truth == guess_S[last])),
        "majority": float(commonest),
        "chance": 1.0 / len(np.unique(truth)),
        "auc": _auc(truth, probability_SC[last]),
        "trials": len(trials) - int(alone_S.sum()),
        "balanced_accuracy_bins": _balanced(true_S, guess_S),
        "brier": float(
            np.mean(np.sum((np.eye(probability_SC.shape[1])[true_S] - probability_SC) ** 2, axis=1))
        ),
    }
    steps = []
    for tenth in range(1, TIME_STEPS + 1):
        at = order[first + np.maximum(0, (length * tenth) // TIME_STEPS - 1)]
        steps.append(_balanced(true_S[at], guess_S[at]))
    scores["by_time"] = steps if scores["trials"] else None
    scores["ece"], scores["reliability"] = reliability(true_S, probability_SC)
    return scores


def _balanced(true: NDArray, guess: NDArray) -> float:
    """Mean recall over the classes that occur; a guess of one that never occurs is simply wrong."""
    return float(np.mean([np.mean(guess[true == c] == c) for c in np.unique(true)]))


def _auc(true: NDArray, probability_KC: NDArray) -> float | None:
    if probability_KC.shape[1] != 2 or len(np.unique(true)) < 2:
        return None
    return float(roc_auc_score(true, probability_KC[:, 1]))


def poisson_d2(count_S: NDArray, rate_S: NDArray) -> float:
    """Deviance explained by a Poisson rate, against the mean of the very data scored.

    NaN of constant counts, such as none at all.
    """
    if is_constant(count_S):
        return float("nan")
    count_S, rate_S = np.asarray(count_S, float), np.maximum(np.asarray(rate_S, float), 1e-9)

    def deviance(rate: NDArray) -> float:
        log_ratio = np.log(np.maximum(count_S, 1e-300) / rate)
        return float(np.sum(np.where(count_S > 0, count_S * log_ratio, 0.0) - (count_S - rate)))

    return 1.0 - deviance(rate_S) / deviance(np.full_like(count_S, count_S.mean()))


def bits_of_units(
    count_TN: NDArray, rate_TN: NDArray
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Poisson log-likelihood gained over each unit's mean rate in these bins, in bits.

    Parameters
    ----------
    count_TN, rate_TN : ndarray
        Counts, and predicted counts, of the scored bins.

    Returns
    -------
    gain_N : ndarray
        Bits; over the unit's spikes they are its bits per spike.
    spikes_N : ndarray
    """
    rate = np.maximum(rate_TN, 1e-9).astype(np.float64)
    null = np.maximum(count_TN.mean(axis=0, dtype=np.float64), 1e-9)
    gain_N = np.sum(count_TN * (np.log(rate) - np.log(null)) - (rate - null), axis=0)
    return gain_N / np.log(2), count_TN.sum(axis=0, dtype=np.float64)


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
    gain_N, spikes_N = bits_of_units(count_TN, rate_TN)
    with np.errstate(invalid="ignore", divide="ignore"):
        bits_N = gain_N / spikes_N
    fired, often = spikes_N > 0, spikes_N >= LEAST_SPIKES
    return {
        "mean50": float(bits_N[often].mean()) if often.any() else float("nan"),
        "pooled": float(gain_N.sum() / max(spikes_N.sum(), 1)),
        "mean": float(bits_N[fired].mean()) if fired.any() else float("nan"),
    }
