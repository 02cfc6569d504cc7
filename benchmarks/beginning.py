"""What is decoding worth just after it began, and does it say so?

A decoder that begins in the middle of a recording has an empty context and an empty memory. It is
begun again and again along the longest stretch of the test split, beside one that has run since
long before, and one that was replaced at the same moments by a worker that goes on with what it
knew: a hole of the bins that are missed meanwhile. By time since the beginning: the share of the
test stretch's variance that is explained, the mean sd that is stated, and the root mean square of
error over that sd. Streamed, bin by bin.

    python benchmarks/beginning.py --session rat_w_maze.h5 --bundle RUN/bundle --json FILE

takes several bundles too, one for each seed of training, and gives their mean.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Container
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from offline.config import TrainConfig
from offline.windows import bin_session
from rt_neds.bundle import build_model, load_spec
from rt_neds.frames import BinnedFrame
from rt_neds.result import machine, write_json
from rt_neds.session import load_session
from rt_neds.stream.decoder import Decoder, make_step

EDGES_S = (0, 2, 5, 10, 20, 40, 60)
EVERY_S = 8
"""From one beginning to the next."""
MISSED_S = 0.14
"""While a worker that was killed is replaced."""


def streamed(
    decoder: Decoder, binned: Any, start: int, stop: int, missed: Container[int] = ()
) -> NDArray[np.float32]:
    """What is published of bins ``[start, stop)`` by a decoder that begins with the first."""
    values = []
    for bin_, counts_N in enumerate(np.ascontiguousarray(binned.counts_TN(start, stop)), start):
        shown = bool(binned.shown_TM[bin_, 0]) and bin_ not in missed
        frame = BinnedFrame(0, bin_, 0, counts_N, shown, 0, 0, 0, 0, bin_ == start, 0, 0)
        values.append(np.array(decoder.decode(frame)))
    return np.stack(values)


def scores(true_S: NDArray, values_SV: NDArray, variance: float) -> dict[str, float]:
    """What is told of published values, mean and sd, of some bins."""
    error_S, sd_S = values_SV[:, 0] - true_S, values_SV[:, 1]
    return {
        "explained": float(1 - np.mean(error_S**2) / variance),
        "sd": float(sd_S.mean()),
        "error_over_sd": float(np.sqrt(np.mean((error_S / sd_S) ** 2))),
    }


def of_bundle(bundle: Path, session: Path) -> dict[str, dict[str, list[float]]]:
    """By behaviour, what is told of each period: begun then (cold), before (warm), replaced."""
    spec = load_spec(bundle)
    config = msgspec.convert(spec.training["config"], TrainConfig, strict=False)
    binned = bin_session(load_session(session), config.data, config.behaviour)
    of = spec.session(binned.session.id)
    step = make_step(build_model(bundle, spec), spec, of, np.zeros(len(of.units), bool))
    decoder = Decoder(spec, of, step)
    first, stop = max(binned.spans("test"), key=lambda span: span[1] - span[0])
    before = max(0, first - spec.model.receptive_field)
    edges = [round(edge * 1e3 / spec.bin_ms) for edge in EDGES_S]
    starts = range(first, stop - edges[-1], round(EVERY_S * 1e3 / spec.bin_ms))
    warm_TV = streamed(decoder, binned, before, stop)[first - before :]
    hole = round(MISSED_S * 1e3 / spec.bin_ms)
    missed = {bin_ for at in starts for bin_ in range(at - hole, at)}
    replaced_TV = streamed(decoder, binned, before, stop, missed)[first - before :]
    cold = {at: streamed(decoder, binned, at, at + edges[-1]) for at in starts}
    found: dict[str, dict[str, list[float]]] = {}
    for m, behaviour in enumerate(spec.behaviours, start=1):
        true_T, scored_T = binned.values_TM[:, m], binned.scored_TM[:, m]
        variance = float(true_T[first:stop][scored_T[first:stop]].var())
        told = found.setdefault(behaviour.name, {})
        for low, high in itertools.pairwise(edges):
            at_S = np.concatenate([np.arange(at + low, at + high) for at in starts])
            use_S, columns = scored_T[at_S], slice(2 * (m - 1), 2 * m)
            cold_SV = np.concatenate([cold[at][low:high, columns] for at in starts])
            values_of = {
                "cold": cold_SV,
                "warm": warm_TV[at_S - first, columns],
                "replaced": replaced_TV[at_S - first, columns],
            }
            for how, values_SV in values_of.items():
                of_period = scores(true_T[at_S[use_S]], values_SV[use_S], variance)
                for key, value in of_period.items():
                    told.setdefault(f"{how}_{key}", []).append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--session", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, nargs="+", required=True, help="one for each seed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    by_seed = [of_bundle(bundle, args.session) for bundle in args.bundle]
    table = {
        name: {
            key: np.mean([found[name][key] for found in by_seed], axis=0).round(3).tolist()
            for key in told
        }
        for name, told in by_seed[0].items()
    }
    for name, told in table.items():
        for key, values in told.items():
            print(f"{name:10} {key:20}", *(f"{value:8.2f}" for value in values))
    if args.json:
        about = {"session": args.session.name, "seconds": EDGES_S, "seeds": len(by_seed)}
        write_json(str(args.json), {**about, "table": table, "machine": machine()})


if __name__ == "__main__":
    main()
