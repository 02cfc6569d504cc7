"""Ridge and logistic baselines: they find a lagged code, and see no future and no test label."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from offline.baselines import linear
from offline.baselines.linear import logistic, ridge
from offline.metrics import r2
from rt_neds.errors import ConfigError
from tests.baselines.making import binned_session

LAG = 5


@pytest.fixture
def counts_TN() -> NDArray[np.int64]:
    return np.random.default_rng(0).poisson(1.0, size=(2000, 12))


@pytest.fixture
def speed_T(counts_TN: NDArray[np.int64]) -> NDArray[np.float64]:
    """What units 0 and 1 did in the last five bins, in units far from 1, and some noise."""
    recent_TN = np.stack([np.convolve(c, np.ones(LAG))[: len(c)] for c in counts_TN.T], axis=1)
    root_TN = np.sqrt(recent_TN)
    noise_T = np.random.default_rng(1).normal(size=len(counts_TN))
    return 500.0 + 20.0 * (root_TN[:, 0] - root_TN[:, 1]) + 5.0 * noise_T


@pytest.fixture
def side_T(speed_T: NDArray[np.float64]) -> NDArray[np.float64]:
    return (speed_T > 500.0).astype(float)


def test_ridge_finds_a_lagged_code(counts_TN: NDArray, speed_T: NDArray) -> None:
    binned = binned_session(counts_TN, speed_T)
    test = np.flatnonzero(binned.of_split("test"))
    assert r2(speed_T[test], ridge(binned, "speed", test)) > 0.85


def test_ridge_cannot_do_without_the_history(counts_TN: NDArray, speed_T: NDArray) -> None:
    binned = binned_session(counts_TN, np.roll(speed_T, 20))
    test = np.flatnonzero(binned.of_split("test"))
    assert r2(binned.values_TM[test, 1], ridge(binned, "speed", test, history_s=0.1)) < 0.1


def test_ridge_equals_a_plain_one(counts_TN: NDArray, speed_T: NDArray) -> None:
    """Blocks, floors and normal equations change nothing."""
    binned = binned_session(counts_TN, speed_T)
    widths = (1, 2, 5, 10, 25, 50)
    total_TN = np.concatenate([np.zeros((50, 12)), counts_TN]).cumsum(axis=0)
    total_TN = np.concatenate([np.zeros((1, 12)), total_TN])
    sums = [total_TN[51:] - total_TN[51 - k : len(total_TN) - k] for k in widths]
    x_TF = np.sqrt(np.concatenate(sums, axis=1))
    z_TF = (x_TF - x_TF[:1200].mean(axis=0)) / np.sqrt(x_TF[:1200].var(axis=0).mean())
    offset = speed_T[:1200].mean()
    gram_FF = z_TF[:1200].T @ z_TF[:1200] + 0.1 * 1200 * np.eye(z_TF.shape[1])
    expected_T = z_TF @ np.linalg.solve(gram_FF, z_TF[:1200].T @ (speed_T[:1200] - offset)) + offset
    np.testing.assert_allclose(
        ridge(binned, "speed", np.arange(2000), alphas=(0.1,)), expected_T, atol=0.05
    )


def test_without_validation_all_of_training_is_fitted_in_the_end(
    counts_TN: NDArray, speed_T: NDArray
) -> None:
    last = np.arange(1500, 1600)  # of training's 1600 bins once validation is joined to it
    changed_T = speed_T.copy()
    changed_T[last] += 300.0
    guesses = []
    for values_T in (speed_T, changed_T):
        binned = binned_session(counts_TN, values_T)
        binned.split_T[binned.of_split("val")] = 0
        test = np.flatnonzero(binned.of_split("test"))
        guesses.append(ridge(binned, "speed", test, alphas=(0.1,)))
    assert (
        np.abs(guesses[1] - guesses[0]).max() > 10.0
    )  # the last fifth chose among one; it is fitted
    binned = binned_session(counts_TN, changed_T)
    apart = binned_session(counts_TN, speed_T)
    val = np.flatnonzero(binned.of_split("val"))
    assert np.isin(val, last).any()
    np.testing.assert_allclose(
        ridge(binned, "speed", test, alphas=(0.1,)), ridge(apart, "speed", test, alphas=(0.1,))
    )


def test_block_size_and_order_of_bins_change_nothing(
    counts_TN: NDArray, speed_T: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    binned = binned_session(counts_TN, speed_T)
    bins = np.random.default_rng(2).permutation(2000)[:100]
    whole_T = ridge(binned, "speed", np.arange(2000))
    monkeypatch.setattr(linear, "BLOCK", 70)
    np.testing.assert_allclose(ridge(binned, "speed", bins), whole_T[bins], atol=0.05)


@pytest.mark.parametrize("method", [ridge, logistic])
def test_no_future_spike_is_used(
    method, counts_TN: NDArray, speed_T: NDArray, side_T: NDArray
) -> None:
    value_T = speed_T if method is ridge else side_T
    now = 1700
    later_TN = counts_TN.copy()
    later_TN[now + 1 :] = np.random.default_rng(3).poisson(5.0, size=later_TN[now + 1 :].shape)
    asked = np.arange(1600, now + 1)
    before = method(binned_session(counts_TN, value_T), "speed", asked)
    after = method(binned_session(later_TN, value_T), "speed", asked)
    np.testing.assert_array_equal(before, after)
    later_TN[now] += 5
    assert not np.array_equal(method(binned_session(later_TN, value_T), "speed", asked), after)


@pytest.mark.parametrize("method", [ridge, logistic])
def test_test_labels_are_never_read(
    method, counts_TN: NDArray, speed_T: NDArray, side_T: NDArray
) -> None:
    value_T = speed_T if method is ridge else side_T
    binned = binned_session(counts_TN, value_T)
    poked = binned_session(counts_TN, np.where(binned.of_split("test"), value_T[::-1], value_T))
    asked = np.arange(1500, 2000)
    np.testing.assert_array_equal(method(binned, "speed", asked), method(poked, "speed", asked))


@pytest.mark.parametrize(("noise", "best"), [(0.0, 0), (80.0, 1)])
def test_alpha_is_the_best_on_validation(
    counts_TN: NDArray, speed_T: NDArray, noise: float, best: int
) -> None:
    speed_T = speed_T + noise * np.random.default_rng(4).normal(size=len(speed_T))
    binned = binned_session(counts_TN, speed_T)
    val, alphas = np.flatnonzero(binned.of_split("val")), (1e-4, 1.0, 1e4)
    each = [r2(speed_T[val], ridge(binned, "speed", val, alphas=(a,))) for a in alphas]
    chosen = r2(speed_T[val], ridge(binned, "speed", val, alphas=alphas))
    assert chosen == pytest.approx(max(each))
    assert np.argmax(each) == best


def test_a_penalty_is_by_bin_however_many_are_fitted(counts_TN: NDArray, speed_T: NDArray) -> None:
    apart, joined = (binned_session(counts_TN, speed_T) for _ in range(2))
    joined.split_T[joined.of_split("val")] = 0
    few, all_ = (ridge(b, "speed", np.arange(2000), alphas=(10.0,)) for b in (apart, joined))
    assert all_.std() == pytest.approx(few.std(), rel=0.1)


def test_of_penalties_that_do_as_well_the_strongest_is_taken(counts_TN: NDArray) -> None:
    side_T = (np.random.default_rng(5).random(2000) < 0.5).astype(float)
    counts_TN = counts_TN.copy()
    counts_TN[:, 0] = 40 * side_T  # seen by any
    probability_TC = logistic(binned_session(counts_TN, side_T), "speed", np.arange(1600, 2000))
    assert (probability_TC.argmax(axis=1) == side_T[1600:]).all()
    assert probability_TC.max() < 0.95


def test_only_scored_training_bins_are_fitted(counts_TN: NDArray, speed_T: NDArray) -> None:
    binned = binned_session(counts_TN, speed_T)
    binned.scored_TM[:600, 1] = False
    expected_T = ridge(binned, "speed", np.arange(2000))
    binned.values_TM[:600, 1] = np.nan
    np.testing.assert_array_equal(ridge(binned, "speed", np.arange(2000)), expected_T)


def test_unobserved_bins_count_as_empty(counts_TN: NDArray, speed_T: NDArray) -> None:
    hole = slice(1700, 1720)
    holed_TN = counts_TN.copy()
    holed_TN[hole] = 0
    binned, holed = binned_session(counts_TN, speed_T), binned_session(holed_TN, speed_T)
    binned.shown_TM[hole, 0] = False
    asked = np.arange(1600, 1800)
    np.testing.assert_array_equal(ridge(binned, "speed", asked), ridge(holed, "speed", asked))


def test_logistic_finds_a_lagged_code(counts_TN: NDArray, side_T: NDArray) -> None:
    binned = binned_session(counts_TN, side_T, "choice")
    test = np.flatnonzero(binned.of_split("test"))
    probability_TC = logistic(binned, "choice", test)
    assert probability_TC.shape == (len(test), 2)
    np.testing.assert_allclose(probability_TC.sum(axis=1), 1.0)
    assert np.mean(probability_TC.argmax(axis=1) == side_T[test]) > 0.85


@pytest.mark.parametrize("never", [0, 1, 2])
def test_logistic_of_three_classes_one_of_them_never_trained(
    counts_TN: NDArray, side_T: NDArray, never: int
) -> None:
    trained = [c for c in range(3) if c != never]
    value_T = np.array(trained)[side_T.astype(int)]
    value_T[1700:1710] = never
    binned = binned_session(counts_TN, value_T, "choice")
    for classes in (None, 3) if never == 2 else (3,):
        probability_TC = logistic(binned, "choice", np.arange(1600), classes=classes)
        assert probability_TC.shape == (1600, 3)
        assert (probability_TC[:, never] == 0).all()
        assert np.mean(probability_TC.argmax(axis=1) == value_T[:1600]) > 0.8


def test_logistic_of_a_single_class_is_certain(counts_TN: NDArray, side_T: NDArray) -> None:
    binned = binned_session(counts_TN, np.where(np.arange(2000) < 1200, 1.0, side_T), "choice")
    probability_TC = logistic(binned, "choice", np.array([1900, 1500]))
    np.testing.assert_array_equal(probability_TC, [[0.0, 1.0], [0.0, 1.0]])


@pytest.mark.parametrize("method", [ridge, logistic])
def test_without_validation_the_end_of_training_chooses(
    method, counts_TN: NDArray, speed_T: NDArray, side_T: NDArray
) -> None:
    value_T = speed_T if method is ridge else side_T
    binned = binned_session(counts_TN, value_T)
    binned.split_T[binned.split_T == 1] = -1
    guess = method(binned, "speed", np.arange(1600, 2000))
    if method is ridge:
        assert r2(value_T[1600:], guess) > 0.8
    else:
        assert np.mean(guess.argmax(axis=1) == value_T[1600:]) > 0.8


def test_without_validation_logistic_is_fitted_to_all_of_training_in_the_end(
    counts_TN: NDArray, side_T: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[tuple[int, float]] = []

    class Counted(LogisticRegression):
        def fit(self, z_TF: NDArray, label_T: NDArray) -> Counted:
            fits.append((len(z_TF), self.C * len(z_TF)))
            return super().fit(z_TF, label_T)

    monkeypatch.setattr(linear, "LogisticRegression", Counted)
    test = np.arange(1600, 2000)
    logistic(binned_session(counts_TN, side_T), "speed", test)
    assert {bins for bins, _ in fits} == {1200}
    fits.clear()
    binned = binned_session(counts_TN, side_T)
    binned.split_T[binned.of_split("val")] = 0
    logistic(binned, "speed", test)
    assert [bins for bins, _ in fits] == [1280] * len(linear.INVERSE_PENALTIES) + [1600]
    assert fits[-1][1] in {penalty for _, penalty in fits[:-1]}


def test_a_class_of_the_last_fifth_alone_is_known(counts_TN: NDArray) -> None:
    late_T = (counts_TN[:, 0] > 1) & (np.arange(2000) >= 1280)
    binned = binned_session(counts_TN, late_T.astype(float))
    binned.split_T[binned.of_split("val")] = 0
    probability_TC = logistic(binned, "speed", np.arange(1600, 2000))
    assert (probability_TC > 0).all()


def test_a_silent_unit_that_wakes_up_does_no_harm(counts_TN: NDArray, speed_T: NDArray) -> None:
    counts_TN = counts_TN.copy()
    counts_TN[:1600, 11] = 0
    guess_T = ridge(binned_session(counts_TN, speed_T), "speed", np.arange(1600, 2000))
    assert r2(speed_T[1600:], guess_T) > 0.85


def test_no_bins_asked_and_no_bins_to_train_on(counts_TN: NDArray, speed_T: NDArray) -> None:
    binned = binned_session(counts_TN, speed_T)
    assert ridge(binned, "speed", np.arange(0)).shape == (0,)
    with pytest.raises(ConfigError, match="speed"):
        ridge(binned, "velocity", np.arange(3))
    binned.scored_TM[binned.of_split("train"), 1] = False
    with pytest.raises(ConfigError, match="training bins"):
        ridge(binned, "speed", np.arange(3))
