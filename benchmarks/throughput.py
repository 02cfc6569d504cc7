"""Training throughput of the paper's single-session size on one core, beside the original code's.

Windows of 100 bins, 5 layers of width 256, batch 16, float32, dropout 0.4. Ours is the whole step
of the trainer: drawing and binning windows, masks, forward, losses, backward, AdamW, running
average. The original's is its encoder stack alone (forward, backward, AdamW), on as many tokens as
its tokenizers would give; it is left out unless a checkout of it is named, and needs its packages.
*Products* are the matrix products of our layers alone, forwards and backwards: what no float32
training of this network on this core can do without.

    python benchmarks/throughput.py --original ../NEDS --rounds 8
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from offline.average import RunningAverage
from offline.batches import draw_step, prepare
from offline.beginning import build
from offline.config import TrainConfig
from offline.processes import Processes
from offline.train import make_optimiser, train_step
from rt_neds.config import parse_config
from rt_neds.result import machine
from rt_neds.simulate import simulate_file

RESULTS = Path(__file__).resolve().parent / "results"
BATCH, BINS, WIDTH, LAYERS = 16, 100, 256, 5
CASES = {"decoding_100_tokens": 1, "multimodal_300_tokens": 3}
"""Tokens per bin of the original."""


def ours(session: Path, modalities: int) -> Callable[[], None]:
    """One step of the trainer, all of it."""
    behaviours = {
        "wheel": {"source": "wheel.wheel_speed"},
        "whisker": {"source": "whisker.whisker_motion_energy"},
    }
    schemes = {"decoding": 1.0}
    if modalities > 1:
        schemes |= {
            "encoding": 1.0, "within_spikes": 1.0, "within_behaviour": 1.0, "cross_modal": 1.0,
        }  # fmt: skip
    config = parse_config(
        {
            "data": {"window_bins": BINS},
            "behaviour": behaviours,
            "model": {
                "dim": WIDTH, "layers": LAYERS, "heads": 8, "context": BINS, "history": [1],
                "dropout": 0.4,
            },
            "masking": {"schemes": schemes, "unit_dropout": 0.0},
            "training": {"batch": BATCH, "threads": 1},
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
        train_step(model, optimiser, drawn, config, alone)
        average.after(drawn.sessions, 0.99)

    return step


def original(checkout: Path, tokens_per_bin: int) -> Callable[[], None]:
    """One step of the original's encoder stack, with its own configuration."""
    sys.path.insert(0, str(checkout / "src"))
    import yaml
    from multi_modal.encoder_embeddings import EncoderLayer

    settings = yaml.safe_load((checkout / "src/configs/multi_modal/mm.yaml").read_text())
    transformer = SimpleNamespace(**settings["encoder"]["transformer"])
    layers = torch.nn.ModuleList(EncoderLayer(n, transformer) for n in range(LAYERS))
    optimiser = torch.optim.AdamW(layers.parameters(), lr=1e-4)
    tokens = torch.randn(BATCH, tokens_per_bin * BINS, WIDTH)
    bins = torch.arange(BINS).repeat(tokens_per_bin).expand(BATCH, -1)

    def step() -> None:
        x = tokens
        for layer in layers:
            x = layer(x, None, bins)
        optimiser.zero_grad()
        (x**2).mean().backward()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", type=Path, help="a checkout of the original NEDS")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict = {"machine": machine(), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        session = Path(folder) / "s.h5"
        simulate_file(session, units=300, minutes=5.0, seed=0)
        for case, tokens in CASES.items():
            steps = {"ours": ours(session, tokens), "products": products()}
            if args.original:
                steps["original"] = original(args.original, tokens)
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(1 + args.rounds):  # interleaved; the first round warms up
                for name, step in steps.items():
                    begun = time.perf_counter()
                    step()
                    seconds[name].append(time.perf_counter() - begun)
            rates = {n: BATCH / float(np.median(s[1:])) for n, s in seconds.items()}
            results["cases"][case] = {f"{n}_windows_per_s": r for n, r in rates.items()}
            if "original" in rates:
                results["cases"][case]["ours_over_original"] = rates["ours"] / rates["original"]
            print(case, results["cases"][case], flush=True)
    path = RESULTS / "throughput.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
