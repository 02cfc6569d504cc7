"""Real processes: replay as SpikeGLX -> serve with a detector decodes what it would offline."""

import subprocess

import numpy as np
import pytest

from rt_neds.assemble import assemble
from rt_neds.bundle import build_model, load_spec
from rt_neds.children import (
    collect,
    command,
    finish_replay,
    free_port,
    serving,
    start_replay,
    wait_for_schema,
)
from rt_neds.frames import Flag, SpikeBatch
from rt_neds.serve_config import ServeConfig
from rt_neds.session import load_session
from rt_neds.spikeglx_recording import SynthesisedRecording
from rt_neds.stream.detector import save_detector
from rt_neds.stream.publisher import DecodedListener
from rt_neds.stream.receiver import Announcement
from tests.test_loop import ListSink, ListSource
from tests.test_spikeglx_emulator import detector_for

pytestmark = pytest.mark.timeout(240)
SECONDS = 4


def test_serve_decodes_what_the_detector_finds_in_what_spikeglx_sends(tiny, tmp_path):
    path, run, _ = tiny
    session, spec = load_session(path), load_spec(run / "bundle")
    recording = SynthesisedRecording(session)
    detector = detector_for(recording, session)
    save_detector(tmp_path / "detector", detector)
    end = SECONDS * 30_000
    found, complete = detector.detect(
        np.ascontiguousarray(recording.samples(0, end)[:, : recording.probe.ap]), 0
    )
    whole = SpikeBatch(1, 0, detector.settle, complete, session.rate, 0, 0, found)
    source, ours = ListSource([whole]), ListSink()
    model = build_model(run / "bundle", spec)
    config = ServeConfig(probe="imec0", bundle="b")
    announced = Announcement(session.id, session.rate, detector.units)
    loop = assemble(config, spec, model, source, ours, announced)
    loop.run(lambda: not source.items)

    port, publish = free_port(), f"tcp://127.0.0.1:{free_port()}"
    listener = DecodedListener(publish, "imec0")
    options = ("--probe", "imec0", "--bundle", str(run / "bundle"), "--publish", publish)
    out = tmp_path / "replay.json"
    sending = start_replay(
        "--session", str(path), "--probe", "imec0", "--as", "spikeglx", "--bind",
        f"tcp://127.0.0.1:{port}", "--speed", "0", "--to", str(SECONDS), "--wait", "120", out=out,
    )  # fmt: skip
    url = f"spikeglx://127.0.0.1:{port}"
    with serving(*options, "--source", url, "--detector", str(tmp_path / "detector")) as child:
        wait_for_schema(listener, child)
        theirs, notes = collect(listener, sending)
        sent = finish_replay(sending, out)
    assert (sent["samples"], sent["too_late"]) == (end, 0)
    counters = notes["status"].fields["source_counters"]
    assert (counters["samples"], counters["lost"]) == (end, 0)
    assert counters["spikes"] == len(found) > 150
    # The first bin lies in the time in which the detector settles.
    assert [frame.bin for frame in theirs] == list(range(1, complete // 600))
    assert len(ours.frames) == len(theirs)
    for a, b in zip(ours.frames, theirs, strict=True):
        np.testing.assert_array_equal(a.values_V, b.values_V)
        assert a.spikes == b.spikes
        assert a.flags & ~Flag.STALE == b.flags & ~Flag.STALE
    assert sum(frame.spikes for frame in theirs) > 100


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--source", "spikeglx://127.0.0.1:4142"), "needs --detector FOLDER"),
        (("--source", "spikeglx://127.0.0.1/x", "--detector", "d"), "expected spikeglx://HOST"),
        (("--detector", "d"), "other sources send spikes and take none"),
    ],
)
def test_a_wrong_source_is_told_in_one_line(options, expected):
    result = subprocess.run(
        command("serve", "--probe", "p", "--bundle", "b", *options),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_probe_that_is_not_there_ends_serve_in_one_line(tiny, tmp_path):
    path, run, _ = tiny
    session = load_session(path)
    small = SynthesisedRecording(session, ap=16)
    save_detector(tmp_path / "detector", detector_for(small, session))
    port = free_port()
    playing = start_replay(
        "--session", str(path), "--probe", "imec0", "--as", "spikeglx", "--bind",
        f"tcp://127.0.0.1:{port}", "--wait", "120", out=tmp_path / "replay.json",
    )  # fmt: skip
    try:
        result = subprocess.run(
            command("serve", "--probe", "imec0", "--bundle", str(run / "bundle"), "--publish",
                    f"tcp://127.0.0.1:{free_port()}", "--detector", str(tmp_path / "detector"),
                    "--source", f"spikeglx://127.0.0.1:{port}?probe=3", "--quiet"),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        playing.kill()
        playing.communicate()
    assert result.returncode == 2
    assert "there is no probe 3 at 127.0.0.1:" in result.stderr
    assert result.stderr.count("\n") == 1
