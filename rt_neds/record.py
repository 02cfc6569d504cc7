"""``rt-neds record``: write down what came and what went, byte for byte.

One thread listens and stamps, another writes, so that a slow disk spoils no stamp.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rt_neds.capture import CaptureWriter, Stream, pack_record
from rt_neds.errors import ConfigError, WireError
from rt_neds.result import tell
from rt_neds.stopping import asked_to_stop
from rt_neds.wire import DEFAULT_DECODED, DEFAULT_SPIKES

FLUSH_S = 1.0
WAITING_BYTES = 64 * 1024 * 1024
"""What may wait for the disk; beyond it messages wait in the sockets, and then are lost."""
QUIET_S = 0.25
"""Told to stop, it goes on until nothing has come for so long: messages may be on their way."""
LAST_S = 1.0
"""A stream that does not fall silent is no longer taken after so long (and ``QUIET_S``)."""
STREAMS = (Stream.SPIKES, Stream.DECODED)


class Disk(threading.Thread):
    """Takes records from the listening thread to the disk, once a second.

    Parameters
    ----------
    writer : CaptureWriter

    Attributes
    ----------
    failure : BaseException or None
        Why nothing is written any more.
    """

    def __init__(self, writer: CaptureWriter) -> None:
        super().__init__(name="disk", daemon=True)
        self.failure: BaseException | None = None
        self._writer = writer
        self._changed = threading.Condition()
        self._records: list[bytes] = []
        self._bytes = 0
        self._ending = False

    def put(self, record: bytes) -> None:
        """Hand over a record; waits while too much waits for the disk.

        Raises
        ------
        DeviceError
            Whatever the disk said of an earlier one.
        """
        with self._changed:
            while self._bytes >= WAITING_BYTES and self.failure is None:
                self._changed.wait(FLUSH_S)
            if self.failure is not None:
                raise self.failure
            self._records.append(record)
            self._bytes += len(record)
            if self._bytes >= WAITING_BYTES // 4:
                self._changed.notify_all()

    def finish(self) -> None:
        """Wait until all is written, or cannot be."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self.join()

    def run(self) -> None:
        try:
            while self._write_some():
                pass
        except BaseException as error:  # the listening thread raises it
            self.failure = error
        with self._changed:
            self._changed.notify_all()

    def _write_some(self) -> bool:
        with self._changed:
            self._changed.wait_for(
                lambda: self._ending or self._bytes >= WAITING_BYTES // 4, timeout=FLUSH_S
            )
            records, self._records, self._bytes = self._records, [], 0
            ending = self._ending
            self._changed.notify_all()
        for record in records:
            self._writer.append(record)
        self._writer.sync()
        return not ending


def record(
    probe: str,
    folder: Path,
    *,
    source: str = DEFAULT_SPIKES,
    decoded: str = DEFAULT_DECODED,
    max_file: int,
    max_total: int,
    min_free: int,
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Record both streams until told to stop.

    Parameters
    ----------
    probe : str
        Whose streams they are; everything on the sockets is recorded, whatever its topic.
    folder : Path
        To be made; see :class:`CaptureWriter` for the limits, in bytes.
    source, decoded : str
        Addresses of the spike stream and of the decoded stream.
    stop : callable
        Asked between messages.
    say : callable
        Takes a line for a person.

    Returns
    -------
    dict
        ``folder``, ``probe``, ``spikes`` and ``decoded`` (messages), ``oversized`` (messages too
        large to be any of ours, not recorded), ``bytes``, ``files``, ``seconds``.

    Raises
    ------
    ConfigError, StreamError
    DeviceError
        The disk or a limit ended it; what was recorded until then is kept.
    """
    from rt_neds.stream.raw import RawListener

    listener = RawListener((source, decoded))
    try:
        about = {"probe": probe, "source": source, "decoded": decoded}
        writer = CaptureWriter(
            folder, about, max_file=max_file, max_total=max_total, min_free=min_free
        )
        disk = Disk(writer)
        disk.start()
        counts = {"spikes": 0, "decoded": 0, "oversized": 0}
        started = time.monotonic()
        say(f"recording {source} and {decoded} into {folder}")
        why = "failed"
        try:
            _listen(listener, disk, counts, stop)
            disk.finish()
            if disk.failure is not None:
                raise disk.failure
            why = "stopped"
        finally:
            disk.finish()
            writer.close({"why": why, "messages": writer.records, **counts})
    finally:
        listener.close()
    seconds = round(time.monotonic() - started, 3)
    sizes = {"bytes": writer.bytes, "files": writer.files, "seconds": seconds}
    return {"folder": str(folder), "probe": probe, **counts, **sizes}


def _listen(listener: Any, disk: Disk, counts: dict[str, int], stop: Callable[[], bool]) -> None:
    deadline = None
    while True:
        if deadline is None and stop():
            deadline = time.monotonic() + LAST_S
        heard = False
        wait_s = 0.1 if deadline is None else QUIET_S
        for which, received_ns, frames in listener.read(round(wait_s * 1000)):
            heard = True
            stream = STREAMS[which]
            try:
                packed = pack_record(received_ns, stream, frames)
            except WireError:
                counts["oversized"] += 1
                continue
            disk.put(packed)
            counts[stream.name.lower()] += 1
        if disk.failure is not None:
            raise disk.failure
        if deadline is not None and (not heard or time.monotonic() > deadline):
            return


# -- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--probe", required=True, help="name of the probe, such as imec0")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the capture")
    parser.add_argument(
        "--source", default=DEFAULT_SPIKES, metavar="URL", help=f"spikes ({DEFAULT_SPIKES})"
    )
    parser.add_argument(
        "--decoded",
        default=DEFAULT_DECODED,
        metavar="URL",
        help=f"what serve publishes ({DEFAULT_DECODED})",
    )
    parser.add_argument("--seconds", type=float, default=None, help="stop after so long")
    parser.add_argument(
        "--max-file-mb", type=float, default=256.0, metavar="MB", help="size of a file (256)"
    )
    parser.add_argument(
        "--max-total-gb",
        type=float,
        default=64.0,
        metavar="GB",
        help="stop at this size, with exit code 1; nothing is ever deleted (64)",
    )
    parser.add_argument(
        "--min-free-gb",
        type=float,
        default=2.0,
        metavar="GB",
        help="stop before the disk has less, with exit code 1 (2)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    limits = (args.max_file_mb * 1e6, args.max_total_gb * 1e9, args.min_free_gb * 1e9)
    if not (1 <= limits[0] <= limits[1] < 1e18 and 0 <= limits[2] < 1e18):
        raise ConfigError(
            f"max-file-mb {args.max_file_mb:g}, max-total-gb {args.max_total_gb:g}, min-free-gb "
            f"{args.min_free_gb:g}; 0 < max-file <= max-total and min-free >= 0 were expected"
        )
    if args.seconds is not None and args.seconds <= 0:
        raise ConfigError(f"seconds {args.seconds:g}; more than 0 was expected")
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    stop = asked_to_stop()
    say = (lambda line: None) if args.quiet else tell
    summary = record(
        args.probe,
        Path(args.out),
        source=args.source,
        decoded=args.decoded,
        max_file=round(limits[0]),
        max_total=round(limits[1]),
        min_free=round(limits[2]),
        stop=lambda: stop() or (deadline is not None and time.monotonic() > deadline),
        say=say,
    )
    say(
        f"{summary['spikes']} messages of the spike stream and {summary['decoded']} decoded, "
        f"{summary['bytes'] / 1e6:.3g} MB in {summary['files']} "
        f"file{'s' * (summary['files'] != 1)}, {summary['seconds']} s"
    )
    for name, endpoint in (("spikes", args.source), ("decoded", args.decoded)):
        if not summary[name]:
            say(f"nothing came from {endpoint}: was anything running there?")
    return summary
