"""A worker that is killed or hangs is replaced: real processes over real sockets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rt_neds.assemble import assemble
from rt_neds.bundle import build_model, load_spec
from rt_neds.children import ChildError, free_port, serving, wait_for_schema
from rt_neds.config import parse_config
from rt_neds.errors import ConfigError
from rt_neds.frames import Flag
from rt_neds.replay import batches
from rt_neds.serve import load
from rt_neds.serve_config import ServeConfig
from rt_neds.session import load_session
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.sender import Sender
from rt_neds.stream.silent import LONGEST_S
from rt_neds.supervise import CAN_FORK, GIVE_UP
from tests.hearing import Ear
from tests.test_kept import save_untrained
from tests.test_loop import ListSink, ListSource

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(not CAN_FORK, reason="supervision forks, which is safe on Linux alone"),
]
CONTEXT, WIDTH, BIN_S = 10, 600, 0.02
FULL = 40
"""Bins after which nothing from before can matter: two layers of ten bins, and sums over four."""


class Acquisition(threading.Thread):
    """Sends a session in real time, numbers its units backwards, and says so: at least once."""

    def __init__(self, session, endpoint, announcements):
        super().__init__(daemon=True)
        self.session, self.done, self.announcements = session, threading.Event(), announcements
        self.sender = Sender(endpoint, "imec0")

    def run(self):
        units = self.session.unit_ids
        assert self.sender.wait_for_subscriber(60)
        began = time.monotonic()
        for batch in batches(self.session, 20.0, epoch=1, end=self.session.end):
            if self.done.wait(max(0, began + batch.end / 3e4 - time.monotonic())):
                break
            if batch.seq % 50 == 0 and batch.seq // 50 < self.announcements:
                self.sender.announce(epoch=1, rate=3e4, session="tiny", units=units[::-1])
            batch.records_S = batch.records_S.copy()
            batch.records_S["unit"] = len(units) - 1 - batch.records_S["unit"]
            batch.sent_ns = time.monotonic_ns()
            self.sender.send(batch)
        self.sender.close()


class Rig(Ear):
    """An acquisition, a listener, and what it has heard."""

    def __init__(self, tiny, announcements=1):
        self.path, self.run, _ = tiny
        spikes, self.decoded = free_port(), f"tcp://127.0.0.1:{free_port()}"
        session, endpoint = load_session(self.path), f"tcp://127.0.0.1:{spikes}"
        self.acquisition = Acquisition(session, endpoint, announcements)
        super().__init__(self.decoded)
        self.options = ("--probe", "imec0", "--bundle", str(self.run / "bundle"), "--publish",
                        self.decoded, "--source", f"rtneds://127.0.0.1:{spikes}")  # fmt: skip

    def __enter__(self):
        self.acquisition.start()
        return self

    def __exit__(self, *_):
        self.acquisition.done.set()
        self.acquisition.join(10)
        self.listener.close()

    def hear_frames(self, count):
        wanted = len(self.frames) + count
        self.hear(lambda: len(self.frames) >= wanted)

    def hear_status(self, wanted=lambda status: True):
        self.status = None
        self.hear(lambda: self.status is not None and wanted(self.status))
        return self.status

    def signal(self, pid, how, settle):
        """Signal a process and hear some frames more; the place of the next that may come."""
        os.kill(pid, how)
        before = len(self.frames)
        self.hear_frames(settle)
        return before

    def restarted(self, before):
        """The place of the first frame of a worker that has taken the place of another."""
        places = range(before, len(self.frames))
        return next(i for i in places if self.frames[i].flags & Flag.RESTARTED)

    def report(self, *supervisions):
        """Print what was measured; for people."""
        published = [frame.stamps["published"] for frame in self.frames]
        way = np.subtract(self.heard_at, published)
        recoveries = [f"{supervision['recovery_ms']:.1f}" for supervision in supervisions]
        print(f"recovery ms, killed and hung: {', '.join(recoveries)}; {supervisions[-1]}; "
              f"published to heard, median us: {np.median(way) / 1e3:.0f}")  # fmt: skip

    def undisturbed(self):
        """Values of every bin, from a loop that nobody disturbed."""
        return undisturbed((self.path, self.run))

    def check_bins(self):
        bins = [frame.bin for frame in self.frames]
        assert (np.diff(bins) > 0).all()
        assert all(frame.end == (frame.bin + 1) * WIDTH for frame in self.frames)
        assert {frame.epoch for frame in self.frames} == {1}
        return bins


def undisturbed(tiny):
    """Values of every bin of a session, from a loop that nobody disturbed."""
    path, run = tiny[:2]
    spec = load_spec(run / "bundle")
    model = build_model(run / "bundle", spec)
    source, sink = ListSource(batches(load_session(path), 20.0, epoch=1)), ListSink()
    config = ServeConfig(probe="p", bundle="b")
    assemble(config, spec, model, source, sink, None).run(lambda: not source.items)
    return np.stack([frame.values_V for frame in sink.frames])


def children(pid):
    """Process ids of the children of a process, oldest first."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def policies(pid):
    """Scheduling policies of all threads of a process."""
    return {os.sched_getscheduler(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()}


def wait_for_end_of(pid):
    deadline, path = time.monotonic() + 30, Path(f"/proc/{pid}/stat")
    while path.exists() and path.read_text().rpartition(") ")[2][0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_and_a_hung_worker_are_replaced_and_bins_keep_their_numbers(tiny):
    with Rig(tiny) as rig:
        with serving(*rig.options) as child:
            wait_for_schema(rig.listener, child)
            rig.hear_frames(20)
            first = rig.hear_status()
            assert len(policies(first["pid"])) == 1  # sockets' threads as the loop
            assert first["supervision"]["restarts"] == 0
            assert first["supervision"]["recovery_ms"] is None
            killed = rig.restarted(rig.signal(first["pid"], signal.SIGKILL, FULL + 10))
            second = rig.hear_status(lambda s: s["supervision"]["restarts"] == 1)
            hung = rig.restarted(rig.signal(second["pid"], signal.SIGSTOP, FULL + 10))
            third = rig.hear_status(lambda s: s["supervision"]["restarts"] == 2)
            rig.hear_frames(10)
            child.kill()
            child.wait()
            wait_for_end_of(third["pid"])
            child.returncode = 0  # as was meant
        assert len({first["pid"], second["pid"], third["pid"], child.pid}) == 4
        bins = rig.check_bins()
        rig.report(second["supervision"], third["supervision"])
        # How long it takes is measured elsewhere: here the machine may be busy.
        assert second["supervision"]["recovery_ms"] > 0
        assert third["supervision"]["recovery_ms"] > 900  # not replaced before hang_ms
        # Whoever listens may have lost frames on their way; the worker knows of those not written.
        holes = sum(bins[i] - bins[i - 1] - 1 for i in (killed, hung))
        assert 0 < third["supervision"]["bins_missed"] <= holes
        assert second["frame_counters"]["restarts"] == 1

        undisturbed = rig.undisturbed()
        anew = Flag.RESTARTED | Flag.WARMING
        for at in (killed, hung):
            flags = [frame.flags for frame in rig.frames[at : at + FULL]]
            went_on = at == killed and not flags[0] & Flag.WARMING  # not all is forgotten
            assert flags[0] & anew == (Flag.RESTARTED if went_on else anew)
            assert not any(f & (anew | Flag.GAP) for f in flags[CONTEXT:])
            equal = at + FULL
            if not flags[0] & Flag.GAP and went_on:
                # It knew all: what nobody heard of was decoded by the other, and did not go out.
                equal = at
                assert bins[at] - bins[at - 1] - 1 <= CHUNK
            elif flags[0] & Flag.GAP:
                assert went_on
                assert bins[at] > bins[at - 1] + 1
            for frame in rig.frames[equal : at + FULL + 10]:
                np.testing.assert_allclose(frame.values_V, undisturbed[frame.bin], atol=1e-5)


def decoded(path, spec, model, epoch, comes):
    """Values by bin of a loop to which only some bins of a session came."""
    source, sink = ListSource(batches(load_session(path), 20.0, epoch=epoch)), ListSink()
    source.items = [batch for batch in source.items if comes(batch.first // WIDTH)]
    config = ServeConfig(probe="p", bundle="b", session="a")
    assemble(config, spec, model, source, sink, None).run(lambda: not source.items)
    return {frame.bin: frame.values_V for frame in sink.frames}


def test_a_replacement_goes_on_with_what_the_killed_one_knew(tiny, tmp_path):
    context, units = 60, load_session(tiny[0]).unit_ids
    size = (16, 2, 2, context, (1, 4), 2, len(units), 400, True)
    save_untrained(tmp_path / "bundle", size, units)
    spec = load_spec(tmp_path / "bundle")
    model = build_model(tmp_path / "bundle", spec)
    with Rig((tiny[0], tmp_path, None), announcements=1000) as rig:
        rig.acquisition.session = replace(rig.acquisition.session, id="a")
        with serving(*rig.options, "--session", "a") as child:
            wait_for_schema(rig.listener, child)
            rig.hear_frames(420)  # longer than the memory
            for _ in range(3):  # one that is killed in the middle of a step leaves nothing
                status = rig.hear_status()
                at = rig.restarted(rig.signal(status["pid"], signal.SIGKILL, 60))
                after = rig.frames[at : at + 50]
                if not after[0].flags & Flag.WARMING:
                    break
                rig.hear_frames(420)
            told = rig.hear_status()["supervision"]["handover"]
    last, first = told["from"]["bin"], told["to"]["bin"]
    of = tiny[0], spec, model, after[0].epoch
    holed = decoded(*of, lambda bin_: not last < bin_ < first)
    anew = decoded(*of, lambda bin_: bin_ >= first)
    errors = {"went on": [], "anew": []}
    for frame in after:
        assert frame.flags & (Flag.RESTARTED | Flag.GAP)
        assert not frame.flags & Flag.WARMING
        for how, values in (("went on", holed), ("anew", anew)):
            errors[how].append(np.abs(frame.values_V - values[frame.bin]).max())
    # What came before serve had begun is in the memory of the one and not of the other.
    assert max(errors["went on"]) < 1e-3
    assert np.median(errors["anew"]) > 0.03


def test_a_standby_takes_over_and_no_bin_is_missed(tiny):
    with Rig(tiny, announcements=1000) as rig:
        with serving(*rig.options, "--set", "standby=true") as child:
            wait_for_schema(rig.listener, child)
            rig.hear_frames(60)
            first = rig.hear_status()
            processes = children(child.pid)
            assert len(processes) == 3
            rig.signal(first["pid"], signal.SIGKILL, 60)
            second = rig.hear_status(lambda s: s["pid"] != first["pid"])
            assert second["pid"] in processes
            rig.hear_status(lambda s: s["supervision"]["restarts"] == 1)
            rig.signal(second["pid"], signal.SIGSTOP, 100)
            third = rig.hear_status(lambda s: s["supervision"]["restarts"] == 2)
            gate_killed = rig.signal(processes[0], signal.SIGKILL, 60)
            rig.hear_status(lambda s: s["supervision"]["restarts"] == 3)
            child.terminate()
            assert child.wait(timeout=60) == 0
        bins = rig.check_bins()
        rig.report(second["supervision"], third["supervision"])
        assert bins[:gate_killed] == list(range(bins[0], bins[0] + gate_killed))
        assert third["supervision"]["bins_missed"] == 0
        undisturbed = rig.undisturbed()
        for frame in rig.frames[60 + FULL :]:
            assert not frame.flags & (Flag.RESTARTED | Flag.WARMING | Flag.GAP)
            np.testing.assert_allclose(frame.values_V, undisturbed[frame.bin], atol=1e-5)


@pytest.mark.parametrize("standby", ["false", "true"])
def test_a_replacement_takes_for_missing_what_had_fallen_silent(tiny, tmp_path, standby):
    path, run, config = tiny
    shutil.copytree(run / "bundle", tmp_path / "bundle")
    told = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    units = told["sessions"][0]["units"]
    told["sessions"][0]["longest_silence"] = [0.1, *[LONGEST_S + 1] * (len(units) - 1)]
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(told))
    with Rig((path, tmp_path, config)) as rig:
        records_S = rig.acquisition.session.records_S
        rig.acquisition.session = replace(
            rig.acquisition.session, records_S=records_S[records_S["unit"] != 0]
        )
        with serving(*rig.options, "--set", f"standby={standby}") as child:
            wait_for_schema(rig.listener, child)
            first = rig.hear_status(lambda s: s["units"]["silent"] == units[:1])
            rig.hear_frames(20)  # all of whoever decodes know it
            told_at = len(rig.frames)
            rig.signal(first["pid"], signal.SIGKILL, 30)
            second = rig.hear_status(lambda s: s["pid"] != first["pid"])
            rig.signal(second["pid"], signal.SIGKILL, 30)
            rig.hear_status(lambda s: s["supervision"]["restarts"] == 2)
            rig.hear_frames(30)
    assert all(frame.flags & Flag.MISSING_UNITS for frame in rig.frames[told_at:])


def test_a_worker_that_keeps_dying_is_given_up_in_one_line(tiny):
    options = ("--probe", "imec0", "--bundle", str(tiny[1] / "bundle"), "--source",
               f"rtneds://127.0.0.1:{free_port()}", "--publish",
               f"tcp://127.0.0.1:{free_port()}")  # fmt: skip
    killed = set()

    def kill_whatever_comes():
        with serving(*options) as child:
            deadline = time.monotonic() + 60
            while child.poll() is None:
                assert time.monotonic() < deadline
                for pid in set(children(child.pid)) - killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                time.sleep(0.005)

    with pytest.raises(ChildError, match=f"SIGKILL.*for the {GIVE_UP}th time.*expected to live"):
        kill_whatever_comes()
    assert len(killed) == GIVE_UP


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"hang_ms": 10.0}, "hang_ms 10; 300 to 86400000 ms can be had"),
    ],
)
def test_mistakes_are_told(table, words):
    with pytest.raises(ConfigError, match=words):
        load(parse_config({"probe": "p", "bundle": "b", **table}, ServeConfig, "test"), print)


def test_no_library_computes_in_threads_of_its_own(tiny):
    """Two real-time processes, each waiting for a thread that the other keeps from a core."""
    words = (
        "import sys, threadpoolctl; from rt_neds.serve import load; "
        "from rt_neds.serve_config import ServeConfig; "
        "load(ServeConfig(probe='p', bundle=sys.argv[1], publish=sys.argv[2]), lambda line: None); "
        "print([pool['num_threads'] for pool in threadpoolctl.threadpool_info()])"
    )
    address = f"tcp://127.0.0.1:{free_port()}"
    result = subprocess.run(
        [sys.executable, "-c", words, str(tiny[1] / "bundle"), address],
        capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
    )  # fmt: skip
    pools = json.loads(result.stdout.splitlines()[-1])
    assert len(pools) >= 1
    assert set(pools) == {1}
