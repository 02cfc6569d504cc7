"""Scores equal independent ways to compute them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, d2_tweedie_score, r2_score, roc_auc_score

from offline.metrics import (
    bits_of_units,
    bits_per_spike,
    categorical_scores,
    error_by_time,
    gaussian_scores,
    mean_profile,
    poisson_d2,
    r2,
    reliability,
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


def test_bits_of_each_unit_against_the_written_formula():
    rng = np.random.default_rng(5)
    rates = rng.uniform(0.05, 0.6, size=(300, 3)).astype(np.float32)
    counts = rng.poisson(rates).astype(np.float32)
    gain, spikes = bits_of_units(counts, rates)
    columns = zip(counts.T.tolist(), rates.T.tolist(), strict=True)
    expected = [bits_per_spike_of_unit(k, r) for k, r in columns]
    np.testing.assert_allclose(gain / spikes, expected, rtol=1e-6)
    assert bits_per_spike(counts, rates)["pooled"] == pytest.approx(gain.sum() / counts.sum())


def test_fifty_spikes_are_enough_for_a_score():
    counts = np.zeros((200, 2))
    counts[:49, 0] = counts[:50, 1] = 1
    rates = np.where(counts > 0, 0.8, [0.01, 0.2])
    only = bits_per_spike_of_unit(counts[:, 1], rates[:, 1])
    assert bits_per_spike(counts, rates)["mean50"] == pytest.approx(only)
    rates[7, 1] = np.nan  # what was not predicted has no score, rather than a bad one
    assert np.isnan(bits_per_spike(counts, rates)["mean50"])


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
    assert scores["error_over_sd"] == pytest.approx(np.sqrt(np.mean(noise**2)))


def test_the_stated_sd_against_scipy():
    rng = np.random.default_rng(4)
    true, mean, sd = rng.normal(size=400), rng.normal(size=400), rng.uniform(0.2, 2, size=400)
    scores = gaussian_scores(true, mean, sd, np.full(400, 0.3), profile_sd=1.5)
    for percent, level in (("50", 0.5), ("68", 0.6827), ("90", 0.9), ("95", 0.95)):
        low, high = norm.interval(level, mean, sd)
        assert scores[f"coverage_{percent}"] == np.mean((low <= true) & (true <= high))
    assert scores["nll"] == pytest.approx(-norm.logpdf(true, mean, sd).mean())
    assert scores["nll_profile"] == pytest.approx(-norm.logpdf(true, 0.3, 1.5).mean())


def test_error_over_time_in_trial():
    true, guess = np.array([0.0, 4.0, 0.0, 4.0]), np.array([1.0, 4.0, 3.0, 0.0])
    came = error_by_time(true, guess, np.array([0, 9, 0, -1]))
    assert came[0] == (1 + 9) / 2 / 4  # the variance of all four is 4
    assert came[9] == 0
    assert np.isnan(came[1:9]).all()
    tenth, profile = np.array([0, 9, 0, -1]), np.array([2.0, 0.0, 2.0, 0.0])
    scores = gaussian_scores(true, guess, None, profile, tenth_S=tenth)
    np.testing.assert_equal(scores["error_by_time"], came)
    np.testing.assert_equal(scores["error_by_time_profile"], [1.0, *[np.nan] * 8, 4.0])
    nowhere = gaussian_scores(true, guess, None, true, tenth_S=np.full(4, -1))
    assert nowhere["error_by_time"] is None
    assert nowhere["error_by_time_profile"] is None


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), classes=st.integers(2, 4), bins=st.integers(5, 400))
def test_reliability_against_scikit_learn(seed, classes, bins):
    rng = np.random.default_rng(seed)
    probability = rng.dirichlet(np.ones(classes), size=bins)
    true = rng.integers(0, classes, bins)
    error, parts = reliability(true, probability)
    stated, right = probability.max(axis=1), probability.argmax(axis=1) == true
    expected_true, expected_stated = calibration_curve(right, stated, n_bins=10)
    np.testing.assert_allclose(parts["true"], expected_true)
    np.testing.assert_allclose(parts["stated"], expected_stated)
    assert sum(parts["bins"]) == bins
    share = np.array(parts["bins"]) / bins
    assert error == pytest.approx(np.sum(share * np.abs(expected_true - expected_stated)))


def test_who_is_always_sure_and_right_half_the_time_is_off_by_half():
    error, parts = reliability(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert error == 0.5
    assert parts == {"stated": [1.0], "true": [0.5], "bins": [2]}
    # Who is quite sure is in one part with who has no doubt.
    error, parts = reliability(np.array([0, 1]), np.array([[1.0, 0.0], [0.9375, 0.0625]]))
    assert (error, parts["bins"]) == (0.96875 - 0.5, [2])


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
    assert scores["chance"] == 0.5
    assert len(scores["by_time"]) == 10
    assert scores["by_time"][-1] == scores["balanced_accuracy"]
    guess = probability.argmax(axis=1)
    assert scores["balanced_accuracy_bins"] == balanced_accuracy_score(truth, guess)


def test_outside_trials_each_bin_is_decided_by_itself():
    rng = np.random.default_rng(0)
    truth, probability = rng.integers(0, 3, 200), rng.dirichlet(np.ones(3), 200)
    scores = categorical_scores(truth, probability, np.full(200, -1))
    guess = probability.argmax(axis=1)
    assert scores["balanced_accuracy"] == balanced_accuracy_score(truth, guess)
    assert scores["accuracy"] == np.mean(truth == guess)
    assert scores["majority"] == np.bincount(truth).max() / 200
    assert (scores["trials"], scores["by_time"]) == (0, None)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 9999), bins=st.integers(2, 90), classes=st.integers(2, 4))
def test_decisions_against_their_definitions_trial_by_trial(seed, bins, classes):
    rng = np.random.default_rng(seed)
    trial, side = rng.integers(-1, 5, bins), rng.integers(0, classes, 5)
    true = np.where(trial < 0, rng.integers(0, classes, bins), side[trial])
    probability = rng.dirichlet(np.ones(classes), bins)
    guess = probability.argmax(axis=1)
    whole = [np.flatnonzero(trial == k) for k in range(5) if (trial == k).any()]
    cases = whole + [np.array([s]) for s in np.flatnonzero(trial < 0)]

    def balanced(at):
        recalls = [[guess[s] == true[s] for s in at if true[s] == c] for c in set(true[at])]
        return np.mean([np.mean(recall) for recall in recalls])

    scores = categorical_scores(true, probability, trial)
    last = [case[-1] for case in cases]
    assert scores["trials"] == len(whole)
    assert scores["accuracy"] == pytest.approx(np.mean(guess[last] == true[last]))
    assert scores["majority"] == pytest.approx(np.bincount(true[last]).max() / len(cases))
    assert scores["chance"] == 1 / len(set(true[last]))
    assert scores["balanced_accuracy"] == pytest.approx(balanced(last))
    off = [probability[s] - (np.arange(classes) == true[s]) for s in range(bins)]
    assert scores["brier"] == pytest.approx(np.mean([(of**2).sum() for of in off]))
    for tenth, score in enumerate(scores["by_time"] or (), start=1):
        # The last bin that has ended by then, or the first.
        ended = [[s for n, s in enumerate(c, 1) if 10 * n <= len(c) * tenth] for c in cases]
        at = [done[-1] if done else c[0] for c, done in zip(cases, ended, strict=True)]
        assert score == pytest.approx(balanced(at))


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


@pytest.mark.parametrize("constant", [0.0, 0.1, 3.0])
def test_of_what_does_not_change_nothing_can_be_explained(constant):
    true = np.full(300, constant, np.float32)
    for guess in (true, np.full(300, 0.2, np.float32), np.linspace(0.0, 1.0, 300)):
        assert np.isnan(r2(true, guess))
        assert np.isnan(poisson_d2(true, guess))
    assert np.isnan(r2(true[:0], true[:0]))
