"""What the pictures show is what was scored, where it was scored."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from offline import figures
from offline.evaluate import Evaluation
from offline.metrics import categorical_scores, gaussian_scores
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
