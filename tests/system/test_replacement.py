"""A worker beside a rig is killed: whoever takes its place reads the same acquisition on."""

import contextlib
import os
import signal

import numpy as np
import pytest

from rt_neds.children import free_port, serving, start_replay, wait_for_schema
from rt_neds.frames import Flag
from rt_neds.session import load_session
from rt_neds.spikeglx_recording import SynthesisedRecording
from rt_neds.stream.detector import save_detector
from rt_neds.supervise import CAN_FORK
from tests.hearing import Ear
from tests.test_spikeglx_emulator import detector_for

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(not CAN_FORK, reason="supervision forks, which is safe on Linux alone"),
]


@contextlib.contextmanager
def beside(rig, tiny, tmp_path, *more):
    """An emulated rig that plays a session, a ``serve`` beside it, and an ear."""
    path, run, _ = tiny
    session, port = load_session(path), free_port()
    publish = f"tcp://127.0.0.1:{free_port()}"
    options = ["--probe", "imec0", "--bundle", str(run / "bundle"), "--publish", publish,
               "--source", f"{rig}://127.0.0.1:{port}"]  # fmt: skip
    if rig == "spikeglx":
        recording = SynthesisedRecording(session)
        save_detector(tmp_path / "detector", detector_for(recording, session))
        options += ["--detector", str(tmp_path / "detector")]
    ear = Ear(publish)
    sending = start_replay(
        "--session", str(path), "--probe", "imec0", "--as", rig, "--bind",
        f"tcp://127.0.0.1:{port}", "--wait", "120", out=tmp_path / "replay.json",
    )  # fmt: skip
    try:
        with serving(*options, *more) as child:
            wait_for_schema(ear.listener, child)
            yield ear
    finally:
        sending.kill()
        sending.communicate()
        ear.listener.close()


@pytest.mark.parametrize("rig", ["openephys", "spikeglx"])
def test_bins_go_on_where_the_killed_one_was(tiny, tmp_path, rig):
    with beside(rig, tiny, tmp_path) as ear:
        for kills in (1, 2, 3):  # one that is killed in the middle of a step leaves nothing
            begun = len(ear.frames)
            ear.hear(lambda begun=begun: len(ear.frames) > begun + 150)
            os.kill(ear.status["pid"], signal.SIGKILL)
            ear.hear(lambda kills=kills: ear.status["supervision"]["handovers"] == kills)
            told = ear.status["supervision"]
            bins = [told["handover"][end]["bin"] for end in ("from", "to")]
            if rig == "openephys" or bins[1] == bins[0] + 1:  # SpikeGLX holds what nobody has read
                break
        before = len(ear.frames)
        ear.hear(lambda: len(ear.frames) > before + 60)
    epoch = told["handover"]["to"]["epoch"]
    assert told["handover"]["from"]["epoch"] == epoch
    assert {frame.epoch for frame in ear.frames[begun:]} == {epoch}
    assert (np.diff([frame.bin for frame in ear.frames[begun:]]) > 0).all()
    assert not ear.frames[-1].flags & (Flag.RESTARTED | Flag.GAP | Flag.WARMING)
    assert rig == "openephys" or bins[1] == bins[0] + 1


@pytest.mark.parametrize("rig", ["openephys", "spikeglx"])
def test_a_standby_beside_a_rig_takes_over_and_no_bin_is_missed(tiny, tmp_path, rig):
    with beside(rig, tiny, tmp_path, "--set", "standby=true") as ear:
        ear.hear(lambda: len(ear.frames) > 150 and ear.status is not None)
        first = ear.status["pid"]
        before = len(ear.frames)
        os.kill(first, signal.SIGKILL)
        ear.hear(lambda: len(ear.frames) > before + 100 and ear.status["pid"] != first)
    bins = [frame.bin for frame in ear.frames]
    assert bins == list(range(bins[0], bins[0] + len(bins)))
    assert len({frame.epoch for frame in ear.frames}) == 1
    anew = Flag.RESTARTED | Flag.WARMING | Flag.GAP
    assert not any(frame.flags & anew for frame in ear.frames[60:])
    assert ear.status["supervision"]["bins_missed"] == 0
