"""Sessions made of NWB: each series is what the file says of it, or is left out."""

import datetime

import numpy as np
import pytest

from rt_neds.cli import main
from rt_neds.session import load_session

pynwb = pytest.importorskip("pynwb")

TIME = np.arange(600) / 10.0


def prepared(tmp_path, *series, containers=(), options=()):
    """The session of an NWB file with six units and these series."""
    nwb = pynwb.NWBFile("d", "one", datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
    rng = np.random.default_rng(0)
    for _ in range(6):
        nwb.add_unit(spike_times=np.sort(rng.uniform(0, 60, 300)))
    module = nwb.create_processing_module("behavior", "b")
    for one in series:
        module.add(one)
    for name, inside in containers:
        container = pynwb.behavior.BehavioralTimeSeries(name=name)
        container.add_timeseries(inside)
        module.add(container)
    with pynwb.NWBHDF5IO(str(tmp_path / "x.nwb"), "w") as file:
        file.write(nwb)
    argv = ["prepare", "nwb", str(tmp_path / "x.nwb"), "--out", str(tmp_path / "S.h5"), "--quiet"]
    assert main([*argv, *options]) == 0
    return load_session(tmp_path / "S.h5")


def series(name, data, time=TIME, **fields):
    return pynwb.TimeSeries(name=name, data=data, unit="a", timestamps=time, **fields)


def test_values_are_in_the_units_of_the_file(tmp_path):
    session = prepared(
        tmp_path, series("temp", np.arange(600.0), conversion=2.0, offset=100.0)
    )  # fmt: skip
    assert np.allclose(session.series("behavior_temp.temp").values_L, 100 + 2 * np.arange(600))


def test_values_without_a_time_are_left_out(tmp_path):
    time = TIME.copy()
    time[-5:] = np.nan
    session = prepared(tmp_path, series("wheel", np.sin(TIME), time))
    kept = session.series("behavior_wheel.wheel")
    assert np.allclose(kept.values_L, np.sin(TIME[:-5]))
    assert kept.domain_K2.tolist() == [[0, int(TIME[-6] * 30_000)]]


def test_a_series_of_no_time_is_none(tmp_path):
    assert prepared(tmp_path, series("w", np.sin(TIME), TIME * np.nan)).behaviours() == []


def test_series_of_one_name_are_told_apart_by_their_containers(tmp_path):
    eyes = [
        (side, series("pupil", np.full(600, of))) for side, of in (("LeftEye", 1), ("RightEye", 2))
    ]
    session = prepared(tmp_path, containers=eyes)
    assert session.behaviours() == ["behavior_RightEye_pupil.pupil", "behavior_pupil.pupil"]
    assert session.series("behavior_pupil.pupil").values_L[0] == 1
    assert session.series("behavior_RightEye_pupil.pupil").values_L[0] == 2


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
