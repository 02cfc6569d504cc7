"""``rt-neds bench soak``: ``serve`` for hours, with a fault a minute, and books of every bin.

Real processes over real sockets at real speed: an acquisition, ``serve`` with a worker that it
replaces, a second ``serve`` that decodes nothing (the control), and this one, which listens. The
first half runs without a standby, the second with one.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rt_neds.bench_input import random_bundle
from rt_neds.children import ChildError, free_port, serving, wait_for_schema
from rt_neds.clock import samples_per_bin
from rt_neds.errors import ConfigError, RtNedsError
from rt_neds.frames import DecodedFrame
from rt_neds.latency import Latency
from rt_neds.priority import urgent
from rt_neds.result import machine
from rt_neds.soak_books import PUBLISHED, UNACCOUNTED, Books
from rt_neds.soak_faults import MUTED, ROTATION, Fault, Faults
from rt_neds.soak_injected import PAUSES, RATE
from rt_neds.soak_processes import Memory, Sending
from rt_neds.stream.publisher import DecodedListener, Note
from rt_neds.supervise import CAN_FORK

PROBE = "soak"
PERIOD_S = 60.0
LEAST_PERIOD_S = 14.0
LAST_S = 3.0
LATENCIES = ("all", "undisturbed", "receive_to_publish")


class Watched:
    """One ``serve``, its control, what is sent to them, and the books.

    Parameters
    ----------
    mode : str
        ``cold`` or ``standby``.
    decoded : str
        Address where frames come from.
    sending : Sending
    served : subprocess.Popen
    control : DecodedListener or None
    period_s : float
        From one fault to the next.
    """

    def __init__(
        self,
        mode: str,
        decoded: str,
        sending: Sending,
        served: subprocess.Popen,
        listener: DecodedListener,
        control: DecodedListener | None,
        period_s: float,
    ) -> None:
        self.mode, self.decoded, self.sending, self.period_s = mode, decoded, sending, period_s
        self.books, self.control_books = Books(), Books()
        self.memory = Memory(served.pid)
        self.status: dict[str, Any] | None = None
        self.sums = (0, 0, 0)
        """Of late, lost and unknown over all frames, when the last status came."""
        self.faults = Faults(self)
        self.sender_ms: dict[str, float] = {}
        self.loads: list[float] = []
        self._listener, self._control, self._served = listener, control, served
        self._at = (0, 0)
        self._next_load = 0.0

    def at_bin(self) -> tuple[int, int, int]:
        """Epoch and number of the bin that came last (twice: a range that begins there)."""
        return (*self._at, self._at[1])

    def run(self, seconds: float, kinds: Sequence[str], show: Callable[[Watched], None]) -> None:
        """Watch for so long, with a fault in each period, and then until all has come.

        However busy the machine, each kind of fault is injected once, if it takes longer.
        """
        began = time.monotonic()
        ends, next_fault = began + seconds, began + self.period_s / 3
        done = self.faults.past
        while (
            (now := time.monotonic()) < ends
            or self.faults.current is not None
            or len(done) < len(kinds)
        ):
            self._turn()
            if self._served.poll() is not None:
                raise ChildError(f"serve ended with {self._served.returncode} in the middle of it")
            if now >= next_fault and self._settled():
                if now + self.period_s / 2 < ends or len(done) < len(kinds):
                    self.faults.inject(kinds[len(done) % len(kinds)], now - began)
                next_fault += self.period_s
            show(self)
        self.sending.order("stop")
        deadline = time.monotonic() + 30
        while not self.sending.ended and time.monotonic() < deadline:
            self._turn()
        deadline = time.monotonic() + LAST_S
        while time.monotonic() < deadline:
            self._turn()
        self.faults.close()

    def _settled(self) -> bool:
        """Whether a fault may begin: none is going on, and ``serve`` knows the stream."""
        return self.faults.current is None and bool(self.status and self.status["realtime"])

    def _turn(self) -> None:
        self._take(self._listener.read(20))
        while self._control is not None and (message := self._control.read(0)) is not None:
            if isinstance(message, DecodedFrame):
                self.control_books.take_frame(message)
        for entry in self.sending.entries():
            self.books.take_entry(entry)
            self.control_books.take_entry(entry)
            if entry[0] == "done":
                self.faults.take_done(entry)
            elif entry[0] == "muted":
                self.faults.take_muted(entry[1])
            elif entry[0] == "end":
                self.sender_ms = entry[1]
        self.faults.turn()
        self.memory.sample()
        if time.monotonic() > self._next_load:
            self._next_load = time.monotonic() + 10
            self.loads.append(os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"))

    def _take(self, message: DecodedFrame | Note | None) -> None:
        if isinstance(message, DecodedFrame):
            self.books.take_frame(message)
            self._at = (message.epoch, message.bin)
            ended_ns = self.books.ended_ns(message.epoch, message.end)
            if ended_ns is not None:
                self.faults.take_ended(ended_ns)
        elif isinstance(message, Note) and message.kind == "status":
            self.status = message.fields
            self.sums = self.books.late, self.books.lost, self.books.unknown
            self.books.take_handover(self.status["supervision"])
            self.faults.take_status()


@contextlib.contextmanager
def _watched(
    mode: str, bundle: Path, units: list[str], session: str, width: int, settings: dict[str, Any]
) -> Iterator[Watched]:
    spikes, decoded, quiet = (f"tcp://127.0.0.1:{free_port()}" for _ in range(3))
    options = ("--probe", PROBE, "--bundle", str(bundle), "--source",
               spikes.replace("tcp", "rtneds"))  # fmt: skip
    standby = ("--set", f"standby={'true' if mode == 'standby' else 'false'}")
    with contextlib.ExitStack() as stack:
        listener = DecodedListener(decoded, PROBE)
        stack.callback(listener.close)
        served = stack.enter_context(serving(*options, "--publish", decoded, *standby))
        control = None
        if settings["control"]:
            control = DecodedListener(quiet, PROBE)
            stack.callback(control.close)
            beside = stack.enter_context(serving(*options, "--publish", quiet, "--control"))
            wait_for_schema(control, beside)
        wait_for_schema(listener, served)
        sending = Sending(
            {"endpoint": spikes, "probe": PROBE, "session": session, "units": units,
             "spikes_per_s": settings["spikes_per_s"], "width": width, "seed": settings["seed"]}
        )  # fmt: skip
        stack.callback(sending.close)
        with urgent(children=False):  # listen in time, if we may
            yield Watched(mode, decoded, sending, served, listener, control, settings["period_s"])


def soak(
    *,
    minutes: float,
    bundle: str | None = None,
    size: str = "base",
    units: int = 400,
    spikes_per_s: float = 4000.0,
    bin_ms: float = 20.0,
    modes: Sequence[str] = ("cold", "standby"),
    kinds: Sequence[str] = ROTATION,
    period_s: float | None = None,
    control: bool = True,
    show: Callable[[Watched], None] = lambda watched: None,
) -> dict[str, Any]:
    """Serve for so long, with faults, and account for every bin.

    Parameters
    ----------
    minutes : float
        Of all modes together.
    bundle : str, optional
        By default one of random weights is made, of ``size``, ``units`` and ``bin_ms``.
    spikes_per_s : float
    modes : sequence of str
        ``cold``: a killed worker is replaced; ``standby``: another takes over.
    kinds : sequence of str
        Faults, in turn.
    period_s : float, optional
        From one fault to the next; by default a minute, or less in a run shorter than that takes.
    control : bool
        Whether a ``serve`` that decodes nothing runs beside.
    show : callable
        Told now and then how it goes.

    Returns
    -------
    dict
        As ``rt-neds bench soak --json``.
    """
    from rt_neds.bundle import load_spec

    if not CAN_FORK:
        raise ConfigError(
            "bench soak kills workers that serve replaces, on Linux alone; run it there"
        )
    each_s = minutes * 60 / len(modes)
    if period_s is None:
        period_s = min(PERIOD_S, max(LEAST_PERIOD_S, each_s / (len(kinds) + 1)))
    runs: list[Watched] = []
    with tempfile.TemporaryDirectory() as scratch:
        if bundle:  # whose units fire as we do not know
            path, kinds = Path(bundle), [kind for kind in kinds if kind != MUTED]
        else:
            usual_s = PAUSES * units / spikes_per_s
            path = random_bundle(Path(scratch), size, units, bin_ms, 4, longest_silence_s=usual_s)
        spec = load_spec(path)
        session = spec.sessions[0]
        if session.rate != RATE:
            raise ConfigError(
                f"{path} is of a probe of {session.rate:g} Hz; bench soak sends {RATE} samples a "
                "second: take another bundle, or none"
            )
        width = samples_per_bin(spec.bin_ms, RATE)
        settings = {"spikes_per_s": spikes_per_s, "period_s": period_s, "control": control}
        began, ended_early = time.monotonic(), None
        for number, mode in enumerate(modes):
            try:
                with _watched(mode, path, session.units, session.id, width,
                              {**settings, "seed": number}) as watched:  # fmt: skip
                    runs.append(watched)
                    watched.run(each_s, kinds, show)
            except RtNedsError as error:
                if not runs:
                    raise
                ended_early = str(error)  # what was measured for half an hour is not thrown away
                break
    return {
        "machine": machine(),
        "minutes": round((time.monotonic() - began) / 60, 2),
        "model": f"{spec.model.layers} layers of {spec.model.dim}, "
        f"{len(spec.behaviours)} behaviours",
        "units": len(session.units),
        "spikes_per_s": spikes_per_s,
        "bin_ms": spec.bin_ms,
        "fault_every_s": round(period_s, 1),
        "ended_early": ended_early,
        **report(runs, width),
    }


def report(runs: list[Watched], width: int) -> dict[str, Any]:
    """What all runs come to."""
    fates = [run.books.fates() for run in runs]
    total = {name: sum(fate[name] for fate in fates) for name in fates[0]}
    checks = [run.books.check() for run in runs]
    faults = [(run.mode, fault) for run in runs for fault in run.faults.past]
    memory = [{"mode": run.mode, **row} for run in runs for row in run.memory.report()]
    grown = [row["growth_mb"] for row in memory if "growth_mb" in row]
    loads = [load for run in runs for load in run.loads]
    recoveries = {
        mode: [f.recovery_ms for m, f in faults if m == mode and f.kind == "worker killed"]
        for mode in ("cold", "standby")
    }
    return {
        "bins_expected": sum(total.values()),
        "bins_published": total[PUBLISHED],
        "unaccounted": total[UNACCOUNTED],
        "fates": total,
        "unaccounted_bins": [list(key) for run in runs for key in run.books.unaccounted()][:50],
        "checks": {name: sum(check[name] for check in checks) for name in checks[0]},
        "handovers_unasked": sum(run.faults.handovers_unasked for run in runs),
        "faults": summed([fault for _, fault in faults]),
        "fault_log": [{"mode": mode, **fault.row()} for mode, fault in faults],
        "rss_growth_mb": max(grown, default=None),
        "memory": memory,
        "recovery_ms": {
            mode: max((ms for ms in times if ms is not None), default=None)
            for mode, times in recoveries.items()
        },
        "recoveries_ms": recoveries,
        "latency": latencies(runs, width),
        "load": {"mean": round(statistics.fmean(loads), 2), "max": max(loads)} if loads else None,
    }


def summed(faults: list[Fault]) -> list[dict[str, Any]]:
    """One row for each kind."""
    rows: dict[str, dict[str, Any]] = {}
    for fault in faults:
        row = rows.setdefault(
            fault.kind, {"kind": fault.kind, "injected": 0, "reported": 0, "times": 0, "wrong": 0}
        )
        row["injected"] += fault.injected
        row["reported"] += fault.reported
        row["times"] += 1
        row["wrong"] += bool(fault.wrong)
    return list(rows.values())


def latencies(runs: list[Watched], width: int) -> dict[str, Any]:
    """For each mode and for its control, from a bin's intended end to its publication, in ms."""
    told: dict[str, Any] = {}
    for run in runs:
        told[run.mode] = {}
        run.control_books.touched = run.books.touched
        for name, books in (("decoded", run.books), ("control", run.control_books)):
            if not books.heard:
                continue
            histograms = {which: Latency() for which in LATENCIES}
            books.record(width, histograms)
            told[run.mode][name] = {
                which: {**histogram.percentiles_ms(), "n": histogram.count}
                for which, histogram in histograms.items()
            }
        told[run.mode]["sender_behind"] = run.sender_ms
    return told
