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

from rt_neds.errors import ConfigError

NAME = "checkpoint.safetensors"
"""One file, because two could be of two steps: the numbers are JSON in its metadata."""


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
    *,
    model: nn.Module,
    averaged: nn.Module,
    optimiser: torch.optim.Optimizer,
    best: Best,
    step: int,
    config: Any,
) -> None:
    """Write a checkpoint; the older one stays readable until the new one is whole.

    Parameters
    ----------
    folder : path
    model, averaged : module
    optimiser : AdamW
    best : Best
    step : int
    config : dict
        The run's, as JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        "step": step,
        "best_score": best.score,
        "best_step": best.step,
        "best_val": best.val,
        "config": config,
    }
    tensors: dict[str, Tensor] = {}
    for prefix, state in (
        ("model", model.state_dict()),
        ("averaged", averaged.state_dict()),
        ("best", best.weights),
    ):
        tensors.update({f"{prefix}.{name}": tensor for name, tensor in state.items()})
    for index, moments in optimiser.state_dict()["state"].items():
        tensors.update({f"optimiser.{index}.{name}": value for name, value in moments.items()})
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    part = folder / (NAME + ".part")
    try:
        save_file(tensors, part, {"numbers": json.dumps(numbers)})
    except SafetensorError as error:  # which is all that it says of a full disk
        raise OSError(errno.EIO, str(error), str(part)) from None
    part.replace(folder / NAME)


def load_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    averaged: nn.Module,
    optimiser: torch.optim.Optimizer,
    config: Any,
) -> tuple[int, Best]:
    """Put everything back where :func:`save_checkpoint` found it.

    Returns
    -------
    step : int
    best : Best

    Raises
    ------
    ConfigError
        If there is no checkpoint in the folder, or it is of another configuration.
    """
    if not (folder / NAME).is_file():
        raise ConfigError(f"no checkpoint in {folder}; leave out --resume to begin anew")
    try:
        with safe_open(folder / NAME, "pt") as file:
            numbers = json.loads(file.metadata()["numbers"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{folder / NAME} is damaged ({error}); leave out --resume to begin anew"
        ) from None
    # As text, in which order counts: the weights are known by the places of what they are of.
    if json.dumps(numbers["config"]) != json.dumps(config):
        raise ConfigError(
            f"{folder.parent} was trained with another configuration or on other sessions, or with "
            "behaviours, classes or sessions in another order; resume with the same"
        )

    def part(prefix: str) -> dict[str, Tensor]:
        start = prefix + "."
        return {
            name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)
        }

    model.load_state_dict(part("model"))
    averaged.load_state_dict(part("averaged"))
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in part("optimiser").items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    names = ("best_score", "best_step", "best_val")
    return numbers["step"], Best(part("best"), *(numbers[name] for name in names))


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
