"""Our network as a method of the Steinmetz protocols: from scratch, or after other sessions.

It decides at every bin, so one network answers for 100, 200, 300 and 400 ms: its answer at a time
is what it says in the last bin before it. Trials are laid a second apart, further than it sees.

Shape suffixes: K trials, T bins of a trial, N units, S spikes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from steinmetz_trials import BIN_S, Trials
from temporaldata import ArrayDict, Data, Interval, IrregularTimeSeries

from offline.config import TrainConfig
from offline.linear import IMAGINED
from offline.predict import decode_spans
from offline.train import train
from offline.windows import bin_session
from rt_neds.bundle import build_model, load_spec
from rt_neds.config import config_path, load_config
from rt_neds.session import load_session

EVERY_S = 1.0
PRETRAINING_STEPS = 800
RIGHT = 1
"""Its place among the classes."""


Load = Callable[[Path], Trials]
"""A session's trials as the network is to see them: those of a task may be cut shorter."""


def config_of(*changes: str) -> TrainConfig:
    return load_config(config_path("steinmetz.toml"), TrainConfig, list(changes))


def write_trials(
    path: Path, name: str, counts_KTN: NDArray, side_K: NDArray, splits: dict[str, NDArray]
) -> None:
    """A session file of these trials, each a second after the one before.

    ``splits`` says which trials are train, val and test.
    """
    K, T, N = counts_KTN.shape
    at = np.nonzero(counts_KTN)
    k_S, t_S, n_S = (np.repeat(along, counts_KTN[at].astype(int)) for along in at)
    start_K = np.arange(K) * EVERY_S
    end_K = start_K + T * BIN_S
    trials = Interval(start_K, end_K, movement=side_K.astype(np.int64), timekeys=["start", "end"])
    data = Data(
        spikes=IrregularTimeSeries(
            timestamps=k_S * EVERY_S + (t_S + 0.5) * BIN_S,
            unit_index=n_S,
            domain=Interval(start_K, end_K),
        ),
        units=ArrayDict(id=np.array([f"{name}/{n}" for n in range(N)])),
        session=Data(id=name),
        trials=trials,
        domain=Interval(start_K, end_K),
        **{
            f"task_{split}_domain": Interval(start_K[which], end_K[which])
            for split, which in splits.items()
        },
    )
    with h5py.File(path, "w") as file:
        data.to_hdf5(file)


@lru_cache
def pretrained(past: tuple[Path, ...], load: Load, seed: int) -> Path:
    """A bundle of past sessions, the last fifth of each its validation."""
    folder = Path(tempfile.mkdtemp(prefix="steinmetz-"))
    paths = []
    for trials in map(load, past):
        order = np.arange(len(trials))
        cut = round(0.8 * len(order))
        path = folder / f"{trials.path.stem}.h5"
        splits = {"train": order[:cut], "val": order[cut:]}
        write_trials(path, trials.path.stem, trials.counts_KTN, trials.side_K, splits)
        paths.append(str(path))
    changes = (f"training.steps={PRETRAINING_STEPS}", "training.validate_every=100")
    config = config_of(*changes, f"training.seed={seed}")
    return Path(train(config, paths, folder / "run")["bundle"])


SEES_LATER = ("model.attention=full", "masking.ahead=false")
"""The same network seeing all of its window, later bins too; it cannot be asked ahead."""

_scores: dict[tuple[Any, ...], NDArray[np.float64]] = {}


def scores_KT(
    task: Any, load: Load, *, after_past: bool, changes: tuple[str, ...] = ()
) -> NDArray[np.float64]:
    """Score of every test trial at every bin: -1 surely left, +1 surely right, at equal odds.

    ``changes`` are made to the configuration.
    """
    past = tuple(trials.path for trials in task.past) if after_past else ()
    whole = load(task.test.path)
    place = {int(index): row for row, index in enumerate(whole.index_K)}
    train_K, test_K = (
        np.array([place[int(i)] for i in trials.index_K], int) for trials in (task.train, task.test)
    )
    if task.validation is None:
        cut = max(1, round(0.85 * len(train_K)))
        train_K, val_K = train_K[:cut], train_K[cut:]
    else:
        val_K = np.array([place[int(i)] for i in task.validation.index_K], int)
    bins = whole.counts_KTN.shape[1]
    changes = (*changes, f"training.seed={task.seed}")
    key = (task.test.path, tuple(train_K), tuple(test_K), bool(past), bins, changes)
    if key not in _scores:
        init = pretrained(past, load, task.seed) if past else None
        logit_KT = _trained(whole, train_K, val_K, test_K, init, changes)
        _scores[key] = at_equal_odds(logit_KT, whole.side_K[train_K])
    return _scores[key]


def at_equal_odds(logit_KT: NDArray[np.float64], side_K: NDArray) -> NDArray[np.float64]:
    """Scores without the odds that the labels alone give; the regressions weigh classes alike, too.

    Eight labels of which six are right are no reason to decide for right. The odds are those that a
    network begins with (decision 0027), which are in its logits before they are calibrated.
    """
    right, left = (np.count_nonzero(side_K == side) for side in (1, -1))
    if right and left:
        logit_KT = logit_KT - np.log((right + IMAGINED) / (left + IMAGINED))
    return np.tanh(logit_KT / 2)


def _trained(
    whole: Trials,
    train_K: NDArray,
    val_K: NDArray,
    test_K: NDArray,
    init: Path | None,
    changes: tuple[str, ...],
) -> NDArray[np.float64]:
    """Logits of right, of every test trial and bin, not calibrated."""
    side_K = whole.side_K
    if len(np.unique(side_K[train_K])) < 2:
        return np.zeros((len(test_K), whole.counts_KTN.shape[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.h5"
        splits = {"train": train_K, "val": val_K, "test": test_K}
        write_trials(path, whole.path.stem, whole.counts_KTN, side_K, splits)
        tuning = ["training.frozen_steps=60", "training.trunk_rate=0.3"] if init else []
        config = config_of(*tuning, *changes)
        summary = train(config, [str(path)], Path(folder) / "run", init=init)
        bundle = summary["bundle"]
        binned = bin_session(load_session(path), config.data, config.behaviour)
        model = build_model(bundle, load_spec(bundle))
        T, every = whole.counts_KTN.shape[1], round(EVERY_S / BIN_S)
        spans = [(int(k) * every, int(k) * every + T) for k in test_K]
        window = config.data.window_bins
        raw_SC = decode_spans(model, binned, spans, wanted=["side"], window=window)["side"]
    # As it was before it was calibrated, which divided all by a temperature, odds too.
    temperature = next(iter(summary["temperature"].values()), {}).get("side", 1.0)
    logit_S = temperature * (raw_SC[:, RIGHT] - raw_SC[:, 1 - RIGHT])
    return logit_S.reshape(len(test_K), T).astype(float)
