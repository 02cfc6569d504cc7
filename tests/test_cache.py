"""The cache: the same session, read from disk; made anew when the file or the question changes."""

import os
import shutil

import h5py
import msgspec
import numpy as np
import pytest

from offline import cache
from offline.batches import draw_step, prepare
from offline.cache import kept
from offline.train import train
from rt_neds.errors import ConfigError, SessionError
from tests.making import tiny_config, write_session

ARRAYS = ("values_TM", "shown_TM", "scored_TM", "split_T", "trial_T")


def folders(path):
    return sorted(folder.name for folder in path.iterdir())


def test_what_comes_back_is_what_was_kept(tmp_path):
    config = tiny_config(masking={"schemes": {"decoding": 1.0, "neuron": 1.0}})
    path = write_session(tmp_path / "s.h5", domain=[(0.0, 30.0), (31.0, 60.0)])
    with h5py.File(path, "r+") as file:
        file["session"].attrs["sampling_rate"] = 25_000.0
    fresh, back = prepare(path, config), kept(path, config, tmp_path / "cache")
    assert back.binned.session.rate == fresh.binned.session.rate == 25_000
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(back.binned, name), getattr(fresh.binned, name))
    np.testing.assert_array_equal(back.reach()[1], fresh.reach()[1])
    np.testing.assert_array_equal(back.binned.session.records_S, fresh.binned.session.records_S)
    for name in ("id", "units", "rate", "present", "scales", "length"):
        assert getattr(back, name) == getattr(fresh, name)
    np.testing.assert_array_equal(back.rate_N, fresh.rate_N)
    assert back.binned.by_trial == fresh.binned.by_trial == ("choice",)
    assert back.binned.session.unit_ids == fresh.binned.session.unit_ids
    np.testing.assert_array_equal(back.binned.session.domain_K2, fresh.binned.session.domain_K2)
    np.testing.assert_array_equal(
        back.binned.counts_TN(90, 250, 77), fresh.binned.counts_TN(90, 250, 77)
    )
    assert back.binned.session.column("trials.choice").shape == (29,)  # read when asked for
    drawn = [
        next(draw_step([s], config, np.random.default_rng(3), "cpu").batches) for s in (fresh, back)
    ]
    assert drawn[0].counts_BTN.equal(drawn[1].counts_BTN)
    assert drawn[0].targets_BTM.equal(drawn[1].targets_BTM)


def test_nothing_of_the_arrays_is_in_memory(tmp_path):
    subject = kept(write_session(tmp_path / "s.h5"), tiny_config(), tmp_path / "cache")
    binned, anchors = subject.reach()
    arrays = [getattr(binned, name) for name in ARRAYS]
    for array in (*arrays, anchors, binned.session.records_S, binned._samples_S):
        base = array
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)


def test_it_is_made_anew_when_it_must_be_and_only_then(tmp_path):
    path, where = write_session(tmp_path / "s.h5"), tmp_path / "cache"
    kept(path, tiny_config(), where)
    (first,) = folders(where)
    written = (where / first / "records.npy").stat().st_mtime_ns
    kept(path, tiny_config(data={"window_bins": 50}, training={"batch": 2}), where)
    assert folders(where) == [first]
    assert (where / first / "records.npy").stat().st_mtime_ns == written
    kept(path, tiny_config(data={"bin_ms": 10.0}), where)
    kept(path, tiny_config(data={"train_minutes": 0.1}), where)
    assert len(folders(where)) == 3
    os.utime(path, ns=(1, 1))
    kept(path, tiny_config(), where)
    assert len(folders(where)) == 4
    for fold in (0, 1):
        kept(path, tiny_config(data={"split": "trials", "fold": fold}), where)
    assert len(folders(where)) == 6
    (tmp_path / "other").mkdir()
    twin = shutil.copy(path, tmp_path / "other" / "s.h5")
    with h5py.File(twin, "r+") as file:
        file["wheel/wheel_speed"][...] *= 2
    os.utime(twin, ns=(1, 1))
    assert os.path.getsize(twin) == os.path.getsize(path)
    back = kept(twin, tiny_config(), where)
    np.testing.assert_array_equal(
        back.binned.values_TM, prepare(twin, tiny_config()).binned.values_TM
    )


@pytest.mark.parametrize("lost", ["session.json", "trial.npy"])
def test_a_folder_that_was_half_deleted_is_made_anew(tmp_path, lost):
    path, where = write_session(tmp_path / "s.h5"), tmp_path / "cache"
    kept(path, tiny_config(), where)
    (first,) = folders(where)
    (where / first / lost).unlink()
    cache._open.cache_clear()
    back = kept(path, tiny_config(), where)
    np.testing.assert_array_equal(back.binned.trial_T, prepare(path, tiny_config()).binned.trial_T)
    assert folders(where) == [first]


def test_behaviours_and_classes_in_another_order_are_another_question(tmp_path):
    path, behaviour = write_session(tmp_path / "s.h5"), tiny_config().behaviour
    other_way = msgspec.structs.replace(behaviour["choice"], classes={"right": 0, "left": 1})
    kept(path, tiny_config(), tmp_path / "cache")
    for asked in (
        {"choice": behaviour["choice"], "speed": behaviour["speed"]},
        {"speed": behaviour["speed"], "choice": other_way},
    ):
        config = msgspec.structs.replace(tiny_config(), behaviour=asked)
        fresh, back = prepare(path, config), kept(path, config, tmp_path / "cache")
        np.testing.assert_array_equal(back.binned.values_TM, fresh.binned.values_TM)
        assert back.present == fresh.present
    assert len(folders(tmp_path / "cache")) == 3


def test_regions_are_those_that_are_asked_for(tmp_path):
    path, where = write_session(tmp_path / "s.h5"), tmp_path / "cache"
    with h5py.File(path, "r+") as file:
        file["units/half"] = np.array([b"front", b"front", b"front", b"back", b"back", b"back"])
    found = []
    for schemes, field in (
        ("neuron", "region"),
        ("inter_region", "region"),
        ("inter_region", "half"),
    ):
        config = tiny_config(masking={"schemes": {schemes: 1.0}, "region": field})
        found.append(kept(path, config, where).region_N.tolist())
    assert found == [[0] * 6, [0, 1] * 3, [1, 1, 1, 0, 0, 0]]


def test_more_sessions_than_are_mapped_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_open", cache.lru_cache(maxsize=2)(cache._open.__wrapped__))
    subjects = [
        kept(
            write_session(tmp_path / f"{n}.h5", session_id=f"s{n}", seed=n, seconds=20),
            tiny_config(),
            tmp_path / "cache",
        )
        for n in range(5)
    ]
    rng = np.random.default_rng(0)
    seen = {s for _ in range(40) for s in draw_step(subjects, tiny_config(), rng, "cpu").sessions}
    assert seen == {f"s{n}" for n in range(5)}
    assert cache._open.cache_info().currsize == 2


def test_sessions_may_lack_behaviours_but_not_all_the_same(tmp_path):
    paths = [
        str(write_session(tmp_path / "a.h5", session_id="a", leave_out=("wheel",))),
        str(write_session(tmp_path / "b.h5", session_id="b", units=4, leave_out=("trials",))),
        str(write_session(tmp_path / "c.h5", session_id="c", leave_out=("trials", "wheel"))),
    ]
    summary = train(tiny_config(), paths[:2], tmp_path / "run")
    assert {s: set(of) - {"encoding"} for s, of in summary["val"].items()} == {
        "a": {"choice"},
        "b": {"speed"},
    }
    with pytest.raises(SessionError, match=r"no wheel\.wheel_speed"):
        train(tiny_config(), paths[:1], tmp_path / "run2")
    # A session of spikes alone helps where spikes are learned from spikes, and only there.
    masking = {"schemes": {"decoding": 1.0}, "ahead": True}
    assert "ahead" in train(tiny_config(masking=masking), paths, tmp_path / "run3")["val"]["c"]
    with pytest.raises(SessionError, match="has none of speed, choice"):
        train(tiny_config(masking={"schemes": {"decoding": 1.0}}), paths, tmp_path / "run4")


def test_two_probes_of_one_session_id_are_told_what_to_do(tmp_path):
    a, b = (write_session(tmp_path / f"{n}.h5") for n in "ab")
    with h5py.File(b, "a") as file:
        file["units/id"][...] = np.array([f"huge/{n}".encode() for n in range(6)])
    with pytest.raises(ConfigError, match="its units differ: merge"):
        train(tiny_config(), [str(a), str(b)], tmp_path / "run")
