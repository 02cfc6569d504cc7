"""What a bundle is compared with is of the same bins, the ideal observer of the same classes."""

import msgspec
import numpy as np
import pytest

from offline.compared import baseline_values, ideal_values
from rt_neds.model.readout import Behaviour
from rt_neds.session import Series
from tests.baselines.making import WIDTH, binned_session
from tests.making import tiny_config

SPEED = Behaviour(name="speed", kind="continuous")
CHOICE = Behaviour(name="choice", kind="categorical", classes=("left", "right"))
SIDE = Behaviour(name="side", kind="categorical", classes=("a", "b", "c"), live=True)


@pytest.fixture
def binned():
    """A session whose ideal observer says after how many bins it says it, over 100."""
    binned, at_T = binned_session(np.ones((50, 2), int), np.zeros(50)), np.arange(50)
    said = Series(at_T * WIDTH, at_T / 100, np.array([[0, 50 * WIDTH]]))
    binned.session.has, binned.session.series = (
        {"ideal.wheel_speed", "ideal.choice"}.__contains__,
        (lambda name: said),
    )
    return binned


def changed(name, **fields):
    config = tiny_config()
    of = {name: msgspec.structs.replace(config.behaviour[name], **fields)}
    return msgspec.structs.replace(config, behaviour={**config.behaviour, **of})


def test_the_ideal_observer_is_asked_at_the_end_of_each_bin(binned):
    at_S = np.array([0, 30, 5])
    found_SV = ideal_values(binned, SPEED, tiny_config(), at_S)
    np.testing.assert_allclose(found_SV, [[0.01], [0.31], [0.06]])
    for fields in ({"transform": "speed"}, {"source": "arm.wheel_speed"}):
        assert ideal_values(binned, SPEED, changed("speed", **fields), at_S) is None
    binned.session.has = lambda name: False
    assert ideal_values(binned, SPEED, tiny_config(), at_S) is None


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ({"left": 1, "right": 0}, [0.11, 0.89]),
        ({"right": 0, "left": 1}, [0.89, 0.11]),
        ({"left": 1, "right": 2}, None),
    ],
)
def test_the_ideal_observer_says_how_likely_it_is_that_the_column_is_1(binned, classes, expected):
    found_SV = ideal_values(binned, CHOICE, changed("choice", classes=classes), np.array([10]))
    if expected is None:
        assert found_SV is None
    else:
        np.testing.assert_allclose(found_SV, [expected])


def test_each_baseline_predicts_the_bins_that_were_scored(binned, monkeypatch):
    asked = {}

    def gru(binned, names, bins, **of):
        asked.update(of, names=names)
        return {"speed": bins * 1.0, "choice": np.stack([bins, -bins], axis=1)}

    def logistic(binned, name, bins, *, classes):
        assert (name, classes) == ("choice", 2)
        return np.stack([bins, 1 - bins], axis=1)

    monkeypatch.setattr("offline.baselines.gru.gru", gru)
    monkeypatch.setattr("offline.baselines.linear.logistic", logistic)
    monkeypatch.setattr("offline.baselines.linear.ridge", lambda binned, name, bins: bins + 0.5)
    bins = {"speed": np.array([3, 4, 9]), "choice": np.array([1, 4])}
    found = baseline_values(binned, [SPEED, CHOICE], bins, "all", [SIDE], window=77)
    expected = {
        "ridge": {"speed": [[3.5], [4.5], [9.5]]},
        "logistic": {"choice": [[1, 0], [4, -3]]},
        "gru": {"speed": [[3], [4], [9]], "choice": [[1, -1], [4, -4]]},
    }
    assert {method: {n: v.tolist() for n, v in of.items()} for method, of in found.items()} == (
        expected
    )
    classes = {"choice": 2, "side": 3}
    assert asked == {
        "names": ["speed", "choice"], "classes": classes, "window": 77, "live": ["side"]
    }  # fmt: skip
    assert set(baseline_values(binned, [SPEED, CHOICE], bins, "linear")) == {"ridge", "logistic"}
    assert baseline_values(binned, [SPEED, CHOICE], bins, "none") == {}
