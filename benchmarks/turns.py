"""Contestants that take turns in one process: whatever the machine does hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERIOD_S = 0.020
"""Between paced runs: a bin."""

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
            time.sleep(PERIOD_S)
            times[name].append(microseconds(run))
    return {name: np.array(of_name) for name, of_name in times.items()}
