"""A split of a session decoded: what a network says of each behaviour, beside what was.

Shape suffixes: S scored bins, C numbers of an output, V values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from offline.batches import Subject
from offline.predict import decode_spans
from offline.windows import Split
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour, to_values_TV


@dataclass(frozen=True, slots=True)
class Decoded:
    """One behaviour of a split, decoded from the spikes.

    Attributes
    ----------
    behaviour : Behaviour
    raw_SC : ndarray of float32
        What the network says.
    value_SV : ndarray of float32
        That, as values: mean and sd, a rate, or probabilities.
    true_S : ndarray of float32
    bins_S : ndarray of int64
        Bins it is scored in.
    trial_S : ndarray of int64
        Trial that each is decided in, or -1.
    """

    behaviour: Behaviour
    raw_SC: NDArray[np.float32]
    value_SV: NDArray[np.float32]
    true_S: NDArray[np.float32]
    bins_S: NDArray[np.int64]
    trial_S: NDArray[np.int64]


def decoded(
    model: NEDS,
    subject: Subject,
    window: int,
    split: Split,
    device: torch.device | str,
    live: Collection[str] = (),
) -> Iterator[Decoded]:
    """Each behaviour of a split that has two scored bins or more.

    ``window`` is how many bins a network sees together which sees the future too. Behaviours that
    are ``live`` are shown beside the spikes, and the others decoded.
    """
    binned = subject.binned
    spans = binned.spans(split)
    wanted = [name for name in binned.present if name not in live]
    if not spans or not wanted:
        return
    kept = np.concatenate([np.arange(a, b) for a, b in spans])
    scale_of = {b.name: s for b, s in zip(model.behaviours, subject.scales, strict=True)}
    raws = decode_spans(
        model,
        binned,
        spans,
        wanted=wanted,
        window=window,
        device=device,
        live={name: scale_of[name] for name in live},
    )
    for m, behaviour in enumerate(model.behaviours, start=1):
        scored = binned.scored_TM[kept, m]
        if behaviour.name not in wanted or np.count_nonzero(scored) < 2:
            continue
        raw_SC, bins_S = raws[behaviour.name][scored], kept[scored]
        yield Decoded(
            behaviour=behaviour,
            raw_SC=raw_SC,
            value_SV=to_values_TV(
                torch.from_numpy(raw_SC), behaviour, subject.scales[m - 1]
            ).numpy(),
            true_S=binned.values_TM[bins_S, m],
            bins_S=bins_S,
            trial_S=binned.trial_of(behaviour.name, bins_S),
        )
