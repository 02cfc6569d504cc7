"""What one bin costs on one core: counting its spikes, and decoding it.

Contestants take turns in one process, so that whatever else the machine does hits all of them;
ratios of medians are the figures to trust. "Hot" is back to back. "Paced" is one step every 20 ms,
asleep in between, as at a rig: by then other programs have had the caches, and what counts is how
many bytes come back from memory. The row "bytes read" only sums an array as large as the
weights, keys and values: no float32 step of this model can be much faster. A GRU and a ridge filter
stand beside them because they are cheaper, and nobody should think otherwise.

    python benchmarks/kernels.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from rt_neds.model.neds import NEDS, SCHEMES, ModelConfig
from rt_neds.model.readout import Behaviour
from rt_neds.stream.binner import count_spikes
from rt_neds.stream.fused import FusedStep

UNITS = 400
WINDOW = 100
PERIOD = 0.020
SIZES = {
    "small": ModelConfig(dim=128, layers=4, heads=4, context=WINDOW),
    "base": ModelConfig(dim=256, layers=5, heads=8, context=WINDOW),
    "large": ModelConfig(dim=256, layers=22, heads=8, context=WINDOW),
}
BEHAVIOURS = (
    Behaviour(name="speed", kind="gaussian"),
    Behaviour(name="choice", kind="categorical", classes=("left", "right")),
    Behaviour(name="licks", kind="poisson"),
    Behaviour(name="position", kind="gaussian"),
)
FUSED, EAGER, RERUN, READ = "fused step", "eager step", "window again", "bytes read"
GRU, RIDGE = "GRU of 64", "ridge"

Contestant = Callable[[], object]


def microseconds(run: Contestant) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e3


def take_turns(
    contestants: Mapping[str, tuple[Contestant, int]], rounds: int
) -> dict[str, NDArray[np.float64]]:
    """Time blocks of each contestant in turn, of so many runs each, after a few that are not."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (run, runs) in contestants.items():
            for _ in range(1 + runs // 4):
                run()
            times[name] += [microseconds(run) for _ in range(runs)]
    return {name: np.array(of_name) for name, of_name in times.items()}


def pace(contestants: Mapping[str, Contestant], bins: int) -> dict[str, NDArray[np.float64]]:
    """Time one run of each contestant in turn, each after a period asleep."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
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
    step, state = FusedStep(model, "a", wanted), model.start("a")
    bytes_as_floats = np.ones(step.nbytes // 4, np.float32)
    scheme = torch.tensor([SCHEMES.index("decoding")])
    observed = torch.zeros(1, WINDOW, len(model.modalities), dtype=torch.bool)
    observed[..., 0] = True
    values, counts = torch.zeros(observed.shape), torch.from_numpy(counts_TN)[None, :WINDOW]
    at = {FUSED: 0, EAGER: 0}

    def next_bin(who: str) -> int:
        at[who] += 1
        return (at[who] - 1) % len(counts_TN)

    def fused() -> NDArray[np.float32]:
        return step.step(counts_TN[next_bin(FUSED)], True)

    def eager() -> dict[str, torch.Tensor]:
        t = next_bin(EAGER)
        new = torch.from_numpy(counts_TN[t])[None, None]
        one = values[:, :1], observed[:, :1], scheme
        return model.step("a", state, new, *one, wanted=wanted)

    @torch.no_grad()
    def rerun() -> dict[str, torch.Tensor]:
        return model("a", counts, values, observed, scheme, wanted=wanted)

    for _ in range(WINDOW + 10):
        raw_O, expected = fused(), eager()
    expected_O = torch.cat([expected[name][0, 0] for name in wanted]).numpy()
    np.testing.assert_allclose(raw_O, expected_O, atol=1e-5)
    read(bytes_as_floats)
    everyone = {FUSED: fused, EAGER: eager, RERUN: rerun, READ: lambda: read(bytes_as_floats)}
    return {**everyone, **make_cheaper(len(wanted))}, step.nbytes


def make_cheaper(outputs: int) -> dict[str, Contestant]:
    """Decoders that cost far less and, for one behaviour of one session, may decode as well."""
    features_F = np.random.default_rng(0).standard_normal(3 * UNITS).astype(np.float32)
    features_1F = torch.from_numpy(features_F)[None]
    weights_OF = np.ones((outputs, 3 * UNITS), np.float32)
    read_in, cell = torch.nn.Linear(3 * UNITS, 64), torch.nn.GRUCell(64, 64)
    read_out, state = torch.nn.Linear(64, outputs), [torch.zeros(1, 64)]

    @torch.no_grad()
    def gru() -> torch.Tensor:
        state[0] = cell(read_in(features_1F), state[0])
        return read_out(state[0])

    return {GRU: gru, RIDGE: lambda: weights_OF @ features_F}


def bench_decoding(size: str, behaviours: int, rounds: int, bins: int) -> list[dict[str, object]]:
    """One size of model, asked for so many behaviours."""
    torch.manual_seed(0)
    model = NEDS(SIZES[size], BEHAVIOURS, {"a": UNITS}).eval()
    rng = np.random.default_rng(0)
    per_bin_N = rng.lognormal(np.log(0.3), 1.0, UNITS)  # half of the units below 15 spikes/s
    counts_TN = rng.poisson(per_bin_N, (4 * WINDOW, UNITS)).astype(np.float32)
    wanted = [b.name for b in BEHAVIOURS[:behaviours]]
    everyone, nbytes = make_contestants(model, wanted, counts_TN)
    runs = {FUSED: 20, EAGER: 12, RERUN: 1, READ: 10, GRU: 20, RIDGE: 20}
    hot = take_turns({who: (everyone[who], runs[who]) for who in everyone}, rounds)
    paced = pace({who: everyone[who] for who in (FUSED, EAGER, READ, GRU, RIDGE)}, bins)
    fused_us = np.median(hot[FUSED])
    rows: list[dict[str, object]] = []
    for who, us in hot.items():
        slow = paced.get(who)
        rows.append(
            {
                "size": size,
                "behaviours": behaviours,
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


# -- showing -------------------------------------------------------------------------------------


COLUMNS = {
    "size": "size",
    "behaviours": "of",
    "who": "who",
    "p50_us": "p50",
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
        left = key in ("who", "size")
        table.add_column(COLUMNS[key], justify="left" if left else "right", no_wrap=left)
    for before, row in zip([rows[0], *rows], rows, strict=False):
        if any(row.get(key) != before.get(key) for key in ("size", "behaviours")):
            table.add_section()
        values = (row[key] for key in keys)
        table.add_row(
            *("" if v is None else f"{v:,.1f}" if isinstance(v, float) else str(v) for v in values)
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contestant")
    parser.add_argument("--bins", type=int, default=60, help="paced bins of each contestant")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    counting = bench_counting(options.rounds)
    show(counting, "Counting a million spikes of 400 units in 5,000 bins", console)
    decoding = []
    for size in SIZES:
        rounds = options.rounds if size != "large" else max(1, options.rounds // 3)
        for behaviours in (1, len(BEHAVIOURS)):
            decoding += bench_decoding(size, behaviours, rounds, options.bins)
    show(decoding, "Decoding one bin: 400 units, context 100, one core, us", console)
    if options.json:
        about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        about |= {"numba": numba.__version__, "python": platform.python_version()}
        figures = {"about": about, "counting": counting, "decoding": decoding}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
