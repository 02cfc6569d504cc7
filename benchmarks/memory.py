"""Memory that sessions take in training: their data, and what belongs to them in the network.

*Data*: batches are drawn from 2, 20 and 200 sessions, held in memory and kept on disk, each case in
a process of its own. *Network*: one of the base size is trained on 200 sessions by 1, 2 and 4
processes, and each says what it has in the end. ``anonymous`` is what must be in memory; ``mapped``
are pages of the cache that happen to be there and that the system takes back when it needs the
room. What the libraries take before the first session is left out.

    python benchmarks/memory.py

writes ``results/memory.json``: data -> sessions -> megabytes, and batches per second; and network
-> processes -> megabytes of each process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import msgspec
import numpy as np
import torch

from offline.batches import draw_step, prepare
from offline.cache import kept
from offline.config import TrainConfig
from offline.processes import leave
from offline.train import train
from rt_neds.config import parse_config
from rt_neds.result import machine
from rt_neds.simulate import simulate_file

RESULTS = Path(__file__).resolve().parent / "results"
SESSIONS = (2, 20, 200)
UNITS, MINUTES, BATCHES = 100, 5.0, 400
CONFIG = {
    "data": {"window_bins": 100},
    "behaviour": {
        "wheel": {"source": "wheel.wheel_speed"},
        "whisker": {"source": "whisker.whisker_motion_energy"},
    },
    "training": {"batch": 16},
}
PROCESSES = (1, 2, 4)
NETWORK = {
    "model": {"dim": 256, "layers": 5, "heads": 8},
    "training": {
        "batch": 16, "sessions": 8, "steps": 100, "validate_every": 100, "threads": 1,
        "device": "cpu",
    },
}  # fmt: skip


def megabytes() -> dict[str, float]:
    """Memory of this process, of both kinds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {line.partition(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return {
        "anonymous": float(kilobytes["RssAnon"]) / 1024,
        "mapped": float(kilobytes["RssFile"]) / 1024,
    }


def measure(folder: Path, sessions: int, cached: bool) -> dict[str, float]:
    """Open sessions, draw batches, and say what that took."""
    config = parse_config(CONFIG, TrainConfig, "this benchmark")
    rng, cpu = np.random.default_rng(0), torch.device("cpu")
    paths = [folder / f"{n:03d}.h5" for n in range(sessions)]
    first = [prepare(paths[0], config)]  # kernels and libraries are loaded before we look
    for _ in range(10):
        list(draw_step(first, config, rng, cpu).batches)
    del first
    before = megabytes()
    cache = folder / "cache"
    subjects = [kept(path, config, cache) if cached else prepare(path, config) for path in paths]
    started, most = time.perf_counter(), megabytes()
    for _ in range(BATCHES):
        list(draw_step(subjects, config, rng, cpu).batches)
        now = megabytes()
        most = {kind: max(most[kind], now[kind]) for kind in now}
    seconds = time.perf_counter() - started
    return {
        **{kind: round(most[kind] - before[kind], 1) for kind in most},
        "batches_per_s": round(BATCHES / seconds, 1),
    }


def train_and_measure(folder: Path, sessions: int) -> dict[str, float]:
    """Train in as many processes as ``torchrun`` started, and say what this one has in the end."""
    config = parse_config({**CONFIG, **NETWORK}, TrainConfig, "this benchmark")
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads libraries, too
    before, has = megabytes(), dict[str, float]()

    def look(_step: int, _val: object) -> None:
        now = megabytes()
        has.update({kind: round(now[kind] - before[kind], 1) for kind in now})

    paths = [str(folder / f"{n:03d}.h5") for n in range(sessions)]
    config = msgspec.structs.replace(
        config, data=msgspec.structs.replace(config.data, cache=str(folder / "cache"))
    )
    processes = os.environ.get("WORLD_SIZE", "1")
    summary = train(config, paths, folder / f"run-{processes}", on_validation=look)
    leave()
    return {**has, "of_parameters": round(4 * summary["parameters"] / 2**20, 1)}


def by_processes(folder: Path, sessions: int, processes: int) -> list[dict[str, float]]:
    """What each of some processes has that train one network together."""
    started = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    case = [__file__, "--case", str(folder), str(sessions), "network"]
    said = subprocess.run(
        [sys.executable, *started, *case], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def copies(folder: Path, sessions: int) -> float:
    """One simulated session under many ids; gives the megabytes of its file."""
    simulate_file(folder / "000.h5", units=UNITS, minutes=MINUTES, seed=0)
    for n in range(1, sessions):
        shutil.copy(folder / "000.h5", folder / f"{n:03d}.h5")
        with h5py.File(folder / f"{n:03d}.h5", "r+") as file:
            file["session"].attrs["id"] = f"copy_{n:03d}"
    return round((folder / "000.h5").stat().st_size / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs=3, metavar=("FOLDER", "SESSIONS", "DATA"))
    args = parser.parse_args()
    if args.case:
        folder, sessions, data = args.case
        if data == "network":
            print(json.dumps(train_and_measure(Path(folder), int(sessions))), flush=True)
        else:
            print(json.dumps(measure(Path(folder), int(sessions), data == "on_disk")))
        return
    with tempfile.TemporaryDirectory() as name:
        result = {
            "machine": machine(),
            "command": "python benchmarks/memory.py",
            "session": {"units": UNITS, "minutes": MINUTES},
            "megabytes_per_file": copies(Path(name), max(SESSIONS)),
            "in_memory": {},
            "on_disk": {},
            "network": {},
        }
        case = [sys.executable, __file__, "--case", name]
        for sessions in SESSIONS:
            for data in ("on_disk", "on_disk", "in_memory"):  # the first run fills the cache
                said = subprocess.run(
                    [*case, str(sessions), data], check=True, capture_output=True, text=True
                ).stdout
                result[data][str(sessions)] = json.loads(said.splitlines()[-1])
            print(sessions, result["on_disk"][str(sessions)], result["in_memory"][str(sessions)])
        for processes in PROCESSES:
            found = by_processes(Path(name), max(SESSIONS), processes)
            result["network"][str(processes)] = found
            print(processes, found)
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
