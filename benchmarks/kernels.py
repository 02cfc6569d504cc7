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
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numba
import numpy as np
import torch
import zmq
from numpy.typing import NDArray
from peers import make_gru, make_poyo, make_ridge
from rich.console import Console
from rich.table import Table

from rt_neds.frames import SPIKE_DTYPE, DecodedFrame, SpikeBatch
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour
from rt_neds.model.rounding import round_trunk
from rt_neds.stream.binner import CHUNK, Binner, count_spikes
from rt_neds.stream.fused import FusedStep
from rt_neds.stream.graph import GraphStep
from rt_neds.wire import pack_decoded, pack_spikes, unpack_decoded, unpack_spikes

UNITS = 400
WINDOW = 100
PERIOD = 0.020
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

Contestant = Callable[[], object]


def microseconds(run: Contestant) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e3


def take_turns(
    contestants: Mapping[Any, tuple[Contestant, int]], rounds: int
) -> dict[Any, NDArray[np.float64]]:
    """Time blocks of each contestant in turn, of so many runs each, after a few that are not."""
    times: dict[Any, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (run, runs) in contestants.items():
            for _ in range(1 + runs // 4):
                run()
            times[name] += [microseconds(run) for _ in range(runs)]
    return {name: np.array(of_name) for name, of_name in times.items()}


def pace(contestants: Mapping[Any, Contestant], bins: int) -> dict[Any, NDArray[np.float64]]:
    """Time one run of each contestant in turn, each after a period asleep."""
    times: dict[Any, list[float]] = {name: [] for name in contestants}
    for _ in range(bins):
        for name, run in contestants.items():
            time.sleep(PERIOD)
            times[name].append(microseconds(run))
    return {name: np.array(of_name) for name, of_name in times.items()}


# -- counting ------------------------------------------------------------------------------------


def bench_counting(rounds: int) -> list[dict[str, object]]:
    """A million spikes, in one call, by the binner's kernel and by ``bincount``."""
    rng = np.random.default_rng(0)
    spikes, bins, width = 1_000_000, 5_000, 600
    samples_S = np.sort(rng.integers(0, bins * width, spikes))
    records_S2 = np.stack([samples_S, rng.integers(0, UNITS, spikes)], axis=1)
    row_of_unit_U = np.arange(UNITS, dtype=np.int32)
    ring_RC, tally = np.zeros((bins, UNITS + 2), np.float32), np.zeros(2, np.int64)

    def ours() -> NDArray[np.float32]:
        ring_RC[:] = 0
        count_spikes(records_S2, row_of_unit_U, ring_RC, 0, bins, width, tally)
        return ring_RC[:, :UNITS]

    def theirs() -> NDArray[np.int64]:
        flat_S = records_S2[:, 0] // width * UNITS + records_S2[:, 1]
        return np.bincount(flat_S, minlength=bins * UNITS).reshape(bins, UNITS)

    np.testing.assert_array_equal(ours(), theirs())
    times = take_turns({"count_spikes": (ours, 3), "numpy.bincount": (theirs, 3)}, rounds)
    best = np.median(times["count_spikes"])
    return [
        {
            "who": who,
            "p50_us": float(np.median(us)),
            "million_spikes_per_s": float(spikes / np.median(us)),
            "times_ours": float(np.median(us) / best),
        }
        for who, us in times.items()
    ]


# -- messages ------------------------------------------------------------------------------------


def bench_messages(rounds: int) -> list[dict[str, object]]:
    """A 1 ms batch of ten spikes, and a decoded bin of eight values, on their way."""
    records_S = np.zeros(10, SPIKE_DTYPE)
    records_S["sample"] = np.arange(10)
    batch = SpikeBatch(1, 5, 0, 30, 30_000.0, 7, 0, records_S)
    stamps = dict.fromkeys(("sent", "received", "binned", "decoded", "published"), 10**15)
    values_V = np.zeros(8, np.float32)
    frame = DecodedFrame("imec0", 1, 5, 600, values_V, 0, 10, 0, 0, 0, "0123456789ab", stamps)
    spikes, decoded = pack_spikes("imec0", batch), pack_decoded(frame)
    binners = {n: Binner(np.arange(n, dtype=np.int32), n, 600, WINDOW) for n in (100, 1_600)}
    sample = dict.fromkeys(binners, 0)
    context = zmq.Context()
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    pull.connect(f"tcp://127.0.0.1:{push.bind_to_random_port('tcp://127.0.0.1')}")

    def through_a_socket() -> list[bytes]:
        push.send_multipart(spikes)
        return pull.recv_multipart()

    def into_bins(units: int) -> None:
        first = sample[units]
        sample[units] = first + 30
        records_S["sample"] = np.arange(first, first + 10)
        for _ in binners[units].frames(SpikeBatch(1, 0, first, first + 30, 3e4, 0, 0, records_S)):
            pass

    contestants: dict[str, tuple[Contestant, int]] = {
        "pack ten spikes": (lambda: pack_spikes("imec0", batch), 100),
        "parse ten spikes": (lambda: unpack_spikes(spikes[1], spikes[2], 0), 100),
        "ten spikes through tcp, to and fro": (through_a_socket, 100),
        "ten spikes into bins, 100 units": (lambda: into_bins(100), 100),
        "ten spikes into bins, 1600 units": (lambda: into_bins(1_600), 100),
        "pack a decoded bin": (lambda: pack_decoded(frame), 100),
        "parse a decoded bin": (lambda: unpack_decoded(decoded[1]), 100),
    }
    times = take_turns(contestants, rounds)
    context.destroy()
    return [
        {
            "who": who,
            "p50_us": float(np.median(us)),
            "p99_us": float(np.percentile(us, 99)),
        }
        for who, us in times.items()
    ]


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
    return round_trunk(NEDS(config, BEHAVIOURS, {"a": units}).eval()), counts_TN


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
