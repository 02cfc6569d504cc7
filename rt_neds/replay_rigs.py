"""A recording sent as an acquisition program would send it: Open Ephys, SpikeGLX."""

from __future__ import annotations

import argparse
import re
from typing import Any

from rt_neds.errors import ConfigError, StreamError
from rt_neds.session import Session, load_session

DEFAULT_OPENEPHYS = "tcp://127.0.0.1:5556"
DEFAULT_BROADCASTER = "tcp://127.0.0.1:5557"
DEFAULT_SPIKEGLX = "tcp://127.0.0.1:4142"


def replay_as_openephys(
    session: Session,
    stream: str,
    *,
    bind: str = DEFAULT_OPENEPHYS,
    broadcaster: bool = False,
    speed: float = 1.0,
    batch_ms: float | None = None,
    channels: int = 1,
    from_s: float = 0.0,
    to_s: float | None = None,
    wait_s: float = 30.0,
) -> dict[str, Any]:
    """Send a session as the Open Ephys GUI would.

    Parameters
    ----------
    stream : str
        What the GUI would call the probe's stream.
    broadcaster : bool
        As its Event Broadcaster rather than its ZMQ Interface.
    batch_ms : float, optional
        Length of a block; 1024 samples by default.
    channels : int
        Continuous channels sent beside the spikes.

    Returns
    -------
    dict
        As :func:`replay`, without ``epoch``.

    Raises
    ------
    ConfigError, StreamError
    """
    from rt_neds.openephys_emulator import BLOCK, Emulator, send_session

    block = BLOCK if batch_ms is None else round(batch_ms / 1000 * session.rate)
    if speed < 0 or block < 1 or not 0 <= channels <= 1024:
        raise ConfigError(
            f"speed {speed}, blocks of {block} samples, {channels} channels; speed >= 0, at least "
            "one sample and 0 to 1024 channels expected"
        )
    emulator = Emulator(
        bind,
        stream,
        session.unit_ids,
        session.rate,
        channels=channels,
        broadcaster=broadcaster,
        lossless=speed == 0,
    )
    try:
        if not emulator.wait_for_subscriber(wait_s):
            raise StreamError(
                f"nobody subscribed at {bind} within {wait_s:g} s; start rt-neds serve --source "
                f"{'openephys-events' if broadcaster else 'openephys'}://... or raise --wait"
            )
        end = None if to_s is None else round(to_s * session.rate)
        sent = send_session(
            emulator,
            session,
            block=block,
            speed=speed,
            first=round(from_s * session.rate),
            end=end,
        )
    finally:
        emulator.close()
    return {"session": session.id, "rate": session.rate, **sent}


def play_spikeglx(args: argparse.Namespace) -> dict[str, Any]:
    """Give samples to whoever fetches them, as SpikeGLX would; by the command's arguments."""
    from rt_neds.spikeglx_emulator import play
    from rt_neds.spikeglx_recording import RawRecording, SynthesisedRecording

    probe = re.fullmatch(r"(?:imec)?(\d{1,2})", args.probe)
    if args.batch_ms is not None or args.channels != 1 or probe is None:
        raise ConfigError(
            f"as SpikeGLX, --probe {args.probe}; expected imec0, imec1, ..., without --batch-ms "
            "and --channels: whoever fetches says how much and which channels"
        )
    recording: Any = (
        RawRecording(args.raw)
        if args.raw is not None
        else SynthesisedRecording(load_session(args.session))
    )
    return play(
        recording,
        bind=args.bind or DEFAULT_SPIKEGLX,
        probe=int(probe[1]),
        speed=args.speed,
        from_s=args.from_s,
        to_s=args.to_s,
        wait_s=args.wait,
    )
