"""One step on a GPU: as one launch, as PyTorch's kernels, and of several probes at once.

Copies up and down and the wait for them are in every time, and what Python does. ``step`` is what
serves: a graph of a copy up and one launch. ``kernels`` is a graph of PyTorch's kernels instead,
``uncaptured`` the same without a graph, ``eager`` the network's own step in PyTorch. ``nothing`` is
the graph of a copy up, an empty kernel and a copy down; ``reading`` sums as many bytes as the step
reads. ``launch`` is the step's launch alone by the GPU's clock. Contestants take turns in one
process; "paced" is one of each every 20 ms, asleep in between.

    python benchmarks/gpu.py --json results/MACHINE/gpu.json

needs a CUDA device. ``--device cpu`` runs all but the graph, to see that this file works.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from kernels import BEHAVIOURS, SIZES, make_model
from turns import pace, take_turns

from rt_neds.errors import ConfigError
from rt_neds.result import machine, write_json
from rt_neds.stream.decoder import EagerStep
from rt_neds.stream.graph import GraphStep

NAMES = [b.name for b in BEHAVIOURS]
UNITS, PROBES = 400, (1, 2, 4, 8)
UNITS_OF_PROBES = 1000
BINS = 150
SLOW = ("uncaptured", "eager")


def stepping(step: Any, counts_TN: Any) -> Any:
    """A call that decodes the next bin."""
    bins = iter(range(10**9))
    return lambda: step.steps((counts_TN[next(bins) % len(counts_TN)],), (True,))


def together(steps: list[GraphStep], counts_TN: Any) -> Any:
    """A call that decodes the next bin of each."""
    bins = iter(range(10**9))

    def call() -> None:
        counts_N = counts_TN[next(bins) % len(counts_TN)]
        n = len(steps)
        GraphStep.together(steps, [(counts_N,)] * n, [(True,)] * n, [()] * n)

    return call


def reading(nbytes: int, device: torch.device) -> Any:
    """A call that reads so many bytes on the device, and waits for it."""
    array, total = torch.ones(nbytes // 4, device=device), torch.zeros((), device=device)

    def call() -> None:
        torch.sum(array, dim=0, out=total)
        total.item()

    return call


def error(step: Any, oracle: EagerStep, counts_TN: Any) -> float:
    """Largest difference from the network's own step, on the CPU."""
    return max(
        float(np.abs(step.steps((c,), (True,)) - oracle.step(c, True)).max())
        for c in counts_TN[:BINS]
    )


def one_size(size: str, device: torch.device, rounds: int, bins: int) -> dict[str, Any]:
    """One stream of one size of model, and everyone else."""
    model, counts_TN = make_model(SIZES[size], UNITS)
    c, steps, cuda = model.config, {}, device.type == "cuda"
    if cuda:
        steps["step"] = GraphStep(model, "a", NAMES, device=device)
        if why := steps["step"].many_because:
            raise ConfigError(f"{why}: there is no step of one launch to measure")
        steps["kernels"] = GraphStep(model, "a", NAMES, device=device, one_launch=False)
    steps["uncaptured"] = GraphStep(model, "a", NAMES, device=device, captured=False)
    worst = {
        name: error(step, EagerStep(model, "a", NAMES), counts_TN) for name, step in steps.items()
    }
    steps["eager"] = EagerStep(make_model(SIZES[size], UNITS)[0], "a", NAMES, device=device)
    of_weights = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("sessions"))
    nbytes = 4 * (of_weights + 2 * c.layers * c.context * c.dim + 3 * UNITS * c.dim)
    calls = {name: stepping(step, counts_TN) for name, step in steps.items()}
    calls["reading"] = reading(nbytes, device)
    if cuda:
        calls["nothing"] = nothing(steps["step"])
    told: dict[str, Any] = {"bytes": nbytes, "max_abs_error": worst}
    runs = {name: (call, 4 if name in SLOW else 20) for name, call in calls.items()}
    took = take_turns(runs, rounds)
    told["us"] = {name: percentiles(times) for name, times in took.items()}
    took = pace({name: call for name, call in calls.items() if name != "uncaptured"}, bins)
    told["paced_us"] = {name: percentiles(times) for name, times in took.items()}
    if cuda:
        told["us"]["launch"] = launch(steps["step"])
        told["eager_over_step"] = round(told["us"]["eager"]["p50"] / told["us"]["step"]["p50"], 1)
    return told


def nothing(step: GraphStep) -> Any:
    """A call that copies up and down as much as a step, around an empty kernel, in a graph."""
    streams = step._group.streams
    up, raw = torch.zeros_like(streams._up), torch.zeros_like(streams._raw)
    up_host, raw_host = (
        torch.zeros(len(x), pin_memory=True) for x in (streams._up_host, streams._raw_host)
    )
    graph, done = torch.cuda.CUDAGraph(), torch.cuda.Event()
    with torch.cuda.graph(graph):
        up.copy_(up_host, non_blocking=True)
        raw[:1].zero_()
        raw_host.copy_(raw, non_blocking=True)

    def call() -> None:
        graph.replay()
        done.record()
        done.synchronize()

    return call


def launch(step: GraphStep) -> dict[str, float]:
    """Microseconds of the launch alone, back to back."""
    one_launch = step._group.streams._one_launch
    assert one_launch is not None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    took = []
    for _ in range(BINS):
        begin.record()
        for _ in range(10):
            one_launch()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / 10)
    return percentiles(took)


def growth(replays: int) -> int:
    """Bytes of the device by which many replays of the base model grow."""
    model, counts_TN = make_model(SIZES["base"], UNITS)
    step = GraphStep(model, "a", NAMES)
    before = torch.cuda.memory_reserved() + torch.cuda.memory_allocated()
    for n in range(replays):
        step.step(counts_TN[n % len(counts_TN)], True)
    return torch.cuda.memory_reserved() + torch.cuda.memory_allocated() - before


def several(device: torch.device, rounds: int) -> dict[str, Any]:
    """Base models of several probes, one replay for all: microseconds of the whole call."""
    model, counts_TN = make_model(SIZES["base"], UNITS_OF_PROBES)
    captured = device.type == "cuda"
    calls, teams = {}, {}
    for probes in PROBES:
        steps = [
            GraphStep(model, "a", NAMES, device=device, captured=captured) for _ in range(probes)
        ]
        assert all(step.share(steps[0]) for step in steps)
        calls[probes] = (together(steps, counts_TN), 10)
        launch = steps[0]._group.streams._one_launch
        teams[probes] = launch.team if launch else None
    took = take_turns(calls, rounds)
    return {
        str(probes): {"blocks_of_a_probe": teams[probes], **percentiles(times)}
        for probes, times in took.items()
    }


def percentiles(took_us: Any) -> dict[str, float]:
    """p50, p99 and p99.9, in microseconds."""
    marks = np.percentile(took_us, [50, 99, 99.9])
    return {
        name: round(float(m), 1) for name, m in zip(("p50", "p99", "p99_9"), marks, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--bins", type=int, default=150, help="paced ones of each size")
    parser.add_argument("--replays", type=int, default=1_000_000, help="over which memory is flat")
    parser.add_argument("--json", default="-")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there; run this where there is one")
    torch.set_num_threads(1)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result: dict[str, Any] = {"machine": machine(), "device": name, "torch": torch.__version__}
    for size in SIZES:
        result[size] = one_size(size, device, args.rounds, args.bins)
    result["probes_of_1000_units"] = several(device, args.rounds)
    if device.type == "cuda":
        result["growth"] = {"replays": args.replays, "bytes": growth(args.replays)}
    write_json(args.json, result)


if __name__ == "__main__":
    main()
