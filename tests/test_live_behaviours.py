"""Behaviours observed live: the value a bin is shown, what it adds, that nobody waits for it."""

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.config import MaskingConfig
from offline.masking import draw_masks
from rt_neds.bundle import BundleSession, BundleSpec
from rt_neds.errors import BundleError, WireError
from rt_neds.frames import BinnedFrame
from rt_neds.model.neds import SCHEMES
from rt_neds.model.readout import Scale
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.decoder import Decoder, EagerStep, decode_together, make_step, schema_outputs
from rt_neds.stream.fused import FusedStep
from rt_neds.stream.graph import GraphStep
from rt_neds.stream.live import WAITING, LiveBehaviours
from rt_neds.wire import (
    LEAP_MESSAGES,
    BehaviourBatch,
    TaskEvent,
    pack_behaviour,
    pack_event,
    unpack_behaviour,
    unpack_event,
)
from tests.test_fused import (
    ATOL,
    BEHAVIOURS,
    NAMES,
    SCHEME,
    SIZES,
    random_model,
    random_stream,
    shown_to_torch,
)

RATE, WIDTH = 30_000.0, 600
SCALES = {
    "speed": Scale(mean=2.0, sd=3.0, low=-4.0, high=9.0),
    "choice": Scale(),
    "position": Scale(mean=-1.0, sd=0.5, low=-2.0, high=0.0),
}
LEFT = ["licks"]


def values(first, numbers, *, rate=1000.0, seq=0, epoch=1, name="speed"):
    return BehaviourBatch(name, epoch, seq, first, rate, np.array(numbers, np.float32))


def listening(**classes):
    live = LiveBehaviours(classes or {"speed": ()})
    live.begin_run(1)
    return live


# -- which value a bin is shown ------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["values", "close"]),
            st.integers(0, 3000),
            st.integers(1, 4),
            st.sampled_from([20.0, 60.0, 1000.0]),
        ),
        max_size=40,
    )
)
def test_a_bin_is_shown_the_last_value_before_its_edge(script):
    live, accepted, end, hold = listening(), [], 0, np.inf
    for n, (what, jump, count, rate) in enumerate(script):
        if what == "close":
            end += WIDTH
            (shown,) = live.at(1, end, WIDTH)
            before = [(s, v) for s, v in accepted if s <= end]
            due = before and end - before[-1][0] <= max(WIDTH, hold)
            assert shown == before[-1][1] if due else np.isnan(shown)
            continue
        first = max(0, end - 900 + jump)
        live.take(values(first, np.arange(count) + 10 * n, rate=rate, seq=n), RATE, end)
        hold = 1.5 * RATE / rate
        for k in range(count):
            sample = first + round(k * RATE / rate)
            if sample > max((s for s, _ in accepted), default=-1):
                accepted.append((sample, k + 10.0 * n))
    counters = live.counters["speed"]
    assert counters["shown"] + counters["hidden"] == end // WIDTH
    assert counters["skipped"] == sum(s[2] for s in script if s[0] == "values") - len(accepted)


def test_what_comes_too_late_is_counted_and_of_use_to_the_next_bin():
    live = listening()
    assert np.isnan(live.at(1, WIDTH, WIDTH)[0])
    live.take(values(WIDTH - 10, [5.0]), RATE, WIDTH)
    assert live.counters["speed"]["late"] == 1
    assert live.at(1, 2 * WIDTH - 20, WIDTH)[0] == 5.0
    assert np.isnan(live.at(1, 2 * WIDTH, WIDTH)[0])  # older than a bin by now


def test_slow_behaviours_hold_for_one_and_a_half_of_their_periods():
    live = listening()
    live.take(values(100, [7.0], rate=10.0), RATE, 0)  # every 3000 samples
    shown = [live.at(1, (b + 1) * WIDTH, WIDTH)[0] for b in range(9)]
    assert shown[:7] == [7.0] * 7  # to 4200 = 7 * 600; held until 4600
    assert np.isnan(shown[7:]).all()


def test_another_run_leaves_nothing_behind_and_absurd_samples_do_not_stay():
    live = listening()
    live.take(values(500, [1.0]), RATE, 0)
    live.take(values(1 << 40, [9.0]), RATE, 0)
    live.take(values(550, [2.0], epoch=2), RATE, 0)
    live.take(values(560, [np.nan]), RATE, 0)
    assert live.counters["speed"]["skipped"] == 2
    assert np.isnan(live.at(1, 600, WIDTH)[0])  # it said that it does not know
    live.begin_run(2)
    assert np.isnan(live.at(2, 600, WIDTH)[0])
    live.take(values(610, [3.0], epoch=2), RATE, 600)
    assert np.isnan(live.at(1, 1200, WIDTH)[0])
    assert live.at(2, 1200, WIDTH)[0] == 3.0


def test_bins_that_the_last_run_still_closes_take_nothing_from_the_next():
    live = listening()
    live.begin_run(2)
    live.take(values(500, [1.0], epoch=2), RATE, 0)
    assert np.isnan(live.at(1, 100 * WIDTH, WIDTH)[0])
    live.take(values(WIDTH + 10, [2.0], epoch=2, seq=1), RATE, 0)
    assert live.counters["speed"]["late"] == 0
    assert [live.at(2, (b + 1) * WIDTH, WIDTH)[0] for b in range(2)] == [1.0, 2.0]


def test_a_run_that_begins_anew_is_heard_and_counted_from_its_beginning():
    live = listening()
    live.take(values(50_000, [1.0], seq=4), RATE, 50_000)
    live.begin_run(2)
    for seq in (0, 1, 3):
        live.take(values(30 * seq, [2.0], seq=seq, epoch=2), RATE, 0)
    assert live.at(2, WIDTH, WIDTH)[0] == 2.0
    counters = live.counters["speed"]
    assert (counters["skipped"], counters["late"], counters["lost"]) == (0, 0, 1)


def test_what_bins_were_shown_lasts_until_a_chunk_of_them_is_decoded():
    live, shown = listening(), []
    for b in range(1 + CHUNK):
        live.take(values(b * WIDTH + 1, [b], seq=b), RATE, b * WIDTH)
        shown.append(live.at(1, (b + 1) * WIDTH, WIDTH))
    assert [float(value_M[0]) for value_M in shown] == list(range(1 + CHUNK))


def test_a_value_is_too_late_at_the_edge_and_too_early_beyond_ten_seconds():
    live = listening()
    live.at(1, WIDTH, WIDTH)
    live.take(values(WIDTH, [1.0]), RATE, WIDTH)
    assert live.counters["speed"]["late"] == 1
    live.take(values(WIDTH + 1, [1.0], seq=1), RATE, WIDTH)
    live.take(values(WIDTH + 300_001, [1.0], seq=2), RATE, WIDTH)
    assert live.counters["speed"]["skipped"] == 1
    live.take(values(WIDTH + 300_000, [1.0], seq=3), RATE, WIDTH)
    assert (live.counters["speed"]["late"], live.counters["speed"]["skipped"]) == (1, 1)


def test_values_beyond_what_training_saw_are_counted():
    live = listening()
    live.learned({"speed": (-1.0, 2.0)})
    for b, value in enumerate([-1.0, 2.0, 2.1, -5.0, np.nan]):
        live.take(values(b * WIDTH + 1, [value]), RATE, b * WIDTH)
        live.at(1, (b + 1) * WIDTH, WIDTH)
    counters = live.counters["speed"]
    assert (counters["shown"], counters["hidden"], counters["beyond"]) == (4, 1, 2)


def test_lost_messages_are_counted_and_what_waits_is_bounded():
    live = listening()
    live.take(values(0, [1.0], seq=0), RATE, 0)
    live.take(values(30, [1.0], seq=4), RATE, 0)
    live.take(values(60, [1.0], seq=0), RATE, 0)  # its sender began anew
    assert live.counters["speed"]["lost"] == 3
    live.take(values(90, [1.0], seq=2), RATE, 0)  # and lost one
    assert live.counters["speed"]["lost"] == 4
    again = listening()
    for seq in (0, 1, 2, 2, 3, 5, 4, 6):  # one came twice, two changed places
        again.take(values(30 * seq, [1.0], seq=seq), RATE, 0)
    assert again.counters["speed"]["lost"] == 1  # the fourth, before it came after the fifth
    anew = listening()
    for n, seq in enumerate((LEAP_MESSAGES + 9, 0, 2)):
        anew.take(values(30 * n, [1.0], seq=seq), RATE, 0)
    assert anew.counters["speed"]["lost"] == 1
    for n in range(5):
        live.take(values(1000 + n * 150_000, np.zeros(5000)), RATE, n * 150_000)
    assert len(live._tracks["speed"].waiting) == WAITING


def test_a_state_of_the_task_holds_until_the_next():
    live = listening(choice=("left", "right"))
    states = [
        (599, "left"),  # inside bin 0
        (1200, "right"),  # at the edge of bin 1: of the next
        (1900, None),
        (1900, "left"),  # at once another
        (2500, None),
    ]
    for sample, value in states:
        live.take_event(TaskEvent(1, sample, "choice", value), RATE, 0)
    shown = [live.at(1, (b + 1) * WIDTH, WIDTH)[0] for b in range(6)]
    np.testing.assert_array_equal(shown, [0, 0, 1, 0, np.nan, np.nan])
    with pytest.raises(WireError, match="one of left, right expected"):
        live.take_event(TaskEvent(1, 9999, "choice", "up"), RATE, 0)
    with pytest.raises(WireError, match="categorical; send events"):
        live.take(values(9999, [1.0], name="choice"), RATE, 0)


# -- on the wire ---------------------------------------------------------------------------------


def test_messages_come_back_as_they_went():
    batch = values(123, [1.5, np.nan, -2.0], rate=250.0, seq=7, epoch=3)
    topic, header, payload = pack_behaviour(batch)
    assert topic == b"behaviour/speed"
    back = unpack_behaviour("speed", header, payload)
    np.testing.assert_array_equal(back.values, batch.values)
    assert (back.epoch, back.seq, back.first, back.rate) == (3, 7, 123, 250.0)
    topic, header = pack_event("imec0", TaskEvent(3, 9, "choice", "left"))
    assert topic == b"events/imec0"
    assert unpack_event(header) == TaskEvent(3, 9, "choice", "left")


@pytest.mark.parametrize(
    "change",
    [
        {"n": 2}, {"n": -1}, {"rate": 0.0}, {"rate": "fast"}, {"first": -1}, {"first": 1 << 60},
        {"seq": -1}, {"v": 2}, {"rate": 0.1, "n": 3}, {"epoch": None},
    ],
)  # fmt: skip
def test_messages_that_make_no_sense_are_refused(change):
    import msgpack

    header = msgpack.unpackb(pack_behaviour(values(0, [1.0, 2.0, 3.0]))[1])
    with pytest.raises(WireError):
        unpack_behaviour("speed", msgpack.packb({**header, **change}), bytes(12))
    fields = {"v": 1, "epoch": 0, "sample": 0, "kind": "x", "value": None}
    if set(change) <= {"v", "epoch"}:
        with pytest.raises(WireError):
            unpack_event(msgpack.packb({**fields, **change}))


# -- in the network ------------------------------------------------------------------------------


def live_stream(bins, seed=1):
    """Values of three behaviours, some far out, some not observed; in the order of ``SCALES``."""
    rng = np.random.default_rng(seed)
    speed, position = rng.normal(2, 6, bins), rng.normal(-1, 1, bins)
    live_TM = np.stack([speed, rng.integers(0, 3, bins), position], axis=1).astype(np.float32)
    live_TM[rng.random(live_TM.shape) < 0.4] = np.nan
    live_TM[10:20] = np.nan
    return live_TM


def offline(model, counts_TN, observed_T, missing_N, live_TM):
    """The forward pass over all of it, told of the behaviours in its own way."""
    counts, values_1TM, observed_1TM = shown_to_torch(model, counts_TN, observed_T)
    for (name, scale), live_T in zip(SCALES.items(), live_TM.T, strict=True):
        m, shown_T = model.modalities.index(name), np.isfinite(live_T)
        inside_T = np.clip(live_T, scale.low, scale.high)
        number_T = live_T if name == "choice" else (inside_T - scale.mean) / scale.sd
        values_1TM[0, shown_T, m] = torch.from_numpy(number_T[shown_T]).float()
        observed_1TM[0, :, m] = torch.from_numpy(shown_T)
    with torch.no_grad():
        return model(
            "a", counts, values_1TM, observed_1TM, SCHEME,
            missing_BTN=torch.from_numpy(missing_N)[None, None], wanted=LEFT,
        )["licks"][0].numpy()  # fmt: skip


def makers(model, missing_N):
    return {
        "eager": lambda: EagerStep(model, "a", LEFT, missing_N, live=SCALES),
        "fused": lambda: FusedStep(model, "a", LEFT, missing_N, live=SCALES),
        "graph": lambda: GraphStep(model, "a", LEFT, missing_N, "cpu", live=SCALES, captured=False),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["eager", "fused", "graph"])
def test_every_step_equals_the_forward_pass(size, kind):
    model = random_model(size)
    counts_TN, observed_T, missing_N = random_stream(model, 120)
    live_TM = live_stream(120)
    expected_TO = offline(model, counts_TN, observed_T, missing_N, live_TM)
    step, got, t = makers(model, missing_N)[kind](), [], 0
    rng = np.random.default_rng(0)
    while t < len(counts_TN):
        cut = slice(t, t + int(rng.integers(1, CHUNK + 1)))
        got.append(step.steps(counts_TN[cut], observed_T[cut], list(live_TM[cut])).copy())
        t = cut.stop
    np.testing.assert_allclose(np.concatenate(got), expected_TO, atol=3 * ATOL)
    hidden_TO = offline(model, counts_TN, observed_T, missing_N, np.full_like(live_TM, np.nan))
    assert np.abs(hidden_TO - expected_TO).max() > 100 * ATOL


@pytest.mark.parametrize("kind", ["eager", "fused", "graph"])
def test_where_nothing_is_shown_nothing_changes(kind):
    model = random_model()
    counts_TN, observed_T, missing_N = random_stream(model, 40)
    make = makers(model, missing_N)[kind]
    without, dark = make(), make()
    nothing_M = np.full(3, np.nan, np.float32)
    for t in range(40):
        one = without.steps(counts_TN[t : t + 1], observed_T[t : t + 1]).copy()
        other = dark.steps(counts_TN[t : t + 1], observed_T[t : t + 1], [nothing_M])
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", ["eager", "fused", "graph"])
def test_what_will_be_observed_is_not_known(kind):
    model = random_model()
    counts_TN, observed_T, missing_N = random_stream(model, 40)
    live_TM, make = live_stream(40), makers(model, missing_N)[kind]
    poked_TM = live_TM.copy()
    poked_TM[25:] = 5.0
    poked_TM[25:, 1] = 2
    runs = []
    for shown_TM in (live_TM, poked_TM):
        step = make()
        runs.append(
            np.stack(
                [
                    step.steps(counts_TN[t : t + 1], observed_T[t : t + 1], [shown_TM[t]])[0].copy()
                    for t in range(40)
                ]
            )
        )
    np.testing.assert_array_equal(runs[0][:25], runs[1][:25])
    assert (runs[0][25] != runs[1][25]).any()


def spec_of(model, live=("speed", "choice", "position")):
    behaviours = [msgspec.structs.replace(b, live=b.name in live) for b in BEHAVIOURS]
    units = [str(n) for n in range(model.parts("a").units)]
    session = BundleSession(
        id="a", units=units, rate=RATE, scales={"licks": Scale(), **SCALES}, behaviours=NAMES
    )
    return BundleSpec(
        format=4, version="0", sha256="0" * 64, bin_ms=20.0, model=model.config,
        behaviours=behaviours, sessions=[session], training={},
    )  # fmt: skip


def test_what_is_observed_is_not_decoded():
    model = random_model()
    spec = spec_of(model)
    names = [o["name"] for o in schema_outputs(spec, spec.session(), ["choice", "speed"])]
    assert names == ["licks", "position"]
    with pytest.raises(BundleError, match=r"live = true under \[behaviour.speed\]"):
        schema_outputs(spec_of(model, live=["choice"]), spec.session(), ["speed"])
    lone = msgspec.structs.replace(spec.session(), behaviours=["speed"])
    with pytest.raises(BundleError, match="leaves nothing to decode"):
        schema_outputs(spec, lone, ["speed"])


def test_probes_of_one_trunk_are_each_shown_their_own():
    model = random_model()
    spec, none_N = spec_of(model), np.zeros(model.parts("a").units, bool)
    live = list(SCALES)

    def decoder(live):
        step = make_step(model, spec, spec.session(), none_N, live=live)
        return Decoder(spec, spec.session(), step, live=live)

    together, apart = [decoder(live), decoder([])], [decoder(live), decoder([])]
    assert together[0].share(together[1])
    counts_TN, observed_T, _ = random_stream(model, 30)
    live_TM = live_stream(30)
    for t in range(30):

        def frame(live_M, t=t):
            return BinnedFrame(
                1, t, 0, counts_TN[t], bool(observed_T[t]), 0, 0, 0, 0, t == 0, 0, 0, live_M=live_M
            )

        frames = [[frame(live_TM[t])], [frame(None)]]
        both = [of.copy() for of in decode_together(together, frames)]
        for one, own, of in zip(apart, frames, both, strict=True):
            np.testing.assert_array_equal(one.decode_chunk(own), of)


# -- in training ---------------------------------------------------------------------------------


def test_half_of_the_samples_may_show_live_behaviours_and_do_not_ask_for_them():
    config = MaskingConfig(schemes={"decoding": 1.0, "encoding": 1.0})
    ones = np.ones((800, 5, 4), bool)
    live_M = np.array([False, True, False, True])
    masks = draw_masks(config, ones, ones, np.zeros(3, int), np.random.default_rng(0), live_M)
    decoding = masks.scheme_B == SCHEMES.index("decoding")
    shown_BM = masks.observed_BTM[decoding].all(axis=1)
    np.testing.assert_array_equal(shown_BM, masks.observed_BTM[decoding].any(axis=1))
    assert (masks.observed_BTM[:, :, 1:] != masks.asked_BTM[:, :, 1:])[decoding].all()
    assert shown_BM[:, 0].all()
    assert not shown_BM[:, 2].any()
    for share in (shown_BM[:, 1].mean(), shown_BM[:, 3].mean()):
        assert 0.31 < share < 0.44  # three quarters of half
    assert 0.22 < (shown_BM[:, 1] & shown_BM[:, 3]).mean() < 0.34  # each for itself
    assert 0.47 < (~shown_BM[:, 1] & ~shown_BM[:, 3]).mean() < 0.6
    assert masks.observed_BTM[~decoding, :, 1:].all()
    assert not masks.observed_BTM[~decoding, :, 0].any()
    plain = draw_masks(config, ones, ones, np.zeros(3, int), np.random.default_rng(0))
    assert not plain.observed_BTM[plain.scheme_B == SCHEMES.index("decoding"), :, 1:].any()
