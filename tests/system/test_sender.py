"""What a replay sent arrives, however far behind its subscriber is when the process ends."""

import itertools
import subprocess
import sys
import time

import msgpack
import zmq

from rt_neds.children import free_port

SEND = """
import sys
import numpy as np
from rt_neds.frames import SPIKE_DTYPE, SpikeBatch
from rt_neds.stream.sender import Sender

sender = Sender(sys.argv[1], "p", lossless=True)
assert sender.wait_for_subscriber(60)
records = np.zeros(50, SPIKE_DTYPE)
for seq in range({messages}):
    at = dict(seq=seq, first=600 * seq, end=600 * (seq + 1))
    stamps = dict(sent_ns=1, received_ns=0)
    sender.send(SpikeBatch(epoch=1, rate=3e4, records_S=records, **at, **stamps))
sender.close()
"""


def test_the_tail_of_a_fast_replay_arrives_at_a_slow_subscriber():
    endpoint, messages = f"tcp://127.0.0.1:{free_port()}", 45_000
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.set(zmq.RCVHWM, 1000)
    socket.set(zmq.SUBSCRIBE, b"spikes/")
    socket.connect(endpoint)
    child = subprocess.Popen([sys.executable, "-c", SEND.format(messages=messages), endpoint])
    try:
        for came in itertools.count(1):
            assert socket.poll(30_000), f"only {came - 1} of {messages} came"
            if int(msgpack.unpackb(socket.recv_multipart()[1])["seq"]) == messages - 1:
                break
            if came % 5000 == 0:
                time.sleep(0.3)  # busy with something else
        assert came == messages
        assert child.wait(60) == 0
    finally:
        child.kill()
        socket.close(linger=0)
