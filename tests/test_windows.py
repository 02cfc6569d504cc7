"""Sessions on the grid of bins: nothing known early, split twice, or outside the domain."""

import h5py
import msgspec
import numpy as np
import pytest
from scipy.signal import lfilter
from temporaldata import Interval, IrregularTimeSeries

from offline.config import BehaviourConfig, DataConfig
from offline.windows import bin_session, split_bins
from rt_neds.cli import main
from rt_neds.errors import SessionError
from rt_neds.session import load_session
from tests.making import TINY, tiny_config, write_session

WIDTH = 600


def binned(path, **data):
    config = tiny_config(data=data)
    return bin_session(load_session(path), config.data, config.behaviour)


def test_a_value_is_the_last_sample_at_or_before_the_right_edge(tmp_path):
    b = binned(write_session(tmp_path / "s.h5"))
    series = b.session.series("wheel.wheel_speed")
    for t in (0, 1, 17, 2998):
        edge = (t + 1) * WIDTH
        assert b.values_TM[t, 1] == pytest.approx(series.values_L[series.samples_L <= edge][-1])


def test_a_bin_is_recorded_if_all_of_it_was(tmp_path):
    path = write_session(tmp_path / "s.h5", domain=[(0.0, 20.01), (40.003, 59.99)])
    recorded = np.flatnonzero(binned(path).shown_TM[:, 0])
    np.testing.assert_array_equal(recorded, [*range(1000), *range(2001, 2999)])


def test_a_value_is_known_where_its_series_was_observed_by_the_right_edge(tmp_path):
    path = write_session(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        wheel = file["wheel"]
        wheel["domain/start"][0], wheel["domain/end"][0] = 1.01, 50.01
        wheel["wheel_speed"][300:303] = np.nan
        wheel["timestamps"][:100] = np.linspace(1.105, 1.99, 100)
    known = binned(path).scored_TM[:, 1]
    # The first value comes in the 56th bin; the one at 6.02 s is that of the bin which ends then.
    np.testing.assert_array_equal(np.flatnonzero(known), [*range(55, 300), *range(303, 2500)])


def test_speed_is_of_the_smoothed_path_and_begins_anew_after_a_hole(tmp_path):
    session = load_session(write_session(tmp_path / "s.h5", seconds=20))
    x, y = np.random.default_rng(0).normal(size=(2, 1000)).cumsum(axis=1)
    x[200:203] = y[500] = np.nan
    time = np.arange(1, 1001) * 0.02
    session.data.pose = IrregularTimeSeries(timestamps=time, x=x, y=y, domain=session.data.domain)
    speed = BehaviourConfig(source=["pose.x", "pose.y"], transform="speed", tau_s=0.1)
    b = bin_session(session, DataConfig(), {"speed": speed})
    alpha, expected = 1 - np.exp(-0.02 / 0.1), np.full(1000, np.nan)
    for first, stop in ((0, 200), (203, 500), (501, 1000)):
        path = np.stack([x, y], axis=1)[first:stop]
        begin = (1 - alpha) * path[:1]
        smooth, _ = lfilter([alpha], [1, alpha - 1], path, axis=0, zi=begin)
        step = np.linalg.norm(np.diff(smooth, axis=0), axis=1) / 0.02
        expected[first:stop] = [0, *step]
    known = np.isfinite(expected)
    np.testing.assert_array_equal(b.scored_TM[:, 1], known)
    np.testing.assert_allclose(b.values_TM[known, 1], expected[known], rtol=1e-4)


def test_a_trial_is_asked_until_it_is_decided_and_shown_after(tmp_path):
    path = write_session(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        trials = file["trials"]
        for column, later in (("stim_on_time", 0.007), ("feedback_time", 0.013), ("end", 0.003)):
            trials[column][:] += later
        stimulus, feedback, end = (trials[c][:] for c in ("stim_on_time", "feedback_time", "end"))
        number = 1 - trials["choice"][:]  # left is the first class, and 1 in the file
    b = binned(path)
    edge_T = np.arange(1, b.bins + 1)[:, None] / 50  # a bin is judged by its last moment
    asked_TK = (edge_T > stimulus) & (edge_T <= feedback)
    shown_TK = (edge_T > feedback) & (edge_T <= end)
    np.testing.assert_array_equal(b.scored_TM[:, 2], asked_TK.any(axis=1))
    np.testing.assert_array_equal(b.shown_TM[:, 2], shown_TK.any(axis=1))
    trial_T = np.where(asked_TK.any(axis=1), asked_TK.argmax(axis=1), -1)
    np.testing.assert_array_equal(b.trial_T, trial_T)
    for told_TK in (asked_TK, shown_TK):
        bins, trial = np.nonzero(told_TK)
        np.testing.assert_array_equal(b.values_TM[bins, 2], number[trial])


def test_bins_of_a_trial_are_known_whichever_of_its_variables_is_asked_there(tmp_path):
    path = write_session(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        file["trials/early"] = file["trials/start"][:] + 0.5
    choice = tiny_config().behaviour["choice"]
    early = msgspec.structs.replace(choice, scored=["stim_on_time", "early"])
    late = msgspec.structs.replace(choice, scored=["early", "feedback_time"])
    for pair in ((early, late), (late, early)):
        both = dict(zip("ab", pair, strict=True))
        b = bin_session(load_session(path), tiny_config().data, both)
        np.testing.assert_array_equal(b.trial_T, binned(path).trial_T)


def test_of_a_trial_only_what_is_told_is_shown_and_asked(tmp_path):
    path = write_session(tmp_path / "s.h5")
    plain, told = binned(path), ("choice", "stim_on_time", "feedback_time", "known_time")
    with h5py.File(path, "r+") as file:
        trials = file["trials"]
        trials["known_time"] = trials["feedback_time"][:]
        for trial, column in enumerate(told, start=3):
            values = trials[column][:].astype(float)
            values[trial] = np.nan if column != "choice" else 0.5  # neither left nor right
            del trials[column]
            trials[column] = values
    choice = msgspec.structs.replace(tiny_config().behaviour["choice"], known_from="known_time")
    b = bin_session(load_session(path), tiny_config().data, {"choice": choice})
    asked, lacking = plain.scored_TM[:, 2], np.isin(plain.trial_T, [3, 4, 5])
    np.testing.assert_array_equal(b.scored_TM[:, 1], asked & ~lacking)
    np.testing.assert_array_equal(b.trial_T, np.where(lacking, -1, plain.trial_T))
    np.testing.assert_array_equal(b.trial_of("choice", np.arange(150, 500)), b.trial_T[150:500])
    shown = plain.shown_TM[:, 2].copy()
    for trial in (3, 4, 5, 6):  # each is known at 2, 4, 6 ... s, for half a second
        shown[100 * trial + 100 : 100 * trial + 125] = False
    np.testing.assert_array_equal(b.shown_TM[:, 1], shown)


def test_splits_are_contiguous_apart_and_disjoint(tmp_path):
    b = binned(write_session(tmp_path / "s.h5"), gap_s=1.0, fractions=[0.5, 0.2, 0.3])
    (train,), (val,), (test,) = (b.spans(name) for name in ("train", "val", "test"))
    assert train[0] == 0
    assert val[0] - train[1] >= 50
    assert test[0] - val[1] >= 50
    assert test[1] == b.bins
    assert train[1] == 1500
    short = binned(b.session.path, gap_s=1.0, fractions=[0.5, 0.2, 0.3], train_minutes=0.1)
    assert short.spans("train") == [(1200, 1500)]  # the last six seconds of training
    assert (short.spans("val"), short.spans("test")) == ([val], [test])


def test_time_is_cut_by_what_was_recorded(tmp_path):
    path = write_session(tmp_path / "s.h5", domain=[(0.0, 20.0), (40.0, 60.0)])
    b = binned(path, gap_s=0.0, fractions=[0.5, 0.25, 0.25])
    assert b.spans("train") == [(0, 1000)]
    assert b.spans("val") == [(2000, 2500)]
    assert not b.shown_TM[1000:2000, 0].any()
    assert b.counts_TN(990, 2010)[10:1010].sum() == 0


def test_what_lies_before_sample_0_is_in_no_bin(tmp_path):
    early = binned(write_session(tmp_path / "e.h5", domain=[(-9.0, -7.0), (-0.5, 60.0)]))
    plain = binned(write_session(tmp_path / "p.h5", domain=[(0.0, 60.0)]))
    for name in ("values_TM", "shown_TM", "scored_TM", "split_T", "trial_T"):
        np.testing.assert_array_equal(getattr(early, name), getattr(plain, name), err_msg=name)
    early.session.records_S["sample"][:3] = [-15_000, -600, -1]
    assert early.counts_TN(-40, 0).sum() == early.spikes_N(-40, 0).sum() == 0


def test_a_trial_that_began_before_sample_0_is_cut_there(tmp_path):
    path = write_session(tmp_path / "s.h5")
    plain = binned(path, split="trials", folds=5)
    with h5py.File(path, "a") as file:
        for column in ("start", "stim_on_time"):
            file[f"trials/{column}"][0] = -0.3
    early = binned(path, split="trials", folds=5)
    assert early.spans("test") == [(0, plain.spans("test")[0][1])]
    asked = early.scored_TM[:, 2]
    assert asked[:100].all()  # the first trial is decided at 2 s
    assert (early.trial_T[:100] == 0).all()
    np.testing.assert_array_equal(asked[100:], plain.scored_TM[100:, 2])


def test_a_session_in_seconds_of_a_calendar_is_refused(tmp_path):
    def later(seconds):
        path = write_session(tmp_path / f"{seconds:g}.h5")
        with h5py.File(path, "r+") as file:
            for name in ("spikes/timestamps", "spikes/domain/start", "spikes/domain/end"):
                file[name][:] += seconds
            for name in ("domain/start", "domain/end"):
                file[name][:] += seconds
        return path

    assert binned(later(7200.0)).bins == 363_000
    with pytest.raises(SessionError, match="begins at 1.7e[+]09 s; .* subtract the time at which"):
        binned(later(1.7e9))


def test_a_trial_that_a_cut_goes_through_is_in_no_split(tmp_path):
    path = write_session(tmp_path / "s.h5", seconds=200)
    starts = np.arange(1.0, 190.0, 8.0)
    columns = {"start": 0.0, "end": 7.5, "stim_on_time": 0.3, "feedback_time": 7.0}
    with h5py.File(path, "r+") as file:
        for column, later in columns.items():
            del file[f"trials/{column}"]
            file[f"trials/{column}"] = starts + later
        choice = file["trials/choice"][: len(starts)]
        del file["trials/choice"]
        file["trials/choice"] = choice
    b = binned(path, gap_s=1.0)  # training ends at 140 s
    of = [set(b.trial_T[b.of_split(s) & b.scored_TM[:, 2]]) for s in ("train", "val", "test")]
    assert all(of)
    assert not of[0] & of[1]
    assert not of[1] & of[2]
    assert set.union(*of) == set(range(len(starts))) - {17}  # decided from 137.3 to 144 s


def test_what_was_known_of_one_trial_is_not_shown_of_the_next(tmp_path):
    path = write_session(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        file["trials/end"][:] = file["trials/start"][:] + 2.6  # the next one starts after 2.0
        for column in file["trials"]:
            if isinstance(file[f"trials/{column}"], h5py.Dataset):  # in any order
                file[f"trials/{column}"][:] = file[f"trials/{column}"][:][::-1]
    b = binned(path)
    assert b.shown_TM[:, 2].any()
    assert not (b.shown_TM[:, 2] & b.scored_TM[:, 2]).any()
    plain = binned(write_session(tmp_path / "p.h5"))
    asked = plain.scored_TM[:, 2]
    np.testing.assert_array_equal(b.scored_TM[:, 2], asked)
    np.testing.assert_array_equal(b.values_TM[asked, 2], plain.values_TM[asked, 2])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_classes_are_known_whatever_the_numbers_are_kept_in(tmp_path, kind):
    path = write_session(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        right = np.arange(len(file["trials/choice"])) % 7 == 0
        del file["trials/choice"]
        file["trials/choice"] = np.where(right, 0.2, 0.5).astype(kind)
    classes = {"even": 0.5, "right": 0.2}
    block = msgspec.structs.replace(tiny_config().behaviour["choice"], classes=classes)
    b = bin_session(load_session(path), tiny_config().data, {"block": block})
    assert set(np.unique(b.trial_T)) == {-1, *range(len(right))}
    assert (b.values_TM[b.scored_TM[:, 1], 1] == right[b.trial_T[b.scored_TM[:, 1]]]).all()


@pytest.mark.parametrize(
    ("none", "right", "misnamed"), [(0.5, 0.2, False), (0.1, 0.0, False), (0.5, 0.0, True)]
)
def test_many_values_of_no_class_are_refused_where_a_class_never_comes_up(
    tmp_path, none, right, misnamed
):
    path = write_session(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        share = np.arange(29) / 29
        file["trials/choice"][:] = np.where(share < none, 2, np.where(share < none + right, 0, 1))
    if misnamed:
        with pytest.raises(SessionError, match="is 1, 2; classes left = 1, right = 0 were"):
            binned(path)
    else:
        asked = binned(path).scored_TM[:, 2]
        assert asked.sum() == 50 * np.count_nonzero(share >= none)


def test_folds_over_trials_cover_every_trial_once(tmp_path):
    path = write_session(tmp_path / "s.h5")
    tested = np.zeros(3000, int)
    for fold in range(5):
        b = binned(path, split="trials", folds=5, fold=fold)
        tested += b.of_split("test")
        assert not (b.of_split("test") & b.of_split("train")).any()
        assert b.of_split("val").any()
    assert tested.max() == 1
    scored = b.scored_TM[:, 2]
    assert tested[scored].min() == 1


def test_folds_follow_time_in_whatever_order_trials_are_listed(tmp_path):
    path = write_session(tmp_path / "s.h5")
    config = DataConfig(split="trials", folds=5, fold=1)
    expected = split_bins(load_session(path), config, 3000, WIDTH)
    with h5py.File(path, "r+") as file:
        order = np.random.default_rng(0).permutation(29)
        for column in ("start", "end", "stim_on_time", "feedback_time", "choice"):
            file[f"trials/{column}"][:] = file[f"trials/{column}"][:][order]
    np.testing.assert_array_equal(split_bins(load_session(path), config, 3000, WIDTH), expected)


def test_counts_beyond_the_session_are_empty(tmp_path):
    b = binned(write_session(tmp_path / "s.h5"))
    whole = b.counts_TN(0, b.bins)
    assert whole.sum() == len(b.session.records_S)
    around = b.counts_TN(-7, b.bins + 9)
    np.testing.assert_array_equal(around[7:-9], whole)
    assert around[:7].sum() == around[-9:].sum() == 0
    np.testing.assert_array_equal(b.counts_TN(100, 140), whole[100:140])
    for first, stop in ((-7, b.bins + 9), (100, 140)):
        spikes = whole[max(first, 0) : stop].sum(axis=0)
        np.testing.assert_array_equal(b.spikes_N(first, stop), spikes)
    values = b.cut(b.values_TM, -7, b.bins + 9)
    np.testing.assert_array_equal(values[7:-9], b.values_TM)
    assert not values[:7].any()
    assert not values[-9:].any()


@pytest.mark.parametrize("later", [0, 1, 299, 599])
def test_a_grid_moved_by_part_of_a_bin_counts_what_falls_into_it(tmp_path, later):
    b = binned(write_session(tmp_path / "s.h5", seconds=10))
    sample_S, unit_S = b.session.records_S["sample"], b.session.records_S["unit"]
    for first, stop in ((-2, 3), (470, 503), *((n, n + 13) for n in range(0, 400, 13))):
        edges = np.arange(first, stop + 1) * WIDTH + later
        expected, _, _ = np.histogram2d(sample_S, unit_S, bins=(edges - 0.5, np.arange(7) - 0.5))
        np.testing.assert_array_equal(b.counts_TN(first, stop, later), expected)


def test_classes_over_time_are_counted_in_their_order_whatever_stands_for_them(tmp_path):
    path, out = write_session(tmp_path / "s.h5"), tmp_path / "o.h5"
    states = [7, 3, 3, 9, 7] + 5 * [float("nan")]
    rows = [f"{1.01 + 0.02 * t},{state}" for t, state in enumerate(states)]
    (tmp_path / "task.csv").write_text("\n".join(["time,state", *rows]).replace("nan", ""))
    argv = ["prepare", "session", str(path), "--tables", str(tmp_path / "task.csv")]
    assert main([*argv, "--out", str(out), "--quiet"]) == 0
    config = {
        "state": BehaviourConfig(
            source="task.state", kind="categorical", classes={"sits": 3, "runs": 7}
        )
    }
    b = bin_session(load_session(out), DataConfig(), config)
    asked = np.flatnonzero(b.scored_TM[:, 1])
    np.testing.assert_array_equal(asked, [50, 51, 52, 54])
    np.testing.assert_array_equal(b.values_TM[asked, 1], [1, 0, 0, 1])
    np.testing.assert_array_equal(b.shown_TM[:, 1], b.scored_TM[:, 1])
    assert b.by_trial == ()
    assert (b.trial_of("state", asked) == -1).all()


def test_missing_behaviours_and_splits(tmp_path):
    session = load_session(write_session(tmp_path / "s.h5", leave_out=("wheel",)))
    config = tiny_config()
    with pytest.raises(SessionError, match=r"no wheel\.wheel_speed"):
        bin_session(session, config.data, config.behaviour)
    assert bin_session(session, config.data, config.behaviour, require=False).present == ("choice",)
    only = {"speed": BehaviourConfig(source="wheel.wheel_speed")}
    with pytest.raises(SessionError, match="has none of speed"):
        bin_session(session, config.data, only, require=False)
    with pytest.raises(SessionError, match="stands for a split that the file itself names"):
        bin_session(session, DataConfig(split="blocked"), config.behaviour, require=False)


def test_a_named_split_may_have_nothing_to_test(tmp_path):
    session = load_session(write_session(tmp_path / "s.h5"))
    whole = {"train": (0.0, 40.0), "val": (42.0, 50.0), "test": (52.0, 60.0)}
    config, data = tiny_config(), DataConfig(split="pretrain")
    for name, (start, end) in whole.items():
        if name == "val":
            with pytest.raises(SessionError, match="no pretrain_val_domain"):
                bin_session(session, data, config.behaviour)
        if name == "test":
            assert not bin_session(session, data, config.behaviour).of_split("test").any()
        domain = Interval(start=np.array([start]), end=np.array([end]))
        setattr(session._data, f"pretrain_{name}_domain", domain)
    b = bin_session(session, data, config.behaviour)
    spans = {name: b.spans(name) for name in whole}
    assert spans == {"train": [(0, 2000)], "val": [(2100, 2500)], "test": [(2600, 3000)]}
    session._data.pretrain_val_domain.start[0] = session._data.pretrain_train_domain.end[0] = 40.01
    b = bin_session(session, data, config.behaviour)
    assert (b.spans("train"), b.spans("val")) == ([(0, 2000)], [(2001, 2500)])  # 2000 is of both


def test_the_rat_is_scored_only_where_it_is_tracked(data_dir):
    session = load_session(data_dir / "rat_w_maze.h5")
    config = {
        "x": BehaviourConfig(source="position.x"),
        "speed": BehaviourConfig(source=["position.x", "position.y"], transform="speed"),
    }
    b = bin_session(session, DataConfig(split="blocked"), config)
    tracked = b.scored_TM[:, 1]
    assert tracked.sum() == pytest.approx(2290 * 50, rel=0.01)
    seconds = {name: b.of_split(name).sum() / 50 for name in ("train", "val", "test")}
    assert seconds == pytest.approx({"train": 790 * 2, "val": 99 * 2, "test": 210 * 2}, rel=0.01)
    assert 0 < b.values_TM[tracked, 2].mean() < 200


def test_tiny_is_what_the_tests_think():
    assert list(TINY["behaviour"]) == ["speed", "choice"]


def test_refit_trains_on_validation_too_and_never_on_test(tmp_path):
    session = load_session(write_session(tmp_path / "s.h5"))
    for split in ("time", "trials"):
        apart, joined = (
            split_bins(session, DataConfig(split=split, refit=refit), 3000, 600)
            for refit in (False, True)
        )
        assert (joined == 0).sum() == (apart == 0).sum() + (apart == 1).sum() > (apart == 0).sum()
        assert ((joined == 2) == (apart == 2)).all()
        assert not (joined == 1).any()
