"""Open Ephys: loss, restarts and garbage are told exactly, and wrong addresses in one line."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rt_neds.stream.openephys as module
from rt_neds.clock import ClockFit
from rt_neds.errors import ConfigError, StreamError
from rt_neds.openephys_emulator import Emulator, next_port, pieces, send_session
from rt_neds.stream.acquisitions import Acquisitions
from rt_neds.stream.binner import Binner
from rt_neds.stream.openephys import MAX_CHANNELS, OpenEphysSource
from rt_neds.stream.validity import Validity
from rt_neds.stream.watermark import TAIL
from tests import naive_openephys as naive
from tests.openephys.checking import (
    BLOCK,
    CONTEXT,
    RATE,
    WIDTH,
    accounted,
    bins_of,
    fed,
    known,
    native,
    through_sockets,
)
from tests.test_openephys_wire import mutated


@pytest.mark.parametrize("channels", [1, 0])
def test_lost_messages_are_reported_exactly_and_flagged_where_they_may_matter(
    session, port, channels
):
    lose = {200, 201, 202, 355, 400}
    got, source = through_sockets(
        session, port, lambda e: send_session(e, session, speed=0), channels=channels, lose=lose
    )
    frames, _ = bins_of(got, 6)
    assert source.counters["lost"] == len(lose) == sum(f[4] for f in frames)
    expected = native(session)
    wrong = [f[1] for f in frames if f[1] in expected and f[3] != expected[f[1]][1]]
    flagged = {f[1] for f in frames if not f[2]}
    assert wrong  # otherwise nothing of interest was lost
    assert set(wrong) <= flagged
    # By data a block and its tail; by spikes a lateness before, one after, and the time between.
    assert len(flagged) <= 3 * (5 if channels else 12)
    assert accounted(source)


def test_a_restart_is_a_new_epoch_with_the_same_bins(session, port):
    def twice(emulator):
        send_session(emulator, session, speed=0)
        send_session(emulator, session, speed=0)

    got, source = through_sockets(session, port, twice)
    frames, _ = bins_of(got, 6)
    epochs = sorted({f[0] for f in frames})
    assert source.counters["epochs"] == len(epochs) == 2
    first, second = ([f[1:4] for f in frames if f[0] == epoch] for epoch in epochs)
    assert first == second
    assert source.counters["lost"] == 0


def test_a_restart_whose_first_messages_were_lost_says_how_many(source):
    fed(source, [naive.data(1 + k, 0, k * BLOCK, BLOCK) for k in range(5)])
    got = fed(source, [naive.data(4 + k, 0, (3 + k) * BLOCK, BLOCK) for k in range(3)])
    assert source.counters["epochs"] == 2
    assert source.counters["lost"] == 3
    assert [batch.lost for batch in got] == [3, 0, 0]
    assert got[0].first == got[0].end == 4 * BLOCK - TAIL


def test_all_that_was_lost_before_a_batch_is_said_with_it(source):
    fed(source, [naive.data(1, 0, 0, BLOCK)])
    spikes = [naive.spike(number, "E1", BLOCK + number) for number in (4, 8)]
    got = fed(
        source, [*spikes, naive.data(9, 0, BLOCK, BLOCK), naive.data(10, 0, 2 * BLOCK, BLOCK)]
    )
    assert [batch.lost for batch in got] == [5, 0]


def test_a_message_that_comes_twice_is_a_repetition_unless_it_is_the_first(source):
    first, second = naive.data(1, 0, 0, BLOCK), naive.data(2, 0, BLOCK, BLOCK)
    fed(source, [first, first])
    assert (source.counters["epochs"], source.counters["repeated"]) == (2, 0)
    fed(source, [second, second])
    assert (source.counters["epochs"], source.counters["repeated"]) == (2, 1)
    assert source.counters["lost"] == 0


def test_an_acquisition_that_goes_back_without_counting_anew_is_another(source):
    fed(source, [naive.data(1 + k, 0, k * BLOCK, BLOCK) for k in range(5)])
    fed(source, [naive.data(6, 0, 0, BLOCK)])
    assert source.counters["epochs"] == 2


def test_by_spikes_an_acquisition_that_goes_back_is_joined_midway(source):
    samples = [*range(1_000_000, 1_020_000, 100), *range(5_000, 25_000, 100)]
    got = fed(source, [naive.spike(1 + k, "E1", sample) for k, sample in enumerate(samples)])
    last = [batch for batch in got if batch.epoch == got[-1].epoch]
    assert source.counters["epochs"] == 2
    assert last[0].seq == 0
    assert last[0].first >= 5_000 + 1500  # what came before may be missing


AWAY = {  # by the host's clock and by the numbers, in seconds; pace; epochs
    "another acquisition, further on than ours was": (40.0, 4.0, 1, 2),
    "the same, which went on": (40.0, 40.0, 1, 1),
    "the same, heard late": (20.0, 0.0, 1, 1),
    "the same, some of it lost and the rest late": (5.0, 1.5, 1, 1),
    "a replay at half speed": (40.0, 20.0, 2, 1),
}


@pytest.mark.parametrize("channels", [0, 1])
@pytest.mark.parametrize("name", AWAY)
def test_an_acquisition_that_began_anew_unseen_is_told_by_the_clock(source, channels, name):
    away_s, jump_s, pace, epochs = AWAY[name]
    number, got = 0, []
    for k in range(2000):  # blocks of 10 ms, and an outage after 15 s
        back = k >= 1500
        now = 10**12 + round(1e9 * (0.01 * k * pace + away_s * back))
        first = 300 * k + round(jump_s * RATE) * back
        number += 100 if k == 1500 and jump_s else 0
        blocks = [naive.data(number + 2, 0, first, 300)] * channels
        for frames in [naive.spike(number + 1, "E1", first + 99), *blocks]:
            source.take(frames, now)
        number += 1 + channels
        got.extend(source._ready)
        source._ready.clear()
    assert source.counters["epochs"] == len({batch.epoch for batch in got}) == epochs


HEARD = {  # seconds that a process was reading, that it is away, where samples go on; the same?
    "the same, which went on": (10.0, 0.2, 10.2, True),
    "the same, most of a second late": (10.0, 0.2, 9.4, True),
    "the same, which stalled": (10.0, 4.0, 10.1, True),
    "the same, which had hardly begun": (0.5, 0.2, 0.7, True),
    "another that began at once": (10.0, 0.2, 0.15, False),
    "another, of as long ago as ours was": (10.0, 12.0, 11.9, False),
}


@pytest.mark.parametrize("name", HEARD)
@pytest.mark.parametrize("block", [True, False])
def test_whoever_takes_a_place_knows_the_acquisition_that_goes_on(port, name, block):
    read_s, away_s, at_s, same = HEARD[name]
    acquisitions = Acquisitions()
    epoch = acquisitions.name(round(read_s * RATE), 10**12, RATE)
    url, now = f"openephys://127.0.0.1:{port}", 10**12 + round(1e9 * away_s)
    source, got = OpenEphysSource(url, known(["E1"]), acquisitions=acquisitions), []
    try:
        for k in range(100):
            at = round(at_s * RATE) + 300 * k
            frames = naive.data(9 + k, 0, at, 300) if block else naive.spike(9 + k, "E1", at)
            source.take(frames, now + 10_000_000 * k)
            got.extend(source._ready)
            source._ready.clear()
    finally:
        source.close()
    assert len({batch.epoch for batch in got}) == 1
    assert (got[0].epoch == epoch) == same
    assert source.counters["epochs"] == 1
    ahead = round(at_s * RATE) + 60_000  # where it has come to is written now and then
    source.take(naive.data(500, 0, ahead, 300), now + 2_000_000_000)
    assert acquisitions._row["sample"] > ahead - 1_000


def test_who_read_at_once_call_every_acquisition_by_the_same_name(port):
    acquisitions, url = Acquisitions(), f"openephys://127.0.0.1:{port}"
    both = [OpenEphysSource(url, known(["E1"]), acquisitions=acquisitions) for _ in range(2)]
    epochs, now = [[], []], 10**12
    try:
        for blocks in (300, 150, 200):  # three seconds, then two acquisitions more
            for k in range(blocks):
                now += 10_000_000
                for source, of in zip(both, epochs, strict=True):
                    source.take(naive.data(1 + k, 0, 300 * k, 300), now)
                    of.extend(batch.epoch for batch in source._ready)
                    source._ready.clear()
    finally:
        for source in both:
            source.close()
    assert epochs[0] == epochs[1]
    assert len(set(epochs[0])) == 3
    assert epochs[0] == sorted(epochs[0])


def test_whoever_joins_late_misses_bins_but_publishes_none_that_is_wrong(session, port):
    endpoint = f"tcp://127.0.0.1:{port}"
    emulator = Emulator(endpoint, "ProbeA", session.unit_ids, session.rate, lossless=True)
    sent = list(pieces(session, BLOCK))
    for piece in sent[:100]:  # nobody listens
        emulator.send(piece)
    source = OpenEphysSource(f"openephys://127.0.0.1:{port}", known(session.unit_ids))
    assert emulator.wait_for_subscriber(10)
    for piece in sent[100:]:
        emulator.send(piece)
    got = []
    while (batch := source.read(200)) is not None:
        got.append(batch)
    frames, binner = bins_of(got, 6)
    assert frames[0][1] == -(-(101 * BLOCK - TAIL) // WIDTH)
    expected = native(session)
    assert all(f[2:4] == expected[f[1]] for f in frames if f[1] in expected)
    assert source.counters["lost"] == 0
    assert binner.counters["spikes_late"] == 0
    emulator.close()
    source.close()


@pytest.mark.parametrize("channels", [0, 1])
def test_when_a_bin_ended_is_known_though_it_was_held_back(source, channels):
    """Each block of 10 ms is there 0.2 ms after it ended; by spikes they wait for 50 ms more."""
    bins = Binner(np.arange(5, dtype=np.int32), 5, WIDTH, CONTEXT)
    validity = Validity(CONTEXT, CONTEXT, 20_000_000, ClockFit(RATE), 250.0, False)
    rng, number, off_ms, late = np.random.default_rng(0), 0, [], 0
    for k in range(600):
        now = 10**12 + (k + 1) * 10_000_000 + 200_000
        messages = [("E1", int(s)) for s in np.sort(rng.integers(k * 300, (k + 1) * 300, 40))]
        for electrode, sample in messages:
            number += 1
            source.take(naive.spike(number, electrode, sample), now)
        for _ in range(channels):
            number += 1
            source.take(naive.data(number, 0, k * 300, 300), now)
        while source._ready:
            batch = source._ready.popleft()
            validity.take(batch)
            for frame in bins.frames(batch):
                if (ended := validity.ended_ns(frame.end, now)) is not None:
                    late += bool(validity.lateness(ended, now))
                    off_ms.append((ended - 10**12 - frame.end / RATE * 1e9) / 1e6)
    assert len(off_ms) > 150
    assert 0 <= min(off_ms) <= max(off_ms) < 1.0
    assert late == 0


def test_spikes_beyond_the_lateness_are_late_exactly(source):
    """By spikes, 50 ms: the naive twin decides message by message what has closed."""
    rng = np.random.default_rng(0)
    samples = np.arange(0, 300_000, 100) + rng.integers(0, 100, 3000)
    disordered = np.where(rng.random(3000) < 0.1, samples - rng.integers(0, 4000, 3000), samples)
    disordered = np.maximum(disordered, 0)
    messages = [naive.spike(1 + k, "E1", int(s)) for k, s in enumerate(disordered)]
    frames, binner = bins_of(fed(source, messages), 5)
    newest, late, closed, decided = -1, 0, 0, False
    for sample in disordered:
        late += bool(decided and sample // WIDTH < closed)
        newest = max(newest, int(sample))
        decided = decided or newest - disordered[0] > 3 * 1500
        if decided:
            closed = (newest - 1500) // 30 * 30 // WIDTH
    assert late > 20
    assert binner.counters["spikes_late"] == late
    assert [f[1] for f in frames] == list(range(frames[0][1], closed))
    total = sum(sum(f[3]) for f in frames) + binner._ring_RC[:, :-2].sum() + late
    assert total == 3000 - source._held - binner.counters["spikes_outside"]


def test_garbage_between_changes_no_bin_and_is_counted(session, port):
    rubbish = [[b"x"], [b"EVENT\0"], [b"EVENT\0", b"{"], [b"DATA\0", b"{}", b""]] * 20

    def send(emulator):
        for k, piece in enumerate(pieces(session, BLOCK)):
            emulator.send(piece)
            if k < len(rubbish):
                emulator._socket.send_multipart(rubbish[k])

    got, source = through_sockets(session, port, send)
    frames, _ = bins_of(got, 6)
    expected = native(session)
    assert all(f[2:4] == expected[f[1]] for f in frames if f[1] in expected)
    counters = source.counters
    assert [counters[f"malformed_{k}"] for k in ("envelope", "frames", "json", "field")] == [20] * 4
    assert counters["lost"] == 0
    assert accounted(source)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(messages=st.lists(st.one_of(mutated(), st.just(None)), min_size=1, max_size=40))
def test_every_message_is_accounted_for_and_time_never_goes_back(source, messages):
    end = epoch = 0
    for number, frames in enumerate(messages, 1):
        real = naive.data(number, 0, number * BLOCK, BLOCK)
        for batch in fed(source, [real if frames is None else frames]):
            if batch.epoch == epoch:
                assert batch.first >= end
            assert batch.epoch >= epoch
            assert batch.end >= batch.first
            epoch, end = batch.epoch, batch.end
    assert accounted(source)
    assert len(source._number_of) <= 5 + module.MAX_STRANGERS


def test_a_flood_of_samples_is_turned_off_and_loss_is_then_unknown(session, port):
    got, source = through_sockets(
        session, port, lambda e: send_session(e, session, speed=0), channels=MAX_CHANNELS + 4
    )
    assert source.counters["loss_unknown"] == 1
    assert source.counters["lost"] == 0
    assert source.counters["spikes"] == len(session.records_S)
    assert source.counters["blocks"] < 12 * 230
    frames, _ = bins_of(got, 6)
    expected = native(session)
    assert all(f[2:4] == expected[f[1]] for f in frames if f[1] in expected)
    assert frames[-1][1] > 350


def test_ports_in_use_and_wrong_addresses_are_told_in_one_line(port):
    emulator = Emulator(f"tcp://127.0.0.1:{port}", "s", ["a"], RATE)
    with pytest.raises(StreamError, match="in use"):
        Emulator(f"tcp://127.0.0.1:{port}", "s", ["a"], RATE)
    emulator.close()
    for endpoint in ("ipc://x", "tcp://127.0.0.1", "tcp://127.0.0.1:65535"):
        with pytest.raises(ConfigError, match="5556"):
            next_port(endpoint)
