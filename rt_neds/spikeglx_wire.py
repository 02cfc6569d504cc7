"""What SpikeGLX's command server says: questions asked, replies read. No sockets here.

One text line is a question; its reply is some lines and then ``OK``, or ``ERROR <text>``. To
``FETCH`` the reply is ``BINARY_DATA <channels> <samples> uint64(<first>)``, the samples as
little-endian int16, channel fastest, and ``OK``. There are no lengths around it all: whoever loses
the thread cannot find it again, so that whatever breaks the format (:class:`Malformed`) must end
the connection.

Shape suffixes: S samples, C channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import numpy as np
from numpy.typing import NDArray

from rt_neds.errors import ConfigError, WireError
from rt_neds.wire import MAX_SAMPLE

DEFAULT_PORT = 4142
IMEC = 2
"""Number of the imec streams; probes of it are counted from 0."""
MISSED = 1 << 11
"""Bit of the status word: the sample was lost before it came, and zeros stand in for it."""
LINK_ERRORS = {"count": 1 << 2, "serdes": 1 << 3, "lock": 1 << 4, "pop": 1 << 5, "sync": 1 << 7}
"""Bits of the status word: errors of the link to the probe."""
MAX_LINE = 4096
MAX_LINES = 1 << 14  # a quad probe's geometry has 6148
MAX_CHANNELS = 4096
MAX_FETCH = 3000
"""Most samples fetched at once, 100 ms."""
KINDS = ("line", "header", "shape", "tail", "excess", "value")

_OK = b"OK\n"
_HEADER = re.compile(rb"BINARY_DATA (\d{1,5}) (\d{1,9}) uint64\((\d{1,19})\)")
_SITE = re.compile(r"ch(\d{1,5})_([sxzu])=(\S{1,32})")


class Malformed(WireError):
    """A reply that breaks the format.

    Attributes
    ----------
    kind : str
        One of ``KINDS``: what was wrong first.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Refused(WireError):
    """The server understood and said ``ERROR``."""


class Fetch(NamedTuple):
    """What is asked of the stream: so many channels, at most so many samples from ``first``."""

    first: int
    channels: int
    most: int


class Question(NamedTuple):
    """A line to send, not before ``after_ns``; ``fetch`` where samples are the answer."""

    command: str
    fetch: Fetch | None = None
    after_ns: int = 0


class Reply(NamedTuple):
    """What came: lines, or samples from sample ``first`` on, or the text of an error."""

    lines: tuple[str, ...] = ()
    error: str = ""
    first: int = 0
    samples_SC: NDArray[np.int16] = np.zeros((0, 0), np.int16)
    received_ns: int = 0


class Probe(NamedTuple):
    """What the server says of a probe.

    Attributes
    ----------
    version, serial : str
        Of SpikeGLX, and of the probe.
    rate : float
        Samples per second.
    ap, lf, status : int
        Channels of the stream, in this order: action potentials, field potentials, status words.
    max_int : int
        The largest count is one less.
    uv_C : tuple of float, one for each AP channel
        Microvolts per count.
    sites_C : tuple of (shank, x, z, used), one for each AP channel
        Where the channel's electrode is, in micrometres; ``used`` 0 for one that records nothing.
    """

    version: str
    serial: str
    rate: float
    ap: int
    lf: int
    status: int
    max_int: int
    uv_C: tuple[float, ...]
    sites_C: tuple[tuple[int, float, float, int], ...]


class ReplyReader:
    """Puts one reply together from the bytes that come, in a buffer as large as one reply may be.

    Whoever receives writes into :meth:`space` and says how much with :meth:`took`.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(4 * MAX_LINE)
        self._begin = self._end = 0
        self.expect(None)

    def expect(self, fetch: Fetch | None) -> None:
        """Begin a reply; ``fetch``: what was asked, where samples are the answer.

        Raises
        ------
        Malformed
            If more came than was asked for.
        """
        if self._begin != self._end:
            raise Malformed("excess", f"{self._end - self._begin} bytes that nothing asked for")
        self._fetch = fetch
        if fetch is not None:
            most = MAX_LINE + 2 * fetch.channels * fetch.most + len(_OK)
            if len(self._buffer) < most:  # another, because samples may still be a view of this one
                self._buffer = bytearray(most)
        self._begin = self._end = self._searched = 0
        self._lines: list[str] = []
        self._head: tuple[int, int, int] | None = None

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._end == len(self._buffer):
            left = self._end - self._begin
            self._buffer[:left] = self._buffer[self._begin : self._end]
            self._searched -= self._begin
            self._begin, self._end = 0, left
        return memoryview(self._buffer)[self._end :]

    def took(self, size: int) -> Reply | None:
        """Take in that so many bytes came; the reply, once it is whole.

        Its samples are a view of the buffer that the next reply overwrites.

        Raises
        ------
        Malformed
        """
        self._end += size
        while True:
            if self._head is not None:
                return self._samples(*self._head)
            line = self._line()
            if line is None:
                return None
            if line.startswith(b"ERROR"):
                return self._finish(Reply(error=line[5:].decode(errors="replace").strip() or "?"))
            if self._fetch is not None:
                self._head = _parse_header(line, self._fetch)
            elif line == b"OK":
                return self._finish(Reply(tuple(self._lines)))
            elif len(self._lines) == MAX_LINES:
                raise Malformed("line", f"more than {MAX_LINES} lines")
            else:
                self._lines.append(_ascii(line))

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\n", self._searched, self._end)
        if (self._end if end < 0 else end) - self._begin > MAX_LINE:
            raise Malformed("line", f"a line of more than {MAX_LINE} bytes")
        if end < 0:
            self._searched = self._end
            return None
        line = bytes(self._buffer[self._begin : end])
        self._begin = self._searched = end + 1
        return line

    def _samples(self, channels: int, samples: int, first: int) -> Reply | None:
        behind = self._begin + 2 * channels * samples
        tail = bytes(self._buffer[behind : min(self._end, behind + len(_OK))])
        if not _OK.startswith(tail):
            raise Malformed("tail", f"{tail!r} behind the samples")
        if len(tail) < len(_OK):
            return None
        count = channels * samples
        values = np.frombuffer(self._buffer, "<i2", count, self._begin)
        self._begin = behind + len(_OK)
        return self._finish(Reply(first=first, samples_SC=values.reshape(samples, channels)))

    def _finish(self, reply: Reply) -> Reply:
        if self._begin != self._end:
            raise Malformed("excess", f"{self._end - self._begin} bytes behind the reply")
        return reply


def _parse_header(line: bytes, asked: Fetch) -> tuple[int, int, int]:
    match = _HEADER.fullmatch(line)
    if match is None:
        raise Malformed("header", f"{line[:60]!r} where BINARY_DATA was expected")
    channels, samples, first = map(int, match.groups())
    # SpikeGLX leaves channels out only of samples that there are: without any it counts them all.
    if (samples and channels != asked.channels) or samples > asked.most:
        raise Malformed("shape", f"{channels} channels, {samples} samples; asked were {asked}")
    if not asked.first <= first < MAX_SAMPLE:
        raise Malformed("shape", f"samples from {first}; asked were those from {asked.first}")
    return channels, samples, first


def _ascii(line: bytes) -> str:
    try:
        return line.decode("ascii")
    except UnicodeDecodeError:
        raise Malformed("line", f"a line that is no text: {line[:40]!r}") from None


# -- questions -----------------------------------------------------------------------------------

Answer = Generator[Question, Reply, "Probe"]


def introduce(probe: int) -> Answer:
    """Ask the server about one of its probes.

    Yields
    ------
    Question
        To be sent, one at a time; its reply is to be sent back in.

    Returns
    -------
    Probe

    Raises
    ------
    Malformed, Refused
    """
    stream = f"{IMEC} {probe}"
    version = yield from one_line("GETVERSION")
    rate = number((yield from one_line(f"GETSTREAMSAMPLERATE {stream}")), 1e2, 1e7)
    counts = (yield from one_line(f"GETSTREAMACQCHANS {stream}")).split()
    if len(counts) != 3:
        raise Malformed("value", f"channels {counts}; three counts were expected")
    ap, lf, status = (int(number(count, 0, MAX_CHANNELS)) for count in counts)
    if not ap or not 1 <= status <= 8:
        raise Malformed("value", f"{ap} AP and {status} status channels")
    max_int = int(number((yield from one_line(f"GETSTREAMMAXINT {stream}")), 1, 1 << 15))
    serial = (yield from one_line(f"GETSTREAMSN {stream}")).partition(" ")[0]
    uv_C = []
    for channel in range(ap):
        text = yield from one_line(f"GETSTREAMI16TOVOLTS {stream} {channel}")
        uv_C.append(1e6 * number(text, 1e-12, 1.0))
    sites_C = _sites((yield from _lines(f"GETGEOMMAP {probe}")), ap)
    return Probe(version, serial, rate, ap, lf, status, max_int, tuple(uv_C), sites_C)


def channel_list(probe: Probe) -> str:
    """The AP and status channels of a probe, as ``FETCH`` wants them named."""
    every = probe.ap + probe.lf + probe.status
    # A list of channels is read as a set: they come in ascending order.
    listed = [*range(probe.ap), *range(probe.ap + probe.lf, every)]
    return "".join(f"{channel}#" for channel in listed) if probe.lf else "-1#"


def fetch(stream: int, probe: Probe, channels: str, first: int, after_ns: int = 0) -> Question:
    """Ask for all that is there from a sample on; ``channels`` as :func:`channel_list` gives."""
    command = f"FETCH {IMEC} {stream} {first} {MAX_FETCH} {channels} 1"
    return Question(command, Fetch(first, probe.ap + probe.status, MAX_FETCH), after_ns)


def sample_count(stream: int, after_ns: int = 0) -> Generator[Question, Reply, int]:
    """Ask how many samples of a probe there have been since its run began; 0: there is no run."""
    text = yield from one_line(f"GETSTREAMSAMPLECOUNT {IMEC} {stream}", after_ns)
    return int(number(text, 0, MAX_SAMPLE - 1))


def one_line(command: str, after_ns: int = 0) -> Generator[Question, Reply, str]:
    """Ask what is answered by one line."""
    lines = yield from _lines(command, after_ns)
    if len(lines) != 1:
        raise Malformed("value", f"{len(lines)} lines to {command}; one was expected")
    return lines[0]


def _lines(command: str, after_ns: int = 0) -> Generator[Question, Reply, tuple[str, ...]]:
    reply = yield Question(command, after_ns=after_ns)
    if reply.error:
        raise Refused(reply.error)
    return reply.lines


def number(text: str, low: float, high: float) -> float:
    """Read a number between two bounds, which it may equal.

    Raises
    ------
    Malformed
    """
    try:
        value = float(text) if len(text) <= 32 else math.nan
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise Malformed("value", f"{text[:40]!r}; a number from {low:g} to {high:g} was expected")
    return value


def _sites(lines: tuple[str, ...], ap: int) -> tuple[tuple[int, float, float, int], ...]:
    found: dict[tuple[int, str], float] = {}
    for line in lines:
        match = _SITE.fullmatch(line)
        if match is not None:
            found[int(match[1]), match[2]] = number(match[3], -1e6, 1e6)
    try:
        return tuple(
            (int(found[c, "s"]), found[c, "x"], found[c, "z"], int(found[c, "u"]))
            for c in range(ap)
        )
    except KeyError as error:
        raise Malformed("value", f"the geometry lacks {error.args[0]}") from None


# -- names ---------------------------------------------------------------------------------------


class Address(NamedTuple):
    """Where a probe is: a server, and the number of the probe in its run."""

    host: str
    port: int
    probe: int


def is_spikeglx(url: str) -> bool:
    """Whether a source URL names a SpikeGLX server."""
    return urlsplit(url).scheme == "spikeglx"


def parse_spikeglx_url(url: str) -> Address:
    """Read ``spikeglx://HOST[:4142][?probe=0]``.

    Raises
    ------
    ConfigError
    """
    parts = urlsplit(url)
    query = parse_qs(parts.query, keep_blank_values=True)
    probe = query.get("probe", ["0"])[0]
    try:
        port = parts.port or DEFAULT_PORT
    except ValueError:
        port = 0
    odd = parts.path.strip("/") or set(query) - {"probe"} or not re.fullmatch(r"\d{1,3}", probe)
    if not port or not parts.hostname or parts.scheme != "spikeglx" or odd:
        raise ConfigError(
            f"source {url}; expected spikeglx://HOST:{DEFAULT_PORT}, with ?probe=N for the probe "
            "that SpikeGLX calls imecN"
        )
    return Address(parts.hostname, port, int(probe))
