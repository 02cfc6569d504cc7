"""Real processes: replay as Open Ephys -> serve decodes what the native stream decodes."""

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
from rt_neds.replay import batches
from rt_neds.serve_config import ServeConfig
from rt_neds.session import load_session
from rt_neds.stream.publisher import DecodedListener
from tests.test_loop import ListSink, ListSource

pytestmark = pytest.mark.timeout(400)


def test_serve_decodes_the_same_from_open_ephys_as_from_the_native_stream(tiny, tmp_path):
    path, run, _ = tiny
    session, spec = load_session(path), load_spec(run / "bundle")
    source, ours = ListSource(batches(session, 1.0, epoch=1, end=20 * 30_000)), ListSink()
    config = ServeConfig(probe="imec0", bundle="b")
    model = build_model(run / "bundle", spec)
    loop = assemble(config, spec, model, source, ours, None)
    loop.run(lambda: not source.items)

    port, publish = free_port(), f"tcp://127.0.0.1:{free_port()}"
    listener = DecodedListener(publish, "imec0")
    options = ("--probe", "imec0", "--bundle", str(run / "bundle"), "--publish", publish)
    with serving(*options, "--source", f"openephys://127.0.0.1:{port}") as child:
        wait_for_schema(listener, child)
        out = tmp_path / "replay.json"
        sending = start_replay(
            "--session", str(path), "--probe", "imec0", "--as", "openephys", "--bind",
            f"tcp://127.0.0.1:{port}", "--speed", "0", "--to", "20", out=out,
        )  # fmt: skip
        theirs, _ = collect(listener, sending)
        sent = finish_replay(sending, out)
    assert sent["spikes"] == (session.records_S["sample"] < 20 * 30_000).sum()
    assert sum(frame.spikes for frame in theirs) == sent["spikes"]
    assert [frame.bin for frame in theirs][:1000] == list(range(1000))
    assert len(ours.frames) == 1000
    for a, b in zip(ours.frames, theirs, strict=False):
        np.testing.assert_array_equal(a.values_V, b.values_V)
        assert a.flags == b.flags


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("openephys://127.0.0.1:5556/x", "expected openephys://HOST:5556"), ("oe://h:1", "rtneds://")],
)
def test_a_wrong_source_is_told_in_one_line(argument, expected):
    result = subprocess.run(
        command("serve", "--probe", "p", "--bundle", "b", "--source", argument),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


def test_replay_says_when_nobody_listens(tiny, tmp_path):
    result = subprocess.run(
        command("replay", "--session", str(tiny[0]), "--probe", "p", "--as", "openephys", "--bind",
                f"tcp://127.0.0.1:{free_port()}", "--wait", "0.1", "--json", str(tmp_path / "j")),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "nobody subscribed" in result.stderr
    assert "openephys://" in result.stderr
    assert not (tmp_path / "j").exists()
