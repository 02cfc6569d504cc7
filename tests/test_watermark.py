"""Up to which sample Open Ephys is complete: by data, by spikes, across loss and restarts."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rt_neds.stream.watermark import BEYOND, DEFAULT_LATENESS_MS, TAIL, UNDECIDED, Watermark

RATE, BLOCK = 30_000.0, 1024
LATENESS = round(DEFAULT_LATENESS_MS * 30)
BACK, LEAP = 30_000, 60 * 30_000


def begun(whole=True, lateness_ms=0.0):
    watermark = Watermark(RATE, lateness_ms)
    watermark.begin(whole=whole)
    return watermark


def blocks(watermark, first, count):
    spans = []
    for k in range(first, first + count):
        spans += watermark.see_block(k * BLOCK, (k + 1) * BLOCK)
    return spans


def test_a_block_completes_all_but_its_tail():
    watermark = begun()
    assert watermark.see(900) == []
    assert blocks(watermark, 0, 1) == [(0, BLOCK - TAIL)]
    assert watermark.see(5000) == []
    assert watermark.see_block(0, BLOCK) == []  # the next channel of the same block
    assert blocks(watermark, 1, 1) == [(BLOCK - TAIL, 2 * BLOCK - TAIL)]


def test_a_lateness_is_held_beside_the_tail():
    assert blocks(begun(lateness_ms=10), 0, 1) == [(0, BLOCK - TAIL - 300)]


def test_whoever_joins_midway_begins_behind_the_first_block():
    assert blocks(begun(whole=False), 7, 2) == [
        (8 * BLOCK - TAIL, 8 * BLOCK - TAIL),
        (8 * BLOCK - TAIL, 9 * BLOCK - TAIL),
    ]


def test_loss_leaves_a_hole_as_wide_as_what_may_be_missing():
    watermark = begun()
    blocks(watermark, 0, 3)
    watermark.lose()
    at = 5 * BLOCK - TAIL
    assert blocks(watermark, 4, 1) == [(at, at)]  # first beyond the last end: a hole
    assert blocks(watermark, 5, 1) == [(at, at + BLOCK)]


def test_what_is_held_back_does_not_make_a_hole_narrower():
    """Of a block that came, all but its tail may have been in what was lost."""
    watermark = begun(lateness_ms=10)
    blocks(watermark, 0, 3)
    watermark.lose()
    at = 5 * BLOCK - TAIL
    assert blocks(watermark, 4, 1) == [(at, at)]
    assert blocks(watermark, 5, 1) == [(at, at + BLOCK - 300)]
    joined = begun(whole=False, lateness_ms=10)
    assert blocks(joined, 4, 2) == [(at, at), (at, at + BLOCK - 300)]


def test_blocks_shorter_than_the_tail_do_not_hide_a_loss():
    watermark = begun()
    spans = [watermark.see_block(k * 30, (k + 1) * 30) for k in range(10)]
    assert spans[:4] == [[(0, 0)], [(0, 0)], [(0, 0)], [(0, 20)]]
    watermark.lose()
    assert watermark.see_block(300, 330) == [(230, 230)]


def test_what_was_not_recorded_is_a_hole_and_the_tail_before_it_is_complete():
    watermark = begun()
    blocks(watermark, 0, 2)
    assert watermark.see_block(9000, 9000 + BLOCK) == [
        (2 * BLOCK - TAIL, 2 * BLOCK),
        (9000, 9000 + BLOCK - TAIL),
    ]


def test_by_spikes_it_follows_the_newest_less_the_lateness():
    watermark = begun()
    spans = []
    for sample in range(2000, 2000 + 4 * LATENESS, 50):
        spans += watermark.see(sample)
    assert watermark.by_data is False
    assert spans[0][0] == max(0, 2000 - LATENESS)
    assert spans[-1][1] == (2000 + 4 * LATENESS - 50 - LATENESS) // 30 * 30
    assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_it_is_decided_once_no_block_came_for_several_latenesses():
    watermark = begun()
    watermark.see(0)
    assert watermark.see(UNDECIDED * LATENESS) == []
    assert watermark.by_data is None
    assert watermark.see(UNDECIDED * LATENESS + 1)
    assert watermark.by_data is False


def test_by_spikes_loss_makes_everything_suspect_that_may_still_have_come():
    watermark = begun()
    for sample in range(0, 20_000, 10):
        watermark.see(sample)
    complete = watermark.end
    watermark.lose()
    spans = []
    for sample in range(20_000, 30_000, 10):
        spans += watermark.see(sample)
    trusted = [span for span in spans if span[0] < span[1]]
    assert trusted[0][0] == 20_000 + LATENESS
    assert all(first == end for first, end in spans if end <= 20_000 + LATENESS)
    assert spans[0][0] > complete


def test_what_was_lost_by_spikes_is_as_suspect_once_blocks_come():
    watermark = begun()
    for sample in range(0, 20_000, 10):
        watermark.see(sample)
    watermark.lose()
    watermark.see(20_000)
    at = 20 * BLOCK - TAIL
    assert at < 20_000 + LATENESS
    assert blocks(watermark, 19, 1) == [(at, at)]
    assert blocks(watermark, 20, 1) == [(at, at + BLOCK)]


def test_a_block_takes_nothing_back_that_spikes_have_completed():
    watermark = begun(lateness_ms=5)
    for sample in range(0, 20_000, 10):
        watermark.see(sample)
    complete = watermark.end
    assert complete > 20_000 - 150 - 30
    assert watermark.see_block(19_000, 20_000) == [(complete, complete)]


def test_by_spikes_it_begins_before_the_oldest_and_not_where_another_was_suspect():
    watermark = begun()
    watermark.lose()
    watermark.see(50_000)
    watermark.begin(whole=True)
    spans = [span for sample in (5000, 4000, 20_000) for span in watermark.see(sample)]
    assert spans == [(4000 - LATENESS, (20_000 - LATENESS) // 30 * 30)]


def test_by_spikes_a_new_acquisition_does_not_begin_where_the_last_did():
    watermark = begun()
    watermark.see(100)
    watermark.begin(whole=True)
    spans = [span for sample in (50_000, 60_000) for span in watermark.see(sample)]
    assert spans == [(50_000 - LATENESS, (60_000 - LATENESS) // 30 * 30)]


def test_by_spikes_an_older_one_takes_nothing_back():
    watermark = begun()
    for sample in (0, 10_000, 20_000):
        watermark.see(sample)
    watermark.lose()
    watermark.see(19_900)
    assert watermark.newest == 20_000
    assert watermark.see(30_000)[0][0] == 20_000 + LATENESS  # so far something may be missing


def test_by_spikes_a_second_back_or_a_minute_ahead_is_another_acquisition():
    watermark = begun()
    assert not watermark.breaks(10**9)  # nothing to go by
    watermark.see(100_000)
    assert not watermark.breaks(100_000 - BACK)
    assert watermark.breaks(100_000 - BACK - 1)
    assert not watermark.breaks(100_000 + LEAP)
    assert watermark.breaks(100_000 + LEAP + 1)
    assert not watermark.jumps(100_000 + BACK)
    assert watermark.jumps(100_000 + BACK + 1)


def test_a_block_that_follows_leaves_nothing_out():
    watermark = begun()
    blocks(watermark, 0, 3)
    assert not watermark.block_jumps(3 * BLOCK)
    assert watermark.block_jumps(3 * BLOCK + 1)


def test_spikes_that_come_before_their_block_do_not_say_that_none_will():
    watermark = begun()
    blocks(watermark, 0, 3)
    for k in range(10 * BEYOND):
        assert watermark.see(3 * BLOCK + k) == []
    assert watermark.by_data is True


def test_by_data_no_spike_begins_another_acquisition_nor_leaves_anything_out():
    watermark = begun()
    blocks(watermark, 0, 60)
    assert not watermark.breaks(0)
    assert not watermark.breaks(60 * BLOCK + LEAP + 1)
    assert not watermark.jumps(60 * BLOCK + 2 * BACK)


def test_deselected_channels_are_noticed():
    watermark = begun()
    blocks(watermark, 0, 2)
    far = 3 * BLOCK + 40_000
    assert not any(watermark.see(far + k) for k in range(BEYOND - 1))
    blocks(watermark, 2, 1)  # not yet: these only were early
    spans = [watermark.see(far + k) for k in range(BEYOND)]
    assert not any(spans[:-1])
    assert spans[-1]
    assert watermark.by_data is False
    assert blocks(watermark, 60, 1)  # and selected again
    assert watermark.by_data is True


def test_channels_that_are_selected_again_leave_no_hole_and_begin_nothing_anew():
    watermark = begun()
    blocks(watermark, 0, 3)
    for sample in range(3 * BLOCK, 3 * BLOCK + 2 * LEAP, 100):
        watermark.see(sample)
    assert watermark.by_data is False
    complete, first = watermark.end, 3 * BLOCK + 2 * LEAP - 500
    assert not watermark.block_breaks(first)
    assert watermark.see_block(first, first + BLOCK) == [(complete, first + BLOCK - TAIL)]
    assert watermark.by_data is True


def test_the_clock_stands_in_only_by_spikes_and_only_so_far():
    watermark = begun()
    assert watermark.pass_to(10_000) == []
    for sample in range(0, 20_000, 10):
        watermark.see(sample)
    complete = watermark.end
    assert watermark.pass_to(25_000) == [(complete, (25_000 - LATENESS) // 30 * 30)]
    assert watermark.pass_to(24_000) == []
    assert watermark.newest == 25_000
    assert watermark.pass_to(1 << 45) == []
    by_data = begun()
    blocks(by_data, 0, 3)
    assert by_data.pass_to(10_000) == []


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("spike"), st.integers(0, 1 << 45)),
            st.tuples(st.just("near"), st.integers(-3000, 3000)),
            st.tuples(st.just("block"), st.integers(0, 60)),
            st.tuples(st.just("lose"), st.just(0)),
            st.tuples(st.just("pass"), st.integers(0, 5000)),
        ),
        max_size=120,
    ),
    st.booleans(),
    st.sampled_from([0.0, 5.0, 60.0]),
)
def test_whatever_comes_it_never_goes_back_and_never_leaps(steps, whole, lateness_ms):
    watermark = begun(whole, lateness_ms)
    newest, end = 0, None
    for kind, value in steps:
        spans = []
        if kind in ("spike", "near"):
            sample = value if kind == "spike" else max(0, newest + value)
            if not watermark.breaks(sample):
                newest = max(newest, sample)
                spans = watermark.see(sample)
        elif kind == "block":
            first = value * BLOCK
            if not watermark.block_breaks(first):
                newest = max(newest, first + BLOCK)
                spans = watermark.see_block(first, first + BLOCK)
        elif kind == "pass":
            spans = watermark.pass_to(newest + value)
            newest = max(newest, newest + value if spans else newest)
        else:
            watermark.lose()
        for first, to in spans:
            assert 0 <= first <= to
            assert end is None or end <= first
            assert to <= newest + 1 or first == to
            end = to
        assert watermark.end == end


@pytest.mark.parametrize("first", [0, 2 * BLOCK - 1, 3 * BLOCK + 61 * 30_000])
def test_blocks_that_go_back_or_leap_belong_to_another_acquisition(first):
    watermark = begun()
    blocks(watermark, 0, 3)
    assert watermark.block_breaks(first)
    assert not watermark.block_breaks(3 * BLOCK)
    assert not watermark.block_breaks(2 * BLOCK)
