"""Real processes over real sockets: replay -> serve -> whoever listens."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import zmq

from offline.predict import decode_spans
from offline.windows import bin_session
from rt_neds.bundle import BundleSession, build_model, load_spec, save_bundle
from rt_neds.children import (
    collect,
    finish_replay,
    free_port,
    serving,
    start_replay,
    wait_for_schema,
)
from rt_neds.frames import SPIKE_DTYPE, DecodedFrame, Flag, SpikeBatch
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import to_values_TV
from rt_neds.session import load_session
from rt_neds.stream.publisher import DecodedListener, Note
from rt_neds.wire import pack_source, pack_spikes
from tests.making import tiny_config

pytestmark = pytest.mark.timeout(400)


class Rig:
    """A serve process, its ports, and a listener."""

    def __init__(self, bundle, *options):
        self.spikes, self.decoded = free_port(), free_port()
        self.bind = f"tcp://127.0.0.1:{self.spikes}"
        self.listener = DecodedListener(f"tcp://127.0.0.1:{self.decoded}", "imec0")
        self.options = ("--probe", "imec0", "--bundle", str(bundle), "--source",
                        f"rtneds://127.0.0.1:{self.spikes}", "--publish",
                        f"tcp://127.0.0.1:{self.decoded}", *options)  # fmt: skip

    def replay(self, session, tmp_path, *options):
        out = tmp_path / "replay.json"
        sending = start_replay("--session", str(session), "--probe", "imec0", "--bind", self.bind,
                               *options, out=out)  # fmt: skip
        frames, notes = collect(self.listener, sending)
        return frames, notes, finish_replay(sending, out)

    def statuses(self, wanted, seconds=60):
        """Wait for a status that satisfies ``wanted``."""
        deadline = time.monotonic() + seconds
        last = None
        while time.monotonic() < deadline:
            message = self.listener.read(100)
            if isinstance(message, Note) and message.kind == "status":
                last = message.fields
                if wanted(last):
                    return last
        raise AssertionError(f"never came: last status {last}")


def wait_for_connections(port, count):
    """Until so many have connected to a port of the loopback, where that can be seen."""
    table, deadline = Path("/proc/net/tcp"), time.monotonic() + 60
    if not table.exists():
        time.sleep(10)
        return
    ours = f"0100007F:{port:04X}"
    while time.monotonic() < deadline:
        rows = [line.split() for line in table.read_text().splitlines()]
        if sum(row[1] == ours and row[3] == "01" for row in rows) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"fewer than {count} connected")


def cli(*args, timeout=90):
    return subprocess.run(
        [sys.executable, "-m", "rt_neds.cli", *args], capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


def test_replay_into_serve_publishes_every_bin_once_and_equals_offline(tiny, tmp_path):
    path, run, _ = tiny
    rig = Rig(run / "bundle")
    with serving(*rig.options) as child:
        schema = wait_for_schema(rig.listener, child)
        frames, _notes, sent = rig.replay(path, tmp_path, "--speed", "0", "--batch-ms", "7")
        again, _, _ = rig.replay(path, tmp_path, "--speed", "0", "--batch-ms", "20")
    spec = load_spec(run / "bundle")
    session = load_session(path)
    bins = session.end // 600
    assert [frame.bin for frame in frames] == list(range(bins))
    assert {frame.epoch for frame in frames} == {sent["epoch"]}
    assert {frame.model for frame in frames} == {spec.name}
    assert sum(frame.spikes for frame in frames) == sent["spikes"] == len(session.records_S)
    assert [o["name"] for o in schema.fields["outputs"]] == ["speed", "choice"]
    assert schema.fields["outputs"][1] == {
        "name": "choice", "kind": "categorical", "unit": "", "classes": ["left", "right"],
        "offset": 2, "size": 2,
    }  # fmt: skip

    # A second acquisition: same bins, a flag until the context is full, and the same values.
    assert [frame.bin for frame in again] == list(range(bins))
    np.testing.assert_array_equal(
        np.stack([f.values_V for f in frames]), np.stack([f.values_V for f in again])
    )
    assert all(frame.flags & Flag.RESTARTED for frame in again[: spec.model.context - 1])
    assert all(frame.flags == 0 for frame in again[spec.model.context :])

    config = tiny_config()
    binned = bin_session(session, config.data, config.behaviour)
    raw = decode_spans(
        build_model(run / "bundle", spec),
        binned,
        [(0, bins)],
        wanted=["speed", "choice"],
        window=300,
    )
    at = 0
    for behaviour in spec.behaviours:
        scale = spec.session().scales[behaviour.name]
        offline = to_values_TV(torch.from_numpy(raw[behaviour.name]), behaviour, scale).numpy()
        streamed = np.stack([f.values_V[at : at + offline.shape[1]] for f in frames])
        np.testing.assert_allclose(streamed, offline, atol=1e-4)
        at += offline.shape[1]


def test_real_time_replay_is_on_time_and_knows_it(tiny, tmp_path):
    path, run, _ = tiny
    rig = Rig(run / "bundle")
    with serving(*rig.options) as child:
        wait_for_schema(rig.listener, child)
        frames, notes, sent = rig.replay(path, tmp_path, "--to", "6")
    assert [frame.bin for frame in frames] == list(range(300))
    assert sent["zero_ns"] is not None
    for frame in frames:
        stamps = frame.stamps
        assert stamps["sent"] <= stamps["received"] <= stamps["binned"] <= stamps["published"]
        assert stamps["published"] > sent["zero_ns"] + frame.end / 30_000 * 1e9
    assert notes["status"].fields["realtime"] is True
    assert sent["seconds"] > 5.9


def test_garbage_on_the_socket_is_counted_exactly_and_skipped(tiny):
    _, run, _ = tiny
    rig = Rig(run / "bundle")
    with zmq.Context() as context, context.socket(zmq.XPUB) as acquisition:
        acquisition.set(zmq.LINGER, 500)
        acquisition.bind(rig.bind)
        with serving(*rig.options) as child:
            wait_for_schema(rig.listener, child)
            for _ in ("spikes", "source"):
                assert acquisition.poll(30_000), "it never subscribed"
                assert acquisition.recv()[:1] == b"\x01"
            records = np.zeros(2, SPIKE_DTYPE)

            def batch(seq):
                return pack_spikes(
                    "imec0", SpikeBatch(5, seq, seq * 600, seq * 600 + 600, 3e4, 1, 0, records)
                )

            good = batch(0)
            wrong = [
                [b"spikes/imec0"],
                [b"spikes/imec0", b""],
                [b"spikes/imec0", b"\xc1", b""],
                [b"spikes/imec0", good[1], b"short"],
                [b"spikes/imec0", good[1], good[2], b"extra"],
                [b"spikes/imec0", msgpack.packb({"v": 1}), b""],
                [b"spikes/imec0", b"\x81" * 100_000, b""],
                [b"source/imec0", b"nonsense"],
            ]
            acquisition.send_multipart(good)
            for message in (*wrong, [b"spikes/imec0more", good[1], good[2]]):
                acquisition.send_multipart(message)
            for seq in (1, 1, 2, 5):  # one repeated, then two lost
                acquisition.send_multipart(batch(seq))
            status = rig.statuses(lambda s: s["published"] >= 6)
    counters = status["source_counters"]
    assert counters["malformed"] == len(wrong)
    assert counters["others"] == 1
    assert counters["repeated"] == 1
    assert counters["lost"] == 2
    assert status["published"] == 6
    assert status["bin_counters"]["bins_unobserved"] == 2


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_cleanly_when_asked(tiny, how):
    _, run, _ = tiny
    rig = Rig(run / "bundle")
    with serving(*rig.options) as child:
        wait_for_schema(rig.listener, child)
        child.send_signal(how)
        assert child.wait(timeout=30) == 0


def test_serve_refuses_a_port_in_use_in_one_line(tiny):
    _, run, _ = tiny
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"tcp://127.0.0.1:{holder.getsockname()[1]}"
        done = cli("serve", "--probe", "p", "--bundle", str(run / "bundle"), "--publish", address)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "in use" in done.stderr
    assert address in done.stderr


def test_serve_refuses_a_full_attention_bundle(tiny, tmp_path):
    model = NEDS(ModelConfig(dim=16, layers=1, heads=2, attention="full"), [], {"a": 3})
    session = BundleSession(id="a", units=["a", "b", "c"], rate=3e4, scales={}, behaviours=[])
    save_bundle(tmp_path / "b", model, bin_ms=20.0, sessions=[session], training={})
    done = cli("serve", "--probe", "p", "--bundle", str(tmp_path / "b"))
    assert done.returncode == 2
    assert "attention = 'full'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_serve_refuses_a_damaged_bundle(tiny, tmp_path):
    shutil.copytree(tiny[1] / "bundle", tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"")
    done = cli("serve", "--probe", "p", "--bundle", str(tmp_path / "b"))
    assert done.returncode == 2
    assert "damaged" in done.stderr
    assert done.stderr.count("\n") == 1


def test_serve_refuses_the_units_of_another_session(tiny):
    _, run, _ = tiny
    rig = Rig(run / "bundle")
    announcement = pack_source("imec0", epoch=1, rate=3e4, session="x", units=["x/0", "x/1"])
    with zmq.Context() as context, context.socket(zmq.PUB) as acquisition:
        acquisition.set(zmq.LINGER, 0)
        acquisition.bind(rig.bind)
        child = subprocess.Popen(
            [sys.executable, "-m", "rt_neds.cli", "serve", *rig.options],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for_schema(rig.listener, child)  # it serves already, and must still notice
        while child.poll() is None:
            acquisition.send_multipart(announcement)
            time.sleep(0.1)
        words = child.stderr.read()
    assert child.returncode == 2
    assert "none in common" in words.splitlines()[-1]
    assert "Traceback" not in words


def test_replay_says_that_nobody_listens(tiny):
    done = cli("replay", "--session", str(tiny[0]), "--probe", "imec0", "--wait", "0.5",
               "--bind", f"tcp://127.0.0.1:{free_port()}")  # fmt: skip
    assert done.returncode == 2
    assert "nobody subscribed" in done.stderr
    assert done.stderr.count("\n") == 1


def test_watch_reports_what_it_saw(tiny, tmp_path):
    path, run, _ = tiny
    rig = Rig(run / "bundle")
    with serving(*rig.options) as child:
        wait_for_schema(rig.listener, child)
        watching = subprocess.Popen(
            [sys.executable, "-m", "rt_neds.cli", "watch", "--probe", "imec0", "--connect",
             f"tcp://127.0.0.1:{rig.decoded}", "--json", "-", "--quiet"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for_connections(rig.decoded, 2)
        frames, _, _ = rig.replay(path, tmp_path, "--to", "2")
        watching.send_signal(signal.SIGTERM)
        seen = json.loads(watching.communicate(timeout=60)[0])
    assert seen["frames"] == len(frames) == 100
    assert seen["holes"] == 0
    assert seen["receive_to_publish_ms"]["p50"] > 0
    none = {"missing": 0, "unknown": 0, "silent": [], "silent_count": 0}
    assert seen["status"]["units"] == {"bundle": 6, **none}
    # Whether the last status came before the source had been silent for a second is chance.
    says = " ".join(finding["says"] for finding in seen["findings"])
    assert ("no spikes" in says) == (seen["status"]["source"] != "streaming"), seen
    assert all(isinstance(frame, DecodedFrame) for frame in frames)
