"""Send a capture again: the messages of the spike stream, byte for byte, when they came."""

from __future__ import annotations

import math
import time
from typing import Any

from rt_neds.capture import Capture, Stream
from rt_neds.clock import monotonic_ns
from rt_neds.errors import ConfigError, StreamError
from rt_neds.stream.raw import RawSender
from rt_neds.wire import DEFAULT_SPIKES

SLOWEST = 1e-6
SETTLE_NS = 200_000_000
"""After the first subscription came: time for the others of the same subscriber."""


def replay_capture(
    capture: Capture,
    *,
    bind: str = DEFAULT_SPIKES,
    speed: float = 1.0,
    wait_s: float = 30.0,
) -> dict[str, Any]:
    """Send what came over the spike stream again: same bytes, order, disorder and timing.

    Epochs and sequence numbers, too, are those of then. So a ``serve`` that has had this capture
    takes a second replay of it for repeated messages: it needs a fresh start in between.

    Parameters
    ----------
    capture : Capture
    bind, speed, wait_s
        As in :func:`rt_neds.replay.replay`.

    Returns
    -------
    dict
        ``capture``, ``probe``, ``messages``, ``seconds``, ``behind_ms_max``; ``damage``: why it was
        not read to its end (empty if it was), and ``unread_bytes``.

    Raises
    ------
    ConfigError
        Nothing of the spike stream is in it, or a speed that is none.
    StreamError
        Address in use, or nobody subscribed in time.
    """
    check_speed(speed)
    probe = capture.about["probe"]
    sender = RawSender(bind, probe, lossless=speed == 0)
    sent = behind = zero_ns = started = 0
    try:
        if not sender.wait_for_subscriber(wait_s):
            raise StreamError(
                f"nobody subscribed to spikes/{probe} at {bind} within {wait_s:g} s; "
                f"start rt-neds serve --probe {probe} or raise --wait"
            )
        for message in capture:
            if message.stream != Stream.SPIKES:
                continue
            if not sent:
                zero_ns, started = message.received_ns, monotonic_ns() + SETTLE_NS
            due = started + (round((message.received_ns - zero_ns) / speed) if speed else 0)
            while (early := due - monotonic_ns()) > 0:
                time.sleep(min(early / 1e9, 1.0))
            behind = max(behind, -early) if speed else 0
            sender.send_frames(message.frames)
            sent += 1
    finally:
        sender.close()
    if not sent:
        raise ConfigError(
            f"{capture.folder} has nothing of the spike stream{until(capture)}; was an "
            "acquisition running when it was recorded?"
        )
    return {
        "capture": str(capture.folder),
        "probe": probe,
        "messages": sent,
        "seconds": round((monotonic_ns() - started) / 1e9, 3),
        "behind_ms_max": round(behind / 1e6, 3),
        "damage": capture.damage,
        "unread_bytes": capture.unread_bytes,
    }


def check_speed(speed: float) -> None:
    """ConfigError for a speed at which nothing is sent."""
    if speed != 0 and not SLOWEST <= speed < math.inf:
        raise ConfigError(f"speed {speed:g}; 0, or at least {SLOWEST:g}, was expected")


def until(capture: Capture) -> str:
    """What to say of a capture that was not read to its end."""
    if not capture.damage:
        return ""
    return f" up to its damage ({capture.damage}; {capture.unread_bytes} bytes unread)"
