"""What tests of the SpikeGLX source read, and what they should have read."""

import time

import numpy as np

from rt_neds.stream.binner import Binner

RATE, WIDTH, CONTEXT, AP = 30_000.0, 600, 200, 6
LAG = 20
PATIENCE_S = 60


def read_until(source, end, *, epochs=1, meanwhile=None):
    """Batches until some epoch, the n-th, is complete up to a sample."""
    got, deadline = [], time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        batch = source.read(50)
        if meanwhile is not None:
            meanwhile()
        if batch is None:
            continue
        got.append(batch)
        if len({one.epoch for one in got}) >= epochs and batch.end >= end:
            return got
    raise AssertionError(f"only {got[-1].end if got else 'nothing'}; {source.counters}")


def frames_of(batches_, units=AP):
    binner = Binner(np.arange(units, dtype=np.int32), units, WIDTH, CONTEXT)
    frames = [
        (f.bin, f.observed, f.counts_N.tolist(), f.lost)
        for batch in batches_
        for f in binner.frames(batch)
    ]
    assert binner.counters["spikes_late"] == binner.counters["spikes_far"] == 0
    return frames, binner


def expected(data, stretches, *, lag=LAG, settle=0, ap=AP):
    """Bins of the stretches ``[a, b)`` that came whole, by going through them sample by sample."""
    end = stretches[-1][1] - lag
    counts = np.zeros((end // WIDTH + 1, ap))
    seen = np.zeros(end, bool)
    for a, b in stretches:
        seen[a + settle : max(a + settle, b - lag)] = True
        for c in range(ap):
            for s in np.flatnonzero(data[:, c] < -200):
                if max(a + 1, a + settle) <= s < b - lag and data[s - 1, c] >= -200:
                    counts[s // WIDTH, c] += 1
    first = -(-(stretches[0][0] + settle) // WIDTH)
    return [
        (b, bool(seen[b * WIDTH : (b + 1) * WIDTH].all()), counts[b].tolist())
        for b in range(first, end // WIDTH)
    ]


def agree(frames, wanted):
    """Observed bins are equal to the bit, and the same bins are unobserved."""
    assert [f[:2] for f in frames] == [w[:2] for w in wanted]
    for frame, want in zip(frames, wanted, strict=True):
        if want[1]:
            assert frame[2] == want[2]


def read_until_told(source, word):
    deadline = time.monotonic() + PATIENCE_S
    while word not in source.trouble:
        assert time.monotonic() < deadline, source.trouble
        assert source.read(20) is None
