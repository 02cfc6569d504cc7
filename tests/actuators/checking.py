"""Devices that answer as theirs do, and a rule that uses them."""

import socket
import socketserver
import threading
import time

import zmq

from rt_neds.devices import Nido, Ttl
from rt_neds.stream.trigger import HANDED
from rt_neds.trigger_config import (
    NidoConfig,
    TriggerConfig,
    TtlConfig,
)

WAIT_S = 20.0


def until(true, seconds=WAIT_S):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class NetworkEvents(threading.Thread):
    """Answers as the plugin does."""

    def __init__(self, port=0):
        super().__init__(daemon=True)
        self.heard, self.at, self.done = [], [], threading.Event()
        self.acquires, self.held_up, self.answer = True, threading.Event(), ""
        self.socket = zmq.Context.instance().socket(zmq.REP)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.address = self.socket.get_string(zmq.LAST_ENDPOINT)
        self.start()

    def run(self):
        while not self.done.is_set():
            if self.socket.poll(20):
                text = self.socket.recv().decode()
                while self.held_up.is_set() and not self.done.is_set():
                    time.sleep(0.005)
                if text == "IsAcquiring":
                    self.socket.send_string(str(int(self.acquires)))
                    continue
                self.heard.append(text)
                self.at.append(time.monotonic())
                words = dict(word.split("=") for word in text.split()[1:])
                answer = f"TTLHandled: Line={words['Line']} State={words['State']}"
                self.socket.send_string(self.answer or answer)
        self.socket.close()

    def close(self):
        self.done.set()
        self.join()


class CommandServer(socketserver.ThreadingTCPServer):
    """Answers as SpikeGLX's command server does: a line in, ``OK`` or ``ERROR ...`` out.

    None for an answer hangs up.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, answer=b"OK\n"):
        self.heard, self.connections, self.answer = [], 0, answer
        self.open = []
        super().__init__(("127.0.0.1", 0), CommandHandler)
        self.address = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def hang_up(self):
        for connection in self.open:
            connection.shutdown(socket.SHUT_RDWR)


class CommandHandler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self):
        self.server.connections += 1
        self.server.open.append(self.connection)
        for line in self.rfile:
            self.server.heard.append(line.decode())
            if self.server.answer is None:
                return
            self.wfile.write(self.server.answer[:1])  # in two pieces, as TCP may
            self.wfile.write(self.server.answer[1:])


def rule(**options):
    return TriggerConfig(when="a > 1", refractory_ms=10_000.0, **options)


def fire(actuators, rule=0, left_s=WAIT_S):
    now = time.monotonic_ns()
    actuators.hand_over(HANDED.pack(rule, now, now + round(left_s * 1e9)))


def ttl(to, pulse_ms=50.0):
    return Ttl(TtlConfig(line=1, to=to, pulse_ms=pulse_ms))


def nido(to, pulse_ms=10.0):
    return Nido(NidoConfig(lines="x", bits=1, to=to, pulse_ms=pulse_ms))
