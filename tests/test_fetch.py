"""What a step reads is fetched before a bin closes: once, in time, and to no other effect."""

import numpy as np
import pytest

from rt_neds.assemble import assemble
from rt_neds.bundle import build_model, load_spec
from rt_neds.frames import Flag
from rt_neds.serve_config import ServeConfig
from rt_neds.stream.decoder import FETCHED_PER_S, Decoder, EagerStep
from rt_neds.stream.fused import FusedStep
from rt_neds.stream.fused_kernel import fetch
from rt_neds.stream.loop import run_together
from rt_neds.stream.validity import Validity
from tests.test_fused import NAMES, random_model, random_stream, streamed
from tests.test_loop import MS, RATE, WIDTH, ListSink, ListSource, pieces_of, silence

BINS = 400
SETTLED = 300
"""By then the stream is known to run in real time."""


class Punctual(ListSource):
    """Batches are read when they come, by the clock of the loop."""

    now_ns = 0

    def read(self, timeout_ms):
        batch = super().read(timeout_ms)
        Punctual.now_ns = batch.received_ns if batch is not None else Punctual.now_ns
        return batch


@pytest.fixture
def make(tiny, monkeypatch):
    """A loop and its source, which ends when all is read."""
    monkeypatch.setattr("rt_neds.stream.loop.monotonic_ns", lambda: Punctual.now_ns)
    spec = load_spec(tiny[1] / "bundle")
    model = build_model(tiny[1] / "bundle", spec)

    def make(items, **options):
        source = Punctual(list(items))
        config = ServeConfig(probe="p", bundle="b", **options)
        return assemble(config, spec, model, source, ListSink(), None), source

    return make


@pytest.fixture
def fetched(monkeypatch):
    """Samples that were still to come when it was fetched, and whether with the trunk."""
    told = []

    def noted(self, *, trunk=True):
        told.append((self.of.left, trunk))

    monkeypatch.setattr(Decoder, "fetch", noted)
    return told


def messages(parts):
    """A stream in so many messages a bin, each read a millisecond after it ends."""
    for piece in pieces_of(silence(0, BINS), parts):
        piece.received_ns = round(piece.end / RATE * 1e9) + MS
        yield piece


def run(loop, source, lead, monkeypatch):
    monkeypatch.setattr(loop, "_lead", lead)
    loop._decoder.of = loop._binner
    loop.run(lambda: not source.items)


@pytest.mark.parametrize(
    ("parts", "lead", "left"),
    [
        (20, 1, 30),  # a message a millisecond: the last but one
        (20, 30, 30),
        (20, 31, 60),
        (100, 30, 30),  # five a millisecond: as far ahead as it takes
        (100, 29, 30),
        (4, 30, 150),
        (1, 30, None),  # a message a bin: each closes one
        (20, WIDTH + 1, None),  # longer than a bin: there is never so much time
    ],
)
def test_it_is_fetched_at_the_last_message_that_leaves_time(
    make, fetched, monkeypatch, parts, lead, left
):
    loop, source = make(messages(parts))
    run(loop, source, lead, monkeypatch)
    assert {which for which, _ in fetched} == ({left} if left else set())
    assert len(fetched) <= BINS
    assert len(fetched) >= (BINS - SETTLED if left else 0)


def test_what_is_held_open_closes_later(make, fetched, monkeypatch):
    loop, source = make(messages(20), lateness_ms=5.0)
    run(loop, source, 30, monkeypatch)
    assert {left for left, _ in fetched} == {30}


def test_nothing_is_fetched_of_what_does_not_run_in_real_time(make, fetched, monkeypatch):
    loop, source = make(pieces_of(silence(0, BINS, at_ns=lambda k: k * 1_000_000), 20))
    run(loop, source, 30, monkeypatch)
    assert fetched == []


def test_nothing_is_fetched_behind_the_clock(make, fetched, monkeypatch):
    monkeypatch.setattr(Validity, "lateness", lambda *_: int(Flag.LATE))
    loop, source = make(messages(20))
    run(loop, source, 30, monkeypatch)
    assert fetched == []


def test_what_probes_share_is_fetched_once(make, fetched, monkeypatch):
    made = [make(messages(20)) for _ in range(3)]
    loops = [loop for loop, _ in made]
    for loop in loops:
        monkeypatch.setattr(loop, "_lead", 30)
        loop._decoder.of = loop._binner
    run_together(loops, lambda _: None, lambda: not made[-1][1].items)
    assert len(fetched) > 3 * (BINS - SETTLED)
    assert fetched == [(30, True), (30, False), (30, False)] * (len(fetched) // 3)


def test_the_lead_is_what_the_bytes_take(make):
    loop, _ = make([])
    step = loop._decoder._step
    assert loop._lead == int(np.ceil(step.nbytes / FETCHED_PER_S * 30_000))
    eager = Decoder.__new__(Decoder)
    eager._step = EagerStep.__new__(EagerStep)
    assert eager.fetch_s == 0
    eager.fetch()


@pytest.mark.parametrize("trunk", [True, False])
def test_fetching_changes_nothing(trunk, monkeypatch):
    model = random_model()
    counts_TN, observed_T, _ = random_stream(model, 60)
    step, read = FusedStep(model, "a", NAMES), []
    expected_TO = streamed(step, counts_TN, observed_T)
    step.reset()

    def noted(words):
        read.append(words.nbytes)
        return fetch(words)

    monkeypatch.setattr("rt_neds.stream.fused.fetch", noted)
    for t in range(len(counts_TN)):
        read.clear()
        step.fetch(trunk=trunk)
        np.testing.assert_array_equal(step.step(counts_TN[t], observed_T[t]), expected_TO[t])
    assert sum(read) == step.nbytes - (0 if trunk else step._trunk.weights.nbytes)


@pytest.mark.parametrize("words", [0, 1, 15, 16, 17, 1000])
def test_a_word_of_every_line_is_read(words):
    array = np.arange(1, words + 1, dtype=np.int32)
    assert fetch(array) == array[::16].sum()
