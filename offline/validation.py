"""What a network is worth while it trains: one score for each thing it can be asked.

Each is a proper one: the best that can be said scores best. How many decisions are right is not,
and of a dozen trials it says little.

Shape suffixes: S scored bins, X trials or windows, B windows, T bins, M modalities (0 is spikes),
N units, C numbers of an output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax

from offline.batches import Subject
from offline.calibration import categorical_d2, temperature_of
from offline.config import TrainConfig
from offline.decoded import Decoded, decoded
from offline.masking import UNIT_SCHEMES, draw_masks
from offline.metrics import is_constant, poisson_d2, r2
from offline.predict import normalise
from offline.windows import Split
from rt_neds.errors import ConfigError
from rt_neds.model.neds import AHEAD, NEDS, SCHEMES, SPIKES
from rt_neds.model.readout import LOG_RATE_RANGE

SPIKE_SCHEMES = ("encoding", "within_spikes", *UNIT_SCHEMES, "forward", AHEAD)
"""What is asked of spikes alone."""

MOST_WINDOWS = 64
"""Windows of a session that the spikes are scored on."""

LEAST_SCORE = -1.0
"""That of a model whose squared error is twice that of the mean alone."""


Scores = dict[str, dict[str, float]]
"""By session id and what was asked."""


@dataclass(frozen=True, slots=True)
class Validation:
    """What a network is worth on a split.

    Attributes
    ----------
    scores : dict of dict of float
        By session id and what was asked: of each behaviour what share of it is explained (R2, of
        counts and of classes D2), and bits per spike of each scheme of the configuration that asks
        for spikes alone. What has no score is left out: a behaviour that does not change, and
        where no spike is asked for.
    losses : dict of dict of ndarray
        By session id and behaviour, what each of its trials, or windows, adds to the share that is
        not explained. Only of behaviours with a score, in sessions that this process validated.
    """

    scores: Scores
    losses: dict[str, dict[str, NDArray[np.float64]]]


def validate(
    model: NEDS,
    subjects: Sequence[Subject],
    config: TrainConfig,
    split: Split,
    device: torch.device,
) -> Validation:
    """Score each session on a split."""
    found = Validation({}, {})
    for subject in subjects:
        scores, losses = _behaviours(model, subject, config, split, device)
        scores |= _spikes(model, subject, config, split, device)
        found.scores[subject.id], found.losses[subject.id] = scores, losses
    return found


def mean_score(val: Scores) -> float:
    """Mean over sessions and what was asked; what the kept weights are chosen by.

    Scores have no lower end: of a wheel that hardly moves in validation R2 is a million below zero,
    and would choose alone. As one counts at least ``LEAST_SCORE``, it says no more than others do.
    """
    scores = [max(score, LEAST_SCORE) for of in val.values() for score in of.values()]
    return float(np.mean(scores)) if scores else 0.0


def in_words(val: Scores) -> str:
    """One line: each score of a session, or the median of each over several."""
    names = list(dict.fromkeys(name for of in val.values() for name in of))
    of_name = {name: [of[name] for of in val.values() if name in of] for name in names}
    over = f" (medians of {len(val)} sessions)" if len(val) > 1 and names else ""
    return ", ".join(f"{name} {np.median(s):.3f}" for name, s in of_name.items()) + over


def refuse_nonfinite(val: Scores, step: int) -> None:
    """ConfigError for a score that is no number: no step could be chosen by it."""
    for session, of in val.items():
        for name, score in of.items():
            if not math.isfinite(score):
                raise ConfigError(
                    f"step {step}: the validation score of {name} in session {session} is {score}; "
                    "look at its values there, lower training.learning_rate, or leave it out"
                )


def _behaviours(
    model: NEDS, subject: Subject, config: TrainConfig, split: Split, device: torch.device
) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
    """Each behaviour decoded as it will be: scores, and losses of trials or windows.

    What is observed live is decoded from the spikes alone, for where it is not; all else with that
    shown.
    """
    scores: dict[str, float] = {}
    losses: dict[str, NDArray[np.float64]] = {}
    if not config.masking.schemes.get("decoding"):
        return scores, losses
    window = config.data.window_bins
    live = [b.name for b in model.behaviours if b.live and b.name in subject.present]
    found = list(decoded(model, subject, window, split, device, live))
    if live:
        from_spikes = decoded(model, subject, window, split, device)
        found += [of for of in from_spikes if of.behaviour.name in live]
    for of in found:
        name, true_S, value_S = of.behaviour.name, of.true_S, of.value_SV[:, 0]
        # Classes are scored against a uniform guess, which one class alone leaves as it is.
        if of.behaviour.kind != "categorical" and is_constant(true_S):
            continue
        if of.behaviour.kind == "continuous":
            scores[name] = r2(true_S, value_S)
            loss_S = (true_S - value_S) ** 2 / max(float(true_S.var()), 1e-12)
        elif of.behaviour.kind == "poisson":
            scores[name] = poisson_d2(true_S, value_S)
            loss_S = value_S - true_S * np.log(np.maximum(value_S, 1e-9))
        else:
            class_S = true_S.astype(np.int64)
            scores[name] = categorical_d2(of.raw_SC, class_S, of.trial_S)
            logit_SC = of.raw_SC / temperature_of(of.raw_SC, class_S, of.trial_S)
            loss_S = -log_softmax(logit_SC, axis=1)[np.arange(len(class_S)), class_S]
        losses[name] = _of_blocks(loss_S, of, window)
    return scores, losses


def _of_blocks(loss_S: NDArray, of: Decoded, window: int) -> NDArray[np.float64]:
    """Sums over windows; or means over trials, in which something is decided once."""
    block_S = np.where(of.trial_S >= 0, of.trial_S, -1 - of.bins_S // window)
    _, block_S, bins_X = np.unique(block_S, return_inverse=True, return_counts=True)
    share_S = np.where(of.trial_S >= 0, 1.0 / bins_X[block_S], 1.0)
    return np.bincount(block_S, loss_S * share_S).astype(float)


@torch.no_grad()
def _spikes(
    model: NEDS, subject: Subject, config: TrainConfig, split: Split, device: torch.device
) -> dict[str, float]:
    """Bits per spike of each scheme, all units pooled, under masks that are always the same."""
    binned, T, scores, null_N = subject.binned, config.data.window_bins, {}, null_rates(subject)
    windows = [f for a, b in binned.spans(split) for f in range(a, b, T)][:MOST_WINDOWS]
    for asked, weight in config.masking.taught.items():
        if asked not in SPIKE_SCHEMES or not weight or not windows:
            continue
        scheme = "decoding" if asked == AHEAD else asked
        of_one_scheme = msgspec.structs.replace(
            config.masking, schemes={scheme: 1.0}, unit_dropout=0.0, ahead=asked == AHEAD
        )
        rng = np.random.default_rng(0)
        gain = spikes = 0.0
        for first in windows:
            counts_TN = binned.counts_TN(first, first + T)
            shown_TM, inside_T, values_TM = (
                binned.cut(a, first, first + T)
                for a in (binned.shown_TM, binned.of_split(split), binned.values_TM)
            )
            masks = draw_masks(
                of_one_scheme,
                shown_TM[None],
                (binned.cut(binned.scored_TM, first, first + T) & inside_T[:, None])[None],
                subject.region_N,
                rng,
            )
            wanted = AHEAD if asked == AHEAD else SPIKES
            inputs_TM = normalise(values_TM, subject.scales).astype(np.float32)
            log_rate_BTN = model(
                subject.id,
                *(torch.from_numpy(a)[None].to(device) for a in (counts_TN, inputs_TM)),
                torch.from_numpy(masks.observed_BTM).to(device),
                torch.tensor([SCHEMES.index(scheme)], device=device),
                missing_BTN=torch.from_numpy(masks.missing_BN)[:, None].to(device),
                wanted=[wanted],
            )[wanted]
            asked_T = masks.ahead_BT[0] if asked == AHEAD else masks.asked_BTM[0, :, 0]
            asked_TN = asked_T[:, None] & masks.asked_BN[0]
            log_rate_TN = log_rate_BTN[0].clamp(*LOG_RATE_RANGE).cpu().numpy().astype(np.float64)
            gain += _gain(counts_TN, log_rate_TN, null_N, asked_TN)
            spikes += float(counts_TN[asked_TN].sum())
        if spikes:
            scores[asked] = gain / spikes / float(np.log(2))
    return scores


def null_rates(subject: Subject) -> NDArray[np.float64]:
    """What knows nothing but each unit's mean rate in training expects of a bin.

    Of a unit that was silent there it expects half a spike in as long: were it sure of silence,
    one spike of that unit would be worth more than all that is learned of the others.
    """
    binned = subject.binned
    bins = int((binned.of_split("train") & binned.scored_TM[:, 0]).sum())
    return np.maximum(subject.rate_N, 0.5 / max(bins, 1))


def _gain(
    counts_TN: NDArray[np.float32],
    log_rate_TN: NDArray[np.float64],
    null_N: NDArray[np.float64],
    asked_TN: NDArray[np.bool_],
) -> float:
    """Log-likelihood over that of each unit's usual rate."""
    gain_TN = counts_TN * (log_rate_TN - np.log(null_N)) - (np.exp(log_rate_TN) - null_N)
    return float(gain_TN[asked_TN].sum())
