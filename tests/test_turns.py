"""Of two workers that decode the same stream: each bin goes out once, in order, whoever is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rt_neds.stream.gate import Frame, Turns

HOLD = 10
ACTIVE, OTHER = 0, 1


def frame(bin_, writer=ACTIVE, epoch=1):
    return Frame(epoch, bin_, writer, (b"decoded/p", bytearray()))


def bins(frames):
    return [(f.epoch, f.bin, f.writer) for f in frames]


def test_the_standby_waits_and_takes_over_at_the_first_bin_that_is_missed():
    turns = Turns(HOLD)
    assert bins(turns.take(ACTIVE, frame(0), 0)) == [(1, 0, ACTIVE)]
    assert turns.take(OTHER, frame(0, OTHER), 1) == []
    assert turns.take(OTHER, frame(1, OTHER), 20) == []
    assert turns.due_ns == 20 + HOLD
    assert turns.overdue(29) == []
    assert bins(turns.take(ACTIVE, frame(1), 29)) == [(1, 1, ACTIVE)]
    assert turns.due_ns is None
    assert turns.take(OTHER, frame(2, OTHER), 40) == []
    assert turns.take(OTHER, frame(3, OTHER), 45) == []
    assert bins(turns.overdue(50)) == [(1, 2, OTHER), (1, 3, OTHER)]
    assert turns.active == OTHER
    assert bins(turns.take(OTHER, frame(4, OTHER), 60)) == [(1, 4, OTHER)]
    # The one that had only paused comes again with what it owes: nobody needs it any more.
    assert [turns.take(ACTIVE, frame(n), 61) for n in (2, 3, 4)] == [[], [], []]
    assert turns.take(ACTIVE, frame(5), 62) == []
    assert bins(turns.take(OTHER, frame(5, OTHER), 63)) == [(1, 5, OTHER)]


def test_what_the_active_one_leaves_out_comes_from_the_other():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(0), 0)
    for n in (1, 2, 3):
        turns.take(OTHER, frame(n, OTHER), 1)
    came = turns.take(ACTIVE, frame(3), 2)
    assert bins(came) == [(1, 1, OTHER), (1, 2, OTHER), (1, 3, ACTIVE)]
    assert turns.active == ACTIVE


def test_a_replacement_waits_behind_the_one_whose_context_is_full():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(0), 0)
    turns.take(OTHER, frame(0, OTHER), 0)
    assert turns.take(ACTIVE, frame(1, writer=2), 1) == []
    assert bins(turns.take(OTHER, frame(1, OTHER), 2)) == [(1, 1, OTHER)]
    assert turns.active == OTHER
    alone = Turns(HOLD)
    alone.take(ACTIVE, frame(0), 0)
    assert bins(alone.take(ACTIVE, frame(5, writer=2), 1)) == [(1, 5, 2)]


def test_a_replacement_is_known_by_the_first_thing_it_says():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(0), 0)
    turns.take(OTHER, frame(0, OTHER), 0)
    assert turns.take(OTHER, frame(1, OTHER), 1) == []
    assert bins(turns.meet(ACTIVE, 2)) == [(1, 1, OTHER)]
    assert turns.active == OTHER
    assert turns.meet(OTHER, OTHER) == turns.meet(ACTIVE, 2) == []


@pytest.mark.parametrize("next_epoch", [2, 0])  # an older capture may be replayed next
def test_an_acquisition_that_is_over_does_not_come_back(next_epoch):
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(7), 0)
    turns.take(OTHER, frame(8, OTHER), 1)
    came = turns.take(ACTIVE, frame(0, epoch=next_epoch), 2)
    assert bins(came) == [(1, 8, OTHER), (next_epoch, 0, ACTIVE)]
    assert turns.refused == 0
    assert turns.take(OTHER, frame(8, OTHER), 3) == []  # it went out already
    assert turns.refused == 0
    assert turns.take(OTHER, frame(9, OTHER), 3) == []
    assert turns.refused == 1
    assert turns.due_ns is None
    assert turns.overdue(100) == []


def test_a_replacement_that_is_behind_brings_no_acquisition_back():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(7), 0)
    turns.take(ACTIVE, frame(0, epoch=2), 1)
    assert turns.take(ACTIVE, frame(8, writer=2), 2) == []
    assert turns.refused == 1


def test_acquisitions_that_are_over_are_not_remembered_for_ever():
    turns = Turns(HOLD)
    for epoch in range(100):
        assert bins(turns.take(ACTIVE, frame(3, epoch=epoch), 0)) == [(epoch, 3, ACTIVE)]
    assert turns.take(OTHER, frame(4, OTHER, epoch=98), 0) == []
    assert len(turns._over) < 20


@given(st.lists(st.sampled_from([ACTIVE, OTHER]), max_size=60), st.integers(2, 4))
def test_an_acquisition_that_is_sent_again_is_published_again(who, times):
    """As of two captures that are replayed in turn; either worker may be a little ahead."""
    sent = [(epoch, bin_) for epoch in [1, 2] * times for bin_ in range(3)]
    turns, at, out = Turns(HOLD), [0, 0], []

    def step(place):
        if at[place] < len(sent):
            epoch, bin_ = sent[at[place]]
            out.extend(turns.take(place, frame(bin_, place, epoch), 0))
            at[place] += 1

    step(ACTIVE)
    for place in who:
        if abs(at[place] + 1 - at[1 - place]) <= 2:
            step(place)
    while at[ACTIVE] < len(sent):
        step(ACTIVE)
    assert [(f.epoch, f.bin) for f in out] == sent
    assert turns.refused == 0


def test_a_gate_in_the_place_of_another_repeats_nothing():
    turns = Turns(HOLD, last=(1, 4))
    assert turns.take(OTHER, frame(4, OTHER), 0) == []
    assert bins(turns.take(OTHER, frame(5, OTHER), 1)) == [(1, 5, OTHER)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["active", "other", "both", "restart", "wait"]), st.integers(1, 25)
        ),
        max_size=80,
    )
)
def test_every_bin_that_anyone_delivered_goes_out_once_and_in_order(events):
    """Workers that pause, leave out bins, and are replaced; both number bins alike."""
    turns, now, out, delivered = Turns(HOLD), 0, [], set()
    next_bin, writer = [0, 0], [ACTIVE, OTHER]
    for what, amount in events:
        now += amount
        out += turns.overdue(now)
        places = {"active": [0], "other": [1], "both": [0, 1]}.get(what, [])
        for place in places:
            at = next_bin[place]
            next_bin[place] += 1
            delivered.add(at)
            out += turns.take(place, frame(at, writer[place]), now)
        if what == "restart":
            place = amount % 2
            writer[place] += 2
            next_bin[place] = max(next_bin)
    out += turns.overdue(now + HOLD)
    numbers = [f.bin for f in out]
    assert numbers == sorted(set(numbers))
    assert set(numbers) <= delivered
    if delivered:
        assert {n for n in delivered if n > numbers[0]} <= set(numbers)
