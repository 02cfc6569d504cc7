"""The GRU: it finds a lagged code and a class, carries its state, and sees no future."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from offline.baselines import gru as module
from offline.baselines.gru import gru
from offline.metrics import r2
from rt_neds.errors import ConfigError
from tests.baselines.making import binned_session

T = 2000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_STEPS", 60)
    monkeypatch.setattr(module, "VALIDATE_EVERY", 20)
    monkeypatch.setattr(module, "BINS", 640)
    monkeypatch.setattr(module, "WINDOW", 80)
    monkeypatch.setattr(module, "LEAD", 30)
    monkeypatch.setattr(module, "LEARNING_RATE", 1e-2)


@pytest.fixture(scope="module")
def counts_TN() -> NDArray[np.int64]:
    return np.random.default_rng(0).poisson(1.0, size=(T, 6))


@pytest.fixture(scope="module")
def speed_T(counts_TN: NDArray) -> NDArray[np.float64]:
    """What unit 0 did less what unit 1 did, in the last five bins, in units far from 1."""
    recent_TN = np.stack([np.convolve(c, np.ones(5))[:T] for c in counts_TN.T], axis=1)
    return 500.0 + 20.0 * (recent_TN[:, 0] - recent_TN[:, 1])


def test_finds_a_speed_and_a_side_together(counts_TN: NDArray, speed_T: NDArray) -> None:
    side_T = (speed_T > 500).astype(float)
    binned = binned_session(counts_TN, speed_T, side=side_T)
    test = np.flatnonzero(binned.of_split("test"))
    predicted = gru(binned, ["speed", "side"], test, classes={"side": 2})
    assert r2(speed_T[test], predicted["speed"]) > 0.7
    assert predicted["side"].shape == (len(test), 2)
    np.testing.assert_allclose(predicted["side"].sum(axis=1), 1.0, atol=1e-6)
    assert np.mean(predicted["side"].argmax(axis=1) == side_T[test]) > 0.8


def test_no_future_spike_and_no_test_label_is_used(counts_TN: NDArray, speed_T: NDArray) -> None:
    now, asked = 1700, np.arange(1650, 1701)
    later_TN, later_T = counts_TN.copy(), speed_T.copy()
    later_TN[now + 1 :] = 7
    later_T[1600:] = -1e6
    expected = gru(binned_session(counts_TN, speed_T), ["speed"], asked)["speed"]
    poked = gru(binned_session(later_TN, later_T), ["speed"], asked)["speed"]
    np.testing.assert_array_equal(poked, expected)
    later_TN[now] += 5
    poked = gru(binned_session(later_TN, later_T), ["speed"], asked)["speed"]
    np.testing.assert_array_equal(poked[:-1], expected[:-1])
    assert poked[-1] != expected[-1]


def test_state_is_carried_from_the_first_bin(
    counts_TN: NDArray, speed_T: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the session is cut and whatever is asked, the values are those of one pass."""
    binned = binned_session(counts_TN, speed_T)
    whole = gru(binned, ["speed"], np.arange(T))["speed"]
    monkeypatch.setattr(module, "BLOCK", 130)
    bins = np.random.default_rng(1).permutation(T)[:40]
    np.testing.assert_allclose(gru(binned, ["speed"], bins)["speed"], whole[bins], atol=1e-2)
    assert gru(binned, ["speed"], np.arange(0))["speed"].shape == (0,)


def test_what_is_live_is_read_where_it_is_known_and_not_before(
    counts_TN: NDArray, speed_T: NDArray
) -> None:
    side_T = (speed_T > 500).astype(float)
    binned = binned_session(counts_TN, speed_T, side=side_T, depth=np.roll(speed_T, 3))
    known_T = np.random.default_rng(2).random(T) < 0.7
    binned.shown_TM[:, 2] = binned.shown_TM[:, 3] = known_T
    known_T[1700], asked = True, np.arange(1640, 1701)
    binned.shown_TM[1700] = True

    def decoded() -> NDArray:
        return gru(binned, ["speed"], asked, classes={"side": 2}, live=["side", "depth"])["speed"]

    expected = decoded()
    other_T = ~known_T | (np.arange(T) > 1700)
    binned.values_TM[other_T, 2] = 1 - binned.values_TM[other_T, 2]
    binned.values_TM[other_T, 3] = -7e3
    np.testing.assert_array_equal(decoded(), expected)
    binned.values_TM[1700, 3] += 50.0
    assert decoded()[-1] != expected[-1]


def test_what_is_live_is_read_in_sds_or_classes_beside_whether_it_is_known(
    counts_TN: NDArray, speed_T: NDArray
) -> None:
    binned = binned_session(counts_TN, speed_T, side=(np.arange(T) % 3).astype(float))
    binned.shown_TM[::5, 1:] = False
    known_T = binned.shown_TM[:, 1]
    train = speed_T[:1200][known_T[:1200]]
    expected_TG = np.stack(
        [
            *((np.arange(T) % 3 == c) & known_T for c in range(3)),
            known_T,
            np.where(known_T, (speed_T - train.mean()) / train.std(), 0.0),
            known_T,
        ],
        axis=1,
    )
    found_TG = module._observed(binned, ["side", "speed"], {"side": 3})
    np.testing.assert_allclose(found_TG, expected_TG, atol=1e-5)


def test_what_is_live_and_never_known_in_training_is_read_as_it_is(
    counts_TN: NDArray, speed_T: NDArray
) -> None:
    binned = binned_session(counts_TN, speed_T)
    binned.shown_TM[:1700, 1] = False
    expected_TG = np.stack([np.where(np.arange(T) < 1700, 0.0, speed_T), np.arange(T) >= 1700], 1)
    np.testing.assert_allclose(module._observed(binned, ["speed"], {}), expected_TG)


def test_unrecorded_bins_enter_as_silence(counts_TN: NDArray, speed_T: NDArray) -> None:
    hole = slice(1650, 1700)
    silent_TN = counts_TN.copy()
    silent_TN[hole] = 0
    binned, silent = binned_session(counts_TN, speed_T), binned_session(silent_TN, speed_T)
    binned.shown_TM[hole, 0] = False
    asked = np.arange(1640, 1720)
    ours, expected = (gru(one, ["speed"], asked)["speed"] for one in (binned, silent))
    np.testing.assert_array_equal(ours, expected)


def test_a_seed_is_a_result_and_others_differ(counts_TN: NDArray, speed_T: NDArray) -> None:
    binned, asked = binned_session(counts_TN, speed_T), np.arange(1600, 1650)
    once, again, other = (gru(binned, ["speed"], asked, seed=s)["speed"] for s in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)


def test_nothing_to_decode_is_said(counts_TN: NDArray, speed_T: NDArray) -> None:
    with pytest.raises(ConfigError, match="name one"):
        gru(binned_session(counts_TN, speed_T), [], np.arange(3))


def test_windows_are_as_long_as_asked_and_each_scores_a_bin_that_was_asked() -> None:
    asked = np.arange(500, 600)
    starts = module._Starts(np.random.default_rng(0), 160)
    start_KB = np.stack([starts.draw(asked) for _ in range(500)])
    assert start_KB.shape[1] == 4  # 640 bins a step
    first = start_KB + module.LEAD
    assert np.all((first <= 599) & (start_KB + 159 >= 500))
    assert start_KB.min() < 500 - 150  # the last bin of a window is scored too
    assert start_KB.max() > 599 - module.LEAD - 10  # and the first after its lead


def test_a_short_window_is_lengthened(
    counts_TN: NDArray, speed_T: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, make = [], module._Starts
    monkeypatch.setattr(
        module, "_Starts", lambda rng, window: seen.append(window) or make(rng, window)
    )
    binned = binned_session(counts_TN, speed_T)
    for window in (0, 50, 160):
        gru(binned, ["speed"], np.arange(1700, 1710), window=window)
    assert seen == [80, 80, 160]


def test_each_output_is_scored_at_its_own_bin_of_the_split_it_is_for(
    counts_TN: NDArray, speed_T: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that gives back what it reads gives the counts of the bins it is scored at."""

    class Echo(module._Net):
        def forward(self, x_BTF, state=None):
            return x_BTF[..., :1] + 0 * self.out.weight.sum(), None

    calls, loss = [], module._loss

    def noted(out_SO, at_S, binned, targets, asked):
        calls.append((out_SO.requires_grad, out_SO.detach()[:, 0].numpy(), at_S, asked))
        return loss(out_SO, at_S, binned, targets, asked)

    drawn, draw = [], module._Starts.draw
    monkeypatch.setattr(
        module._Starts, "draw", lambda self, asked_S: drawn.append(asked_S) or draw(self, asked_S)
    )
    monkeypatch.setattr(module, "MOST_STEPS", 20)
    monkeypatch.setattr(module, "_Net", Echo)
    monkeypatch.setattr(module, "_loss", noted)
    monkeypatch.setattr(module, "VALIDATION_LEAD", 70)
    binned = binned_session(counts_TN, speed_T)
    binned.scored_TM[[*range(300, 400), *range(1300, 1400)], 1] = False
    gru(binned, ["speed"], np.arange(10))
    scored = {
        split: np.flatnonzero(binned.of_split(split) & binned.scored_TM[:, 1])
        for split in ("train", "val")
    }
    read_T = np.sqrt(counts_TN[:, 0])
    for trains, out_S, at_S, asked in calls:
        np.testing.assert_array_equal(np.flatnonzero(asked), scored["train" if trains else "val"])
        inside = at_S >= 0
        offset, slope = np.polynomial.Polynomial.fit(
            read_T[at_S[inside]], out_S[inside], 1
        ).convert()
        np.testing.assert_allclose(out_S[inside], offset + slope * read_T[at_S[inside]], atol=1e-4)
        if not trains:
            np.testing.assert_array_equal(np.intersect1d(at_S, scored["val"]), scored["val"])
    assert {trains for trains, *_ in calls} == {True, False}
    assert all(np.array_equal(asked_S, scored["train"]) for asked_S in drawn)


def test_a_stretch_of_validation_has_its_own_lead(
    counts_TN: NDArray, speed_T: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "VALIDATION_LEAD", 70)
    asked = np.zeros((T, 1), bool)
    asked[[*range(1200, 1300), *range(1369, 1400), 1470]] = True
    stretches = module._stretches(lambda first, stop: (first, stop), asked)
    found = [(at[0], at[-1], *read) for at, read in stretches]
    assert found == [(1200, 1399, 1130, 1400), (1470, 1470, 1400, 1471)]


def test_what_is_lost_is_the_mean_over_bins_of_the_session_that_are_asked_for(
    counts_TN: NDArray, speed_T: NDArray
) -> None:
    side_T = (speed_T > 500).astype(float)
    binned = binned_session(counts_TN, speed_T, side=side_T)
    targets = module._targets(binned, ["speed", "side"], {"side": 2})
    out_SO = torch.from_numpy(np.random.default_rng(3).normal(size=(40, 3)))
    asked = np.ones((T, 2), bool)
    asked[5:9] = False
    bins = np.r_[0:5, 9:30]
    z_S = torch.from_numpy((speed_T[bins] - speed_T[:1200].mean()) / speed_T[:1200].std())
    squared = ((out_SO[10 + bins, 0] - z_S) ** 2).mean()
    log_S = out_SO[10 + bins, 1:].log_softmax(dim=1)[np.arange(26), side_T[bins].astype(int)]
    lost = module._loss(out_SO, np.arange(-10, 30), binned, targets, asked)
    assert float(lost) == pytest.approx(float(squared - log_S.mean()), rel=1e-5)


def test_the_best_on_validation_is_used_and_training_ends_when_it_gets_no_better(
    counts_TN: NDArray, speed_T: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    binned, asked, loss = binned_session(counts_TN, speed_T), np.arange(1600, 1650), module._loss
    monkeypatch.setattr(module, "VALIDATE_EVERY", 2)
    monkeypatch.setattr(module, "MOST_STEPS", 4)
    monkeypatch.setattr(module, "PATIENCE", 3)
    said = iter(())

    def scripted(*args):
        return loss(*args) if args[0].requires_grad else next(said)

    monkeypatch.setattr(module, "_loss", scripted)
    said = iter([5.0, 1.0])
    at_the_second = gru(binned, ["speed"], asked)["speed"]
    monkeypatch.setattr(module, "MOST_STEPS", 20)
    said = iter([5.0, 1.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(gru(binned, ["speed"], asked)["speed"], at_the_second)
    assert len(list(said)) == 5


def test_without_validation_as_many_steps_are_taken_on_all_of_training_in_the_end(
    counts_TN: NDArray, speed_T: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    binned, train, runs = binned_session(counts_TN, speed_T), module._train, []
    binned.split_T[binned.of_split("val")] = 0

    def watched(net, read, targets, fitted, starts, steps=None):
        before = [weights.clone() for weights in net.parameters()]
        trained, took = train(net, read, targets, fitted, starts, steps)
        runs.append((len(fitted[0][0]), steps, took, before))
        return trained, took

    monkeypatch.setattr(module, "_train", watched)
    test = np.arange(1600, 2000)
    assert r2(speed_T[test], gru(binned, ["speed"], test)["speed"]) > 0.7
    (some, _, chosen, first), (every, steps, took, again) = runs
    assert (some, every) == (1280, 1600)
    assert 0 < chosen == steps == took <= module.MOST_STEPS
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # begun anew


def test_of_no_spikes_nothing_of_them_is_read(
    counts_TN: NDArray, speed_T: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_STEPS", 2)
    depth_T = np.random.default_rng(4).normal(size=T)
    results = [
        gru(
            binned_session(counts, depth_T, "depth", speed=speed_T),
            ["speed"],
            np.arange(1600, 1620),
            live=["depth"],
            spikes=False,
        )["speed"]
        for counts in (counts_TN, 1 + 0 * counts_TN)
    ]
    np.testing.assert_array_equal(*results)
