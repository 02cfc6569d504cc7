"""``rt-neds detector``: leave the folder with which raw samples become spikes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rt_neds.errors import ConfigError
from rt_neds.result import refuse_existing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--analyzer", metavar="DIR", help="SortingAnalyzer of a baseline: its units get templates"
    )
    parser.add_argument(
        "--recording", metavar="DIR", help="raw baseline; alone, every channel is a unit"
    )
    parser.add_argument("--stream", help="the recording's, if it has several")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the baseline, at most")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if not args.analyzer and not args.recording:
        raise ConfigError("detector expects --analyzer DIR, --recording DIR or both")
    if not args.seconds > 0:
        raise ConfigError(f"seconds {args.seconds:g}; more than 0 were expected")
    from offline.prepare.progress import telling
    from offline.prepare.recording import open_recording, raw_of
    from offline.prepare.spikeinterface import load_analyzer
    from offline.prepare.templates import calibrate, with_templates
    from rt_neds.detector_folder import JSON_NAME, save_folder

    refuse_existing(args.out, JSON_NAME)  # bundles know its units by name: they would fit another
    analyzer = load_analyzer(args.analyzer) if args.analyzer else None
    if args.recording:
        raw = open_recording(args.recording, args.stream)
    elif analyzer is not None and analyzer.has_recording():
        raw = raw_of(analyzer.recording, args.analyzer)
    else:
        raise ConfigError(
            f"{args.analyzer} does not find its recording; name the raw one with --recording"
        )
    end = min(raw.samples, round(args.seconds * raw.rate))
    left_out: dict[str, str] = {}
    with telling(args.quiet) as tell:
        spec, arrays = calibrate(raw, 0, end)
        if analyzer is not None:
            if analyzer.get_num_samples() != raw.samples:
                raise ConfigError(
                    f"{args.analyzer} is of {analyzer.get_num_samples()} samples and {raw.name} of "
                    f"{raw.samples}; name the recording that was sorted"
                )
            trains = {
                str(unit): np.asarray(analyzer.sorting.get_unit_spike_train(unit), np.int64)
                for unit in analyzer.unit_ids
            }
            spec, arrays, left_out = with_templates(raw, spec, arrays, trains, 0, end, tell)
    save_folder(args.out, spec, arrays)
    noise_C = arrays["noise_C"]
    summary = {
        "out": str(Path(args.out)),
        "channels": len(noise_C),
        "unused_channels": [int(c) for c in np.flatnonzero(noise_C == 0)],
        "units": len(spec.units),
        "templates": spec.templates,
        "left_out": left_out,
        "noise_uv": float(np.median(noise_C) * spec.uv_per_bit) or None,
        "seconds": end / raw.rate,
    }
    if not args.quiet:
        print(
            f"{summary['out']}: {summary['units']} units of {summary['channels']} channels, "
            f"{len(left_out)} left out, from {summary['seconds']:.1f} s",
            file=sys.stderr,
        )
        for unit, why in left_out.items():
            print(f"  {unit}: {why}", file=sys.stderr)
    return summary
