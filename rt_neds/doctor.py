"""``rt-neds doctor``: what this machine will hold, and what to change about it, in words."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rt_neds.awake import DEVICE, awake, is_virtual, may_be_held
from rt_neds.bench_step import paced, percentiles, served_step, timed
from rt_neds.bundle import load_spec
from rt_neds.errors import ConfigError
from rt_neds.latency import stolen_ms
from rt_neds.priority import quiet_machine
from rt_neds.result import machine

TICK_S = 0.001
BIN_WIDTHS_MS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
LATE_US = 1_000.0
"""A timer that is later than this once in a hundred times makes bins late that need not be."""
WAKING_US = 20
"""Longer than this a core need not take to wake."""
STEADY_CLOCKS = ("tsc", "arch_sys_counter", "kvm-clock", "hyperv_clocksource_tsc_page")
NOT_TOLD = "not told by this system"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    Attributes
    ----------
    what, found : str
    good : bool
    do : str
        What to change; empty if nothing need be.
    """

    what: str
    found: str
    good: bool = True
    do: str = ""


# -- what the system says ------------------------------------------------------------------------


def processor(about: dict[str, Any], proc: Path = Path("/proc")) -> Iterator[Finding]:
    """Cores, their load, and whether they are somebody else's as well."""
    cores, load = about["cores"] or 1, about["load"]
    busy = bool(load) and load[0] > cores - 1
    found = f"{about['cpu']}, {cores} cores" + (f", load {load[0]:.1f}" if load else "")
    do = "end other programs: serve wants a core of its own beside the acquisition's"
    yield Finding(what="processor", found=found, good=not busy, do=do if busy else "")
    if is_virtual(proc / "cpuinfo"):
        stolen, up = stolen_ms(proc), (_read(proc / "uptime") or "").split()
        found = "yes"
        if stolen is not None and up:
            share = stolen / 1e3 / (cores * float(up[0]))
            found = f"yes; its host took {share:.1%} of the processor time"
        yield Finding(
            what="virtual machine",
            found=found,
            good=False,
            do="run on the bare machine: what its other guests do shows in the longest latencies",
        )


def graphics() -> Finding:
    """The GPU, if there is one that PyTorch can use."""
    import torch

    if not torch.cuda.is_available():
        return Finding(what="GPU", found="none that PyTorch can use; serve decodes on the CPU")
    free, total = torch.cuda.mem_get_info()
    found = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return Finding(what="GPU", found=found)


def clock_source(sys: Path = Path("/sys")) -> Finding:
    """What the system reads when asked for the time."""
    name = _read(sys / "devices/system/clocksource/clocksource0/current_clocksource")
    if name is None or name in STEADY_CLOCKS:
        return Finding(what="clock source", found=name or NOT_TOLD)
    do = f"boot with clocksource=tsc: to ask {name} for the time is slow, and each hop asks"
    return Finding(what="clock source", found=name, good=False, do=do)


def governor(sys: Path = Path("/sys")) -> Finding:
    """Whether cores slow down while serve waits for the next bin."""
    files = sys.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    names = sorted({_read(file) or "" for file in files})
    if not names:
        return Finding(what="CPU governor", found=NOT_TOLD)
    good = names == ["performance"]
    do = "" if good else "sudo cpupower frequency-set -g performance"
    return Finding(what="CPU governor", found=", ".join(names), good=good, do=do)


def idle_states(
    sys: Path = Path("/sys"), device: Path = DEVICE, proc: Path = Path("/proc")
) -> Finding:
    """How deep cores sleep until the next message: waking takes time, and caches may be empty."""
    deepest, name = -1, ""
    for file in sorted(sys.glob("devices/system/cpu/cpu[0-9]*/cpuidle/state[0-9]*/latency")):
        latency, disabled = _read(file) or "", _read(file.parent / "disable")
        if latency.isdigit() and disabled != "1" and int(latency) > deepest:
            deepest, name = int(latency), _read(file.parent / "name") or file.parent.name
    if deepest < 0:
        return Finding(what="idle states", found=NOT_TOLD)
    found = f"{name} is the deepest, {deepest} us to wake from"
    if may_be_held(device):
        return Finding(what="idle states", found=f"{found}; serve keeps cores from it")
    good = deepest <= WAKING_US and not is_virtual(proc / "cpuinfo")
    rule = f'KERNEL=="cpu_dma_latency", OWNER="{_user()}"'
    do = f"let serve keep cores awake, which costs power: a udev rule {rule}, and boot again"
    return Finding(what="idle states", found=found, good=good, do="" if good else do)


def realtime() -> Iterator[Finding]:
    """Real-time priority and locked memory: what is granted, and what the limits are."""
    try:
        import resource
    except ImportError:
        yield Finding(what="real-time priority", found=NOT_TOLD)
        return
    granted = _may_be_realtime()
    priority, lock = getattr(resource, "RLIMIT_RTPRIO", None), resource.RLIMIT_MEMLOCK
    limit = _limit(resource.getrlimit(priority)[0], 1) if priority is not None else NOT_TOLD
    yield Finding(
        what="real-time priority",
        found=f"{'granted' if granted else 'refused'}, limit {limit}",
        good=granted,
        do=""
        if granted
        else f"put '{_user()} - rtprio 50' into /etc/security/limits.conf and log in again",
    )
    # Nothing of ours locks memory: it is said because acquisition programs do.
    yield Finding(what="memory lock", found=f"{_limit(resource.getrlimit(lock)[0], 1024)} kB")


def _may_be_realtime() -> bool:
    if not hasattr(os, "sched_setscheduler"):
        return False
    before = os.sched_getscheduler(0)
    with quiet_machine(True):
        granted = os.sched_getscheduler(0) == os.SCHED_FIFO
    return granted or before == os.SCHED_FIFO


def _limit(value: int, unit: int) -> str:
    return "none" if value < 0 or value >= 1 << 62 else str(value // unit)


def _user() -> str:
    import getpass

    with contextlib.suppress(OSError, KeyError):
        return getpass.getuser()
    return "YOU"


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


# -- what is measured ----------------------------------------------------------------------------


def lateness_us(seconds: float) -> dict[str, float]:
    """How late a sleep of one millisecond ends, at the priority that serve gets."""
    late = []
    with quiet_machine(True), awake():
        for _ in range(max(1, round(seconds / TICK_S))):
            due = time.perf_counter_ns() + round(TICK_S * 1e9)
            time.sleep(TICK_S)
            late.append((time.perf_counter_ns() - due) / 1e3)
    return {**percentiles(late), "max": round(max(late), 1)}


def timer(late: dict[str, float]) -> Finding:
    """What the lateness of the timer says."""
    good = late["p99"] <= LATE_US
    do = "end other programs, and see to what else is said here: the system wakes serve too late"
    found = f"p50 {late['p50']:.0f}, p99 {late['p99']:.0f}, most {late['max']:.0f} us late"
    return Finding(what="timer", found=found, good=good, do="" if good else do)


def step_us(bundle: str, seconds: float, device: str) -> tuple[dict[str, Any], float]:
    """Time of the step that serve would run, back to back and one per bin; and the bundle's bin."""
    import torch

    from rt_neds.bundle import build_model, load_spec

    torch.set_num_threads(1)
    spec = load_spec(bundle)
    units = len(spec.sessions[0].units)
    step = served_step(build_model(bundle, spec), spec, device)
    counts_TN = np.random.default_rng(0).poisson(0.3, (512, units)).astype(np.float32)
    with quiet_machine(True):
        hot = timed(lambda i: step.steps((counts_TN[i % 512],), (True,)), 1_000)
        bins = max(20, round(seconds * 1e3 / spec.bin_ms))
        cold = paced({"step": step}, counts_TN, bins, spec.bin_ms / 1e3)["step"]
    return {"hot": percentiles(hot), "paced": percentiles(cold)}, spec.bin_ms


def widths(
    late: dict[str, float], step: dict[str, Any], own_ms: float
) -> list[dict[str, float | bool]]:
    """Which bin widths leave time to wake up, to decode, and half a bin to spare.

    Judged by the lateness and the step that one bin in a hundred exceeds.
    """
    needs_ms = (late["p99"] + step["paced"]["p99"]) / 1e3
    return [
        {"bin_ms": bin_ms, "holds": bool(needs_ms <= bin_ms / 2)}
        for bin_ms in sorted({*BIN_WIDTHS_MS, own_ms})
    ]


def decoding(step: dict[str, Any], held: list[dict[str, Any]], own_ms: float) -> Iterator[Finding]:
    """What the measured step says."""
    hot, cold = step["hot"], step["paced"]
    found = (
        f"p50 {hot['p50']:.0f} us back to back; one per bin p50 {cold['p50']:.0f}, "
        f"p99 {cold['p99']:.0f} us"
    )
    yield Finding(what="step", found=found)
    good = any(width["holds"] and width["bin_ms"] == own_ms for width in held)
    least = min((width["bin_ms"] for width in held if width["holds"]), default=None)
    yield Finding(
        what="bin width",
        found=f"the bundle's is {own_ms:g} ms; "
        + (f"from {least:g} ms on this machine holds" if least else "this machine holds none"),
        good=good,
        do="" if good else "train a smaller model or with wider bins, or use a faster machine",
    )


# -- command -------------------------------------------------------------------------------------


def examine(
    bundle: str | None,
    seconds: float,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Look at everything.

    Returns
    -------
    dict
        ``machine``, ``findings``, ``timer_us`` and, with a bundle, ``step_us`` and ``bins``.
    """
    if bundle:
        load_spec(bundle)  # before the measurements: a wrong name need not wait for them
    about = machine()
    findings = [
        *processor(about),
        graphics(),
        clock_source(),
        governor(),
        idle_states(),
        *realtime(),
    ]
    say(f"measuring for {seconds * (2 if bundle else 1):g} s")
    late = lateness_us(seconds)
    findings.append(timer(late))
    result: dict[str, Any] = {"machine": about, "timer_us": late}
    if bundle:
        step, own_ms = step_us(bundle, seconds, device)
        held = widths(late, step, own_ms)
        findings += decoding(step, held, own_ms)
        result |= {"step_us": step, "bins": held}
    return {**result, "findings": [msgspec.to_builtins(finding) for finding in findings]}


def show(result: dict[str, Any]) -> None:
    """Print what was found, and then what to do."""
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table(show_edge=False)
    for title in ("", "what", "found"):
        table.add_column(title)
    for finding in result["findings"]:
        mark = "[green]ok[/]" if finding["good"] else "[yellow]![/]"
        table.add_row(mark, finding["what"], finding["found"])
    console.print(table)
    if "bins" in result:
        held = "  ".join(
            f"[{'green' if width['holds'] else 'red'}]{width['bin_ms']:g} ms "
            f"{'yes' if width['holds'] else 'no'}[/]"
            for width in result["bins"]
        )
        console.print(f"\nbins this machine holds: {held}", soft_wrap=True)
    todo = [finding for finding in result["findings"] if not finding["good"]]
    if todo:
        console.print("\nto change:")
    for finding in todo:
        line = f"  {finding['what']}: {finding['do']}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="DIR", help="also measure its step on this machine")
    parser.add_argument("--seconds", type=float, default=2.5, help="of each measurement (2.5)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="what runs that step (cpu)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    if not 0.1 <= args.seconds <= 600:
        raise ConfigError(f"seconds {args.seconds:g}; 0.1 to 600 were expected")
    say = (lambda line: None) if args.quiet else print
    result = examine(args.bundle, args.seconds, args.device, say)
    if not args.quiet:
        show(result)
    return result
