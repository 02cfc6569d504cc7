"""Spikes predicted from other spikes: exactly what the definition hides, and nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch

from offline import predict
from offline.predict import (
    ahead_spans,
    decode_spans,
    encode_spans,
    forecast_spans,
    scales,
    spans_without_units,
)
from offline.windows import BinnedSession
from rt_neds.frames import SPIKE_DTYPE
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import AHEAD, NEDS, SCHEMES, SPIKES
from rt_neds.model.readout import Behaviour, Scale
from rt_neds.session import Session

WIDTH, BINS, UNITS = 600, 260, 7
SPANS = [(130, 171), (200, 233)]


def recorded(counts_TN: np.ndarray, hole: slice = slice(0, 0)) -> BinnedSession:
    """A session with these counts and one behaviour; nothing was recorded in the hole."""
    at, unit = np.nonzero(counts_TN)
    repeats = counts_TN[at, unit]
    records = np.zeros(repeats.sum(), SPIKE_DTYPE)
    records["sample"] = np.repeat(at, repeats) * WIDTH + WIDTH // 2
    records["unit"] = np.repeat(unit, repeats)
    bins, units = counts_TN.shape
    session = Session(
        path=Path("made-up.h5"),
        id="made-up",
        rate=30_000.0,
        unit_ids=[f"u{n}" for n in range(units)],
        records_S=records,
        domain_K2=np.array([[0, bins * WIDTH]]),
        _data=None,
    )
    shown = np.ones((bins, 2), bool)
    shown[hole, 0] = False
    return BinnedSession(
        session=session,
        width=WIDTH,
        values_TM=np.zeros((bins, 2), np.float32),
        shown_TM=shown,
        scored_TM=shown.copy(),
        split_T=np.zeros(bins, np.int8),
        trial_T=np.full(bins, -1, np.int32),
        present=("speed",),
    )


def random_model(units: int = UNITS, **options) -> NEDS:
    """A small network with every parameter drawn."""
    torch.manual_seed(0)
    sizes = {"dim": 16, "layers": 2, "heads": 2, "context": 8, "history": (1, 3)}
    behaviours = [Behaviour(name="speed", kind="continuous")]
    model = NEDS(ModelConfig(**{**sizes, **options}), behaviours, {"made-up": units}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_counts(seed: int = 0, units: int = UNITS) -> np.ndarray:
    return np.random.default_rng(seed).poisson(0.8, size=(BINS, units))


@torch.no_grad()
def rates(model, counts_TN, shown_T, scheme, missing_N=None, wanted=SPIKES):
    """Predicted counts of one window, straight from the network."""
    shown = torch.zeros(1, len(counts_TN), 2, dtype=torch.bool)
    shown[0, :, 0] = torch.from_numpy(shown_T)
    missing = None if missing_N is None else torch.from_numpy(missing_N)[None, None]
    raw = model(
        "made-up",
        torch.from_numpy(counts_TN.astype(np.float32))[None],
        torch.zeros(1, len(counts_TN), 2),
        shown,
        torch.tensor([SCHEMES.index(scheme)]),
        missing_BTN=missing,
        wanted=[wanted],
    )
    return raw[wanted][0].exp().numpy()


def kept(values_TN: np.ndarray) -> np.ndarray:
    return np.concatenate([values_TN[a:b] for a, b in SPANS])


def one_by_one(units: int = UNITS) -> np.ndarray:
    return np.eye(units, dtype=bool)


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_a_unit_at_a_time_equals_one_pass_for_each(attention, monkeypatch):
    monkeypatch.setattr(predict, "COPIED_BINS", 3 * 250)  # three or four units at a time
    monkeypatch.setattr(predict, "SEGMENT", 17)
    model, counts = random_model(attention=attention), random_counts()
    binned, each = recorded(counts), one_by_one()
    window = BINS if attention == "causal" else 33
    spans = SPANS if attention == "causal" else [(200, 233)]
    came = spans_without_units(model, binned, spans, each, each, "neuron", window=window)
    expected = np.empty((BINS, UNITS), np.float32)
    for n in range(UNITS):
        low = 0 if attention == "causal" else 200
        high = BINS if attention == "causal" else 233
        shown = np.ones(high - low, bool)
        rate = rates(model, counts[low:high], shown, "neuron", each[n])
        expected[low:high, n] = rate[:, n]
    expected = np.concatenate([expected[a:b] for a, b in spans])
    np.testing.assert_allclose(came, expected, rtol=2e-4)


def test_a_last_shorter_piece_is_seen_in_a_whole_window_that_ends_with_it():
    model, counts, each = random_model(attention="full"), random_counts(), one_by_one()
    arguments = (each, each, "neuron")
    came = spans_without_units(model, recorded(counts), [(200, 233)], *arguments, window=20)
    for n in range(UNITS):
        shown = np.ones(20, bool)
        first = rates(model, counts[200:220], shown, "neuron", each[n])[:, n]
        last = rates(model, counts[213:233], shown, "neuron", each[n])[7:, n]
        np.testing.assert_allclose(came[:, n], [*first, *last], rtol=2e-4)


@torch.no_grad()
def test_behaviour_predicts_spikes_with_every_spike_hidden_and_where_it_is_shown():
    model, counts, rng = random_model(), random_counts(), np.random.default_rng(1)
    binned, scale = recorded(counts), Scale(mean=5.0, sd=2.0)
    binned.values_TM[:, 1] = rng.normal(5.0, 2.0, BINS)
    binned.shown_TM[140:150, 1] = False
    came = encode_spans(model, binned, SPANS, [scale], window=300)
    raw = model(
        "made-up",
        torch.from_numpy(counts.astype(np.float32))[None],
        torch.from_numpy((binned.values_TM - 5.0) / 2.0)[None],
        torch.from_numpy(binned.shown_TM & [False, True])[None],
        torch.tensor([SCHEMES.index("encoding")]),
        wanted=[SPIKES],
    )
    np.testing.assert_allclose(came, kept(raw[SPIKES][0].exp().numpy()), rtol=2e-4)


def test_rates_stay_within_those_that_are_published():
    model = random_model()
    with torch.no_grad():
        model.parts("made-up").spikes_out.linear.bias[:2] = torch.tensor([99.0, -99.0])
    came = encode_spans(model, recorded(random_counts()), SPANS, [Scale()], window=300)
    np.testing.assert_allclose(came[:, 0], np.exp(8.0), rtol=1e-5)
    np.testing.assert_allclose(came[:, 1], np.exp(-12.0), rtol=1e-5)


def test_a_scale_is_of_scored_training_bins():
    binned = recorded(random_counts())
    binned.values_TM[:, 1] = np.random.default_rng(1).normal(5.0, 2.0, BINS)
    used = binned.values_TM[:150, 1].copy()
    binned.scored_TM[150:200, 1], binned.split_T[200:] = False, 2
    binned.values_TM[150:, 1] = 8.0 * binned.values_TM[150:, 1]
    (scale,) = scales(binned, ["speed"], ["continuous"])
    assert (scale.low, scale.high) == (used.min(), used.max())
    assert (scale.mean, scale.sd) == pytest.approx((used.mean(), used.std()), rel=1e-5)


def test_a_hidden_unit_does_not_tell_of_itself_and_others_do_in_the_same_bin():
    model, counts, each = random_model(), random_counts(), one_by_one()

    def unit_2(counts):
        rate = spans_without_units(model, recorded(counts), SPANS, each, each, "neuron", window=300)
        return rate[:, 2]

    before = unit_2(counts)
    own, other, later = counts.copy(), counts.copy(), counts.copy()
    own[:, 2] = random_counts(1)[:, 2]
    np.testing.assert_array_equal(unit_2(own), before)
    other[150, 3] += 4
    assert unit_2(other)[150 - 130] != before[150 - 130]
    later[151:, 3] += 4
    np.testing.assert_array_equal(unit_2(later)[: 151 - 130], before[: 151 - 130])


def test_units_nobody_asks_for_are_nan_and_a_region_is_one_pass():
    model, counts = random_model(), random_counts()
    region = np.arange(UNITS) < 3
    came = spans_without_units(
        model, recorded(counts), SPANS, region[None], region[None], "inter_region", window=300
    )
    assert np.isnan(came[:, ~region]).all()
    expected = rates(model, counts, np.ones(BINS, bool), "inter_region", region)
    np.testing.assert_allclose(came[:, region], kept(expected)[:, region], rtol=2e-4)


def test_units_that_nobody_asks_for_are_hidden_all_the_same():
    model, counts, asked = random_model(), random_counts(), np.eye(2, UNITS, dtype=bool)
    hidden = asked | (np.arange(UNITS) >= 4)
    came = spans_without_units(
        model, recorded(counts), SPANS, hidden, asked, "intra_region", window=300
    )
    for n in (0, 1):
        expected = rates(model, counts, np.ones(BINS, bool), "intra_region", hidden[n])
        np.testing.assert_allclose(came[:, n], kept(expected)[:, n], rtol=2e-4)


@torch.no_grad()
def test_what_is_observed_live_is_shown_as_it_is_at_the_rig_and_where_it_was_known():
    behaviours = [
        Behaviour(name="speed", kind="continuous"),
        Behaviour(name="choice", kind="categorical", classes=("left", "right")),
        Behaviour(name="licks", kind="poisson"),
    ]
    torch.manual_seed(0)
    sizes = {"dim": 16, "layers": 2, "heads": 2, "context": 8, "history": (1, 3)}
    model = NEDS(ModelConfig(**sizes), behaviours, {"made-up": UNITS}).eval()
    counts, rng = random_counts(), np.random.default_rng(1)
    binned, scale = recorded(counts), Scale(mean=1.0, sd=2.0, low=-1.0, high=3.0)
    values = np.zeros((BINS, 4), np.float32)
    values[:, 1], values[:, 2] = rng.normal(1.0, 4.0, BINS), rng.integers(0, 2, BINS)
    binned.values_TM, binned.shown_TM = values.copy(), rng.random((BINS, 4)) < 0.8
    binned.scored_TM = np.ones((BINS, 4), bool)
    live = {"speed": scale, "choice": Scale(mean=0.5, sd=0.5)}
    came = decode_spans(model, binned, SPANS, wanted=["licks"], window=300, live=live)
    values[:, 1] = (np.clip(values[:, 1], -1.0, 3.0) - 1.0) / 2.0
    raw = model(
        "made-up",
        torch.from_numpy(counts.astype(np.float32))[None],
        torch.from_numpy(values)[None],
        torch.from_numpy(binned.shown_TM & [True, True, True, False])[None],
        torch.tensor([SCHEMES.index("decoding")]),
        wanted=["licks"],
    )
    np.testing.assert_allclose(came["licks"], kept(raw["licks"][0].numpy()), atol=2e-5)


def test_a_unit_that_is_shown_cannot_be_asked_for():
    asked = one_by_one()
    with pytest.raises(AssertionError, match="seen"):
        spans_without_units(
            random_model(), recorded(random_counts()), SPANS, ~asked, asked, "neuron", window=300
        )


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_forecast_is_the_last_ten_of_a_hundred_bins(attention):
    model, counts = random_model(attention=attention), random_counts()
    came = forecast_spans(model, recorded(counts), SPANS, "forward")
    shown = np.arange(100) < 90
    at = 0
    for first, stop in SPANS:
        whole = (stop - first) // 10 * 10
        for end in range(first + 10, first + whole + 1, 10):
            expected = rates(model, counts[end - 100 : end], shown, "forward")[90:]
            row = at + end - 10 - first
            np.testing.assert_allclose(came[row : row + 10], expected, rtol=2e-4)
        assert np.isnan(came[at + whole : at + stop - first]).all()
        at += stop - first


def test_forecast_does_not_see_what_it_forecasts():
    model, counts = random_model(), random_counts()
    before = forecast_spans(model, recorded(counts), [(150, 160)], "forward")
    counts[150:160] = random_counts(1)[150:160]
    np.testing.assert_array_equal(
        forecast_spans(model, recorded(counts), [(150, 160)], "forward"), before
    )
    counts[149] += 3
    assert (forecast_spans(model, recorded(counts), [(150, 160)], "forward")[0] != before[0]).all()


def test_no_forecast_from_a_window_with_a_hole():
    binned = recorded(random_counts(), hole=slice(100, 103))
    came = forecast_spans(random_model(), binned, [(130, 250)], "forward")
    found = np.isfinite(came).all(axis=1)
    assert found.tolist() == [end >= 203 for end in np.repeat(np.arange(140, 260, 10), 10)]


def test_ahead_in_segments_equals_one_pass_over_everything(monkeypatch):
    monkeypatch.setattr(predict, "SEGMENT", 17)
    model, counts = random_model(), random_counts()
    came = ahead_spans(model, recorded(counts), SPANS)
    expected = rates(model, counts, np.ones(BINS, bool), "decoding", wanted=AHEAD)
    np.testing.assert_allclose(came, kept(expected), rtol=2e-4)


def test_ahead_sees_the_bin_before_and_not_its_own():
    model, counts = random_model(), random_counts()
    before = ahead_spans(model, recorded(counts), [(140, 180)])
    counts[160] += 5
    after = ahead_spans(model, recorded(counts), [(140, 180)])
    np.testing.assert_array_equal(after[:21], before[:21])
    assert (after[21] != before[21]).all()
