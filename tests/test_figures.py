"""What the pictures show is what was scored, where it was scored."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from offline import figures
from offline.evaluate import Evaluation
from offline.metrics import categorical_scores, gaussian_scores
from offline.tables import QUESTIONS
from rt_neds.model.readout import Behaviour
from tests.test_predict import random_counts, recorded

SPEED = Behaviour(name="speed", kind="continuous", unit="cm/s")
SIDE = Behaviour(name="side", kind="categorical", classes=("left", "right", "none"))


@pytest.fixture(autouse=True)
def tidy():
    with plt.rc_context(figures.PLAIN):
        yield
    plt.close("all")


@pytest.fixture
def evaluation() -> Evaluation:
    """Speed scored in one run of 60 bins, side in two runs of 20 inside and after it."""
    rng = np.random.default_rng(0)
    bins = {"speed": np.arange(100, 160), "side": np.r_[110:130, 180:200]}
    true = {"speed": rng.normal(size=60), "side": rng.integers(0, 3, 40).astype(float)}
    values = {
        "speed": np.stack([true["speed"] + 0.5, np.full(60, 0.5)], axis=1),
        "side": rng.dirichlet(np.ones(3), size=40),
    }
    tenth = np.arange(60) // 6
    decoding = {
        "speed": gaussian_scores(
            true["speed"], *values["speed"].T, np.zeros(60), profile_sd=1.0, tenth_S=tenth
        ),
        "side": categorical_scores(true["side"].astype(int), values["side"], np.repeat([0, 1], 20)),
    }
    result = {"decoding": decoding, "baselines": {}, "encoding": {}, "ideal": {}}
    binned = recorded(random_counts())
    return Evaluation(result, binned, [SPEED, SIDE], bins, true, values, {}, None)


def line(axis, label):
    (found,) = [line for line in axis.lines if line.get_label() == label]
    return found.get_xdata(), found.get_ydata()


def test_a_stretch_leaves_time_out_and_says_so(evaluation):
    shown, place = figures._stretch(list(evaluation.bins.values()), 70)
    assert shown.tolist() == [*range(100, 160), *range(180, 190)]
    assert place.tolist() == [*range(60), *range(60 + figures.GAP, 70 + figures.GAP)]


def test_a_stretch_begins_where_bins_lie_densest():
    shown, place = figures._stretch([np.arange(0, 30, 3), np.arange(100, 160)], 30)
    assert (shown[0], len(shown), place[-1]) == (100, 30, 29)


def test_traces_show_what_was_decoded_where_it_was(evaluation):
    speed, side = figures.traces(evaluation).axes
    _, decoded = line(speed, "decoded")
    np.testing.assert_allclose(decoded[:60], evaluation.values["speed"][:, 0])
    assert np.isnan(decoded[60:]).all()
    _, chance = line(side, "P(right)")
    np.testing.assert_allclose(chance[10:30], evaluation.values["side"][:20, 1])
    assert np.isnan(chance[30 : 60 + figures.GAP]).all()
    assert side.get_xlabel().startswith("seconds shown")
    evaluation.behaviours, evaluation.bins = [SPEED], {"speed": evaluation.bins["speed"]}
    (speed,) = figures.traces(evaluation).axes
    assert speed.get_xlabel() == "session time (s)"
    assert line(speed, "true")[0][0] == pytest.approx(101 * 0.02)


def test_intervals_hold_what_they_hold(evaluation):
    intervals, chances = figures.reliability(evaluation).axes
    level, inside = line(intervals, "speed")
    assert set(inside[level < 0.68]) == {0.0}  # all true values lie one stated sd away
    assert set(inside[level > 0.69]) == {1.0}
    stated = evaluation.result["decoding"]["side"]["reliability"]
    np.testing.assert_allclose(chances.lines[1].get_ydata(), stated["true"])


def test_no_trials_no_picture_against_time(evaluation):
    assert len(figures.over_time(evaluation).axes) == 2
    evaluation.behaviours = [SPEED]
    evaluation.result["decoding"]["speed"]["error_by_time"] = None
    assert figures.over_time(evaluation) is None
    assert figures.bits_of_units(evaluation) is None


def test_a_band_is_one_stated_sd_wide_and_truth_is_where_it_was(evaluation):
    evaluation.true["side"] = np.repeat([1.0, 2.0, 1.0, 0.0, 1.0], [2, 7, 3, 7, 21])
    speed, side = figures.traces(evaluation).axes
    (band,) = speed.collections
    corners = band.get_paths()[0].vertices
    expected = evaluation.values["speed"][:, 0]
    assert corners[:, 1].max() == pytest.approx(expected.max() + 0.5)
    assert corners[:, 1].min() == pytest.approx(expected.min() - 0.5)
    truly = {band.get_label(): band.get_paths() for band in side.collections}
    for c, name in enumerate(SIDE.classes):
        seconds = line(side, f"P({name})")[0]
        within = [
            any(path.contains_point((second, 0.5)) for path in truly[f"truly {name}"])
            for second in seconds[[15, 25]]  # in the middle of seven bins each
        ]
        assert within == [c == 2, c == 0]


def test_of_two_classes_the_chance_of_the_first_is_shown(evaluation):
    two = Behaviour(name="side", kind="categorical", classes=("left", "right"))
    evaluation.behaviours = [two]
    evaluation.bins = {"side": np.arange(40)}
    (axis,) = figures.traces(evaluation).axes
    np.testing.assert_array_equal(line(axis, "P(left)")[1], evaluation.values["side"][:, 0])


def test_scores_over_time_are_those_of_the_result(evaluation):
    decoding = evaluation.result["decoding"]
    ridge = {"speed": {"error_by_time": np.linspace(2, 3, 10).tolist()}}
    evaluation.result["baselines"] = {"ridge": ridge}
    speed, side = figures.over_time(evaluation).axes

    def drawn(axis):
        return [tuple(line.get_ydata()) for line in axis.lines]

    of_speed = decoding["speed"]
    for scores in (of_speed["error_by_time"], ridge["speed"]["error_by_time"],
                   of_speed["error_by_time_profile"]):  # fmt: skip
        assert tuple(scores) in drawn(speed)
    assert tuple(decoding["side"]["by_time"]) in drawn(side)
    assert (decoding["side"]["chance"],) * 2 in drawn(side)


def test_a_units_bits_stand_in_the_row_of_what_was_asked_beside_their_mean(evaluation):
    rng = np.random.default_rng(1)
    bits = {name: rng.uniform(-0.1, 0.3, 6) for name in ("bits_per_spike", "forward_1")}
    evaluation.predicted = {
        name: SimpleNamespace(bits=lambda of=of: {"bits": of, "spikes": np.full(6, 99)})
        for name, of in bits.items()
    }
    evaluation.result["encoding"] = {
        "bits_per_spike": {"mean50": 0.125, "pooled": 0.5},
        "forward_1": {"mean50": 0.25, "pooled": 0.5},
    }
    (axis,) = figures.bits_of_units(evaluation).axes
    rows = [label.get_text() for label in axis.get_yticklabels()]
    assert rows == [QUESTIONS[name][0] for name in ("forward_1", "bits_per_spike")]
    assert {(text.get_text(), round(text.xy[1])) for text in axis.texts} == {
        ("0.250", 0),
        ("0.125", 1),
    }
    often = [of.get_offsets() for of in axis.collections if len(of.get_offsets())]
    for row, name in enumerate(("forward_1", "bits_per_spike")):
        np.testing.assert_array_equal(np.round(often[row][:, 1]), row)
        assert np.isin(often[row][:, 0], bits[name]).sum() >= 4  # the outermost are drawn inside


def test_regions_are_shown_in_per_cent_of_the_units_that_are_there():
    regions = {"confusion": [[16, 4], [1, 9]], "regions": {"CA1": 20, "VISp": 10}}
    axis = figures.confusion(regions).axes[0]
    shown = {text.get_position(): text.get_text() for text in axis.texts}
    assert shown == {(0, 0): "80", (1, 0): "20", (0, 1): "10", (1, 1): "90"}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["CA1 (20)", "VISp (10)"]
