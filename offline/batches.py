"""Sessions on their way through training: where windows may lie, and batches of them.

Shape suffixes: B windows, T bins, M modalities (0 is spikes), N units.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.config import TrainConfig
from offline.masking import draw_masks
from offline.predict import normalise, scales
from offline.windows import BinnedSession, bin_session
from rt_neds.errors import ConfigError
from rt_neds.model.readout import Scale
from rt_neds.session import load_session


@dataclass
class Subject:
    """One session on its way through training: its bins, scales, and where windows may lie."""

    binned: BinnedSession
    scales: list[Scale]
    anchors: NDArray[np.int64]

    @property
    def id(self) -> str:
        return self.binned.session.id


@dataclass
class Batch:
    """Windows of one session, ready for the network, with what is asked of it."""

    session: str
    counts_BTN: Tensor
    inputs_BTM: Tensor
    targets_BTM: Tensor
    observed_BTM: Tensor
    asked_BTM: Tensor
    scheme_B: Tensor
    missing_BN: Tensor


def prepare(path: str | Path, config: TrainConfig) -> Subject:
    """Read a session, put it on the grid, and find where training windows may lie."""
    binned = bin_session(load_session(path), config.data, config.behaviour)
    kinds = [c.kind for c in config.behaviour.values()]
    in_train = binned.of_split("train")
    anchors = np.flatnonzero(in_train & binned.scored_TM[:, 1:].any(axis=1))
    if len(anchors) == 0:
        raise ConfigError(
            f"{path}: no behaviour is scored in the training split "
            f"(data.split = {config.data.split!r}); choose another split"
        )
    return Subject(binned, scales(binned, list(config.behaviour), kinds), anchors)


def refuse_twins(subjects: list[Subject]) -> None:
    """Each session may be given once."""
    ids = [subject.id for subject in subjects]
    for name in ids:
        if ids.count(name) > 1:
            raise ConfigError(f"session {name} is given twice; give each session once")


def draw_batch(
    subjects: list[Subject], config: TrainConfig, rng: np.random.Generator, device: torch.device
) -> Batch:
    """Windows of one session, and what is hidden in them.

    Sessions are drawn by the square root of their length: long ones must not drown short ones.
    A window covers a random training bin at a random place. Spikes are shown wherever recorded;
    behaviours only inside the training split, and nothing outside it is ever asked for.
    """
    share = np.sqrt([len(subject.anchors) for subject in subjects])
    subject = subjects[rng.choice(len(subjects), p=share / share.sum())]
    binned, T = subject.binned, config.data.window_bins
    anchors = rng.choice(subject.anchors, size=config.training.batch)
    firsts = anchors - rng.integers(0, T, size=len(anchors))

    def windows(array: NDArray) -> NDArray:
        return np.stack([binned.cut(array, first, first + T) for first in firsts])

    counts_BTN = np.stack([binned.counts_TN(first, first + T) for first in firsts])
    train_BT1 = windows(binned.of_split("train"))[:, :, None]
    shown_BTM, scored_BTM = windows(binned.shown_TM), windows(binned.scored_TM) & train_BT1
    shown_BTM[:, :, 1:] &= train_BT1
    masks = draw_masks(config.masking, shown_BTM, scored_BTM, counts_BTN.shape[2], rng)
    values_BTM = windows(binned.values_TM)

    def tensor(array: NDArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Batch(
        session=subject.id,
        counts_BTN=tensor(counts_BTN),
        inputs_BTM=tensor(normalise(values_BTM, subject.scales).astype(np.float32)),
        targets_BTM=tensor(values_BTM),
        observed_BTM=tensor(masks.observed_BTM),
        asked_BTM=tensor(masks.asked_BTM),
        scheme_B=tensor(masks.scheme_B),
        missing_BN=tensor(masks.missing_BN),
    )
