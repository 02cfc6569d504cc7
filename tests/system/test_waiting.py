"""Who waits for a sender that is not there says so, once, and for what."""

import subprocess
import sys
import time

import pytest

from rt_neds.children import free_port


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("rtneds", "nothing of imec9 comes from {}; start the sender"),
        ("openephys", "nothing comes from Open Ephys at {}: does it run"),
    ],
)
def test_serve_says_that_nothing_comes(tiny, scheme, words):
    source = f"{scheme}://127.0.0.1:{free_port()}"
    argv = ["serve", "--probe", "imec9", "--bundle", str(tiny[1] / "bundle"), "--source", source]
    argv += ["--publish", f"tcp://127.0.0.1:{free_port()}"]
    child = subprocess.Popen(
        [sys.executable, "-m", "rt_neds.cli", *argv], stderr=subprocess.PIPE, text=True
    )
    try:
        lines, deadline = [], time.monotonic() + 120
        while time.monotonic() < deadline and not any("waiting" in line for line in lines):
            lines.append(child.stderr.readline())
    finally:
        child.terminate()
        child.communicate(timeout=60)
    named = source if scheme == "rtneds" else source.removeprefix("openephys://")
    assert f"waiting: {words.format(named)}" in lines[-1]
