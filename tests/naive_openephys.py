"""Open Ephys' plugins, written from their description alone: nothing of ours is used here."""

import json
import struct
import time

import numpy as np
import zmq


def spike(number, electrode, sample, *, stream="ProbeA", sorted_id=0, channels=1, samples=40):
    head = {
        "message_num": number,
        "type": "spike",
        "spike": {
            "stream": stream,
            "source_node": 104,
            "electrode": electrode,
            "sample_num": sample,
            "num_channels": channels,
            "num_samples": samples,
            "sorted_id": sorted_id,
            "threshold": [-60.5] * channels,
        },
        "timestamp": int(time.time() * 1000),
    }
    wave = np.linspace(-80, 20, channels * samples, dtype="<f4").tobytes()
    return [b"EVENT\x00", json.dumps(head, indent=2).encode(), wave]


def ttl(number, line, state, sample, *, stream="ProbeA", word=0):
    head = {
        "message_num": number,
        "type": "event",
        "content": {"stream": stream, "source_node": 100, "type": 3, "sample_num": sample},
        "data_size": 10,
        "timestamp": int(time.time() * 1000),
    }
    return [
        b"EVENT\x00",
        json.dumps(head, indent=2).encode(),
        struct.pack("<BBQ", line, state, word),
    ]


def data(number, channel, first, samples, *, stream="ProbeA", rate=30000.0):
    head = {
        "message_num": number,
        "type": "data",
        "content": {
            "stream": stream,
            "channel_num": channel,
            "channel_name": f"AP{channel + 1}",
            "num_samples": samples,
            "sample_num": first,
            "sample_rate": rate,
        },
        "data_size": 4 * samples,
        "timestamp": int(time.time() * 1000),
    }
    return [b"DATA\x00", json.dumps(head, indent=2).encode(), bytes(4 * samples)]


def broadcast_spike(electrode, sample, *, stream="ProbeA", sorted_id=0):
    fields = {
        "event_type": "spike", "stream": stream, "source_node": 104, "electrode": electrode,
        "num_channels": 1, "sample_rate": 30000.0, "sample_number": sample, "sorted_id": sorted_id,
        "amp1": 81.5,
    }  # fmt: skip
    return [struct.pack("<H", 1), json.dumps(fields).encode()]


def broadcast_ttl(line, state, sample, *, stream="ProbeA"):
    fields = {
        "event_type": "ttl", "stream": stream, "source_node": 100, "sample_rate": 30000.0,
        "channel_name": "TTL", "sample_number": sample, "line": line, "state": state,
    }  # fmt: skip
    return [struct.pack("<H", 0), json.dumps(fields).encode()]


def packed_spike(stream_id, electrode_index, sample, *, sorted_id=0):
    base = struct.pack("<BBHHHqd", 4, 1, 104, stream_id, electrode_index, sample, sample / 30000)
    return [
        struct.pack("<H", 1),
        base + struct.pack("<H", sorted_id) + struct.pack("<f", -60.0) + bytes(4 * 40),
    ]


def packed_ttl(stream_id, line, state, sample):
    base = struct.pack("<BBHHHqd", 3, 3, 100, stream_id, 0, sample, sample / 30000)
    return [struct.pack("<H", 0), base + struct.pack("<BBQ", line, state, 1 << line)]


class Plugin:
    """The ZMQ Interface's two sockets; what is sent is up to the test."""

    def __init__(self, port):
        self.context = zmq.Context()
        self.pub, self.rep = self.context.socket(zmq.PUB), self.context.socket(zmq.REP)
        self.pub.bind(f"tcp://127.0.0.1:{port}")
        self.rep.bind(f"tcp://127.0.0.1:{port + 1}")
        self.heard = []

    def send(self, *messages):
        for frames in messages:
            self.pub.send_multipart(frames)

    def answer(self):
        while self.rep.poll(0):
            self.heard.append(json.loads(self.rep.recv()))
            self.rep.send(b"heartbeat received")

    def close(self):
        self.context.destroy(linger=0)
