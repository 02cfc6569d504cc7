"""Detectors' noise and templates: of the baseline alone, and in the sorter's samples."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import spikeinterface as si
from numpy.typing import NDArray

from offline.prepare import templates
from offline.prepare.recording import Raw, as_raw
from offline.prepare.spikeinterface import from_analyzer, from_detector, load_analyzer
from offline.prepare.spikes import detect_recording
from rt_neds.errors import ConfigError
from rt_neds.frames import SPIKE_DTYPE
from rt_neds.session import load_session
from rt_neds.stream.detector import Conditioner, Detector
from tests.detecting import arrays_of, geometry, shape_of_spike, spec_of

NOISE, LATE = 10.0, 5


def raw_of(samples_SC: NDArray, rate: float = 30_000.0, shanks: int = 1) -> Raw:
    channels = samples_SC.shape[1]
    position_C2, shank_C = geometry(channels, shanks)
    return Raw(
        recording=SimpleNamespace(
            get_traces=lambda start_frame, end_frame: samples_SC[start_frame:end_frame]
        ),
        name="r",
        rate=rate,
        samples=len(samples_SC),
        channels=tuple(map(str, range(channels))),
        position_C2=position_C2,
        shank_C=shank_C,
        group_C=np.zeros(channels, np.int64),
        uv_per_bit=2.0,
    )


def noise(seconds: float, channels: int, seed: int = 0) -> NDArray[np.float64]:
    return NOISE * np.random.default_rng(seed).normal(size=(round(seconds * 30_000), channels))


def planted(samples_SC: NDArray, train: NDArray, channels: list[int], depth: float) -> None:
    """Add spikes whose troughs are ``LATE`` samples after those that the train names."""
    for sample in train:
        at = sample + LATE - 12
        samples_SC[at : at + 40, channels] += depth * NOISE * shape_of_spike()[:, None]


@pytest.fixture(scope="module")
def two_shanks():
    """100 channels on two shanks; a unit at the edge of the first, one too flat, one too rare."""
    samples_SC = noise(2.5, 100)
    edge = Conditioner(spec_of(arrays_of(100, 2)), arrays_of(100, 2)).column_C[45:50].tolist()
    spread = np.arange(1000, 70_000, 700)
    trains = {"rare": spread[:19] + 350, "deep": spread, "flat": spread + 200}
    planted(samples_SC, trains["deep"], edge, 15.0)
    raw = raw_of(np.rint(samples_SC).astype(np.int16), shanks=2)
    return (
        raw,
        trains,
        templates.with_templates(
            raw, *templates.calibrate(raw, 0, raw.samples), trains, 0, raw.samples
        ),
    )


def test_a_unit_without_enough_or_deep_enough_spikes_is_left_out_and_said(two_shanks):
    _, _, (spec, arrays, left_out) = two_shanks
    assert spec.units == ["deep"]
    assert len(arrays["template_UWK"]) == 1
    assert left_out["rare"] == "19 spikes; expected at least 20"
    assert "times the noise deep; expected 3" in left_out["flat"]


def test_the_detector_reports_the_samples_that_the_sorter_has(two_shanks):
    raw, trains, (spec, arrays, _) = two_shanks
    assert abs(int(arrays["shift_U"][0]) - LATE) <= 1  # the filter moves a trough, too
    spikes, first, end = detect_recording(raw, detector := Detector(spec, arrays))
    inside = trains["deep"][(trains["deep"] >= first) & (trains["deep"] < end)]
    np.testing.assert_array_equal(spikes["sample"], inside)
    again, *_ = detect_recording(raw, detector)
    np.testing.assert_array_equal(again, spikes)


def test_a_template_lies_on_the_shank_of_its_unit(two_shanks):
    _, _, (_, arrays, _) = two_shanks
    (left,), (template_WK,) = arrays["left_U"], arrays["template_UWK"]
    assert left + templates.SPAN <= 50
    columns = np.flatnonzero(template_WK.min(axis=0) < -5)
    assert (columns + left).tolist() == [45, 46, 47, 48, 49]


def test_filters_undo_what_noise_the_channels_share():
    samples_SC = noise(2.0, 12)
    spec, arrays = spec_of(arrays_of(12)), arrays_of(12)
    column_C = Conditioner(spec, arrays).column_C
    samples_SC[:, column_C[1:]] += 2 * samples_SC[:, column_C[:-1]]  # neighbours, in order of place
    train = np.arange(1000, 55_000, 700)
    planted(samples_SC, train, [int(column_C[5])], 60.0)
    raw = raw_of(np.rint(samples_SC).astype(np.int16))
    spec, arrays = templates.calibrate(raw, 0, raw.samples)
    rows_SC = Conditioner(spec, arrays).rows(raw.read(0, raw.samples))[1000:]
    clipped_SC = np.clip(rows_SC, -3, 3)
    noise_CC = clipped_SC.T @ clipped_SC / len(rows_SC) + templates.RIDGE * np.eye(12)
    assert np.abs(noise_CC - np.diag(np.diag(noise_CC))).max() > 0.2
    _, arrays, _ = templates.with_templates(raw, spec, arrays, {"u": train}, 0, raw.samples)
    (template_WK,), (filter_WK,) = arrays["template_UWK"], arrays["filter_UWK"]
    np.testing.assert_allclose(filter_WK @ noise_CC, template_WK, atol=0.05 * -template_WK.min())


def test_noise_is_that_of_the_baseline_but_for_a_disturbed_piece_of_it():
    samples_SC = noise(6.0, 8)
    samples_SC[:120_000] *= 9  # before the baseline
    samples_SC[135_000:150_000] *= 9
    raw = raw_of(np.rint(samples_SC).astype(np.int16))
    _, arrays = templates.calibrate(raw, 120_000, raw.samples)
    np.testing.assert_allclose(arrays["noise_C"], NOISE, rtol=0.2)
    with pytest.raises(ConfigError, match=r"0\.4 s to calibrate with; expected at least 0\.5"):
        templates.calibrate(raw, 120_000, 132_000)


def test_spikes_of_a_template_are_of_the_baseline_and_spread_over_it():
    train = np.random.default_rng(0).permutation(np.arange(0, 9000, 3))
    some = templates._spread(train, 1000, 7001)
    assert (len(some), some[0], some[-1]) == (templates.SPIKES, 1002, 6999)
    assert np.diff(some).max() <= 15
    np.testing.assert_array_equal(templates._spread(train, 99, 300), np.arange(99, 300, 3))


@pytest.mark.parametrize("rate", [30_000.0, 24_414.0])
def test_a_units_mean_has_the_sorters_sample_where_its_template_is_looked_for(rate):
    class Ramp:  # the samples of a recording are their own numbers, and go through no filter
        channels = ("0",)
        reset, rows = (lambda self: None), (lambda self, samples_SC: samples_SC)

        def pieces(self, first, end):
            for at in range(first, end, 1000):
                yield at, np.arange(at, min(at + 1000, end), dtype=np.float32)[:, None]

    ramp, before = Ramp(), round(templates.BEFORE_MS * rate / 1000)
    train = np.array([5, 500, 930, 990, 1003, 2710, 3950])  # of the first and last not all is there
    (mean_WC,) = templates._averages(ramp, ramp, [train], 0, 4000, before, 120, lambda *_: None)
    np.testing.assert_allclose(mean_WC[2 * before], np.mean(train[1:-1]))


def test_a_template_does_not_reach_over_to_another_shank():
    template_WC, shank_C = np.zeros((3, 100), np.float32), np.repeat([0, 1], 50)
    template_WC[1, 40:60] = 1.0  # most of it would lie in the columns 20 to 59
    template_WC[1, 42] = 2.0
    assert templates._where(template_WC, shank_C) in range(3, 11)  # up to column 49 at the most
    assert templates._where(template_WC, 0 * shank_C) == 20


def test_dead_and_wild_channels_are_not_used():
    rng = np.random.default_rng(0)
    samples = np.rint(10 * rng.standard_normal((20_000, 32))).astype(np.int16)
    samples[:, 3] = 7
    samples[:, 9] *= 40
    recording = si.NumpyRecording(samples, 30_000.0)
    recording.set_probe(si.generate_recording(num_channels=32, durations=[1]).get_probe())
    # Two constant samples in a row would do as well: a channel without noise has no threshold.
    _, arrays = templates.calibrate(as_raw(recording, "r"), 0, 20_000)
    assert np.flatnonzero(arrays["noise_C"] == 0).tolist() == [9]
    assert arrays["noise_C"][3] < 4  # what remains of a dead channel is the reference it is given


def test_a_session_of_another_rate_is_in_its_own_samples(tmp_path):
    samples_SC = noise(1.0, 16)
    planted(samples_SC, np.arange(2000, 28_000, 900), [3], 20.0)
    raw = raw_of(np.rint(samples_SC).astype(np.int16), rate=25_000.0)
    arrays = arrays_of(16)
    detector = Detector(spec_of(arrays, rate=25_000.0, uv_per_bit=2.0), arrays)
    spikes, first, end = detect_recording(raw, detector)
    from_detector(raw, detector, "s", lambda *_: None).save(tmp_path / "S.h5")
    session = load_session(tmp_path / "S.h5")
    assert session.rate == 25_000
    assert session.domain_K2.tolist() == [[first, end]]
    np.testing.assert_array_equal(
        session.records_S["sample"], spikes["sample"][spikes["sample"] < end]
    )


def test_spikes_where_none_could_be_looked_for_are_left_out(tmp_path, monkeypatch):
    found = np.array([(5, 0, 0), (10, 0, 0), (19, 0, 0), (20, 0, 0)], SPIKE_DTYPE)
    name = "offline.prepare.spikeinterface.detect_recording"
    monkeypatch.setattr(name, lambda *_: (found, 10, 20))
    detector, raw = SimpleNamespace(units=["a"]), SimpleNamespace(rate=25_000.0)
    from_detector(raw, detector, "s", lambda *_: None).save(tmp_path / "S.h5")
    session = load_session(tmp_path / "S.h5")
    assert session.records_S["sample"].tolist() == [10, 19]
    assert session.domain_K2.tolist() == [[10, 20]]


def test_units_of_a_sorting_keep_their_order_their_depths_and_their_samples(tmp_path):
    samples, labels = np.arange(10, 10_000, 10), np.resize(["b", "a", "a"], 999)
    sorting = si.NumpySorting.from_samples_and_labels([samples], [labels], 25_000.0, ["b", "a"])
    places = SimpleNamespace(get_data=lambda: np.array([[1.0, 20.0, 3.0], [4.0, 50.0, 6.0]]))
    analyzer = SimpleNamespace(
        sorting=sorting,
        sampling_frequency=25_000.0,
        unit_ids=sorting.unit_ids,
        has_extension=lambda name: name == "unit_locations",
        get_extension=lambda name: places,
        get_total_duration=lambda: 0.4,
    )
    from_analyzer(analyzer, "s").save(tmp_path / "S.h5")
    session = load_session(tmp_path / "S.h5")
    assert (session.rate, session.end) == (25_000, 10_000)
    assert session.unit_ids == ["b", "a"]
    assert session.column("units.depth_um").tolist() == [20.0, 50.0]
    np.testing.assert_array_equal(session.records_S["sample"], samples)
    np.testing.assert_array_equal(session.records_S["unit"], labels == "a")


@pytest.mark.parametrize("spikes", [[[5, 900], [3]], [[5, 900], []]], ids=["both", "first alone"])
def test_a_recording_of_several_segments_is_refused(tmp_path, spikes):
    recording = si.generate_recording(num_channels=4, durations=[0.5, 0.5])
    sorting = si.NumpySorting.from_samples_and_labels(
        [np.array(samples) for samples in spikes],
        [np.zeros(len(samples), int) for samples in spikes],
        recording.sampling_frequency,
    )
    si.create_sorting_analyzer(
        sorting, recording, format="binary_folder", folder=tmp_path / "a", sparse=False
    )
    with pytest.raises(ConfigError, match="2 segments; expected one"):
        load_analyzer(tmp_path / "a")
