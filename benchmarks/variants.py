"""Variants of one small network, trained alike and compared with each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offline.config import TrainConfig
from offline.train import train
from rt_neds.config import config_path, load_config
from rt_neds.result import machine, write_json
from rt_neds.simulate import simulate_file

UNITS, MINUTES = 80, 16.0
SMALL = (
    "model.dim=64", "model.layers=2", "model.heads=4", "model.context=50", "data.window_bins=150",
    "training.batch=8", "training.validate_every=100", "training.threads=1",
)  # fmt: skip
CONFIGS = {"rat_w_maze/blocked": "rat-w-maze.toml", "simulated": "demo.toml"}


@dataclass(frozen=True)
class Case:
    """One network: a variant on a dataset, with a seed."""

    dataset: str
    variant: str
    seed: int
    session: Path
    config: TrainConfig


def sessions(data: Path, out: Path) -> dict[str, Path]:
    """A real recording, and a session that is simulated unless it is there."""
    out.mkdir(parents=True, exist_ok=True)
    simulated = out / "simulated.h5"
    if not simulated.is_file():
        simulate_file(simulated, units=UNITS, minutes=MINUTES, seed=0)
    return {"rat_w_maze/blocked": data / "rat_w_maze.h5", "simulated": simulated}


def cases(
    session_of: dict[str, Path],
    variants: Iterable[str],
    changes_of: Callable[[str, str], list[str]],
    seeds: Iterable[int],
    steps: int,
) -> Iterable[Case]:
    """All of them, variants in turns: what the machine does meanwhile meets each."""
    variants = list(variants)
    for seed in seeds:
        for dataset, session in session_of.items():
            for variant in variants:
                changes = [*SMALL, *changes_of(variant, dataset)]
                changes += [f"training.seed={seed}", f"training.steps={steps}"]
                config = load_config(config_path(CONFIGS[dataset]), TrainConfig, changes)
                yield Case(dataset, variant, seed, session, config)


def compare(
    results_file: Path,
    out: Path,
    all_cases: Iterable[Case],
    scores_of: Callable[[Case, str], dict[str, float]],
) -> None:
    """Train, score, and write means and sds over the seeds so far.

    ``scores_of`` is given a case and its bundle.
    """
    results: dict[str, Any] = {}
    if results_file.is_file():
        results = json.loads(results_file.read_text())
    results["machine"] = machine()
    by: dict[tuple[str, str], list[dict[str, float]]] = {}
    for case in all_cases:
        name = f"{case.dataset}-{case.variant}-{case.seed}".replace("/", "-").replace(", ", "-")
        summary = train(case.config, [str(case.session)], out / name)
        scores = scores_of(case, summary["bundle"]) | {"seconds": summary["seconds"]}
        found = by.setdefault((case.dataset, case.variant), [])
        found.append(scores)
        entry: dict[str, Any] = {
            key: [round(float(f([of[key] for of in found])), 4) for f in (np.mean, np.std)]
            for key in found[0]
        }
        results.setdefault(case.dataset, {})[case.variant] = entry | {"seeds": len(found)}
        write_json(str(results_file), results)
        print(case.dataset, case.variant, case.seed, scores, flush=True)
