"""What a trigger can do: TTL lines of Open Ephys, digital outputs of SpikeGLX, LSL markers.

Each device waits for its answer, in a thread of its own (:mod:`rt_neds.actuators`).
"""

from __future__ import annotations

import select
import socket
import threading
from typing import Any, Protocol

import zmq

from rt_neds.clock import monotonic_ns
from rt_neds.trigger_config import NidoConfig, TtlConfig

ANSWER_S = 0.2
SILENT = "does not answer: is Network Events in the signal chain, and the GUI not held up?"


class NoAnswerError(Exception):
    """The other side is not there, or refuses; the message is for a person."""


class UnansweredError(NoAnswerError):
    """It was asked and did not answer: it may have done it, and may do it yet."""


class TooLateError(Exception):
    """It could be reached only when it was too late; nothing was sent."""


class Device(Protocol):
    """One thing that can be done.

    Attributes
    ----------
    pulse_s : float
        After so long ``off`` follows; 0 for never.
    """

    pulse_s: float

    def on(self, until_ns: int) -> None:
        """Do it, or TooLateError after ``until_ns``; NoAnswerError within ``ANSWER_S`` or two."""

    def off(self) -> None:
        """Undo it."""

    def keep(self) -> None:
        """Called every few seconds while nothing is to be done."""

    def close(self) -> None:
        """Let go."""


class Ttl:
    """A TTL line of Open Ephys: text to its Network Events plugin, which answers each.

    The plugin answers ``TTLHandled`` even if nothing is acquired, and then does nothing. So it is
    asked whether something is, before the first pulse and now and then.
    """

    def __init__(self, config: TtlConfig) -> None:
        self.pulse_s = config.pulse_ms / 1000
        self._to, self._line = config.to, config.line
        self._socket: zmq.Socket | None = None
        self._acquires = False

    def on(self, until_ns: int) -> None:
        if not self._acquires:
            self._look(until_ns)
        if not self._acquires:
            raise NoAnswerError(f"{self._to} does not acquire: it would do nothing")
        self._set(1, until_ns)

    def off(self) -> None:
        self._set(0)
        self._look()

    def keep(self) -> None:
        """What was to be put low while nothing was acquired is put low now."""
        before = self._acquires
        self._look()
        if self._acquires and not before:
            self._set(0)

    def close(self) -> None:
        self._acquires = False  # who is reached anew is asked anew
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _look(self, until_ns: int | None = None) -> None:
        self._acquires = self._ask("IsAcquiring", until_ns) == "1"

    def _set(self, state: int, until_ns: int | None = None) -> None:
        answer = self._ask(f"TTL Line={self._line} State={state}", until_ns)
        expected = f"TTLHandled: Line={self._line} State={state}"
        if answer != expected:  # an older plugin names other keys, and takes line 1 and off instead
            raise NoAnswerError(
                f"{self._to} answers {answer[:60]!r}; {expected!r} was expected: Network Events "
                "0.2.1 or newer is needed"
            )

    def _ask(self, text: str, until_ns: int | None) -> str:
        try:
            if self._socket is None:
                self._socket = zmq.Context.instance().socket(zmq.REQ)
                self._socket.set(zmq.LINGER, 0)
                self._socket.set(zmq.IMMEDIATE, 1)  # nothing waits in a queue for who is not there
                self._socket.connect(self._to)
            if not self._socket.poll(round(ANSWER_S * 1000), zmq.POLLOUT):
                raise NoAnswerError(f"{self._to} {SILENT}")
            if until_ns is not None and monotonic_ns() > until_ns:
                raise TooLateError
            self._socket.send(text.encode(), zmq.NOBLOCK)
            if not self._socket.poll(round(ANSWER_S * 1000)):
                raise UnansweredError(f"{self._to} {SILENT}")
            return self._socket.recv().decode(errors="replace")
        except zmq.ZMQError as error:
            raise NoAnswerError(f"{self._to}: {error}") from None


class Nido:
    """Digital lines of an NI device: one line of text to SpikeGLX, which answers ``OK``."""

    def __init__(self, config: NidoConfig) -> None:
        self.pulse_s = config.pulse_ms / 1000
        host, _, port = config.to.rpartition(":")
        self._to, self._address = config.to, (host.strip("[]"), int(port))
        self._lines, self._bits = config.lines, config.bits
        self._socket: socket.socket | None = None

    def on(self, until_ns: int) -> None:
        self._ask(f"NIDOSET {self._lines} {self._bits}", until_ns)

    def off(self) -> None:
        self._ask(f"NIDOSET {self._lines} 0")

    def keep(self) -> None:
        """SpikeGLX closes a connection that says nothing for ten seconds."""
        self._ask("NOOP")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connected(self) -> socket.socket:
        """The connection; a new one where SpikeGLX has closed it, before anything is sent."""
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            self.close()  # nothing was asked, so all there can be is its end
        if self._socket is None:
            self._socket = socket.create_connection(self._address, ANSWER_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket

    def _ask(self, command: str, until_ns: int | None = None) -> None:
        sent = False
        try:
            connection = self._connected()
            if until_ns is not None and monotonic_ns() > until_ns:
                raise TooLateError
            sent = True
            connection.sendall(command.encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n") and len(answer) < 1024:
                came = connection.recv(1024)
                if not came:
                    raise UnansweredError(f"SpikeGLX at {self._to} closed the connection")
                answer += came
        except OSError as error:
            raise (UnansweredError if sent else NoAnswerError)(
                f"SpikeGLX at {self._to} does not answer ({error}): is its command server on?"
            ) from None
        if answer.strip() != b"OK":
            words = answer.decode(errors="replace").strip()
            raise NoAnswerError(f"SpikeGLX at {self._to} answers {words[:80]!r} to {command}")


class MarkerStream:
    """The LSL marker stream of a probe, for all its rules; open from the first use on."""

    def __init__(self, probe: str) -> None:
        self._name = f"rt-neds-{probe}"
        self._outlet: Any = None
        self._making = threading.Lock()

    def outlet(self) -> Any:
        """The stream; NoAnswerError if LSL cannot be used."""
        with self._making:
            if self._outlet is None:
                try:
                    import pylsl

                    # A source id that is always the same: who listens finds it again.
                    about = (1, pylsl.IRREGULAR_RATE, pylsl.cf_string, self._name)
                    info = pylsl.StreamInfo(self._name, "Markers", *about)
                    self._outlet = pylsl.StreamOutlet(info)
                except (ImportError, RuntimeError) as error:
                    raise NoAnswerError(f"LSL cannot be used: {error}") from None
            return self._outlet


class Marker:
    """A text in the LSL marker stream of a probe."""

    pulse_s = 0.0

    def __init__(self, stream: MarkerStream, text: str) -> None:
        self._stream, self._text = stream, text

    def on(self, until_ns: int) -> None:
        outlet = self._stream.outlet()
        if monotonic_ns() > until_ns:
            raise TooLateError
        outlet.push_sample([self._text])

    def off(self) -> None:
        """Open the stream, so that whoever records can find it before the first marker."""
        self._stream.outlet()

    def keep(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do: the stream is there as long as the process."""
