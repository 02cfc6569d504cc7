"""Scores equal independent ways to compute them."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, d2_tweedie_score, r2_score, roc_auc_score

from offline.metrics import (
    bits_per_spike,
    categorical_scores,
    gaussian_scores,
    mean_profile,
    poisson_d2,
)
from tests.naive import bits_per_spike_of_unit


def test_bits_per_spike_against_the_written_formula():
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.05, 0.6, size=(400, 5))
    counts = rng.poisson(rates)
    counts[:, 3] = 0
    counts[:, 4] = 0
    counts[:10, 4] = 1
    scores = bits_per_spike(counts, rates)
    by_unit = [bits_per_spike_of_unit(counts[:, n], rates[:, n]) for n in (0, 1, 2, 4)]
    assert scores["mean"] == pytest.approx(np.mean(by_unit), rel=1e-9)
    assert scores["mean50"] == pytest.approx(np.mean(by_unit[:3]), rel=1e-9)


def test_the_null_scores_zero_and_the_truth_more():
    rng = np.random.default_rng(1)
    rates = np.exp(rng.normal(-1.5, 0.8, size=(3000, 4)))
    counts = rng.poisson(rates)
    null = bits_per_spike(counts, np.broadcast_to(counts.mean(axis=0), counts.shape))
    assert null["mean50"] == pytest.approx(0, abs=1e-9)
    assert bits_per_spike(counts, rates)["mean50"] > 0.1


def test_gaussian_scores():
    rng = np.random.default_rng(2)
    true, noise = rng.normal(size=5000), rng.normal(size=5000)
    scores = gaussian_scores(true, true + 0.5 * noise, np.full(5000, 0.5), np.zeros(5000))
    assert scores["r2"] == pytest.approx(r2_score(true, true + 0.5 * noise))
    assert scores["gain"] == pytest.approx(scores["r2"] - r2_score(true, np.zeros(5000)))
    assert scores["coverage_68"] == pytest.approx(0.683, abs=0.02)


def test_mean_profile_reads_only_the_clock():
    values, phases = np.array([1.0, 3.0, 5.0, 7.0, 100.0]), np.array([0, 1, 0, 1, -1])
    profile = mean_profile(values, phases, np.array([0, 1, 5, -1]))
    assert profile.tolist() == [3.0, 5.0, values.mean(), values.mean()]


def test_trials_are_decided_at_their_last_bin():
    truth = np.repeat([0, 1, 1, 0], 10)
    trial = np.repeat([5, 2, 9, 7], 10)
    right = np.concatenate([np.linspace(0.6, 0.1, 10), np.linspace(0.4, 0.9, 10),
                            np.linspace(0.4, 0.3, 10), np.linspace(0.5, 0.2, 10)])  # fmt: skip
    probability = np.stack([1 - right, right], axis=1)
    scores = categorical_scores(truth, probability, trial)
    assert scores["trials"] == 4
    assert scores["balanced_accuracy"] == balanced_accuracy_score([0, 1, 1, 0], [0, 1, 0, 0])
    assert scores["auc"] == roc_auc_score([0, 1, 1, 0], [0.1, 0.9, 0.3, 0.2])
    assert scores["majority"] == 0.5
    assert len(scores["by_time"]) == 10
    assert scores["by_time"][-1] == scores["balanced_accuracy"]
    guess = probability.argmax(axis=1)
    assert scores["balanced_accuracy_bins"] == balanced_accuracy_score(truth, guess)


def test_a_class_that_never_occurs_is_simply_wrong():
    scores = categorical_scores(
        np.array([0, 0]), np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([0, 1])
    )
    assert scores["balanced_accuracy"] == 0.5
    assert scores["auc"] is None


def test_poisson_d2_against_scikit_learn():
    rng = np.random.default_rng(3)
    rates = rng.uniform(0.1, 3.0, 500)
    counts = rng.poisson(rates)
    assert poisson_d2(counts, rates) == pytest.approx(d2_tweedie_score(counts, rates, power=1))
