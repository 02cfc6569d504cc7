"""Reduced-rank regression: full rank is ridge, and a shared time course helps where labels lack."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from offline.baselines.rrr import Standardised, rrr, rrr_of_basis

T, N = 6, 9
COURSE_T = np.array([0.0, 0.0, 0.2, 0.5, 0.8, 0.2]) / np.linalg.norm([0.2, 0.5, 0.8, 0.2])


def trials(count: int, seed: int, gain: float = 0.6) -> tuple[NDArray, NDArray]:
    """Noise, and a side that shows in all units along one time course."""
    rng = np.random.default_rng(seed)
    side_K = np.where(rng.random(count) < 0.4, 1.0, -1.0)
    unit_N = rng.normal(size=N)
    signal_KTN = side_K[:, None, None] * np.outer(COURSE_T, unit_N)
    return rng.normal(size=(count, T, N)) + gain * signal_KTN + 0.3, side_K


def test_full_rank_is_ridge_regression() -> None:
    x_KTN, side_K = trials(40, 0)
    weight_K = np.where(side_K > 0, 0.5 / (side_K > 0).sum(), 0.5 / (side_K < 0).sum())
    centred_KTN = x_KTN - np.tensordot(weight_K, x_KTN, axes=1)
    penalty = 0.3 * np.sum(weight_K[:, None, None] * centred_KTN**2)
    plain = Ridge(alpha=penalty).fit(x_KTN.reshape(40, -1), side_K, sample_weight=weight_K)
    fitted = rrr([x_KTN], [side_K], rank=T, alpha=0.3)[0]
    np.testing.assert_allclose(fitted(x_KTN), plain.predict(x_KTN.reshape(40, -1)), atol=1e-9)


def test_low_rank_is_the_least_of_its_loss() -> None:
    """No small change of the units' weights or of the time course does better."""
    x_KTN, side_K = trials(60, 1)
    fitted = rrr([x_KTN], [side_K], rank=1, alpha=0.05)[0]
    weight_K = np.where(side_K > 0, 0.5 / (side_K > 0).sum(), 0.5 / (side_K < 0).sum())
    spread = np.sum(weight_K[:, None, None] * (x_KTN - np.tensordot(weight_K, x_KTN, 1)) ** 2)

    def loss(unit_NR: NDArray, time_TR: NDArray) -> float:
        weight_TN = time_TR @ unit_NR.T
        out_K = np.tensordot(x_KTN, weight_TN, axes=2)
        out_K = out_K + weight_K @ (side_K - out_K)
        return weight_K @ (side_K - out_K) ** 2 + 0.05 * spread * np.sum(weight_TN**2)

    least = loss(fitted.unit_NR, fitted.time_TR)
    rng = np.random.default_rng(2)
    for size in (1e-2, 1e-1):
        for _ in range(50):
            unit_NR = fitted.unit_NR + size * rng.normal(size=(N, 1)) * np.abs(fitted.unit_NR).max()
            time_TR = fitted.time_TR + size * rng.normal(size=(T, 1))
            assert loss(unit_NR, fitted.time_TR) > least
            assert loss(fitted.unit_NR, time_TR) > least - 1e-3 * least  # swept a few times only


def test_several_sessions_find_their_common_time_course() -> None:
    many = [trials(60, seed, gain=0.4) for seed in range(8)]
    together = rrr([x for x, _ in many], [side for _, side in many], rank=1, alpha=0.3)
    alone = [rrr([x], [side], rank=1, alpha=0.3)[0] for x, side in many]
    found = abs(COURSE_T @ together[0].time_TR[:, 0])
    assert found > 0.97
    assert found > np.mean([abs(COURSE_T @ one.time_TR[:, 0]) for one in alone])
    assert all(one.time_TR is together[0].time_TR for one in together)


def test_a_given_time_course_helps_when_trials_are_few() -> None:
    def gain(seed: int) -> float:
        x_KTN, side_K = trials(312, seed)
        few, rest = slice(12), slice(12, None)
        alone = rrr([x_KTN[few]], [side_K[few]], rank=1, alpha=0.3)[0]
        given = rrr_of_basis(x_KTN[few], side_K[few], COURSE_T[:, None], alpha=0.3)
        return roc_auc_score(side_K[rest], given(x_KTN[rest])) - roc_auc_score(
            side_K[rest], alone(x_KTN[rest])
        )

    assert np.mean([gain(seed) for seed in range(20, 30)]) > 0.02


def test_classes_count_alike() -> None:
    """Trials of one side given twice change nothing."""
    x_KTN, side_K = trials(30, 3)
    twice = np.concatenate([np.arange(30), np.flatnonzero(side_K > 0)])
    once = rrr([x_KTN], [side_K], rank=2, alpha=0.1)[0]
    again = rrr([x_KTN[twice]], [side_K[twice]], rank=2, alpha=0.1)[0]
    np.testing.assert_allclose(once(x_KTN), again(x_KTN), atol=1e-8)


def test_all_units_are_divided_by_one_sd() -> None:
    counts_KTN = np.random.default_rng(4).poisson(2.0, size=(50, T, N))
    counts_KTN[:, :, 0] = 0
    standardised = Standardised.fit(counts_KTN)
    assert np.abs(standardised.x_KTN.mean(axis=0)).max() < 1e-12
    assert standardised.x_KTN.std() == pytest.approx(1.0)
    assert np.isfinite(Standardised.fit(0 * counts_KTN).x_KTN).all()
    np.testing.assert_allclose(standardised(counts_KTN), standardised.x_KTN)
