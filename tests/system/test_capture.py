"""An experiment is recorded, and decoded again from what was recorded: not a bit differs."""

import contextlib
import signal
import subprocess
import time

import numpy as np
import pytest

from rt_neds.capture import Capture, CaptureError, Stream
from rt_neds.children import (
    collect,
    command,
    finish_replay,
    free_port,
    serving,
    start_replay,
    wait_for_schema,
)
from rt_neds.frames import DecodedFrame
from rt_neds.replay import batches
from rt_neds.session import load_session
from rt_neds.stream.publisher import DecodedListener
from rt_neds.stream.raw import RawSender
from rt_neds.wire import pack_source, pack_spikes, unpack_decoded, unpack_map
from tests.system.test_supervision import undisturbed

pytestmark = pytest.mark.timeout(400)
SECONDS = 8


def acquisition(path):
    """What an untidy acquisition sends: late spikes, lost and garbled messages, a repetition."""
    session = load_session(path)
    units = {"session": session.id, "units": session.unit_ids}
    yield pack_source("imec0", epoch=5, rate=session.rate, **units)
    late = None
    for batch in batches(session, 7, epoch=5, end=round(SECONDS * session.rate)):
        if batch.seq % 97 == 50:
            continue
        if late is not None and len(late):
            batch.records_S = np.concatenate([batch.records_S, late])
        late = batch.records_S[:1] if batch.seq % 31 == 7 else None
        batch.records_S = batch.records_S[len(late) if late is not None else 0 :][::-1]
        batch.sent_ns = time.monotonic_ns()
        frames = pack_spikes("imec0", batch)
        yield frames
        if batch.seq % 60 == 0:
            yield [frames[0], frames[1], b"short"]
            yield [b"spikes/imec0", b"\xc1"]
            yield frames


@contextlib.contextmanager
def rigs(bundle, n, *options):
    """Addresses of both streams of serve processes that are ready, and listeners."""
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(n):
            spikes, decoded = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
            listener = DecodedListener(decoded, "imec0")
            stack.callback(listener.close)
            child = stack.enter_context(
                serving("--probe", "imec0", "--bundle", bundle, "--publish", decoded,
                        "--source", spikes.replace("tcp", "rtneds"), *options)
            )  # fmt: skip
            started.append((child, (spikes, decoded, listener)))
        for child, (_, _, listener) in started:
            wait_for_schema(listener, child)
        yield [one for _, one in started]


def wait_for_decoded(folder):
    """Until the recording has heard both ends: the acquisition it has, serve speaks by itself."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(CaptureError):
            if any(message.stream == Stream.DECODED for message in Capture(folder)):
                return
        time.sleep(0.1)
    raise AssertionError("it heard nothing of serve")


def rules(tiny):
    """Options for two triggers that have much to decide: whatever the network, half its values."""
    speed, choice = np.median(undisturbed(tiny)[:, [0, 2]], axis=0)
    return ("--set", f"trigger.any.when=speed > {speed}", "--set", "trigger.any.refuse=[]",
            "--set", "trigger.any.refractory_ms=100", "--set", "trigger.clean.hold_ms=40",
            "--set", f"trigger.clean.when=speed < {speed} or choice.left > {choice}")  # fmt: skip


def decided(triggers):
    """All that was decided, without the times."""
    return [{k: v for k, v in fields.items() if not k.endswith("_ns")} for fields in triggers]


class Noting:
    """A listener that keeps the triggers it hears."""

    def __init__(self, listener):
        self.listener, self.triggers = listener, []

    def read(self, timeout_ms):
        message = self.listener.read(timeout_ms)
        if getattr(message, "kind", "") == "trigger":
            self.triggers.append(message.fields)
        return message


def values(frames):
    return [(f.bin, f.end, f.spikes, f.late, f.lost, f.values_V.tobytes()) for f in frames]


def test_replays_of_a_capture_decode_to_the_very_bytes_of_the_experiment(tiny, tmp_path):
    path, run, _ = tiny
    bundle, folder = str(run / "bundle"), tmp_path / "capture"
    with rigs(bundle, 3, *rules(tiny)) as (first, *others), contextlib.ExitStack() as stack:
        spikes, decoded, listener = first
        recording = subprocess.Popen(
            command("record", "--probe", "imec0", "--out", str(folder), "--source", spikes,
                    "--decoded", decoded, "--min-free-gb", "0", "--quiet"),
        )  # fmt: skip
        stack.callback(recording.kill)
        sender = RawSender(spikes, "imec0", lossless=True)
        for _ in ("serve", "record"):
            assert sender.wait_for_subscriber(60)
        wait_for_decoded(folder)
        sent = list(acquisition(path))
        for frames in sent:
            sender.send_frames(frames)
        live, deadline = [], time.monotonic() + 60
        while len(live) < SECONDS * 50:
            assert time.monotonic() < deadline
            if isinstance(message := listener.read(100), DecodedFrame):
                live.append(message)
        recording.send_signal(signal.SIGTERM)
        assert recording.wait(60) == 0
        sender.close()
        again = []
        fired = []
        for n, (spikes, _, listener) in enumerate(others):
            out = tmp_path / f"{n}.json"
            options = ("--capture", str(folder), "--bind", spikes, "--speed", "0")
            sending = start_replay(*options, out=out)
            noting = Noting(listener)
            frames, notes = collect(noting, sending)
            assert finish_replay(sending, out)["messages"] == len(sent)
            again.append(values(frames))
            fired.append(decided(noting.triggers))

    reader = Capture(folder)
    messages = list(reader)
    assert reader.damage == ""
    assert [list(m.frames) for m in messages if m.stream == Stream.SPIKES] == sent
    went = [m.frames[1] for m in messages if m.frames[0] == b"decoded/imec0"]
    assert values(map(unpack_decoded, went)) == values(live)

    assert again[0] == again[1]
    assert again[0] == values(live)
    assert len(live) == SECONDS * 50
    told = [unpack_map(m.frames[1]) for m in messages if m.frames[0] == b"trigger/imec0"]
    assert fired[0] == fired[1] == decided(told)
    for rule in ("any", "clean"):
        assert {bool(d["refused"]) for d in fired[0] if d["rule"] == rule} == {True, False}
    counters = notes["status"].fields["source_counters"]
    assert min(counters[kind] for kind in ("malformed", "repeated", "lost")) > 0
    assert sum(frame.late for frame in live) > 0
