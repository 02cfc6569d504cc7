"""``rt-neds inspect``: what is in a session file or a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

MOST_LINES = 12
"""Sessions of a bundle that are shown; ``--json`` has all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a session file (.h5) or the folder of a bundle")


def run(args: argparse.Namespace) -> dict[str, Any]:
    path = Path(args.path)
    facts = bundle_facts(path) if path.is_dir() else session_facts(path)
    if not args.quiet:
        for name, value in facts.items():
            first, *rest = _lines(value)
            print(f"{name:<12} {first}")
            for line in rest:
                print(f"{'':<12} {line}")
    return facts


def _lines(value: Any) -> list[str]:
    """A fact as people read it."""
    if isinstance(value, dict):
        lines = [f"{name}: {_in_a_line(of)}" for name, of in value.items()]
        if len(lines) > MOST_LINES:
            lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more (--json - has all)"]
        return lines or ["none"]
    return [_in_a_line(value)]


def _in_a_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_a_line(of)}" for name, of in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def session_facts(path: Path) -> dict[str, Any]:
    """What a person asks of a session file."""
    from rt_neds.session import load_session

    session = load_session(path)
    seconds = np.diff(session.domain_K2, axis=1).sum() / session.rate
    splits = [
        name.removesuffix("_train_domain")
        for name in session.names()
        if name.endswith("_train_domain")
    ]
    return {
        "session": session.id,
        "units": len(session.unit_ids),
        "spikes": len(session.records_S),
        "recorded_s": round(float(seconds), 2),
        "pieces": len(session.domain_K2),
        "mean_hz": round(len(session.records_S) / max(seconds, 1e-9) / len(session.unit_ids), 3),
        "behaviour": session.behaviours(),
        "trials": len(session.intervals("trials")) if session.has("trials") else 0,
        "columns": session.names("trials") if session.has("trials") else [],
        "splits": splits,
    }


def bundle_facts(folder: Path) -> dict[str, Any]:
    """What a person asks of a bundle."""
    from rt_neds.bundle import load_spec

    spec = load_spec(folder)
    return {
        "bundle": spec.name,
        "bin_ms": spec.bin_ms,
        "model": f"{spec.model.layers} layers of {spec.model.dim}, {spec.model.attention}, "
        f"context {spec.model.context} bins",
        "sessions": {session.id: len(session.units) for session in spec.sessions},
        "decodes": {b.name: b.kind for b in spec.behaviours},
        "validation": spec.training.get("val"),
    }
