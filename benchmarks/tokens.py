"""One token per bin, or the paper's one per modality and bin? The same network and training, both.

Ours (``model.tokens = "bin"``) makes one token of what a bin shows and leaves out what is hidden;
the paper's (arXiv 2504.08201) has a token for each modality, and a learned vector where one is
hidden, which all others see. Small networks without memory, few steps: what is compared is one with
the other, nothing else. On a real recording and a simulated session; on another real one the
question is answered at full size by ``accuracy.py`` (``neds_modality``).

    python benchmarks/tokens.py --data FOLDER_OF_RECORDINGS --out runs/tokens

writes ``results/tokens.json``: dataset -> tokens -> target -> [mean, sd over seeds], R2 or balanced
accuracy on the test split, offline, beside the seconds of training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offline.batches import prepare
from offline.config import TrainConfig
from offline.train import train
from offline.validation import validate
from rt_neds.bundle import build_model, load_spec
from rt_neds.config import config_path, load_config
from rt_neds.result import machine, write_json
from rt_neds.simulate import simulate_file

RESULTS = Path(__file__).resolve().parent / "results" / "tokens.json"
TOKENS = ("bin", "modality")
SMALL = (
    "model.dim=64", "model.layers=2", "model.heads=4", "model.context=50", "model.memory=0",
    "data.window_bins=150", "training.batch=8", "training.validate_every=100", "training.threads=1",
    "masking.schemes={decoding=1.0, encoding=0.5, cross_modal=0.25}", "masking.ahead=false",
)  # fmt: skip
UNITS, MINUTES = 80, 16.0


def trained(name: str, session: Path, changes: list[str], out: Path) -> dict[str, float]:
    """Scores on the test split, and seconds of training."""
    config = load_config(config_path(name), TrainConfig, [*SMALL, *changes])
    summary = train(config, [str(session)], out)
    subject = prepare(session, config)
    model = build_model(summary["bundle"], load_spec(summary["bundle"]))
    scores = validate(model, [subject], config, "test", torch.device("cpu"))[subject.id]
    return {**scores, "seconds": summary["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    simulated = args.out / "simulated.h5"
    if not simulated.is_file():
        simulate_file(simulated, units=UNITS, minutes=MINUTES, seed=0)
    datasets = {
        "rat_w_maze/blocked": ("rat-w-maze.toml", args.data / "rat_w_maze.h5"),
        "simulated": ("demo.toml", simulated),
    }
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results["machine"] = machine()
    by: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in args.seeds:
        for dataset, (name, session) in datasets.items():
            for tokens in TOKENS:  # in turns: what the machine does meanwhile meets both
                changes = [
                    f"model.tokens={tokens}",
                    f"training.seed={seed}",
                    f"training.steps={args.steps}",
                ]
                out = args.out / f"{dataset.replace('/', '-')}-{tokens}-{seed}"
                found = by.setdefault((dataset, tokens), [])
                found.append(trained(name, session, changes, out))
                entry: dict[str, Any] = {
                    key: [round(float(f([of[key] for of in found])), 4) for f in (np.mean, np.std)]
                    for key in found[0]
                }
                results.setdefault(dataset, {})[tokens] = entry | {"seeds": len(found)}
                write_json(str(RESULTS), results)
                print(dataset, tokens, seed, found[-1], flush=True)


if __name__ == "__main__":
    main()
