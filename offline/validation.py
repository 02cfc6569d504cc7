"""What a network is worth while it trains: one score for each thing it can be asked.

Each is a proper one: the best that can be said scores best. How many decisions are right is not,
and of a dozen trials it says little.

Shape suffixes: S scored bins, B windows, T bins, M modalities (0 is spikes), N units.
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from offline.batches import Subject
from offline.calibration import categorical_d2
from offline.config import TrainConfig
from offline.decoded import decoded
from offline.masking import UNIT_SCHEMES, draw_masks
from offline.metrics import poisson_d2, r2
from offline.predict import normalise
from offline.windows import Split
from rt_neds.model.neds import AHEAD, NEDS, SCHEMES, SPIKES
from rt_neds.model.readout import LOG_RATE_RANGE

SPIKE_SCHEMES = ("encoding", "within_spikes", *UNIT_SCHEMES, "forward", AHEAD)
"""What is asked of spikes alone."""

MOST_WINDOWS = 64
"""Windows of a session that the spikes are scored on."""


def validate(
    model: NEDS, subjects: list[Subject], config: TrainConfig, split: Split, device: torch.device
) -> dict[str, dict[str, float]]:
    """Scores of each session on a split.

    Returns
    -------
    dict of dict of float
        By session id and what was asked: of each behaviour what share of it is explained (R2, of
        counts and of classes D2), and bits per spike of each scheme of the configuration that asks
        for spikes alone.
    """
    return {
        subject.id: _behaviours(model, subject, config, split, device)
        | _spikes(model, subject, config, split, device)
        for subject in subjects
    }


Scores = dict[str, dict[str, float]]


def mean_score(val: Scores, alone: Scores | None = None) -> float:
    """Mean over sessions and what was asked; what the kept weights are chosen by.

    What the session's own regression ``alone`` decodes better counts with its score: in the end it
    is what decodes it.
    """
    scores = [score for of in better(val, alone or {}).values() for score in of.values()]
    return float(np.mean(scores)) if scores else 0.0


def better(val: Scores, alone: Scores) -> Scores:
    """The better of two scores, where there are two."""
    return {
        session: {
            name: max(score, alone.get(session, {}).get(name, score)) for name, score in of.items()
        }
        for session, of in val.items()
    }


def _behaviours(
    model: NEDS, subject: Subject, config: TrainConfig, split: Split, device: torch.device
) -> dict[str, float]:
    """Each behaviour decoded from the spikes."""
    if not config.masking.schemes.get("decoding"):
        return {}
    scores = {}
    for of in decoded(model, subject, config.data.window_bins, split, device):
        if of.behaviour.kind == "continuous":
            score = r2(of.true_S, of.value_SV[:, 0])
        elif of.behaviour.kind == "poisson":
            score = poisson_d2(of.true_S, of.value_SV[:, 0])
        else:
            score = categorical_d2(of.raw_SC, of.true_S.astype(np.int64), of.trial_S)
        scores[of.behaviour.name] = score
    return scores


@torch.no_grad()
def _spikes(
    model: NEDS, subject: Subject, config: TrainConfig, split: Split, device: torch.device
) -> dict[str, float]:
    """Bits per spike of each scheme, all units pooled, under masks that are always the same."""
    binned, T, scores = subject.binned, config.data.window_bins, {}
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
            gain += _gain(counts_TN, log_rate_TN, subject.rate_N, asked_TN)
            spikes += float(counts_TN[asked_TN].sum())
        scores[asked] = gain / max(spikes, 1.0) / float(np.log(2))
    return scores


def _gain(
    counts_TN: NDArray[np.float32],
    log_rate_TN: NDArray[np.float64],
    rate_N: NDArray[np.float64],
    asked_TN: NDArray[np.bool_],
) -> float:
    """Log-likelihood over that of each unit's mean rate in training."""
    null_N = np.maximum(rate_N, 1e-9)
    gain_TN = counts_TN * (log_rate_TN - np.log(null_N)) - (np.exp(log_rate_TN) - null_N)
    return float(gain_TN[asked_TN].sum())
