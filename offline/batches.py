"""Sessions on their way through training: where windows may lie, and batches of them.

Shape suffixes: B windows, T bins, M modalities (0 is spikes), N units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offline.config import TrainConfig
from offline.expectation import mean_counts_N
from offline.linear import Fits
from offline.masking import Masks, draw_masks
from offline.predict import normalise, scales
from offline.windows import SPLITS, BinnedSession, bin_session
from rt_neds.errors import ConfigError
from rt_neds.model.neds import AHEAD, SPIKES
from rt_neds.model.readout import Scale
from rt_neds.session import load_session

LEAST_RATE = 0.1
"""Share of the mean rate that is added to each unit's when its loss is divided by it."""


@dataclass
class Subject:
    """One session on its way through training: what is small, and how to reach what is not.

    Attributes
    ----------
    id, units, rate
        As of the session.
    present : tuple of str
        Behaviours this session has.
    scales : list of Scale
        Of each behaviour of the configuration.
    region_N : ndarray of int64
    rate_N : ndarray of float64
        Spikes per recorded bin in the training split.
    length : int
        Number of anchors.
    reach : callable
        Gives the session on the grid, and the anchors: bins that training windows must touch.
    folder : path or None
        Where it is kept on disk, if it is.
    hear : callable or None
        Gives the linear decoders that training hears, if it hears any.
    """

    id: str
    units: list[str]
    rate: float
    present: tuple[str, ...]
    scales: list[Scale]
    region_N: NDArray[np.int64]
    rate_N: NDArray[np.float64]
    length: int
    reach: Callable[[], tuple[BinnedSession, NDArray[np.int64]]]
    folder: Path | None = None
    hear: Callable[[], Fits] | None = None

    @property
    def binned(self) -> BinnedSession:
        return self.reach()[0]


@dataclass
class Batch:
    """Windows of one session, ready for the network, with what is asked of it.

    ``share`` is the part of all that its step asks of an output which is asked here.
    """

    session: str
    scales: list[Scale]
    rate_N: Tensor
    counts_BTN: Tensor
    inputs_BTM: Tensor
    targets_BTM: Tensor
    observed_BTM: Tensor
    asked_BTM: Tensor
    asked_BN: Tensor
    scheme_B: Tensor
    missing_BN: Tensor
    ahead_BT: Tensor
    fits: tuple[Tensor, Tensor, Tensor] | None
    share: dict[str, float]


def prepare(path: str | Path, config: TrainConfig) -> Subject:
    """Read a session, put it on the grid, and find where training windows may lie.

    A session may lack behaviours; if it lacks all, the schemes of spikes alone must be in use.
    """
    binned = bin_session(
        load_session(path),
        config.data,
        config.behaviour,
        require=False,
        spikes_alone=config.masking.of_spikes,
    )
    session, kinds = binned.session, [c.kind for c in config.behaviour.values()]
    in_train = binned.of_split("train")
    asked_of = slice(1, None) if binned.present else slice(0, 1)
    anchors = np.flatnonzero(in_train & binned.scored_TM[:, asked_of].any(axis=1))
    if len(anchors) == 0:
        raise ConfigError(
            f"{path}: nothing is scored in the training split (data.split = {config.data.split!r})"
            "; choose another split, or look whether values are known there, and among the classes"
        )
    return Subject(
        id=session.id,
        units=session.unit_ids,
        rate=session.rate,
        present=binned.present,
        scales=scales(binned, list(config.behaviour), kinds),
        region_N=regions(binned, config),
        rate_N=mean_counts_N(binned),
        length=len(anchors),
        reach=lambda: (binned, anchors),
    )


def regions(binned: BinnedSession, config: TrainConfig) -> NDArray[np.int64]:
    """Region of each unit, as a number; all alike where no scheme asks for regions."""
    if not config.masking.by_region:
        return np.zeros(len(binned.session.unit_ids), np.int64)
    names_N = binned.session.column(f"units.{config.masking.region}").astype(str)
    if len(np.unique(names_N)) < 2:
        raise ConfigError(
            f"{binned.session.path}: all units are of one region ({names_N[0]}); leave "
            "inter_region and intra_region out of masking.schemes, or name another masking.region"
        )
    return np.unique(names_N, return_inverse=True)[1].astype(np.int64)


def refuse_twins(subjects: list[Subject]) -> None:
    """Each session may be given once."""
    seen: dict[str, Subject] = {}
    for subject in subjects:
        if subject.id in seen:
            other_units = not set(subject.units) & set(seen[subject.id].units)
            raise ConfigError(
                f"session {subject.id} is given twice; "
                + (
                    "its units differ: merge the files into one, or give each its own session id"
                    if other_units
                    else "give each session once"
                )
            )
        seen[subject.id] = subject


@dataclass
class Draw:
    """Windows of one session, drawn but not yet binned, and what is hidden in them.

    ``firsts_B`` are bins of the grid; each window lies ``part_B`` of a bin later.
    """

    subject: Subject
    firsts_B: NDArray[np.int64]
    part_B: NDArray[np.float64]
    masks: Masks


def draw_windows(
    subjects: list[Subject], config: TrainConfig, rng: np.random.Generator, size: int
) -> Draw:
    """Windows of one session, and what is hidden in them.

    Sessions are drawn by the square root of their length: long ones must not drown short ones.
    A window covers a random training bin at a random place. Spikes are shown wherever recorded;
    behaviours only inside the training split, and nothing outside it is ever asked for.
    """
    share = np.sqrt([subject.length for subject in subjects])
    subject = subjects[rng.choice(len(subjects), p=share / share.sum())]
    (binned, anchors), T = subject.reach(), config.data.window_bins
    firsts_B = rng.choice(anchors, size=size) - rng.integers(0, T, size=size)

    # The grid of bins is ours, not the animal's: moving it by part of a bin makes new windows of
    # the same recording, and keeps the network from learning 26 minutes of counts by heart.
    part_B = rng.random(size)

    # A moved bin touches two of the grid; what it may show and be asked, both must allow.
    train_BT1 = both(_cut(binned, binned.split_T, firsts_B, T + 1) == SPLITS.index("train"))
    shown_BTM = both(_cut(binned, binned.shown_TM, firsts_B, T + 1))
    scored_BTM = both(_cut(binned, binned.scored_TM, firsts_B, T + 1)) & train_BT1[:, :, None]
    shown_BTM[:, :, 1:] &= train_BT1[:, :, None]
    live_M = np.array([False, *(behaviour.live for behaviour in config.behaviour.values())])
    masks = draw_masks(config.masking, shown_BTM, scored_BTM, subject.region_N, rng, live_M)
    return Draw(subject, firsts_B, part_B, masks)


def bin_windows(
    draw: Draw,
    rows: slice,
    config: TrainConfig,
    device: torch.device,
    asked_of_step: Mapping[str, int],
) -> Batch:
    """Some of the windows of a draw, binned and on the device."""
    binned, T, masks = draw.subject.binned, config.data.window_bins, draw.masks
    firsts_B, part_B = draw.firsts_B[rows], draw.part_B[rows]
    # Running sums look further back than the window; where spikes are hidden there is no past.
    past = max(config.model.history) - 1
    counts_BTN = np.stack(
        [
            binned.counts_TN(first - past, first + T, later=int(part * binned.width))
            for first, part in zip(firsts_B, part_B, strict=True)
        ]
    )
    counts_BTN[~masks.observed_BTM[rows, :, 0].any(axis=1), :past] = 0
    values = _cut(binned, binned.values_TM, firsts_B, T + 1)
    values_BTM = values[:, :-1].copy()
    for m, behaviour in enumerate(config.behaviour.values(), start=1):
        if behaviour.kind != "categorical":
            step_BT = values[:, 1:, m] - values[:, :-1, m]
            values_BTM[:, :, m] += part_B[:, None].astype(np.float32) * step_BT

    def tensor(array: NDArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Batch(
        session=draw.subject.id,
        scales=draw.subject.scales,
        rate_N=tensor(_bounded(draw.subject.rate_N)),
        counts_BTN=tensor(counts_BTN),
        inputs_BTM=tensor(normalise(values_BTM, draw.subject.scales).astype(np.float32)),
        targets_BTM=tensor(values_BTM),
        observed_BTM=tensor(masks.observed_BTM[rows]),
        asked_BTM=tensor(masks.asked_BTM[rows]),
        asked_BN=tensor(masks.asked_BN[rows]),
        scheme_B=tensor(masks.scheme_B[rows]),
        missing_BN=tensor(masks.missing_BN[rows]),
        ahead_BT=tensor(masks.ahead_BT[rows]),
        fits=None
        if draw.subject.hear is None
        else (
            (fits := draw.subject.hear()).weight_XUF.to(device),
            fits.bias_XU.to(device),
            tensor(_cut(binned, fits.fit_T, firsts_B, T).astype(np.int64)),
        ),
        share={
            name: entries / asked_of_step[name]
            for name, entries in asked_entries(masks, rows, config).items()
            if entries
        },
    )


def _bounded(rate_N: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rates to divide by: a unit that hardly fires says too little to weigh as much as the rest."""
    mean = max(float(rate_N.mean()), 1e-6)
    return (rate_N + LEAST_RATE * mean).astype(np.float32)


def asked_entries(masks: Masks, rows: slice, config: TrainConfig) -> dict[str, int]:
    """How many values are asked for of each output."""
    asked_BTM, units_B = masks.asked_BTM[rows], masks.asked_BN[rows].sum(axis=1)
    entries = {
        SPIKES: (asked_BTM[:, :, 0].sum(axis=1) * units_B).sum(),
        AHEAD: (masks.ahead_BT[rows].sum(axis=1) * units_B).sum(),
    }
    entries |= {name: asked_BTM[:, :, m].sum() for m, name in enumerate(config.behaviour, start=1)}
    return {name: int(count) for name, count in entries.items()}


@dataclass
class Step:
    """What one step of the optimiser learns from.

    Attributes
    ----------
    sessions : list of str
    asked : list of str
        Outputs of which anything is asked, here or in another process.
    batches : iterator of Batch
        This process's share of the windows, each batch binned when it is its turn.
    """

    sessions: list[str]
    asked: list[str]
    batches: Iterator[Batch]


def draw_step(
    subjects: list[Subject],
    config: TrainConfig,
    rng: np.random.Generator,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
) -> Step:
    """Draw the windows of a step, the same in every process, and take this one's share of them."""
    settings = config.training
    size = settings.batch // settings.sessions
    draws = [draw_windows(subjects, config, rng, size) for _ in range(settings.sessions)]
    asked: Counter[str] = Counter()
    for draw in draws:
        asked.update(asked_entries(draw.masks, slice(None), config))
    part = settings.batch // (processes * settings.accumulate)

    def batches() -> Iterator[Batch]:
        for turn in range(settings.accumulate):
            low = (turn * processes + process) * part
            for n, draw in enumerate(draws):
                rows = slice(max(low - n * size, 0), min(low + part - n * size, size))
                if rows.start < rows.stop:
                    yield bin_windows(draw, rows, config, device, asked)

    return Step(
        sessions=list(dict.fromkeys(draw.subject.id for draw in draws)),
        asked=[name for name, count in asked.items() if count],
        batches=batches(),
    )


def both(allowed_BT: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where a bin and the next one both allow it; one bin shorter."""
    return allowed_BT[:, :-1] & allowed_BT[:, 1:]


def _cut(
    binned: BinnedSession, array_T: NDArray, firsts_B: NDArray[np.int64], length: int
) -> NDArray:
    return np.stack([binned.cut(array_T, first, first + length) for first in firsts_B])
