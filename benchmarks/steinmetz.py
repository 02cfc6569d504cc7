"""Left or right? Choice from the first 400 ms of twelve Neuropixels sessions (Steinmetz 2019).

Go trials only; spikes in bins of 20 ms after the stimulus, contrasts are no input of the methods
that read spikes. Four protocols, each with spikes up to 100, 200, 300 and 400 ms:

    folds           each session by itself, contiguous fifths in trial order, scores pooled
    equal_contrast  the same scores on trials in which both contrasts were equal, sessions pooled
    transfer        sessions 10 to 12, contiguous 60/10/30 % of trials, after sessions 1 to 9; with
                    the last 8, 16, 32 or all trials of the 60 %. Sessions 10 and 11 are of the
                    mouse of 8 and 9, on later days; only session 12 is of a new one
    new_animal      the same of every session, after all sessions of the other three mice

    python benchmarks/steinmetz.py --data ../recordings/steinmetz --seeds 0 1 2

writes ``results/steinmetz.json``: protocol -> method -> [mean, sd over sessions] of the mean over
seeds; under ``by_seed`` what each seed of a method with several had, sessions averaged; under
``by_session`` what each session had, seeds averaged; under ``intervals`` 95 % intervals (test
trials drawn again) of differences between methods, also of their mean over the four lengths of
time; under ``between_sessions`` these differences' mean over sessions and its 95 % interval. Each
method's [mean, sd over seeds] goes into ``accuracy.json`` beside it. A further method is a function
from a task to scores and one line in METHODS.

Shape suffixes: K trials, T bins of a trial, N units, F features, R seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import steinmetz_network as network
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from steinmetz_scores import Scored, among_all, beside_others, summarise
from steinmetz_trials import BINS, Trials, load_trials

from offline.baselines.rrr import Standardised, rrr, rrr_of_basis
from rt_neds.result import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "steinmetz.json"
UNTIL_MS = (100, 200, 300, 400)
LABELLED = (8, 16, 32, None)
"""Labelled trials of a new session; None for all of the 60 %."""

PROTOCOLS = ("folds", "transfer", "new_animal")
"""What can be run; trials of equal contrast are scored with the folds."""

OUTER_FOLDS, INNER_FOLDS, PAST_SESSIONS = 5, 4, 9


@dataclass(frozen=True, eq=False)
class Task:
    """What a method may read.

    ``validation`` chooses settings; where it is None, folds of ``train`` do. The sides of ``test``
    are not to be read. ``past`` are other whole sessions, to pretrain on, some of them of the same
    animal on earlier days. ``seed`` is for methods that draw.
    """

    train: Trials
    validation: Trials | None
    test: Trials
    past: tuple[Trials, ...] = ()
    seed: int = 0


Scorer = Callable[[Trials], NDArray[np.float64]]
"""Trials to scores: about -1 for surely left, +1 for surely right, the decision at 0."""


# -- methods -------------------------------------------------------------------------------------


def majority(task: Task) -> NDArray[np.float64]:
    """Always the commoner side."""
    return np.full(len(task.test), 1.0 if task.train.side_K.mean() > 0 else -1.0)


def contrasts(task: Task) -> NDArray[np.float64]:
    """Logistic regression on what was on the screen, without a spike."""

    def fit(train: Trials, inverse_penalty: float) -> Scorer:
        return logistic_scorer(train, lambda trials: trials.contrast_K2, inverse_penalty)

    return chosen(task, fit, [(c,) for c in (0.1, 1.0, 10.0)])


def logistic(task: Task) -> NDArray[np.float64]:
    """Logistic regression on square roots of counts in parts of the time that may be read."""

    def fit(train: Trials, bins: int, inverse_penalty: float) -> Scorer:
        def features_of(trials: Trials) -> NDArray[np.float64]:
            edges = np.arange(0, trials.counts_KTN.shape[1], bins)
            summed_KTN = np.add.reduceat(trials.counts_KTN, edges, axis=1)
            return np.sqrt(summed_KTN, dtype=np.float64).reshape(len(trials), -1)

        return logistic_scorer(train, features_of, inverse_penalty)

    penalties = np.logspace(-5, 0, 6)
    return chosen(task, fit, [(bins, c) for bins in (BINS, 5) for c in penalties])


def rrr_alone(task: Task) -> NDArray[np.float64]:
    """Reduced-rank regression of the session by itself."""

    def fit(train: Trials, rank: int, alpha: float) -> Scorer:
        standardised = Standardised.fit(train.counts_KTN)
        fitted = rrr([standardised.x_KTN], [train.side_K], rank=rank, alpha=alpha)[0]
        return lambda trials: fitted(standardised(trials.counts_KTN))

    return chosen(task, fit, RRR_SETTINGS)


def rrr_pretrained(task: Task) -> NDArray[np.float64]:
    """Reduced-rank regression whose time courses were learned from past sessions."""

    def fit(train: Trials, rank: int, alpha: float) -> Scorer:
        standardised = Standardised.fit(train.counts_KTN)
        time_TR = past_basis(task.past, rank)
        fitted = rrr_of_basis(standardised.x_KTN, train.side_K, time_TR, alpha=alpha)
        return lambda trials: fitted(standardised(trials.counts_KTN))

    return chosen(task, fit, RRR_SETTINGS)


RRR_SETTINGS = [(rank, float(alpha)) for rank in (1, 2) for alpha in np.logspace(0.5, -1.5, 5)]
"""Ranks and penalties tried."""

PAST_ALPHA = 0.1
"""Penalty with which the time courses of past sessions are fitted."""


@lru_cache(maxsize=8)
def past_basis(past: tuple[Trials, ...], rank: int) -> NDArray[np.float64]:
    """Time courses common to past sessions."""
    x_of = [Standardised.fit(trials.counts_KTN).x_KTN for trials in past]
    return rrr(x_of, [trials.side_K for trials in past], rank=rank, alpha=PAST_ALPHA)[0].time_TR


@lru_cache(maxsize=16)
def whole_trials(path: Path) -> Trials:
    """All go trials of a session, all 400 ms of them."""
    return load_trials(path)


def neds(task: Task) -> NDArray[np.float64]:
    """Our network from scratch, by what it says in the last bin that may be read."""
    scores_KT = network.scores_KT(task, whole_trials, after_past=False)
    return scores_KT[:, task.test.counts_KTN.shape[1] - 1]


def neds_pretrained(task: Task) -> NDArray[np.float64]:
    """Our network, pretrained on past sessions and fine-tuned."""
    scores_KT = network.scores_KT(task, whole_trials, after_past=True)
    return scores_KT[:, task.test.counts_KTN.shape[1] - 1]


def neds_full(task: Task) -> NDArray[np.float64]:
    """The same network from scratch, seeing all of the time that may be read, from both sides.

    One for each length of time, as the regressions are: what comes after it must not be seen.
    """

    def cut(path: Path) -> Trials:
        whole = whole_trials(path)
        return replace(whole, counts_KTN=whole.counts_KTN[:, : task.test.counts_KTN.shape[1]])

    return network.scores_KT(task, cut, after_past=False, changes=network.SEES_LATER)[:, -1]


METHODS: dict[str, Callable[[Task], NDArray[np.float64]]] = {
    "majority": majority,
    "contrasts": contrasts,
    "logistic": logistic,
    "rrr": rrr_alone,
    "rrr_pretrained": rrr_pretrained,
    "neds": neds,
    "neds_pretrained": neds_pretrained,
    "neds_full": neds_full,
}
PRETRAINED = ("rrr_pretrained", "neds_pretrained")
"""Methods that need past sessions."""

SEEDED = ("neds", "neds_pretrained", "neds_full")
"""Methods that draw, and are run with each seed."""


def scores_RK(name: str, task: Task, seeds: Sequence[int]) -> NDArray[np.float64]:
    """What a method says of the test trials, with each seed if it draws."""
    drawn = seeds if name in SEEDED else seeds[:1]
    return np.stack([METHODS[name](replace(task, seed=seed)) for seed in drawn])


# -- what the methods share ----------------------------------------------------------------------


def logistic_scorer(
    train: Trials, features_of: Callable[[Trials], NDArray], inverse_penalty: float
) -> Scorer:
    """Ridge logistic regression, classes weighed alike, on features divided by one sd.

    It is fitted in the span of the training trials, where its solution lies.
    """
    x_KF = features_of(train)
    mean_F, sd = x_KF.mean(axis=0), max(float(np.sqrt(x_KF.var(axis=0).mean())), 1e-6)
    x_KF = (x_KF - mean_F) / sd
    power_K, axes_KK = np.linalg.eigh(x_KF @ x_KF.T)
    kept = power_K > 1e-9 * power_K[-1]
    span_FK = x_KF.T @ (axes_KK[:, kept] / np.sqrt(power_K[kept]))

    def within(trials: Trials) -> NDArray[np.float64]:
        return ((features_of(trials) - mean_F) / sd) @ span_FK

    model = LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=300)
    model.fit(within(train), train.side_K)
    return lambda trials: 2.0 * model.predict_proba(within(trials))[:, 1] - 1.0


def chosen(
    task: Task, fit: Callable[..., Scorer], settings: Iterable[tuple[Any, ...]]
) -> NDArray[np.float64]:
    """Scores of the test trials under the settings with the least squared error on validation.

    Classes count alike; of equals the first. Where a class is absent there is nothing to fit, and
    every score is 0.
    """
    if len(np.unique(task.train.side_K)) < 2:
        return np.zeros(len(task.test))
    if task.validation is not None:
        pairs = [(task.train, task.validation)]
    else:
        pairs = [(task.train[a], task.train[b]) for a, b in folds(len(task.train), INNER_FOLDS)]
    pairs = [pair for pair in pairs if len(np.unique(pair[0].side_K)) == 2]
    side_K = np.concatenate([held.side_K for _, held in pairs])
    least, best = np.inf, None
    for setting in settings:
        score_K = np.concatenate([fit(train, *setting)(held) for train, held in pairs])
        error_K = (score_K - side_K) ** 2
        error = float(np.mean([error_K[side_K == side].mean() for side in np.unique(side_K)]))
        if error < least:
            least, best = error, setting
    assert best is not None
    return fit(task.train, *best)(task.test)


def folds(trials: int, count: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Training and held-out trials of contiguous folds."""
    parts = np.array_split(np.arange(trials), count)
    return [(np.setdiff1d(np.arange(trials), part), part) for part in parts]


# -- protocols -----------------------------------------------------------------------------------


def by_folds(trials: Trials, names: Iterable[str], seeds: Sequence[int] = (0,)) -> Scored:
    """Each session by itself: every trial scored by the folds without it."""
    tasks = [
        Task(trials[kept], None, trials[held]) for kept, held in folds(len(trials), OUTER_FOLDS)
    ]  # contiguous, in order: together they are the session
    return trials.side_K, {
        name: np.concatenate([scores_RK(name, task, seeds) for task in tasks], axis=1)
        for name in names
        if name not in PRETRAINED
    }


def by_transfer(
    trials: Trials,
    past: tuple[Trials, ...],
    labelled: int | None,
    names: Iterable[str],
    seeds: Sequence[int] = (0,),
) -> Scored:
    """A new session after past ones, with the last few labels before its validation trials."""
    cuts = [round(len(trials) * share) for share in (0.6, 0.7)]
    first = 0 if labelled is None else max(0, cuts[0] - labelled)
    train, validation = trials[first : cuts[0]], trials[cuts[0] : cuts[1]]
    task = Task(train, validation, trials[cuts[1] :], past)
    return task.test.side_K, {name: scores_RK(name, task, seeds) for name in names}


def run(
    sessions: list[Trials],
    ms: int,
    names: list[str],
    protocols: Collection[str] = PROTOCOLS,
    seeds: Sequence[int] = (0,),
) -> dict[str, list[Scored]]:
    """Scores of the protocols with spikes up to so long after the stimulus, by session."""
    cut, found = [trials.until(ms) for trials in sessions], {}
    if "folds" in protocols:
        found[f"folds/{ms}ms"] = [by_folds(trials, names, seeds) for trials in cut]
        found[f"equal_contrast/{ms}ms"] = [equal_contrasts(cut, found[f"folds/{ms}ms"])]
    past, new = tuple(cut[:PAST_SESSIONS]), cut[PAST_SESSIONS:]
    for k in LABELLED if "transfer" in protocols else ():
        protocol = f"transfer/{ms}ms/k={k or 'all'}"
        found[protocol] = [by_transfer(trials, past, k, names, seeds) for trials in new]
    for k in LABELLED if "new_animal" in protocols else ():
        found[f"new_animal/{ms}ms/k={k or 'all'}"] = [
            by_transfer(trials, of_others(cut, trials.animal), k, names, seeds) for trials in cut
        ]
    return found


def of_others(sessions: list[Trials], animal: str) -> tuple[Trials, ...]:
    """Sessions of all animals but one."""
    return tuple(trials for trials in sessions if trials.animal != animal)


def equal_contrasts(sessions: list[Trials], scored: list[Scored]) -> Scored:
    """The trials in which the screen said nothing, of all sessions together."""
    equal = [trials.contrast_K2[:, 0] == trials.contrast_K2[:, 1] for trials in sessions]
    side_K = np.concatenate([side[use] for use, (side, _) in zip(equal, scored, strict=True)])
    return side_K, {
        name: np.concatenate(
            [of[name][:, use] for use, (_, of) in zip(equal, scored, strict=True)], axis=1
        )
        for name in scored[0][1]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of session01..12.h5")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    sessions = [load_trials(args.data / f"session{n:02d}.h5") for n in range(1, 13)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Scored]] = {}
    for ms in UNTIL_MS:  # written at each, so that a long run cut short leaves what it had
        found |= run(sessions, ms, args.methods, args.protocols, args.seeds)
        scores = summarise(found)
        write_json(str(args.out), beside_others(args.out, scores))
        accuracy = args.out.with_name("accuracy.json")
        write_json(str(accuracy), among_all(accuracy, scores))
        print(f"spikes up to {ms} ms: written to {args.out}", flush=True)


if __name__ == "__main__":
    main()
