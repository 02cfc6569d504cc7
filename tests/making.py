"""Small things that tests need: a session file, a training configuration, a trained bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from temporaldata import ArrayDict, Data, Interval, IrregularTimeSeries

from offline.batches import Subject
from offline.beginning import build
from offline.config import TrainConfig
from rt_neds.config import parse_config
from rt_neds.model.neds import NEDS

TINY = {
    "data": {"window_bins": 40, "split": "time", "gap_s": 0.2},
    "behaviour": {
        "speed": {"source": "wheel.wheel_speed", "unit": "rad/s"},
        "choice": {
            "source": "trials.choice",
            "kind": "categorical",
            "classes": {"left": 1, "right": 0},
            "scored": ["stim_on_time", "feedback_time"],
            "known_from": "feedback_time",
        },
    },
    "model": {"dim": 16, "layers": 2, "heads": 2, "context": 10, "history": [1, 4], "dropout": 0.1},
    "masking": {"schemes": {"decoding": 1.0, "encoding": 1.0, "cross_modal": 1.0}},
    "training": {"steps": 12, "batch": 4, "validate_every": 6, "device": "cpu"},
}


def multiplies_bf16() -> bool:
    """Whether this processor has matrix units for bfloat16 (AMX), by PyTorch's own word.

    On one that multiplies it in vectors (Zen 4) PyTorch 2.13 goes on in float32.
    """
    return torch.cpu._is_amx_tile_supported()


def tiny_config(**sections) -> TrainConfig:
    """TINY, with whole keys of sections replaced."""
    table = {name: {**section, **sections.get(name, {})} for name, section in TINY.items()}
    return parse_config(table, TrainConfig, "a test")


def write_session(
    path: Path,
    *,
    seconds: float = 60.0,
    units: int = 6,
    seed: int = 0,
    session_id: str = "tiny",
    domain: list[tuple[float, float]] | None = None,
    leave_out: tuple[str, ...] = (),
) -> Path:
    """A brainsets file in which speed drives the first units and choice the next."""
    rng = np.random.default_rng(seed)
    steps = int(seconds * 50)
    times = (np.arange(steps) + 1) / 50
    speed = np.convolve(rng.standard_normal(steps), np.ones(25) / 5, mode="same") ** 2
    trials = np.arange(1.0, seconds - 2, 2.0)
    choice = rng.integers(0, 2, len(trials))
    side = np.zeros(steps)
    for start, chosen in zip(trials, choice, strict=True):
        side[(times > start) & (times <= start + 1)] = 2 * chosen - 1
    rate = np.full((steps, units), 5.0)
    rate[:, : units // 2] += 80 * (speed / speed.max())[:, None]
    rate[:, units // 2 :] *= np.exp(0.8 * side)[:, None]
    counts = rng.poisson(rate / 50)
    step, unit = np.nonzero(counts)
    repeats = counts[step, unit]
    when = np.repeat(step, repeats) / 50 + rng.uniform(0, 0.02, repeats.sum())
    order = np.argsort(when)
    pieces = np.array(domain or [(0.0, float(seconds))])
    inside = np.zeros(len(when), bool)
    for start, end in pieces:
        inside |= (when >= start) & (when < end)
    keep = order[inside[order]]
    whole = Interval(start=pieces[:, 0], end=pieces[:, 1])
    groups = {
        "session": Data(id=session_id),
        "units": ArrayDict(
            id=np.array([f"{session_id}/{n}" for n in range(units)]),
            region=np.array(["CA1", "VISp"] * units)[:units],
        ),
        "spikes": IrregularTimeSeries(
            timestamps=when[keep], unit_index=np.repeat(unit, repeats)[keep], domain=whole
        ),
        "wheel": IrregularTimeSeries(
            timestamps=times,
            wheel_speed=speed.astype(np.float32),
            domain=Interval(start=np.array([0.0]), end=np.array([float(seconds)])),
        ),
        "trials": Interval(
            start=trials,
            end=trials + 1.5,
            stim_on_time=trials,
            feedback_time=trials + 1,
            choice=choice,
            timekeys=["start", "end", "stim_on_time", "feedback_time"],
        ),
    }
    data = Data(**{k: v for k, v in groups.items() if k not in leave_out}, domain=whole)
    with h5py.File(path, "w") as file:
        data.to_hdf5(file)
    return path


def drawn_model(config: TrainConfig, subject: Subject) -> NEDS:
    """A network that nothing is hidden in behind a zero."""
    torch.manual_seed(0)
    model = build(config, [subject]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@contextmanager
def stopped_at_eight(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training begun inside is interrupted before its ninth step."""
    import offline.train as module

    real, steps = module.train_step, []

    def step(*args):
        if len(steps) == 8:
            raise KeyboardInterrupt
        steps.append(1)
        return real(*args)

    monkeypatch.setattr(module, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        yield
    monkeypatch.setattr(module, "train_step", real)
