"""The Steinmetz benchmark: what its methods may read, its splits, its scores."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from temporaldata import ArrayDict, Data, Interval, IrregularTimeSeries

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def steinmetz():
    path = ROOT / "benchmarks" / "steinmetz.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("steinmetz", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["steinmetz"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scores(steinmetz):
    import steinmetz_scores

    return steinmetz_scores


@pytest.fixture
def trials(steinmetz):
    """Sixty trials: units 0 and 1 say the side from 200 ms on, and contrasts say nothing."""
    rng = np.random.default_rng(0)
    side_K = np.where(rng.random(60) < 0.5, 1.0, -1.0)
    rate_KTN = np.full((60, 20, 5), 0.3)
    rate_KTN[:, 10:, 0] += 0.8 * (side_K > 0)[:, None]
    rate_KTN[:, 10:, 1] += 0.8 * (side_K < 0)[:, None]
    counts_KTN = rng.poisson(rate_KTN).astype(np.float32)
    contrast_K2 = rng.choice([0.0, 0.5, 1.0], (60, 2))
    return steinmetz.Trials(Path("s.h5"), "Mouse", np.arange(60), counts_KTN, side_K, contrast_K2)


def test_spikes_are_counted_from_the_stimulus_and_only_go_trials_kept(steinmetz, tmp_path):
    start = np.array([1.0, 3.0, 5.0, 7.0])
    spikes = [(1.0, 0), (1.0199, 1), (1.0201, 1), (1.3999, 0), (1.41, 0), (3.1, 0), (7.05, 1)]
    whole = Interval(start=np.array([0.0]), end=np.array([10.0]))
    data = Data(
        session=Data(id="s"),
        subject=Data(id="Mouse"),
        units=ArrayDict(id=np.array(["a", "b"])),
        spikes=IrregularTimeSeries(
            timestamps=np.array([t for t, _ in spikes]),
            unit_index=np.array([u for _, u in spikes]),
            domain=whole,
        ),
        trials=Interval(
            start=start,
            end=start + 0.4,
            stim_on_time=start,
            movement=np.array([-1, 0, 127, 1]),
            contrast_left=np.array([1.0, 0.0, 0.0, 0.5]),
            contrast_right=np.array([0.0, 0.0, 0.0, 0.5]),
            timekeys=["start", "end", "stim_on_time"],
        ),
        domain=whole,
    )
    with h5py.File(tmp_path / "s.h5", "w") as file:
        data.to_hdf5(file)
    found = steinmetz.load_trials(tmp_path / "s.h5")
    assert found.animal == "Mouse"
    np.testing.assert_array_equal(found.index_K, [0, 3])
    np.testing.assert_array_equal(found.side_K, [-1, 1])
    np.testing.assert_array_equal(found.contrast_K2, [[1, 0], [0.5, 0.5]])
    expected = np.zeros((2, 20, 2))
    expected[0, 0], expected[0, 1, 1], expected[0, 19, 0], expected[1, 2, 1] = 1, 1, 1, 1
    np.testing.assert_array_equal(found.counts_KTN, expected)


@pytest.mark.parametrize("name", ["logistic", "rrr"])
def test_methods_decode_spikes_as_far_as_they_may_read(steinmetz, trials, name):
    def score(ms: int) -> float:
        side_K, found = steinmetz.by_folds(trials.until(ms), [name])
        return roc_auc_score(side_K, found[name][0])

    assert score(400) > 0.9
    assert score(200) < 0.7


@pytest.mark.parametrize("name", ["logistic", "rrr", "rrr_pretrained", "contrasts"])
def test_no_side_of_a_test_trial_and_no_contrast_is_read(steinmetz, trials, name):
    past = (trials[:30],)
    _, expected = steinmetz.by_transfer(trials, past, None, [name])
    side_K, contrast_K2 = trials.side_K.copy(), trials.contrast_K2.copy()
    side_K[42:] *= -1
    if name != "contrasts":
        contrast_K2[:] = 9.0
    poked = dataclasses.replace(trials, side_K=side_K, contrast_K2=contrast_K2)
    _, found = steinmetz.by_transfer(poked, past, None, [name])
    np.testing.assert_array_equal(found[name], expected[name])


def test_folds_and_transfer_split_trials_in_order(steinmetz, trials, monkeypatch):
    asked = []
    monkeypatch.setitem(
        steinmetz.METHODS, "logistic", lambda t: asked.append(t) or np.zeros(len(t.test))
    )
    steinmetz.by_folds(trials, ["logistic"])
    assert [t.test.index_K.tolist() for t in asked] == np.arange(60).reshape(5, 12).tolist()
    for task in asked:
        assert sorted([*task.train.index_K, *task.test.index_K]) == list(range(60))
        assert task.validation is None
    for labelled, first in ((8, 28), (None, 0), (100, 0)):
        steinmetz.by_transfer(trials, (), labelled, ["logistic"])
        task = asked[-1]
        assert task.train.index_K.tolist() == list(range(first, 36))
        assert task.validation.index_K.tolist() == list(range(36, 42))
        assert task.test.index_K.tolist() == list(range(42, 60))


def test_settings_are_the_best_on_validation(steinmetz, trials):
    def fit(train, setting):
        return lambda held: held.side_K * setting

    task = steinmetz.Task(trials[:30], trials[30:40], trials[40:])
    found = steinmetz.chosen(task, fit, [(0.2,), (0.9,), (3.0,)])
    np.testing.assert_array_equal(found, 0.9 * trials[40:].side_K)
    one_sided = steinmetz.Task(trials[trials.side_K > 0], None, trials)
    assert not steinmetz.chosen(one_sided, fit, [(0.9,)]).any()


def test_logistic_in_the_span_of_the_trials_is_the_whole_one(steinmetz, trials):
    def features_of(t):
        return t.counts_KTN.reshape(len(t), -1).astype(float)

    x_KF = features_of(trials)
    z_KF = (x_KF - x_KF.mean(axis=0)) / np.sqrt(x_KF.var(axis=0).mean())
    plain = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-8, max_iter=1000)
    expected = 2 * plain.fit(z_KF, trials.side_K).predict_proba(z_KF)[:, 1] - 1
    found = steinmetz.logistic_scorer(trials, features_of, 0.1)(trials)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_scores_are_those_of_scikit_learn_also_when_drawn_again(scores):
    rng = np.random.default_rng(1)
    side_K = np.where(rng.random(40) < 0.4, 1.0, -1.0)
    score_K = np.round(side_K * 0.4 + rng.normal(size=40), 1) + 0.03
    weight_BK = rng.multinomial(40, np.full(40, 1 / 40), 5)
    balanced = scores.balanced_accuracy(side_K, score_K, weight_BK)
    area = scores.auc(side_K, score_K, weight_BK)
    for b, weight_K in enumerate(weight_BK):
        drawn = np.repeat(np.arange(40), weight_K)
        guess = np.where(score_K[drawn] > 0, 1, -1)
        assert balanced[b] == pytest.approx(balanced_accuracy_score(side_K[drawn], guess))
        assert area[b] == pytest.approx(roc_auc_score(side_K[drawn], score_K[drawn]))


def test_summary_gives_spread_and_an_interval_of_the_difference(scores, tmp_path):
    rng = np.random.default_rng(2)
    scored = []
    for _ in range(4):
        side_K = np.where(rng.random(50) < 0.5, 1.0, -1.0)
        good = side_K + 0.3 * rng.normal(size=(1, 50))
        bad = 0.2 * side_K + rng.normal(size=(2, 50))
        scored.append((side_K, {"logistic": bad, "rrr": good, "majority": np.ones((1, 50))}))
    summary = scores.summarise({"folds/400ms": scored})
    entry = summary["folds/400ms/auc"]
    each_MR = np.array([[roc_auc_score(s, of) for of in sc["logistic"]] for s, sc in scored])
    expected = [each_MR.mean(), each_MR.mean(axis=1).std()]
    assert entry["logistic"] == pytest.approx(expected, abs=1e-4)
    by_seed = summary["by_seed"]["folds/400ms/auc"]
    assert list(by_seed) == ["logistic"]  # the others drew nothing
    assert by_seed["logistic"] == pytest.approx(each_MR.mean(axis=0), abs=1e-4)
    assert summary["folds/400ms/balanced_accuracy"]["majority"][0] == 0.5
    path = tmp_path / "accuracy.json"
    path.write_text('{"rat": {"a": 1}, "steinmetz": {"folds/400ms": {"neds": {"auc": [1, 0]}}}}')
    shown = scores.among_all(path, summary)
    assert shown["rat"] == {"a": 1}
    of = shown["steinmetz"]["folds/400ms"]
    assert of["neds"] == {"auc": [1, 0]}
    assert of["logistic"]["seeds"] == 2
    expected = [each_MR.mean(), each_MR.mean(axis=0).std()]
    assert of["logistic"]["auc"] == pytest.approx(expected, abs=1e-4)
    assert of["rrr"]["auc"] == [entry["rrr"][0], 0.0]
    low, high = summary["intervals"]["folds/400ms/auc"]["rrr - logistic"]
    assert 0 < low < entry["rrr"][0] - entry["logistic"][0] < high
    twice = scores.summarise({"folds/300ms": scored, "folds/400ms": scored})["intervals"]
    assert twice["folds/mean/auc"]["rrr - logistic"] == [low, high]  # the trials drawn are the same
    by_session = summary["by_session"]["folds/400ms/auc"]
    assert by_session["logistic"] == pytest.approx(each_MR.mean(axis=1), abs=1e-4)
    assert summary["by_session"]["folds/400ms/balanced_accuracy"]["majority"] == [0.5] * 4
    apart_M = each_of(scored, "rrr") - each_MR.mean(axis=1)
    expected = stats.t.interval(0.95, 3, apart_M.mean(), stats.sem(apart_M))
    between = summary["between_sessions"]["folds/mean/auc"]["rrr - logistic"]
    assert between == pytest.approx([apart_M.mean(), *expected], abs=1e-4)
    pooled = scores.summarise({"equal_contrast/400ms": scored[:1]})
    assert pooled["equal_contrast/400ms/auc"]["logistic"][1] > 0


def each_of(scored, name):
    """AUC of each session, seeds averaged."""
    return np.array([np.mean([roc_auc_score(s, of) for of in sc[name]]) for s, sc in scored])


def test_a_run_pretrains_on_nine_sessions_and_tests_on_the_others(steinmetz, trials, monkeypatch):
    asked = []
    monkeypatch.setitem(
        steinmetz.METHODS, "rrr_pretrained", lambda t: asked.append(t) or np.zeros(len(t.test))
    )
    sessions = [trials[np.arange(60)] for _ in range(11)]
    protocols = ("folds", "transfer")
    found = steinmetz.run(sessions, 200, ["majority", "rrr_pretrained"], protocols)
    assert sorted(found) == [
        "equal_contrast/200ms",
        "folds/200ms",
        *(f"transfer/200ms/k={k}" for k in (16, 32, 8, "all")),
    ]
    assert all(list(of) == ["majority"] for _, of in found["folds/200ms"])
    equal = (trials.contrast_K2[:, 0] == trials.contrast_K2[:, 1]).sum()
    assert len(found["equal_contrast/200ms"][0][0]) == 11 * equal
    assert len(asked) == 2 * 4  # two new sessions, four numbers of labels
    for task in asked:
        assert len(task.past) == 9
        assert {t.counts_KTN.shape[1] for t in (*task.past, task.train, task.test)} == {10}
    assert [len(task.train) for task in asked[::2]] == [8, 16, 32, 36]


def test_a_new_animal_comes_after_sessions_of_others_alone(steinmetz, trials, monkeypatch):
    asked = []
    monkeypatch.setitem(
        steinmetz.METHODS, "rrr_pretrained", lambda t: asked.append(t) or np.zeros(len(t.test))
    )
    sessions = [dataclasses.replace(trials, animal=animal) for animal in "AABBBC"]
    found = steinmetz.run(sessions, 300, ["rrr_pretrained"], ("new_animal",))
    assert sorted(found) == [f"new_animal/300ms/k={k}" for k in (16, 32, 8, "all")]
    assert all(len(scored) == 6 for scored in found.values())
    past = ["".join(t.animal for t in task.past) for task in asked[:6]]
    assert past == ["BBBC", "BBBC", "AAC", "AAC", "AAC", "AABBB"]


def test_only_what_draws_is_run_with_each_seed(steinmetz, trials, monkeypatch):
    asked = {"neds": [], "rrr": []}
    for name, seeds in asked.items():
        monkeypatch.setitem(
            steinmetz.METHODS, name, lambda t, s=seeds: s.append(t.seed) or np.full(18, t.seed)
        )
    _, found = steinmetz.by_transfer(trials, (), None, ["neds", "rrr"], seeds=(3, 5))
    assert asked == {"neds": [3, 5], "rrr": [3]}
    assert found["neds"].tolist() == [[3] * 18, [5] * 18]
    assert found["rrr"].shape == (1, 18)


def test_odds_are_taken_from_logits_as_they_were_before_they_were_calibrated(
    steinmetz, monkeypatch
):
    import steinmetz_network as network

    asked = []

    def trained(config, paths, out, init):
        asked.append(paths)
        return {"bundle": "B", "temperature": {"s": {"side": 2.5}}}

    raw_SC = np.random.default_rng(0).normal(size=(2 * 20, 2))
    for name, fake in {
        "train": trained,
        "bin_session": lambda *rest: None,
        "load_spec": lambda *rest: None,
        "build_model": lambda *rest: None,
        "decode_spans": lambda *rest, **named: {"side": raw_SC},
    }.items():
        monkeypatch.setattr(network, name, fake)
    K = np.arange(4)
    whole = SimpleNamespace(
        side_K=np.array([1, -1, 1, 1]), counts_KTN=np.ones((4, 20, 3)), path=Path("s.h5")
    )
    logit_KT = network._trained(whole, K[:2], K[2:3], K[2:], None, ())
    np.testing.assert_allclose(logit_KT.ravel(), 2.5 * (raw_SC[:, 1] - raw_SC[:, 0]))
    assert len(asked) == 1


def test_decisions_do_not_lean_to_the_class_that_labels_had_more_of(steinmetz):
    import steinmetz_network as network

    probability = np.array([[0.3, 0.6]])
    side_K = np.array([1] * 6 + [-1] * 2)
    prior = 10 / 6  # four trials of each class are imagined beside these
    odds = probability / (1 - probability) / prior
    expected = 2 * odds / (1 + odds) - 1
    logit = np.log(probability / (1 - probability))
    came = network.at_equal_odds(logit, side_K)
    np.testing.assert_allclose(came, expected, atol=1e-12)
    alike = network.at_equal_odds(np.array([[-50.0, np.log(0.7 / 0.3), 50.0]]), np.array([1, -1]))
    np.testing.assert_allclose(alike, [[-1.0, 0.4, 1.0]], atol=1e-9)
    assert network.at_equal_odds(np.zeros((1, 1)), np.ones(8)) == 0  # one class: nothing is known
