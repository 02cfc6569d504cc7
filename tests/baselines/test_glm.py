"""Poisson regression: the right optimum, rates that behaviour or the past explain, no future."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import PoissonRegressor

from offline.baselines import glm as module
from offline.baselines.glm import LAGS_S, encoding, fit_poisson, forward_1
from offline.metrics import bits_per_spike
from rt_neds.errors import ConfigError
from tests.baselines.making import binned_session

T = 3000


@pytest.fixture(scope="module")
def walk_TD() -> NDArray[np.float64]:
    """A smooth path through a square."""
    rng = np.random.default_rng(0)
    noise_TD = rng.normal(size=(T + 40, 2))
    smooth = [np.convolve(noise, np.hanning(40) / 4, mode="valid")[:T] for noise in noise_TD.T]
    return np.stack(smooth, axis=1) * 40 + 300


@pytest.fixture(scope="module")
def counts_TN(walk_TD: NDArray) -> NDArray[np.int64]:
    """Four place cells, one that excites the next bin's unit, and that unit."""
    rng = np.random.default_rng(1)
    z_TD = (walk_TD - walk_TD.mean(axis=0)) / walk_TD.std(axis=0)
    places = [(-0.7, -0.7), (0.7, -0.7), (-0.7, 0.7), (0.7, 0.7)]
    rate_TN = [1.5 * np.exp(-np.square(z_TD - place).sum(axis=1) / 0.6) for place in places]
    leader_T = rng.poisson(0.5, T)
    follower_T = rng.poisson(0.1 + 1.0 * np.concatenate([[0], leader_T[:-1]]))
    return np.stack([*rng.poisson(rate_TN), leader_T, follower_T], axis=1)


def test_equals_scikit_learn_in_every_unit() -> None:
    rng = np.random.default_rng(2)
    z_TF = rng.normal(size=(400, 7)) @ rng.normal(size=(7, 7))
    count_TN = rng.poisson(np.exp(0.1 * z_TF @ rng.normal(size=(7, 3)) - 0.5))
    ours = fit_poisson(z_TF, count_TN, z_TF, count_TN, alphas=(0.3,))
    for n in range(3):
        alpha = 0.3 * count_TN[:, n].mean()
        theirs = PoissonRegressor(alpha=alpha, tol=1e-9, max_iter=1000).fit(z_TF, count_TN[:, n])
        np.testing.assert_allclose(ours.weight_FN[:, n], theirs.coef_, atol=2e-3)
        assert ours.offset_N[n] == pytest.approx(theirs.intercept_, abs=2e-3)


def test_the_slope_at_the_optimum_is_nothing() -> None:
    """In single precision, with features that repeat each other and one that is constant."""
    rng = np.random.default_rng(3)
    z_TF = rng.normal(size=(1000, 5))
    z_TF = np.concatenate([z_TF, z_TF, np.zeros((1000, 1))], axis=1).astype(np.float32)
    count_TN = rng.poisson(np.exp(0.4 * z_TF[:, :4] - 1.0)).astype(np.float32)
    fitted = fit_poisson(z_TF, count_TN, z_TF, count_TN, alphas=(0.01,))
    rate_TN = np.exp(z_TF @ fitted.weight_FN + fitted.offset_N)
    slope_FN = z_TF.T @ (rate_TN - count_TN) / 1000
    slope_FN += 0.01 * count_TN.mean(axis=0) * fitted.weight_FN
    assert np.abs(slope_FN).max() < 2e-3
    assert np.abs((rate_TN - count_TN).mean(axis=0)).max() < 2e-3


def test_each_unit_gets_its_own_penalty() -> None:
    rng = np.random.default_rng(4)
    z_TF = rng.normal(size=(600, 40))
    rate_TN = np.stack([np.exp(0.8 * z_TF[:, 0]), np.ones(600)], axis=1)
    count_TN = rng.poisson(rate_TN)
    fitted = fit_poisson(z_TF[:300], count_TN[:300], z_TF[300:], count_TN[300:])
    assert fitted.weight_FN[0, 0] > 0.5
    assert np.abs(fitted.weight_FN[:, 1]).max() < 0.1


def test_in_the_end_all_of_it_is_fitted_with_the_penalties_chosen() -> None:
    """Each unit as if it were fitted by itself, to everything, with its own."""
    rng = np.random.default_rng(6)
    z_TF = rng.normal(size=(500, 20))
    count_TN = rng.poisson(np.exp(np.stack([0.5 * z_TF[:, 0], 0 * z_TF[:, 0]], axis=1)))
    alphas = (10.0, 0.001)
    split = z_TF[:300], count_TN[:300], z_TF[300:], count_TN[300:]
    fitted = fit_poisson(*split, alphas, refit=True)
    for n, alpha in enumerate((0.001, 10.0)):
        alone = fit_poisson(z_TF, count_TN[:, [n]], z_TF, count_TN[:, [n]], (alpha,))
        np.testing.assert_allclose(fitted.weight_FN[:, n], alone.weight_FN[:, 0], atol=2e-3)
        assert fitted.offset_N[n] == pytest.approx(alone.offset_N[0], abs=2e-3)
    np.testing.assert_array_equal(fitted.most_N, count_TN.max(axis=0))


def test_without_validation_all_of_training_is_fitted_in_the_end(
    counts_TN: NDArray, walk_TD: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int, bool]] = []
    fit = module.fit_poisson

    def counted(z_TF, count_TN, val_TF, val_TN, *, refit):
        sizes.append((len(z_TF), len(val_TF), refit))
        return fit(z_TF, count_TN, val_TF, val_TN, refit=refit)

    monkeypatch.setattr(module, "fit_poisson", counted)
    binned = binned_session(counts_TN, walk_TD[:, 0])
    encoding(binned, np.arange(2400, 2500))
    binned.split_T[binned.of_split("val")] = 0
    encoding(binned, np.arange(2400, 2500))
    assert sizes == [(1800, 600, False), (1920, 480, True)]


def test_encoding_finds_place_cells(walk_TD: NDArray, counts_TN: NDArray) -> None:
    binned = binned_session(counts_TN, walk_TD[:, 0], "x", y=walk_TD[:, 1])
    test = np.flatnonzero(binned.of_split("test"))
    rate_SN = encoding(binned, test)
    assert rate_SN.shape == (len(test), 6)
    assert bits_per_spike(counts_TN[test, :4], rate_SN[:, :4])["mean50"] > 0.4
    assert bits_per_spike(counts_TN[test, 4:], rate_SN[:, 4:])["mean50"] < 0.1


def test_encoding_finds_classes_where_they_are_shown(counts_TN: NDArray) -> None:
    rng = np.random.default_rng(5)
    side_T = np.repeat(rng.integers(0, 2, T // 50), 50)
    counts_TN = rng.poisson(np.where(side_T == 1, 1.5, 0.3))[:, None]
    binned = binned_session(counts_TN, side_T.astype(float), "choice")
    test = np.flatnonzero(binned.of_split("test"))
    shown = bits_per_spike(counts_TN[test], encoding(binned, test, classes={"choice": 2}))["mean50"]
    binned.shown_TM[test, 1] = False
    hidden = bits_per_spike(counts_TN[test], encoding(binned, test, classes={"choice": 2}))
    assert shown > 0.15
    assert hidden["mean50"] < 0.05


def test_forward_finds_who_follows_whom(walk_TD: NDArray, counts_TN: NDArray) -> None:
    binned = binned_session(counts_TN, walk_TD[:, 0], "x")
    test = np.flatnonzero(binned.of_split("test"))
    rate_SN = forward_1(binned, test)
    assert bits_per_spike(counts_TN[test, 5:], rate_SN[:, 5:])["mean50"] > 0.3
    assert bits_per_spike(counts_TN[test, 4:5], rate_SN[:, 4:5])["mean50"] < 0.05


def test_no_future_and_no_count_of_the_bin_itself(walk_TD: NDArray, counts_TN: NDArray) -> None:
    now, asked = 2700, np.arange(2600, 2701)
    poked_TN, poked_TD = counts_TN.copy(), walk_TD.copy()
    poked_TN[now:] += 3
    poked_TD[now + 1 :] = 500.0
    before = binned_session(counts_TN, walk_TD[:, 0], "x", y=walk_TD[:, 1])
    after = binned_session(poked_TN, poked_TD[:, 0], "x", y=poked_TD[:, 1])
    np.testing.assert_array_equal(forward_1(before, asked), forward_1(after, asked))
    np.testing.assert_array_equal(encoding(before, asked), encoding(after, asked))
    poked_TN[now - 1] += 3
    assert not np.array_equal(
        forward_1(before, asked), forward_1(binned_session(poked_TN, walk_TD[:, 0], "x"), asked)
    )


def test_displacements_and_places_of_a_single_behaviour_are_found() -> None:
    rng = np.random.default_rng(8)
    x_T = rng.normal(size=2000)
    moved_T = x_T - np.roll(x_T, 50)  # in a second
    wants_TN = np.stack([moved_T > 1, moved_T < -1, np.abs(x_T) < 0.5], axis=1)
    counts_TN = rng.poisson(0.2 + 1.5 * wants_TN)
    binned = binned_session(counts_TN, x_T)
    test = np.flatnonzero(binned.of_split("test"))
    rate_SN = encoding(binned, test)
    for n in range(3):
        assert bits_per_spike(counts_TN[test, n : n + 1], rate_SN[:, n : n + 1])["mean50"] > 0.35


def test_where_there_is_nothing_to_find_validation_keeps_it_from_harm() -> None:
    rng = np.random.default_rng(8)
    counts_TN = rng.poisson(0.7, size=(900, 10))
    binned = binned_session(counts_TN, rng.normal(size=900))
    test = np.flatnonzero(binned.of_split("test"))
    assert bits_per_spike(counts_TN[test], forward_1(binned, test))["mean50"] > -0.05


def test_what_was_not_shown_or_not_recorded_is_not_read(
    walk_TD: NDArray, counts_TN: NDArray
) -> None:
    hidden, lost = np.r_[300:500, 2500:2600], slice(600, 800)
    rates = []
    for poke in (False, True):
        poked_TN, x_T = counts_TN.copy(), walk_TD[:, 0].copy()
        if poke:
            x_T[hidden] = 900.0
            poked_TN[lost] = 0
        binned = binned_session(poked_TN, x_T, "x", y=walk_TD[:, 1])
        binned.shown_TM[hidden, 1] = False
        binned.shown_TM[lost, 0] = binned.scored_TM[lost, 0] = False
        asked = np.arange(2400, T)
        rates.append((encoding(binned, asked), forward_1(binned, asked)))
    for before, after in zip(*rates, strict=True):
        np.testing.assert_array_equal(before, after)


def test_bins_in_which_a_behaviour_is_not_shown_are_no_place_of_it(walk_TD: NDArray) -> None:
    rng = np.random.default_rng(9)
    y_T = rng.normal(size=T)
    hidden_T = np.repeat(rng.random(T // 25) < 0.4, 25)
    wants_TN = np.stack([(np.abs(y_T) < 0.4) & ~hidden_T, hidden_T], axis=1)
    counts_TN = rng.poisson(0.2 + 2.8 * wants_TN)
    binned = binned_session(counts_TN, walk_TD[:, 0], "x", y=y_T)
    binned.shown_TM[hidden_T, 2] = False
    test = np.flatnonzero(binned.of_split("test"))
    rate_SN = encoding(binned, test)
    there, hidden = wants_TN[test].T
    assert rate_SN[there, 0].mean() > 1.8
    assert rate_SN[hidden, 0].mean() == pytest.approx(0.2, abs=0.15)
    assert rate_SN[hidden, 1].mean() == pytest.approx(3.0, rel=0.15)


def test_places_lie_where_training_was_shown(walk_TD: NDArray) -> None:
    z_TD = walk_TD / walk_TD.std(axis=0)
    shown_T, train = np.random.default_rng(10).random(T) < 0.3, np.arange(1800)
    places_TP = module._places(np.where(shown_T[:, None], z_TD, 0.0), shown_T, train, 16)
    np.testing.assert_array_equal(
        places_TP[shown_T], module._places(z_TD, shown_T, train[shown_T[train]], 16)[shown_T]
    )
    np.testing.assert_allclose(places_TP.sum(axis=1), shown_T, atol=1e-5)


def test_a_displacement_is_between_two_bins_that_were_shown(counts_TN: NDArray) -> None:
    rng = np.random.default_rng(11)
    z_T, shown_T = rng.normal(size=200), rng.random(200) < 0.6
    found_TF = module._displacements(binned_session(counts_TN[:200], z_T), z_T, shown_T)
    for k, lag in enumerate(round(lag_s * 50) for lag_s in LAGS_S):
        for t in range(200):
            known = t >= lag and shown_T[t] and shown_T[t - lag]
            step = z_T[t] - z_T[t - lag] if known else 0.0
            up_and_down = found_TF[t, 2 * k : 2 * k + 2]
            np.testing.assert_allclose(up_and_down, [max(step, 0), max(-step, 0)], rtol=1e-6)


def test_bins_are_thinned_out_where_the_table_would_be_too_large(
    counts_TN: NDArray, walk_TD: NDArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    binned, shapes, fit = binned_session(counts_TN, walk_TD[:, 0]), [], module.fit_poisson

    def noted(z_TF: NDArray, *rest: NDArray, refit: bool) -> module.Poisson:
        shapes.append(z_TF.shape)
        return fit(z_TF, *rest, refit=refit)

    monkeypatch.setattr(module, "fit_poisson", noted)
    for most in (1800 * 36, 1800 * 36 - 1):  # six units' spikes in six boxcars
        monkeypatch.setattr(module, "MOST_CELLS", most)
        forward_1(binned, np.arange(10))
    assert shapes == [(1800, 36), (900, 36)]


def test_rates_stay_between_half_a_spike_in_training_and_the_most_seen(
    walk_TD: NDArray, counts_TN: NDArray
) -> None:
    x_T = walk_TD[:, 0].copy()
    x_T[2500:] += 100 * x_T.std() * np.where(np.arange(500) % 2, 1, -1)  # far from all of training
    binned = binned_session(counts_TN, x_T, "x", y=walk_TD[:, 1])
    rate_SN = encoding(binned, np.arange(2500, T))
    assert (rate_SN <= counts_TN[:1800].max(axis=0)).all()
    assert rate_SN.min() >= 0.5 / 1800


def test_order_of_bins_changes_nothing(walk_TD: NDArray, counts_TN: NDArray) -> None:
    binned = binned_session(counts_TN, walk_TD[:, 0], "x", y=walk_TD[:, 1])
    bins = np.random.default_rng(6).permutation(T)[:50]
    for method in (encoding, forward_1):
        np.testing.assert_allclose(method(binned, bins), method(binned, np.arange(T))[bins], 1e-4)


def test_where_nothing_is_shown_in_validation_the_end_of_training_chooses(
    counts_TN: NDArray, walk_TD: NDArray
) -> None:
    binned = binned_session(counts_TN, walk_TD[:, 0], "x", y=walk_TD[:, 1])
    binned.shown_TM[binned.of_split("val"), 1:] = False
    test = np.flatnonzero(binned.of_split("test"))
    rate_SN = encoding(binned, test)
    assert bits_per_spike(counts_TN[test, :4], rate_SN[:, :4])["mean50"] > 0.3


def test_nothing_shown_is_said(counts_TN: NDArray, walk_TD: NDArray) -> None:
    binned = binned_session(counts_TN, walk_TD[:, 0], "x")
    binned.shown_TM[:, 1] = False
    with pytest.raises(ConfigError, match="0 training bins"):
        encoding(binned, np.arange(10))
