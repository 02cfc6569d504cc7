"""Baseline: a small causal GRU that decodes all behaviours of a session together.

It reads square roots of the spikes of recent bins and carries its state from the session's first
bin to the last one asked; the training split is fitted, the validation split ends the training.

Shape suffixes: B windows, T bins, F features (widths x units), O outputs, S bins asked, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor, nn

from offline.baselines.linear import (
    BLOCK,
    Scaler,
    blocks,
    chosen_by_training,
    column,
    fitting_bins,
    softmax,
)
from offline.windows import BinnedSession
from rt_neds.errors import ConfigError

WIDTHS_S = (0.02, 0.1, 0.5)
"""Boxcars that are read, in seconds: 1, 5 and 25 bins of 20 ms."""

HIDDEN, DROPOUT, LEARNING_RATE, WEIGHT_DECAY = 64, 0.2, 2e-3, 0.01

WINDOW, BINS = 300, 4800
"""Bins of a training window, where no more are asked for, and of all windows of a step."""

LEAD = 100
"""Bins at a window's start that are not scored: the state has to fill."""

VALIDATION_LEAD = 500
"""Bins before a stretch of validation from which its state is carried on."""

AVERAGE = 0.99
"""What the running average of the weights keeps at each step; the average is what is used."""

MOST_STEPS, VALIDATE_EVERY, PATIENCE = 3000, 50, 12
"""Training ends after so many steps, or so many validations without a better one."""


@dataclass(frozen=True)
class Target:
    """One behaviour: its column, its outputs, and the training values it is measured by.

    ``classes`` is 0 for a continuous behaviour, which is standardised.
    """

    m: int
    outputs: slice
    classes: int
    mean: float
    sd: float


def gru(
    binned: BinnedSession,
    names: Sequence[str],
    bins: NDArray[np.int64],
    *,
    classes: Mapping[str, int] | None = None,
    seed: int = 0,
    window: int = 0,
    live: Sequence[str] = (),
    spikes: bool = True,
) -> dict[str, NDArray[np.float64]]:
    """Train a GRU on the training split and decode behaviours with it.

    Where there is no validation split, training's last fifth says when to end, and then another is
    trained on all of it for as long.

    Parameters
    ----------
    binned : BinnedSession
    names : sequence of str
        Behaviours, as configured.
    bins : ndarray of int, shape (S,)
        Bins to predict, in any order.
    classes : mapping of str to int, optional
        Number of classes of each categorical behaviour; all others are continuous.
    seed : int
    window : int
        Bins of a training window; 300 if fewer. What lies before a window is not taught to be
        remembered.
    live : sequence of str
        Behaviours that are read beside the spikes, where an observer could know them.
    spikes : bool
        Whether spikes are read at all.

    Returns
    -------
    dict of str to ndarray
        Continuous, shape (S,): in physical units. Categorical, shape (S, C): probabilities.
    """
    targets = _targets(binned, names, classes or {})
    rate = binned.session.rate / binned.width
    widths = tuple(sorted({max(1, round(s * rate)) for s in WIDTHS_S}))
    fitted = [fitting_bins(binned, binned.scored_TM[:, target.m]) for target in targets]
    scaler = Scaler.fit(binned, np.unique(np.concatenate([train for train, _ in fitted])), widths)
    shown_TG = _observed(binned, live, classes or {})
    read = _Reader(binned, widths, scaler, shown_TG, spikes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = spikes * len(scaler.mean_F) + shown_TG.shape[1]
        net = _Net(features, max(target.outputs.stop for target in targets))
        starts = _Starts(np.random.default_rng(seed), max(window, WINDOW))
        first = copy.deepcopy(net)
        net, steps = _train(net, read, targets, fitted, starts)
        if chosen_by_training(binned):
            fitted = [(np.concatenate(both), both[1]) for both in fitted]
            net, _ = _train(first, read, targets, fitted, starts, steps)
    out_SO = _carry(net, read, np.asarray(bins))
    predicted = {}
    for name, target in zip(names, targets, strict=True):
        raw_SO = out_SO[:, target.outputs]
        predicted[name] = (
            softmax(raw_SO) if target.classes else raw_SO[:, 0] * target.sd + target.mean
        )
    return predicted


class _Net(nn.Module):
    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, HIDDEN)
        self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.out = nn.Linear(HIDDEN, outputs)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x_BTF: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden_BTH, state = self.gru(self.dropout(nnf.relu(self.linear(x_BTF))), state)
        return self.out(self.dropout(hidden_BTH)), state


@dataclass(frozen=True)
class _Reader:
    """Standardised features of consecutive bins, and what is observed live; what was not recorded
    counts as empty.
    """

    binned: BinnedSession
    widths: tuple[int, ...]
    scaler: Scaler
    shown_TG: NDArray[np.float32]
    spikes: bool

    def __call__(self, first: int, stop: int) -> Tensor:
        read = [self.binned.cut(self.shown_TG, first, stop)]
        if self.spikes:
            parts = blocks(self.binned, np.arange(first, stop), self.widths)
            read.append(np.concatenate([self.scaler(x_TF) for _, x_TF in parts]))
        return torch.from_numpy(np.concatenate(read, axis=1))


def _observed(
    binned: BinnedSession, names: Sequence[str], classes: Mapping[str, int]
) -> NDArray[np.float32]:
    """Values of live behaviours, in sds or one column per class, and whether they are known."""
    columns: list[NDArray] = [np.zeros((binned.bins, 0))]
    for name in names:
        m = column(binned, name)
        known_T, value_T = binned.shown_TM[:, m], binned.values_TM[:, m]
        train_T = known_T & binned.of_split("train")
        if name in classes:
            said_TC = np.eye(classes[name])[value_T.astype(int)]
        else:
            fitted = value_T[train_T]
            mean, sd = (fitted.mean(), fitted.std()) if len(fitted) else (0.0, 1.0)
            said_TC = ((value_T - mean) / max(float(sd), 1e-6))[:, None]
        columns += [np.where(known_T[:, None], said_TC, 0), known_T[:, None]]
    return np.concatenate(columns, axis=1).astype(np.float32)


def _targets(
    binned: BinnedSession, names: Sequence[str], classes: Mapping[str, int]
) -> list[Target]:
    if not names:
        raise ConfigError(f"{binned.session.id}: no behaviour to decode; name one or more")
    targets, start = [], 0
    for name in names:
        m, count = column(binned, name), classes.get(name, 0)
        train, _ = fitting_bins(binned, binned.scored_TM[:, m])
        value_T = binned.values_TM[train, m].astype(np.float64)
        outputs = slice(start, start + max(count, 1))
        sd = max(float(value_T.std()), 1e-6)
        targets.append(Target(m, outputs, count, float(value_T.mean()), sd))
        start = outputs.stop
    return targets


# -- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Starts:
    """Draws where the windows of a step begin."""

    rng: np.random.Generator
    window: int

    def draw(self, asked_S: NDArray[np.int64]) -> NDArray[np.int64]:
        """First bins of windows that score one of the bins asked, each as likely."""
        batch = max(1, round(BINS / self.window))
        return self.rng.choice(asked_S, batch) - self.rng.integers(LEAD, self.window, batch)


def _train(
    net: _Net,
    read: _Reader,
    targets: list[Target],
    fitted: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    starts: _Starts,
    steps: int | None = None,
) -> tuple[_Net, int]:
    """The average of the weights that was best on validation, or after so many steps; and steps."""
    train, val = (_asked(read.binned, [of[which] for of in fitted]) for which in (0, 1))
    train_S, stretches = np.flatnonzero(train.any(axis=1)), _stretches(read, val)
    optimiser = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    average = copy.deepcopy(net).eval().requires_grad_(False)
    best, best_step, best_loss, worse = copy.deepcopy(average), 0, np.inf, 0
    for step in range(1, (MOST_STEPS if steps is None else steps) + 1):
        start_B = starts.draw(train_S)
        out_BTO, _ = net(torch.stack([read(a, a + starts.window) for a in start_B.tolist()]))
        at_BT = start_B[:, None] + np.arange(LEAD, starts.window)
        loss = _loss(out_BTO[:, LEAD:].flatten(0, 1), at_BT.ravel(), read.binned, targets, train)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), net.parameters(), strict=True):
                kept.lerp_(new, 1.0 - min(AVERAGE, step / (step + 10)))
        if step % VALIDATE_EVERY or steps is not None:
            continue
        with torch.no_grad():
            out_SO = torch.cat([average(x_TF[None])[0][0, -len(at) :] for at, x_TF in stretches])
        at_S = np.concatenate([at for at, _ in stretches])
        val_loss = float(_loss(out_SO, at_S, read.binned, targets, val))
        worse = 0 if val_loss < best_loss else worse + 1
        if worse == 0:
            best, best_step, best_loss = copy.deepcopy(average), step, val_loss
        elif worse == PATIENCE:
            break
    return (best, best_step) if steps is None else (average, steps)


def _asked(binned: BinnedSession, bins_of: list[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """Which targets are asked for at which bins, shape (bins, targets)."""
    asked = np.zeros((binned.bins, len(bins_of)), bool)
    for k, bins in enumerate(bins_of):
        asked[bins, k] = True
    return asked


def _stretches(read: _Reader, asked: NDArray[np.bool_]) -> list[tuple[NDArray[np.int64], Tensor]]:
    """Runs of bins that are asked for, and features of them and of what leads up to them."""
    wanted = np.flatnonzero(asked.any(axis=1))
    runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > VALIDATION_LEAD) + 1)
    return [
        (np.arange(run[0], run[-1] + 1), read(int(run[0]) - VALIDATION_LEAD, int(run[-1]) + 1))
        for run in runs
    ]


def _loss(
    out_SO: Tensor,
    at_S: NDArray[np.int64],
    binned: BinnedSession,
    targets: list[Target],
    asked: NDArray[np.bool_],
) -> Tensor:
    """Sum over behaviours of the mean over their bins: squared error in sd, or cross-entropy."""
    inside_S = (at_S >= 0) & (at_S < binned.bins)
    at_S = np.clip(at_S, 0, binned.bins - 1)
    total = out_SO.new_zeros(())
    for k, target in enumerate(targets):
        use_S = np.flatnonzero(asked[at_S, k] & inside_S)
        if len(use_S) == 0:
            continue
        guess, value = out_SO[use_S, target.outputs], binned.values_TM[at_S[use_S], target.m]
        if target.classes:
            total = total + nnf.cross_entropy(guess, torch.from_numpy(value.astype(np.int64)))
        else:
            z_S = torch.from_numpy((value - target.mean) / target.sd).float()
            total = total + nnf.mse_loss(guess[:, 0], z_S)
    return total


# -- decoding ------------------------------------------------------------------------------------


@torch.no_grad()
def _carry(net: _Net, read: _Reader, bins: NDArray[np.int64]) -> NDArray[np.float64]:
    """Outputs at bins in any order; the state is carried from the first bin of the session."""
    out_SO = np.zeros((len(bins), net.out.out_features))
    state, order = None, np.argsort(bins, kind="stable")
    stop = int(bins.max()) + 1 if len(bins) else 0
    for first in range(0, stop, BLOCK):
        out_BTO, state = net(read(first, min(first + BLOCK, stop))[None], state)
        low, high = np.searchsorted(bins[order], [first, first + BLOCK])
        part = order[low:high]
        out_SO[part] = out_BTO[0].numpy()[bins[part] - first]
    return out_SO
