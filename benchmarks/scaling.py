"""What other animals are worth: scores of new ones against minutes of their calibration.

Simulated animals, each with its own units and tuning and one shared task; an exact ideal observer
says how much could be known. A network is pretrained on 1, 5 and 20 of them and fine-tuned on the
last minutes of each new animal's training split; beside it the same network from scratch.

    python benchmarks/scaling.py --out runs/scaling --new 1000 1001 1002 1003 1004

writes ``results/scaling.json``: pretrained on -> minutes -> new animal -> {scores, seconds}, draws
all that is in it as ``results/scaling.png``, and prints the gain over each animal by itself, with
its interval over animals (Student's t).
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from offline.config import TrainConfig
from offline.evaluate import evaluate
from offline.train import train
from rt_neds.config import config_path, load_config
from rt_neds.result import machine
from rt_neds.simulate import simulate_file

RESULTS = Path(__file__).resolve().parent / "results"
UNITS, PAST_MINUTES, NEW_MINUTES = 80, 8.0, 40.0
TRAIN_SHARE = 0.7
DRAWN = {"wheel_speed": "wheel", "whisker": "whisker"}

FOR_FEW_LABELS = (
    "masking.schemes={decoding=1.0, encoding=0.5}",
    "masking.ahead=true",
    "model.linear=true",
)


def config_of(*changes: str) -> TrainConfig:
    """The demo's network, with the masking of a pretrained one, beginning at regression."""
    return load_config(config_path("demo.toml"), TrainConfig, [*FOR_FEW_LABELS, *changes])


def tested(bundle: Path, session: Path) -> dict[str, dict[str, float]]:
    """Scores of the test split, streamed bin by bin, and the ideal observer's of the same bins."""
    result = evaluate(bundle, session, baselines="none")
    return {
        which: {
            name: round(of["r2"] if "r2" in of else of["balanced_accuracy_bins"], 4)
            for name, of in result[which].items()
        }
        for which in ("decoding", "ideal")
    }


def gains(results: dict[str, Any], sessions: int) -> None:
    """Print what other animals gave the same new ones, with the same minutes."""
    alone, after = (results.get(f"pretrained_on_{n}", {}) for n in (0, sessions))
    for minutes, by_animal in after.items():
        both = sorted(set(by_animal) & set(alone.get(minutes, {})))
        if len(both) < 2:
            continue
        for name in DRAWN:
            gain = [by_animal[a]["scores"][name] - alone[minutes][a]["scores"][name] for a in both]
            reach = stats.t.ppf(0.975, len(both) - 1) * stats.sem(gain)
            print(
                f"after {sessions}, {minutes} minutes, {name}: {np.mean(gain):.3f} "
                f"({np.mean(gain) - reach:.3f} to {np.mean(gain) + reach:.3f}) of {len(both)}"
            )


def draw(results: dict[str, Any], path: Path) -> None:
    """Each behaviour's score against minutes of calibration, a curve for each number of animals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kept = NEW_MINUTES * TRAIN_SHARE
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for ax, (name, title) in zip(axes, DRAWN.items(), strict=True):
        for shade, sessions in enumerate((0, 1, 5, 20)):
            by_label = results.get(f"pretrained_on_{sessions}", {})
            points = sorted(
                (kept if label == "all" else float(label), entry["scores"][name])
                for label, by_animal in by_label.items()
                for entry in by_animal.values()
            )
            if not points:
                continue
            minutes = sorted({m for m, _ in points})
            mean = [float(np.mean([r2 for m, r2 in points if m == at])) for at in minutes]
            color = plt.get_cmap("viridis_r")(0.15 + 0.25 * shade)
            label = f"after {sessions} other{'s' if sessions > 1 else ''}" if sessions else "alone"
            ax.plot(minutes, mean, color=color, label=label)
            ax.plot(*zip(*points, strict=True), "o", color=color, markersize=4)
        ideal = np.mean([of[name] for of in results["ideal"].values()])
        ax.axhline(ideal, color="0.5", linestyle=":", label="ideal observer")
        ticks = (1, 2, 5, 10, 20, kept)
        ax.set(title=title, xscale="log", xlabel="minutes of a new animal's own")
        ax.set_xticks(ticks, [f"{m:g}" for m in ticks], minor=False)
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="R2, test, streamed", ylim=(0, 0.8))
    axes[0].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.88))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pretrained(past: list[Path], args: argparse.Namespace, seed: str) -> Path:
    """A bundle of other animals, trained now or found."""
    run = args.out / f"pretrained{len(past)}-{args.seed}"
    if not (run / "bundle").is_dir():
        # Few sessions are soon known by heart: what is kept is the best on their validation.
        config = config_of(f"training.steps={args.steps}", "training.validate_every=500", seed)
        train(config, [str(p) for p in past], run)
    return run / "bundle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--pretrained-on", type=int, nargs="+", default=[0, 1, 5, 20])
    parser.add_argument(
        "--minutes", type=float, nargs="+", default=[1, 2, 5, 10, 20, 0], help="0 for all there is"
    )
    parser.add_argument("--new", type=int, nargs="+", default=[1000], help="seeds of new animals")
    parser.add_argument("--steps", type=int, default=2500, help="of pretraining")
    parser.add_argument("--tuning-steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    past = [args.out / f"past{n:02d}.h5" for n in range(max(args.pretrained_on))]
    for n, path in enumerate(past):
        if not path.is_file():
            simulate_file(path, units=UNITS, minutes=PAST_MINUTES, seed=n)
    for animal in args.new:
        if not (path := args.out / f"new{animal}.h5").is_file():
            simulate_file(path, units=UNITS, minutes=NEW_MINUTES, seed=animal)
    seed = f"training.seed={args.seed}"
    path = RESULTS / "scaling.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    results["machine"] = machine()
    for sessions in args.pretrained_on:
        init = pretrained(past[:sessions], args, seed) if sessions else None
        for animal, minutes in product(args.new, args.minutes):
            new = args.out / f"new{animal}.h5"
            changes = [f"training.steps={args.tuning_steps}", "training.validate_every=100", seed]
            changes.append(f"data.train_minutes={minutes}")
            if init is not None:
                changes += ["training.frozen_steps=60", "training.trunk_rate=0.3"]
            run = args.out / f"tuned{sessions}-{minutes:g}-{animal}-{args.seed}"
            summary = train(config_of(*changes), [str(new)], run, init=init)
            scores = tested(run / "bundle", new)
            results.setdefault("ideal", {})[str(animal)] = scores["ideal"]
            entry = {"scores": scores["decoding"], "seconds": summary["seconds"]}
            label = f"{minutes:g}" if minutes else "all"
            of = results.setdefault(f"pretrained_on_{sessions}", {}).setdefault(label, {})
            of[f"animal_{animal}_seed_{args.seed}"] = entry
            print(sessions, label, animal, entry, flush=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    for sessions in filter(None, args.pretrained_on):
        gains(results, sessions)
    draw(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
