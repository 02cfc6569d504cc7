"""Everything a training run needs to go on as if it had never stopped. No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rt_neds.errors import ConfigError

TENSORS, NUMBERS = "state.safetensors", "state.json"


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    averaged: nn.Module,
    best: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    numbers: dict[str, Any],
) -> None:
    """Write a checkpoint; the older one stays readable until the new one is whole.

    Parameters
    ----------
    folder : path
    model, averaged : module
    best : dict of str to tensor
        State of the best averaged model so far.
    optimiser : AdamW
    numbers : dict
        Step, best score and the configuration, as JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for prefix, state in (
        ("model", model.state_dict()),
        ("averaged", averaged.state_dict()),
        ("best", best),
    ):
        tensors.update({f"{prefix}.{name}": tensor for name, tensor in state.items()})
    for index, moments in optimiser.state_dict()["state"].items():
        tensors.update({f"optimiser.{index}.{name}": value for name, value in moments.items()})
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    for name, write in (
        (TENSORS, lambda path: save_file(tensors, path)),
        (NUMBERS, lambda path: path.write_text(json.dumps(numbers))),
    ):
        part = folder / (name + ".part")
        write(part)
        part.replace(folder / name)


def load_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    averaged: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put everything back where :func:`save_checkpoint` found it.

    Returns
    -------
    numbers : dict
    best : dict of str to tensor

    Raises
    ------
    ConfigError
        If there is no checkpoint in the folder.
    """
    if not (folder / NUMBERS).is_file():
        raise ConfigError(f"no checkpoint in {folder}; leave out --resume to begin anew")
    numbers = json.loads((folder / NUMBERS).read_text())
    tensors = load_file(folder / TENSORS)

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
    return numbers, part("best")
