"""Where the time of a step on a GPU goes: its own clock at each stage of the kernel, by one block.

Of a layer, the last one is shown; a stage is the cycles since the one before. What a block waits
for others is in the stage that waits.

    python benchmarks/gpu_stages.py [--size base] [--json results/MACHINE/gpu-stages-base.json]
"""

from __future__ import annotations

import argparse
import ctypes
import re
from typing import Any

import numpy as np
import torch
from kernels import BEHAVIOURS, SIZES, make_model

from rt_neds.errors import ConfigError
from rt_neds.result import machine, write_json
from rt_neds.stream import graph_kernel
from rt_neds.stream.graph import GraphStep

UNITS, WARM, BINS, MOST = 400, 200, 200, 32
plain = graph_kernel.source_of


def stages_of(source: str) -> list[str]:
    """Names of the stages, in the order of the text."""
    return re.findall(r"^ *MARK\((\w+)\);", source, flags=re.MULTILINE)


def marked(*args: Any, **kwargs: Any) -> str:
    """The kernel, which notes the time at each stage."""
    source = plain(*args, **kwargs)
    stages = stages_of(source)
    assert len(stages) <= MOST
    mark = (
        f"__device__ long long stamps[{MOST}];\n"
        f"enum Stage {{ {', '.join(f'STAGE_{stage}' for stage in stages)} }};\n"
        "#define MARK(stage) "
        "if (at.rank == 0 && at.thread == 0) stamps[STAGE_##stage] = clock64()\n"
    )
    return mark + source


def measure(size: str) -> dict[str, int]:
    """Median cycles of each stage, by when it is reached."""
    graph_kernel.source_of = marked  # type: ignore[assignment]
    model, counts_TN = make_model(SIZES[size], UNITS)
    step = GraphStep(model, "a", [b.name for b in BEHAVIOURS])
    launch = step._group.streams._one_launch
    if launch is None:
        raise ConfigError(f"{step.many_because}: there is no kernel to look into")
    reached = []
    for n in range(WARM + BINS):
        step.step(counts_TN[n % len(counts_TN)], True)
        if n >= WARM:
            stamps = launch._launcher.read("stamps", (ctypes.c_longlong * MOST)())  # type: ignore
            reached.append(list(stamps))
    stages = stages_of(plain(model, launch.team))
    reached_BS = np.array(reached)[:, : len(stages)]
    cycles_S = np.median(reached_BS - reached_BS.min(axis=1, keepdims=True), axis=0)
    order = np.argsort(cycles_S)
    return {stages[s]: int(cycles_S[s]) for s in order}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--json", default="-")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device is there; run this where there is one")
    write_json(
        args.json,
        {
            "machine": machine(),
            "device": torch.cuda.get_device_name(),
            "size": args.size,
            "reached_at_cycles": measure(args.size),
        },
    )


if __name__ == "__main__":
    main()
