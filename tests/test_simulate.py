"""The simulated session is what it says, and its ideal observer is exact and causal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from temporaldata import Data

from rt_neds import ideal, simulate
from rt_neds.errors import ConfigError

UNITS, MINUTES = 60, 5.0


@pytest.fixture(scope="module")
def session() -> Data:
    return simulate.simulate(units=UNITS, minutes=MINUTES, seed=3)


@pytest.fixture(scope="module")
def world() -> simulate.World:
    return simulate.make_world(units=UNITS, minutes=MINUTES, seed=3)


def observer_of(world: simulate.World) -> ideal.Observer:
    return ideal.Observer(world.tuning, world.space, world.prior)


def r2(true: np.ndarray, estimate: np.ndarray) -> float:
    return float(1 - ((true - estimate) ** 2).mean() / true.var())


def test_same_seed_same_bytes_other_seed_other_bytes(session: Data) -> None:
    again = simulate.simulate(units=UNITS, minutes=MINUTES, seed=3)
    other = simulate.simulate(units=UNITS, minutes=MINUTES, seed=4)
    assert session.spikes.timestamps.tobytes() == again.spikes.timestamps.tobytes()
    assert session.spikes.unit_index.tobytes() == again.spikes.unit_index.tobytes()
    assert session.wheel.wheel_speed.tobytes() == again.wheel.wheel_speed.tobytes()
    assert session.spikes.timestamps.tobytes() != other.spikes.timestamps.tobytes()


def test_behaviour_does_not_depend_on_the_number_of_units(session: Data) -> None:
    few = simulate.simulate(units=1, minutes=MINUTES, seed=3)
    assert np.array_equal(few.wheel.wheel_speed, session.wheel.wheel_speed)
    assert np.array_equal(few.trials.choice, session.trials.choice)


def test_the_file_reads_back_with_the_names_of_the_ibl_sessions(tmp_path: Path) -> None:
    path = tmp_path / "S.h5"
    summary = simulate.simulate_file(path, units=7, minutes=2, seed=12)
    assert [p.name for p in tmp_path.iterdir()] == ["S.h5"]
    with Data.load(path) as read:
        assert read.session.id == summary["session"] == "sim_0012"
        assert read.brainset.id
        assert read.subject.id
        assert {"id", "region_beryl", "depths", "firing_rate", "probe_id"} <= set(read.units.keys())
        assert len(set(read.units.id)) == summary["units"] == 7
        assert list(dict.fromkeys(read.units.region_beryl)) == ["PO", "LP", "DG", "CA1", "VISa"]
        assert set(read.trials.keys()) == {
            "start", "end", "stim_on_time", "go_cue_time", "movement_onset_time", "response_time",
            "feedback_time", "stim_off_time", "choice", "reward", "feedback_type", "block_prior",
            "probability_left", "stimulus_side", "stimulus_contrast", "contrast_left",
            "contrast_right", "is_valid", "trial_index",
        }  # fmt: skip
        assert len(read.trials) == summary["trials"]
        assert len(read.spikes.timestamps) == summary["spikes"]
        assert (read.domain.start[0], read.domain.end[0]) == (0.0, 120.0)
        for series in (read.wheel, read.whisker, read.ideal):
            assert len(series) == 6000
            np.testing.assert_allclose(series.timestamps, 0.02 * (np.arange(6000) + 1))
        assert (read.wheel.wheel_speed >= 0).all()
        assert (read.whisker.whisker_motion_energy > 0).all()
        assert set(read.ideal.keys()) == {"wheel_speed", "whisker_motion_energy", "choice"}
        assert set(summary["ideal"]) == set(read.ideal.keys())  # type: ignore[call-overload]


def test_spikes_are_sorted_inside_the_session_and_keep_the_refractory_time(session: Data) -> None:
    sample = session.spikes.timestamps * 30_000
    np.testing.assert_allclose(sample, np.round(sample), atol=1e-6)
    assert (np.diff(sample) >= 0).all()
    assert sample[0] >= 0
    assert sample[-1] < 30_000 * 60 * MINUTES
    gaps = [np.diff(np.round(sample[session.spikes.unit_index == n])) for n in range(UNITS)]
    assert min(g.min() for g in gaps if len(g)) >= 60


def test_placing_spikes_keeps_their_counts_even_when_bins_are_full() -> None:
    counts_TN = np.random.default_rng(0).integers(0, 10, (500, 3)).astype(np.uint8)
    sample, unit = simulate.place_spikes(counts_TN, np.random.default_rng(1))
    again_TN = np.zeros((500, 3), dtype=np.uint8)
    np.add.at(again_TN, (sample // 600, unit), 1)
    assert np.array_equal(again_TN, counts_TN)
    assert min(np.diff(sample[unit == n]).min() for n in range(3)) >= 60


def test_spike_times_have_no_rhythm_inside_the_bin(session: Data) -> None:
    phase = np.round(session.spikes.timestamps * 30_000).astype(int) % 600
    share = np.bincount(phase // 60, minlength=10) / len(phase)
    assert np.abs(share - 0.1).max() < 0.005


def test_units_fire_at_their_stated_rates(session: Data) -> None:
    expected = session.units.expected_rate * 60 * MINUTES
    counted = np.bincount(session.spikes.unit_index, minlength=UNITS)
    np.testing.assert_allclose(session.units.firing_rate, counted / (60 * MINUTES))
    assert (np.abs(counted - expected) < 5 * np.sqrt(expected)).all()
    assert 2 < np.median(session.units.firing_rate) < 12


def test_events_of_a_trial_come_in_order_and_behaviour_agrees_with_them(session: Data) -> None:
    trials = session.trials
    names = ["start", "stim_on_time", "go_cue_time", "movement_onset_time", "response_time",
             "feedback_time", "end"]  # fmt: skip
    times_RE = np.stack([getattr(trials, name) for name in names], axis=1)
    assert (np.diff(times_RE, axis=1) > 0).all()
    assert (trials.start[1:] > trials.end[:-1]).all()
    assert (trials.feedback_type == 2 * trials.reward - 1).all()
    assert (trials.reward == (trials.choice == trials.stimulus_side)).all()
    assert (np.isnan(trials.contrast_left) == (trials.stimulus_side == 0)).all()
    speed_T, end_T = session.wheel.wheel_speed, session.wheel.timestamps
    for start, onset, response in zip(
        trials.stim_on_time, trials.movement_onset_time, trials.response_time, strict=True
    ):
        assert speed_T[(end_T > start) & (end_T <= onset)].max(initial=0) == 0
        assert speed_T[(end_T > onset + 0.02) & (end_T < response)].min() > 0


def test_blocks_begin_unbiased_and_then_alternate() -> None:
    block = simulate.make_world(units=1, minutes=20, seed=0).task.timing.block_R
    assert (block[:90] == -1).all()
    assert set(block[90:]) == {0, 1}
    runs = np.diff(np.flatnonzero(np.diff(block)))
    assert len(runs)
    assert ((runs >= 20) & (runs <= 100)).all()


def enumerate_courses(
    tuning: ideal.Tuning, world: simulate.World, trial: int, last: int
) -> tuple[float, float, float]:
    """Speed, whisker energy and P(left) `last` bins after a stimulus, by summing every course."""
    space, prior, timing = world.space, world.prior, world.task.timing
    n_units, t = len(tuning.kernel_NQ), np.arange(last + 1)
    now = slice(timing.stimulus_R[trial], timing.stimulus_R[trial] + last + 1)
    counts_TN = world.counts_TN[now, :n_units].astype(float)
    tonic_TN = world.tonic_TN[now, :n_units].astype(float)
    kernel_TN = np.zeros((last + 1, n_units))
    kernel_TN[: ideal.STIMULUS] = tuning.kernel_NQ.T[: last + 1]
    b = ideal.BLOCKS.index(timing.block_R[trial])

    k, size, u = (g.ravel()[:, None] for g in np.meshgrid(range(50), range(4), range(70)))
    since = t - u
    after = since - (space.last_K - space.first_K + 1)[k]
    sums = np.zeros(4)
    for s in range(10):
        drive_TN = kernel_TN * tuning.stimulus_NS[:, s]
        log_TJ = (counts_TN * drive_TN).sum(1)[:, None] + counts_TN @ tuning.state_NJ
        log_TJ -= (tonic_TN * np.exp(drive_TN)) @ np.exp(tuning.state_NJ)
        for choice in (0, 1):
            move = space.set_slice(choice).start + space.first_K[k] + since
            row = 4 * int(choice == s // 5) + size
            feedback = space.feedback_slice.start + row * ideal.FEEDBACK + after
            over = after >= ideal.FEEDBACK
            path = np.where(since < 0, 0, np.where(after < 0, move, np.where(over, 0, feedback)))
            weight = (space.prior_K[k] * space.whisking_prior_G[size] * prior.start_SU[s][u])[:, 0]
            left = prior.left_BS[b, s]
            weight *= prior.stimulus_BS[b, s] * (left if choice else 1 - left)
            weight *= np.exp(log_TJ[t, path].sum(axis=1)) * ~over[:, -1]
            here = path[:, -1]
            sums += [
                weight.sum(), weight @ space.speed_J[here], weight @ space.whisker_J[here],
                weight.sum() * choice,
            ]  # fmt: skip
    return sums[1] / sums[0], sums[2] / sums[0] + ideal.WHISKER_REST, sums[3] / sums[0]


@pytest.mark.parametrize("last", [15, 60])
def test_observer_equals_the_sum_over_every_course_of_a_trial(
    world: simulate.World, last: int
) -> None:
    n = 8
    tuning = ideal.Tuning(*(a[:n] for a in dataclasses.astuple(world.tuning)))
    timing = world.task.timing
    traces = ideal.Observer(tuning, world.space, world.prior).observe(
        world.counts_TN[:, :n], world.tonic_TN[:, :n], timing
    )
    trial = int(np.flatnonzero(timing.end_R - timing.stimulus_R > last)[0])
    at = timing.stimulus_R[trial] + last
    got = traces.wheel_speed[at], traces.whisker_motion_energy[at], traces.choice[at]
    np.testing.assert_allclose(got, enumerate_courses(tuning, world, trial, last), rtol=1e-4)


def test_observer_does_not_see_the_future(world: simulate.World) -> None:
    timing = world.task.timing
    before = observer_of(world).observe(world.counts_TN, world.tonic_TN, timing)
    # One cut inside a trial, just before the wheel turns, and one inside a pause.
    for cut in (int(world.task.onset_R[5]), int(timing.end_R[7]) + 20):
        counts_TN = world.counts_TN.copy()
        counts_TN[cut:] = np.random.default_rng(0).permuted(counts_TN[cut:], axis=0)
        after = observer_of(world).observe(counts_TN, world.tonic_TN, timing)
        for name in ("wheel_speed", "whisker_motion_energy", "choice"):
            old_T, new_T = getattr(before, name), getattr(after, name)
            np.testing.assert_allclose(new_T[:cut], old_T[:cut], rtol=1e-5, atol=1e-7)
            assert not np.allclose(new_T[cut:], old_T[cut:], atol=0.01)


def test_choice_is_a_probability_that_means_what_it_says() -> None:
    session = simulate.simulate(units=20, minutes=20, seed=1)
    trials, choice_T = session.trials, session.ideal.choice
    at = (trials.stim_on_time * 50).astype(int) + 15
    left_R, p_R = trials.choice == 1, choice_T[at]
    for low, high in ((0, 0.25), (0.25, 0.75), (0.75, 1.01)):
        mine = (p_R >= low) & (p_R < high)
        spread = np.sqrt((p_R[mine] * (1 - p_R[mine])).sum())
        assert abs(left_R[mine].sum() - p_R[mine].sum()) < 3.5 * spread
    time_T = session.ideal.timestamps - 0.01
    outside_T = np.ones(len(time_T), dtype=bool)
    for start, end in zip(trials.start, trials.end, strict=True):
        outside_T &= (time_T < start) | (time_T > end)
    assert (choice_T[outside_T] == 0.5).all()


def test_the_ideal_beats_a_ridge_on_the_last_part(session: Data, world: simulate.World) -> None:
    lags, first = 15, int(0.7 * len(world.counts_TN))
    root_TN = np.sqrt(world.counts_TN.astype(float))
    design = np.concatenate([np.roll(root_TN, lag, axis=0) for lag in range(lags)], axis=1)
    design = (design - design[:first].mean(0)) / (design[:first].std(0) + 1e-3)
    speed_T = session.wheel.wheel_speed
    gram = design[lags:first].T @ design[lags:first]
    mean = speed_T[lags:first].mean()
    pull = design[lags:first].T @ (speed_T[lags:first] - mean)
    test = slice(first + 100, None)
    ridge = max(
        r2(speed_T[test], mean + design[test] @ np.linalg.solve(gram + a * np.eye(len(gram)), pull))
        for a in (1e2, 1e3, 1e4)
    )
    best = r2(speed_T[test], session.ideal.wheel_speed[test])
    assert best > ridge + 0.1
    assert best == pytest.approx(ideal.scores(session, 0.3)["wheel_speed"], abs=0.05)


def test_unit_tuning_tells_the_region() -> None:
    tuning = simulate.make_world(units=500, minutes=1, seed=0).tuning
    visa, hippocampus = slice(400, 500), slice(200, 400)
    assert tuning.stimulus_NS[visa].std() > 3 * tuning.stimulus_NS[hippocampus].std()


@pytest.mark.parametrize(
    "bad",
    [{"units": 0}, {"minutes": 0.1}, {"minutes": float("nan")}, {"seed": -1}],
    ids=["no units", "too short", "not a length", "seed"],
)
def test_arguments_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        simulate.simulate(**({"units": 2, "minutes": 1.0, "seed": 0} | bad))  # type: ignore[arg-type]


def test_a_path_in_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="create"):
        simulate.simulate_file(tmp_path / "none" / "S.h5", units=1, minutes=1, seed=0)
