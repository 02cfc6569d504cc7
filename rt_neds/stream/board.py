"""What the processes of one ``serve`` share: signs of life, and what was last published.

Plain int64 in memory that forked processes have in common: writing a number is all it costs the
loop, and it outlives whoever wrote it.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rt_neds.clock import monotonic_ns
from rt_neds.frames import DecodedFrame

_ROW = np.dtype(
    [
        (name, "<i8")
        for name in (
            "published_ns",  # when the last frame was written; 0 for never
            "writer",  # who wrote it
            "epoch",
            "bin",
            "handovers",
            "bins_missed",
            "recovery_ns",
            "from_epoch",  # the last frame before the last handover, and the first after
            "from_bin",
            "to_epoch",
            "to_bin",
        )
    ]
)


class Board:
    """Shared by a parent and the processes it forks after making this.

    Parameters
    ----------
    probes : sequence of str
    processes : int
        How many may be alive at once.

    Attributes
    ----------
    beats : ndarray of int64, shape (processes,)
        Host time at which each was last seen alive; 0 while it starts.
    also : dict of str to callable
        What else the status message says, by key, given the probe.
    """

    def __init__(self, probes: Sequence[str], processes: int) -> None:
        self.also: dict[str, Callable[[str], Any]] = {}
        self.beats = shared(processes, np.dtype(np.int64))
        self._restarts = shared(1, np.dtype(np.int64))
        self._rows = dict(zip(probes, shared(len(probes), _ROW), strict=True))

    @property
    def restarts(self) -> int:
        """How many processes were replaced."""
        return int(self._restarts[0])

    def note_restart(self) -> None:
        """A process was replaced."""
        self._restarts[0] += 1

    def note_published(self, probe: str, writer: int, epoch: int, bin_: int) -> None:
        """A frame went out; the first of another writer says how long there was none."""
        row, now = self._rows[probe], monotonic_ns()
        if row["published_ns"] and row["writer"] != writer:
            row["handovers"] += 1
            row["recovery_ns"] = now - row["published_ns"]
            row["from_epoch"], row["from_bin"] = row["epoch"], row["bin"]
            row["to_epoch"], row["to_bin"] = epoch, bin_
            if row["epoch"] == epoch:
                row["bins_missed"] += max(0, bin_ - int(row["bin"]) - 1)
        row["writer"], row["epoch"], row["bin"], row["published_ns"] = writer, epoch, bin_, now

    def last(self, probe: str) -> tuple[int, int] | None:
        """Epoch and bin of the frame that went out last, if any did."""
        row = self._rows[probe]
        return (int(row["epoch"]), int(row["bin"])) if row["published_ns"] else None

    def notes(self, probe: str) -> dict[str, Any]:
        """What the status message says beside what the loop knows."""
        return {
            "supervision": self.status(probe),
            **{key: tell(probe) for key, tell in self.also.items()},
        }

    def status(self, probe: str) -> dict[str, Any]:
        """``supervision`` of the status message.

        Returns
        -------
        dict
            ``restarts``: processes replaced. ``handovers``: how often another process than before
            wrote the next frame. ``bins_missed``: bins of one epoch that nobody published because
            of it. ``recovery_ms``: from the last frame before the last handover to the first
            after; None if there was none. ``handover``: epoch and bin of either, ``from`` and
            ``to``, so that whoever counts bins knows why some are missing; None if there was none.
        """
        row = self._rows[probe]
        return {
            "restarts": self.restarts,
            "handovers": int(row["handovers"]),
            "bins_missed": int(row["bins_missed"]),
            "recovery_ms": row["recovery_ns"] / 1e6 if row["handovers"] else None,
            "handover": {
                end: {"epoch": int(row[f"{end}_epoch"]), "bin": int(row[f"{end}_bin"])}
                for end in ("from", "to")
            }
            if row["handovers"]
            else None,
        }


class Accounted:
    """A sink that puts every frame on the board, and the board into the status.

    Parameters
    ----------
    sink : Publisher
    board : Board
    writer : int
        Who we are; no two processes of a ``serve`` are the same, not even one after the other.
    probe : str
    """

    def __init__(self, sink: Any, board: Board, writer: int, probe: str) -> None:
        self._sink, self._board, self._writer, self._probe = sink, board, writer, probe

    def write(self, frame: DecodedFrame) -> None:
        """Publish one decoded bin."""
        self._sink.write(frame)
        self._board.note_published(self._probe, self._writer, frame.epoch, frame.bin)

    def note(self, kind: str, fields: dict[str, Any]) -> None:
        """Publish a map."""
        if kind == "status":
            fields = {**fields, **self._board.notes(self._probe)}
        self._sink.note(kind, fields)

    def beside(self, probe: str) -> Accounted:
        """The same for another probe."""
        other = copy.copy(self)
        other._sink, other._probe = self._sink.beside(probe), probe
        return other

    def close(self) -> None:
        """Close the sink."""
        self._sink.close()


def shared(count: int, dtype: np.dtype) -> Any:
    """Zeros that processes forked after this have in common."""
    return np.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype)
