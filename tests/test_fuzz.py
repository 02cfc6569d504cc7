"""Ten thousand spoiled messages, each counted once; ``benchmarks/fuzz.py`` sends ten million."""

import importlib.util
import tracemalloc
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz.py"
TARGETS = ("native", "open ephys interface", "open ephys broadcaster", "spikeglx", "decoded")


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_protocol_is_left_out(fuzz):
    assert set(fuzz.TARGETS) == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_spoiled_messages_are_each_counted_once_and_harm_nothing(fuzz, name):
    tracemalloc.start()
    try:
        told = fuzz.fuzz(name, 10_000 // len(TARGETS), seed=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(told["counts"].values()) == told["sent"] >= 2000
    refused = sum(n for kind, n in told["counts"].items() if kind.startswith("malformed"))
    assert 0.02 < refused / told["sent"] < 0.8  # it reaches both what is valid and what is not
    assert peak < 32e6


def test_what_breaks_is_found(fuzz, monkeypatch):
    class Blind(fuzz.Decoded):
        def feed(self, frames):
            super().feed(frames)
            self.told["frames"] += len(frames) == 3  # counted twice

    monkeypatch.setitem(fuzz.TARGETS, "decoded", Blind)
    with pytest.raises(fuzz.Broken, match="counted"):
        fuzz.fuzz("decoded", 1000, seed=1)
    monkeypatch.setattr(Blind, "feed", lambda self, frames: frames[1][0])
    with pytest.raises(fuzz.Broken, match="IndexError"):
        fuzz.fuzz("decoded", 1000, seed=1)
