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
