"""Other decoders of one bin, to stand beside ours in ``kernels.py``.

A GRU and a ridge filter cost far less and, for one behaviour of one session, may decode as well.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

FEATURES_PER_UNIT = 3

UNITS, SPIKES, SECOND = 300, 1_500, 1.0
LATENT_STEP, LATENTS_PER_STEP = 0.125, 16
START, END = 1, 2
"""Types of the tokens that say from when to when a unit was recorded."""


def make_ridge(units: int, outputs: int) -> Callable[[], object]:
    """A linear map of features that are there already."""
    features_F = np.ones(FEATURES_PER_UNIT * units, np.float32)
    weights_OF = np.ones((outputs, len(features_F)), np.float32)
    return lambda: weights_OF @ features_F


def make_gru(units: int, outputs: int, width: int = 64) -> Callable[[], object]:
    """A read-in, a cell and a read-out, in PyTorch."""
    features_1F = torch.ones(1, FEATURES_PER_UNIT * units)
    read_in, cell = torch.nn.Linear(features_1F.shape[1], width), torch.nn.GRUCell(width, width)
    read_out, state = torch.nn.Linear(width, outputs), [torch.zeros(1, width)]

    @torch.no_grad()
    def decode() -> torch.Tensor:
        state[0] = cell(read_in(features_1F), state[0])
        return read_out(state[0])

    return decode


def make_poyo(outputs: int) -> Callable[[], object]:
    """POYO, as ``pytorch-brain`` has it; raises ImportError where that is not installed.

    The model of its motor-cortex recipe (arXiv 2310.16046): 64 wide, 6 layers, 128 latents for one
    second. For each bin it is given the whole last second again, as it has no state to keep.
    Turning spikes into tokens is not counted.
    """
    from torch_brain.models import POYO
    from torch_brain.registry import DataType, ModalitySpec

    torch.manual_seed(0)
    speed = ModalitySpec(
        id=0,
        dim=outputs,
        type=DataType.CONTINUOUS,
        timestamp_key="",
        value_key="",
        loss_fn=torch.nn.functional.mse_loss,
    )
    model = POYO(
        sequence_length=SECOND,
        readout_spec=speed,
        latent_step=LATENT_STEP,
        num_latents_per_step=LATENTS_PER_STEP,
        dim=64,
        depth=6,
        dim_head=64,
        cross_heads=2,
        self_heads=8,
    ).eval()
    model.unit_emb.initialize_vocab([str(n) for n in range(UNITS)])
    model.session_emb.initialize_vocab(["a"])
    rng, edges = np.random.default_rng(0), np.zeros(UNITS)
    units = np.concatenate([np.arange(UNITS), np.arange(UNITS), rng.integers(0, UNITS, SPIKES)])
    times = np.concatenate([edges, edges + SECOND, np.sort(rng.uniform(0, SECOND, SPIKES))])
    kinds = np.repeat([START, END, 0], [UNITS, UNITS, SPIKES])
    steps = int(SECOND / LATENT_STEP)
    latent_times = np.repeat((np.arange(steps) + 0.5) * LATENT_STEP, LATENTS_PER_STEP)
    inputs = {
        "input_unit_index": units + 1,  # 0 pads
        "input_timestamps": times,
        "input_token_type": kinds,
        "input_mask": np.ones(len(units), bool),
        "latent_index": np.tile(np.arange(LATENTS_PER_STEP), steps),
        "latent_timestamps": latent_times,
        "output_session_index": np.ones(1, np.int64),
        "output_timestamps": np.full(1, SECOND),
    }
    batch = {name: torch.from_numpy(array)[None] for name, array in inputs.items()}
    batch = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}

    @torch.no_grad()
    def decode() -> torch.Tensor:
        return model(**batch)

    decode()
    return decode
