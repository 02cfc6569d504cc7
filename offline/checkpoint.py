"""Everything a training run needs to go on as if it had never stopped. No pickle."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from offline.processes import Processes
from rt_neds.errors import ConfigError

NAME = "checkpoint.safetensors"
"""The numbers are JSON in its metadata; with one process it is the only file."""
NUMBERS = ("step", "best_score", "best_step", "best_val", "config")
OF_SESSION = ".sessions."
"""In the names of what belongs to a session."""


@dataclass
class Best:
    """What did best on validation so far.

    Attributes
    ----------
    weights : dict of str to tensor
        State of the averaged model.
    score : float
    step : int
    val : dict
        Scores by session and behaviour.
    """

    weights: dict[str, Tensor]
    score: float = -math.inf
    step: int = 0
    val: dict[str, dict[str, float]] = field(default_factory=dict)

    def offer(
        self, step: int, score: float, val: dict[str, dict[str, float]], averaged: nn.Module
    ) -> None:
        """Keep a model if none was better; of equals the last: without validation all are equal."""
        if score >= self.score:
            self.weights = {name: t.clone() for name, t in averaged.state_dict().items()}
            self.score, self.step, self.val = score, step, val


def save_checkpoint(
    folder: Path,
    processes: Processes,
    *,
    model: nn.Module,
    averaged: nn.Module,
    optimiser: torch.optim.Optimizer,
    best: Best,
    step: int,
    config: Any,
) -> None:
    """Write a checkpoint; the older one stays readable until the new one is whole.

    Each process writes what it keeps; the first one's file, written last, names the others'.

    Parameters
    ----------
    folder : path
    processes : Processes
        All must come here together.
    model, averaged : module
    optimiser : AdamW
    best : Best
    step : int
    config : dict
        The run's, as JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _states(model, averaged, best.weights) | _moments(model, optimiser)
    if not processes.first:
        tensors = {name: tensor for name, tensor in tensors.items() if OF_SESSION in name}
        _write(folder / _part_name(step, processes.number), tensors, {})
    processes.wait()
    if not processes.first:
        return
    numbers = {
        "step": step,
        "best_score": best.score,
        "best_step": best.step,
        "best_val": best.val,
        "config": config,
        "parts": [_part_name(step, number) for number in range(1, processes.count)],
    }
    _write(folder / NAME, tensors, {"numbers": json.dumps(numbers)})
    for path in folder.glob(_part_name("*", "*")):
        if path.name not in numbers["parts"]:
            path.unlink()


def _part_name(step: int | str, number: int | str) -> str:
    return f"step-{step}-process-{number}.safetensors"


def _states(model: nn.Module, averaged: nn.Module, best: dict[str, Tensor]) -> dict[str, Tensor]:
    states = {"model": model.state_dict(), "averaged": averaged.state_dict(), "best": best}
    return {f"{of}.{name}": t for of, state in states.items() for name, t in state.items()}


def _moments(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """By name of parameter and of moment; the optimiser knows parameters by their places in it."""
    moments, names = optimiser.state_dict()["state"], _names(model, optimiser)
    return {
        f"optimiser.{names[place]}.{key}": value
        for place, of in moments.items()
        for key, value in of.items()
    }


def _names(model: nn.Module, optimiser: torch.optim.Optimizer) -> list[str]:
    """Names of the optimiser's parameters, in its order."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [name_of[id(p)] for group in optimiser.param_groups for p in group["params"]]


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    part = path.with_name(path.name + ".part")
    kept = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if t.numel()}
    try:
        save_file(kept, part, metadata)
    except SafetensorError as error:  # which is all that it says of a full disk
        raise OSError(errno.EIO, str(error), str(part)) from None
    part.replace(path)


def load_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    averaged: nn.Module,
    optimiser: torch.optim.Optimizer,
    config: Any,
) -> tuple[int, Best]:
    """Put everything back where :func:`save_checkpoint` found it, whoever keeps it now.

    Returns
    -------
    step : int
    best : Best

    Raises
    ------
    ConfigError
        If there is no checkpoint in the folder, or it is of another configuration.
    """
    path = folder / NAME
    if not path.is_file():
        raise ConfigError(f"no checkpoint in {folder}; leave out --resume to begin anew")
    state, names = model.state_dict(), _names(model, optimiser)
    here = {name for name, tensor in state.items() if tensor.numel()}
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            numbers = json.loads(file.metadata()["numbers"])
        for of_some in (path, *(folder / name for name in numbers["parts"])):
            with safe_open(of_some, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    of, _, rest = name.partition(".")
                    if (rest.rpartition(".")[0] if of == "optimiser" else rest) in here:
                        tensors[name] = file.get_tensor(name)
        numbers = {name: numbers[name] for name in NUMBERS}
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); leave out --resume to begin anew"
        ) from None
    # As text, in which order counts: the weights are known by the places of what they are of.
    if json.dumps(numbers["config"]) != json.dumps(config):
        raise ConfigError(
            f"{folder.parent} was trained with another configuration or on other sessions, or with "
            "behaviours, classes or sessions in another order; resume with the same"
        )

    def part(of: str) -> dict[str, Tensor]:
        """What is kept elsewhere stays as empty as it is."""
        return {n: tensors[f"{of}.{n}"] if n in here else empty for n, empty in state.items()}

    model.load_state_dict(part("model"))
    averaged.load_state_dict(part("averaged"))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            parameter, _, key = name.removeprefix("optimiser.").rpartition(".")
            moments.setdefault(names.index(parameter), {})[key] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    best = Best(part("best"), *(numbers[name] for name in ("best_score", "best_step", "best_val")))
    return numbers["step"], best


def open_log(out: Path, step: int | None, first: bool) -> TextIO:
    """The log of a run, up to the step it goes on from; the first process writes it.

    Parameters
    ----------
    out : path
        Folder of the run.
    step : int or None
        Later steps are taken anew, and are told once; None begins anew.
    first : bool
        Whether this process is the first.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "log.jsonl" if first else Path(os.devnull)
    told = path.read_text(encoding="utf-8") if step is not None and path.is_file() else ""
    log = path.open("w", encoding="utf-8")
    for line in told.splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # half a line, where writing it was interrupted
            if json.loads(line)["step"] <= (step or 0):
                log.write(line)
    return log
