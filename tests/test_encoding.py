"""Which units are hidden for which metric, and which metrics there are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline import encoding
from offline.baselines import glm
from offline.baselines.glm import forward_1
from offline.encoding import (
    SCHEME_OF,
    drawn_units,
    encoding_scores,
    glm_scores,
    passes_of,
    predict_spikes,
)
from offline.predict import ahead_spans, spans_without_units
from rt_neds.model.neds import AHEAD, SCHEMES
from rt_neds.model.readout import Scale
from tests.naive import bits_per_spike_of_unit
from tests.test_predict import SPANS, UNITS, kept, random_counts, random_model, recorded

REGIONS = np.array(["CA1", "CA1", "CA1", "VISp", "VISp", "LP", ""])
ALL = dict.fromkeys(SCHEME_OF.values(), 1.0)


def predicted(schemes, regions=REGIONS, **options):
    model, binned = random_model(**options), recorded(random_counts())
    scales = [Scale()]
    return predict_spikes(model, schemes, binned, SPANS, scales, regions, window=40)


@settings(deadline=None, max_examples=60)
@given(
    metric=st.sampled_from(["co_smoothing", "intra_region", "inter_region"]),
    regions=st.lists(st.sampled_from(["", "A", "B", "C"]), min_size=1, max_size=9),
    data=st.data(),
)
def test_what_each_pass_hides(metric, regions, data):
    regions = np.array(regions)
    few = data.draw(st.sets(st.integers(0, len(regions) - 1), min_size=1))
    hidden, asked = passes_of(metric, len(regions), regions, np.array(sorted(few)))
    assert hidden.shape == asked.shape == (len(hidden), len(regions))
    assert (asked.sum(axis=0) <= 1).all()
    for hidden_N, asked_N in zip(hidden, asked, strict=True):
        assert asked_N.any()
        assert (~hidden_N).any() or metric == "inter_region"
        if metric == "co_smoothing":
            assert hidden_N.sum() == 1
            assert (hidden_N == asked_N).all()
            continue
        (region,) = set(regions[asked_N])
        assert region
        if metric == "inter_region":
            assert (hidden_N == (regions == region)).all()
            assert (asked_N == hidden_N).all()
        else:
            assert asked_N.sum() == 1
            assert (hidden_N == ((regions != region) | asked_N)).all()


def test_without_two_regions_there_is_nothing_to_ask_by_region():
    for regions in (None, np.array(["", "A", "A"]), np.array(["", "", ""])):
        for metric in ("inter_region", "intra_region"):
            assert len(passes_of(metric, 3, regions, np.arange(3))[0]) == 0
    assert len(passes_of("co_smoothing", 3, None, np.arange(3))[0]) == 3


def test_every_metric_has_a_scheme():
    assert set(SCHEME_OF.values()) <= {*SCHEMES, AHEAD}


def test_only_what_was_trained_is_scored():
    assert set(predicted(ALL)) == set(SCHEME_OF)
    scores = encoding_scores(predicted({"neuron": 1.0, "encoding": 0.0, "decoding": 1.0}))
    assert {metric for metric, s in scores.items() if s is not None} == {"co_smoothing"}
    assert set(scores) == set(SCHEME_OF)
    assert set(predicted(ALL, regions=None)) == set(SCHEME_OF) - {"intra_region", "inter_region"}


def test_units_and_bins_of_each_metric():
    scores = encoding_scores(predicted(ALL))
    units = {metric: s["units"] for metric, s in scores.items()}
    assert units == {
        "bits_per_spike": UNITS,
        "co_smoothing": UNITS,
        "intra_region": 5,  # LP has one unit, and one unit has no region
        "inter_region": 6,
        "forward": UNITS,
        "forward_1": UNITS,
    }
    assert scores["co_smoothing"]["bins"] == 41 + 33
    assert scores["forward"]["bins"] == 40 + 30


@pytest.mark.parametrize("metric", ["co_smoothing", "forward_1"])
def test_scores_are_the_written_formula(metric):
    model, counts = random_model(), random_counts()
    if metric == "forward_1":
        rate = ahead_spans(model, recorded(counts), SPANS)
    else:
        each = np.eye(UNITS, dtype=bool)
        rate = spans_without_units(model, recorded(counts), SPANS, each, each, "neuron", window=300)
    bits = [bits_per_spike_of_unit(kept(counts)[:, n], rate[:, n]) for n in range(UNITS)]
    came = predicted(ALL)[metric]
    np.testing.assert_allclose(came.bits()["bits"], bits, rtol=1e-4)
    np.testing.assert_array_equal(came.bits()["spikes"], kept(counts).sum(axis=0))
    assert came.scores()["mean"] == pytest.approx(np.mean(bits), rel=1e-4)


def test_bins_that_were_not_recorded_are_not_scored():
    model, counts = random_model(), random_counts()
    counts[:, 6] = 0
    counts[140:150] = [0, 0, 0, 0, 0, 0, 3]  # what comes out of a hole is no spike
    binned = recorded(counts, hole=slice(140, 150))
    binned.shown_TM[205:210, 1] = False
    came = predict_spikes(model, ALL, binned, SPANS, [Scale()], REGIONS, window=40)
    inside = np.concatenate([np.arange(130, 140), np.arange(150, 171), np.arange(200, 233)])
    np.testing.assert_array_equal(came["co_smoothing"].bins_T, inside)
    np.testing.assert_array_equal(came["forward_1"].bins_T, inside)
    np.testing.assert_array_equal(came["co_smoothing"].units_N, range(6))
    assert np.isnan(came["forward_1"].bits()["bits"][6])  # it was silent where it was recorded
    known = inside[(inside < 205) | (inside >= 210)]  # without behaviour there is nothing to go by
    np.testing.assert_array_equal(came["bits_per_spike"].bins_T, known)


def test_many_units_are_sampled_the_same_each_time(monkeypatch):
    monkeypatch.setattr(encoding, "MOST_UNITS", 3)
    first, second = predicted(ALL), predicted(ALL)
    assert first["co_smoothing"].scores()["units"] == 3
    np.testing.assert_array_equal(first["co_smoothing"].units_N, second["co_smoothing"].units_N)
    assert first["inter_region"].scores()["units"] == 6


def test_units_with_enough_spikes_are_drawn_first(monkeypatch):
    spikes = np.array([0, 10, 50, 200, 49, 3, 60])
    assert drawn_units(spikes).tolist() == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(encoding, "MOST_UNITS", 3)
    assert drawn_units(spikes).tolist() == [2, 3, 6]
    monkeypatch.setattr(encoding, "MOST_UNITS", 4)
    assert set(drawn_units(spikes)) > {2, 3, 6}


def test_poisson_regression_is_scored_on_the_same_units_and_bins():
    binned = recorded(random_counts())
    binned.split_T[:] = np.repeat([0, 1, 2], [90, 30, 140])
    binned.values_TM[:, 1] = np.random.default_rng(1).integers(0, 3, len(binned.split_T))
    schemes, scale = {"ahead": 1.0, "encoding": 1.0, "neuron": 1.0}, [Scale()]
    came = predict_spikes(random_model(), schemes, binned, SPANS, scale, REGIONS, window=40)
    scores = glm_scores(binned, came, {"speed": 3})
    rate_of = {
        "forward_1": forward_1(binned, came["forward_1"].bins_T),
        "bits_per_spike": glm.encoding(binned, came["bits_per_spike"].bins_T, classes={"speed": 3}),
    }
    assert set(scores) == set(rate_of)  # it has nothing to say of the other
    for metric, rate in rate_of.items():
        of = came[metric]
        rate = rate[:, of.units_N]
        bits = [bits_per_spike_of_unit(of.count_TN[:, n], rate[:, n]) for n in range(UNITS)]
        assert scores[metric]["mean"] == pytest.approx(np.mean(bits), rel=1e-4)
        assert scores[metric]["bins"] == of.scores()["bins"]
