"""A session on its way out: all that was recorded of it, once, in its own time."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_neds import cli
from rt_neds.children import free_port
from rt_neds.frames import SPIKE_DTYPE
from rt_neds.replay import batches, on_time, replay
from rt_neds.session import Session, load_session
from rt_neds.wire import unpack_behaviour, unpack_spikes
from tests.hearing import heard_while
from tests.making import write_session

RATE = 1000.0


def session_of(spikes, *pieces):
    records_S = np.zeros(len(spikes), SPIKE_DTYPE)
    records_S["sample"] = sorted(spikes)
    return Session(Path("s.h5"), "s", RATE, ["s/0"], records_S, np.array(pieces, np.int64))


@given(
    st.lists(st.integers(0, 99), max_size=40),
    st.sampled_from([0.01, 1, 2.6, 7, 500]),
    st.integers(-5, 110),
    st.one_of(st.none(), st.integers(-5, 110)),
)
@settings(deadline=None)
def test_all_that_was_recorded_of_a_part_is_sent_once(spikes, batch_ms, first, end):
    pieces = (10, 40), (60, 95)
    sent = list(batches(session_of(spikes, *pieces), batch_ms, epoch=7, first=first, end=end))
    last = 95 if end is None else end
    wanted = [n for low, high in pieces for n in range(max(low, first), min(high, last))]
    assert [n for batch in sent for n in range(batch.first, batch.end)] == wanted
    expected = [n for n in sorted(spikes) if n in wanted]
    assert [n for batch in sent for n in batch.records_S["sample"].tolist()] == expected
    step = max(1, round(batch_ms))
    for n, batch in enumerate(sent):
        assert (batch.epoch, batch.seq, batch.rate) == (7, n, RATE)
        assert all(batch.first <= at < batch.end for at in batch.records_S["sample"])
        assert 0 < batch.end - batch.first <= step
    for one, after in pairwise(sent):
        assert one.end - one.first == step or one.end in (40, 95)
        assert after.first - one.end in (0, max(60, first) - 40)


def heard(session, **options):
    """What a subscriber hears of a replay, topics and all, and what the replay says."""
    bind, result = f"tcp://127.0.0.1:{free_port()}", {}

    def send():
        result.update(replay(session, "p", bind=bind, epoch=7, wait_s=20, **options))

    messages = [frames for frames, _ in heard_while(bind, send)]
    return messages, result


def spikes_of(messages):
    return [unpack_spikes(*of[1:], 0) for of in messages if of[0] == b"spikes/p"]


def test_a_part_is_sent_as_fast_as_it_is_taken(tmp_path):
    session = load_session(write_session(tmp_path / "s.h5", seconds=20))
    messages, result = heard(session, speed=0, batch_ms=50, from_s=1.5, to_s=4)
    assert messages[0][0] == b"source/p"
    came = spikes_of(messages)
    assert (came[0].first, came[-1].end) == (45_000, 120_000)
    assert (result["first"], result["end"]) == (45_000, 120_000)
    samples_S = session.records_S["sample"]
    inside_S = session.records_S[(samples_S >= 45_000) & (samples_S < 120_000)]
    np.testing.assert_array_equal(np.concatenate([b.records_S for b in came]), inside_S)
    assert (result["messages"], result["spikes"]) == (len(came), len(inside_S))
    assert (result["zero_ns"], result["behind_ms_max"]) == (None, 0)


@pytest.mark.parametrize("speed", [1.0, 4.0])
def test_no_message_goes_before_it_would_have_been_recorded(tmp_path, speed):
    session = load_session(write_session(tmp_path / "s.h5", seconds=5))
    seconds = 1.3 * speed
    messages, result = heard(session, speed=speed, batch_ms=100, from_s=0.5, to_s=0.5 + seconds)
    came = spikes_of(messages)
    begin_ns = came[0].sent_ns - round((came[0].end - 15_000) / 3e4 / speed * 1e9)
    if speed == 1:
        assert result["zero_ns"] + 500_000_000 <= begin_ns
        begin_ns = result["zero_ns"] + 500_000_000
    else:
        assert result["zero_ns"] is None
        begin_ns -= round(result["behind_ms_max"] * 1e6)
    for batch in came:
        assert batch.sent_ns >= begin_ns + (batch.end - 15_000) / 3e4 / speed * 1e9 - 1000
    assert result["seconds"] < 2 * seconds or speed == 1
    # Who comes later hears whose spikes these are, about once a second.
    assert 2 <= [of[0] for of in messages].count(b"source/p") <= 1 + result["seconds"]


def test_a_behaviour_follows_the_first_spikes_and_goes_before_those_of_its_bin(tmp_path):
    session = load_session(write_session(tmp_path / "s.h5", seconds=20))
    live = {"speed": "wheel.wheel_speed"}
    messages, _ = heard(session, speed=0, batch_ms=50, from_s=1, to_s=2, live=live)
    assert [of[0] for of in messages[:2]] == [b"source/p", b"spikes/p"]
    ends, values = [], []
    for what, *of in messages:
        if what == b"behaviour/speed":
            values.append(unpack_behaviour("speed", *of))
            assert len(ends) < 2 or values[-1].first > ends[-1]
        elif what == b"spikes/p":
            ends.append(unpack_spikes(*of, 0).end)
    assert [(one.seq, one.first, one.rate) for one in values] == [
        (n, 600 * (50 + n), 50.0) for n in range(51)
    ]
    assert {one.epoch for one in values} == {7}


def test_who_sends_in_real_time_or_slower_may_run_first():
    assert [on_time(speed) for speed in (0.0, 0.5, 1.0, 2.0)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--bundle", "b"], "--bundle says what --live NAME means; name one"),
        (["--live", "x", "--as", "openephys"], "beside our own stream only"),
        (["--raw", "f.bin"], "--as spikeglx"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, args, words):
    session = [] if "--raw" in args else ["--session", "s.h5"]
    assert cli.main(["replay", *session, "--probe", "p", *args]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert words in told
