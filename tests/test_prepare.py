"""Detectors made of recordings, and sessions made of recordings, ALF folders and NWB."""

import json
import pickle
import shutil
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import spikeinterface as si
import zarr
from spikeinterface.preprocessing import highpass_filter

from offline.prepare import templates
from offline.prepare.ibl import from_alf
from offline.prepare.recording import _choose, as_raw, open_recording, raw_of
from rt_neds.cli import main
from rt_neds.errors import ConfigError
from rt_neds.session import load_session
from rt_neds.stream.detector import Conditioner, load_detector
from tests import naive_detector

SECONDS, CHANNELS, UNITS = 8.0, 32, 4


def raw_recording(uv, generated):
    """A generated recording as a probe gives it: int16 at 2 uV per bit."""
    recording = si.NumpyRecording(
        np.rint(uv / 2 + np.arange(CHANNELS)).astype(np.int16),
        30_000.0,
        channel_ids=generated.channel_ids,
    )
    recording.set_probe(generated.get_probe())
    recording.set_channel_gains(2.0)
    recording.set_channel_offsets(0.0)
    return recording


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A saved recording, an analyzer of it, and a sorting: what a sorter's user has."""
    folder = tmp_path_factory.mktemp("recording")
    generated, sorting = si.generate_ground_truth_recording(
        durations=[SECONDS],
        sampling_frequency=30_000.0,
        num_channels=CHANNELS,
        num_units=UNITS,
        generate_templates_kwargs={
            "unit_params": {"alpha": (150.0, 300.0), "spatial_decay": (20.0, 40.0)}
        },
        generate_unit_locations_kwargs={
            "margin_um": 10.0, "minimum_z": 5.0, "maximum_z": 20.0, "minimum_distance": 40
        },
        seed=1,
    )  # fmt: skip
    recording = raw_recording(generated.get_traces(), generated)
    recording = recording.save(folder=folder / "raw", verbose=False, progress_bar=False)
    filtered = highpass_filter(recording, 300.0, dtype="float32")
    si.create_sorting_analyzer(
        sorting, filtered, format="binary_folder", folder=folder / "analyzer", sparse=False
    )
    return folder, recording, sorting


def run(*argv):
    return main([str(arg) for arg in argv])


def recall_and_precision(session, sorting, first, end):
    for unit in sorting.unit_ids:
        train = sorting.get_unit_spike_train(unit)
        true_S = train[(train >= first) & (train < end)]
        mine_S = session.records_S["sample"][
            session.records_S["unit"] == session.unit_ids.index(str(unit))
        ]
        hits = sum(np.abs(mine_S - sample).min(initial=99) <= 4 for sample in true_S)
        yield hits / len(true_S), hits / max(len(mine_S), 1)


def test_a_sorted_baseline_makes_a_detector_and_a_session_of_its_units(made, tmp_path, capsys):
    folder, recording, sorting = made
    out = tmp_path / "detector"
    assert run("detector", "--analyzer", folder / "analyzer", "--seconds", 5, "--out", out,
               "--json", tmp_path / "d.json") == 0  # fmt: skip
    summary = json.loads((tmp_path / "d.json").read_text())
    assert summary["units"] == UNITS
    assert summary["left_out"] == {}
    assert 4 < summary["noise_uv"] < 7
    detector = load_detector(out)
    assert detector.units == tuple(str(unit) for unit in sorting.unit_ids)
    session_path = tmp_path / "S.h5"
    assert run("prepare", "spikeinterface", "--detector", out, "--recording", folder / "raw",
               "--out", session_path, "--quiet") == 0  # fmt: skip
    session = load_session(session_path)
    assert session.id == "S"
    assert session.rate == 30_000
    assert session.domain_K2.tolist() == [
        [detector.settle, recording.get_num_samples() - detector.lookahead]
    ]
    for recall, precision in recall_and_precision(session, sorting, *session.domain_K2[0]):
        assert recall > 0.95
        assert precision > 0.95


def test_a_session_of_a_recording_is_what_the_detector_gives_live(made, tmp_path):
    folder, recording, _ = made
    out = tmp_path / "detector"
    assert run("detector", "--recording", folder / "raw", "--out", out, "--quiet") == 0
    assert run("prepare", "spikeinterface", "--detector", out, "--recording", folder / "raw",
               "--session", "today", "--out", tmp_path / "S.h5", "--quiet") == 0  # fmt: skip
    session = load_session(tmp_path / "S.h5")
    assert session.id == "today"
    assert session.unit_ids[:2] == ["ch000", "ch001"]
    detector = load_detector(out)
    samples, live, at = recording.get_traces(), [], 0
    for size in [7, 600, 5000] * 100:
        spikes, _ = detector.detect(np.ascontiguousarray(samples[at : at + size]), at)
        live.append(spikes)
        at += len(samples[at : at + size])
    assert at == len(samples)
    assert np.concatenate(live).tobytes() == session.records_S.tobytes()


def test_a_sorting_is_taken_as_it_is(made, tmp_path):
    folder, _, sorting = made
    assert run("prepare", "spikeinterface", "--analyzer", folder / "analyzer",
               "--out", tmp_path / "S.h5", "--quiet") == 0  # fmt: skip
    session = load_session(tmp_path / "S.h5")
    truth = sorting.to_spike_vector()
    assert session.records_S["sample"].tolist() == truth["sample_index"].tolist()
    assert session.domain_K2.tolist() == [[0, SECONDS * 30_000]]


class Evil:
    """What leaves a file wherever it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kept_as", ["binary_folder", "zarr", "file", "recording"])
def test_no_pickle_is_opened(made, tmp_path, capsys, kept_as):
    folder, touched = tmp_path / "analyzer", tmp_path / "touched"
    shutil.copytree(made[0] / "analyzer", folder)
    pickled = pickle.dumps(Evil(touched))
    if kept_as == "binary_folder":
        (folder / "recording.json").unlink()
        (folder / "recording.pickle").write_bytes(pickled)
    elif kept_as == "zarr":
        analyzer = si.load_sorting_analyzer(folder)
        folder = tmp_path / "analyzer.zarr"
        analyzer.save_as(folder=folder, format="zarr")
        group = zarr.open(folder, mode="r+")
        kept = np.empty(1, object)
        kept[0] = Evil(touched)
        group.create_dataset(
            "recording", data=kept, overwrite=True, object_codec=numcodecs.Pickle()
        )
        zarr.consolidate_metadata(group.store)
    elif kept_as == "recording":
        (folder := tmp_path / "old").mkdir()
        (folder / "cached.pkl").write_bytes(pickled)
    else:
        folder = tmp_path / "analyzer.pkl"
        folder.write_bytes(pickled)
    argv = ("detector", "--out", tmp_path / "D", "--quiet")
    assert run(*argv, "--recording" if kept_as == "recording" else "--analyzer", folder) == 2
    said = capsys.readouterr().err.strip()
    assert ("expected the folder" if kept_as == "file" else "is a pickle") in said
    assert "\n" not in said
    assert not touched.exists()


def test_noise_is_numpys_median_absolute_deviation(made):
    folder, recording, _ = made
    raw = open_recording(folder / "raw")
    _, arrays = templates.calibrate(raw, 0, 30_000)
    column = Conditioner(*templates.calibrate(raw, 0, 30_000)).column_C
    wants = []
    for first in (0, 15_000):
        rows = naive_detector.conditioned(
            recording.get_traces(start_frame=first, end_frame=first + 15_000)[:, column],
            30_000.0, 300.0, np.zeros(CHANNELS), np.ones(CHANNELS),
        )[300:]  # fmt: skip
        wants.append(np.median(np.abs(rows - np.median(rows, axis=0)), axis=0) / 0.6745)
    assert np.allclose(arrays["noise_C"][column], np.median(wants, axis=0), rtol=1e-3)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["detector", "--out", "D"], "expects --analyzer DIR, --recording DIR or both"),
        (["detector", "--recording", "nowhere", "--out", "D"], "no such recording: nowhere"),
        (["detector", "--recording", __file__, "--out", "D"], "name the folder of the recording"),
        (["detector", "--analyzer", "nowhere", "--out", "D"], "no such SortingAnalyzer"),
        (["detector", "--recording", ".", "--out", "D"], "cannot be read"),
        (["detector", "--recording", "x", "--seconds", "0", "--out", "D"], "seconds 0"),
        (["prepare", "ibl", "--out", "S.h5"], "prepare ibl expects --alf DIR"),
        (["prepare", "ibl", "--alf", ".", "--out", "S.h5"], "has no spikes.times.npy"),
        (["prepare", "nwb", "--out", "S.h5"], "expects a file"),
        (["prepare", "nwb", "none.nwb", "--out", "S.h5"], "no such NWB file"),
        (["prepare", "spikeinterface", "--detector", "D", "--out", "S.h5"], "--recording DIR"),
        (
            ["prepare", "spikeinterface", "--detector", "D", "--recording", "R", "--out", "S.h5"],
            "D is not a detector",
        ),
        (
            [
                "prepare",
                "spikeinterface",
                "--analyzer",
                "A",
                "--detector",
                "D",
                "--recording",
                "R",
                "--out",
                "S.h5",
            ],
            "expects --detector FOLDER --recording DIR, or --analyzer DIR",
        ),
        (["prepare", "ibl", "--alf", ".", "--out", "no/S.h5"], "lies in no existing folder"),
    ],
)
def test_mistakes_get_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize("what", ["detector", "prepare spikeinterface --detector D"])
def test_the_stream_that_is_named_is_opened(what, tmp_path, monkeypatch, capsys):
    def opened(path, stream=None):
        raise ConfigError(f"opened {path} {stream}")

    monkeypatch.setattr("offline.prepare.recording.open_recording", opened)
    monkeypatch.setattr("rt_neds.stream.detector.load_detector", lambda path: None)
    argv = ["--recording", "R", "--stream", "imec1.ap", "--out", tmp_path / "new", "--quiet"]
    assert run(*what.split(), *argv) == 2
    assert "opened R imec1.ap" in capsys.readouterr().err


def test_another_probes_recording_is_refused(made, tmp_path, capsys):
    folder, _, _ = made
    assert run("detector", "--recording", folder / "raw", "--out", tmp_path / "D", "--quiet") == 0
    recording = si.NumpyRecording(np.zeros((30_000, 12), np.int16), 30_000.0)
    recording.set_probe(si.generate_recording(num_channels=12, durations=[1]).get_probe())
    recording.save(folder=tmp_path / "other", verbose=False, progress_bar=False)
    capsys.readouterr()
    assert run("prepare", "spikeinterface", "--detector", tmp_path / "D", "--recording",
               tmp_path / "other", "--out", tmp_path / "S.h5") == 2  # fmt: skip
    assert "12 channels and the detector 32" in capsys.readouterr().err


def test_floats_are_not_raw(made):
    filtered = highpass_filter(made[1], 300.0, dtype="float32")
    with pytest.raises(ConfigError, match="float32; expected the raw int16"):
        as_raw(filtered, "r")


def noise(seconds, rate=30_000.0, channels=12):
    rng = np.random.default_rng(0)
    samples = rng.integers(-9, 9, (round(seconds * rate), channels)).astype(np.int16)
    recording = si.NumpyRecording(samples, rate)
    probe = si.generate_recording(num_channels=channels, durations=[1]).get_probe()
    recording.set_probe(probe)
    return recording, samples, probe


def test_a_recording_is_read_in_pieces_that_end_where_they_are_told_to():
    recording, samples, probe = noise(2.0, rate=1000.0)
    raw = as_raw(recording, "r")
    pieces = list(raw.pieces(300, 1700))
    assert [at for at, _ in pieces] == [300, 1300]
    np.testing.assert_array_equal(np.concatenate([of for _, of in pieces]), samples[300:1700])
    np.testing.assert_array_equal(raw.position_C2, probe.contact_positions)
    assert raw.uv_per_bit == 0.0
    assert not raw.group_C.any()  # not known
    recording.set_channel_gains(2.5)
    recording.set_property("inter_sample_shift", np.arange(12) % 3 / 3)
    raw = as_raw(recording, "r")
    assert raw.uv_per_bit == 2.5
    assert raw.group_C.tolist() == [0, 1, 2] * 4
    assert not raw.shank_C.any()
    probe = probe.copy()
    probe.set_shank_ids(np.repeat([0, 1, 2], 4))
    probe.set_device_channel_indices(np.arange(12))
    recording.set_probe(probe)
    assert as_raw(recording, "r").shank_C.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_raw_samples_are_those_before_all_preprocessing_and_as_many():
    recording, samples, _ = noise(1.0)
    recording.set_channel_gains(1.0)
    recording.set_channel_offsets(0.0)
    filtered = highpass_filter(recording, 300.0, dtype="float32")
    twice = highpass_filter(filtered, 300.0, dtype="float32")
    np.testing.assert_array_equal(raw_of(twice, "r").read(0, 50), samples[:50])
    cut = filtered.frame_slice(1000, 20_000)
    with pytest.raises(ConfigError, match="19000 samples, cut from a recording of 30000"):
        raw_of(cut, "r")


def test_a_recording_of_several_segments_is_refused():
    recording, _, _ = noise(0.1)
    with pytest.raises(ConfigError, match="r has 2 segments; expected one"):
        as_raw(si.append_recordings([recording, recording]), "r")


def test_the_stream_is_the_only_one_that_may_hold_spikes_or_the_one_that_is_named(tmp_path):
    names = ["imec0.ap", "imec0.lf", "nidq", "imec0.ap-SYNC"]
    assert _choose(tmp_path, None, names) == "imec0.ap"
    assert _choose(tmp_path, "imec0.lf", names) == "imec0.lf"
    with pytest.raises(ConfigError, match="no stream imec1.ap in"):
        _choose(tmp_path, "imec1.ap", names)
    of_openephys = [f"Node 101#Neuropix-PXI-100.ProbeA-{end}" for end in ("AP", "LFP", "SYNC")]
    assert _choose(tmp_path, None, of_openephys) == of_openephys[0]
    for several in ([*names, "imec1.ap"], ["nidq"]):
        with pytest.raises(ConfigError, match="name the probe's with --stream"):
            _choose(tmp_path, None, several)


def write_alf(folder):
    probe = folder / "alf" / "probe00"
    probe.mkdir(parents=True)
    rng = np.random.default_rng(0)
    times = np.sort(np.concatenate([rng.uniform(5, 15, 2000), rng.uniform(30, 40, 2000)]))
    np.save(probe / "spikes.times.npy", times)
    np.save(probe / "spikes.clusters.npy", rng.integers(0, 5, 4000).astype(np.uint16))
    np.save(probe / "clusters.depths.npy", np.arange(5) * 40.0)
    when = np.linspace(4, 41, 37_001)
    np.save(folder / "alf" / "_ibl_wheel.timestamps.npy", when)
    np.save(folder / "alf" / "_ibl_wheel.position.npy", 3.0 * (when - 4))
    return times


def test_an_alf_folder_with_a_wheel(tmp_path):
    times = write_alf(tmp_path / "eid")
    out = tmp_path / "S.h5"
    assert run("prepare", "ibl", "--alf", tmp_path / "eid", "--out", out, "--quiet") == 0
    session = load_session(out)
    assert session.id == "eid"
    assert session.unit_ids[3] == "probe00/3"
    assert session.records_S["sample"].tolist() == np.rint(times * 30_000).astype(int).tolist()
    # Nothing was recorded in the hole: it is not silence.
    seconds = session.domain_K2 / 30_000
    assert np.allclose(seconds, [[5, 15], [30, 40]], atol=0.1)
    speed = session.series("wheel.wheel_speed")
    assert np.allclose(speed.values_L, 3.0, atol=0.16)  # the encoder tells it every millisecond
    assert session.column("units.depths").tolist() == [0, 40, 80, 120, 160]


@pytest.mark.data
def test_the_real_alf_folder_is_the_real_session(data_dir, tmp_path):
    pytest.importorskip("pyarrow")
    from_alf(data_dir / "ibl_alf").save(tmp_path / "S.h5")
    mine, theirs = (
        load_session(tmp_path / "S.h5"),
        load_session(data_dir / "ibl_probe_30_trials.h5"),
    )
    assert len(mine.unit_ids) == len(theirs.unit_ids) == 262
    assert mine.records_S["sample"].tolist() == theirs.records_S["sample"].tolist()
    for column in ("choice", "block_prior", "feedback_type"):
        assert (
            mine.column(f"trials.{column}").tolist() == theirs.column(f"trials.{column}").tolist()
        )
    assert np.abs(mine.intervals("trials") - theirs.intervals("trials")).max() <= 1
    assert len(mine.domain_K2) == len(theirs.domain_K2)
    assert np.abs(mine.domain_K2 - theirs.domain_K2).max() < 30_000


def test_an_nwb_file(tmp_path):
    pynwb = pytest.importorskip("pynwb")
    import datetime

    nwb = pynwb.NWBFile("d", "one", datetime.datetime.now(datetime.UTC))
    rng = np.random.default_rng(0)
    trains = [np.sort(rng.uniform(0, 20, 300)) for _ in range(3)]
    for train in trains:
        nwb.add_unit(spike_times=train, obs_intervals=np.array([[0.0, 9.0], [11.0, 20.0]]))
    nwb.add_trial_column("side", "which")
    for start in (1.0, 5.0, 12.0):
        nwb.add_trial(start_time=start, stop_time=start + 2, side="left" if start > 4 else "right")
    module = nwb.create_processing_module("behavior", "b")
    module.add(
        pynwb.TimeSeries(name="running speed", data=np.arange(1000) / 10, unit="cm/s", rate=50.0)
    )
    with pynwb.NWBHDF5IO(str(tmp_path / "x.nwb"), "w") as file:
        file.write(nwb)
    assert run("prepare", "nwb", tmp_path / "x.nwb", "--out", tmp_path / "S.h5", "--quiet") == 0
    session = load_session(tmp_path / "S.h5")
    assert session.id == "one"
    assert session.unit_ids == ["0", "1", "2"]
    assert session.domain_K2.tolist() == [[0, 270_000], [330_000, 600_000]]
    inside = sum(((train < 9) | (train >= 11)).sum() for train in trains)
    assert len(session.records_S) == inside
    assert session.column("trials.side").tolist() == ["right", "left", "left"]
    assert session.behaviours() == ["behavior_running_speed.running_speed"]
    (tmp_path / "y.nwb").write_bytes(b"not")
    assert run("prepare", "nwb", tmp_path / "y.nwb", "--out", tmp_path / "T.h5") == 2


# -- real samples ----------------------------------------------------------------------------------


@pytest.fixture
def real(data_dir):
    path = data_dir / "neuropixels_raw" / "ap_385ch_1000samples_int16.dat"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return np.fromfile(path, np.int16).reshape(-1, 385), path.parent


@pytest.mark.data
def test_the_large_spike_of_real_samples_is_found_from_a_spikeglx_folder(real, tmp_path):
    samples, folder = real
    glx = tmp_path / "r_g0" / "r_g0_imec1"
    glx.mkdir(parents=True)
    # A second and more of the 33 ms: forwards, backwards, forwards, so that nothing jumps.
    whole = np.concatenate([samples, samples[::-1]] * 20)
    whole.tofile(glx / "r_g0_t0.imec1.ap.bin")
    meta = (folder / "sample3B_g0_t0.imec1.ap.meta").read_text()
    lines = [
        f"fileSizeBytes={whole.nbytes}" if line.startswith("fileSizeBytes=")
        else f"fileTimeSecs={len(whole) / 3e4}" if line.startswith("fileTimeSecs=")
        else line
        for line in meta.splitlines()
    ]  # fmt: skip
    (glx / "r_g0_t0.imec1.ap.meta").write_text("\n".join(lines) + "\n")
    assert (
        run("detector", "--recording", tmp_path / "r_g0", "--out", tmp_path / "D", "--quiet") == 0
    )
    detector = load_detector(tmp_path / "D")
    assert detector.channels == 384
    # Channels that are sampled at the same moment share a reference: it takes away more noise.
    assert len(np.unique(detector._arrays["group_C"])) > 10
    detector.reset(0)
    spikes, _ = detector.detect(np.ascontiguousarray(samples[:, :384]), 0)
    near = spikes[np.abs(spikes["sample"] - 184) <= 3]
    assert {f"ch{channel:03d}" for channel in range(238, 249)} & {
        detector.units[unit] for unit in near["unit"]
    }
    assert 5 <= len(spikes) < 500
