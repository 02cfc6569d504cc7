"""Accuracy on real recordings, decoded by a `serve` process fed by a `replay` process over ZeroMQ.

For each protocol: train from its configuration, replay the whole session into `serve`, take the
published values of the test bins, score them beside ridge and the mean profile on the very same
bins, and compare them with the offline forward pass.

    python benchmarks/accuracy.py --data ../recordings --out runs/accuracy --seeds 0 1 2

writes ``accuracy.json`` beside this file's ``results``; protocols are described in README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offline.baselines import ridge
from offline.config import TrainConfig
from offline.evaluate import offline_values, phase_in_trial
from offline.metrics import gaussian_scores, mean_profile
from offline.train import train
from offline.windows import BinnedSession, bin_session
from rt_neds.bundle import build_model, load_spec
from rt_neds.children import (
    collect,
    finish_replay,
    free_port,
    serving,
    start_replay,
    wait_for_schema,
)
from rt_neds.config import config_path, load_config
from rt_neds.result import machine
from rt_neds.session import load_session
from rt_neds.stream.publisher import DecodedListener

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Protocol:
    """What is trained and tested: one run per element of ``folds``, scored together."""

    dataset: str
    name: str
    file: str
    config: str
    folds: tuple[tuple[str, ...], ...]


PROTOCOLS = (
    Protocol(
        "rat_w_maze", "blocked", "rat_w_maze.h5", "rat-w-maze.toml", (("data.split=blocked",),)
    ),
    Protocol(
        "rat_w_maze",
        "contiguous",
        "rat_w_maze.h5",
        "rat-w-maze.toml",
        (("data.split=contiguous",),),
    ),
    Protocol(
        "ibl_probe",
        "trial_folds",
        "ibl_probe_30_trials.h5",
        "ibl-probe.toml",
        tuple((f"data.fold={fold}",) for fold in range(5)),
    ),
)


def live_values(session: Path, bundle: Path, scratch: Path) -> dict[int, np.ndarray]:
    """Values by bin, as published by ``serve`` while ``replay`` sends the whole session."""
    spikes, decoded = (f"127.0.0.1:{free_port()}" for _ in range(2))
    listener = DecodedListener(f"tcp://{decoded}", "bench")
    options = ("--probe", "bench", "--bundle", str(bundle), "--source", f"rtneds://{spikes}",
               "--publish", f"tcp://{decoded}")  # fmt: skip
    with serving(*options) as child:
        wait_for_schema(listener, child)
        out = scratch / "replay.json"
        sending = start_replay(
            "--session", str(session), "--probe", "bench", "--bind", f"tcp://{spikes}",
            "--speed", "0", "--batch-ms", "20", out=out,
        )  # fmt: skip
        frames, _ = collect(listener, sending, quiet_s=3.0)
        finish_replay(sending, out)
    listener.close()
    values = {frame.bin: frame.values_V for frame in frames}
    assert len(values) == len(frames), "a bin was published twice"
    return values


def run_fold(config: TrainConfig, session_path: Path, out: Path) -> dict[str, Any]:
    """Train, serve, and gather what is needed to score the test bins."""
    train(config, [str(session_path)], out)
    bundle = out / "bundle"
    spec, session = load_spec(bundle), load_session(session_path)
    binned = bin_session(session, config.data, config.behaviour)
    with tempfile.TemporaryDirectory() as scratch:
        live = live_values(session_path, bundle, Path(scratch))
    spans = binned.spans("test")
    kept_T = np.concatenate([np.arange(a, b) for a, b in spans])
    model, of_bundle = build_model(bundle, spec), spec.session(session.id)
    offline = offline_values(
        model, of_bundle, binned, spans, list(spec.behaviours), config.data.window_bins
    )
    parts: dict[str, Any] = {"worst": 0.0, "missing": 0}
    at = 0
    for m, b in enumerate(spec.behaviours, start=1):
        scored = binned.scored_TM[kept_T, m]
        published = np.array([bin_ in live for bin_ in kept_T])
        parts["missing"] += int((scored & ~published).sum())
        use = scored & published
        bins = kept_T[use]
        streamed = np.stack([live[bin_][at : at + 2] for bin_ in bins])
        sd = of_bundle.scales[b.name].sd
        parts["worst"] = max(
            parts["worst"], float(np.abs(streamed - offline[b.name][use]).max() / sd)
        )
        parts[b.name] = {
            "true": binned.values_TM[bins, m].astype(float),
            "mean": streamed[:, 0],
            "sd": streamed[:, 1],
            "profile": profile(binned, m, bins),
            "ridge": ridge(binned, b.name, bins),
        }
        at += 2
    return parts


def profile(binned: BinnedSession, m: int, bins: np.ndarray) -> np.ndarray:
    """The trivial guess."""
    train_S = np.flatnonzero(binned.of_split("train") & binned.scored_TM[:, m])
    phase_T = phase_in_trial(binned)
    return mean_profile(binned.values_TM[train_S, m], phase_T[train_S], phase_T[bins])


def pooled(folds: list[dict[str, Any]], name: str, method: str) -> dict[str, float]:
    """Scores over the test bins of all folds together."""
    true, guess, trivial = (
        np.concatenate([fold[name][key] for fold in folds])
        for key in ("true", "ridge" if method == "ridge" else "mean", "profile")
    )
    sd = None if method == "ridge" else np.concatenate([fold[name]["sd"] for fold in folds])
    return gaussian_scores(true, guess, sd, trivial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=None, help="dataset/protocol names")
    args = parser.parse_args()
    path = RESULTS / "accuracy.json"
    torch.set_num_threads(1)
    for protocol in PROTOCOLS:
        label = f"{protocol.dataset}/{protocol.name}"
        if args.only and label not in args.only:
            continue
        by_seed, worst, missing = [], 0.0, 0
        for seed in args.seeds:
            folds = []
            for overrides in protocol.folds:
                config = load_config(
                    config_path(protocol.config),
                    TrainConfig,
                    [*overrides, f"training.seed={seed}"],
                )
                out = args.out / protocol.dataset / protocol.name / f"{seed}-{overrides[-1]}"
                folds.append(run_fold(config, args.data / protocol.file, out))
                worst = max(worst, folds[-1]["worst"])
                missing += folds[-1]["missing"]
            by_seed.append(folds)
            print(
                label, "seed", seed, {n: pooled(folds, n, "neds_causal") for n in config.behaviour}
            )
        entry = summarise(by_seed, list(config.behaviour))
        entry["stream_vs_offline_max_abs"] = worst
        entry["unpublished_bins"] = missing
        entry["seeds"] = args.seeds
        results = json.loads(path.read_text()) if path.is_file() else {}
        results.setdefault(protocol.dataset, {})[protocol.name] = entry
        results["machine"] = machine()
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def summarise(by_seed: list[list[dict[str, Any]]], names: list[str]) -> dict[str, Any]:
    """``{method: {target: [mean, sd over seeds]}}``; ridge and the profile have no seed."""
    entry: dict[str, Any] = {"neds_causal": {}, "ridge": {}, "mean_profile": {}, "coverage_68": {}}
    for name in names:
        ours = [pooled(folds, name, "neds_causal") for folds in by_seed]
        scores = np.array([s["r2"] for s in ours])
        entry["neds_causal"][name] = [float(scores.mean()), float(scores.std())]
        entry["ridge"][name] = [pooled(by_seed[0], name, "ridge")["r2"], 0.0]
        entry["mean_profile"][name] = [ours[0]["r2_profile"], 0.0]
        coverage = np.array([s["coverage_68"] for s in ours])
        entry["coverage_68"][name] = [float(coverage.mean()), float(coverage.std())]
    return entry


if __name__ == "__main__":
    main()
