"""Training: one loop, top to bottom.

Shape suffixes: B windows, T bins, M modalities (0 is spikes), N units.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from offline.batches import Batch, Subject, draw_batch, prepare, refuse_twins
from offline.beginning import build
from offline.checkpoint import load_checkpoint, save_checkpoint
from offline.config import TrainConfig, TrainingConfig
from offline.losses import loss_of, spikes_loss
from offline.metrics import categorical_scores, poisson_d2, r2
from offline.predict import decode_spans
from offline.windows import Split
from rt_neds.bundle import BundleSession, save_bundle
from rt_neds.config import load_config
from rt_neds.errors import ConfigError, DeviceError
from rt_neds.model.neds import NEDS, SPIKES
from rt_neds.model.readout import to_values_TV


def train(
    config: TrainConfig,
    session_paths: list[str],
    out: str | Path,
    *,
    resume: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """Train on one or more sessions and leave a bundle.

    Parameters
    ----------
    config : TrainConfig
    session_paths : list of path
        Session files.
    out : path
        Folder for ``bundle/``, ``checkpoint/`` and ``log.jsonl``.
    resume : bool
        Go on from the checkpoint in ``out``, to the same losses as if it had never stopped.
    quiet : bool
        No progress bar.

    Returns
    -------
    dict
        ``bundle``, ``steps``, ``best_step``, ``best_score``, ``val`` (scores by session and
        behaviour at the best step), ``seconds``, ``parameters``.

    Raises
    ------
    SessionError, ConfigError, DeviceError
    """
    out, started = Path(out), time.monotonic()
    settings = config.training
    device = choose_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    subjects = [prepare(path, config) for path in session_paths]
    refuse_twins(subjects)
    model = build(config, subjects).to(device)
    averaged = copy.deepcopy(model).eval()
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.98),
    )
    step, best_score, best_step, best_val = 0, -math.inf, 0, {}
    best = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
    as_json = msgspec.to_builtins(config)
    if resume:
        numbers, best = load_checkpoint(
            out / "checkpoint", model=model, averaged=averaged, optimiser=optimiser, rng=rng
        )
        if numbers["config"] != json.loads(json.dumps(as_json)):
            raise ConfigError(
                f"{out} was trained with another configuration; use that one to resume"
            )
        step, best_score = numbers["step"], numbers["best_score"]
        best_step, best_val = numbers["best_step"], numbers["best_val"]

    if not resume:  # where it begins counts too: the kept weights are never worse on validation
        best_val = validate(averaged, subjects, config, "val", device)
        best_score = mean_score(best_val)
    out.mkdir(parents=True, exist_ok=True)
    with (
        (out / "log.jsonl").open("a" if resume else "w", encoding="utf-8") as log,
        progress(settings.steps, quiet) as show,
    ):
        while step < settings.steps:
            set_rate(optimiser, learning_rate(step, settings))
            batch = draw_batch(subjects, config, rng, device)
            losses = train_step(model, optimiser, batch, config)
            update_average(averaged, model, min(settings.average, (1 + step) / (10 + step)))
            step += 1
            _note(log, {"step": step, "session": batch.session, "loss": losses})
            show(step, losses["total"], best_score)
            if step % settings.validate_every and step != settings.steps:
                continue
            val = validate(averaged, subjects, config, "val", device)
            score = mean_score(val)
            _note(log, {"step": step, "score": score, "val": val})
            if score > best_score:
                best_score, best_step, best_val = score, step, val
                best = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
            save_checkpoint(
                out / "checkpoint",
                model=model,
                averaged=averaged,
                best=best,
                optimiser=optimiser,
                rng=rng,
                numbers={
                    "step": step,
                    "best_score": best_score,
                    "best_step": best_step,
                    "best_val": best_val,
                    "config": as_json,
                },
            )
    averaged.load_state_dict(best)
    summary = {
        "bundle": str(out / "bundle"),
        "steps": step,
        "best_step": best_step,
        "best_score": best_score,
        "val": best_val,
        "seconds": round(time.monotonic() - started, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    save_bundle(
        out / "bundle",
        averaged,
        bin_ms=config.data.bin_ms,
        sessions=[_bundle_session(subject, config) for subject in subjects],
        training={"config": as_json, **{k: summary[k] for k in ("steps", "best_step", "val")}},
    )
    return summary


# -- before the loop -----------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device named, or the GPU if there is one for ``auto``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(f"device {name}, but torch sees no GPU; use device = 'cpu' or 'auto'")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"training.device {name}; expected auto, cpu or cuda") from None


def _bundle_session(subject: Subject, config: TrainConfig) -> BundleSession:
    session = subject.binned.session
    names = list(config.behaviour)
    return BundleSession(
        id=session.id,
        units=session.unit_ids,
        rate=session.rate,
        scales=dict(zip(names, subject.scales, strict=True)),
        behaviours=list(subject.binned.present),
    )


# -- inside the loop -----------------------------------------------------------------------------


def train_step(
    model: NEDS, optimiser: torch.optim.Optimizer, batch: Batch, config: TrainConfig
) -> dict[str, float]:
    """One step of the optimiser; returns the loss of each modality and the total."""
    model.train()
    losses = batch_losses(model, batch, config)
    total = torch.stack(list(losses.values())).sum()
    if not torch.isfinite(total):
        raise ConfigError(
            "the loss is no longer finite; lower training.learning_rate and train again"
        )
    optimiser.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.clip)
    optimiser.step()
    return {"total": total.item(), **{name: loss.item() for name, loss in losses.items()}}


def batch_losses(model: NEDS, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """Weighted loss of each modality that was asked for.

    Samples of one scheme go through the network together: they share which modalities are keys, and
    a token that is neither shown nor asked for costs nothing.
    """
    groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for scheme in batch.scheme_B.unique():
        rows = (batch.scheme_B == scheme).nonzero()[:, 0]
        asked_BTM = batch.asked_BTM[rows]
        asked_M = asked_BTM.any(dim=1).any(dim=0).tolist()
        outputs = model(
            batch.session,
            batch.counts_BTN[rows],
            batch.inputs_BTM[rows],
            batch.observed_BTM[rows],
            batch.scheme_B[rows],
            missing_BTN=batch.missing_BN[rows, None],
            wanted=[name for m, name in enumerate(model.modalities) if asked_M[m]],
        )
        for name, raw_BTC in outputs.items():
            groups.setdefault(name, []).append((rows, raw_BTC))
    losses = {}
    for name, parts in groups.items():
        rows = torch.cat([rows for rows, _ in parts])
        raw_BTC = torch.cat([raw for _, raw in parts])
        m = model.modalities.index(name)
        asked_BT = batch.asked_BTM[rows, :, m]
        if name == SPIKES:
            loss = spikes_loss(raw_BTC, batch.counts_BTN[rows], asked_BT)
            losses[name] = config.training.spikes_weight * loss
        else:
            kind = config.behaviour[name].kind
            target = batch.inputs_BTM if kind == "gaussian" else batch.targets_BTM
            loss = loss_of(kind, raw_BTC, target[rows, :, m], asked_BT)
            losses[name] = config.behaviour[name].weight * loss
    return losses


def learning_rate(step: int, settings: TrainingConfig) -> float:
    """One cycle: up from a tenth in the warm-up, then down a cosine to a thousandth."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.learning_rate * (0.1 + 0.9 * step / warm)
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * done)))


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


@torch.no_grad()
def update_average(averaged: NEDS, model: NEDS, decay: float) -> None:
    """Running average of the weights: steadier than any of them, and what is kept."""
    for mean, now in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(now, 1.0 - decay)


def validate(
    model: NEDS, subjects: list[Subject], config: TrainConfig, split: Split, device: torch.device
) -> dict[str, dict[str, float]]:
    """Score of each behaviour of each session on a split: R2, balanced accuracy, or Poisson D2."""
    return {
        subject.id: _validate_one(model, subject, config, split, device) for subject in subjects
    }


def _validate_one(
    model: NEDS, subject: Subject, config: TrainConfig, split: Split, device: torch.device
) -> dict[str, float]:
    binned = subject.binned
    spans = binned.spans(split)
    kept = np.concatenate([np.arange(a, b) for a, b in spans]) if spans else np.arange(0)
    raws = decode_spans(
        model, binned, spans, wanted=binned.present, window=config.data.window_bins, device=device
    )
    scores = {}
    for m, behaviour in enumerate(model.behaviours, start=1):
        if behaviour.name not in binned.present:
            continue
        scored = binned.scored_TM[kept, m]
        true_S = binned.values_TM[kept, m][scored]
        if len(true_S) < 2:
            continue
        raw_SC = torch.from_numpy(raws[behaviour.name][scored])
        value_SV = to_values_TV(raw_SC, behaviour, subject.scales[m - 1]).numpy()
        if behaviour.kind == "gaussian":
            scores[behaviour.name] = r2(true_S, value_SV[:, 0])
        elif behaviour.kind == "poisson":
            scores[behaviour.name] = poisson_d2(true_S, value_SV[:, 0])
        else:
            by_trial = categorical_scores(
                true_S.astype(np.int64), value_SV, binned.trial_T[kept][scored].astype(np.int64)
            )
            scores[behaviour.name] = by_trial["balanced_accuracy_bins"]
    return scores


def mean_score(val: dict[str, dict[str, float]]) -> float:
    """Mean over sessions and behaviours; what the kept weights are chosen by."""
    scores = [score for of_session in val.values() for score in of_session.values()]
    return float(np.mean(scores)) if scores else 0.0


# -- what people see -----------------------------------------------------------------------------


class progress:
    """A bar on a terminal, nothing elsewhere. Calling it shows a step."""

    def __init__(self, steps: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn(
                "{task.completed}/{task.total}  loss {task.fields[loss]}  "
                "best validation score {task.fields[best]}"
            ),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, loss="-", best="-")

    def __enter__(self) -> progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, step: int, loss: float, best: float) -> None:
        shown = f"{best:.3f}" if math.isfinite(best) else "-"
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", best=shown)


def _note(log: Any, entry: dict[str, Any]) -> None:
    log.write(json.dumps(entry) + "\n")
    log.flush()


# -- command -------------------------------------------------------------------------------------


TAKES_CONFIG = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sessions", nargs="+", required=True, metavar="S.h5", help="session files"
    )
    parser.add_argument(
        "--out", required=True, metavar="RUN", help="folder; the bundle is RUN/bundle"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in RUN")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.config is None:
        raise ConfigError("train needs --config FILE; see the folder configs/ for complete ones")
    config = load_config(args.config, TrainConfig, args.set)
    summary = train(config, args.sessions, args.out, resume=args.resume, quiet=args.quiet)
    if not args.quiet:
        scores = ", ".join(
            f"{name} {score:.3f}"
            for of_session in summary["val"].values()
            for name, score in of_session.items()
        )
        print(
            f"{summary['bundle']}: {summary['parameters'] / 1e6:.2f} M parameters, "
            f"{summary['steps']} steps in {summary['seconds']} s; "
            f"validation at step {summary['best_step']}: {scores}"
        )
    return summary
