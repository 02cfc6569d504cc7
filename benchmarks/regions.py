"""Does what the network learned of a unit tell the region it lies in?

A small network is trained on spikes alone: hidden units and hidden bins are to be told from the
rest (NEDS, arXiv 2504.08201, section 5, asks the same of its embeddings). No scheme that reads
regions is used, or the answer would be given away. A linear support vector machine then names each
unit's region from its embedding, five-fold over the units of all sessions; beside it the same from
the unit's mean rate alone, and with labels shuffled within each session.

    python benchmarks/regions.py --data ../recordings/steinmetz --out runs/regions

writes ``results/regions.json``: dataset -> embedding, rate, shuffled -> metric -> [mean, sd over
seeds]; those of simulated animals are under ``simulated``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offline.config import TrainConfig
from offline.regions import decode_regions, regions_of
from offline.train import train
from rt_neds.bundle import build_model, load_spec
from rt_neds.config import config_path, load_config
from rt_neds.result import machine, write_json
from rt_neds.session import load_session
from rt_neds.simulate import simulate_file

RESULTS = Path(__file__).resolve().parent / "results" / "regions.json"
SMALL = (
    "model.dim=64", "model.layers=2", "model.heads=4", "model.context=20", "model.history=[1, 5]",
    "model.attention=causal", "model.dropout=0.2", "data.window_bins=40",
    "masking.schemes={neuron=1.0, within_spikes=1.0}", "masking.ratio=0.2",
    "training.learning_rate=2e-3", "training.batch=16", "training.threads=1",
)  # fmt: skip
SIMULATED, UNITS, MINUTES = 6, 120, 8.0
AREAS = {
    "visual cortex": ("VISp", "VISl", "VISpm", "VISam", "VISa", "VISrl"),
    "other cortex": ("ACA", "AUD", "ILA", "MOp", "MOs", "ORB", "ORBm", "PL", "SSp"),
    "hippocampus": ("CA1", "CA3", "DG", "POST", "SUB"),
    "thalamus": ("LD", "LGd", "LP", "MD", "MG", "PO", "POL", "PT", "SPF", "TH", "VPL"),
    "midbrain": ("MB", "MRN", "NB", "SCm", "SCsg"),
    "striatum, septum, pallidum": ("CP", "GPe", "LS", "LSc", "LSr"),
}
"""Of the Allen atlas's acronyms in the Steinmetz sessions; the rest is left out."""

WAYS = ("embedding", "rate", "shuffled")


def config_of(seed: int, steps: int) -> TrainConfig:
    """MtM's configuration, small, on schemes that know no regions; the last step is kept."""
    changes = (
        f"training.seed={seed}",
        f"training.steps={steps}",
        f"training.validate_every={steps}",
    )
    return load_config(config_path("mtm.toml"), TrainConfig, [*SMALL, *changes])


def areas(region_N: NDArray[np.str_]) -> NDArray[np.str_]:
    """The area of each unit, "" where it has none of them."""
    area_of = {region: area for area, of_area in AREAS.items() for region in of_area}
    return np.array([area_of.get(region, "") for region in region_N])


def named(paths: list[Path], out: Path, seed: int, steps: int, *, as_areas: bool) -> dict[str, Any]:
    """Train, unless that was done before, and name regions from embeddings."""
    bundle = out / "bundle"
    if not bundle.is_dir():
        train(config_of(seed, steps), [str(path) for path in paths], out)
    regions = {}
    for session in map(load_session, paths):
        if (region_N := regions_of(session)) is not None:
            regions[session.id] = areas(region_N) if as_areas else region_N
    found = decode_regions(build_model(bundle, load_spec(bundle)), regions)
    assert found is not None, "no two regions with enough units"
    return found


def summarised(by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sd over seeds."""
    entry: dict[str, Any] = {
        way: {
            metric: [float(f([of[way][metric] for of in by_seed])) for f in (np.mean, np.std)]
            for metric in ("macro_f1", "balanced_accuracy")
        }
        for way in WAYS
    }
    first = by_seed[0]
    return entry | {
        "units": first["units"],
        "regions": len(first["regions"]),
        "seeds": len(by_seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of session01..12.h5")
    parser.add_argument("--out", type=Path, default=Path("runs/regions"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["steinmetz", "simulated"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    simulated = [args.out / f"simulated{n}.h5" for n in range(SIMULATED)]
    for n, path in enumerate(simulated):
        if not path.is_file():
            simulate_file(path, units=UNITS, minutes=MINUTES, seed=n)
    datasets = {
        "steinmetz": [args.data / f"session{n:02d}.h5" for n in range(1, 13)],
        "simulated": simulated,
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, paths in datasets.items():
        if args.only not in (None, name):
            continue
        by_seed = []
        for seed in args.seeds:
            out = args.out / f"{name}-{seed}-{args.steps}"
            by_seed.append(named(paths, out, seed, args.steps, as_areas=name == "steinmetz"))
            results |= {name: summarised(by_seed), "machine": machine()}
            write_json(str(RESULTS), results)
            print(name, seed, {way: by_seed[-1][way] for way in WAYS}, flush=True)


if __name__ == "__main__":
    main()
