"""A capture: what came over the sockets, byte for byte, in files that a crash cannot spoil.

A folder of files ``000000.capture``, ``000001.capture``, ...: each begins with ``MAGIC`` and a note
that says whose it is, then has record after record. A record is its length, its CRC, and a body:
when it came, from which stream, and the frames of the message. ``docs/recording.md`` says it for
those who read captures without us.
"""

from __future__ import annotations

import os
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import msgpack

from rt_neds.clock import monotonic_ns
from rt_neds.errors import ConfigError, DeviceError, RtNedsError, WireError
from rt_neds.wire import MAX_HEADER_BYTES, unpack_map

VERSION = 1
MAGIC = b"RTNEDS\x00\x01"
SUFFIX = ".capture"
MAX_RECORD_BYTES = 16 * 1024 * 1024
MAX_FRAMES = 1024
END_BYTES = 1024
"""Room kept under the limit of the whole for the note that ends a capture."""
BUFFER_BYTES = 1024 * 1024

_HEAD = struct.Struct("<II")  # length of the body; CRC-32 of that length and the body
_BODY = struct.Struct("<qHH")  # received_ns, stream, number of frames; then u4 size of each


class CaptureError(RtNedsError):
    """A folder that is no capture, or one whose very beginning cannot be read."""


class Stream(IntEnum):
    """Where a message came from; notes are the recorder's own."""

    NOTE = 0
    SPIKES = 1
    DECODED = 2


@dataclass(frozen=True, slots=True)
class Message:
    """One message as it came.

    Attributes
    ----------
    received_ns : int
        Host monotonic time at which it was read from the socket.
    stream : int
        A :class:`Stream`.
    frames : tuple of bytes
    """

    received_ns: int
    stream: int
    frames: tuple[bytes, ...]


class Damage(Exception):
    """A record that is not what was written; the capture is good up to there."""


def pack_record(received_ns: int, stream: int, frames: Sequence[bytes]) -> bytes:
    """Bytes of one record.

    Raises
    ------
    WireError
        Too many frames or bytes for a record: no message of the protocol has so many.
    """
    size = _BODY.size + sum(4 + len(frame) for frame in frames)
    if not 1 <= len(frames) <= MAX_FRAMES or size > MAX_RECORD_BYTES:
        raise WireError(
            f"a message of {len(frames)} frames and {size} bytes; 1 to {MAX_FRAMES} and at most "
            f"{MAX_RECORD_BYTES} bytes are recorded"
        )
    sizes = struct.pack(f"<{len(frames)}I", *map(len, frames))
    body = b"".join([_BODY.pack(received_ns, stream, len(frames)), sizes, *frames])
    length = struct.pack("<I", len(body))
    return length + struct.pack("<I", zlib.crc32(body, zlib.crc32(length))) + body


def read_record(file: BinaryIO) -> Message | None:
    """The next record of a file, or None at its end.

    Raises
    ------
    Damage
        If it is cut short or not what was written.
    """
    head = file.read(_HEAD.size)
    if not head:
        return None
    if len(head) < _HEAD.size:
        raise Damage("cut short")
    length, crc = _HEAD.unpack(head)
    if not _BODY.size <= length <= MAX_RECORD_BYTES:
        raise Damage(f"a length of {length} bytes")
    body = file.read(length)
    if len(body) < length:
        raise Damage("cut short")
    if zlib.crc32(body, zlib.crc32(head[:4])) != crc:
        raise Damage("a wrong checksum")
    received_ns, stream, n = _BODY.unpack_from(body)
    at = _BODY.size + 4 * n
    if not n or at > length:
        raise Damage(f"{n} frames in {length} bytes")
    sizes = struct.unpack_from(f"<{n}I", body, _BODY.size)
    if at + sum(sizes) != length:
        raise Damage(f"frames of {sum(sizes)} bytes in a body of {length}")
    frames = []
    for size in sizes:
        frames.append(body[at : at + size])
        at += size
    return Message(received_ns, stream, tuple(frames))


def _note(kind: str, fields: dict[str, Any]) -> bytes:
    return pack_record(monotonic_ns(), Stream.NOTE, [kind.encode(), msgpack.packb(fields)])


# -- writing -------------------------------------------------------------------------------------


class CaptureWriter:
    """Appends records to a new capture; never changes or deletes what was written.

    Parameters
    ----------
    folder : Path
        Made if it is not there; it must not hold a capture.
    about : dict
        Who records what; the note at the beginning of every file has it.
    max_file, max_total : int
        Bytes of a file (a longer record has one of its own) and of all of them.
    min_free : int
        Bytes to leave free on the disk.

    Attributes
    ----------
    records, bytes, files : int
        Appended so far.

    Raises
    ------
    ConfigError
        The folder holds a capture already or cannot be made.
    DeviceError
        The disk is full or failed, there as in every method.
    """

    def __init__(
        self, folder: Path, about: dict[str, Any], *, max_file: int, max_total: int, min_free: int
    ) -> None:
        self.records = self.bytes = self.files = 0
        self._folder, self._max_file = folder, max_file
        self._max_total, self._min_free = max_total, min_free
        self._about = {
            "v": VERSION,
            "capture": uuid.uuid4().hex,
            "started_ns": monotonic_ns(),
            "started_unix_ns": time.time_ns(),
            **about,
        }
        self._pending = bytearray()
        self._file: BinaryIO | None = None
        self._in_file = 0
        self._failed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken = any(folder.glob("*" + SUFFIX))
        except OSError as error:
            raise ConfigError(
                f"cannot make {folder} ({error.strerror}); name another folder"
            ) from None
        if taken:
            raise ConfigError(f"{folder} holds a capture already; name another folder")
        self._check_free()
        self._open_next()

    def append(self, record: bytes) -> None:
        """Take one record; :meth:`sync` puts it on the disk."""
        if self.bytes + len(record) + END_BYTES > self._max_total:
            raise DeviceError(
                f"{self._folder} holds {self.bytes / 1e9:.3g} GB, the most it may; recording "
                "stopped and nothing was deleted: record into another folder, or raise "
                "--max-total-gb"
            )
        if self._in_file and self._in_file + len(record) > self._max_file:
            self.sync()
            self._open_next()
        self._pending += record
        self._in_file += len(record)
        self.bytes += len(record)
        self.records += 1
        if len(self._pending) >= BUFFER_BYTES:
            self._write_out()

    def sync(self) -> None:
        """Put all of it on the disk, so that not even a power cut takes it; see if there is room.

        Raises
        ------
        DeviceError
            Less than ``min_free`` is left, too.
        """
        assert self._file is not None
        self._write_out()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from None
        self._check_free()

    def close(self, fields: dict[str, Any]) -> None:
        """End the capture with a note that has these fields, unless the disk has failed."""
        if self._file is None:
            return
        try:
            if not self._failed:
                self._pending += _note("end", fields)
                self._write_out()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from None
        finally:
            self._file.close()
            self._file = None

    def _write_out(self) -> None:
        assert self._file is not None
        view, at = memoryview(bytes(self._pending)), 0
        try:
            while at < len(view):
                at += self._file.write(view[at:])
        except OSError as error:
            raise self._failure(error) from None
        self._pending.clear()

    def _open_next(self) -> None:
        name = self._folder / f"{self.files:06d}{SUFFIX}"
        try:
            if self._file is not None:
                self._file.close()
            self._file = open(name, "xb", buffering=0)  # noqa: SIM115 (kept open)
            _sync_folder(self._folder)
        except OSError as error:
            raise self._failure(error) from None
        where = {"file": self.files, "messages": self.records}
        beginning = MAGIC + _note("file", {**self._about, **where})
        self._pending += beginning
        self.bytes += len(beginning)
        self.files += 1
        self._in_file = 0
        self._write_out()

    def _check_free(self) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < self._min_free:
            raise DeviceError(
                f"{free / 1e9:.3g} GB are free where {self._folder} is, and "
                f"{self._min_free / 1e9:.3g} are to stay so; recording stopped: free some, record "
                "elsewhere, or lower --min-free-gb"
            )

    def _failure(self, error: OSError) -> DeviceError:
        self._failed = True
        return DeviceError(
            f"cannot write to {self._folder} ({error.strerror or error}); recording stopped, what "
            "was written stays readable: free the disk or record elsewhere"
        )


def _sync_folder(folder: Path) -> None:
    """Make a new file's name survive a power cut; Windows does so by itself."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading -------------------------------------------------------------------------------------


class Capture:
    """Reads a capture from its beginning to its end, or to where it is damaged.

    Parameters
    ----------
    folder : Path

    Attributes
    ----------
    about : dict
        What the recorder said of itself: ``probe``, ``source``, ``decoded``, ``started_ns``,
        ``started_unix_ns``.
    messages : int
        Read so far.
    ended : dict or None
        The note that ends a capture, once read; a recorder that was killed leaves none.
    damage : str
        Why reading stopped early; empty if it did not.
    unread_bytes : int
        What was not read because of it.

    Raises
    ------
    CaptureError
        If the folder is no capture.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        first = self.folder / f"{0:06d}{SUFFIX}"
        try:
            with open(first, "rb") as file:
                self.about = _beginning(file)
        except OSError as error:
            raise CaptureError(
                f"{folder} is no capture ({first.name}: {error.strerror}); expected a folder that "
                "rt-neds record wrote"
            ) from None
        except Damage as damage:
            raise CaptureError(
                f"{first} does not begin as a capture does ({damage}); nothing of it can be read"
            ) from None
        self._begin()

    def _begin(self) -> None:
        self.messages = self.unread_bytes = 0
        self.ended: dict[str, Any] | None = None
        self.damage = ""

    def __iter__(self) -> Iterator[Message]:
        """Every message in the order in which it was read from its socket."""
        self._begin()
        files = sorted(self.folder.glob("*" + SUFFIX))
        for number, path in enumerate(files):
            at = 0
            try:
                if path.name != f"{number:06d}{SUFFIX}":
                    raise Damage(f"file {number:06d}{SUFFIX} is missing")
                with open(path, "rb") as file:
                    self._check_beginning(_beginning(file), number)
                    at = file.tell()
                    while (message := read_record(file)) is not None:
                        at = file.tell()
                        if message.stream == Stream.NOTE:
                            self._take_note(message)
                            continue
                        self.messages += 1
                        yield message
            except (Damage, OSError) as error:
                self.damage = f"{path.name} at byte {at}: {error}"
                self.unread_bytes = sum(_size(file) for file in files[number:]) - at
                return

    def _check_beginning(self, about: dict[str, Any], number: int) -> None:
        if about["capture"] != self.about["capture"] or about.get("file") != number:
            raise Damage("it is not what follows")
        if about.get("messages") != self.messages:
            raise Damage(f"it follows {about.get('messages')} messages, not {self.messages}")

    def _take_note(self, message: Message) -> None:
        if len(message.frames) == 2 and message.frames[0] == b"end":
            self.ended = _fields(message)


def _beginning(file: BinaryIO) -> dict[str, Any]:
    if file.read(len(MAGIC)) != MAGIC:
        raise Damage("other first bytes")
    message = read_record(file)
    if message is None or message.stream != Stream.NOTE or message.frames[:1] != (b"file",):
        raise Damage("no note of whose it is")
    about = _fields(message)
    if about.get("v") != VERSION:
        raise Damage(f"format {about.get('v')}; {VERSION} was expected")
    texts = (about.get(key) for key in ("capture", "probe"))
    times = (about.get(key) for key in ("started_ns", "started_unix_ns"))
    if not all(isinstance(text, str) for text in texts):
        raise Damage("no name of capture or probe")
    if not all(type(time) is int and 0 <= time < 1 << 62 for time in times):
        raise Damage("no time")
    return about


def _fields(message: Message) -> dict[str, Any]:
    try:
        return unpack_map(message.frames[-1], MAX_HEADER_BYTES)
    except WireError as error:
        raise Damage(str(error)) from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
