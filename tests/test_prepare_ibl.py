"""Sessions made of ALF folders as they are downloaded, and of what only a few units tell."""

import numpy as np
import pytest

from offline.prepare.ibl import from_alf, recorded
from rt_neds.cli import main
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


def write_metrics(probe, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table(columns), probe / "clusters.metrics.pqt")


def test_a_region_is_that_of_the_unit_whose_number_it_stands_beside(tmp_path):
    write_alf(tmp_path / "eid")
    probe = tmp_path / "eid" / "alf" / "probe00"
    label = [0.2, 0.0, 0.1, 0.4, 0.3]
    write_metrics(probe, cluster_id=[2, 0, 1, 4, 3], acronym=[*"cabed"], label=label)
    session = prepared(tmp_path / "eid", tmp_path)
    assert session.column("units.acronym").tolist() == ["a", "b", "c", "d", "e"]
    assert session.column("units.label").tolist() == sorted(label)
    # As many rows as there are units, and yet not one of each.
    write_metrics(probe, cluster_id=[0, 1, 2, 3, 6], acronym=["a", "b", "c", "d", "g"])
    session = prepared(tmp_path / "eid", tmp_path)
    assert len(session.unit_ids) == 7
    assert not session.has("units.acronym")


def test_units_are_called_by_their_uuids_where_each_has_one(tmp_path):
    write_alf(tmp_path / "eid")
    probe = tmp_path / "eid" / "alf" / "probe00"
    np.save(probe / "clusters.channels.npy", np.arange(5) + 30)
    (probe / "clusters.uuids.csv").write_text("uuids\n" + "\n".join("abcde") + "\n")
    session = prepared(tmp_path / "eid", tmp_path)
    assert session.unit_ids == [*"abcde"]
    assert session.column("units.channels").tolist() == [30, 31, 32, 33, 34]
    (probe / "clusters.uuids.csv").write_text("uuids\na\nb\n")
    assert prepared(tmp_path / "eid", tmp_path).unit_ids[0] == "probe00/0"


def test_a_session_is_called_after_the_folder_that_holds_alf(tmp_path, monkeypatch):
    write_alf(tmp_path / "eid")
    monkeypatch.chdir(tmp_path / "eid")
    for folder in (tmp_path / "eid", tmp_path / "eid" / "alf", "."):
        assert from_alf(folder).session.id == "eid"


def test_where_one_probe_was_not_recorded_its_units_are_not_silent(tmp_path):
    write_alf(tmp_path / "eid")  # from 5 to 15 s, and from 30 to 40 s
    second = tmp_path / "eid" / "alf" / "probe01"
    second.mkdir()
    np.save(second / "spikes.times.npy", np.linspace(6, 39, 3000))
    np.save(second / "spikes.clusters.npy", np.arange(3000) % 3)
    session = prepared(tmp_path / "eid", tmp_path)
    np.testing.assert_allclose(session.domain_K2 / 30_000, [[6, 15], [30, 39]], atol=0.1)
    second = second.with_name("probe02")  # nothing was found on it: it says nothing
    second.mkdir()
    np.save(second / "spikes.times.npy", np.zeros(0))
    np.save(second / "spikes.clusters.npy", np.zeros(0, int))
    assert prepared(tmp_path / "eid", tmp_path).domain_K2.tolist() == session.domain_K2.tolist()


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
    both = recorded(of_first[0]).clip(6, np.nextafter(39, 40))
    for unit, name in enumerate(names):
        time_S = of_first[0][of_first[1] == unit] if unit < 5 else times[unit - 5 :: 3]
        time_S = time_S[((both[:, :1] <= time_S) & (time_S < both[:, 1:])).any(axis=0)]
        mine = session.records_S["sample"][session.records_S["unit"] == unit]
        np.testing.assert_array_equal(mine, np.rint(time_S * 30_000), err_msg=name)
    third = tmp_path / "eid" / "alf" / "probe02"
    third.mkdir()
    np.save(third / "spikes.times.npy", times + 0.001)
    np.save(third / "spikes.clusters.npy", np.arange(3000) % 2)
    session = prepared(tmp_path / "eid", tmp_path)
    assert session.unit_ids == [*names, "probe02/0", "probe02/1"]
    assert not session.has("units.depths")  # not of every unit
    mine = session.records_S["sample"][session.records_S["unit"] == 9] / 30_000 - 0.001
    for time in times[1::2]:
        if min(abs(time - edge) for edge in (6, 15, 30, 39)) > 0.1:
            assert (np.abs(mine - time).min() < 1e-4) == (not 15 < time < 30)


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
    alf, rng = tmp_path / "eid" / "alf", np.random.default_rng(0)
    when = rng.permutation(np.r_[4.0, rng.uniform(4, 41, 3000)])
    position = np.sin(when) * when
    np.save(alf / "_ibl_wheel.timestamps.npy", when)
    np.save(alf / "_ibl_wheel.position.npy", position)
    session = prepared(tmp_path / "eid", tmp_path)
    velocity, speed = session.series("wheel.wheel_vel"), session.series("wheel.wheel_speed")
    assert velocity.samples_L[0] == 120_600
    told = [position[when <= t][when[when <= t].argmax()] for t in velocity.samples_L / 30_000]
    np.testing.assert_allclose(velocity.values_L[1:], np.diff(told) / 0.02, rtol=1e-5)
    np.testing.assert_array_equal(speed.values_L, np.abs(velocity.values_L))


def test_the_wheel_is_known_from_the_first_20_ms_of_it_to_the_last(tmp_path):
    write_alf(tmp_path / "eid")
    when = np.linspace(4.005, 40.995, 5000)
    np.save(tmp_path / "eid" / "alf" / "_ibl_wheel.timestamps.npy", when)
    np.save(tmp_path / "eid" / "alf" / "_ibl_wheel.position.npy", when)
    speed = prepared(tmp_path / "eid", tmp_path).series("wheel.wheel_speed")
    assert (speed.samples_L[[0, -1]] / 600).tolist() == [202, 2049]
    assert (speed.domain_K2 // 600).tolist() == [[201, 2049]]


def test_the_wheels_speed_knows_nothing_of_what_its_encoder_tells_later(tmp_path):
    write_alf(tmp_path / "eid")
    alf = tmp_path / "eid" / "alf"
    before = prepared(tmp_path / "eid", tmp_path).series("wheel.wheel_speed")
    when = np.load(alf / "_ibl_wheel.timestamps.npy")
    position = np.load(alf / "_ibl_wheel.position.npy")
    np.save(alf / "_ibl_wheel.position.npy", position + 100 * (when > 20))
    after = prepared(tmp_path / "eid", tmp_path).series("wheel.wheel_speed")
    first = when[when > 20][0]
    past = before.samples_L / 30_000 < first
    assert before.values_L[past].tolist() == after.values_L[past].tolist()
    assert after.values_L[~past][0] > 4000


def test_a_probe_without_spikes_has_no_units(tmp_path):
    write_alf(tmp_path / "eid")
    other = tmp_path / "eid" / "alf" / "probe01"
    other.mkdir()
    np.save(other / "spikes.times.npy", np.zeros(0))
    np.save(other / "spikes.clusters.npy", np.zeros(0, np.uint16))
    assert len(prepared(tmp_path / "eid", tmp_path).unit_ids) == 5


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
    write_trials(alf, **{**TRIALS, "probabilityLeft": np.float32(TRIALS["probabilityLeft"])})
    session = prepared(tmp_path / "eid", tmp_path)
    assert session.column("trials.block_prior").tolist() == [-1, 1, 0]


def test_a_wheel_that_hardly_lasted_is_none_and_a_time_not_known_is_left_out(tmp_path):
    write_alf(tmp_path / "eid")
    alf = tmp_path / "eid" / "alf"
    when = np.load(alf / "_ibl_wheel.timestamps.npy")
    when[[0, 100]] = np.nan
    np.save(alf / "_ibl_wheel.timestamps.npy", when)
    speed = prepared(tmp_path / "eid", tmp_path).series("wheel.wheel_speed")
    np.testing.assert_allclose(speed.values_L, 3.0, atol=0.31)
    np.save(alf / "_ibl_wheel.timestamps.npy", np.linspace(7.001, 7.019, 37_001))
    assert not prepared(tmp_path / "eid", tmp_path).has("wheel")


def test_columns_as_matlab_writes_them_are_read(tmp_path):
    write_alf(tmp_path / "eid")
    before = prepared(tmp_path / "eid", tmp_path)
    probe = tmp_path / "eid" / "alf" / "probe00"
    for file in probe.glob("*.npy"):
        np.save(file, np.load(file)[:, None])
    after = prepared(tmp_path / "eid", tmp_path)
    np.testing.assert_array_equal(after.records_S, before.records_S)
    assert after.column("units.depths").tolist() == before.column("units.depths").tolist()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("probe00/spikes.times.npy", b"half", "spikes.times.npy cannot be read"),
        ("probe00/spikes.times.npy", np.zeros((4000, 2)), "shape (4000, 2); a row of numbers"),
        ("probe00/spikes.times.npy", np.ones(7), "of 7 and spikes.clusters of 4000 spikes"),
        ("probe00/clusters.depths.npy", np.array([None] * 5), "clusters.depths.npy cannot be"),
        ("probe00/spikes.clusters.npy", np.full(4000, -1), "a unit -1; units are counted from 0"),
        ("_ibl_trials.table.pqt", b"half", "_ibl_trials.table.pqt cannot be read"),
    ],
)
def test_a_file_that_came_but_in_part_is_told_in_one_line(tmp_path, capsys, name, content, words):
    pytest.importorskip("pyarrow")
    write_alf(tmp_path / "eid")
    file = tmp_path / "eid" / "alf" / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    argv = ["prepare", "ibl", "--alf", str(tmp_path / "eid"), "--out", str(tmp_path / "S.h5")]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


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
