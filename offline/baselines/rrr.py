"""Baseline: reduced-rank regression of one choice per trial on spikes by unit and time in trial.

The weight of unit n at time t is a sum over few ranks of (unit's weight) x (time course). The time
courses may be shared by sessions whose units differ, as in NEDS's baseline (arXiv 2504.08201).

Shape suffixes: K trials, T bins of a trial, N units, R ranks, F flattened features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve

SWEEPS = 5
"""Times that units' weights and time courses are fitted in turn."""


@dataclass(frozen=True)
class Standardised:
    """Square roots of the counts of training trials less their means, over one sd of all."""

    x_KTN: NDArray[np.float64]
    mean_TN: NDArray[np.float64]
    sd: float

    @classmethod
    def fit(cls, counts_KTN: NDArray) -> Standardised:
        root_KTN = np.sqrt(counts_KTN, dtype=np.float64)
        mean_TN = root_KTN.mean(axis=0)
        sd = max(float((root_KTN - mean_TN).std()), 1e-6)
        return cls((root_KTN - mean_TN) / sd, mean_TN, sd)

    def __call__(self, counts_KTN: NDArray) -> NDArray[np.float64]:
        return (np.sqrt(counts_KTN, dtype=np.float64) - self.mean_TN) / self.sd


@dataclass(frozen=True)
class Rrr:
    """Fitted weights of one session.

    Attributes
    ----------
    unit_NR : ndarray
    time_TR : ndarray
        Orthonormal columns.
    offset : float
    """

    unit_NR: NDArray[np.float64]
    time_TR: NDArray[np.float64]
    offset: float

    def __call__(self, x_KTN: NDArray[np.float64]) -> NDArray[np.float64]:
        """Positive for the class coded +1, shape (K,)."""
        return np.tensordot(x_KTN, self.time_TR @ self.unit_NR.T, axes=2) + self.offset


def rrr(
    x_of: Sequence[NDArray], side_of: Sequence[NDArray], *, rank: int, alpha: float
) -> list[Rrr]:
    """Fit one session, or several with the same time courses.

    The squared error to sides coded -1 and +1, classes weighed alike, plus a ridge penalty on the
    whole weight matrix, so that full rank is plain ridge regression. It begins at the leading time
    courses of that, then units' weights and time courses are fitted in turn.

    Parameters
    ----------
    x_of : sequence of ndarray, shape (K, T, N)
        Standardised trials of each session; T is common.
    side_of : sequence of ndarray, shape (K,)
        -1 or +1.
    rank : int
        At most T.
    alpha : float
        Penalty per trial, over the mean squared length of the session's trials.

    Returns
    -------
    list of Rrr
        One for each session.
    """
    problems = [_Problem.of(x, side, alpha) for x, side in zip(x_of, side_of, strict=True)]
    T = problems[0].x_KTN.shape[1]
    whole = [problem.full_rank() for problem in problems]
    time_TR = _leading(np.sum([weight_TN @ weight_TN.T for weight_TN in whole], axis=0), rank)
    for _ in range(SWEEPS if rank < T else 0):
        gram_FF, cross_F = np.zeros((T * rank,) * 2), np.zeros(T * rank)
        for problem in problems:
            problem.add_times_given(problem.units_given(time_TR), gram_FF, cross_F)
        gram_FF.flat[:: T * rank + 1] += 1e-12 * np.trace(gram_FF)
        time_TR, _ = np.linalg.qr(solve(gram_FF, cross_F, assume_a="pos").reshape(T, rank))
    return [problem.fitted(time_TR) for problem in problems]


def rrr_of_basis(
    x_KTN: NDArray, side_K: NDArray, time_TR: NDArray[np.float64], *, alpha: float
) -> Rrr:
    """Fit the units' weights of one session, its time courses given, such as by other sessions.

    Parameters
    ----------
    x_KTN, side_K, alpha
        As for :func:`rrr`.
    time_TR : ndarray
        Orthonormal columns.

    Returns
    -------
    Rrr
    """
    return _Problem.of(x_KTN, side_K, alpha).fitted(time_TR)


# -- arithmetic ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """One session's trials, centred and weighed so that both classes count alike."""

    x_KTN: NDArray[np.float64]
    side_K: NDArray[np.float64]
    penalty: float
    mean_TN: NDArray[np.float64]
    mean_side: float

    @classmethod
    def of(cls, x_KTN: NDArray, side_K: NDArray, alpha: float) -> _Problem:
        _, class_K, count = np.unique(side_K, return_inverse=True, return_counts=True)
        weight_K = 1.0 / (len(count) * count[class_K])
        mean_TN, mean_side = np.tensordot(weight_K, x_KTN, axes=1), float(weight_K @ side_K)
        root_K = np.sqrt(weight_K)
        x_KTN = (x_KTN - mean_TN) * root_K[:, None, None]
        penalty = alpha * max(float(np.square(x_KTN).sum()), 1e-12)
        return cls(x_KTN, (side_K - mean_side) * root_K, penalty, mean_TN, mean_side)

    def full_rank(self) -> NDArray[np.float64]:
        """Weights of plain ridge regression, shape (T, N)."""
        return np.tensordot(self._among_trials(self.x_KTN), self.x_KTN, axes=1)

    def units_given(self, time_TR: NDArray) -> NDArray[np.float64]:
        """Units' weights under orthonormal time courses, shape (N, R)."""
        z_KRN = time_TR.T @ self.x_KTN
        return np.tensordot(self._among_trials(z_KRN), z_KRN, axes=1).T

    def _among_trials(self, z_KRN: NDArray) -> NDArray[np.float64]:
        """Ridge regression as weights of trials: they are far fewer than its features."""
        flat_KF = z_KRN.reshape(len(z_KRN), -1)
        held_KK = flat_KF @ flat_KF.T
        held_KK.flat[:: len(held_KK) + 1] += self.penalty
        return solve(held_KK, self.side_K, assume_a="pos")

    def add_times_given(
        self, unit_NR: NDArray, gram_FF: NDArray[np.float64], cross_F: NDArray[np.float64]
    ) -> None:
        """Add this session's normal equations of the time courses; F is times by ranks."""
        K, T, _ = self.x_KTN.shape
        z_KF = (self.x_KTN @ unit_NR).reshape(K, -1)
        gram_FF += z_KF.T @ z_KF + self.penalty * np.kron(np.eye(T), unit_NR.T @ unit_NR)
        cross_F += z_KF.T @ self.side_K

    def fitted(self, time_TR: NDArray[np.float64]) -> Rrr:
        unit_NR = self.units_given(time_TR)
        taken = float(np.sum(self.mean_TN * (time_TR @ unit_NR.T)))
        return Rrr(unit_NR, time_TR, self.mean_side - taken)


def _leading(gram_TT: NDArray, rank: int) -> NDArray[np.float64]:
    """The leading eigenvectors, orthonormal, largest first."""
    return np.linalg.eigh(gram_TT)[1][:, ::-1][:, :rank]
