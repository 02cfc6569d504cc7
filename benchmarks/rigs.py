"""Latency end to end by each way that spikes can come: native, Open Ephys, SpikeGLX and a detector.

    python benchmarks/rigs.py --turns 6 --json results/.../rigs.json

The same Poisson spikes, sent as each acquisition program would send them, by ``replay`` in another
process; SpikeGLX's are samples of 384 channels, in which a detector finds the spikes again: peaks
of channels, or units by their templates. Decoder and *control* (the same ``serve`` with a decoder
that does nothing) take turns of ten seconds, of which the first, in which a run begins, and the
last bins are left out. Time runs from a bin's intended end by the sample clock.

It is the emulators' time: what SpikeGLX or the Open Ephys GUI take themselves, before samples or
spikes can be had from them, is not in it.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from offline.prepare.recording import Raw
from offline.prepare.templates import calibrate, with_templates
from rt_neds.bench_input import SESSION_ID, poisson_session, random_bundle
from rt_neds.bundle import load_spec
from rt_neds.children import collect, finish_replay, free_port, serving, start_replay
from rt_neds.children import wait_for_schema as ready
from rt_neds.detector_folder import save_folder
from rt_neds.latency import Latency, Tally, stolen_ms
from rt_neds.result import machine, write_json
from rt_neds.session import Session, load_session
from rt_neds.spikeglx_recording import AP_CHANNELS, SynthesisedRecording
from rt_neds.stream.publisher import DecodedListener

TURN_S, BIN_MS = 10.0, 20.0
UNITS, SPIKES_PER_S = 200, 2000.0
BASELINE_S = 30.0
"""From which detectors are made."""
SCORED = range(50, 490)
"""Bins of each turn that count."""


@dataclass(frozen=True)
class Way:
    """How spikes come: what ``serve`` and ``replay`` are told, and what they need."""

    name: str
    scheme: str
    replay: tuple[str, ...]
    bundle: Path
    detector: Path | None = None


class Synthesised(Raw):
    """What a detector is made from: samples made up from a session's spikes."""

    def read(self, first: int, end: int) -> NDArray[np.int16]:
        samples_SC = self.recording.samples(first, end)
        return np.ascontiguousarray(samples_SC[:, : len(self.channels)])


def detectors(session: Session, folder: Path) -> tuple[Path, Path]:
    """Folders of a detector of peaks, whose channels are a bundle's units, and of templates."""
    recording = SynthesisedRecording(session)
    probe = recording.probe
    raw = Synthesised(
        recording=recording,
        name="synthesised",
        rate=probe.rate,
        samples=recording.end,
        channels=tuple(f"{SESSION_ID}/{c}" for c in range(probe.ap)),
        position_C2=np.ascontiguousarray(probe.sites_C[:, 1:]),
        shank_C=probe.sites_C[:, 0].astype(np.int64),
        group_C=np.zeros(probe.ap, np.int64),
        uv_per_bit=1e6 * probe.volts / probe.max_int / probe.gains[0],
    )
    spec, arrays = calibrate(raw, 0, raw.samples)
    trains = {
        unit: session.records_S["sample"][session.records_S["unit"] == n]
        for n, unit in enumerate(session.unit_ids)
    }
    save_folder(folder / "peaks", msgspec.structs.replace(spec, units=list(raw.channels)), arrays)
    spec, arrays, left_out = with_templates(raw, spec, arrays, trains, 0, raw.samples)
    assert not left_out, left_out
    save_folder(folder / "templates", spec, arrays)
    return folder / "peaks", folder / "templates"


def in_turns(way: Way, session: Path, turns: int) -> dict[str, Any]:
    """Decoder and control by one way."""
    tallies, received = (Tally(BIN_MS), Tally(BIN_MS)), (Latency(), Latency())
    spikes, published = ((free_port(), free_port()) for _ in range(2))
    options = []
    for i, extra in enumerate(((), ("--control",))):
        options.append(
            ("--probe", "imec0", "--bundle", str(way.bundle), *extra,
             "--source", f"{way.scheme}://127.0.0.1:{spikes[i]}",
             "--publish", f"tcp://127.0.0.1:{published[i]}",
             *(("--detector", str(way.detector)) if way.detector else ()))
        )  # fmt: skip
    listeners = [DecodedListener(f"tcp://127.0.0.1:{port}", "imec0") for port in published]
    with serving(*options[0]) as first, serving(*options[1]) as second:
        if way.scheme == "rtneds":  # the others are known only once something is heard of the probe
            for listener, child in zip(listeners, (first, second), strict=True):
                ready(listener, child)
        for turn in range(2 * (turns + 1)):
            which = turn % 2
            out, before = session.with_suffix(f".{way.name}.{turn}.json"), stolen_ms()
            sending = start_replay(
                "--session", str(session), "--probe", "imec0", *way.replay, "--to", f"{TURN_S:g}",
                "--bind", f"tcp://127.0.0.1:{spikes[which]}", "--wait", "120", out=out,
            )  # fmt: skip
            heard, _ = collect(listeners[which], sending)
            frames = [frame for frame in heard if frame.bin in SCORED]
            sent = finish_replay(sending, out)
            if turn < 2:  # the first of each puts together what it needs
                continue
            tallies[which].take(frames, sent)
            tallies[which].steal(before, stolen_ms())
            for frame in frames:
                end_ns = sent["zero_ns"] + round(frame.end * 1e9 / sent["rate"])
                received[which].record(frame.stamps["received"] - end_ns)
    for listener in listeners:
        listener.close()
    report = tallies[0].report(tallies[1], turns * len(SCORED))
    report["stages_ms"]["bin_end_to_receive"] = received[0].percentiles_ms()
    control = {"bins": tallies[1].bins, "missed": tallies[1].missed}
    return report | {"control": control, "stolen_ms": [tally.stolen_ms for tally in tallies]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=6, help="of ten seconds, by each way")
    parser.add_argument("--size", default="base")
    parser.add_argument("--only", nargs="+", help="names of ways")
    parser.add_argument("--json", default="-")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = random_bundle(folder / "b", args.size, UNITS, BIN_MS, 4)
        of_channels = random_bundle(folder / "c", args.size, AP_CHANNELS, BIN_MS, 4)
        units = load_spec(bundle).sessions[0].units
        session = poisson_session(folder / "s.h5", SESSION_ID, units, SPIKES_PER_S, BASELINE_S)
        peaks, templates = detectors(load_session(session), folder)
        openephys, spikeglx = ("--as", "openephys"), ("--as", "spikeglx")
        ways = [
            Way("native", "rtneds", (), bundle),
            Way("openephys", "openephys", openephys, bundle),
            Way("spikeglx_peaks", "spikeglx", spikeglx, of_channels, peaks),
            Way("spikeglx_templates", "spikeglx", spikeglx, bundle, templates),
        ]
        result: dict[str, Any] = {
            "machine": machine(), "size": args.size, "units": UNITS, "spikes_per_s": SPIKES_PER_S,
            "bin_ms": BIN_MS,
        }  # fmt: skip
        for way in ways:
            if args.only and way.name not in args.only:
                continue
            result[way.name] = in_turns(way, session, args.turns)
            print(way.name, result[way.name]["stages_ms"], flush=True)
            if args.json != "-":
                write_json(args.json, result)
        if args.json == "-":
            write_json("-", result)


if __name__ == "__main__":
    main()
