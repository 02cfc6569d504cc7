"""The processes that share a training run, and what they tell each other.

``torchrun`` starts them and says in the environment who is who. All draw the same windows, each
bins and trains on its own share of them, and gradients are summed; so a run gives the same losses
however many processes it is spread over. Which sessions a step is of is known to all: only their
parameters and the shared ones travel. What belongs to a session is kept by one process
(:mod:`offline.shards`), which also validates it.

Shape suffixes: X sessions, K scores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from offline.config import TrainingConfig
from rt_neds.errors import ConfigError, DeviceError

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others, which may be putting sessions into the cache."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes
    ----------
    device : torch.device
        This process's.
    number, count : int
        Which one this is, and how many there are.
    """

    device: torch.device
    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.number == 0

    def own(self, of_sessions: Sequence[T]) -> Sequence[T]:
        """What falls to this process of something that there is of each session."""
        return of_sessions[self.number :: self.count]

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes; in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def tell(self, tensor: Tensor, teller: int) -> Tensor:
        """All others get what the teller has; in place, of equal shape in all."""
        if self.count > 1:
            dist.broadcast(tensor, teller)
        return tensor

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Over all processes; a parameter that none of them used keeps no gradient."""
        if self.count == 1:
            return
        used = torch.tensor([p.grad is not None for p in parameters], device=self.device).int()
        dist.all_reduce(used, dist.ReduceOp.MAX)
        held = [p for p, by_any in zip(parameters, used.tolist(), strict=True) if by_any]
        if not held:
            return
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in held]
        )
        dist.all_reduce(flat)
        for p, piece in zip(held, flat.split([p.numel() for p in held]), strict=True):
            p.grad = piece.view_as(p)

    def gather(
        self, own: dict[str, dict[str, float]], sessions: Sequence[str], names: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Scores of all sessions, each from the process that has it, in the order of sessions."""
        if self.count == 1:
            return own
        has_2XK = torch.zeros(2, len(sessions), len(names), dtype=torch.float64)
        for x, session in enumerate(sessions):
            for name, score in own.get(session, {}).items():
                has_2XK[:, x, names.index(name)] = torch.tensor([1.0, score])
        has_2XK = self.sum(has_2XK.to(self.device)).cpu()
        return {
            session: {
                name: float(has_2XK[1, x, k]) for k, name in enumerate(names) if has_2XK[0, x, k]
            }
            for x, session in enumerate(sessions)
        }


def join(settings: TrainingConfig) -> Processes:
    """Take this process's place in the run; alone unless ``torchrun`` started it.

    Raises
    ------
    ConfigError
        If a step's windows cannot be shared equally.
    DeviceError
        If there is no GPU for this process.
    """
    device = choose_device(settings.device)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    pieces = count * settings.accumulate
    if settings.batch % pieces:
        raise ConfigError(
            f"training.batch = {settings.batch} windows for {count} processes and accumulate = "
            f"{settings.accumulate}; make it a multiple of {pieces}"
        )
    if count == 1:
        return Processes(device)
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise DeviceError(
                f"process {local} of this machine, but it has {torch.cuda.device_count()} GPUs; "
                "start torchrun with as many processes as there are"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Processes(device, dist.get_rank(), count)


def leave() -> None:
    """Undo :func:`join`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


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
