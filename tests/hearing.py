"""What a subscriber hears while somebody sends, or serves."""

import threading
import time

import zmq

from rt_neds.frames import DecodedFrame
from rt_neds.stream.publisher import DecodedListener


def heard_while(endpoint, send):
    """Frames and time of coming, in ns, of each message until ``send`` returns and all is quiet."""
    heard = []
    with zmq.Context() as context, context.socket(zmq.SUB) as listener:
        listener.connect(endpoint)
        listener.subscribe(b"")
        sending = threading.Thread(target=send)
        sending.start()
        while sending.is_alive() or listener.poll(200):
            if listener.poll(50):
                heard.append((listener.recv_multipart(), time.monotonic_ns()))
        sending.join()
    return heard


class Ear:
    """Frames of a ``serve``, when each was heard, and the last status."""

    def __init__(self, publish):
        self.listener = DecodedListener(publish, "imec0")
        self.frames, self.heard_at, self.status = [], [], None

    def hear(self, enough, seconds=90):
        """Listen until there is enough."""
        deadline = time.monotonic() + seconds
        while not enough():
            assert time.monotonic() < deadline, f"not in time; status {self.status}"
            message = self.listener.read(50)
            if isinstance(message, DecodedFrame):
                self.frames.append(message)
                self.heard_at.append(time.monotonic_ns())
            elif message is not None and message.kind == "status":
                self.status = message.fields
