"""Training throughput of the paper's single-session size on one core, beside the original code's.

Windows of 100 bins, 5 layers of width 256, batch 16, float32, dropout 0.4. Ours is the whole step
of the trainer: drawing and binning windows, masks, forward, losses, backward, AdamW, running
average; beside it the same with ``precision = "bf16"``. The original's is its trainer's, too
(masks, tokenizers, encoder, heads, losses, backward, AdamW), but for loading and padding a batch;
it is left out unless a checkout of it is named, and needs its packages (einops, transformers).
*Products* are the matrix products of our layers alone, forwards and backwards: what no float32
training of this network on this core can do without.

Each has a process of its own, as it has in use, and all take turns.

    python benchmarks/throughput.py --original ../NEDS --rounds 6
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from offline.average import RunningAverage
from offline.batches import draw_step, prepare
from offline.beginning import build
from offline.config import TrainConfig
from offline.denormals import flushed
from offline.memory import keep_freed
from offline.optimiser import make_optimiser
from offline.processes import Processes
from offline.train import train_step
from rt_neds.config import parse_config
from rt_neds.result import machine
from rt_neds.simulate import simulate_file

RESULTS = Path(__file__).resolve().parent / "results"
BATCH, BINS, UNITS, WIDTH, LAYERS = 16, 100, 300, 256, 5
BEHAVIOURS = {"wheel": "wheel.wheel_speed", "whisker": "whisker.whisker_motion_energy"}
CASES = {"decoding_100_tokens": 1, "multimodal_300_tokens": 3}
"""Tokens per bin of the original."""
STEPS = 12
"""To a turn: for seconds, as a training is alone with caches, memory and the clock of its core."""


def ours(session: Path, modalities: int, precision: str) -> Callable[[], None]:
    """One step of the trainer, all of it."""
    schemes = {"decoding": 1.0}
    if modalities > 1:
        schemes |= {
            "encoding": 1.0, "within_spikes": 1.0, "within_behaviour": 1.0, "cross_modal": 1.0,
        }  # fmt: skip
    config = parse_config(
        {
            "data": {"window_bins": BINS},
            "behaviour": {name: {"source": source} for name, source in BEHAVIOURS.items()},
            "model": {
                "dim": WIDTH, "layers": LAYERS, "heads": 8, "context": BINS, "history": [1],
                "dropout": 0.4,
            },
            "masking": {"schemes": schemes, "unit_dropout": 0.0},
            "training": {"batch": BATCH, "threads": 1, "precision": precision},
        },
        TrainConfig,
        "throughput",
    )  # fmt: skip
    subject, rng = prepare(session, config), np.random.default_rng(0)
    model = build(config, [subject])
    average, optimiser = RunningAverage(model), make_optimiser(model, config.training)
    alone = Processes(torch.device("cpu"))

    def step() -> None:
        drawn = draw_step([subject], config, rng, alone.device)
        average.before(drawn.sessions)
        with flushed():
            train_step(model, optimiser, drawn, config, alone)
        average.after(drawn.sessions, 0.99)

    return step


def original(checkout: Path, tokens_per_bin: int) -> Callable[[], None]:
    """One step of the original as its trainer takes it, on one batch that is never loaded again."""
    sys.path.insert(0, str(checkout / "src"))
    import yaml
    from multi_modal.encoder_embeddings import EncoderEmbedding
    from multi_modal.mm import MultiModal
    from utils.config_utils import DictConfig

    config = DictConfig(yaml.safe_load((checkout / "src/configs/multi_modal/mm.yaml").read_text()))
    session = (checkout / "data/train_eids.txt").read_text().split()[0]
    everything, mode = ["spike", *BEHAVIOURS], "decoding" if tokens_per_bin == 1 else "mm"
    embeddings = {
        name: EncoderEmbedding(
            n_channel=WIDTH, output_channel=WIDTH, stitching=True, eid_list={session: UNITS},
            mod=name, config=config.encoder, max_F=BINS,
        )
        for name in everything[:tokens_per_bin]
    }  # fmt: skip
    model = MultiModal(
        embeddings, everything, list(BEHAVIOURS), mode, config, eid_list={session: UNITS}
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    values = {name: torch.randn(BATCH, BINS, 1) for name in BEHAVIOURS}
    values["spike"] = torch.poisson(torch.full((BATCH, BINS, UNITS), 0.2))
    hidden = torch.ones(BATCH, BINS, UNITS, dtype=torch.int64)

    def inputs(name: str) -> dict:
        alone = hidden if name in BEHAVIOURS else hidden * 0.0
        return {
            "inputs": values[name].clone(),
            "targets": values[name].clone(),
            "inputs_modality": torch.tensor(everything.index(name)),
            "inputs_attn_mask": hidden[..., 0],
            "inputs_timestamp": torch.arange(BINS).expand(BATCH, -1),
            "eid": [session] * BATCH,
            "training_mode": "mixed" if mode == "mm" else mode,
            "eval_mask": None if mode == "mm" else alone,
        }

    def step() -> None:
        optimiser.zero_grad()
        model({name: inputs(name) for name in everything}).loss.backward()
        optimiser.step()

    return step


def products() -> Callable[[], None]:
    """The matrix products of one step of ours: of each layer, and of attention in whole windows."""
    tokens, heads = BATCH * BINS, 8
    maps = [
        (torch.randn(tokens, n), torch.randn(n, m), torch.randn(tokens, m))
        for n, m in ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH))
    ]
    q_HTF = torch.randn(BATCH * heads, BINS, WIDTH // heads)
    score_HTT = q_HTF @ q_HTF.mT

    def step() -> None:
        for _ in range(LAYERS):
            for x, weight, out in maps:
                x @ weight
                out @ weight.T
                x.T @ out
            for _ in range(3):  # scores and mixture: forwards once, backwards twice
                q_HTF @ q_HTF.mT
                score_HTT @ q_HTF

    return step


def take_turns(ends: Connection, name: str, case: str, session: Path, checkout: Path) -> None:
    """In a process of its own: some steps, timed, whenever it is asked."""
    torch.set_num_threads(1)
    if name.startswith("ours"):
        keep_freed()  # as training does
        step = ours(session, CASES[case], "bf16" if name.endswith("bf16") else "fp32")
    else:
        step = products() if name == "products" else original(checkout, CASES[case])
    while True:
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        ends.send((time.perf_counter() - begun) / STEPS)
        if not ends.recv():
            return


def seconds_of(case: str, names: list[str], rounds: int, *where: Path) -> dict[str, list[float]]:
    """Seconds that a step took in each turn of each."""
    context, turns = multiprocessing.get_context("spawn"), {}
    for name in names:
        ends, theirs = context.Pipe()
        process = context.Process(target=take_turns, args=(theirs, name, case, *where), daemon=True)
        process.start()
        ends.recv()  # warm
        turns[name] = ends
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            turns[name].send(True)
            seconds[name].append(turns[name].recv())
    for ends in turns.values():
        ends.send(False)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", type=Path, help="a checkout of the original NEDS")
    parser.add_argument("--rounds", type=int, default=6, help=f"turns of {STEPS} steps")
    args = parser.parse_args()
    names = ["ours", "ours_bf16", "products"] + ["original"] * bool(args.original)
    results: dict = {"machine": machine(), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        session = Path(folder) / "s.h5"
        simulate_file(session, units=UNITS, minutes=5.0, seed=0)
        for case in CASES:
            seconds = seconds_of(case, names, args.rounds, session, args.original)
            entry = {f"{n}_windows_per_s": BATCH / float(np.median(s)) for n, s in seconds.items()}
            pairs = [(one, other) for one in names[:2] for other in names if one != other]
            for one, other in pairs:
                ratio_R = np.divide(seconds[other], seconds[one])
                entry[f"{one}_over_{other}"] = float(np.median(ratio_R))
            results["cases"][case] = entry
            print(case, entry, flush=True)
    path = RESULTS / "throughput.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
