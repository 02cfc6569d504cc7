"""A and B: the same cases by two commits, in turns, in one session on one core.

    python benchmarks/compare.py A B [case ...] [--rounds N] [--json FILE]

A and B are commits, or folders (``.`` is the tree as it lies here). Each gets a process of its own
that imports rt_neds from it; in each round each case runs a short block in the one and then in the
other, and who begins alternates. What is reported is the median over rounds of B's time over A's,
with an interval of 95 % from resampling rounds: whatever else the machine does hits both blocks of
a round alike.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
UNITS, PERIOD = 400, 0.020
RESAMPLES = 2_000
Case = tuple[Callable[[int], object], int, float]
"""What is timed, given the number of the call; calls of a block; seconds asleep before each."""


# -- the cases, in a process that has one commit's rt_neds ---------------------------------------


def step(dim: int, layers: int, heads: int, calls: int, asleep: float) -> Case:
    import torch

    from rt_neds.model.neds import NEDS, ModelConfig
    from rt_neds.model.readout import Behaviour
    from rt_neds.stream.fused import FusedStep

    torch.manual_seed(0)
    torch.set_num_threads(1)
    names = [f"behaviour_{i}" for i in range(4)]
    behaviours = [Behaviour(name=name, kind="poisson") for name in names]
    model = NEDS(ModelConfig(dim=dim, layers=layers, heads=heads), behaviours, {"a": UNITS}).eval()
    try:  # as the bundles of that commit have them
        from rt_neds.model import rounding
    except ImportError:
        pass
    else:
        called = ("round_weights", "round_trunk")  # the latest first
        next(getattr(rounding, name) for name in called if hasattr(rounding, name))(model)
    fused = FusedStep(model, "a", names)
    counts_TN = np.random.default_rng(0).poisson(0.3, (256, UNITS)).astype(np.float32)
    return lambda i: fused.step(counts_TN[i % 256], True), calls, asleep


def binner(calls: int) -> Case:
    """A second of 1 ms batches, 10 000 spikes, into 20 ms bins."""
    from rt_neds.frames import SPIKE_DTYPE, SpikeBatch
    from rt_neds.stream.binner import Binner

    rng, rate = np.random.default_rng(0), 30_000.0
    records_S = np.zeros(10_000, SPIKE_DTYPE)
    records_S["sample"] = np.sort(rng.integers(0, 30_000, 10_000))
    records_S["unit"] = rng.integers(0, UNITS, 10_000)
    cuts = np.searchsorted(records_S["sample"], np.arange(0, 30_001, 30))
    pieces = [records_S[a:b] for a, b in itertools.pairwise(cuts)]
    ours = Binner(np.arange(UNITS, dtype=np.int32), UNITS, 600, 100)

    def second(i: int) -> None:
        for k, piece in enumerate(pieces):
            batch = SpikeBatch(i, k, 30 * k, 30 * k + 30, rate, 0, 0, piece)
            for _ in ours.frames(batch):
                pass

    return second, calls, 0.0


def wire(calls: int) -> Case:
    """One message of ten spikes packed and parsed, and one decoded bin of eight values."""
    from rt_neds.frames import SPIKE_DTYPE, DecodedFrame, SpikeBatch
    from rt_neds.wire import pack_decoded, pack_spikes, unpack_decoded, unpack_spikes

    batch = SpikeBatch(1, 5, 0, 30, 30_000.0, 7, 0, np.zeros(10, SPIKE_DTYPE))
    stamps = dict.fromkeys(("sent", "received", "binned", "decoded", "published"), 10**15)
    values_V = np.zeros(8, np.float32)
    frame = DecodedFrame("imec0", 1, 5, 600, values_V, 0, 10, 0, 0, 0, "0123456789ab", stamps)

    def both(i: int) -> None:
        _, header, payload = pack_spikes("imec0", batch)
        unpack_spikes(header, payload, 0)
        unpack_decoded(pack_decoded(frame)[1])

    return both, calls, 0.0


SMALL, BASE, LARGE = (128, 4, 4), (256, 5, 8), (256, 22, 8)
CASES: dict[str, Callable[[], Case]] = {
    "step small hot": lambda: step(*SMALL, 60, 0.0),
    "step small paced": lambda: step(*SMALL, 15, PERIOD),
    "step base hot": lambda: step(*BASE, 40, 0.0),
    "step base paced": lambda: step(*BASE, 15, PERIOD),
    "step large hot": lambda: step(*LARGE, 15, 0.0),
    "step large paced": lambda: step(*LARGE, 15, PERIOD),
    "binner": lambda: binner(3),
    "wire": lambda: wire(200),
}


def work() -> None:
    """Answer each case named on standard input with the microseconds of a block of it."""
    import rt_neds

    if not Path(rt_neds.__file__).is_relative_to(Path.cwd()):
        raise SystemExit(f"{Path.cwd()} has no rt_neds")
    made: dict[str, Case] = {}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name = line.strip()
        if name not in made:
            made[name] = CASES[name]()
            block(made[name])
        print(json.dumps(block(made[name])), file=answers, flush=True)


def block(case: Case) -> list[float]:
    run, calls, asleep = case
    took = []
    if not asleep:
        for i in range(1 + calls // 5):
            run(i)
    for i in range(calls):
        if asleep:
            time.sleep(asleep)
        start = time.perf_counter_ns()
        run(i)
        took.append((time.perf_counter_ns() - start) / 1e3)
    return took


# -- the session ---------------------------------------------------------------------------------


class Worker:
    """A process that has one commit's rt_neds."""

    def __init__(self, tree: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), "--worker"],
            cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if hasattr(os, "sched_setaffinity"):  # both on one core: only one works at a time
            os.sched_setaffinity(self._process.pid, {max(os.sched_getaffinity(0))})

    def median_us(self, case: str) -> float:
        """Median of one block."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(case + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it said is on the screen
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"case {case!r} cannot be run by one of the two; see above")
        return float(np.median(json.loads(answer)))

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def tree_of(what: str, scratch: Path) -> Iterator[Path]:
    """Folder of a commit's files, or the folder itself."""
    if Path(what).is_dir():
        yield Path(what).resolve()
        return
    packed = subprocess.run(
        ["git", "archive", "--format=tar", what], cwd=HERE.parent.parent, capture_output=True
    )
    if packed.returncode:
        said = packed.stderr.decode(errors="replace").strip()
        raise SystemExit(f"{what} is neither a folder nor a commit ({said})")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
        files.extractall(scratch, filter="data")
    yield scratch


def ratio_of(a_us: Sequence[float], b_us: Sequence[float]) -> dict[str, float]:
    """Median over rounds of B over A, and the interval that resampling of rounds gives it."""
    of_round = np.asarray(b_us) / np.asarray(a_us)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(of_round), (RESAMPLES, len(of_round)))
    low, high = np.percentile(np.median(of_round[drawn], axis=1), [2.5, 97.5])
    ratio = {"ratio": np.median(of_round), "low": low, "high": high}
    medians = {"a_us": np.median(a_us), "b_us": np.median(b_us)}
    return {name: round(float(x), 4) for name, x in {**medians, **ratio}.items()}


def compare(a: Path, b: Path, cases: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Both trees' times and their ratio, for each case."""
    workers = Worker(a), Worker(b)
    took: dict[str, tuple[list[float], list[float]]] = {case: ([], []) for case in cases}
    try:
        for r in range(rounds):
            for case in cases:
                for which in (0, 1) if r % 2 == 0 else (1, 0):
                    took[case][which].append(workers[which].median_us(case))
    finally:
        for worker in workers:
            worker.end()
    return {case: ratio_of(*times) for case, times in took.items()}


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"A is {result['a']}, B is {result['b']}; {result['rounds']} rounds, us")
    for column in ("case", "A", "B", "B over A", "95 %", ""):
        table.add_column(column, justify="left" if column in ("case", "") else "right")
    for case, row in result["cases"].items():
        verdict = "faster" if row["high"] < 1 else "slower" if row["low"] > 1 else ""
        table.add_row(
            case, f"{row['a_us']:,.1f}", f"{row['b_us']:,.1f}", f"{row['ratio']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}", verdict,
        )  # fmt: skip
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("a", help="commit or folder")
    parser.add_argument("b", help="commit or folder")
    parser.add_argument("case", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    unknown = [case for case in options.case if case not in CASES]
    if unknown or options.rounds < 2:
        parser.error(f"cases are {', '.join(CASES)} and rounds at least 2; {unknown} came")
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / which for which in "ab"]
        for folder in folders:
            folder.mkdir()
        with tree_of(options.a, folders[0]) as a, tree_of(options.b, folders[1]) as b:
            cases = compare(a, b, options.case or list(CASES), options.rounds)
    result = {"a": options.a, "b": options.b, "rounds": options.rounds, "cases": cases}
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        work()
    else:
        main()
