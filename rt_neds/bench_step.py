"""How long one step takes, beside PyTorch's and the window run anew, in turns."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rt_neds.awake import awake
from rt_neds.bench_input import random_bundle
from rt_neds.errors import ConfigError
from rt_neds.result import machine

FETCHED_S = 0.001
"""Before a step, as where messages come once a millisecond."""


def bench_step(
    *, bundle: str | None, size: str, units: int, behaviours: int, seconds: float, device: str
) -> dict[str, Any]:
    """One bin through the served step, PyTorch's, and the window run anew, in turns.

    PyTorch's is the graph's step launched operator by operator: the fastest there is of that kind,
    with every buffer and mask made beforehand. The error is against the network's own ``step``.

    Returns
    -------
    dict
        As ``rt-neds bench step --json``, in microseconds.
    """
    import torch

    from rt_neds.bundle import build_model, load_spec
    from rt_neds.stream.decoder import EagerStep, outputs_of
    from rt_neds.stream.graph import GraphStep

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        path = (
            Path(bundle) if bundle else random_bundle(Path(scratch), size, units, 20.0, behaviours)
        )
        spec = load_spec(path)
        model = build_model(path, spec)
    session = spec.sessions[0]
    n = len(session.units)
    wanted = [b.name for b in outputs_of(spec, session)]
    fast = served_step(model, spec, device)
    plain = EagerStep(model, session.id, wanted)
    eager = GraphStep(model, session.id, wanted, device=device, captured=False)
    rng = np.random.default_rng(0)
    counts_TN = rng.poisson(0.5, size=(512, n)).astype(np.float32)
    worst = 0.0
    for counts_N in counts_TN[:300]:
        gap = np.abs(fast.steps((counts_N,), (True,)) - plain.step(counts_N, True)).max()
        worst = max(worst, float(gap))
    window = _window(model, session.id, wanted, counts_TN[: spec.model.context], device)
    hot: dict[str, list[float]] = {"step": [], "eager": [], "window": []}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        hot["step"] += timed(lambda i: fast.steps((counts_TN[i % 512],), (True,)), 200)
        hot["eager"] += timed(lambda i: eager.step(counts_TN[i % 512], True), 40)
        hot["window"] += timed(lambda i: window(), 4)
    bins = max(20, round(seconds / 0.02 / 2))
    pacing = {"step": fast, "eager": eager}
    if hasattr(fast, "fetch"):
        pacing["fetched"] = Fetched(fast)
    cold = paced(pacing, counts_TN, bins, spec.bin_ms / 1e3)
    middle = {name: statistics.median(times) for name, times in hot.items()}
    return {
        "machine": machine(),
        "device": device_name(device),
        "model": f"{spec.model.layers} layers of {spec.model.dim}, context {spec.model.context}",
        "units": n,
        "behaviours": len(wanted),
        "step_us": {"hot": percentiles(hot["step"]), "paced": percentiles(cold["step"])}
        | {name: percentiles(cold[name]) for name in cold if name == "fetched"},
        "eager_us": {"hot": percentiles(hot["eager"]), "paced": percentiles(cold["eager"])},
        "window_us": percentiles(hot["window"]),
        "window_over_step": round(middle["window"] / middle["step"], 1),
        "eager_over_step": round(middle["eager"] / middle["step"], 2),
        "eager_over_step_paced": round(
            statistics.median(cold["eager"]) / statistics.median(cold["step"]), 2
        ),
        "max_abs_error": worst,
    }


def served_step(model: Any, spec: Any, device: str) -> Any:
    """The step that serve would run for the bundle's first session.

    Raises
    ------
    ConfigError
        If the device cannot: a figure of the CPU would stand there as the GPU's.
    """
    from rt_neds.stream.decoder import make_step
    from rt_neds.stream.fused import FusedStep

    session, said = spec.sessions[0], [""]
    step = make_step(model, spec, session, np.zeros(len(session.units), bool), device, said.append)
    if device != "cpu" and isinstance(step, FusedStep):
        raise ConfigError(f"{said[-1].partition(';')[0]}; measure with --device cpu")
    return step


def device_name(device: str) -> str:
    """Which GPU, or ``cpu``."""
    import torch

    return device if device == "cpu" else torch.cuda.get_device_name(device)


def _window(model: Any, session: str, wanted: list[str], counts_TN: Any, device: str) -> Any:
    """What everyone without a cache does at each bin: the whole window again."""
    import torch

    T, M = len(counts_TN), len(model.modalities)
    model = copy.deepcopy(model).to(device)
    counts = torch.from_numpy(counts_TN)[None].to(device)
    values = torch.zeros(1, T, M, device=device)
    observed = torch.zeros(1, T, M, dtype=torch.bool, device=device)
    observed[:, :, 0] = True
    scheme = torch.zeros(1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def run() -> None:
        model(session, counts, values, observed, scheme, wanted=wanted)
        if device != "cpu":
            torch.cuda.synchronize()

    return run


def timed(call: Any, times: int) -> list[float]:
    """Microseconds that each of so many calls took; a call is given its number."""
    took = []
    for i in range(times):
        start = time.perf_counter_ns()
        call(i)
        took.append((time.perf_counter_ns() - start) / 1e3)
    return took


class Fetched:
    """A step for which what it reads is fetched a little before each, as the loop does."""

    def __init__(self, step: Any) -> None:
        self.steps, self.fetch = step.steps, step.fetch


def paced(
    steps: dict[str, Any], counts_TN: Any, bins: int, period_s: float
) -> dict[str, list[float]]:
    """One step per bin, by turns, the caches gone cold in between, but for :class:`Fetched`.

    Cores are held awake, as in ``serve``.
    """
    took: dict[str, list[float]] = {name: [] for name in steps}
    with awake():
        for i in range(bins):
            for name, step in steps.items():
                if isinstance(step, Fetched):
                    time.sleep(max(0.0, period_s - FETCHED_S))
                    step.fetch()
                    time.sleep(FETCHED_S)
                else:
                    time.sleep(period_s)
                counts_1N = counts_TN[i % len(counts_TN)][None]
                took[name] += timed(lambda _, s=step, c=counts_1N: s.steps(c, (True,)), 1)
    return took


def percentiles(times: list[float]) -> dict[str, float]:
    """``p50``, ``p99``, ``p99_9`` and how many there were."""
    marks = np.percentile(times, [50, 99, 99.9])
    names = ("p50", "p99", "p99_9")
    return {**{n: round(float(m), 1) for n, m in zip(names, marks, strict=True)}, "n": len(times)}
