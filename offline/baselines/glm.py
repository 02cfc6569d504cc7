"""Baseline: Poisson regression of every unit's count, on behaviour or on what came before.

    encoding   the rate of bin t from the behaviours shown up to t: places in each plane of two
               continuous behaviours, displacements over 0.1 to 1 s, one column per class
    forward_1  the rate of bin t from all units' spikes in the bins before it

Shape suffixes: T bins, N units, F features, S bins asked, P places of a plane, D its dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import fmin_l_bfgs_b
from sklearn.cluster import KMeans

from offline.baselines.linear import (
    BLOCK,
    Scaler,
    blocks,
    chosen_by_training,
    column,
    fitting_bins,
    history_widths,
)
from offline.windows import BinnedSession

ALPHAS = tuple(float(alpha) for alpha in np.logspace(2, -2.5, 10))
"""Ridge penalties tried, strongest first; over each unit's mean count."""

LAGS_S = (0.1, 0.2, 0.5, 1.0)
"""Seconds over which displacements are taken."""

MOST_PLACES, ALL_PLACES = 64, 400
"""Places in one plane, and in all planes of a session."""

MOST_CELLS = 50_000_000
"""Numbers in the largest table that is fitted; more bins are thinned out."""

Features = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Ascending bins to the rows of their features."""

Shown = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""A standardised behaviour, zero where it is not shown, and where it is."""


def encoding(
    binned: BinnedSession, bins: NDArray[np.int64], *, classes: Mapping[str, int] | None = None
) -> NDArray[np.float64]:
    """Counts that behaviour predicts, as far as it is shown up to each bin.

    Parameters
    ----------
    binned : BinnedSession
    bins : ndarray of int, shape (S,)
        Bins to predict, in any order.
    classes : mapping of str to int, optional
        Number of classes of each categorical behaviour; all others are continuous.

    Returns
    -------
    ndarray, shape (S, N)
    """
    wanted_T = binned.scored_TM[:, 0] & binned.shown_TM[:, 1:].any(axis=1)
    train, val = fitting_bins(binned, wanted_T)
    return _fit_and_predict(binned, bins, train, val, _behaviour(binned, train, classes or {}))


def forward_1(
    binned: BinnedSession, bins: NDArray[np.int64], *, history_s: float = 1.0
) -> NDArray[np.float64]:
    """Counts that the spikes of all earlier bins predict.

    Parameters
    ----------
    binned : BinnedSession
    bins : ndarray of int, shape (S,)
        Bins to predict, in any order.
    history_s : float
        Seconds of spikes that are read.

    Returns
    -------
    ndarray, shape (S, N)
    """
    train, val = fitting_bins(binned, binned.scored_TM[:, 0])
    widths = history_widths(binned, history_s)
    scaler = Scaler.fit(binned, train - 1, widths)

    def past(bins: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.concatenate([scaler(x_TF) for _, x_TF in blocks(binned, bins - 1, widths)])

    return _fit_and_predict(binned, bins, train, val, past)


# -- features of behaviour -----------------------------------------------------------------------


def _behaviour(
    binned: BinnedSession, train: NDArray[np.int64], classes: Mapping[str, int]
) -> Features:
    """Columns of what is shown at each bin, zero where it is not, standardised by training."""
    continuous: list[Shown] = []
    columns: list[NDArray] = []
    shown_TM = binned.shown_TM
    for name in binned.present:
        m = column(binned, name)
        if name in classes:
            each_TC = binned.values_TM[:, m, None] == np.arange(classes[name])
            columns.append(each_TC & shown_TM[:, m, None])
        else:
            value_T, fitted = binned.values_TM[:, m], train[shown_TM[train, m]]
            spread = max(float(value_T[fitted].std()), 1e-6) if len(fitted) else 1.0
            mean = float(value_T[fitted].mean()) if len(fitted) else 0.0
            continuous.append(
                (np.where(shown_TM[:, m], value_T - mean, 0.0) / spread, shown_TM[:, m])
            )
    for z_T, shown_T in continuous:
        columns += [z_T[:, None], _displacements(binned, z_T, shown_T)]
    pairs: list[tuple[Shown, ...]] = list(combinations(continuous, 2))
    planes = pairs or [(one,) for one in continuous]
    for plane in planes:
        z_TD = np.stack([z_T for z_T, _ in plane], axis=1)
        shown_T = np.logical_and.reduce([shown for _, shown in plane])
        columns.append(_places(z_TD, shown_T, train, min(MOST_PLACES, ALL_PLACES // len(planes))))
    x_TF = np.concatenate([np.asarray(part, np.float32) for part in columns], axis=1)
    mean_F, sd_F = x_TF[train].mean(axis=0), np.maximum(x_TF[train].std(axis=0), 1e-3)
    return lambda bins: (x_TF[bins] - mean_F) / sd_F


def _displacements(
    binned: BinnedSession, z_T: NDArray, shown_T: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """How far it went up, and how far down, since each lag ago; zero if it was not shown then."""
    parts = []
    for lag_s in LAGS_S:
        lag = max(1, round(lag_s * binned.session.rate / binned.width))
        step_T = np.zeros(len(z_T), np.float32)
        both_T = shown_T[lag:] & shown_T[:-lag]
        step_T[lag:] = np.where(both_T, z_T[lag:] - z_T[:-lag], 0.0)
        parts += [np.maximum(step_T, 0.0), np.maximum(-step_T, 0.0)]
    return np.stack(parts, axis=1)


def _places(
    z_TD: NDArray, shown_T: NDArray[np.bool_], train: NDArray[np.int64], most: int
) -> NDArray[np.float32]:
    """Bumps around the places where training spends its time; at each bin they sum to 1."""
    visited_TD = z_TD[train[shown_T[train]]][:: max(1, int(shown_T[train].sum()) // 5000)]
    out_TP = np.zeros((len(z_TD), 0), np.float32)
    most = min(most, len(np.unique(visited_TD, axis=0)))
    if most < 2:
        return out_TP
    centre_PD = KMeans(most, n_init=1, random_state=0).fit(visited_TD).cluster_centers_
    apart_PP = np.linalg.norm(centre_PD[:, None] - centre_PD[None], axis=2)
    np.fill_diagonal(apart_PP, np.inf)
    width = max(float(np.median(apart_PP.min(axis=1))), 1e-6)
    out_TP = np.zeros((len(z_TD), most), np.float32)
    for low in range(0, len(z_TD), BLOCK):
        part = slice(low, low + BLOCK)
        square_TP = np.square(z_TD[part, None] - centre_PD[None]).sum(axis=2) / (2 * width**2)
        bump_TP = np.exp(square_TP.min(axis=1, keepdims=True) - square_TP)
        out_TP[part] = bump_TP / bump_TP.sum(axis=1, keepdims=True) * shown_T[part, None]
    return out_TP


# -- Poisson regression --------------------------------------------------------------------------


@dataclass(frozen=True)
class Poisson:
    """Log-rates linear in the features; held between half a spike in training and its most."""

    weight_FN: NDArray
    offset_N: NDArray
    least: float
    most_N: NDArray

    def with_units(self, which_N: NDArray[np.bool_], other: Poisson) -> Poisson:
        """The other's weights for some of the units."""
        weight_FN = np.where(which_N, other.weight_FN, self.weight_FN)
        offset_N = np.where(which_N, other.offset_N, self.offset_N)
        return replace(self, weight_FN=weight_FN, offset_N=offset_N)

    def of_type(self, dtype: np.dtype) -> Poisson:
        """With weights of less precision."""
        weight_FN, offset_N = self.weight_FN.astype(dtype), self.offset_N.astype(dtype)
        return replace(self, weight_FN=weight_FN, offset_N=offset_N)

    def __call__(self, z_TF: NDArray) -> NDArray[np.float64]:
        log_TN = (z_TF @ self.weight_FN + self.offset_N).astype(np.float64)
        return np.clip(np.exp(np.minimum(log_TN, 20.0)), self.least, self.most_N)


def fit_poisson(
    z_TF: NDArray,
    count_TN: NDArray,
    val_TF: NDArray,
    val_TN: NDArray,
    alphas: tuple[float, ...] = ALPHAS,
    *,
    refit: bool = False,
) -> Poisson:
    """Ridge Poisson regression of every unit at once; validation chooses each unit's penalty.

    Minimised is the mean over bins of ``rate - count * log(rate)``, plus half of ``alpha`` times
    the unit's mean count times its squared weights; the offset is free.

    Parameters
    ----------
    z_TF, count_TN : ndarray
        Standardised features and counts of training. The arithmetic has the precision of ``z_TF``.
    val_TF, val_TN : ndarray
        The same of validation.
    alphas : tuple of float
        Penalties, strongest first.
    refit : bool
        Whether training and validation together are fitted in the end, with those penalties.

    Returns
    -------
    Poisson
    """
    fit = _Fit(z_TF, count_TN)
    model, N = fit.nothing(), count_TN.shape[1]
    best, least_N, alpha_N = model, np.full(N, np.inf), np.full(N, alphas[0])
    for alpha in alphas:
        model = fit(model, np.full(N, alpha))
        rate_TN = model(val_TF)
        loss_N = (rate_TN - val_TN * np.log(rate_TN)).mean(axis=0)
        better_N = loss_N < least_N
        best = best.with_units(better_N, model)
        least_N, alpha_N = np.minimum(loss_N, least_N), np.where(better_N, alpha, alpha_N)
        if not better_N.any():
            break
    if refit:
        whole = _Fit(np.concatenate([z_TF, val_TF]), np.concatenate([count_TN, val_TN]))
        best = whole(best, alpha_N)
    return best.of_type(z_TF.dtype)


class _Fit:
    """Ridge Poisson regression of some bins."""

    def __init__(self, z_TF: NDArray, count_TN: NDArray) -> None:
        T = len(z_TF)
        self._count_TN, self._least = count_TN, 0.5 / T
        self._mean_N = np.maximum(count_TN.mean(axis=0, dtype=np.float64), self._least)
        self._most_N = np.maximum(count_TN.max(axis=0), self._least)
        # In the axes of the features' covariance the curvature is nearly diagonal: few steps
        # suffice.
        power_F, self._axes_FF = np.linalg.eigh(z_TF.T @ z_TF / T)
        self._turned_TF, self._power_F = z_TF @ self._axes_FF, np.maximum(power_F, 0.0)

    def nothing(self) -> Poisson:
        """The mean rate of every unit."""
        weight_FN = np.zeros((len(self._axes_FF), len(self._mean_N)))
        return Poisson(weight_FN, np.log(self._mean_N), self._least, self._most_N)

    def __call__(self, first: Poisson, alpha_N: NDArray[np.float64]) -> Poisson:
        """With these penalties, from a first guess."""
        weight_FN, offset_N = _minimise(
            self._turned_TF,
            self._count_TN,
            self._axes_FF.T @ first.weight_FN,
            first.offset_N,
            self._power_F,
            alpha_N,
            self._mean_N,
        )
        return Poisson(self._axes_FF @ weight_FN, offset_N, self._least, self._most_N)


def _minimise(
    z_TF: NDArray,
    count_TN: NDArray,
    weight_FN: NDArray,
    offset_N: NDArray,
    power_F: NDArray,
    alpha_N: NDArray,
    mean_N: NDArray,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights and offsets of the least penalised loss, from a first guess of them."""
    T, F = z_TF.shape
    N = len(mean_N)
    curvature_FN = np.concatenate([power_F[:, None] + alpha_N, np.ones((1, N))]) * mean_N
    scale_FN = 1.0 / np.sqrt(curvature_FN)
    penalty_FN = np.concatenate([np.tile(alpha_N, (F, 1)), np.zeros((1, N))]) * mean_N
    highest = 5.0  # beyond it the exponential goes on as a line, lest a long step overflow

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        both_FN = scale_FN * flat.reshape(scale_FN.shape)
        log_TN = z_TF @ both_FN[:-1].astype(z_TF.dtype) + both_FN[-1].astype(z_TF.dtype)
        slope_TN = np.exp(np.minimum(log_TN, highest))
        rate_TN = slope_TN * (1.0 + np.maximum(log_TN - highest, 0.0))
        value = float(np.sum(rate_TN - count_TN * log_TN, dtype=np.float64)) / T
        slope_TN -= count_TN
        gradient_FN = np.concatenate([z_TF.T @ slope_TN, slope_TN.sum(axis=0)[None]]) / T
        gradient_FN = gradient_FN + penalty_FN * both_FN
        return value + 0.5 * float(np.sum(penalty_FN * both_FN**2)), (
            scale_FN * gradient_FN
        ).ravel()

    begin = np.concatenate([weight_FN, offset_N[None]]) / scale_FN
    flat, _, _ = fmin_l_bfgs_b(loss, begin.ravel(), factr=4.5e9, pgtol=1e-6, maxiter=100)
    both_FN = scale_FN * flat.reshape(scale_FN.shape)
    return both_FN[:-1], both_FN[-1]


def _fit_and_predict(
    binned: BinnedSession,
    bins: NDArray[np.int64],
    train: NDArray[np.int64],
    val: NDArray[np.int64],
    features: Features,
) -> NDArray[np.float64]:
    """Fit on training bins, choose on validation bins, predict bins in any order.

    Where there is no validation split, training's last fifth chooses, and then all of it is fitted.
    """
    width = features(train[:1]).shape[1]
    train, val = (part[:: -(-len(part) * width // MOST_CELLS) or 1] for part in (train, val))
    model = fit_poisson(
        features(train),
        _counts(binned, train),
        features(val),
        _counts(binned, val),
        refit=chosen_by_training(binned),
    )
    out_SN = np.zeros((len(bins), len(binned.session.unit_ids)))
    order = np.argsort(bins, kind="stable")
    for low in range(0, len(bins), BLOCK):
        part = order[low : low + BLOCK]
        out_SN[part] = model(features(np.asarray(bins)[part]))
    return out_SN


def _counts(binned: BinnedSession, bins: NDArray[np.int64]) -> NDArray[np.float32]:
    """Counts of ascending bins."""
    count_SN = np.zeros((len(bins), len(binned.session.unit_ids)), np.float32)
    for low in range(0, int(bins[-1]) + 1 if len(bins) else 0, BLOCK):
        a, b = np.searchsorted(bins, [low, low + BLOCK])
        if b > a:
            count_SN[a:b] = binned.counts_TN(low, low + BLOCK)[bins[a:b] - low]
    return count_SN
