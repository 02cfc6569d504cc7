"""What it costs to read SpikeGLX: a fetch on loopback, and the source's share of a core.

``python benchmarks/spikeglx.py --seconds 20 --json FILE`` plays 384 channels of noise in a process
of its own, at real speed. First fetches, a millisecond apart, take turns with NOOP, which is the
same way without samples. Then the source runs with a detector that finds nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from rt_neds.frames import SPIKE_DTYPE
from rt_neds.result import machine
from rt_neds.spikeglx_wire import Question, Reply, channel_list, fetch, introduce, sample_count
from rt_neds.stream.spikeglx import PACE_NS, SpikeGLXSource
from rt_neds.stream.spikeglx_line import Line, look_up

AP, RATE = 384, 30_000
META = f"""nSavedChans={AP + 1}
snsApLfSy={AP},0,1
acqApLfSy={AP},0,1
imSampRate={RATE}
imAiRangeMax=0.6
imDatPrb_type=0
snsSaveChanSubset=all
~imroTbl=(0,{AP}){"".join(f"({c} 0 0 500 250 1)" for c in range(AP))}
~snsGeomMap=(NP1010,1,0,70){"".join(f"(0:27:{10 * c}:1)" for c in range(AP))}
"""


class Nothing:
    """A detector that costs nothing."""

    units, channels, settle = ("none",), AP, 0

    def check_source(self, *_: object) -> None:
        """Take any."""

    def reset(self, first: int) -> None:
        """Nothing to forget."""

    def detect(self, samples_SC: np.ndarray, first: int) -> tuple[np.ndarray, int]:
        """Find nothing."""
        return np.zeros(0, SPIKE_DTYPE), first + len(samples_SC)


def emulate(path: str, port: multiprocessing.Queue) -> None:
    from rt_neds.spikeglx_emulator import Server
    from rt_neds.spikeglx_recording import RawRecording
    from rt_neds.spikeglx_run import Run

    raw = RawRecording(path)
    run = Run(raw, 0, raw.end, 1.0)
    server = Server("tcp://127.0.0.1:0", run)
    run.start()
    port.put(int(server.endpoint.rpartition(":")[2]))
    while True:
        time.sleep(1)


def round_trips(port: int, seconds: float) -> dict[str, list[float]]:
    """Microseconds of FETCH and of NOOP, and how many samples the fetches brought."""
    line = Line(look_up("127.0.0.1", port))
    while not line.connect(10_000_000):
        pass

    def ask(question: Question) -> Reply:
        line.ask(question)
        while (reply := line.receive(100_000_000)) is None:
            pass
        return reply

    def through(talk):  # type: ignore[no-untyped-def]
        question = next(talk)
        while True:
            try:
                question = talk.send(ask(question))
            except StopIteration as end:
                return end.value

    probe = through(introduce(0))
    at, channels = through(sample_count(0)), channel_list(probe)
    marks: dict[str, list[float]] = {"fetch": [], "noop": [], "samples": []}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for name, question in (
            ("fetch", fetch(0, probe, channels, at)),
            ("noop", Question("NOOP")),
        ):
            began = time.perf_counter_ns()
            reply = ask(question)
            marks[name].append((time.perf_counter_ns() - began) / 1e3)
            if name == "fetch":
                marks["samples"].append(len(reply.samples_SC))
                at = reply.first + len(reply.samples_SC)
        time.sleep(PACE_NS / 1e9)
    line.close()
    return marks


def share(port: int, seconds: float) -> dict[str, float]:
    source = SpikeGLXSource(f"spikeglx://127.0.0.1:{port}", "s", Nothing())
    while source.read(100) is None:
        pass
    began, used, before = time.monotonic(), time.process_time(), dict(source.counters)
    batches = 0
    while time.monotonic() - began < seconds:
        batches += source.read(100) is not None
    elapsed = time.monotonic() - began
    used = time.process_time() - used
    source.close()
    fetches = source.counters["fetches"] - before["fetches"]
    return {
        "cpu_share": used / elapsed,
        "fetches_per_s": fetches / elapsed,
        "samples_per_s": (source.counters["samples"] - before["samples"]) / elapsed,
        "lost": source.counters["lost"],
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--json", default="-")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise_g0_t0.imec0.ap.bin"
        path.with_suffix(".meta").write_text(META)
        tile = np.random.default_rng(0).normal(0, 5, (RATE, AP + 1)).astype("<i2")
        tile[:, -1] = 0
        with path.open("wb") as file:
            for _ in range(round(2 * args.seconds) + 30):
                tile.tofile(file)
        where: multiprocessing.Queue = multiprocessing.Queue()
        emulator = multiprocessing.Process(target=emulate, args=(str(path), where), daemon=True)
        emulator.start()
        try:
            port = where.get(timeout=120)
            marks = round_trips(port, args.seconds)
            cost = share(port, args.seconds)
        finally:
            emulator.terminate()
    result = {
        "machine": machine(),
        "channels": AP + 1,
        **{
            f"{name}_us": {
                "n": len(marks[name]),
                "p50": float(np.percentile(marks[name], 50)),
                "p99": float(np.percentile(marks[name], 99)),
                "max": max(marks[name]),
            }
            for name in ("fetch", "noop")
        },
        "samples_a_fetch": float(np.mean(marks["samples"])),
        "source": cost,
    }
    text = json.dumps(result, indent=1)
    print(text) if args.json == "-" else Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
