"""Sessions: what is read, and one line for each way in which a file can be wrong."""

import h5py
import numpy as np
import pytest

from rt_neds.errors import SessionError
from rt_neds.session import load_session
from tests.making import write_session


def test_a_session_is_read_in_samples(tmp_path):
    session = load_session(write_session(tmp_path / "s.h5"))
    assert session.id == "tiny"
    assert session.rate == 30_000
    assert session.unit_ids == [f"tiny/{n}" for n in range(6)]
    assert session.domain_K2.tolist() == [[0, 60 * 30_000]]
    assert (np.diff(session.records_S["sample"]) >= 0).all()
    assert session.behaviours() == ["wheel.wheel_speed"]
    series = session.series("wheel.wheel_speed")
    assert series.samples_L[:2].tolist() == [600, 1200]
    assert session.column("units.region")[1] == "VISp"
    assert session.intervals("trials")[0].tolist() == [30_000, 75_000]
    assert session.has("trials.choice")
    assert not session.has("trials.chioce")


def _write_domain(path, start, end):
    write_session(path)
    with h5py.File(path, "r+") as file:
        for name, values in (("start", start), ("end", end)):
            del file["domain"][name]
            file["domain"][name] = np.array(values, float)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "no such session file"),
        (lambda p: p.mkdir(), "not an HDF5 file"),
        (lambda p: p.write_text("hello"), "not an HDF5 file"),
        (lambda p: h5py.File(p, "w").close(), "no spikes|not a brainsets"),
        (lambda p: write_session(p, leave_out=("spikes",)), "no spikes"),
        (lambda p: write_session(p, leave_out=("units",)), "no units"),
        (lambda p: write_session(p, domain=[(70.0, 80.0)]), "no spikes in it"),
        (lambda p: _write_domain(p, [30, 0], [60, 20]), "60 before 0 s; expected the pieces"),
        (lambda p: _write_domain(p, [0, 20], [40, 60]), "40 before 20 s"),
        (lambda p: _write_domain(p, [], []), "domain has nothing"),
        (lambda p: write_session(p).write_bytes(write_session(p).read_bytes()[:3000]), "HDF5"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path, make, words):
    path = tmp_path / "s.h5"
    make(path)
    with pytest.raises(SessionError, match=words) as caught:
        load_session(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_wrong_name_gets_the_nearest_right_one(tmp_path):
    session = load_session(write_session(tmp_path / "s.h5"))
    with pytest.raises(SessionError, match="did you mean wheel_speed"):
        session.column("wheel.whel_speed")
    with pytest.raises(SessionError, match="did you mean wheel"):
        session.series("weel.wheel_speed")
    with pytest.raises(SessionError, match="not a time series"):
        session.series("trials.choice")


def test_times_become_the_nearest_sample_at_the_files_rate_and_spikes_are_in_order(tmp_path):
    path = write_session(tmp_path / "s.h5")
    sample_S = np.arange(1, 5000)  # n / 25000 * 25000 is often a little less than n
    with h5py.File(path, "r+") as file:
        spikes, order = file["spikes"], np.random.default_rng(0).permutation(len(sample_S))
        for name, values in (("timestamps", sample_S / 25_000), ("unit_index", sample_S % 6)):
            del spikes[name]
            spikes[name] = values[order]
        file["session"].attrs["sampling_rate"] = 25_000.0
    session = load_session(path)
    assert session.rate == 25_000
    np.testing.assert_array_equal(session.records_S["sample"], sample_S)
    np.testing.assert_array_equal(session.records_S["unit"], sample_S % 6)
    np.testing.assert_array_equal(session.samples(sample_S / 25_000), sample_S)
    assert session.samples([np.nan, np.inf, 2.0]).tolist() == [-1, -1, 50_000]
    with h5py.File(path, "r+") as file:
        file["spikes/timestamps"][7] = np.inf
    with pytest.raises(SessionError, match="not finite"):
        load_session(path)


@pytest.mark.parametrize("unit", [-1, 6, 99])
def test_spikes_of_unlisted_units_are_refused(tmp_path, unit):
    path = write_session(tmp_path / "s.h5")
    with h5py.File(path, "a") as file:
        file["spikes/unit_index"][0] = unit
    with pytest.raises(SessionError, match=f"unit {unit} but 6 units"):
        load_session(path)


def test_pieces_may_touch_and_none_begins_before_the_first_sample(tmp_path):
    path = tmp_path / "s.h5"
    _write_domain(path, [-0.5, 20, 40], [20, 30, 60])
    session = load_session(path)
    assert session.domain_K2.tolist() == [[0, 600_000], [600_000, 900_000], [1_200_000, 1_800_000]]
    assert session.end == 1_800_000


def test_a_column_of_yes_and_no_is_one_of_numbers(tmp_path):
    path = write_session(tmp_path / "s.h5")
    with h5py.File(path, "a") as file:
        choice = file["trials/choice"][:]
        del file["trials/choice"]
        file["trials/choice"] = choice.astype(bool)
    np.testing.assert_array_equal(load_session(path).numbers("trials.choice"), choice)


def test_a_unit_id_that_is_listed_twice_is_refused(tmp_path):
    path = write_session(tmp_path / "s.h5")
    with h5py.File(path, "a") as file:
        file["units/id"][3] = file["units/id"][1]
    with pytest.raises(SessionError, match="unit id tiny/1 is listed 2 times") as caught:
        load_session(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row"), [("trials/end", 28), ("trials/start", 0), ("wheel/timestamps", 4)]
)
def test_a_time_that_is_not_known_is_told_by_its_place(tmp_path, name, row):
    path = write_session(tmp_path / "s.h5")
    with h5py.File(path, "a") as file:
        file[name][row] = np.nan
    with pytest.raises(SessionError) as caught:
        load_session(path)
    place = f"{name.replace('/', '.')} is NaN in row {row}"
    assert str(caught.value).startswith(f"{path}: {place}; a time was expected")
    assert "\n" not in str(caught.value)


def test_real_sessions_are_read(data_dir):
    rat = load_session(data_dir / "rat_w_maze.h5")
    assert (len(rat.unit_ids), len(rat.records_S)) == (25, 518_352)
    probe = load_session(data_dir / "ibl_probe_30_trials.h5")
    assert (len(probe.unit_ids), len(probe.domain_K2)) == (262, 3)
    mouse = load_session(data_dir / "steinmetz" / "session01.h5")
    assert (len(mouse.unit_ids), len(mouse.domain_K2)) == (734, 214)


def test_several_numbers_for_each_time_are_refused(tmp_path):
    from temporaldata import IrregularTimeSeries

    from offline.prepare import writing

    path = write_session(tmp_path / "s.h5")
    data = load_session(path).data
    time_L = np.arange(1.0, 3.0, 0.02)
    data.pose = IrregularTimeSeries(
        timestamps=time_L, xy=np.zeros((len(time_L), 2)), domain=data.domain
    )
    writing.write_session(path, data)
    with pytest.raises(SessionError, match=r"pose.xy has the shape \(100, 2\)"):
        load_session(path).series("pose.xy")
