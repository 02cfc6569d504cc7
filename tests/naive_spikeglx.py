"""SpikeGLX's command server, written from its description alone, and a detector.

What it does wrong is up to the test: ``faults`` maps the number of a FETCH (from 0) to what happens
instead of the answer.
"""

import contextlib
import socket
import struct
import threading

import numpy as np

from rt_neds.errors import DetectorError

MISSED = 0x800


class Threshold:
    """A spike of unit c wherever channel c falls below a threshold; known ``lag`` samples later.

    A function of the samples alone, however they are cut; after a reset the first sample is none.
    """

    def __init__(self, channels, *, rate=30000.0, threshold=-200, lag=20, settle=0):
        self.units = tuple(f"ch{c}" for c in range(channels))
        self.channels, self.rate = channels, rate
        self.threshold, self.lag, self.settle = threshold, lag, settle
        self.resets = []
        self.reset(0)

    def reset(self, first):
        self.resets.append(first)
        self.before = np.full(self.channels, -32768, np.int16)  # below: no crossing
        self.held = []
        self.complete, self.finds_from = first, first + self.settle

    def check_source(self, rate, position=None, uv_per_bit=None):
        if abs(rate - self.rate) > 0.001 * self.rate:
            raise DetectorError(f"the source has {rate:g} samples/s and the detector {self.rate:g}")

    def detect(self, samples, first):
        assert samples.dtype == np.int16
        assert samples.flags.c_contiguous
        assert samples.shape[1] == self.channels
        whole = np.vstack([self.before[None], samples])
        crossed = (whole[1:] < self.threshold) & (whole[:-1] >= self.threshold)
        found = ((first + int(s), int(c)) for s, c in np.argwhere(crossed))
        self.held += [spike for spike in found if spike[0] >= self.finds_from]
        self.before = samples[-1].copy()
        self.complete = max(self.complete, first + len(samples) - self.lag)
        out = np.zeros(
            sum(s < self.complete for s, _ in self.held),
            [("sample", "<i8"), ("unit", "<u4"), ("spare", "<u4")],
        )
        for row, (sample, unit) in enumerate(self.held[: len(out)]):
            out[row] = sample, unit, 0
        del self.held[: len(out)]
        return out, self.complete


def recording(samples, channels, *, seed=0, rate=0.002):
    """Noise with troughs of one sample, and a status word that toggles: (samples, channels + 1)."""
    rng = np.random.default_rng(seed)
    data = rng.normal(0, 20, (samples, channels + 1)).astype(np.int16)
    data[:, :-1][rng.random((samples, channels)) < rate] = -400
    data[:, -1] = 64 * (np.arange(samples) // 15000 % 2)
    return data


class Server:
    """Serves one probe, ``ip`` 0, of a run; samples become available as they are fetched.

    ``steps``: how many samples more are there at each FETCH, cyclically; ``ring``: how many are
    kept; ``running``, ``data`` and ``count`` may be changed by the test at any time.
    """

    def __init__(self, data, *, ap, lf=0, rate=30000.0, steps=(30,), ring=240_000, running=True,
                 port=0):  # fmt: skip
        self.data, self.ap, self.lf, self.rate = data, ap, lf, rate
        self.steps, self.ring, self.running = steps, ring, running
        self.count, self.fetched, self.connections = 0, 0, 0
        self.faults, self.answers = {}, {}
        self.heard = []
        self.listening = socket.socket()
        self.listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listening.bind(("127.0.0.1", port))
        self.listening.listen()
        self.port = self.listening.getsockname()[1]
        self.open, self.closed = [], False
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            self.connections += 1
            self.open.append(connection)
            threading.Thread(target=self.attend, args=(connection,), daemon=True).start()

    def attend(self, connection):
        try:
            with connection, connection.makefile("rb") as lines:
                for line in lines:
                    self.answer(connection, line.decode())
        except (OSError, ValueError):
            pass

    def answer(self, connection, line):
        verb, *args = line.split()
        self.heard.append(verb)
        if verb in self.answers:
            connection.sendall(self.answers[verb])
            return
        if verb == "FETCH":
            self.fetch(connection, *args)
            return
        every = self.ap + self.lf + 1
        geometry = "".join(
            f"ch{c}_s=0\nch{c}_x={27 + 32 * (c % 2)}\nch{c}_z={20 * (c // 2)}\nch{c}_u=1\n"
            for c in range(self.ap)
        )
        said = {
            "NOOP": "",
            "GETVERSION": "SpikeGLX v20250325 api v4.0.2\n",
            "GETSTREAMSAMPLECOUNT": f"{max(1, self.count) if self.running else 0}\n",
            "GETSTREAMSAMPLERATE": f"{self.rate:.6f}\n",
            "GETSTREAMACQCHANS": f"{self.ap} {self.lf} {every - self.ap - self.lf}\n",
            "GETSTREAMMAXINT": "512\n",
            "GETSTREAMSN": "18005116811 0\n",
            "GETSTREAMI16TOVOLTS": "2.34375e-06\n",
            "GETGEOMMAP": "head_partNumber=NP1010\nhead_numShanks=1\n" + geometry,
        }
        connection.sendall((said[verb] + "OK\n").encode())

    def fetch(self, connection, js, ip, first, most, channels="-1#", down="1"):
        number, self.fetched = self.fetched, self.fetched + 1
        first, most = int(first), int(most)
        assert (js, ip, down) == ("2", "0", "1")
        if number in self.faults:
            self.faults[number](self, connection)
            return
        if not self.running:
            connection.sendall(b"ERROR FETCH: Not running or stream not enabled.\n")
            return
        if first < self.count - self.ring:
            connection.sendall(b"ERROR FETCH: Too late.\n")
            return
        step = self.steps[number % len(self.steps)]
        self.count = min(self.count + step, len(self.data))
        head, body = self.reply(first, most, channels)
        connection.sendall(head + body + b"OK\n")

    def reply(self, first, most, channels="-1#"):
        part = self.data[first : min(self.count, first + most)]
        if channels != "-1#" and len(part):  # an empty reply counts all channels
            part = part[:, sorted({int(c) for c in channels.split("#") if c})]
        head = f"BINARY_DATA {part.shape[1]} {len(part)} uint64({first})\n".encode()
        return head, part.astype("<i2").tobytes()

    def close(self):
        self.listening.close()
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


# -- faults --------------------------------------------------------------------------------------


def reset(connection):
    """End a connection the hard way: what was sent may or may not arrive."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise ConnectionResetError  # whoever attends closes it


def says(words):
    return lambda server, connection: connection.sendall(words)


def half_a_reply(server, connection):
    connection.sendall(b"BINARY_DATA %d 30 uint64(9999999)\n" % (server.ap + 1) + bytes(101))
    connection.shutdown(socket.SHUT_RDWR)


def hangs_up(server, connection):
    reset(connection)


def silence(server, connection):
    pass


def nothing_new(first):
    return lambda server, connection: connection.sendall(
        b"BINARY_DATA %d 0 uint64(%d)\nOK\n" % (server.ap + 1, first)
    )
