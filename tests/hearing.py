"""What a subscriber hears while somebody sends."""

import threading
import time

import zmq


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
