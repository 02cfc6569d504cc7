"""What each training scheme is worth: the same small network and steps, with and without it.

NEDS and MtM train one network by several schemes at once. Here each set of schemes trains one of
its own, on a real recording and on a simulated session whose units have regions; what a network was
never taught is not asked of it. Small networks (2 layers of 64), few steps: the sets are compared
with each other, and with nothing else. As many windows for all: who is taught more sees less of
each.

    python benchmarks/ablation.py --data FOLDER_OF_RECORDINGS --out runs/ablation

writes ``results/ablation.json``: dataset -> schemes -> score -> [mean, sd over seeds], test split,
decoding streamed bin by bin, spikes in bits per spike over units that fired 50 times.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offline.config import TrainConfig
from offline.evaluate import evaluate
from offline.train import train
from rt_neds.bundle import load_spec
from rt_neds.config import config_path, load_config
from rt_neds.result import machine, write_json
from rt_neds.simulate import simulate_file

RESULTS = Path(__file__).resolve().parent / "results" / "ablation.json"
SMALL = (
    "model.dim=64", "model.layers=2", "model.heads=4", "model.context=50", "data.window_bins=150",
    "training.batch=8", "training.validate_every=100", "training.threads=1",
)  # fmt: skip
SETS = {
    "decoding": "decoding=1.0",
    "encoding": "encoding=1.0",
    "decoding, encoding": "decoding=1.0, encoding=0.6",
    "NEDS": "decoding=1.0, encoding=0.6, within_spikes=0.2, within_behaviour=0.2, cross_modal=0.2",
    "MtM": "neuron=0.6, intra_region=0.4, inter_region=0.4, forward=0.6",
    "all": "decoding=1.0, encoding=0.6, within_spikes=0.2, within_behaviour=0.2, cross_modal=0.2, "
    "neuron=0.2, intra_region=0.2, inter_region=0.2, forward=0.2",
}
AHEAD = "decoding, encoding and ahead"
"""The second of them, asked each bin's spikes from the bins before as well."""

DATASETS = {"rat_w_maze/blocked": "rat-w-maze.toml", "simulated": "demo.toml"}
UNITS, MINUTES = 80, 16.0


def changes_of(label: str, dataset: str) -> list[str]:
    """Settings of one set of schemes."""
    schemes = SETS["decoding, encoding" if label == AHEAD else label]
    if dataset != "simulated":  # its units are all of one region
        parts = [part for part in schemes.split(", ") if "region" not in part]
        schemes = ", ".join(parts)
    return [
        f"masking.schemes={{{schemes}}}",
        f"masking.ahead={'true' if label == AHEAD else 'false'}",
    ]


def scores_of(bundle: str, session: Path) -> dict[str, float]:
    """One number for each thing that the network was taught."""
    result = evaluate(bundle, session, baselines="none")
    schemes = load_spec(bundle).training["config"]["masking"]["schemes"]
    found = {}
    for name, of in result["decoding"].items() if schemes.get("decoding") else ():
        found[name] = of["r2"] if "r2" in of else of["balanced_accuracy_bins"]
    for metric, of in result["encoding"].items():
        if of is not None:
            found[metric] = of["mean50"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    simulated = args.out / "simulated.h5"
    if not simulated.is_file():
        simulate_file(simulated, units=UNITS, minutes=MINUTES, seed=0)
    session_of = {"rat_w_maze/blocked": args.data / "rat_w_maze.h5", "simulated": simulated}
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results["machine"] = machine()
    by: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in args.seeds:
        for dataset, config_name in DATASETS.items():
            for label in (*SETS, AHEAD):
                changes = [*SMALL, *changes_of(label, dataset), f"training.seed={seed}"]
                changes.append(f"training.steps={args.steps}")
                config = load_config(config_path(config_name), TrainConfig, changes)
                out = args.out / f"{dataset}-{label}-{seed}".replace("/", "-").replace(", ", "-")
                summary = train(config, [str(session_of[dataset])], out)
                found = by.setdefault((dataset, label), [])
                found.append(scores_of(summary["bundle"], session_of[dataset]))
                entry: dict[str, Any] = {
                    key: [round(float(f([of[key] for of in found])), 4) for f in (np.mean, np.std)]
                    for key in found[0]
                }
                entry["seconds"] = summary["seconds"]
                results.setdefault(dataset, {})[label] = entry | {"seeds": len(found)}
                write_json(str(RESULTS), results)
                print(dataset, label, seed, found[-1], summary["seconds"], flush=True)


if __name__ == "__main__":
    main()
