"""Bins are a pure function of the stream."""

import itertools

import numpy as np
import pytest
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rt_neds.frames import SPIKE_DTYPE, SpikeBatch
from rt_neds.stream.binner import Binner, as_pairs, count_spikes, empty_row
from tests.naive import bins_of

UNITS, WIDTH, RATE = 5, 20, 1000.0


def spikes(rng, n, low, high, units=UNITS):
    records = np.zeros(n, SPIKE_DTYPE)
    records["sample"] = rng.integers(low, high, n)
    records["unit"] = rng.integers(0, units, n)
    return records


def batch(first, end, records, epoch=1, seq=0, lost=0):
    return SpikeBatch(epoch, seq, first, end, RATE, 0, 0, records, lost)


def binner(**options):
    settings_ = {"context": 10, "lateness": 0, **options}
    return Binner(np.arange(UNITS, dtype=np.int32), UNITS, WIDTH, **settings_)


def run(binner_, batches):
    out = []
    for b in batches:
        for frame in binner_.frames(b):
            out.append((frame.epoch, frame.bin, frame.observed, frame.counts_N.copy(), frame))
    return out


def accounted(counters):
    names = ("spikes", "spikes_unknown", "spikes_late", "spikes_far", "spikes_outside")
    return sum(counters[name] for name in names)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 300),
    cuts=st.lists(st.integers(0, 2000), max_size=30),
    start=st.integers(0, 100),
)
@example(seed=0, n=54, cuts=[701], start=19)  # the last, open bin lies beyond all that were open
def test_chunking_never_changes_bins(seed, n, cuts, start):
    rng = np.random.default_rng(seed)
    end = start + 2000
    records = spikes(rng, n, start, end, units=UNITS + 2)
    edges = sorted({start, end, *(start + c for c in cuts)})
    batches = []
    for low, high in itertools.pairwise(edges):
        inside = records[(records["sample"] >= low) & (records["sample"] < high)]
        batches.append(batch(low, high, rng.permutation(inside)))
    b = binner()
    frames = run(b, batches)
    first = -(-start // WIDTH)
    assert [bin_ for _, bin_, *_ in frames] == list(range(first, end // WIDTH))
    counts, unknown, *_ = bins_of(records, list(range(UNITS)), UNITS, WIDTH, first, end // WIDTH)
    for row, frame in enumerate(frames):
        np.testing.assert_array_equal(frame[3], counts[row])
        assert frame[4].unknown == unknown[row]
        assert frame[4].spikes == counts[row].sum()
    still_open = int((records["sample"] >= end // WIDTH * WIDTH).sum())
    assert accounted(b.counters) + still_open == n
    assert b.counters["spikes_late"] == b.counters["spikes_far"] == 0


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 300), lateness=st.integers(1, 1600))
@example(seed=0, n=300, lateness=1600)  # more bins are held open than there would be without it
def test_disorder_within_the_lateness_never_changes_bins(seed, n, lateness):
    rng = np.random.default_rng(seed)
    end, step = 2000, 10
    records = spikes(rng, n, 0, end)
    # Each spike arrives with the first batch that ends after its sample plus a random delay.
    arrives = records["sample"] + rng.integers(0, lateness + 1 - step if lateness > step else 1, n)
    batches = [
        batch(low, low + step, records[(arrives >= low) & (arrives < low + step)])
        for low in range(0, end + lateness + 200, step)
    ]
    b = binner(lateness=lateness)
    frames = run(b, batches)
    counts, *_ = bins_of(records, list(range(UNITS)), UNITS, WIDTH, 0, end // WIDTH)
    for row in range(end // WIDTH):
        np.testing.assert_array_equal(frames[row][3], counts[row])
    assert b.counters["spikes_late"] == 0
    assert b.counters["spikes"] == n


def test_a_spike_after_its_bin_closed_is_counted_and_not_moved():
    b = binner()
    early = run(b, [batch(0, 40, spikes(np.random.default_rng(0), 4, 0, 40))])
    late = np.zeros(3, SPIKE_DTYPE)
    late["sample"] = [5, 39, 41]
    frames = run(b, [batch(40, 60, late)])
    assert len(early) == 2
    assert len(frames) == 1
    assert frames[0][4].late == 2
    assert frames[0][4].spikes == 1
    assert b.counters["spikes_late"] == 2


def test_one_batch_longer_than_all_open_bins():
    rng = np.random.default_rng(0)
    records = spikes(rng, 5000, 0, 300 * WIDTH)
    frames = run(binner(), [batch(0, 300 * WIDTH, records)])
    counts, *_ = bins_of(records, list(range(UNITS)), UNITS, WIDTH, 0, 300)
    np.testing.assert_array_equal(np.stack([f[3] for f in frames]), counts)


def test_an_absurd_sample_is_counted_and_ends_nowhere():
    b = binner()
    records = np.zeros(2, SPIKE_DTYPE)
    records["sample"] = [10, 10**12]
    frames = run(b, [batch(0, 20, records), batch(20, 40, records[:0])])
    assert [f[4].spikes for f in frames] == [1, 0]
    assert b.counters["spikes_far"] == 1
    negative = np.zeros(1, SPIKE_DTYPE)
    negative["sample"] = -5
    run(b, [batch(40, 60, negative)])
    assert b.counters["spikes_late"] == 1


def test_a_short_hole_is_filled_with_unobserved_bins():
    b = binner(context=10)
    full = spikes(np.random.default_rng(1), 50, 0, 100)
    frames = run(b, [batch(0, 50, full[full["sample"] < 50]), batch(90, 200, full[:0])])
    observed = [f[2] for f in frames]
    assert [f[1] for f in frames] == list(range(10))
    assert observed == [True, True, False, False, False, True, True, True, True, True]
    assert b.counters["samples_lost"] == 40
    assert b.counters["bins_unobserved"] == 3
    assert not frames[5][4].first_of_run


@settings(deadline=None, max_examples=100)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 70)), min_size=1, max_size=30),
    lateness=st.sampled_from([0, 7, 2 * WIDTH]),
)
@example(pieces=[(0, 50), (1, 9), (0, 60)], lateness=0)
@example(pieces=[(0, 60), (20, 40), (0, 60)], lateness=2 * WIDTH)  # from edge to edge
def test_a_bin_is_observed_if_and_only_if_all_its_samples_came(pieces, lateness):
    b, end, came, frames = binner(lateness=lateness), 0, set(), []
    for k, (hole, length) in enumerate(pieces):
        first = end + (hole if k else 0)
        end = first + length
        came |= set(range(first, end))
        frames += run(b, [batch(first, end, np.zeros(0, SPIKE_DTYPE))])
    bins = (end - lateness) // WIDTH
    observed = [came >= set(range(n * WIDTH, (n + 1) * WIDTH)) for n in range(max(0, bins))]
    assert [f[2] for f in frames] == observed
    assert b.counters["samples_lost"] == end - len(came)
    assert b.counters["bins_unobserved"] == observed.count(False)
    assert all(to > len(observed) * WIDTH for _, to in b._holes)  # and else they are forgotten


@pytest.mark.parametrize(("end", "bins"), [(259, range(14)), (260, [0, 1, 13])])
def test_a_hole_is_skipped_from_as_many_whole_bins_on_as_the_context_has(end, bins):
    b, none = binner(context=10), np.zeros(0, SPIKE_DTYPE)
    frames = run(b, [batch(0, 45, none), batch(end, 280, none)])
    assert [f[1] for f in frames] == list(bins)
    assert b.counters["bins_skipped"] == 14 - len(bins)


def test_a_hole_longer_than_the_context_is_skipped_and_accounted_for():
    b = binner(context=10)
    rng = np.random.default_rng(1)
    before, after = spikes(rng, 7, 0, 50), spikes(rng, 5, 1010, 1100)
    frames = run(b, [batch(0, 50, before), batch(1010, 1100, after)])
    assert [f[1] for f in frames] == [0, 1, 51, 52, 53, 54]
    assert [f[4].first_of_run for f in frames] == [True, False, True, False, False, False]
    assert b.counters["bins_skipped"] == 49
    assert b.counters["samples_lost"] == 960
    assert accounted(b.counters) == 12


@pytest.mark.parametrize("then", [(0, 60, 2), (5000, 5060, 1)])
def test_what_is_complete_and_only_held_open_comes_out_before_another_run(then):
    b, rng = binner(lateness=5 * WIDTH), np.random.default_rng(1)
    first = [batch(k * WIDTH, (k + 1) * WIDTH, spikes(rng, 3, k * WIDTH, (k + 1) * WIDTH))
             for k in range(9)]  # fmt: skip
    half = batch(9 * WIDTH, 9 * WIDTH + WIDTH // 2, spikes(rng, 2, 9 * WIDTH, 9 * WIDTH + 5))
    frames = run(b, [*first, half, batch(*then[:2], np.zeros(0, SPIKE_DTYPE), epoch=then[2])])
    assert [(f[0], f[1]) for f in frames[:9]] == [(1, k) for k in range(9)]
    assert all(f[3].sum() == 3 for f in frames[:9])
    assert not any(f[4].first_of_run for f in frames[1:9])
    assert b.counters["spikes_outside"] == 2  # of the bin that was cut
    assert accounted(b.counters) == 29


def test_a_new_epoch_begins_anew_with_its_own_bin_numbers():
    b = binner()
    none = np.zeros(0, SPIKE_DTYPE)
    frames = run(b, [batch(1000, 1100, none, epoch=1), batch(0, 60, none, epoch=2)])
    assert [(f[0], f[1]) for f in frames] == [
        *((1, k) for k in range(50, 55)),
        *((2, k) for k in range(3)),
    ]
    assert [f[4].first_of_run for f in frames] == [True, *[False] * 4, True, False, False]


def test_another_run_has_no_spike_and_no_hole_of_the_one_before():
    b, records = binner(), np.zeros(2, SPIKE_DTYPE)
    records["sample"], records["unit"] = 69, [0, UNITS]
    run(b, [batch(0, 65, records[:0]), batch(68, 70, records)])
    frames = run(b, [batch(0, 200, records[:0], epoch=2)])
    assert [(f[1], f[2], f[4].spikes + f[4].unknown) for f in frames] == [
        (n, True, 0) for n in range(10)
    ]
    assert not any(f[3].any() for f in frames)
    assert b.counters["spikes_outside"] == 2


def test_lost_messages_are_said_on_the_next_frame():
    none = np.zeros(0, SPIKE_DTYPE)
    frames = run(binner(), [batch(0, 10, none), batch(10, 40, none, lost=3)])
    assert [f[4].lost for f in frames] == [3, 0]


def test_what_was_lost_and_late_while_a_bin_was_open_is_summed_on_it():
    b, late = binner(), np.zeros(1, SPIKE_DTYPE)
    run(b, [batch(0, 40, late[:0]), batch(40, 48, late, lost=1), batch(48, 55, late, lost=2)])
    run(b, [batch(30, 45, late[:0])])  # what ends earlier takes nothing back
    frames = run(b, [batch(55, 80, late[:0])])
    assert [(f[2], f[4].lost, f[4].late) for f in frames] == [(True, 3, 2), (True, 0, 0)]
    assert b.counters["samples_lost"] == 0


def test_who_goes_on_in_the_middle_of_a_bin_knows_what_was_missing_of_it_and_late():
    before, after, late = binner(), binner(), np.zeros(1, SPIKE_DTYPE)
    run(before, [batch(0, 45, late[:0]), batch(50, 55, late, lost=3)])
    after.go_on_from(before)
    frames = run(after, [batch(55, 80, late)])
    assert [f[1:3] for f in frames] == [(2, False), (3, True)]
    assert [(f[4].lost, f[4].late, f[4].first_of_run) for f in frames] == [
        (3, 2, True),
        (0, 0, False),
    ]
    assert (after.counters["spikes_late"], after.counters["spikes_outside"]) == (2, 0)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 400), first=st.integers(0, 50))
def test_kernel_equals_its_naive_twin(seed, n, first):
    rng = np.random.default_rng(seed)
    records = spikes(rng, n, 0, 3000, units=9)
    records["unit"][: n // 9] += 1 << 16  # whoever sends may number units as it likes
    rows = np.array([3, -1, 0, 2, 1, 4, -1], np.int32)
    ring = np.zeros((60, UNITS + 2), np.float32)
    tally = count_spikes(as_pairs(records), rows, ring, first, first + 60, WIDTH)
    counts, unknown, before, after = bins_of(records, rows, UNITS, WIDTH, first, first + 60)
    order = [(first + i) % 60 for i in range(60)]
    np.testing.assert_array_equal(ring[order, :UNITS], counts)
    np.testing.assert_array_equal(ring[order, UNITS], unknown)
    np.testing.assert_array_equal(ring[order, UNITS + 1], counts.sum(axis=1))
    assert tally == (before, after)
    taken = np.zeros(UNITS, np.float32)
    for t, row in enumerate(order):
        assert empty_row(ring, row, taken) == (unknown[t], counts[t].sum())
        np.testing.assert_array_equal(taken, counts[t])
    assert not ring.any()


def through_a_socket(payload):
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        port = push.bind_to_random_port("tcp://127.0.0.1")
        with context.socket(zmq.PULL) as pull:
            pull.connect(f"tcp://127.0.0.1:{port}")
            push.send(payload)
            return pull.recv()


def test_one_signature_whatever_the_buffer(tmp_path):
    records = spikes(np.random.default_rng(0), 100, 0, 1000)
    (tmp_path / "spikes").write_bytes(records.tobytes())
    mapped = np.memmap(tmp_path / "spikes", SPIKE_DTYPE, mode="r")
    shifted = np.frombuffer(b"x" + records.tobytes(), np.uint8)[1:].view(SPIKE_DTYPE)
    buffers = [records, mapped, np.frombuffer(records.tobytes(), SPIKE_DTYPE), shifted]
    buffers.append(np.frombuffer(through_a_socket(records.tobytes()), SPIKE_DTYPE))
    buffers.append(np.repeat(records, 2)[::2])
    results = []
    for buffer in buffers:
        ring = np.zeros((60, UNITS + 2), np.float32)
        count_spikes(as_pairs(buffer), np.arange(5, dtype=np.int32), ring, 0, 60, WIDTH)
        results.append(ring)
    for ring in results[1:]:
        np.testing.assert_array_equal(ring, results[0])
    assert len(count_spikes.signatures) == 1
