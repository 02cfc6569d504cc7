"""Baselines: causal ridge and logistic regression on square roots of recent spike counts.

Both read what the network may read, spikes of the bin and of the second before it, and are fitted
on the scored bins of the training split; the validation split chooses the penalty.

Shape suffixes: T bins, N units, F features (widths x units), A penalties tried, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve
from sklearn.linear_model import LogisticRegression

from offline.windows import BinnedSession
from rt_neds.errors import ConfigError
from rt_neds.model.readin import boxcar_sums

ALPHAS = tuple(float(alpha) for alpha in np.logspace(-4, 4, 17))
"""Ridge penalties tried, per training bin."""

INVERSE_PENALTIES = tuple(float(c) for c in np.logspace(-6, 0, 7))
"""Values of C tried for the logistic regression, times 1000 over the training bins."""

LEAST_SD = 0.2
"""Floor of the sd a feature is divided by, as in the network: a near-silent unit is no hammer."""

BLOCK = 2000
"""Bins whose features are held at once: 77 MB for 1600 units."""

MOST_CELLS = 200_000_000
"""Numbers in the largest table the logistic regression is given (0.8 GB); more is thinned out."""


def ridge(
    binned: BinnedSession,
    name: str,
    bins: NDArray[np.int64],
    *,
    history_s: float = 1.0,
    alphas: tuple[float, ...] = ALPHAS,
) -> NDArray[np.float64]:
    """Causal ridge regression of one continuous behaviour, or of counts.

    Parameters
    ----------
    binned : BinnedSession
    name : str
        Behaviour, as configured.
    bins : ndarray of int
        Bins to predict, in any order.
    history_s : float
        Seconds of spikes that are read.
    alphas : tuple of float
        Penalties to choose from, per training bin.

    Returns
    -------
    ndarray, shape (bins asked,)
        In physical units.
    """
    m, widths = column(binned, name), history_widths(binned, history_s)
    train, _ = fitting_bins(binned, binned.scored_TM[:, m])
    scaler = Scaler.fit(binned, train, widths).undivided()
    weights_F, offset = fit_ridge(binned, m, widths, scaler, alphas)
    return _predict(binned, bins, widths, scaler, weights_F[:, None])[:, 0] + offset


def fit_ridge(
    binned: BinnedSession,
    m: int,
    widths: tuple[int, ...],
    scaler: Scaler,
    alphas: tuple[float, ...] = ALPHAS,
) -> tuple[NDArray[np.float64], float]:
    """Ridge weights of the standardised features, and the offset; validation chooses the penalty.

    Where there is no validation split, training's last fifth chooses it, and then all of training
    is fitted.

    Parameters
    ----------
    binned : BinnedSession
    m : int
        Column of the behaviour.
    widths : tuple of int
        Boxcars, in bins.
    scaler : Scaler
    alphas : tuple of float
        Penalties to choose from, per training bin.

    Returns
    -------
    ndarray, shape (widths x units,)
    float
    """
    train, val = fitting_bins(binned, binned.scored_TM[:, m])
    gram_FF, cross_F, offset = _normal_equations(binned, m, widths, scaler, train)
    weights_FA = np.stack([_solve(gram_FF, cross_F, alpha * len(train)) for alpha in alphas], 1)
    del gram_FF

    guess_TA = _predict(binned, val, widths, scaler, weights_FA) + offset
    error_A = ((guess_TA - binned.values_TM[val, m].astype(np.float64)[:, None]) ** 2).sum(axis=0)
    best = len(alphas) - 1 - int(error_A[::-1].argmin())  # of equals, the strongest
    if not chosen_by_training(binned):
        return weights_FA[:, best], offset
    every = np.concatenate([train, val])
    gram_FF, cross_F, offset = _normal_equations(binned, m, widths, scaler, every)
    return _solve(gram_FF, cross_F, alphas[best] * len(every)), offset


def _normal_equations(
    binned: BinnedSession,
    m: int,
    widths: tuple[int, ...],
    scaler: Scaler,
    bins: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Products of the features with themselves and with the target less its mean; that mean."""
    target_T = binned.values_TM[bins, m].astype(np.float64)
    offset = float(target_T.mean())
    gram_FF = np.zeros((len(scaler.mean_F),) * 2)
    cross_F = np.zeros(len(scaler.mean_F))
    for part, x_TF in blocks(binned, bins, widths):
        z_TF = scaler(x_TF)
        gram_FF += z_TF.T @ z_TF
        cross_F += z_TF.T.astype(np.float64) @ (target_T[part] - offset)
    return gram_FF, cross_F, offset


def logistic(
    binned: BinnedSession,
    name: str,
    bins: NDArray[np.int64],
    *,
    history_s: float = 1.0,
    classes: int | None = None,
) -> NDArray[np.float64]:
    """Causal logistic regression of one categorical behaviour; validation chooses the penalty.

    Where there is no validation split, training's last fifth chooses it, and then all of training
    is fitted.

    Parameters
    ----------
    binned : BinnedSession
    name : str
        Behaviour, as configured.
    bins : ndarray of int
        Bins to predict, in any order.
    history_s : float
        Seconds of spikes that are read.
    classes : int, optional
        Number of classes; by default as many as occur in the session.

    Returns
    -------
    ndarray, shape (bins asked, classes)
        Probabilities; zero for a class that training never saw, one if it saw no other.
    """
    m, widths = column(binned, name), history_widths(binned, history_s)
    train, val = fitting_bins(binned, binned.scored_TM[:, m])
    refit = chosen_by_training(binned)
    every = np.concatenate([train, val]) if refit else train
    if classes is None:
        classes = int(binned.values_TM[binned.scored_TM[:, m], m].max()) + 1
    features = len(widths) * len(binned.session.unit_ids)
    train, every = (part[:: -(-len(part) * features // MOST_CELLS)] for part in (train, every))
    if len(np.unique(binned.values_TM[every, m])) == 1:
        return np.tile(np.eye(classes)[int(binned.values_TM[every[0], m])], (len(bins), 1))

    scaler = Scaler.fit(binned, train, widths).undivided()
    c, model = _choose(binned, m, widths, scaler, train, val)
    if model is None or refit:
        model = _fit(*_examples(binned, m, widths, scaler, every), c)
    probability_TC = np.zeros((len(bins), classes))
    logits_TC = _predict(binned, bins, widths, scaler, model.coef_.T) + model.intercept_
    probability_TC[:, model.classes_] = softmax(logits_TC)
    return probability_TC


def _choose(
    binned: BinnedSession,
    m: int,
    widths: tuple[int, ...],
    scaler: Scaler,
    train: NDArray[np.int64],
    val: NDArray[np.int64],
) -> tuple[float, LogisticRegression | None]:
    """The penalty that validation chooses, and what training gives with it; of one class None."""
    z_TF, label_T = _examples(binned, m, widths, scaler, train)
    best_score, best_c, best = -1.0, INVERSE_PENALTIES[0], None
    if len(np.unique(label_T)) == 1:
        return best_c, best
    val_label_T = binned.values_TM[val, m].astype(np.int64)
    for c in INVERSE_PENALTIES:
        model = _fit(z_TF, label_T, c)
        logits_TC = _predict(binned, val, widths, scaler, model.coef_.T) + model.intercept_
        score = _balanced(val_label_T, model.classes_[softmax(logits_TC).argmax(axis=1)])
        if score > best_score:  # of equals, the strongest penalty
            best_score, best_c, best = score, c, model
    return best_c, best


def _examples(
    binned: BinnedSession,
    m: int,
    widths: tuple[int, ...],
    scaler: Scaler,
    bins: NDArray[np.int64],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    z_TF = np.concatenate([scaler(x_TF) for _, x_TF in blocks(binned, bins, widths)])
    return z_TF, binned.values_TM[bins, m].astype(np.int64)


def _fit(z_TF: NDArray[np.float32], label_T: NDArray[np.int64], c: float) -> LogisticRegression:
    model = LogisticRegression(C=c * 1000 / len(z_TF), max_iter=300, tol=1e-3)
    return model.fit(z_TF, label_T)


# -- which bins, which column --------------------------------------------------------------------


def column(binned: BinnedSession, name: str) -> int:
    """Column of a behaviour; columns follow the configuration, all of which must be present."""
    if name not in binned.present or len(binned.present) + 1 != binned.values_TM.shape[1]:
        raise ConfigError(
            f"{binned.session.id}: a baseline of {name} needs every configured behaviour; "
            f"this session has {', '.join(binned.present)}; leave out the others"
        )
    return 1 + binned.present.index(name)


def fitting_bins(
    binned: BinnedSession, wanted_T: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Wanted bins of training and of validation; without the latter, training's last fifth."""
    train = np.flatnonzero(binned.of_split("train") & wanted_T)
    val = np.flatnonzero(binned.of_split("val") & wanted_T)
    if len(train) < 2:
        raise ConfigError(
            f"{binned.session.id}: {len(train)} training bins that can be fitted; a baseline needs "
            "two or more: choose another data.split"
        )
    if len(val) == 0:
        train, val = np.split(train, [len(train) - max(1, len(train) // 5)])
    return train, val


def chosen_by_training(binned: BinnedSession) -> bool:
    """Whether there is no validation split: then all of training is fitted in the end."""
    return not binned.of_split("val").any()


# -- features ------------------------------------------------------------------------------------


def history_widths(binned: BinnedSession, history_s: float) -> tuple[int, ...]:
    """Boxcar widths: 1, 2, 5, 10, 25 and 50 bins for a second of 20 ms bins."""
    longest = history_s * binned.session.rate / binned.width
    return tuple(sorted({max(1, round(longest * f)) for f in (0.02, 0.04, 0.1, 0.2, 0.5, 1.0)}))


def blocks(
    binned: BinnedSession, bins: NDArray[np.int64], widths: tuple[int, ...]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Features of ascending bins, a few at a time: their positions in ``bins`` and their rows.

    A feature is the square root of a unit's spikes in the last ``width`` bins, the current one
    included. Bins that were not wholly recorded count as empty.
    """
    past = max(widths)
    apart = np.flatnonzero(np.diff(bins) > past) + 1
    for run in np.split(np.arange(len(bins)), apart):
        for low in range(0, len(run), BLOCK):
            part = run[low : low + BLOCK]
            if len(part) == 0:
                continue
            first, stop = int(bins[part[0]]) - past, int(bins[part[-1]]) + 1
            shown_T = binned.cut(binned.shown_TM[:, 0], first, stop)
            counts_TN = binned.counts_TN(first, stop) * shown_T[:, None]
            sums_TKN = boxcar_sums(torch.from_numpy(counts_TN)[None], widths)[0].numpy()
            yield part, np.sqrt(sums_TKN[bins[part] - first]).reshape(len(part), -1)


@dataclass
class Scaler:
    """Standardisation by the training bins, with a floor."""

    mean_F: NDArray[np.float32]
    sd_F: NDArray[np.float32]

    @classmethod
    def fit(cls, binned: BinnedSession, bins: NDArray[np.int64], widths: tuple[int, ...]) -> Scaler:
        features = len(widths) * len(binned.session.unit_ids)
        total_F, squares_F = np.zeros(features), np.zeros(features)
        for _, x_TF in blocks(binned, bins, widths):
            total_F += x_TF.sum(axis=0, dtype=np.float64)
            squares_F += np.square(x_TF, dtype=np.float64).sum(axis=0)
        mean_F = total_F / len(bins)
        sd_F = np.sqrt(np.maximum(squares_F / len(bins) - mean_F**2, 0.0))
        return cls(mean_F.astype(np.float32), np.maximum(sd_F, LEAST_SD).astype(np.float32))

    def undivided(self) -> Scaler:
        """The same with one sd for all features, as regressions do better (decision 0024)."""
        return Scaler(self.mean_F, np.full_like(self.sd_F, np.sqrt(np.square(self.sd_F).mean())))

    def __call__(self, x_TF: NDArray[np.float32]) -> NDArray[np.float32]:
        return (x_TF - self.mean_F) / self.sd_F


# -- arithmetic ----------------------------------------------------------------------------------


def _solve(gram_FF: NDArray, cross_F: NDArray, penalty: float) -> NDArray[np.float64]:
    held_FF = gram_FF.copy()
    held_FF.flat[:: len(gram_FF) + 1] += penalty
    return solve(held_FF, cross_F, assume_a="pos", overwrite_a=True)


def _predict(
    binned: BinnedSession,
    bins: NDArray[np.int64],
    widths: tuple[int, ...],
    scaler: Scaler,
    weights_FA: NDArray,
) -> NDArray[np.float64]:
    """Weighted features of bins in any order, shape (bins, columns of the weights)."""
    out_TA = np.zeros((len(bins), weights_FA.shape[1]))
    order = np.argsort(bins, kind="stable")
    weights_FA = weights_FA.astype(np.float32)
    for part, x_TF in blocks(binned, np.asarray(bins)[order], widths):
        out_TA[order[part]] = scaler(x_TF) @ weights_FA
    return out_TA


def softmax(logits_TC: NDArray) -> NDArray[np.float64]:
    """Probabilities; one column of logits, as sklearn gives for two classes, is the second's."""
    if logits_TC.shape[1] == 1:
        logits_TC = np.concatenate([np.zeros_like(logits_TC), logits_TC], axis=1)
    e_TC = np.exp(logits_TC - logits_TC.max(axis=1, keepdims=True))
    return e_TC / e_TC.sum(axis=1, keepdims=True)


def _balanced(true_T: NDArray, guess_T: NDArray) -> float:
    """Balanced accuracy, over the classes that occur."""
    return float(np.mean([np.mean(guess_T[true_T == c] == c) for c in np.unique(true_T)]))
