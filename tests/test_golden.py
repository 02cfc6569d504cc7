"""What must not drift: outputs of a tiny network, and the losses of a tiny training run.

``RT_NEDS_WRITE_GOLDEN=1 pytest tests/test_golden.py`` writes the files anew; say in the commit why.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour
from rt_neds.stream.fused import FusedStep
from tests.test_train import losses

GOLDEN = Path(__file__).resolve().parent / "golden"
WRITE = bool(os.environ.get("RT_NEDS_WRITE_GOLDEN"))
CONFIG = {
    "dim": 16,
    "layers": 2,
    "heads": 2,
    "context": 6,
    "history": (1, 4),
    "dropout": 0.0,
    "memory": 8,
}
BEHAVIOURS = (
    Behaviour(name="speed", kind="continuous"),
    Behaviour(name="choice", kind="categorical", classes=("left", "right")),
)


def tiny_network() -> NEDS:
    torch.manual_seed(0)
    model = NEDS(ModelConfig(**CONFIG), BEHAVIOURS, {"tiny": 5}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outputs(model: NEDS, counts: torch.Tensor, observed: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model(
            "tiny", counts, torch.zeros(1, 30, 3), observed, torch.zeros(1, dtype=torch.int64)
        )


def test_outputs_of_a_tiny_network():
    path = GOLDEN / "tiny.safetensors"
    if WRITE:
        model = tiny_network()
        counts = torch.poisson(torch.full((1, 30, 5), 0.8))
        observed = torch.zeros(1, 30, 3, dtype=torch.bool)
        observed[:, :, 0] = torch.rand(1, 30) < 0.9
        inputs = {"counts": counts, "observed": observed}
        made = {f"out.{name}": out for name, out in outputs(model, counts, observed).items()}
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        save_file({**inputs, **made, **weights}, path)
    golden = load_file(path)
    model = NEDS(ModelConfig(**CONFIG), BEHAVIOURS, {"tiny": 5}).eval()
    model.load_state_dict(
        {name.removeprefix("model."): t for name, t in golden.items() if name.startswith("model.")}
    )
    now = outputs(model, golden["counts"], golden["observed"])
    assert {f"out.{name}" for name in now} == {name for name in golden if name.startswith("out.")}
    for name, out in now.items():
        torch.testing.assert_close(out, golden[f"out.{name}"], atol=2e-6, rtol=1e-5)
    step = FusedStep(model, "tiny", ["speed", "choice"])
    for t in range(30):
        raw = step.step(golden["counts"][0, t].numpy(), bool(golden["observed"][0, t, 0]))
        expected = torch.cat([golden["out.speed"][0, t], golden["out.choice"][0, t]]).numpy()
        np.testing.assert_allclose(raw, expected, atol=5e-6, rtol=1e-5)


def test_losses_of_a_tiny_run(tiny):
    path = GOLDEN / "losses.json"
    now = losses(tiny[1])
    if WRITE:
        path.write_text(json.dumps([round(loss, 5) for loss in now], indent=1) + "\n")
    # Loose enough for another processor's rounding, far tighter than any change of method.
    assert now == pytest.approx(json.loads(path.read_text()), rel=2e-3)
