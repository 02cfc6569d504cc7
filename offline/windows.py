"""A session on the grid of bins: targets, splits, and windows binned on the fly.

Counts come from the runtime's own kernel, so the trainer cannot disagree with the rig about a bin.
Bins are counted from sample 0: what lies before it is in none.

Shape suffixes: B windows of a batch, T bins, M modalities (0 is spikes), N units, K intervals or
trials.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from offline.config import BehaviourConfig, DataConfig
from rt_neds.clock import samples_per_bin
from rt_neds.errors import SessionError
from rt_neds.model.readout import Behaviour
from rt_neds.session import Session
from rt_neds.stream.binner import as_pairs, count_spikes

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
MOST_OTHER_VALUES = 0.2
"""Share of a behaviour's values that may be of no class while some class never occurs."""

FLOAT32 = 1e-7
"""Part of a number that may be lost where it is kept in float32."""
MOST_BINS = 100_000_000
"""From 0 on; three weeks of bins of 20 ms. More are taken only if they were recorded."""


@dataclass
class BinnedSession:
    """A session seen through bins.

    Attributes
    ----------
    session : Session
    width : int
        Samples per bin.
    values_TM : ndarray of float32
        Behaviours in physical units, or class numbers; column 0 (spikes) is zero.
    shown_TM : ndarray of bool
        Where a modality may be shown: spikes where the whole bin was recorded, a trial variable
        only once an observer could know it.
    scored_TM : ndarray of bool
        Where it may be asked for.
    split_T : ndarray of int8
        0 train, 1 val, 2 test; -1 for gaps and what is not used.
    trial_T : ndarray of int32
        Number of the trial whose scored stretch holds the bin; -1 for none.
    present : tuple of str
        Behaviours this session has.
    by_trial : tuple of str
        Those of them that have one value in each trial.
    """

    session: Session
    width: int
    values_TM: NDArray[np.float32]
    shown_TM: NDArray[np.bool_]
    scored_TM: NDArray[np.bool_]
    split_T: NDArray[np.int8]
    trial_T: NDArray[np.int32]
    present: tuple[str, ...]
    by_trial: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._samples_S = self.session.records_S["sample"]
        self._rows_U = np.arange(len(self.session.unit_ids), dtype=np.int32)

    @property
    def bins(self) -> int:
        return len(self.split_T)

    def counts_TN(self, first: int, stop: int, later: int = 0) -> NDArray[np.float32]:
        """Counts of bins ``[first, stop)`` of the grid moved ``later`` samples on.

        Bins before 0 and after the end are empty.
        """
        start, end = first * self.width + later, stop * self.width + later
        low, high = self._records(start, end)
        ring_TC = np.zeros((stop - first, len(self._rows_U) + 2), np.float32)
        if high > low:
            shifted_S2 = as_pairs(self.session.records_S[low:high]).copy()
            shifted_S2[:, 0] -= start  # the ring's rows are bin % rows: start at zero
            count_spikes(shifted_S2, self._rows_U, ring_TC, 0, stop - first, self.width)
        return ring_TC[:, :-2]

    def _records(self, start: int, end: int) -> tuple[int, int]:
        """Rows of the spikes in samples ``[start, end)``, none of them before 0."""
        # Bisection looks at a few of them; searchsorted would first copy all, be they on disk.
        return bisect_left(self._samples_S, max(start, 0)), bisect_left(self._samples_S, end)

    def spikes_N(self, first: int, stop: int) -> NDArray[np.int64]:
        """Spikes of each unit in bins ``[first, stop)``."""
        low, high = self._records(first * self.width, stop * self.width)
        return np.bincount(self.session.records_S["unit"][low:high], minlength=len(self._rows_U))

    def cut(self, array_T: NDArray, first: int, stop: int) -> NDArray:
        """Rows ``[first, stop)`` of a per-bin array, zero (False) outside the session."""
        out = np.zeros((stop - first, *array_T.shape[1:]), array_T.dtype)
        low, high = max(first, 0), min(stop, self.bins)
        if high > low:
            out[low - first : high - first] = array_T[low:high]
        return out

    def trial_of(self, name: str, bins_S: NDArray[np.int64]) -> NDArray[np.int64]:
        """Trial in which a behaviour is decided in each bin; -1 if each is a case of its own."""
        if name not in self.by_trial:
            return np.full(len(bins_S), -1, np.int64)
        return self.trial_T[bins_S].astype(np.int64)

    def of_split(self, split: Split) -> NDArray[np.bool_]:
        """Bins of a split, shape (bins,)."""
        return self.split_T == SPLITS.index(split)

    def spans(self, split: Split) -> list[tuple[int, int]]:
        """Runs of consecutive bins of a split, as ``[first, stop)``."""
        inside = np.concatenate([[0], self.of_split(split).astype(np.int8), [0]])
        edges = np.flatnonzero(np.diff(inside))
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def bin_session(
    session: Session,
    data: DataConfig,
    behaviour_configs: dict[str, BehaviourConfig],
    *,
    require: bool = True,
    spikes_alone: bool = False,
) -> BinnedSession:
    """Put a session on the grid of bins.

    Parameters
    ----------
    session : Session
    data : DataConfig
    behaviour_configs : dict of str to BehaviourConfig
    require : bool
        Whether a behaviour that the file lacks is an error, or simply absent.
    spikes_alone : bool
        Whether it is fine if all of them are absent.

    Returns
    -------
    BinnedSession

    Raises
    ------
    SessionError
        If a behaviour, a trial column or the intervals of the split are not in the file, or its
        clock began long before the recording.
    """
    width = samples_per_bin(data.bin_ms, session.rate)
    bins = -(-session.end // width)
    _refuse_another_clock(session, bins, width)
    modalities = 1 + len(behaviour_configs)
    values_TM = np.zeros((bins, modalities), np.float32)
    shown_TM = np.zeros((bins, modalities), bool)
    scored_TM = np.zeros((bins, modalities), bool)
    trial_T = np.full(bins, -1, np.int32)
    shown_TM[:, 0] = scored_TM[:, 0] = _whole_bins(session.domain_K2, bins, width)
    present = []
    for m, (name, config) in enumerate(behaviour_configs.items(), start=1):
        if not require and not all(session.has(source) for source in config.sources):
            continue
        present.append(name)
        if config.is_trial_variable:
            value, shown, scored, trial = _trial_variable(session, config, bins, width)
            trial_T = np.where(trial >= 0, trial, trial_T)
        else:
            value, shown = _continuous(session, config, bins, width)
            scored = shown
        values_TM[:, m], shown_TM[:, m], scored_TM[:, m] = value, shown, scored
    if not present and not spikes_alone:
        raise SessionError(
            f"{session.path} has none of {', '.join(behaviour_configs)}; "
            f"it has: {', '.join(session.behaviours()) or 'no behaviour'}"
        )
    split_T = _of_whole_trials(split_bins(session, data, bins, width), trial_T)
    by_trial = tuple(name for name in present if behaviour_configs[name].is_trial_variable)
    return BinnedSession(
        session, width, values_TM, shown_TM, scored_TM, split_T, trial_T, tuple(present), by_trial
    )


def behaviours_of(configs: dict[str, BehaviourConfig]) -> list[Behaviour]:
    """What the model decodes, from what the configuration asks."""
    return [
        Behaviour(name=name, kind=c.kind, classes=tuple(c.classes), unit=c.unit, live=c.live)
        for name, c in configs.items()
    ]


def _refuse_another_clock(session: Session, bins: int, width: int) -> None:
    """Seconds since 1970, say, would be more bins than there is memory for, nearly all empty."""
    recorded = int(np.diff(session.domain_K2, axis=1).sum()) // width
    if bins > MOST_BINS and bins > 100 * recorded:
        raise SessionError(
            f"{session.path} begins at {session.domain_K2[0, 0] / session.rate:.4g} s; seconds "
            "since its own beginning were expected: subtract the time at which it begins"
        )


def _whole_bins(domain_K2: NDArray[np.int64], bins: int, width: int) -> NDArray[np.bool_]:
    inside = np.zeros(bins, bool)
    for start, end in np.maximum(domain_K2, 0):
        inside[-(-start // width) : end // width] = True
    return inside


def _right_edge_in(domain_K2: NDArray[np.int64], bins: int, width: int) -> NDArray[np.bool_]:
    """Bins whose last moment lies in ``(start, end]`` of an interval."""
    inside = np.zeros(bins, bool)
    for start, end in np.maximum(domain_K2, 0):
        inside[start // width : end // width] = True
    return inside


def _continuous(
    session: Session, config: BehaviourConfig, bins: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Value at each bin: the last sample at or before its right edge, so nothing is known early."""
    edges_T = np.arange(1, bins + 1) * width
    columns, valid = [], np.ones(bins, bool)
    for source in config.sources:
        series = session.series(source)
        last = np.searchsorted(series.samples_L, edges_T, side="right") - 1
        value = series.values_L[np.maximum(last, 0)]
        valid &= _right_edge_in(series.domain_K2, bins, width) & (last >= 0) & np.isfinite(value)
        columns.append(np.where(valid, value, 0.0))
    if config.transform == "speed":
        value = _speed(np.stack(columns, axis=1), valid, width / session.rate, config.tau_s)
    else:
        value = columns[0]
    if config.kind == "categorical":  # classes are counted in their order, whatever stands for them
        _refuse_other_values(session, value[valid], config)
        number_T, known_T = _classes(value, config)
        return number_T.astype(np.float32), valid & known_T
    if config.kind == "poisson" and (least := value[valid].min(initial=0.0)) < 0:
        raise SessionError(
            f"{session.path}: {config.sources[0]} goes down to {least:g}; a count, or a rate, was "
            'expected of kind = "poisson": use "continuous" for what can be negative'
        )
    return value.astype(np.float32), valid


def _classes(
    stored: NDArray[np.float64], config: BehaviourConfig
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Number of the class nearest to each value, and whether that is what it stands for.

    Files often keep numbers in float32, in which there is no 0.2 but only something very near it.
    """
    codes = np.array(list(config.classes.values()))
    number = np.abs(stored[..., None] - codes).argmin(axis=-1)
    return number, np.isclose(stored, codes[number], rtol=FLOAT32, atol=0.0)


def _refuse_other_values(
    session: Session, stored: NDArray[np.float64], config: BehaviourConfig
) -> None:
    """SessionError if classes stand for other values than those that are there.

    A few values may be of no class (no choice was made), and a class may not have come up yet: but
    not both, and many of them.
    """
    stored = stored[np.isfinite(stored)]
    number, known = _classes(stored, config)
    absent = set(range(len(config.classes))) - set(number[known].tolist())
    if len(stored) and absent and np.mean(~known) > MOST_OTHER_VALUES:
        named = ", ".join(f"{name} = {value:g}" for name, value in config.classes.items())
        there = ", ".join(f"{value:g}" for value in np.unique(stored)[:5])
        raise SessionError(
            f"{session.path}: {config.sources[0]} is {there}; classes {named} were expected: name "
            "the values that are there"
        )


def _speed(
    position_TX: NDArray[np.float64], valid_T: NDArray[np.bool_], dt: float, tau: float
) -> NDArray[np.float64]:
    """Length of the step per second of a one-sided exponential average, restarted at each run."""
    speed_T = np.zeros(len(position_TX))
    alpha = 1.0 - np.exp(-dt / tau)
    smooth = None
    for t in range(len(position_TX)):
        if not valid_T[t]:
            smooth = None
            continue
        before = position_TX[t] if smooth is None else smooth
        smooth = before + alpha * (position_TX[t] - before)
        speed_T[t] = np.linalg.norm(smooth - before) / dt
    return speed_T


def _trial_variable(
    session: Session, config: BehaviourConfig, bins: int, width: int
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    stored = session.numbers(config.sources[0])
    _refuse_other_values(session, stored, config)
    columns = (*config.scored, config.known_from, "end")
    seconds_4K = np.stack([session.numbers(f"trials.{column}") for column in columns])
    told_4K = np.isfinite(seconds_4K)
    start, stop, known, end = np.maximum(session.samples(seconds_4K), 0)
    value_T = np.zeros(bins, np.float32)
    shown_T, scored_T = np.zeros(bins, bool), np.zeros(bins, bool)
    trial_T = np.full(bins, -1, np.int32)
    number_K, known_K = _classes(stored, config)
    for trial in np.argsort(start, kind="stable"):
        if not known_K[trial] or not told_4K[:2, trial].all():
            continue
        number = number_K[trial]
        scored = slice(start[trial] // width, stop[trial] // width)
        value_T[scored] = number
        scored_T[scored] = True
        trial_T[scored] = trial
        shown_T[scored] = False  # what is known there is of the trial before, not of this one
        if told_4K[2, trial]:
            # Known at a moment: shown from the first bin that ends after it.
            shown = slice(known[trial] // width, end[trial] // width)
            value_T[shown] = number
            shown_T[shown] = True
    return value_T, shown_T, scored_T, trial_T


def split_bins(session: Session, data: DataConfig, bins: int, width: int) -> NDArray[np.int8]:
    """Which split each bin belongs to; pieces are contiguous in time, with a gap between them."""
    split_T = np.full(bins, -1, np.int8)
    for code, intervals_K2 in enumerate(_split_intervals(session, data)):
        for start, end in np.maximum(intervals_K2, 0):
            split_T[-(-start // width) : end // width] = code
    if data.refit:
        split_T[split_T == SPLITS.index("val")] = SPLITS.index("train")
    if data.train_minutes:
        train = np.flatnonzero(split_T == 0)
        last = round(data.train_minutes * 60 * session.rate / width)
        split_T[train[: max(0, len(train) - last)]] = -1
    return split_T


def _of_whole_trials(split_T: NDArray[np.int8], trial_T: NDArray[np.int32]) -> NDArray[np.int8]:
    """The same without trials that lie in two splits: their one value would be known in both."""
    at = np.flatnonzero((trial_T >= 0) & (split_T >= 0))
    first_K = np.full(trial_T.max(initial=-1) + 1, len(SPLITS), np.int8)
    last_K = np.full(len(first_K), -1, np.int8)
    np.minimum.at(first_K, trial_T[at], split_T[at])
    np.maximum.at(last_K, trial_T[at], split_T[at])
    cut_K = first_K < last_K
    split_T[at[cut_K[trial_T[at]]]] = -1
    return split_T


def _split_intervals(session: Session, data: DataConfig) -> list[NDArray[np.int64]]:
    if data.split == "time":
        return _time_split(session, data)
    if data.split == "trials":
        return _trial_folds(session, data)
    named = [f"{data.split}_{name}_domain" for name in SPLITS]
    if not session.has(named[0]):
        raise SessionError(
            f'{session.path}: data.split = "{data.split}" stands for a split that the file itself '
            f"names ({named[0]} and so on), and it names none so; set data.split to time or trials"
        )
    if not session.has(named[-1]):  # pretraining has nothing to test: its files name no such domain
        return [*map(session.intervals, named[:-1]), np.zeros((0, 2), np.int64)]
    return [session.intervals(name) for name in named]


def _time_split(session: Session, data: DataConfig) -> list[NDArray[np.int64]]:
    """Cut recorded time (not wall time: recordings can have holes) by the fractions."""
    lengths = np.diff(session.domain_K2, axis=1)[:, 0]
    cuts = np.concatenate([[0.0], np.cumsum(data.fractions)]) * lengths.sum()
    gap = round(data.gap_s * session.rate)
    before = np.concatenate([[0], np.cumsum(lengths)])
    pieces = []
    for code in range(3):
        low = cuts[code] + (gap if code else 0)
        kept = []
        for (start, end), done in zip(session.domain_K2, before, strict=False):
            a, b = start + max(0, low - done), min(end, start + cuts[code + 1] - done)
            if b > a:
                kept.append((a, b))
        pieces.append(np.array(kept, dtype=np.float64).reshape(-1, 2).astype(np.int64))
    return pieces


def _trial_folds(session: Session, data: DataConfig) -> list[NDArray[np.int64]]:
    """Contiguous folds of trials; what lies between two folds belongs to neither."""
    trials_K2 = session.intervals("trials")
    trials_K2 = trials_K2[np.argsort(trials_K2[:, 0], kind="stable")]
    if len(trials_K2) < data.folds:
        raise SessionError(
            f"{session.path}: {len(trials_K2)} trials cannot make {data.folds} folds; lower folds"
        )
    pieces: list[list[tuple[int, int]]] = [[], [], []]
    code_of = {data.fold: 2, (data.fold + 1) % data.folds: 1}
    for index, fold in enumerate(np.array_split(trials_K2, data.folds)):
        pieces[code_of.get(index, 0)].append((fold[0, 0], fold[-1, 1]))
    return [np.array(piece, dtype=np.int64).reshape(-1, 2) for piece in pieces]
