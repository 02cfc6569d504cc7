"""Accuracy on real recordings: ours, streamed, beside baselines on the very same bins.

    neds_causal    trained from the protocol's configuration; a `replay` process sends the whole
                   session over ZeroMQ to a `serve` process, whose published values are scored
    neds_full      the same network and number of decoded windows, seeing the future too: what
                   causality costs
    neds_modality  the same network with the paper's tokens, one per modality and bin
    gru, ridge, mean_profile, glm   baselines

    python benchmarks/accuracy.py --data ../recordings --out runs/accuracy --seeds 0 1 2

writes ``results/accuracy.json``: dataset -> protocol -> method -> target -> [mean, sd over seeds].
A run found in ``--out``, of the same configuration, is not trained again. README.md describes the
protocols.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from offline.baselines.glm import encoding as glm_encoding
from offline.baselines.glm import forward_1 as glm_forward_1
from offline.baselines.gru import gru
from offline.baselines.linear import ridge
from offline.config import TrainConfig
from offline.encoding import predict_spikes
from offline.evaluate import phase_in_trial
from offline.metrics import bits_per_spike, gaussian_scores, mean_profile, r2
from offline.streamed import offline_values
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
    """What is trained and tested: one run per element of ``folds``, scored together.

    ``full`` are the settings of the network that sees the future: it cannot be asked ahead.
    """

    dataset: str
    name: str
    file: str
    config: str
    folds: tuple[str, ...]
    full: tuple[str, ...] = ()
    neural: bool = False


RAT_FULL = (
    "masking.ahead=false",
    "data.window_bins=300",
    "training.batch=8",
    "model.memory=500",
)
"""It sees a window whole, so a long one costs it by the square; no longer a memory is learned in
one."""
PROTOCOLS = (
    Protocol(
        "rat_w_maze",
        "blocked",
        "rat_w_maze.h5",
        "rat-w-maze.toml",
        ("data.split=blocked",),
        RAT_FULL,
    ),
    Protocol(
        "rat_w_maze",
        "contiguous",
        "rat_w_maze.h5",
        "rat-w-maze.toml",
        ("data.split=contiguous",),
        RAT_FULL,
        neural=True,
    ),
    Protocol(
        "ibl_probe",
        "trial_folds",
        "ibl_probe_30_trials.h5",
        "ibl-probe.toml",
        tuple(f"data.fold={fold}" for fold in range(5)),
    ),
)

Fold = dict[str, Any]
"""True and guessed values of the test bins of one fold, by target; other scores beside them."""


@dataclass(frozen=True)
class Setting:
    """One fold with one seed: its configuration, and where its run lies."""

    protocol: Protocol
    config: TrainConfig
    session: Path
    out: Path

    def binned(self) -> BinnedSession:
        return bin_session(load_session(self.session), self.config.data, self.config.behaviour)

    def bundle(self) -> Path:
        """Trained now, or found."""
        bundle = self.out / "bundle"
        found = load_spec(bundle).training["config"] if bundle.is_dir() else None
        if found is None or msgspec.convert(found, TrainConfig, strict=False) != self.config:
            train(self.config, [str(self.session)], self.out)
        return bundle


def test_bins(binned: BinnedSession, m: int) -> np.ndarray:
    """Scored bins of the test split."""
    return np.flatnonzero(binned.of_split("test") & binned.scored_TM[:, m])


# -- methods: a fold to its guesses --------------------------------------------------------------


def neds_causal(at: Setting) -> Fold:
    """Published by serve."""
    bundle, binned = at.bundle(), at.binned()
    with tempfile.TemporaryDirectory() as scratch:
        live = live_values(at.session, bundle, Path(scratch))
    fold, worst, missing = {}, 0.0, 0
    for n, (name, bins, offline_SV, scale) in enumerate(offline_of(bundle, binned, at.config)):
        published = np.array([bin_ in live for bin_ in bins])
        missing += int((~published).sum())
        streamed_SV = np.stack([live[bin_][2 * n : 2 * n + 2] for bin_ in bins[published]])
        gap = np.abs(streamed_SV - offline_SV[published]).max() / scale.sd
        worst = max(worst, float(gap))
        fold[name] = truth(binned, name, bins[published]) | {
            "guess": streamed_SV[:, 0],
            "sd": streamed_SV[:, 1],
        }
    fold["stream_vs_offline_max_abs"], fold["unpublished_bins"] = worst, missing
    if at.protocol.neural:
        fold["encoding"] = neural_scores(bundle, binned, at.config)
    return fold


def neds_offline(at: Setting) -> Fold:
    """The offline forward pass, for networks that cannot be served."""
    bundle, binned = at.bundle(), at.binned()
    return {
        name: truth(binned, name, bins) | {"guess": value_SV[:, 0], "sd": value_SV[:, 1]}
        for name, bins, value_SV, _ in offline_of(bundle, binned, at.config)
    }


def of_gru(at: Setting) -> Fold:
    binned, names = at.binned(), list(at.config.behaviour)
    bins = [test_bins(binned, m) for m in range(1, 1 + len(names))]
    everywhere = np.unique(np.concatenate(bins))
    window = at.config.data.window_bins  # as long as the network's
    guesses = gru(binned, names, everywhere, seed=at.config.training.seed, window=window)
    return {
        name: truth(binned, name, own)
        | {"guess": np.asarray(guesses[name]).reshape(len(everywhere))[np.isin(everywhere, own)]}
        for name, own in zip(names, bins, strict=True)
    }


def of_ridge(at: Setting) -> Fold:
    binned, fold = at.binned(), {}
    for m, name in enumerate(at.config.behaviour, start=1):
        bins = test_bins(binned, m)
        fold[name] = truth(binned, name, bins) | {"guess": ridge(binned, name, bins)}
    return fold


def of_profile(at: Setting) -> Fold:
    binned = at.binned()
    fold = {
        name: truth(binned, name, test_bins(binned, m))
        for m, name in enumerate(at.config.behaviour, start=1)
    }
    for of in fold.values():
        of["guess"] = of["profile"]
    return fold


def of_glm(at: Setting) -> Fold:
    """Poisson regressions of the spikes, the baseline of encoding and of the next bin."""
    binned = at.binned()
    bins = np.flatnonzero(binned.of_split("test") & binned.scored_TM.all(axis=1))
    counts = np.concatenate([binned.counts_TN(b, b + 1) for b in bins])
    guesses = {"encoding": glm_encoding(binned, bins), "forward_1": glm_forward_1(binned, bins)}
    return {"encoding": {n: bits_per_spike(counts, g)["mean50"] for n, g in guesses.items()}}


METHODS: dict[str, Callable[[Setting], Fold]] = {
    "neds_causal": neds_causal,
    "neds_full": neds_offline,
    "neds_modality": neds_offline,
    "gru": of_gru,
    "ridge": of_ridge,
    "mean_profile": of_profile,
    "glm": of_glm,
}
SEEDLESS = ("ridge", "mean_profile", "glm")


def overrides(method: str, protocol: Protocol) -> tuple[str, ...]:
    """What a method changes in the protocol's configuration."""
    if method == "neds_full":
        return ("model.attention=full", *protocol.full)
    return ("model.tokens=modality",) if method == "neds_modality" else ()


# -- what the methods share ----------------------------------------------------------------------


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


def offline_of(bundle: Path, binned: BinnedSession, config: TrainConfig) -> list[tuple]:
    """Name, test bins, values and scale of each behaviour, by the offline forward pass."""
    spec = load_spec(bundle)
    model, of_bundle = build_model(bundle, spec), spec.session(binned.session.id)
    spans = binned.spans("test")
    kept_T = np.concatenate([np.arange(a, b) for a, b in spans])
    values = offline_values(
        model, of_bundle, binned, spans, list(spec.behaviours), config.data.window_bins
    )
    found = []
    for m, b in enumerate(spec.behaviours, start=1):
        bins = test_bins(binned, m)
        found.append(
            (b.name, bins, values[b.name][np.isin(kept_T, bins)], of_bundle.scales[b.name])
        )
    return found


def neural_scores(bundle: Path, binned: BinnedSession, config: TrainConfig) -> dict[str, float]:
    """Bits per spike of encoding and of the next bin, over units that fired 50 times."""
    spec = load_spec(bundle)
    of_bundle = spec.session(binned.session.id)
    predicted = predict_spikes(
        build_model(bundle, spec),
        {name: config.masking.taught.get(name, 0.0) for name in ("encoding", "ahead")},
        binned,
        binned.spans("test"),
        [of_bundle.scales[b.name] for b in spec.behaviours],
        None,
        window=config.data.window_bins,
    )
    names = {"bits_per_spike": "encoding", "forward_1": "forward_1"}
    return {names[metric]: p.scores()["mean50"] for metric, p in predicted.items()}


def truth(binned: BinnedSession, name: str, bins: np.ndarray) -> dict[str, np.ndarray]:
    """True values, and the trivial guess."""
    m = binned.present.index(name) + 1
    train_S = np.flatnonzero(binned.of_split("train") & binned.scored_TM[:, m])
    phase_T = phase_in_trial(binned)
    profile_S = mean_profile(binned.values_TM[train_S, m], phase_T[train_S], phase_T[bins])
    return {"true": binned.values_TM[bins, m].astype(float), "profile": profile_S}


def summarise(by_seed: list[list[Fold]], names: list[str]) -> dict[str, Any]:
    """Target -> [mean, sd over seeds], test bins of all folds scored together."""
    entry: dict[str, Any] = {}

    def note(key: str, values: list[float]) -> None:
        entry[key] = [float(np.mean(values)), float(np.std(values))]

    for name in names if names[0] in by_seed[0][0] else ():
        scores, coverage, over_sd = [], [], []
        for folds in by_seed:
            joined = {
                key: np.concatenate([fold[name][key] for fold in folds]) for key in folds[0][name]
            }
            scores.append(r2(joined["true"], joined["guess"]))
            if "sd" in joined:
                of = gaussian_scores(
                    joined["true"], joined["guess"], joined["sd"], joined["profile"]
                )
                coverage.append(of["coverage_68"])
                over_sd.append(of["error_over_sd"])
        note(name, scores)
        if coverage:
            note(f"{name}_coverage_68", coverage)
            note(f"{name}_error_over_sd", over_sd)
    for key in by_seed[0][0].get("encoding", {}):
        note(f"{key}_mean50", [float(folds[0]["encoding"][key]) for folds in by_seed])
    for key in ("stream_vs_offline_max_abs", "unpublished_bins"):
        if key in by_seed[0][0]:
            entry[key] = max(fold[key] for folds in by_seed for fold in folds)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=None, help="dataset/protocol names")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    path = RESULTS / "accuracy.json"
    torch.set_num_threads(1)
    for protocol in PROTOCOLS:
        label = f"{protocol.dataset}/{protocol.name}"
        if args.only and label not in args.only:
            continue
        for method in args.methods:
            if method == "glm" and not protocol.neural:
                continue
            seeds = args.seeds[:1] if method in SEEDLESS else args.seeds
            by_seed = [
                [METHODS[method](s) for s in settings(protocol, method, n, args)] for n in seeds
            ]
            names = list(settings(protocol, method, 0, args)[0].config.behaviour)
            entry = summarise(by_seed, names) | {"seeds": len(seeds)}
            print(label, method, entry, flush=True)
            results = json.loads(path.read_text()) if path.is_file() else {}
            results.setdefault(protocol.dataset, {}).setdefault(protocol.name, {})[method] = entry
            results["machine"] = machine()
            path.write_text(json.dumps(results, indent=1) + "\n")


def settings(protocol: Protocol, method: str, seed: int, args: argparse.Namespace) -> list[Setting]:
    """Each fold of a protocol."""
    found = []
    for fold in protocol.folds:
        changes = [fold, *overrides(method, protocol), f"training.seed={seed}"]
        config = load_config(config_path(protocol.config), TrainConfig, changes)
        out = args.out / protocol.dataset / protocol.name / method / f"{seed}-{fold}"
        found.append(Setting(protocol, config, args.data / protocol.file, out))
    return found


if __name__ == "__main__":
    main()
