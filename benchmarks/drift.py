"""What is left of decoding when units are no longer what they were, and who notices?

A bundle trained with ``masking.ahead`` decodes the test split of its own recording, and of copies
of it in which units fell silent, were exchanged, or got another's spikes added. ``believed`` is the
R2 that is left if every announced unit is believed; ``served`` that of the stream, which takes a
unit for missing once it has fallen silent for long; it runs for as long as the network can see
before anything is scored, and so the wait is not in the score. Beside it stands in how many
stretches of half a minute ``drifted`` would have been said, were every unit believed.

    python benchmarks/drift.py --session rat_w_maze.h5 --bundle RUN/bundle --json results/drift.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from offline.config import TrainConfig
from offline.expectation import expectation_of
from offline.metrics import r2
from offline.predict import ahead_spans
from offline.streamed import offline_values
from offline.windows import BinnedSession, bin_session
from rt_neds.bundle import build_model, load_spec
from rt_neds.drift import UNUSUAL, Drift, Expectation
from rt_neds.frames import BinnedFrame
from rt_neds.model.neds import NEDS
from rt_neds.result import machine, write_json
from rt_neds.session import load_session
from rt_neds.stream.decoder import Decoder, make_step
from rt_neds.stream.silent import FallenSilent

Spoil = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Spoilt:
    """A binned session whose counts go through a function."""

    def __init__(self, binned: BinnedSession, spoil: Spoil) -> None:
        self._binned, self._spoil = binned, spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binned, name)

    def counts_TN(self, first: int, stop: int, later: int = 0) -> NDArray[np.float32]:
        """Spoilt counts."""
        return self._spoil(self._binned.counts_TN(first, stop, later))


def spoilings(units: int, seed: int) -> dict[str, Spoil]:
    """What can happen to units; which of them it happens to is drawn."""
    order = np.random.default_rng(seed).permutation(units)

    def lost(count: int) -> Spoil:
        kept_N = np.ones(units, np.float32)
        kept_N[order[:count]] = 0
        return lambda counts_TN: counts_TN * kept_N

    def exchanged(count: int) -> Spoil:
        from_N = np.arange(units)
        from_N[order[:count]] = np.roll(order[:count], 1)
        return lambda counts_TN: counts_TN[:, from_N]

    def merged(count: int) -> Spoil:
        def spoil(counts_TN: NDArray[np.float32]) -> NDArray[np.float32]:
            counts_TN = counts_TN.copy()
            counts_TN[:, order[:count]] += counts_TN[:, np.roll(order[:count], 1)]
            return counts_TN

        return spoil

    found: dict[str, Spoil] = {"as recorded": lambda counts_TN: counts_TN}
    for percent in (4, 20, 40):
        count = max(1, round(percent / 100 * units))
        found[f"{count} of {units} units silent"] = lost(count)
        if count > 1:
            found[f"{count} of {units} units exchanged"] = exchanged(count)
            found[f"{count} of {units} units with another's spikes added"] = merged(count)
    found["all units exchanged"] = exchanged(units)
    return found


def stretches(
    model: NEDS, binned: Any, spans: list[tuple[int, int]], usual: Expectation, bin_s: float
) -> NDArray[np.float64]:
    """Surprise and bits per spike of each stretch, shape (X, 2)."""
    drift, found = Drift(usual.rates, round(usual.seconds / bin_s)), []
    kept_T = np.concatenate([np.arange(a, b) for a, b in spans])
    rate_TN = ahead_spans(model, binned, spans)
    for bin_, rate_N in zip(kept_T, rate_TN, strict=True):
        drift.expect(np.log(np.maximum(rate_N, 1e-12)))
        drift.take(binned.counts_TN(bin_, bin_ + 1)[0], bool(binned.scored_TM[bin_, 0]))
        if drift.complete:
            said = drift.status(usual, binned.session.unit_ids)
            found.append((said["surprise"], said["bits_per_spike"]))
            drift.forget()
    return np.array(found)


def decoded(model: NEDS, spec: Any, binned: Any, window: int) -> dict[str, float]:
    """R2 of each behaviour on the test split."""
    spans, of_bundle = binned.spans("test"), spec.session(binned.session.id)
    kept_T = np.concatenate([np.arange(a, b) for a, b in spans])
    values = offline_values(model, of_bundle, binned, spans, list(spec.behaviours), window)
    scores = {}
    for m, name in enumerate(values, start=1):
        use_T = binned.scored_TM[kept_T, m]
        scores[name] = r2(binned.values_TM[kept_T[use_T], m], values[name][use_T][:, 0])
    return scores


def served(model: NEDS, spec: Any, binned: Any) -> tuple[dict[str, float], int]:
    """R2 of each behaviour on the test split, streamed; how many units fell silent at the most."""
    of_bundle, bin_s = spec.session(binned.session.id), spec.bin_ms / 1e3
    step = make_step(model, spec, of_bundle, np.zeros(len(of_bundle.units), bool))
    decoder = Decoder(spec, of_bundle, step)
    silent = FallenSilent(of_bundle.longest_silence, bin_s, max(spec.model.history))
    true: dict[str, list] = {b.name: [] for b in spec.behaviours}
    guess: dict[str, list] = {b.name: [] for b in spec.behaviours}
    most = 0
    for first, stop in binned.spans("test"):
        start = max(0, first - spec.model.receptive_field)
        counts_TN = np.ascontiguousarray(binned.counts_TN(start, stop))
        for bin_, counts_N in enumerate(counts_TN, start=start):
            shown = bool(binned.shown_TM[bin_, 0])
            frame = BinnedFrame(0, bin_, 0, counts_N, shown, 0, 0, 0, 0, bin_ == start, 0, 0)
            silent.take(frame)
            value_V = decoder.decode(frame)
            most = max(most, 0 if frame.silent_N is None else int(frame.silent_N.sum()))
            for m, b in enumerate(spec.behaviours, start=1):
                if bin_ >= first and binned.scored_TM[bin_, m]:
                    true[b.name].append(binned.values_TM[bin_, m])
                    guess[b.name].append(value_V[2 * (m - 1)])
    return {name: r2(np.array(true[name]), np.array(guess[name])) for name in true}, most


def means(scores: list[dict[str, float]]) -> dict[str, float]:
    """Mean over draws."""
    return {key: round(float(np.mean([of[key] for of in scores])), 3) for key in scores[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--session", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="which units are spoilt")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    spec = load_spec(args.bundle)
    config = msgspec.convert(spec.training["config"], TrainConfig, strict=False)
    binned = bin_session(load_session(args.session), config.data, config.behaviour)
    model = build_model(args.bundle, spec)
    usual = expectation_of(model, binned, config)
    assert usual is not None, "a bundle without masking.ahead foresees nothing"
    table: dict[str, Any] = {}
    for seed in range(args.seeds):
        for name, spoil in spoilings(len(usual.rates), seed).items():
            if name == "as recorded" and seed:
                continue
            spoilt: Any = Spoilt(binned, spoil)
            found_X2 = stretches(
                model, spoilt, binned.spans("test"), usual, config.data.bin_ms / 1e3
            )
            keys = ("surprise", "bits_per_spike", "r2", "served", "silent")
            row = table.setdefault(name, {key: [] for key in keys})
            row["surprise"] += found_X2[:, 0].round(2).tolist()
            row["bits_per_spike"] += found_X2[:, 1].round(3).tolist()
            row["r2"].append(decoded(model, spec, spoilt, config.data.window_bins))
            scores, most = served(model, spec, spoilt)
            row["served"].append(scores)
            row["silent"].append(most)
    for name, row in table.items():
        surprise_X = np.array(row["surprise"])
        row["drifted"] = float((surprise_X > UNUSUAL).mean())
        bits = np.median(row["bits_per_spike"])
        print(f"{name:45} said {row['drifted']:5.0%}  surprise {np.median(surprise_X):5.1f}  "
              f"bits per spike {bits:6.2f}  R2 {means(row['r2'])}  served {means(row['served'])}  "
              f"silent {row['silent']}")  # fmt: skip
    if args.json:
        write_json(
            str(args.json),
            {
                "session": args.session.name,
                "bits_per_spike": usual.bits_per_spike,
                "table": table,
                "machine": machine(),
            },
        )


if __name__ == "__main__":
    main()
