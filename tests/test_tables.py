"""Behaviour and trials from CSV files."""

import csv
import json

import numpy as np
import pytest

from offline.prepare.tables import read_csv
from offline.prepare.writing import series_of, session_data, trials_of, write_session
from rt_neds.cli import main
from rt_neds.errors import SessionError
from rt_neds.session import load_session
from tests import making

WHEEL = "time,speed,position\n1.0,0.5,\n1.02,-2,3\n1.04,1e1,4\n"
TRIALS = "start,end,choice,go_time,side\n3,4,1,3.5,left\n1,2,0,,right\n,2,1,1,left\n"


@pytest.fixture
def session(tmp_path):
    return making.write_session(tmp_path / "s.h5", leave_out=("wheel", "trials"))


def prepare(session, out, *tables):
    argv = ["prepare", "session", str(session), "--out", str(out), "--quiet", "--tables"]
    return main([*argv, *map(str, tables)])


def test_tables_become_series_and_trials(session, tmp_path):
    (tmp_path / "wheel.csv").write_text(WHEEL, encoding="utf-8-sig")  # as Excel writes it
    (tmp_path / "trials.csv").write_text(TRIALS)
    out = tmp_path / "out.h5"
    assert prepare(session, out, tmp_path / "wheel.csv", tmp_path / "trials.csv") == 0
    came, before = load_session(out), load_session(session)
    np.testing.assert_array_equal(came.records_S, before.records_S)
    assert (came.id, came.unit_ids, came.rate) == (before.id, before.unit_ids, before.rate)
    assert came.behaviours() == ["wheel.position", "wheel.speed"]
    speed = came.series("wheel.speed")
    np.testing.assert_array_equal(speed.samples_L, [30_000, 30_600, 31_200])
    np.testing.assert_array_equal(speed.values_L, [0.5, -2, 10])
    np.testing.assert_array_equal(came.series("wheel.position").values_L, [np.nan, 3, 4])
    # In order of start; a trial without one is left out, a time not known is NaN.
    np.testing.assert_array_equal(came.intervals("trials"), [[30_000, 60_000], [90_000, 120_000]])
    np.testing.assert_array_equal(came.column("trials.choice"), [0, 1])
    np.testing.assert_array_equal(came.column("trials.go_time"), [np.nan, 3.5])
    assert came.column("trials.side").tolist() == ["right", "left"]
    assert set(came.data.trials.timekeys()) == {"start", "end", "go_time"}


def test_rows_that_say_nothing_of_the_recording_are_counted(session, tmp_path, capsys):
    (tmp_path / "wheel.csv").write_text("time,speed\n-1,0\n1,1\n2,2\n")
    (tmp_path / "trials.csv").write_text(TRIALS)
    argv = ["prepare", "session", str(session), "--out", str(tmp_path / "o.h5"), "--tables"]
    assert main([*argv, str(tmp_path / "wheel.csv"), str(tmp_path / "trials.csv")]) == 0
    told = capsys.readouterr().err
    assert "wheel: 3 rows, 1 of them outside what was recorded" in told
    assert "trials: 2 rows; 1 left out, of no start or end" in told


def test_rows_between_pieces_of_a_recording_are_outside_of_it(tmp_path, capsys):
    session = making.write_session(
        tmp_path / "s.h5", domain=[(0.0, 10.0), (20.0, 40.0)], leave_out=("wheel",)
    )
    (tmp_path / "wheel.csv").write_text("time,speed\n5,0\n15,1\n16,2\n20,2\n40,3\n")
    argv = ["prepare", "session", str(session), "--out", str(tmp_path / "o.h5"), "--tables"]
    assert main([*argv, str(tmp_path / "wheel.csv")]) == 0
    assert "wheel: 5 rows, 2 of them outside what was recorded" in capsys.readouterr().err


def test_half_of_a_table_may_lie_outside_and_empty_lines_are_none(session, tmp_path, capsys):
    (tmp_path / "wheel.csv").write_text("time,speed\n\n1,1\n , \n60,2\n61,3\n62,4\n\n")
    argv = ["prepare", "session", str(session), "--out", str(tmp_path / "o.h5"), "--tables"]
    assert main([*argv, str(tmp_path / "wheel.csv")]) == 0
    assert "wheel: 4 rows, 2 of them outside" in capsys.readouterr().err


def test_a_session_without_an_id_is_called_after_its_file(tmp_path):
    session = making.write_session(tmp_path / "s.h5", leave_out=("session", "wheel", "trials"))
    (tmp_path / "wheel.csv").write_text(WHEEL)
    out, told = tmp_path / "monday.h5", tmp_path / "told.json"
    argv = ["prepare", "session", str(session), "--out", str(out), "--json", str(told), "--quiet"]
    assert main([*argv, "--tables", str(tmp_path / "wheel.csv")]) == 0
    assert json.loads(told.read_text())["session"] == load_session(out).id == "monday"


def test_what_was_a_session_is_the_same_by_way_of_csv(tmp_path):
    whole = load_session(making.write_session(tmp_path / "whole.h5"))
    series, trials = whole.data.wheel, whole.data.trials
    columns = {"time": series.timestamps, "wheel_speed": series.wheel_speed.astype(float)}
    write_csv(tmp_path / "wheel.csv", columns)
    names = [name for name in trials.keys() if name != "timekeys"]  # noqa: SIM118
    write_csv(tmp_path / "trials.csv", {name: getattr(trials, name) for name in names})
    bare = making.write_session(tmp_path / "bare.h5", leave_out=("wheel", "trials"))
    out = tmp_path / "out.h5"
    assert prepare(bare, out, tmp_path / "wheel.csv", tmp_path / "trials.csv") == 0
    came = load_session(out)
    for name in ("samples_L", "values_L"):
        expected = getattr(whole.series("wheel.wheel_speed"), name)
        np.testing.assert_array_equal(getattr(came.series("wheel.wheel_speed"), name), expected)
    for name in names:
        expected = whole.column(f"trials.{name}")
        np.testing.assert_array_equal(came.column(f"trials.{name}"), expected)


def write_csv(path, columns):
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(columns)
        out.writerows(zip(*columns.values(), strict=True))


def test_a_long_pause_is_time_in_which_nobody_looked(session, tmp_path):
    rows = [f"{t},{t}" for t in (*np.arange(1, 2, 0.1), *np.arange(5, 6, 0.1))]
    (tmp_path / "wheel.csv").write_text("\n".join(["time,speed", *rows]))
    assert prepare(session, tmp_path / "out.h5", tmp_path / "wheel.csv") == 0
    domain_K2 = load_session(tmp_path / "out.h5").series("wheel.speed").domain_K2
    np.testing.assert_array_equal(domain_K2, [[30_000, 57_000], [150_000, 177_000]])


@pytest.mark.parametrize(
    ("step", "pause", "pieces"),
    [(2.0, 15.0, 1), (2.0, 25.0, 2), (0.001, 0.9, 1), (0.001, 1.1, 2)],
)
def test_a_pause_is_long_beside_the_usual_step_and_beside_a_second(step, pause, pieces):
    time_L = np.arange(100) * step
    time_L[50:] += pause
    assert len(series_of(time_L, {"x": time_L}).domain) == pieces


def test_many_pauses_are_each_long_beside_the_usual_step():
    time_L = np.cumsum(np.where(np.arange(100) % 5, 0.2, 4.0))
    assert len(series_of(time_L, {"x": time_L}).domain) == 20


def test_trials_without_an_end_are_left_out_and_the_rest_is_in_order():
    columns = {"start": [5.0, np.nan, 1.0, 3.0], "end": [6.0, 3.0, 2.0, np.nan], "n": [3, 2, 0, 1]}
    found = trials_of({name: np.array(of) for name, of in columns.items()}, ["start", "end"])
    assert (found.start.tolist(), found.end.tolist(), found.n.tolist()) == ([1, 5], [2, 6], [0, 3])


def test_what_was_written_is_told_in_seconds_and_spikes(tmp_path):
    path = tmp_path / "s.h5"
    time_S = np.array([6.0, 1.0, 2.0, 3.0, 11.0, 4.0, 12.0])  # an end is no part of a piece
    unit_S = np.array([1, 0, 0, 1, 1, 0, 0])
    ids = {"id": np.array(["a", "b"])}
    domain_K2 = np.array([[0.0, 4.0], [10.0, 12.0]])
    told = write_session(path, session_data("s", time_S, unit_S, ids, domain_K2))
    expected = {"session": "s", "units": 2, "spikes": 4, "recorded_s": 6.0, "trials": 0}
    assert {name: told[name] for name in expected} == expected
    session = load_session(path)
    assert session.column("units.firing_rate").tolist() == [2 / 6, 2 / 6]
    assert session.records_S["unit"].tolist() == [0, 0, 1, 1]


def test_two_units_of_one_name_are_refused():
    ids, domain_K2 = {"id": np.array(["a", "b", "a"])}, np.array([[0.0, 4.0]])
    with pytest.raises(SessionError, match="3 units and 2 different ids"):
        session_data("s", np.ones(1), np.zeros(1, int), ids, domain_K2)


def test_nothing_is_left_of_a_session_that_could_not_be_written(session, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "wheel.csv").write_text(WHEEL)
    before = set(tmp_path.iterdir())
    monkeypatch.setattr("offline.prepare.writing.os.replace", full)
    assert prepare(session, tmp_path / "o.h5", tmp_path / "wheel.csv") == 2
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("wheel.csv", None, "no such table"),
        ("my wheel.csv", WHEEL, "names its group"),
        ("units.csv", WHEEL, "has units already"),
        ("wheel.csv", "", "0 columns"),
        ("wheel.csv", "time,speed\n", "names and no rows"),
        ("wheel.csv", "time;speed\n1;2\n", "a column 'time;speed'"),
        ("wheel.csv", "time,speed,speed\n1,2,3\n", "a column 'speed'"),
        ("wheel.csv", "time,speed\n1,2\n3\n", "line 3: 1 cells; expected 2"),
        ("wheel.csv", "time,speed\n1,2\n3,fast\n", "line 3: 'fast' in the column speed; a number"),
        ("wheel.csv", "time,speed\n1,\n3,fast\n", "'fast' in the column speed; numbers were"),
        ("wheel.csv", "time,speed\n1,2\n2,2\n2,3\n", "line 4"),
        ("wheel.csv", "time,speed\n1,2\n,2\n", "line 3"),
        ("wheel.csv", "time,speed\n\n1,2\n\n2,2\n1,3\n", "line 6"),  # as an editor counts
        ("wheel.csv", "\ntime,speed\n\n1,2\n2\n", "line 5"),
        ("wheel.csv", "time,speed\n1,2\n", "two rows or more"),
        ("wheel.csv", "t,speed\n1,2\n", "has the columns t, speed; expected time, or start"),
        ("wheel.csv", "time,speed\n1e9,2\n1000000001,3\n", "from 1000000000 to 1000000001"),
        ("wheel.csv", "time,speed\n0,1\n30000,2\n60000,3\n", "1 of 3 rows"),  # milliseconds
        ("trials.csv", "start,end,choice\n1,soon,1\n", "'soon' in the column end"),
        ("trials.csv", "start,end,choice\n2,1,1\n", "ends before it begins"),
        ("trials.csv", "start,end,choice\n,1,1\n", "or there is none"),
        (
            "trials.csv",
            "start,end,side\n1,2,gauch\u00e9\n",
            "'gauch\u00e9' in trials.side; a session",
        ),
        ("wheel.csv", "time,speed\n-inf,1\n2,2\n3,3\n", "line 2"),
        ("wheel.csv", "time,speed\n,1\n2,2\n3,3\n", "line 2"),
        ("wheel.csv", "time,speed\n1,1\n2,2\ninf,3\n", "line 4"),
        ("wheel.csv", "time,keys\n1,2\n2,3\n", "a column 'keys'"),
        ("wheel.csv", "time,domain\n1,2\n2,3\n", "a column 'domain'"),
        ("wheel.csv", "time,timestamps\n1,2\n2,3\n", "a column 'timestamps'"),
        ("trials.csv", "start,end,timekeys\n1,2,3\n", "a column 'timekeys'"),
        ("trials.csv", "start,end,self\n1,2,3\n", "a column 'self'"),
        ("trials.csv", "start,end,choice\n1,3,1\n4,4,1\n", "ends before it begins"),
        ("wheel.csv", b"time,speed\n1,\xff\xfe\n", "not a CSV file"),
        ("wheel.csv", 'time,speed\n1,"2\n', "not a CSV file"),
    ],
)
def test_mistakes_are_told_in_one_line(session, tmp_path, capsys, name, text, words):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    out = tmp_path / "out.h5"
    assert prepare(session, out, path) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert words in told
    assert not out.exists()


def test_a_session_needs_something_to_add(session, tmp_path, capsys):
    assert main(["prepare", "session", str(session), "--out", str(tmp_path / "o.h5")]) == 2
    assert "--tables" in capsys.readouterr().err


def test_the_session_may_be_given_another_id(session, tmp_path):
    (tmp_path / "wheel.csv").write_text(WHEEL)
    argv = ["prepare", "session", str(session), "--tables", str(tmp_path / "wheel.csv"), "--quiet"]
    assert main([*argv, "--session", "monday", "--out", str(tmp_path / "out.h5")]) == 0
    assert load_session(tmp_path / "out.h5").id == "monday"


def test_numbers_come_back_as_they_were_written(tmp_path):
    values = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-250, 250, 0.5)
    write_csv(tmp_path / "t.csv", {"time": np.arange(1000), "value": values})
    np.testing.assert_array_equal(read_csv(tmp_path / "t.csv")[0]["value"], values)


def test_words_are_no_behaviour_and_no_times(session, tmp_path):
    (tmp_path / "trials.csv").write_text(TRIALS)
    assert prepare(session, tmp_path / "out.h5", tmp_path / "trials.csv") == 0
    came = load_session(tmp_path / "out.h5")
    with pytest.raises(SessionError, match="trials.side holds 'right'; numbers were expected"):
        came.numbers("trials.side")
    with pytest.raises(SessionError, match="trials holds no column"):
        came.numbers("trials")
    assert came.numbers("trials.choice").tolist() == [0, 1]
