"""Sessions made of ALF folders as they are downloaded, and of what only a few units tell."""

import numpy as np
import pytest

from offline.prepare.ibl import from_alf, recorded
from rt_neds.errors import SessionError
from rt_neds.session import load_session
from tests.test_prepare import write_alf

TRIALS = {
    "intervals_0": [6.0, 8.0, 10.0],
    "intervals_1": [7.0, 9.0, 11.0],
    "choice": [1, -1, 0],
    "feedbackType": [1.0, -1.0, 1.0],
    "probabilityLeft": [0.5, 0.8, 0.2],
}


def write_trials(folder, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    folder.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), folder / "_ibl_trials.table.pqt")


def prepared(folder, tmp_path):
    from_alf(folder).save(tmp_path / "S.h5")
    return load_session(tmp_path / "S.h5")


def test_the_newest_revision_of_each_file_is_taken(tmp_path):
    write_alf(tmp_path / "eid")
    alf = tmp_path / "eid" / "alf"
    write_trials(alf / "#2024-01-01#", **{**TRIALS, "choice": [0, 0, 0]})
    write_trials(alf / "#2025-03-03#", **TRIALS)
    probe = alf / "probe00"
    newer = probe / "#2024-05-06#"
    newer.mkdir()
    times = np.linspace(5, 40, 5000)
    np.save(newer / "spikes.times.1e3b.npy", times)
    np.save(newer / "spikes.clusters.npy", np.arange(5000) % 5)
    session = prepared(tmp_path / "eid", tmp_path)
    assert session.unit_ids == [f"probe00/{unit}" for unit in range(5)]
    assert session.records_S["sample"].tolist() == np.rint(times * 30_000).astype(int).tolist()
    assert session.column("units.depths").tolist() == [0, 40, 80, 120, 160]  # of no revision
    assert session.column("trials.choice").tolist() == [1, 0, 2]


def test_spikes_that_lie_in_a_revision_alone_are_found(tmp_path):
    write_alf(tmp_path / "eid")
    probe = tmp_path / "eid" / "alf" / "probe00"
    (probe / "#2024-05-06#").mkdir()
    for file in probe.glob("*.npy"):
        file.rename(probe / "#2024-05-06#" / file.name)
    session = prepared(tmp_path / "eid", tmp_path)
    assert session.unit_ids[0] == "probe00/0"
    assert session.column("units.depths").tolist() == [0, 40, 80, 120, 160]


def test_trials_have_the_columns_that_are_there(tmp_path):
    write_alf(tmp_path / "eid")
    alf = tmp_path / "eid" / "alf"
    some = {name: TRIALS[name] for name in ("intervals_0", "intervals_1", "choice")}
    write_trials(alf, **some)
    session = prepared(tmp_path / "eid", tmp_path)
    assert session.names("trials") == ["choice", "end", "start"]
    write_trials(alf, choice=[1])
    with pytest.raises(SessionError, match="no intervals_0"):
        from_alf(tmp_path / "eid")


def test_units_of_two_probes_are_told_apart(tmp_path):
    write_alf(tmp_path / "eid")
    first, second = (tmp_path / "eid" / "alf" / name for name in ("probe00", "probe01"))
    second.mkdir()
    times = np.linspace(6, 39, 3000)
    np.save(second / "spikes.times.npy", times)
    np.save(second / "spikes.clusters.npy", np.arange(3000) % 3)
    np.save(second / "clusters.depths.npy", np.array([7.0, 8.0, 9.0]))
    session = prepared(tmp_path / "eid", tmp_path)
    names = [f"probe00/{unit}" for unit in range(5)] + [f"probe01/{unit}" for unit in range(3)]
    assert session.unit_ids == names
    assert session.column("units.depths").tolist() == [0, 40, 80, 120, 160, 7, 8, 9]
    of_first = np.load(first / "spikes.times.npy"), np.load(first / "spikes.clusters.npy")
    for unit, name in enumerate(names):
        time_S = of_first[0][of_first[1] == unit] if unit < 5 else times[unit - 5 :: 3]
        mine = session.records_S["sample"][session.records_S["unit"] == unit]
        np.testing.assert_array_equal(mine, np.rint(time_S * 30_000), err_msg=name)
    third = tmp_path / "eid" / "alf" / "probe02"
    third.mkdir()
    np.save(third / "spikes.times.npy", times + 0.001)
    np.save(third / "spikes.clusters.npy", np.arange(3000) % 2)
    session = prepared(tmp_path / "eid", tmp_path)
    assert session.unit_ids == [*names, "probe02/0", "probe02/1"]
    assert not session.has("units.depths")  # not of every unit
    mine = session.records_S["sample"][session.records_S["unit"] == 9]
    np.testing.assert_array_equal(mine, np.rint((times[1::2] + 0.001) * 30_000))


def test_spikes_of_no_time_are_left_out_with_their_units(tmp_path):
    write_alf(tmp_path / "eid")
    probe = tmp_path / "eid" / "alf" / "probe00"
    times, unit = np.load(probe / "spikes.times.npy"), np.load(probe / "spikes.clusters.npy")
    times[10:20] = np.nan
    np.save(probe / "spikes.times.npy", times)
    session = prepared(tmp_path / "eid", tmp_path)
    assert session.records_S["unit"].tolist() == unit[np.isfinite(times)].tolist()


def test_the_wheels_speed_is_that_of_the_last_20_ms(tmp_path):
    write_alf(tmp_path / "eid")
    alf, when = tmp_path / "eid" / "alf", np.linspace(4, 41, 3000)
    np.save(alf / "_ibl_wheel.position.npy", np.sin(when) * when)
    session = prepared(tmp_path / "eid", tmp_path)
    velocity, speed = session.series("wheel.wheel_vel"), session.series("wheel.wheel_speed")
    at = velocity.samples_L / 30_000
    now, before = (np.interp(t, when, np.sin(when) * when) for t in (at, at - 0.02))
    np.testing.assert_allclose(velocity.values_L, (now - before) / 0.02, atol=1e-3)
    np.testing.assert_array_equal(speed.values_L, np.abs(velocity.values_L))


def test_times_of_trials_and_what_was_seen_have_their_names(tmp_path):
    write_alf(tmp_path / "eid")
    names = {
        "stimOn_times": "stim_on_time",
        "goCue_times": "go_cue_time",
        "firstMovement_times": "movement_onset_time",
        "response_times": "response_time",
        "feedback_times": "feedback_time",
        "stimOff_times": "stim_off_time",
        "contrastLeft": "contrast_left",
        "contrastRight": "contrast_right",
        "probabilityLeft": "probability_left",
    }
    each = {old: [6.0 + n / 9, 8.0 + n / 9, 10.0 + n / 9] for n, old in enumerate(names)}
    write_trials(tmp_path / "eid" / "alf", **{**TRIALS, **each})
    session = prepared(tmp_path / "eid", tmp_path)
    for old, new in names.items():
        assert session.column(f"trials.{new}").tolist() == each[old], new


def test_what_is_not_known_of_a_trial_stays_unknown(tmp_path):
    write_alf(tmp_path / "eid")
    alf = tmp_path / "eid" / "alf"
    write_trials(alf, **TRIALS)
    session = prepared(tmp_path / "eid", tmp_path)
    assert session.column("trials.reward").tolist() == [1, 0, 1]
    assert session.column("trials.reward").dtype.kind == "i"
    unknown = {"feedbackType": [np.nan, -1.0, 1.0], "choice": [1.0, np.nan, 0.0]}
    write_trials(alf, **{**TRIALS, **unknown})
    session = prepared(tmp_path / "eid", tmp_path)
    np.testing.assert_array_equal(session.column("trials.feedback_type"), [np.nan, -1, 1])
    np.testing.assert_array_equal(session.column("trials.reward"), [np.nan, 0, 1])
    np.testing.assert_array_equal(session.column("trials.choice"), [1, np.nan, 2])
    assert session.column("trials.block_prior").tolist() == [-1, 1, 0]


@pytest.mark.parametrize(("units", "rate"), [(4, 1.0), (10, 0.5), (1, 0.2)])
def test_a_few_quiet_units_are_no_hole_in_the_recording(units, rate):
    rng = np.random.default_rng(0)
    time_S = rng.uniform(0, 600, rng.poisson(units * rate * 600))
    assert len(recorded(time_S)) == 1


def test_a_hole_is_one_for_many_units_and_for_few():
    rng = np.random.default_rng(0)
    for rate, hole in ((200.0, 1.5), (4.0, 30.0)):
        parts = [rng.uniform(a, a + 300, int(300 * rate)) for a in (0, 300 + hole)]
        found_K2 = recorded(np.concatenate([*parts, [np.nan]]))
        assert np.allclose(found_K2, [[0, 300], [300 + hole, 600 + hole]], atol=2.0)
    assert recorded(np.zeros(0)).shape == (0, 2)


def test_half_a_second_of_many_silent_units_is_no_hole():
    rng = np.random.default_rng(0)
    time_S = np.concatenate([rng.uniform(0, 20, 40_000), rng.uniform(20.5, 40, 40_000)])
    assert len(recorded(time_S)) == 1
