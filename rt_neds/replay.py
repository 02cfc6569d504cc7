"""``rt-neds replay``: send a recording as an acquisition would. ``serve`` cannot tell.

A session is cut into messages; a capture has them already, and they go out as they came.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rt_neds.capture import Capture
from rt_neds.clock import monotonic_ns
from rt_neds.errors import ConfigError, StreamError
from rt_neds.frames import SpikeBatch
from rt_neds.priority import quiet_machine
from rt_neds.replay_capture import check_speed, replay_capture, until
from rt_neds.replay_live import States, Track, named, tracks_of
from rt_neds.replay_rigs import (
    DEFAULT_BROADCASTER,
    DEFAULT_OPENEPHYS,
    play_spikeglx,
    replay_as_openephys,
)
from rt_neds.session import Session, load_session
from rt_neds.wire import DEFAULT_SPIKES, MAX_MESSAGE_S

ANNOUNCE_NS = 1_000_000_000
BATCH_MS = 1.0
LONGEST_S = 1e8
"""Three years: far more than any recording, and in samples still an int64."""


def batches(
    session: Session,
    batch_ms: float,
    *,
    epoch: int,
    first: int = 0,
    end: int | None = None,
) -> Iterator[SpikeBatch]:
    """Cut a session into the batches an acquisition would send.

    Outside the session's domain nothing is sent: the next batch begins later than the last ended,
    which is how the wire says "not recorded".

    Parameters
    ----------
    session : Session
    batch_ms : float
        Length of a batch.
    epoch : int
    first, end : int
        Samples to send; all of the recording by default.

    Yields
    ------
    SpikeBatch
        With ``sent_ns`` and ``received_ns`` zero.
    """
    step = max(1, round(batch_ms / 1000 * session.rate))
    samples_S = np.ascontiguousarray(session.records_S["sample"])
    seq = 0
    for low, high in session.domain_K2:
        low, high = max(int(low), first), int(high) if end is None else min(int(high), end)
        edges = np.append(np.arange(low, high, step), high)
        rows = np.searchsorted(samples_S, edges)
        for i in range(len(edges) - 1 if high > low else 0):
            records_S = session.records_S[rows[i] : rows[i + 1]]
            yield SpikeBatch(
                epoch, seq, int(edges[i]), int(edges[i + 1]), session.rate, 0, 0, records_S
            )
            seq += 1


def check_numbers(
    speed: float, batch_ms: float | None, from_s: float, to_s: float | None, wait_s: float
) -> None:
    """ConfigError for numbers by which nothing can be sent, or nothing that is taken."""
    check_speed(speed)
    most_ms = 1000 * MAX_MESSAGE_S
    if batch_ms is not None and not 0 < batch_ms < most_ms:
        raise ConfigError(
            f"batch-ms {batch_ms:g}; more than 0 and less than {most_ms:g} was expected: longer "
            "messages are not taken"
        )
    for name, seconds in {"from": from_s, "to": to_s, "wait": wait_s}.items():
        if seconds is not None and not abs(seconds) <= LONGEST_S:
            raise ConfigError(f"{name} {seconds:g}; at most {LONGEST_S:g} s were expected")


def replay(
    session: Session,
    probe: str,
    *,
    bind: str = DEFAULT_SPIKES,
    speed: float = 1.0,
    batch_ms: float = BATCH_MS,
    from_s: float = 0.0,
    to_s: float | None = None,
    wait_s: float = 30.0,
    epoch: int | None = None,
    live: Mapping[str, str | None] | None = None,
    bundle: str | None = None,
) -> dict[str, Any]:
    """Send a session over ZeroMQ, in its own time.

    Parameters
    ----------
    session : Session
    probe : str
    bind : str
        Address to bind.
    speed : float
        1 is real time; 0 is as fast as the subscriber takes it, losing nothing.
    batch_ms : float
    from_s, to_s : float
        Part of the session clock to send.
    wait_s : float
        How long to wait for a subscriber.
    epoch : int, optional
        Number of this acquisition run; the time of day by default.
    live : mapping of str to str or None, optional
        Behaviours to send beside the spikes: by name, a series of the session, such as
        ``wheel.wheel_speed``; None for what the bundle says it is.
    bundle : path, optional
        Which says what they are; needed for states of the task.

    Returns
    -------
    dict
        ``epoch``, ``messages``, ``spikes``, ``first``, ``end`` (samples), ``rate``, ``zero_ns``:
        host time at which sample 0 would have been taken (None unless the speed is 1), ``seconds``,
        ``behind_ms_max``: how late this sender itself was at worst.

    Raises
    ------
    StreamError
        Address in use, or nobody subscribed in time.
    ConfigError
        Numbers by which nothing can be sent.
    """
    from rt_neds.stream.sender import Sender

    check_numbers(speed, batch_ms, from_s, to_s, wait_s)
    epoch = time.time_ns() // 1_000_000 if epoch is None else epoch
    end = None if to_s is None else round(to_s * session.rate)
    plan = batches(session, batch_ms, epoch=epoch, first=round(from_s * session.rate), end=end)
    tracks = tracks_of(session, live or {}, bundle, epoch)
    announce: dict[str, Any] = {
        "epoch": epoch,
        "rate": session.rate,
        "session": session.id,
        "units": session.unit_ids,
    }
    sender = Sender(bind, probe, lossless=speed == 0)
    try:
        if not sender.wait_for_subscriber(wait_s):
            raise StreamError(
                f"nobody subscribed to spikes/{probe} at {bind} within {wait_s:g} s; "
                f"start rt-neds serve --probe {probe} or raise --wait"
            )
        sender.announce(**announce)
        return _send_all(sender, plan, session, speed, announce, tracks)
    finally:
        sender.close()


def _send_all(
    sender: Any,
    plan: Iterator[SpikeBatch],
    session: Session,
    speed: float,
    announce: dict,
    tracks: Sequence[Track | States] = (),
) -> dict[str, Any]:
    started = monotonic_ns() + 20_000_000
    announced = started
    zero_ns: int | None = None
    sent = spikes = behind = 0
    first = end = None
    ns_per_sample = 1e9 / session.rate / speed if speed else 0.0
    for batch in plan:
        if first is None:
            first = batch.first
            zero_ns = started - round(first * ns_per_sample)
        if speed:
            due = zero_ns + round(batch.end * ns_per_sample)  # type: ignore[operator]
            while (early := due - monotonic_ns()) > 0:
                time.sleep(early / 1e9)
            behind = max(behind, -early)
        batch.sent_ns = monotonic_ns()
        if batch.sent_ns - announced > ANNOUNCE_NS:
            sender.announce(**announce)
            announced = batch.sent_ns
        if sent:  # the first spikes say which run this is
            for track in tracks:
                for what in track.due(first, batch.end):
                    sender.observe(what)
        sender.send(batch)
        sent, spikes, end = sent + 1, spikes + len(batch.records_S), batch.end
    if first is None:
        raise ConfigError(
            f"{session.path} has nothing recorded in that part; widen --from and --to"
        )
    return {
        "session": session.id,
        "epoch": announce["epoch"],
        "messages": sent,
        "spikes": spikes,
        "first": first,
        "end": end,
        "rate": session.rate,
        "zero_ns": zero_ns if speed == 1 else None,
        "seconds": round((monotonic_ns() - started) / 1e9, 3),
        "behind_ms_max": round(behind / 1e6, 3),
    }


# -- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recording = parser.add_mutually_exclusive_group(required=True)
    recording.add_argument("--session", metavar="S.h5", help="session file")
    recording.add_argument(
        "--raw", metavar="F.bin", help="AP file of SpikeGLX, its .meta beside it; as spikeglx"
    )
    recording.add_argument("--capture", metavar="DIR", help="folder that rt-neds record wrote")
    parser.add_argument("--probe", help="name of the probe, such as imec0; a capture has its own")
    parser.add_argument(
        "--as",
        dest="sender",
        default="rtneds",
        choices=["rtneds", "openephys", "openephys-events", "spikeglx"],
        help="as our own stream (default), as Open Ephys' ZMQ Interface or Event Broadcaster, as "
        "SpikeGLX's command server: raw samples, made up from the spikes of a session",
    )
    parser.add_argument(
        "--bind",
        metavar="URL",
        help="address to send from (port 5570; as Open Ephys 5556 and 5557, or 5557; as SpikeGLX "
        "4142)",
    )
    parser.add_argument(
        "--speed", type=float, default=1.0, help="1 real time (default); 0 as fast as it is taken"
    )
    parser.add_argument(
        "--batch-ms",
        type=float,
        help="length of a message (1), or of a block (1024 samples) as Open Ephys",
    )
    parser.add_argument(
        "--channels", type=int, default=1, help="continuous channels sent as Open Ephys (1)"
    )
    parser.add_argument(
        "--live",
        nargs="+",
        default=[],
        metavar="NAME[=SERIES]",
        help="behaviours to send beside the spikes, such as wheel_speed=wheel.wheel_speed; by name "
        "alone, what --bundle says they are",
    )
    parser.add_argument("--bundle", metavar="B", help="what says what --live means by a name alone")
    parser.add_argument(
        "--from", dest="from_s", type=float, default=0.0, metavar="S", help="second to begin at (0)"
    )
    parser.add_argument(
        "--to",
        dest="to_s",
        type=float,
        default=None,
        metavar="S",
        help="second to end at (the last)",
    )
    parser.add_argument(
        "--wait", type=float, default=30.0, metavar="S", help="for a subscriber, at most (30)"
    )


def _check_part(session: Session, from_s: float, to_s: float | None) -> None:
    """Refuse a part of which nothing was recorded before anybody is waited for, or served."""
    domain_K2 = session.domain_K2 / session.rate
    part_K2 = np.clip(domain_K2, from_s, np.inf if to_s is None else max(from_s, to_s))
    if not (np.diff(part_K2, axis=1) > 0).any():
        end = "" if to_s is None else f" --to {to_s:g}"
        raise ConfigError(
            f"{session.path} has nothing recorded --from {from_s:g}{end}; it was recorded from "
            f"{domain_K2[0, 0]:g} to {domain_K2[-1, 1]:g} s: name a part of that"
        )


def on_time(speed: float) -> bool:
    """Whether to send at real-time priority, as an acquisition; a faster one would fill a core."""
    return 0 < speed <= 1


def run(args: argparse.Namespace) -> dict[str, Any]:
    check_numbers(args.speed, args.batch_ms, args.from_s, args.to_s, args.wait)
    if args.live and (args.session is None or args.sender != "rtneds"):
        raise ConfigError("--live sends behaviours of a --session beside our own stream only")
    if args.bundle and not args.live:
        raise ConfigError("--bundle says what --live NAME means; name one, or leave it out")
    if args.capture is not None:
        return _run_capture(args)
    if args.probe is None:
        raise ConfigError("no probe was named; add --probe NAME, such as imec0")
    if args.sender == "spikeglx":
        summary = play_spikeglx(args)
        if not args.quiet:
            print(
                f"gave {summary['samples']} samples in {summary['fetches']} fetches, "
                f"{summary['seconds']} s, {summary['too_late']} too late",
                file=sys.stderr,
            )
        return summary
    if args.raw is not None:
        raise ConfigError(f"{args.raw} holds no spikes; raw samples go out --as spikeglx")
    session = load_session(args.session)
    _check_part(session, args.from_s, args.to_s)
    with quiet_machine(on_time(args.speed)):
        summary = _send_session(session, args)
    if not args.quiet:
        print(
            f"sent {summary['spikes']} spikes in {summary['messages']} messages, "
            f"{summary['seconds']} s, at most {summary['behind_ms_max']} ms behind",
            file=sys.stderr,
        )
    return summary


def _send_session(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    common = {
        "speed": args.speed,
        "from_s": args.from_s,
        "to_s": args.to_s,
        "wait_s": args.wait,
    }
    if args.sender == "rtneds":
        return replay(
            session,
            args.probe,
            bind=args.bind or DEFAULT_SPIKES,
            batch_ms=BATCH_MS if args.batch_ms is None else args.batch_ms,
            live=named(args.live),
            bundle=args.bundle,
            **common,
        )
    broadcaster = args.sender == "openephys-events"
    return replay_as_openephys(
        session,
        args.probe,
        bind=args.bind or (DEFAULT_BROADCASTER if broadcaster else DEFAULT_OPENEPHYS),
        broadcaster=broadcaster,
        batch_ms=args.batch_ms,
        channels=args.channels,
        **common,
    )


def _run_capture(args: argparse.Namespace) -> dict[str, Any]:
    capture = Capture(args.capture)
    shaped = (args.probe, args.batch_ms, args.from_s or None, args.to_s)
    if shaped != (None,) * 4 or args.sender != "rtneds" or args.channels != 1:
        raise ConfigError(
            "--probe, --as, --batch-ms, --channels, --from and --to shape a session; a capture "
            "goes out as it came: leave them out"
        )
    with quiet_machine(on_time(args.speed)):
        summary = replay_capture(
            capture, bind=args.bind or DEFAULT_SPIKES, speed=args.speed, wait_s=args.wait
        )
    if not args.quiet:
        print(
            f"sent {summary['messages']} messages{until(capture)}, {summary['seconds']} s, "
            f"at most {summary['behind_ms_max']} ms behind",
            file=sys.stderr,
        )
    return summary
