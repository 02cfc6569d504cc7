"""Sessions made of NWB: each series is what the file says of it, or is left out."""

import datetime

import h5py
import numpy as np
import pytest

from rt_neds.cli import main
from rt_neds.session import load_session

pynwb = pytest.importorskip("pynwb")

TIME = np.arange(600) / 10.0


def nwb_file(observed=()):
    """An NWB file of six units, the first of which were observed in these intervals."""
    nwb = pynwb.NWBFile("d", "one", datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
    rng = np.random.default_rng(0)
    for unit in range(6):
        when = observed[unit] if unit < len(observed) else np.zeros((0, 2))
        said = {"obs_intervals": np.array(when)} if observed else {}
        nwb.add_unit(spike_times=np.sort(rng.uniform(0, 60, 300)), **said)
    return nwb


def written(tmp_path, nwb):
    with pynwb.NWBHDF5IO(str(tmp_path / "x.nwb"), "w") as file:
        file.write(nwb)
    return ["prepare", "nwb", str(tmp_path / "x.nwb"), "--out", str(tmp_path / "S.h5"), "--quiet"]


def prepared(tmp_path, *series, containers=(), options=()):
    """The session of an NWB file with six units and these series."""
    nwb = nwb_file()
    module = nwb.create_processing_module("behavior", "b")
    for one in series:
        module.add(one)
    for name, inside in containers:
        container = pynwb.behavior.BehavioralTimeSeries(name=name)
        container.add_timeseries(inside)
        module.add(container)
    assert main([*written(tmp_path, nwb), *options]) == 0
    return load_session(tmp_path / "S.h5")


def series(name, data, time=TIME, **fields):
    return pynwb.TimeSeries(name=name, data=data, unit="a", timestamps=time, **fields)


def test_values_are_in_the_units_of_the_file(tmp_path):
    session = prepared(
        tmp_path, series("temp", np.arange(600.0), conversion=2.0, offset=100.0)
    )  # fmt: skip
    assert np.allclose(session.series("behavior_temp.temp").values_L, 100 + 2 * np.arange(600))


def test_values_at_a_rate_begin_when_the_file_says(tmp_path):
    wheel = pynwb.TimeSeries(
        name="wheel", data=np.arange(100.0), unit="a", starting_time=12.5, rate=4.0
    )
    kept = prepared(tmp_path, wheel).series("behavior_wheel.wheel")
    assert kept.samples_L.tolist() == [round((12.5 + n / 4) * 30_000) for n in range(100)]
    assert kept.domain_K2.tolist() == [[375_000, round((12.5 + 99 / 4) * 30_000)]]


def test_each_column_is_a_behaviour_of_its_own_in_the_order_of_time(tmp_path):
    values = np.stack([np.sin(TIME), np.cos(TIME)], axis=1)[::-1]
    session = prepared(tmp_path, series("place", values, TIME[::-1].copy()))
    assert session.behaviours() == ["behavior_place.place_0", "behavior_place.place_1"]
    for name, expected in (("place_0", np.sin(TIME)), ("place_1", np.cos(TIME))):
        np.testing.assert_allclose(session.series(f"behavior_place.{name}").values_L, expected)


def test_units_and_trials_have_the_names_of_the_file(tmp_path):
    nwb = pynwb.NWBFile("d", "one", datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
    nwb.add_unit_column("unit_name", "which")
    for name in ("late", "early"):
        nwb.add_unit(spike_times=np.arange(0.0, 60.0, 0.5), unit_name=name)
    nwb.add_trial_column("go_time", "when")
    nwb.add_trial_column("licks", "when", index=True)  # as many as there were: no column of ours
    nwb.add_trial_column("corner", "where")
    for start in (5.0, 1.0):
        at = {"corner": [start, 0.0], "licks": [start] * int(start)}
        nwb.add_trial(start_time=start, stop_time=start + 2, go_time=start + 0.5, **at)
    assert main(written(tmp_path, nwb)) == 0
    session = load_session(tmp_path / "S.h5")
    assert session.unit_ids == ["late", "early"]
    assert session.names("trials") == ["end", "go_time", "start"]
    assert session.column("trials.go_time").tolist() == [1.5, 5.5]
    assert session.intervals("trials").tolist() == [[30_000, 90_000], [150_000, 210_000]]
    assert set(session.data.trials.timekeys()) == {"start", "end", "go_time"}


def test_values_without_a_time_are_left_out(tmp_path):
    time = TIME.copy()
    time[-5:] = np.nan
    session = prepared(tmp_path, series("wheel", np.sin(TIME), time))
    kept = session.series("behavior_wheel.wheel")
    assert np.allclose(kept.values_L, np.sin(TIME[:-5]))
    assert kept.domain_K2.tolist() == [[0, int(TIME[-6] * 30_000)]]


def test_a_series_of_no_time_is_none(tmp_path):
    assert prepared(tmp_path, series("w", np.sin(TIME), TIME * np.nan)).behaviours() == []


@pytest.mark.parametrize("shape", [(500,), (700,), (2, 600)])  # the last is transposed
def test_a_series_of_other_times_than_values_is_none(tmp_path, shape):
    nwb = nwb_file()
    module = nwb.create_processing_module("behavior", "b")
    module.add(series("wheel", np.sin(TIME)))
    module.add(series("other", np.cos(TIME)))
    argv = written(tmp_path, nwb)
    with h5py.File(tmp_path / "x.nwb", "r+") as file:
        group = file["processing/behavior/wheel"]
        said = dict(group["data"].attrs)
        del group["data"]
        group.create_dataset("data", data=np.zeros(shape)).attrs.update(said)
    assert main(argv) == 0
    assert load_session(tmp_path / "S.h5").behaviours() == ["behavior_other.other"]


def test_recorded_is_what_was_observed_of_all_units_that_say_so(tmp_path):
    observed = [[[30.0, 50.0], [0.0, 20.0]], [[10.0, 40.0]]]  # in any order; nothing of the others
    assert main(written(tmp_path, nwb_file(observed))) == 0
    domain_K2 = load_session(tmp_path / "S.h5").domain_K2
    assert domain_K2.tolist() == [[300_000, 600_000], [900_000, 1_200_000]]


@pytest.mark.parametrize("column", ["electrode_group", "electrodes"])
def test_where_one_device_has_no_spikes_its_units_are_not_silent(tmp_path, column):
    nwb = pynwb.NWBFile("d", "one", datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
    rng, probes = np.random.default_rng(0), []
    for probe in range(2):
        device = nwb.create_device(name=f"probe{probe}")
        group = nwb.create_electrode_group(f"shank{probe}", "d", location="l", device=device)
        probes.append(group)
        nwb.add_electrode(group=group, location="l")
    # Another shank of the second probe, whose units are silent for longer: it was recorded.
    probes.append(nwb.create_electrode_group("shank2", "d", location="l", device=device))
    nwb.add_electrode(group=probes[-1], location="l")
    for unit in range(6):
        shank = unit % 3
        whose = probes[shank] if column == "electrode_group" else [shank]
        times = np.sort(rng.uniform(20 * shank, 60, 900))
        nwb.add_unit(spike_times=times, **{column: whose})
    assert main(written(tmp_path, nwb)) == 0
    domain_K2 = load_session(tmp_path / "S.h5").domain_K2 / 30_000
    np.testing.assert_allclose(domain_K2, [[20, 60]], atol=0.2)


def test_units_of_no_common_time_are_no_session(tmp_path, capsys):
    assert main(written(tmp_path, nwb_file([[[0.0, 20.0]], [[30.0, 50.0]]]))) == 2
    said = capsys.readouterr().err
    assert "at no time were all units observed" in said
    assert said.count("\n") == 1


def test_series_of_one_name_are_told_apart_by_their_containers(tmp_path):
    eyes = [
        (side, series("pupil", np.full(600, of))) for side, of in (("LeftEye", 1), ("RightEye", 2))
    ]
    session = prepared(tmp_path, containers=eyes)
    assert session.behaviours() == ["behavior_RightEye_pupil.pupil", "behavior_pupil.pupil"]
    assert session.series("behavior_pupil.pupil").values_L[0] == 1
    assert session.series("behavior_RightEye_pupil.pupil").values_L[0] == 2


def test_series_that_cannot_be_told_apart_are_refused(tmp_path, capsys):
    nwb = nwb_file()
    module = nwb.create_processing_module("behavior", "b")
    for container, inside in (("eye", "pupil"), ("left_eye", "pupil"), ("left", "eye_pupil")):
        of = pynwb.behavior.BehavioralTimeSeries(name=container)
        of.add_timeseries(series(inside, np.zeros(600)))
        module.add(of)
    of = pynwb.behavior.BehavioralTimeSeries(name="another")
    of.add_timeseries(series("left_eye_pupil", np.ones(600)))
    module.add(of)
    assert main(written(tmp_path, nwb)) == 2
    said = capsys.readouterr().err
    assert "would be called behavior_left_eye_pupil; rename" in said
    assert said.count("\n") == 1


def test_the_session_is_called_what_was_asked_for(tmp_path):
    assert prepared(tmp_path, options=("--session", "monday")).id == "monday"


def test_a_unit_called_in_other_letters_is_one_line(tmp_path, capsys):
    nwb = pynwb.NWBFile("d", "one", datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
    nwb.add_unit_column("unit_name", "which")
    nwb.add_unit(spike_times=np.arange(60.0), unit_name="µ1")
    with pynwb.NWBHDF5IO(str(tmp_path / "x.nwb"), "w") as file:
        file.write(nwb)
    argv = ["prepare", "nwb", str(tmp_path / "x.nwb"), "--out", str(tmp_path / "S.h5")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "'µ1' in units.id" in said
    assert said.count("\n") == 1
