"""``rt-neds sweep``: which settings of a training run are best on validation, by Ray Tune.

Settings are drawn at random, and trials that fall behind are stopped early (ASHA: Li and others,
arXiv 1810.05934), as NEDS was tuned.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from offline.config import TrainConfig
from rt_neds.config import load_config
from rt_neds.errors import ConfigError, DeviceError, RtNedsError
from rt_neds.result import make_folder

if TYPE_CHECKING:
    from offline.validation import Scores

TAKES_CONFIG = True

STORE_BYTES = 100 << 20
"""Of the memory that Ray's processes share; a trial is handed little more than paths."""

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # what is trained here is told to no one
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a path means the same in a trial as on the command line
    "RAY_AIR_NEW_OUTPUT": "0",  # the old output can be silenced
}
RAY_ALONE = {"RAY_AUTH_MODE": "token"}  # its ports can be seen from outside this machine


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """What one setting may be: exactly one of these.

    Attributes
    ----------
    uniform, log_uniform : (float, float)
        Any number between the two, or between their logarithms.
    choice : list
        One of these.
    """

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    choice: list[Any] | None = None

    def __post_init__(self) -> None:
        given = [bounds for bounds in (self.uniform, self.log_uniform) if bounds is not None]
        if len(given) + (self.choice is not None) != 1:
            raise ValueError("give one of uniform, log_uniform and choice")
        if any(low >= high for low, high in given) or self.choice == []:
            raise ValueError("low < high, or at least one choice, is needed")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError("log_uniform needs positive numbers")

    @property
    def ends(self) -> list[Any]:
        """The values that must be usable for the rest to be."""
        return list(self.choice or self.uniform or self.log_uniform or ())


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """A search.

    Attributes
    ----------
    config : str
        TOML of the training run that is varied; beside this file, unless the path is absolute.
    samples : int
        Trials.
    grace : int
        Optimiser steps before which no trial is stopped.
    reduction : int
        Of the trials that get as far as a rung, one in so many goes on; each rung is so many times
        as far as the one before.
    space : dict of str to Range
        By ``section.key`` of that TOML.
    cpus, gpus : float
        Of one trial; as many trials run side by side as the machine or the cluster holds.
    seed : int
        Of the draws.
    """

    config: str
    space: dict[str, Range]
    samples: int = 20
    grace: int = 100
    reduction: int = 3
    cpus: float = 1.0
    gpus: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("space: name at least one setting to vary")
        if self.samples < 1 or self.grace < 1 or self.reduction < 2:
            raise ValueError("samples >= 1, grace >= 1 and reduction >= 2 are needed")
        if self.cpus <= 0 or self.gpus < 0:
            raise ValueError("cpus > 0 and gpus >= 0 are needed")


class SweepConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One complete search."""

    sweep: Sweep


def sweep(
    search: Sweep,
    base: Path,
    session_paths: list[str],
    out: str | Path,
    *,
    address: str | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Try settings and rank them by their best validation score.

    The score is the mean of the behaviours' own, or, where none is decoded, of what is asked of
    spikes. A behaviour's share explained and bits per spike are different units: a mean over both
    would be best where little is asked.

    Parameters
    ----------
    search : Sweep
    base : path
        TOML of the training run that is varied.
    session_paths : list of path
    out : path
        Folder for ``best.toml``, one training run for each trial, and the sessions they share.
    address : str, optional
        Of a Ray cluster whose machines all see the sessions and ``out`` under these paths; by
        default this machine alone.
    quiet : bool
        No progress bar.

    Returns
    -------
    dict
        ``trials``, best first: ``trial``, ``score``, ``best_step``, ``steps``, ``settings``, and
        ``error`` of one that could not be trained; ``best`` (the first of them), ``config`` (a
        TOML to train with), ``seconds``.

    Raises
    ------
    ConfigError
        If Ray is missing, the settings cannot be used, or no trial could be trained.
    DeviceError
        If Ray does not start here.
    """
    started, out = time.monotonic(), Path(out).resolve()
    longest = _longest(search, base)  # what cannot be used is told first, with Ray or without
    tune = _ray_tune(address)
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    make_folder(out)
    _start_ray(address)
    tuner = tune.Tuner(
        tune.with_resources(_trial, {"cpu": search.cpus, "gpu": search.gpus}),
        param_space={
            "settings": {key: _domain(tune, of) for key, of in search.space.items()},
            "base": str(base.resolve()),
            "sessions": [str(Path(path).resolve()) for path in session_paths],
            "out": str(out),
        },
        tune_config=tune.TuneConfig(
            num_samples=search.samples,
            trial_dirname_creator=lambda trial: trial.trial_id,
            search_alg=BasicVariantGenerator(random_state=search.seed),
            scheduler=ASHAScheduler(
                time_attr="step",
                metric="best",
                mode="max",
                max_t=longest + 1,  # a trial that gets there ends by itself, and leaves a bundle
                grace_period=min(search.grace, longest),
                reduction_factor=search.reduction,
            ),
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(out),
            verbose=0,
            callbacks=[_progress(tune, search.samples, quiet)],
        ),
    )
    trials = sorted(map(_outcome, tuner.fit()), key=lambda t: -t.get("score", -math.inf))
    if "score" not in trials[0]:
        raise ConfigError(f"no trial could be trained; the first said: {trials[0]['error']}")
    _write_toml(out / "best.toml", _with(base, trials[0]["settings"]))
    return {
        "best": trials[0],
        "config": str(out / "best.toml"),
        "trials": trials,
        "seconds": round(time.monotonic() - started, 1),
    }


# -- one trial -----------------------------------------------------------------------------------


def _trial(drawn: dict[str, Any]) -> None:
    """Train once; runs in a process of Ray's."""
    from ray import tune

    from offline.train import train

    best, best_step, name = -math.inf, 0, tune.get_context().get_trial_id()

    def report(step: int, val: Scores) -> None:
        nonlocal best, best_step
        score = _score(val, _ranked_by(config))
        if score > best:
            best, best_step = score, step
        tune.report({"step": step, "score": score, "best": best, "best_step": best_step})

    try:
        config = _with(Path(drawn["base"]), drawn["settings"])
        if not config.data.cache:  # the sessions are the same for all trials
            shared = msgspec.structs.replace(config.data, cache=str(Path(drawn["out"]) / "cache"))
            config = msgspec.structs.replace(config, data=shared)
        train(config, drawn["sessions"], Path(drawn["out"]) / name, on_validation=report)
    except RtNedsError as error:
        # A setting that does not go with another one ends its trial, not the search.
        tune.report({"step": 0, "best": -math.inf, "error": str(error)})


def _outcome(result: Any) -> dict[str, Any]:
    metrics, trial = result.metrics or {}, {"settings": result.config["settings"]}
    if result.error is not None or "score" not in metrics or "error" in metrics:
        said = metrics.get("error") or str(result.error or "it reported nothing").splitlines()[-1]
        return {**trial, "error": said}
    return {
        "trial": str(Path(result.config["out"]) / Path(result.path).name),
        "score": metrics["best"],
        "best_step": metrics["best_step"],
        "steps": metrics["step"],
        **trial,
    }


# -- settings ------------------------------------------------------------------------------------


def _with(base: Path, settings: dict[str, Any]) -> TrainConfig:
    """The training run with some settings replaced."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return load_config(base, TrainConfig, overrides)


def _longest(search: Sweep, base: Path) -> int:
    """Most steps of any trial; also tries each setting once, before anything is started."""
    same = {key: of.ends[0] for key, of in search.space.items() if len(of.ends) == 1}
    steps = [_validated(base, same).training.steps]
    for key, of in search.space.items():
        configs = [_validated(base, {**same, key: value}) for value in of.ends]
        asked = [" and ".join(_ranked_by(config)) for config in configs]
        if len(set(asked)) > 1:
            raise ConfigError(
                f"{key}: trials would be ranked by {', or '.join(dict.fromkeys(asked))}; scores of "
                "different things cannot be compared: search among settings that ask the same"
            )
        steps += [config.training.steps for config in configs]
    return max(steps)


def _validated(base: Path, settings: dict[str, Any]) -> TrainConfig:
    """The training run with some settings replaced; refused if it would not be validated."""
    config = _with(base, settings)
    if config.data.refit:
        raise ConfigError(
            f"{base}: data.refit = true leaves no validation split to rank trials by; put "
            '"data.refit" = { choice = [false] } under [sweep.space]'
        )
    return config


def _ranked_by(config: TrainConfig) -> list[str]:
    """What of its validation a trial is ranked by."""
    if config.behaviour and config.masking.schemes.get("decoding"):
        return list(config.behaviour)
    return [name for name, weight in config.masking.taught.items() if weight]


def _score(val: Scores, names: list[str]) -> float:
    scores = [of[name] for of in val.values() for name in names if name in of]
    if not scores:
        raise ConfigError(
            f"validation gave no score of {' or '.join(names)}, by which trials are ranked; give "
            "it more of the session, by data.split or data.fractions"
        )
    return float(np.mean(scores))


def _domain(tune: Any, of: Range) -> Any:
    if of.choice is not None:
        return tune.choice(of.choice)
    if of.log_uniform is not None:
        return tune.loguniform(*of.log_uniform)
    assert of.uniform is not None  # a range has one of the three
    return tune.uniform(*of.uniform)


def _write_toml(path: Path, config: TrainConfig) -> None:
    path.write_bytes(msgspec.toml.encode(config))


# -- Ray -----------------------------------------------------------------------------------------


def _ray_tune(address: str | None) -> Any:
    for name, value in (RAY_ENVIRONMENT | ({} if address else RAY_ALONE)).items():
        os.environ.setdefault(name, value)
    try:
        import tomli_w  # noqa: F401  (msgspec writes TOML with it)
        from ray import tune
    except ImportError as error:
        raise ConfigError(
            f"rt-neds sweep needs Ray Tune ({error}); pip install 'rt-neds[sweep]'"
        ) from None
    return tune


def _start_ray(address: str | None) -> None:
    import ray

    if ray.is_initialized():
        return
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"no Ray cluster at {address} ({str(error).splitlines()[0]}); "
                "start one with ray start, or leave out --address"
            ) from None
        return
    try:
        ray.init(
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=STORE_BYTES,
        )
    except Exception as error:  # Ray has no narrower name for a start that takes too long
        raise DeviceError(
            f"Ray did not start on this machine ({str(error).splitlines()[0]}); "
            "try again when it is less busy, or name a cluster with --address"
        ) from None


def _progress(tune: Any, samples: int, quiet: bool) -> Any:
    """A bar on a terminal, nothing elsewhere, that Ray tells how trials go."""

    class Shown(tune.Callback):
        best = -math.inf

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Ray pickles what it calls back, and a terminal cannot be

        def setup(self, **_: Any) -> None:
            self.bar = _bar(quiet)
            self.task = self.bar.add_task("trials", total=samples, best="-")
            self.bar.start()

        def on_trial_result(self, result: dict[str, Any], **_: Any) -> None:
            self.best = max(self.best, result["best"])
            best = f"{self.best:.4f}" if math.isfinite(self.best) else "-"
            self.bar.update(self.task, best=best)

        def on_trial_complete(self, **_: Any) -> None:
            self.bar.advance(self.task)

        def on_experiment_end(self, **_: Any) -> None:
            self.bar.stop()

    return Shown()


def _bar(quiet: bool) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("trials"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  best validation score {task.fields[best]}"),
        TimeElapsedColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )


# -- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sessions", nargs="+", required=True, metavar="S.h5", help="session files"
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="for best.toml and a run for each trial"
    )
    parser.add_argument("--address", help="of a Ray cluster; by default this machine alone")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.config is None:
        raise ConfigError("sweep needs --config FILE; configs/sweep.toml is a complete one")
    search = load_config(args.config, SweepConfig, args.set).sweep
    base = Path(args.config).parent / search.config
    result = sweep(search, base, args.sessions, args.out, address=args.address, quiet=args.quiet)
    if not args.quiet:
        _show(search, result)
    return result


def _show(search: Sweep, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    varied = [key for key, of in search.space.items() if len(of.ends) > 1]
    table = Table("", "score", "at step", "of", *varied)
    for rank, trial in enumerate(result["trials"], start=1):
        scored = (
            (f"{trial['score']:.4f}", str(trial["best_step"]), str(trial["steps"]))
            if "score" in trial
            else ("failed", "", "")
        )
        values = (trial["settings"][key] for key in varied)
        table.add_row(
            str(rank), *scored, *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
        )
    console = Console(file=sys.stdout)
    console.print(table)
    for said in sorted({trial["error"] for trial in result["trials"] if "error" in trial}):
        console.print(f"failed: {said}", markup=False)
    console.print(f"{result['config']}: the best of them, to train with", markup=False)
