"""What one bin costs on one core: its messages, counting its spikes, decoding it, and what grows.

Contestants take turns in one process, so that whatever else the machine does hits all of them;
ratios of medians are the figures to trust. "Hot" is back to back. "Paced" is one step every 20 ms,
asleep in between, as at a rig: by then other programs have had the caches, and what counts is how
many bytes come back from memory. The row "bytes read" only sums an array as large as the
weights, keys and values: no float32 step of this model can be much faster. "In a queue" is the
fused step when eight closed bins wait, for each of them. A GRU and a ridge filter stand beside them
because they are cheaper, and nobody should think otherwise; POYO, where `pytorch-brain` is
installed, because it is the peer. "Window again" is what a decoder without a cache does at each
bin: this network's 100 tokens, or the paper's (one for spikes and each behaviour, and full
attention).

    python benchmarks/kernels.py [--json FILE] [what ...]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numba
import numpy as np
import torch
from ingest import bench_counting, bench_messages
from numpy.typing import NDArray
from peers import make_gru, make_poyo, make_ridge
from rich.console import Console
from rich.table import Table
from turns import Contestant, pace, take_turns

from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour
from rt_neds.model.rounding import round_weights
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.fused import FusedStep
from rt_neds.stream.graph import GraphStep

UNITS = 400
WINDOW = 100
SIZES = {
    "small": ModelConfig(dim=128, layers=4, heads=4, context=WINDOW),
    "base": ModelConfig(dim=256, layers=5, heads=8, context=WINDOW),
    "large": ModelConfig(dim=256, layers=22, heads=8, context=WINDOW),
}
BEHAVIOURS = (
    Behaviour(name="speed", kind="continuous"),
    Behaviour(name="choice", kind="categorical", classes=("left", "right")),
    Behaviour(name="licks", kind="poisson"),
    Behaviour(name="position", kind="continuous"),
)
FUSED, EAGER, READ = "fused step", "PyTorch step", "bytes read"
RERUN, PAPER = "window again", "window again, paper's tokens"
QUEUE = "in a queue of 8"
GRU, RIDGE, POYO = "GRU of 64", "ridge", "POYO"


# -- decoding ------------------------------------------------------------------------------------


@numba.njit(fastmath=True, nogil=True)
def read(numbers):  # type: ignore[no-untyped-def]
    """Sum in any order: as fast as memory gives the numbers."""
    total = np.float32(0)
    for i in range(numbers.size):
        total += numbers[i]
    return total


def make_contestants(
    model: NEDS, wanted: list[str], counts_TN: NDArray[np.float32]
) -> tuple[dict[str, Contestant], int]:
    """The contestants, and how many bytes one step reads; checks first that they agree."""
    step = FusedStep(model, "a", wanted)
    torch_step = GraphStep(model, "a", wanted, device="cpu", captured=False)
    paper = NEDS(
        msgspec.structs.replace(model.config, attention="full", tokens="modality"),
        BEHAVIOURS,
        {"a": counts_TN.shape[1]},
    ).eval()
    queued = FusedStep(model, "a", wanted)
    bytes_as_floats = np.ones(step.nbytes // 4, np.float32)
    scheme = torch.zeros(1, dtype=torch.int64)  # decoding
    observed = torch.zeros(1, WINDOW, len(model.modalities), dtype=torch.bool)
    observed[..., 0] = True
    values, counts = torch.zeros(observed.shape), torch.from_numpy(counts_TN)[None, :WINDOW]
    at = {FUSED: 0, EAGER: 0}

    def next_bin(who: str) -> int:
        at[who] += 1
        return (at[who] - 1) % len(counts_TN)

    def fused() -> NDArray[np.float32]:
        return step.step(counts_TN[next_bin(FUSED)], True)

    def queue() -> NDArray[np.float32]:
        return queued.steps(counts_TN[:CHUNK], (True,) * CHUNK)

    def eager() -> NDArray[np.float32]:
        return torch_step.step(counts_TN[next_bin(EAGER)], True)

    @torch.no_grad()
    def rerun(who: NEDS) -> dict[str, torch.Tensor]:
        return who("a", counts, values, observed, scheme, wanted=wanted)

    for _ in range(WINDOW + 10):
        np.testing.assert_allclose(fused(), eager(), atol=1e-5)
    read(bytes_as_floats)
    everyone: dict[str, Contestant] = {FUSED: fused, QUEUE: queue, EAGER: eager}
    everyone |= {RERUN: lambda: rerun(model), PAPER: lambda: rerun(paper)}
    everyone[READ] = lambda: read(bytes_as_floats)
    return {**everyone, **make_peers(len(wanted))}, step.nbytes


def make_peers(outputs: int) -> dict[str, Contestant]:
    """Other decoders; without POYO, and a word why, where it is not installed."""
    peers: dict[str, Contestant] = {
        GRU: make_gru(UNITS, outputs),
        RIDGE: make_ridge(UNITS, outputs),
    }
    try:
        peers[POYO] = make_poyo(outputs)
    except ImportError as error:
        print(f"{POYO} is left out ({error}): pip install pytorch-brain")
    return peers


def make_model(config: ModelConfig, units: int) -> tuple[NEDS, NDArray[np.float32]]:
    """A model with random weights, and counts for it."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    per_bin_N = rng.lognormal(np.log(0.3), 1.0, units)  # half of the units below 15 spikes/s
    counts_TN = rng.poisson(per_bin_N, (4 * WINDOW, units)).astype(np.float32)
    return round_weights(NEDS(config, BEHAVIOURS, {"a": units}).eval()), counts_TN


def bench_decoding(size: str, rounds: int, bins: int) -> list[dict[str, object]]:
    """One size of model, and everyone else."""
    model, counts_TN = make_model(SIZES[size], UNITS)
    everyone, nbytes = make_contestants(model, [b.name for b in BEHAVIOURS], counts_TN)
    runs = {
        FUSED: 20,
        QUEUE: 5,
        EAGER: 12,
        RERUN: 1,
        PAPER: 1,
        READ: 10,
        GRU: 20,
        RIDGE: 20,
        POYO: 1,
    }
    hot = take_turns({who: (everyone[who], runs[who]) for who in everyone}, rounds)
    hot[QUEUE] = hot[QUEUE] / CHUNK
    paced = pace({who: everyone[who] for who in (FUSED, EAGER, READ, GRU, RIDGE)}, bins)
    fused_us = np.median(hot[FUSED])
    rows: list[dict[str, object]] = []
    for who, us in hot.items():
        slow = paced.get(who)
        rows.append(
            {
                "size": size,
                "who": who,
                "runs": len(us),
                "hot_p50_us": float(np.median(us)),
                "hot_p99_us": float(np.percentile(us, 99)),
                "paced_p50_us": None if slow is None else float(np.median(slow)),
                "paced_p99_us": None if slow is None else float(np.percentile(slow, 99)),
                "times_fused": float(np.median(us) / fused_us),
                "megabytes": nbytes / 1e6,
                "hot_gb_per_s": nbytes / np.median(us) / 1e3 if who in (FUSED, READ) else None,
            }
        )
    return rows


# -- what grows ----------------------------------------------------------------------------------


def bench_growth(size: str, rounds: int, bins: int) -> list[dict[str, object]]:
    """The fused step of one size by context and by units."""
    shapes = [(50, UNITS), (WINDOW, UNITS), (200, UNITS), (WINDOW, 100), (WINDOW, 1_600)]
    names, contestants = [b.name for b in BEHAVIOURS], {}
    for context, units in shapes:
        model, counts_TN = make_model(msgspec.structs.replace(SIZES[size], context=context), units)
        contestants[context, units] = stepping(FusedStep(model, "a", names), counts_TN)
    return timed_rows(
        contestants, rounds, bins, lambda key: {"size": size, "context": key[0], "units": key[1]}
    )


def bench_probes(size: str, rounds: int, bins: int) -> list[dict[str, object]]:
    """So many probes by one process, what each of them costs: each with a bundle of its own, one
    after the other; and as sessions of one bundle, whose bins closed together.
    """
    names, contestants = [b.name for b in BEHAVIOURS], {}
    of_one, counts_TN = make_model(SIZES[size], UNITS)
    own = [FusedStep(make_model(SIZES[size], UNITS)[0], "a", names) for _ in range(4)]
    shared = [FusedStep(of_one, "a", names) for _ in range(8)]
    for step in shared:
        assert step.share(shared[0])
    for probes in (1, 2, 4):
        alone = [stepping(step, counts_TN) for step in own[:probes]]
        contestants["own", probes] = lambda alone=alone: [step() for step in alone]
    for probes in (2, 4, 8):
        contestants["one", probes] = stepping_together(shared[:probes], counts_TN)
    return timed_rows(
        contestants,
        rounds,
        bins,
        lambda key: {"size": size, "bundles": key[0], "probes": key[1]},
        lambda key: key[1],
    )


def stepping_together(steps: list[FusedStep], counts_TN: NDArray[np.float32]) -> Contestant:
    """The next bin of each stream, at each call."""
    bins, seen = itertools.cycle(counts_TN), [(True,)] * len(steps)
    nothing_live = [()] * len(steps)
    return lambda: FusedStep.together(steps, [(next(bins),) for _ in steps], seen, nothing_live)


def stepping(step: FusedStep, counts_TN: NDArray[np.float32]) -> Contestant:
    """The next bin, at each call."""
    bins = itertools.cycle(counts_TN)
    return lambda: step.step(next(bins), True)


def timed_rows(
    contestants: dict,
    rounds: int,
    bins: int,
    describe: Callable[[Any], dict[str, object]],
    parts: Callable[[Any], int] = lambda key: 1,
) -> list[dict[str, object]]:
    """Hot and paced times of contestants, each divided by its parts."""
    hot = take_turns({key: (run, 20) for key, run in contestants.items()}, rounds)
    paced = pace(contestants, bins)
    return [
        {
            **describe(key),
            "hot_p50_us": float(np.median(hot[key])) / parts(key),
            "hot_p99_us": float(np.percentile(hot[key], 99)) / parts(key),
            "paced_p50_us": float(np.median(paced[key])) / parts(key),
            "paced_p99_us": float(np.percentile(paced[key], 99)) / parts(key),
        }
        for key in contestants
    ]


# -- showing -------------------------------------------------------------------------------------


COLUMNS = {
    "size": "size",
    "context": "context",
    "units": "units",
    "bundles": "bundles",
    "probes": "probes",
    "who": "who",
    "p50_us": "p50",
    "p99_us": "p99",
    "million_spikes_per_s": "M spikes/s",
    "times_ours": "x ours",
    "hot_p50_us": "hot p50",
    "hot_p99_us": "p99",
    "paced_p50_us": "paced p50",
    "paced_p99_us": "p99",
    "times_fused": "x fused",
}


def show(rows: list[dict[str, object]], title: str, console: Console) -> None:
    """Print rows as a table that fits a terminal; the JSON has the rest."""
    table = Table(title=title)
    keys = [key for key in COLUMNS if key in rows[0]]
    for key in keys:
        left = key in ("who", "size", "bundles")
        table.add_column(COLUMNS[key], justify="left" if left else "right", no_wrap=left)
    for before, row in zip([rows[0], *rows], rows, strict=False):
        if any(row.get(key) != before.get(key) for key in ("size",)):
            table.add_section()
        values = (row[key] for key in keys)
        table.add_row(
            *("" if v is None else number(v) if isinstance(v, float) else str(v) for v in values)
        )
    console.print(table)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    what = ("counting", "messages", "decoding", "growth", "probes")
    parser.add_argument("what", nargs="*", help=f"of {', '.join(what)}; all by default")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contestant")
    parser.add_argument("--bins", type=int, default=60, help="paced bins of each contestant")
    options = parser.parse_args()
    if not set(options.what) <= set(what):
        parser.error(f"{', '.join(options.what)} came; expected {', '.join(what)}")
    torch.set_num_threads(1)
    console, figures = Console(), {}
    titles = {
        "counting": "Counting a million spikes of 400 units in 5,000 bins",
        "messages": "Messages, us",
        "decoding": "Decoding one bin: 400 units, context 100, one core, us",
        "growth": "The fused step by context and units, us",
        "probes": "Several probes by one process: the fused step for each of them, us",
    }
    for name in options.what or what:
        rows = run(name, options.rounds, options.bins)
        show(rows, titles[name], console)
        figures[name] = rows
    if options.json:
        about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        about |= {"numba": numba.__version__, "python": platform.python_version()}
        options.json.write_text(json.dumps({"about": about, **figures}, indent=1) + "\n")


def run(what: str, rounds: int, bins: int) -> list[dict[str, object]]:
    """The rows of one table."""
    if what == "counting":
        return bench_counting(rounds)
    if what == "messages":
        return bench_messages(rounds)
    bench = {"decoding": bench_decoding, "growth": bench_growth, "probes": bench_probes}[what]
    fewer = {"large": max(1, rounds // 3)}
    return [row for size in SIZES for row in bench(size, fewer.get(size, rounds), bins)]


if __name__ == "__main__":
    main()
