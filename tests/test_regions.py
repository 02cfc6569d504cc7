"""Regions are named from what the network learned, and chance is what shuffled labels give."""

import h5py
import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from offline.regions import decode_regions, name_regions, regions_of, unit_embeddings
from rt_neds.errors import SessionError
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour
from rt_neds.session import load_session
from tests.making import write_session

SPEED = [Behaviour(name="speed", kind="continuous")]


def network(sessions: dict[str, int]) -> NEDS:
    torch.manual_seed(0)
    config = ModelConfig(dim=8, layers=1, heads=1, history=(1, 5))
    return NEDS(config, SPEED, sessions)


def labelled(names: list[str], each: int) -> np.ndarray:
    return np.random.default_rng(1).permutation(np.repeat(names, each))


def test_an_embedding_is_a_units_own_weights():
    model = network({"a": 3, "b": 5})
    parts = model.parts("b")
    with torch.no_grad():  # unit 2 of b: columns 2 (width 1) and 5 + 2 (width 5), row 2, bias 2
        parts.spikes_in.linear.weight.zero_()[:, [2, 7]] = torch.tensor([1.0, 2.0])
        parts.spikes_out.linear.weight.zero_()[2] = 3.0
        parts.spikes_out.linear.bias.zero_()[2] = 4.0
    expected = np.zeros((5, 2 * 8 + 8 + 1))
    expected[2] = np.repeat([1.0, 2.0, 3.0, 4.0], [8, 8, 8, 1])
    np.testing.assert_array_equal(unit_embeddings(model, "b"), expected)


def test_a_region_that_shows_in_the_weights_is_found_across_sessions():
    model = network({"a": 60, "b": 45})
    region_of = {"a": labelled(["CA1", "LP", "VISp"], 20), "b": labelled(["CA1", "LP", "PO"], 15)}
    for name, region_N in region_of.items():
        with torch.no_grad():
            model.parts(name).spikes_out.linear.weight[torch.from_numpy(region_N == "LP")] += 2.0
    came = decode_regions(model, region_of, shuffles=4)
    assert came["regions"] == {"CA1": 35, "LP": 35, "PO": 15, "VISp": 20}
    assert came["units"] == 105
    lp = list(came["regions"]).index("LP")
    confusion = np.array(came["confusion"])
    assert confusion[lp, lp] >= 33
    assert confusion.sum(axis=1).tolist() == [35, 35, 15, 20]
    assert came["embedding"]["macro_f1"] > came["shuffled"]["macro_f1"] + 0.15
    assert came["rate"]["macro_f1"] < came["embedding"]["macro_f1"] - 0.1


def test_scores_are_scikit_learns_and_repeat_themselves():
    model, region_N = network({"a": 60}), labelled(["CA1", "LP", "VISp"], 20)
    named = name_regions(unit_embeddings(model, "a"), region_N)
    first = decode_regions(model, {"a": region_N}, shuffles=3)
    assert first["embedding"]["macro_f1"] == f1_score(region_N, named, average="macro")
    assert first["embedding"]["balanced_accuracy"] == balanced_accuracy_score(region_N, named)
    assert decode_regions(model, {"a": region_N}, shuffles=3) == first


def test_labels_that_mean_nothing_score_like_shuffled_ones():
    came = decode_regions(network({"a": 200}), {"a": labelled(["A", "B"], 100)})
    assert came["shuffled"]["balanced_accuracy"] == pytest.approx(0.5, abs=0.06)
    assert came["embedding"]["balanced_accuracy"] == pytest.approx(0.5, abs=0.12)
    assert 0 < came["shuffled"]["balanced_accuracy_sd"] < 0.1


def test_small_regions_are_left_out_and_named():
    model, names = network({"a": 32}), ["A"] * 12 + ["B"] * 10 + ["C"] * 9 + [""]
    came = decode_regions(model, {"a": np.array(names)}, shuffles=2)
    assert came["left_out"] == {"C": 9}
    assert came["regions"] == {"A": 12, "B": 10}
    assert decode_regions(model, {"a": np.array(["A"] * 22 + ["C"] * 9 + [""])}) is None
    assert decode_regions(model, {}) is None


def test_where_regions_are_written(tmp_path):
    path = write_session(tmp_path / "s.h5", units=4)
    assert regions_of(load_session(path)).tolist() == ["CA1", "VISp", "CA1", "VISp"]
    with h5py.File(path, "a") as file:
        units = file["units"]
        units["area"] = np.array([b"root", b"LP", b"Void", b"NaN"])
        units["region_beryl"] = np.array([b"A", b"B", b"C", b"D"])
    assert regions_of(load_session(path)).tolist() == ["CA1", "VISp", "CA1", "VISp"]
    with h5py.File(path, "a") as file:
        del file["units/region_beryl"]
        file["units"].move("region", "region_beryl")
    session = load_session(path)
    assert regions_of(session).tolist() == ["CA1", "VISp", "CA1", "VISp"]
    assert regions_of(session, "area").tolist() == ["", "LP", "", ""]
    with pytest.raises(SessionError, match="regio"):
        regions_of(session, "region")
    with h5py.File(path, "a") as file:
        file["units"].move("region_beryl", "somewhere")
    assert regions_of(load_session(path)) is None


def test_what_the_session_gives_away_is_in_the_floor():
    model = network({"a": 40, "b": 40})
    region_of = {"a": labelled(["CA1", "LP"], 20), "b": labelled(["PO", "VISp"], 20)}
    with torch.no_grad():  # the sessions differ, the regions inside them do not
        model.parts("b").spikes_out.linear.weight += 3.0
    came = decode_regions(model, region_of)
    assert came["shuffled"]["balanced_accuracy"] == pytest.approx(0.5, abs=0.1)
    assert came["embedding"]["balanced_accuracy"] == pytest.approx(0.5, abs=0.12)


def test_what_the_rate_gives_away_is_of_the_bias_alone():
    region_N = labelled(["A", "B"], 20)
    for where, expected in (("bias", 1.0), ("weight", 0.5)):
        model = network({"a": 40})
        with torch.no_grad():
            getattr(model.parts("a").spikes_out.linear, where)[region_N == "A"] += 5.0
        came = decode_regions(model, {"a": region_N})
        assert came["rate"]["balanced_accuracy"] == pytest.approx(expected, abs=0.2)
        assert came["embedding"]["balanced_accuracy"] > 0.95
