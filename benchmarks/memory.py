"""Memory of drawing batches from 2, 20 and 200 sessions, held in memory and kept on disk.

Each case is a process of its own. ``anonymous`` is what must be in memory; ``mapped`` are pages of
the cache that happen to be there and that the system takes back when it needs the room. What the
libraries take before the first session is left out.

    python benchmarks/memory.py

writes ``results/memory.json``: data -> sessions -> megabytes, and batches per second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

from offline.batches import draw_step, prepare
from offline.cache import kept
from offline.config import TrainConfig
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
        }
        case = [sys.executable, __file__, "--case", name]
        for sessions in SESSIONS:
            for data in ("on_disk", "on_disk", "in_memory"):  # the first run fills the cache
                said = subprocess.run(
                    [*case, str(sessions), data], check=True, capture_output=True, text=True
                ).stdout
                result[data][str(sessions)] = json.loads(said.splitlines()[-1])
            print(sessions, result["on_disk"][str(sessions)], result["in_memory"][str(sessions)])
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
