"""Any to any: what is gained where some behaviours are observed while others are decoded.

One network learns with every behaviour shown now and then (``live = true``), and
is then asked for each one: from spikes alone, and with all others shown. Beside it a causal GRU
trained for that one question: from the same, and from the other behaviours without any spikes,
which is what they give away by themselves.

    python benchmarks/live.py --data FOLDER_OF_RECORDINGS --out runs/live --seeds 0 1 2

writes ``results/live.json``: dataset -> method -> what it is shown -> behaviour -> [mean, sd over
seeds], R2 or balanced accuracy on the test split, the network streamed bin by bin. A run found in
``--out``, of the same configuration, is not trained again.
"""

from __future__ import annotations

import argparse
import json
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
ALONE, BOTH, OTHERS = "spikes", "spikes and others", "others"
UNITS, MINUTES = 80, 16.0
Scores = dict[str, dict[str, float]]
"""By what is shown, by behaviour."""


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


def of_network(bundle: Path, session: Path, names: list[str]) -> Scores:
    """Streamed, from spikes alone and with all others shown."""
    alone = evaluate(bundle, session, baselines="none")["decoding"]
    scores: Scores = {ALONE: {name: number(alone[name]) for name in names}, BOTH: {}}
    for name in names:
        others = [other for other in names if other != name]
        found = evaluate(bundle, session, baselines="none", live=others)
        assert found["stream_vs_offline_max_abs"] < 1e-3
        scores[BOTH][name] = number(found["decoding"][name])
    return scores


def of_gru(binned: BinnedSession, config: TrainConfig, seed: int) -> Scores:
    """One GRU from spikes alone, and one for each behaviour and what it is shown."""
    behaviours = behaviours_of(config.behaviour)
    classes = {b.name: len(b.classes) for b in behaviours if b.kind == "categorical"}
    names = [b.name for b in behaviours]
    test = np.flatnonzero(binned.of_split("test"))
    scores: Scores = {ALONE: {}, BOTH: {}, OTHERS: {}}
    asked: list[tuple[str, list[str], list[str], bool]] = [(ALONE, names, [], True)]
    for name in names:
        others = [other for other in names if other != name]
        asked += [(BOTH, [name], others, True), (OTHERS, [name], others, False)]
    for shown, wanted, live, spikes in asked:
        guesses = gru(binned, wanted, test, classes=classes, seed=seed, live=live, spikes=spikes)
        for name, guess in guesses.items():
            m = 1 + names.index(name)
            scored = binned.scored_TM[test, m]
            values_SV = guess.reshape(len(test), -1)[scored]
            of = score(binned, behaviours[m - 1], m, test[scored], values_SV)
            scores[shown][name] = number(of)
            print(f"  gru, {name} from {shown}: {scores[shown][name]:.3f}", flush=True)
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["simulated", "rat_w_maze/blocked"])
    parser.add_argument("--methods", nargs="+", default=["network", "gru"], metavar="METHOD")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    simulated = args.out / "simulated.h5"
    if not simulated.is_file():
        simulate_file(simulated, units=UNITS, minutes=MINUTES, seed=0)
    datasets = {
        "simulated": ("demo.toml", simulated),
        "rat_w_maze/blocked": ("rat-w-maze.toml", args.data / "rat_w_maze.h5"),
    }
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results["machine"] = machine()
    for dataset, (name, session) in datasets.items():
        if args.only not in (None, dataset):
            continue
        by: dict[str, list[Scores]] = {method: [] for method in args.methods}
        for seed in args.seeds:
            config = load_config(config_path(name), TrainConfig, [f"training.seed={seed}"])
            live = {
                key: msgspec.structs.replace(of, live=True) for key, of in config.behaviour.items()
            }
            config = msgspec.structs.replace(config, behaviour=live)
            if "network" in by:
                bundle = trained(config, session, args.out / f"{dataset.replace('/', '-')}-{seed}")
                by["network"].append(of_network(bundle, session, list(live)))
                print(dataset, seed, by["network"][-1], flush=True)
            if "gru" in by:
                binned = bin_session(load_session(session), config.data, config.behaviour)
                by["gru"].append(of_gru(binned, config, seed))
            for method, found in by.items():
                add(results.setdefault(dataset, {}).setdefault(method, {}), found)
            write_json(str(RESULTS), results)


if __name__ == "__main__":
    main()
