"""``rt-neds simulate``: write a simulated session."""

from __future__ import annotations

import argparse
from typing import Any

from rt_neds.errors import ConfigError
from rt_neds.result import refuse_existing
from rt_neds.simulate import simulate_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="S.h5", help="session file to write")
    parser.add_argument("--units", type=int, default=300, help="300")
    parser.add_argument("--minutes", type=float, default=20.0, help="20")
    parser.add_argument("--seed", type=int, default=0, help="the same gives the same session (0)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    refuse_existing(args.out)
    try:
        summary = simulate_file(args.out, units=args.units, minutes=args.minutes, seed=args.seed)
    except OSError as error:
        raise ConfigError(
            f"cannot write {args.out} ({error.strerror}); name another file"
        ) from None
    if not args.quiet:
        ideal = ", ".join(f"{name} {score:.3f}" for name, score in summary["ideal"].items())
        print(
            f"{args.out}: {summary['units']} units, {summary['spikes']} spikes, "
            f"{summary['trials']} trials; an ideal observer reaches {ideal} on the last fifth"
        )
    return summary
