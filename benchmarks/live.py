"""What is gained where some behaviours are observed while others are decoded.

A network learns with some behaviours shown now and then (``live = true``), and is then asked for
the others: from spikes alone, and with those shown. Beside it a network that was never shown any,
and causal GRUs trained for each question: from spikes, from spikes and what is observed, and from
what is observed without any spikes, which is what that gives away by itself.

    python benchmarks/live.py --data FOLDER_OF_RECORDINGS --out runs/live --seeds 0 1

writes ``results/live.json``: dataset -> method -> what it is shown -> behaviour -> [mean, sd over
seeds], R2 or balanced accuracy on the test split, the networks streamed bin by bin. A run found in
``--out``, of the same configuration, is not trained again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from offline.baselines.gru import gru
from offline.config import TrainConfig
from offline.evaluate import evaluate, score
from offline.train import train
from offline.windows import BinnedSession, behaviours_of, bin_session
from rt_neds.bundle import load_spec
from rt_neds.config import config_path, load_config
from rt_neds.result import machine, write_json
from rt_neds.session import load_session
from rt_neds.simulate import simulate_file

RESULTS = Path(__file__).resolve().parent / "results" / "live.json"
ALONE, BOTH, OBSERVED = "spikes", "spikes and observed", "observed"
UNITS, MINUTES = 80, 16.0
Scores = dict[str, dict[str, float]]
"""By what is shown, by behaviour."""


@dataclass(frozen=True)
class Question:
    """A recording, and what of it is observed."""

    config: str
    session: Path
    live: tuple[str, ...]

    def load(self, live: tuple[str, ...], seed: int) -> TrainConfig:
        changes = [f"behaviour.{name}.live=true" for name in live]
        return load_config(
            config_path(self.config), TrainConfig, [*changes, f"training.seed={seed}"]
        )


def trained(config: TrainConfig, session: Path, out: Path) -> Path:
    """A bundle, of now or of an earlier run."""
    bundle = out / "bundle"
    same = json.loads(json.dumps(msgspec.to_builtins(config)))
    if (bundle / "bundle.json").is_file() and load_spec(bundle).training["config"] == same:
        return bundle
    return Path(train(config, [str(session)], out)["bundle"])


def number(of: dict[str, Any]) -> float:
    """The one score of a behaviour."""
    return of["r2"] if "r2" in of else of["balanced_accuracy_bins"]


def of_network(bundle: Path, question: Question, live: bool) -> Scores:
    """Streamed, from spikes alone and with the others shown."""
    scores: Scores = {}
    for shown in (ALONE, BOTH) if live else (ALONE,):
        names = question.live if shown == BOTH else ()
        found = evaluate(bundle, question.session, baselines="none", live=names)
        assert found["stream_vs_offline_max_abs"] < 1e-3
        scores[shown] = {name: number(of) for name, of in found["decoding"].items()}
    return scores


def of_gru(binned: BinnedSession, config: TrainConfig, live: tuple[str, ...], seed: int) -> Scores:
    """One GRU for each thing that it can be shown."""
    behaviours = behaviours_of(config.behaviour)
    names = [b.name for b in behaviours]
    classes = {b.name: len(b.classes) for b in behaviours if b.kind == "categorical"}
    test, wanted = np.flatnonzero(binned.of_split("test")), [n for n in names if n not in live]
    scores: Scores = {}
    for shown, observed in ((ALONE, ()), (BOTH, live), (OBSERVED, live)):
        guesses = gru(
            binned,
            wanted,
            test,
            classes=classes,
            seed=seed,
            window=config.data.window_bins,
            live=observed,
            spikes=shown != OBSERVED,
        )
        scores[shown] = {}
        for name, guess in guesses.items():
            m = 1 + names.index(name)
            scored = binned.scored_TM[test, m]
            values_SV = guess.reshape(len(test), -1)[scored]
            of = score(binned, behaviours[m - 1], m, test[scored], values_SV)
            scores[shown][name] = number(of)
    return scores


def add(results: dict[str, Any], found: list[Scores]) -> None:
    """Means and sds over the seeds so far."""
    for shown, of in found[0].items():
        results[shown] = {
            name: [
                round(float(f([scores[shown][name] for scores in found])), 4)
                for f in (np.mean, np.std)
            ]
            for name in of
        }
    results["seeds"] = len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/live"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", choices=["simulated", "rat_w_maze/blocked"])
    parser.add_argument("--methods", nargs="+", default=["live", "never_live", "gru"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    simulated = args.out / "simulated.h5"
    if not simulated.is_file():
        simulate_file(simulated, units=UNITS, minutes=MINUTES, seed=0)
    questions = {
        "simulated": Question("demo.toml", simulated, ("wheel_speed",)),
        "rat_w_maze/blocked": Question(
            "rat-w-maze.toml", args.data / "rat_w_maze.h5", ("y", "speed")
        ),
    }
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results["machine"] = machine()
    for dataset, question in questions.items():
        if args.only not in (None, dataset):
            continue
        by: dict[str, list[Scores]] = {method: [] for method in args.methods}
        for seed in args.seeds:
            for method, found in by.items():
                live = question.live if method == "live" else ()
                config = question.load(live, seed)
                if method == "gru":
                    binned = bin_session(
                        load_session(question.session), config.data, config.behaviour
                    )
                    found.append(of_gru(binned, config, question.live, seed))
                else:
                    out = args.out / f"{dataset.replace('/', '-')}-{method}-{seed}"
                    bundle = trained(config, question.session, out)
                    found.append(of_network(bundle, question, method == "live"))
                add(results.setdefault(dataset, {}).setdefault(method, {}), found)
                print(dataset, method, seed, found[-1], flush=True)
                write_json(str(RESULTS), results)


if __name__ == "__main__":
    main()
