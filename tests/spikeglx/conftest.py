"""A server of some data, and a source that reads it."""

import pytest

import rt_neds.stream.spikeglx as module
from rt_neds.stream.spikeglx import SpikeGLXSource
from tests import naive_spikeglx as naive
from tests.spikeglx.checking import AP, LAG


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Shorter waits where the waiting itself is not what is tested."""
    monkeypatch.setattr(module, "PACE_NS", 0)
    monkeypatch.setattr(module, "BACKOFF_NS", 1_000_000)
    monkeypatch.setattr(module, "STALL_NS", 50_000_000)


@pytest.fixture
def serve():
    """Make a server of some data and a source that reads it; both are closed in the end."""
    made = []

    def make(data, *, lag=LAG, server=None, detector=None, query="", **options):
        lf = data.shape[1] - AP - 1
        server = server or naive.Server(data, ap=AP, lf=lf, **options)
        detector = detector or naive.Threshold(AP, lag=lag)
        source = SpikeGLXSource(f"spikeglx://127.0.0.1:{server.port}{query}", "s", detector)
        made.extend([source, server])
        return source, server, detector

    yield make
    for one in made:
        one.close()
