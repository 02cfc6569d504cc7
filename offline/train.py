"""Training: one loop, top to bottom.

Shape suffixes: B windows, T bins, M modalities (0 is spikes), N units.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from offline.alone import (
    as_kept,
    leave_to_regression,
    left_to_regression,
    regressions_validated,
)
from offline.average import RunningAverage, touched
from offline.batches import Batch, Step, Subject, draw_step, refuse_twins
from offline.beginning import build, fit_linear
from offline.cache import kept
from offline.calibration import calibrate
from offline.checkpoint import Best, load_checkpoint, open_log, save_checkpoint
from offline.config import TrainConfig
from offline.denormals import flushed
from offline.expectation import expectation_of
from offline.finetune import begin_at_bundle, keep_scales, refuse_other_units
from offline.losses import loss_of, spikes_loss
from offline.memory import give_back_freed, keep_freed
from offline.optimiser import make_optimiser, set_rates
from offline.precision import bf16_products, rounds_factors
from offline.processes import Processes, join, leave
from offline.progress import progress
from offline.shards import Shards
from offline.silence import longest_silences
from offline.validation import Scores, Validation, in_words, mean_score, refuse_nonfinite, validate
from rt_neds.bundle import BundleSession, save_bundle
from rt_neds.config import load_config
from rt_neds.errors import ConfigError
from rt_neds.model.neds import AHEAD, NEDS, SCHEMES
from rt_neds.model.rounding import round_weights
from rt_neds.result import make_folder
from rt_neds.session import load_session

BUNDLED = ("steps", "best_step", "val", "by_regression")
"""What of the summary is told in the bundle."""


def train(
    config: TrainConfig,
    session_paths: list[str],
    out: str | Path,
    *,
    init: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
    on_validation: Callable[[int, Scores], None] | None = None,
) -> dict[str, Any]:
    """Train on one or more sessions and leave a bundle.

    Parameters
    ----------
    config : TrainConfig
    session_paths : list of path
        Session files.
    out : path
        Folder for ``bundle/``, ``checkpoint/`` and ``log.jsonl``.
    init : path, optional
        Bundle whose trunk to begin with: fine-tuning.
    resume : bool
        Go on from the checkpoint in ``out``, to the same losses as if it had never stopped.
    quiet : bool
        No progress bar.
    on_validation : callable, optional
        Called with the step and the scores of each validation; what it raises ends the training.

    Returns
    -------
    dict
        ``bundle``, ``steps``, ``best_step``, ``best_score``, ``val`` (scores by session and
        behaviour at the best step), ``by_regression`` (behaviours of each session that are left to
        its own regression), ``temperature`` (of categorical ones), ``seconds``, ``parameters``.

    Raises
    ------
    SessionError, ConfigError, DeviceError
    """
    out, started = Path(out), time.monotonic()
    settings = config.training
    if init is not None and (out / "bundle").resolve() == Path(init).resolve():
        raise ConfigError(
            f"{init} is what this run begins with, and would leave; name another --out"
        )
    make_folder(out)  # told before the work
    processes = join(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    keep_freed()
    subjects = open_sessions(session_paths, config, out, processes)
    torch.manual_seed(settings.seed)
    model, known = build(config, subjects), dict[str, list[str]]()
    if init is not None:
        refuse_other_units(init, {subject.id: subject.units for subject in subjects})
        keep_scales(subjects, init, config)
        known = begin_at_bundle(model, init, config)
    fit_linear(model, processes.own(subjects), known)
    processes.wait()  # what the others fitted is on disk
    fit_linear(model, subjects, known)
    model = model.to(processes.device)
    parameters = sum(p.numel() for p in model.parameters())
    shards = Shards(model, processes)
    average = RunningAverage(model)
    optimiser = make_optimiser(model, settings)
    state: dict[str, Any] = {"model": model, "averaged": average.mean, "optimiser": optimiser}
    state["config"] = {
        "config": msgspec.to_builtins(config),
        "sessions": [[subject.id, _digest(subject)] for subject in subjects],
    }
    step, best = 0, Best({n: t.clone() for n, t in average.mean.state_dict().items()})
    if resume:
        step, best = load_checkpoint(out / "checkpoint", **state)
    alone = regressions_validated(
        average.mean,
        subjects,
        processes,
        lambda: validate_all(average.mean, subjects, config, processes),
    )
    with (
        open_log(out, step if resume else None, processes.first) as log,
        progress(settings.steps, quiet or not processes.first) as show,
    ):

        def judge() -> None:
            give_back_freed()
            now = validate_all(average.mean, subjects, config, processes)
            val = as_kept(now, alone, left_to_regression(now, alone, subjects, processes))
            refuse_nonfinite(val, step)
            score = mean_score(val)
            _note(log, {"step": step, "score": score, "val": now.scores})
            if on_validation is not None:
                on_validation(step, val)
            best.offer(step, score, val, average.mean)

        if not resume:  # where it begins counts too: the kept weights are never worse on validation
            judge()
        while step < settings.steps:
            set_rates(optimiser, step, settings)
            # What a step draws depends on the seed and on its number, and on nothing before it.
            rng = np.random.default_rng((settings.seed, step))
            torch.manual_seed(int(rng.integers(2**62)) + processes.number)
            drawn = draw_step(
                subjects, config, rng, processes.device, processes.number, processes.count
            )
            average.before(drawn.sessions)
            with shards.borrowed(model, drawn.sessions), flushed():
                losses = train_step(model, optimiser, drawn, config, processes)
            average.after(drawn.sessions, min(settings.average, (1 + step) / (10 + step)))
            step += 1
            _note(log, {"step": step, "session": drawn.sessions, "loss": losses})
            show(step, losses["total"], best.score)
            if step % settings.validate_every and step != settings.steps:
                continue
            average.settle()
            judge()
            save_checkpoint(out / "checkpoint", processes, **state, best=best, step=step)
    summary = finish(average.mean, best, alone, subjects, config, out, shards, processes)
    return {
        **summary,
        "seconds": round(time.monotonic() - started, 1),
        "parameters": parameters,
    }


# -- before the loop -----------------------------------------------------------------------------


def open_sessions(
    paths: list[str], config: TrainConfig, out: Path, processes: Processes
) -> list[Subject]:
    """Sessions on the grid of bins, kept on disk; the processes share the work of putting them so.

    Raises
    ------
    SessionError, ConfigError
        If a session cannot be used, or none of them has some behaviour.
    """
    cache = Path(config.data.cache) if config.data.cache else out / "cache"
    for path in processes.own(paths):
        kept(path, config, cache)
    processes.wait()
    subjects = [kept(path, config, cache) for path in paths]
    refuse_twins(subjects)
    refuse_untaught(subjects, config)
    for name, behaviour in config.behaviour.items():
        if not any(name in subject.present for subject in subjects):
            for source in behaviour.sources:
                load_session(paths[0]).column(source)  # says what is there instead
    return subjects


def refuse_untaught(subjects: list[Subject], config: TrainConfig) -> None:
    """ConfigError for a behaviour of which nothing could be learned, as if it had been."""
    for m, (name, behaviour) in enumerate(config.behaviour.items(), start=1):
        having = [subject for subject in subjects if name in subject.present]
        if having and not any(
            (subject.binned.scored_TM[:, m] & subject.binned.of_split("train")).any()
            for subject in having
        ):
            of = " and ".join(behaviour.scored) if behaviour.is_trial_variable else "its values"
            raise ConfigError(
                f"behaviour.{name}: nothing of {', '.join(behaviour.sources)} can be scored in the "
                f"training split of {having[0].id}; look at {of} there, or leave it out"
            )


def _bundle_session(
    model: NEDS, subject: Subject, config: TrainConfig, device: torch.device
) -> BundleSession:
    return BundleSession(
        id=subject.id,
        units=subject.units,
        rate=subject.rate,
        scales=dict(zip(config.behaviour, subject.scales, strict=True)),
        behaviours=list(subject.present),
        expectation=expectation_of(model, subject.binned, config, device),
        longest_silence=longest_silences(subject.binned),
    )


# -- after the loop ------------------------------------------------------------------------------


def finish(
    model: NEDS,
    best: Best,
    alone: Validation,
    subjects: list[Subject],
    config: TrainConfig,
    out: Path,
    shards: Shards,
    processes: Processes,
) -> dict[str, Any]:
    """Make the best weights a bundle: what was not shown to be learned left to regression."""
    model.load_state_dict(best.weights)
    round_weights(model)  # as the bundle will have it: that is what is judged and calibrated
    now = validate_all(model, subjects, config, processes)
    left = left_to_regression(now, alone, subjects, processes)
    own = processes.own(subjects)
    leave_to_regression(model, own, left)
    found = calibrate(model, own, config.data.window_bins, processes.device)
    found = processes.gather(found, [subject.id for subject in subjects], [*config.behaviour])
    shards.gather(model)
    summary = {
        "bundle": str(out / "bundle"),
        "steps": config.training.steps,
        "best_step": best.step,
        "best_score": best.score,
        "val": best.val,
        "by_regression": {session: names for session, names in left.items() if names},
        "temperature": {session: of for session, of in found.items() if of},
    }
    if processes.first:
        told = {name: summary[name] for name in BUNDLED}
        save_bundle(
            out / "bundle",
            model,
            bin_ms=config.data.bin_ms,
            sessions=[_bundle_session(model, s, config, processes.device) for s in subjects],
            training={"config": msgspec.to_builtins(config), **told},
        )
    processes.wait()
    return summary


# -- inside the loop -----------------------------------------------------------------------------


def train_step(
    model: NEDS,
    optimiser: torch.optim.Optimizer,
    step: Step,
    config: TrainConfig,
    processes: Processes,
) -> dict[str, float]:
    """One step of the optimiser; returns the loss of each modality and the total.

    Each is a mean over all that the step asks, in whatever parts and processes.
    """
    model.train()
    optimiser.zero_grad(set_to_none=True)
    losses_K = torch.zeros(len(step.asked), device=processes.device)
    kind, bf16 = processes.device.type, config.training.precision == "bf16"
    with bf16_products(bf16 and kind == "cpu"):
        for batch in step.batches:
            with torch.autocast(kind, torch.bfloat16, enabled=bf16 and kind != "cpu"):
                losses = batch_losses(model, batch, config)
            if losses:
                torch.stack(list(losses.values())).sum().backward()
            for name, loss in losses.items():
                losses_K[step.asked.index(name)] += loss.detach()
    processes.sum(losses_K)
    total = losses_K.sum().item()
    if not math.isfinite(total):
        raise ConfigError(
            "the loss is no longer finite; lower training.learning_rate and train again"
        )
    used = touched(model, step.sessions)
    processes.sum_gradients(used)
    _clip(used, config.training.clip)
    optimiser.step()
    return {"total": total, **dict(zip(step.asked, losses_K.tolist(), strict=True))}


def _clip(parameters: list[nn.Parameter], largest: float) -> None:
    """Shorten the gradient if it is longer; one that is not is not written again."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm > largest:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)


def validate_all(
    model: NEDS, subjects: list[Subject], config: TrainConfig, processes: Processes
) -> Validation:
    """Scores of each session on the validation split; the processes share the sessions."""
    own = validate(model, processes.own(subjects), config, "val", processes.device)
    names = [*config.behaviour, *SCHEMES, AHEAD]
    scores = processes.gather(own.scores, [subject.id for subject in subjects], names)
    return Validation(scores, own.losses)


def batch_losses(model: NEDS, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """Weighted loss of each modality that was asked for.

    Samples of one scheme go through the network together: they share which modalities are keys, and
    a token that is neither shown nor asked for costs nothing.
    """
    groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
    schemes = batch.scheme_B.unique()

    def of(x: Tensor, rows_S: Tensor) -> Tensor:
        return x if len(schemes) == 1 else x[rows_S]  # a copy of everything takes its time

    for scheme in schemes:
        rows = (batch.scheme_B == scheme).nonzero()[:, 0]
        asked_BTM = of(batch.asked_BTM, rows)
        asked_M = asked_BTM.any(dim=1).any(dim=0).tolist()
        wanted = [name for m, name in enumerate(model.modalities) if asked_M[m]]
        if of(batch.ahead_BT, rows).any():
            wanted.append(AHEAD)
        outputs = model(
            batch.session,
            of(batch.counts_BTN, rows),
            of(batch.inputs_BTM, rows),
            of(batch.observed_BTM, rows),
            of(batch.scheme_B, rows),
            missing_BTN=of(batch.missing_BN, rows)[:, None],
            fits=batch.fits and (*batch.fits[:2], of(batch.fits[2], rows)),
            wanted=wanted,
        )
        for name, raw_BTC in outputs.items():
            groups.setdefault(name, []).append((rows, raw_BTC.float()))
    losses = {}
    for name, parts in groups.items():
        rows = torch.cat([rows for rows, _ in parts])
        raw_BTC = parts[0][1] if len(parts) == 1 else torch.cat([raw for _, raw in parts])
        m = 0 if name == AHEAD else model.modalities.index(name)
        asked_BT = of(batch.ahead_BT if name == AHEAD else batch.asked_BTM[:, :, m], rows)
        if m == 0:
            counts_BTN = of(batch.counts_BTN[:, -asked_BT.shape[1] :], rows)
            asked_BN = of(batch.asked_BN, rows)
            loss = spikes_loss(raw_BTC, counts_BTN, asked_BT, asked_BN, batch.rate_N)
            losses[name] = config.training.spikes_weight * loss
        else:
            kind = config.behaviour[name].kind
            target_BT, scale = of(batch.targets_BTM[:, :, m], rows), batch.scales[m - 1]
            loss = loss_of(kind, raw_BTC, target_BT, asked_BT, scale)
            losses[name] = config.behaviour[name].weight * loss
    return {name: batch.share[name] * loss for name, loss in losses.items() if name in batch.share}


def _digest(subject: Subject) -> str:
    """What the weights of a session are of: its units and steps."""
    said = msgspec.json.encode([subject.units, subject.scales])
    return hashlib.sha256(said).hexdigest()[:16]


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
    parser.add_argument("--init", metavar="BUNDLE", help="fine-tune: begin with this trunk")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in RUN")


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.config is None:
        raise ConfigError("train needs --config FILE; see the folder configs/ for complete ones")
    config = load_config(args.config, TrainConfig, args.set)
    if (bundle := Path(args.out) / "bundle").exists() and not args.resume:
        raise ConfigError(f"{bundle} is there already; name another --out, or add --resume")
    first, on_cpu = int(os.environ.get("RANK", "0")) == 0, not torch.cuda.is_available()
    if config.training.precision == "bf16" and on_cpu and not rounds_factors() and first:
        told = 'precision = "bf16": PyTorch multiplies in float32 on this processor all the same'
        print(told, file=sys.stderr)
    try:
        summary = train(
            config, args.sessions, args.out, init=args.init, resume=args.resume, quiet=args.quiet
        )
    finally:
        leave()
    if not first:  # all have the same result; the first one tells it
        return None
    if not args.quiet:
        scores = in_words(summary["val"])
        print(
            f"{summary['bundle']}: {summary['parameters'] / 1e6:.2f} M parameters, "
            f"{summary['steps']} steps in {summary['seconds']} s; "
            f"validation at step {summary['best_step']}: {scores or 'none, the last step is kept'}"
        )
    return summary
