"""Captures for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rt_neds.capture import CaptureWriter, pack_record


def write_capture(
    folder: Path,
    messages: Iterable[tuple[int, int, Sequence[bytes]]],
    *,
    probe: str = "imec0",
    max_file: int = 1 << 20,
) -> None:
    """A capture of these messages ``(received_ns, stream, frames)``, ended as it should be."""
    writer = CaptureWriter(
        folder, {"probe": probe}, max_file=max_file, max_total=1 << 40, min_free=0
    )
    for message in messages:
        writer.append(pack_record(*message))
    writer.close({"why": "test"})
