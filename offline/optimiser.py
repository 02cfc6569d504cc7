"""The optimiser of a training, and how fast its two halves learn."""

from __future__ import annotations

import math

import torch

from offline.config import TrainingConfig
from offline.finetune import trunk
from rt_neds.model.neds import NEDS


def learning_rate(step: int, settings: TrainingConfig) -> float:
    """One cycle: up from a tenth in the warm-up, then down a cosine to a thousandth."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.learning_rate * (0.1 + 0.9 * step / warm)
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimiser(model: NEDS, settings: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over two groups: the trunk, and what belongs to the sessions that are kept here."""
    of_trunk = trunk(model)
    of_sessions = [p for name, p in model.named_parameters() if name not in of_trunk and p.numel()]
    return torch.optim.AdamW(
        [{"params": list(of_trunk.values())}, {"params": of_sessions}],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(0.9, 0.98),
        fused=True,
    )


def set_rates(optimiser: torch.optim.Optimizer, step: int, settings: TrainingConfig) -> None:
    """Learning rates of trunk and sessions; the trunk's is zero while it is frozen."""
    rate = learning_rate(step, settings)
    of_trunk, of_sessions = optimiser.param_groups
    of_sessions["lr"] = rate
    of_trunk["lr"] = rate * settings.trunk_rate if step >= settings.frozen_steps else 0.0
