"""The detector against its slow twin, and what must hold however samples come."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_neds.detector_folder import JSON_NAME
from rt_neds.errors import DetectorError
from rt_neds.stream.detector import Conditioner, Detector, load_detector, places, save_detector
from rt_neds.stream.detector_kernel import median
from tests import naive_detector
from tests.detecting import (
    arrays_of,
    channel_detector,
    in_pieces,
    noisy,
    spec_of,
    unit_detector,
)

CHUNKS = st.lists(st.integers(0, 1200), max_size=8)
KINDS = {"channels": channel_detector, "units": unit_detector}


@given(
    st.lists(st.integers(-70_000, 70_000), min_size=1, max_size=80),
    st.floats(-70_000, 70_000, width=32),
)
def test_median_is_the_sorted_one_from_any_guess(values, near):
    row = (np.array(values) / 7).astype(np.float32)
    wants = naive_detector.median_on_grid(row.astype(float))
    assert median(row, len(row), np.float32(near)) == wants


@pytest.mark.parametrize(("groups", "shanks"), [(1, 1), (4, 1), (3, 2)])
def test_conditioning_equals_the_slow_twin(groups, shanks):
    arrays = arrays_of(groups=groups, shanks=shanks)
    arrays["noise_C"][5] = 0  # a dead channel is never used
    spec = spec_of(arrays)
    samples = noisy(600, 16, spikes=5)
    rows = Conditioner(spec, arrays).rows(samples)
    wants = naive_detector.conditioned(
        samples, spec.rate, spec.highpass_hz, arrays["group_C"], arrays["noise_C"]
    )
    column = places(arrays["position_C2"], arrays["shank_C"])
    # A median may fall on the other side of a grid line: float32 here, float64 there.
    assert np.abs(rows - wants[:, column]).max() <= naive_detector.GRID / 10 + 1e-3
    assert np.median(np.abs(rows - wants[:, column])) < 1e-4


@pytest.mark.parametrize("shanks", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_peaks_equal_the_slow_twin(shanks, seed):
    detector = channel_detector(shanks=shanks)
    samples = noisy(3000, 16, seed=seed, spikes=40)
    found, complete = in_pieces(detector, samples, [])
    arrays, spec = detector._arrays, detector.spec
    column = places(arrays["position_C2"], arrays["shank_C"])
    wants = naive_detector.peaks(
        Conditioner(spec, arrays).rows(samples),
        arrays["position_C2"][column, 1],
        arrays["shank_C"][column],
        spec.threshold,
        spec.reach_um,
        spec.exclusion,
        spec.refractory,
        begin=detector.settle,
    )
    wants = sorted((s, int(column[c])) for s, c in wants)
    assert len(wants) > 10
    assert complete == 3000 - spec.exclusion
    assert found[["sample", "unit"]].tolist() == wants


@pytest.mark.parametrize("seed", range(4))
def test_assignment_equals_the_slow_twin(seed):
    detector = unit_detector(units=5)
    samples = noisy(2500, 16, seed=seed)
    arrays, spec = detector._arrays, detector.spec
    column = places(arrays["position_C2"], arrays["shank_C"])
    rng = np.random.default_rng(seed)
    raw = samples.astype(float)
    for at in rng.integers(0, 2400, 60):
        u = rng.integers(5)
        where = column[arrays["left_U"][u] : arrays["left_U"][u] + 8]
        raw[at : at + 40, where] += 10 * rng.uniform(0.8, 1.2) * arrays["template_UWK"][u]
    samples = np.rint(raw).astype(np.int16)
    found, _ = in_pieces(detector, samples, [])
    rows = Conditioner(spec, arrays).rows(samples)
    wants = naive_detector.assigned(
        rows, spec, arrays, detector._reach_C2.tolist(), detector.settle
    )
    assert len(wants) > 20
    wants = [pair for pair in wants if pair[0] < detector._complete]
    assert found[["sample", "unit"]].tolist() == wants
    # Overlapping spikes are told apart by taking away the one found first.
    assert len(set(found["unit"].tolist())) == 5


@pytest.mark.parametrize("kind", KINDS)
@given(sizes=CHUNKS, seed=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_any_chunking_gives_the_same_spikes(kind, sizes, seed):
    samples = noisy(2600, 16, seed=seed, spikes=60)
    detector = KINDS[kind]()
    whole, complete = in_pieces(detector, samples, [])
    pieces, complete_in_pieces = in_pieces(detector, samples, sizes)
    assert len(whole) > 10
    assert complete == complete_in_pieces
    assert whole.tobytes() == pieces.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@given(cut=st.integers(0, 2600), seed=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_the_future_changes_nothing_before_complete(kind, cut, seed):
    samples = noisy(2600, 16, seed=seed, spikes=60)
    poked = samples.copy()
    poked[cut:] = noisy(2600, 16, seed=99, spikes=90)[cut:] // 2
    detector = KINDS[kind]()
    detector.reset(0)
    before, complete = detector.detect(np.ascontiguousarray(samples[:cut]), 0)
    assert cut - detector.lookahead <= complete <= cut
    assert (before["sample"] < complete).all()
    for recording in (samples, poked):
        whole, _ = in_pieces(detector, recording, [])
        assert whole[whole["sample"] < complete].tobytes() == before.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_spikes_come_once_sorted_and_never_before_the_last_complete(kind):
    detector, last = KINDS[kind](), 0
    samples = noisy(9000, 16, spikes=200)
    for first in range(0, 9000, 37):
        spikes, complete = detector.detect(samples[first : first + 37], first)
        assert complete >= last
        assert ((spikes["sample"] >= last) & (spikes["sample"] < complete)).all()
        keys = spikes[["sample", "unit"]].tolist()
        assert keys == sorted(set(keys))
        last = complete
    assert detector.counters["samples"] == 9000
    assert detector.counters["over_burst"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_forgets_and_renumbers(kind):
    samples = noisy(3000, 16, spikes=60)
    detector = KINDS[kind]()
    wants, complete = in_pieces(detector, samples, [])
    detector.detect(noisy(777, 16, seed=5, spikes=30), 3000)
    far = 5_000_000_000
    again, complete_again = in_pieces(detector, samples, [10, 500], first=far)
    # The burst limit's grid moves with the numbers; it plays no part in a recording like this.
    assert complete_again - far == complete
    assert again["unit"].tolist() == wants["unit"].tolist()
    assert (again["sample"] - far).tolist() == wants["sample"].tolist()
    assert detector.counters["resets"] == 2


def test_a_hole_is_refused_by_name_until_reset():
    detector = channel_detector()
    samples = noisy(100, 16)
    detector.detect(samples, 0)
    with pytest.raises(DetectorError, match="samples from 150 on, expected 100; reset"):
        detector.detect(samples, 150)
    detector.reset(150)
    detector.detect(samples, 150)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["zero", "constant", "saturated", "square", "noise", "steps"])
def test_extremes_neither_crash_nor_flood(kind, what):
    rng = np.random.default_rng(0)
    shape = (6000, 16)
    samples = {
        "zero": np.zeros(shape),
        "constant": np.full(shape, -32768),
        "saturated": np.where(rng.random(shape) < 0.5, -32768, 32767),
        "square": np.where(np.arange(6000)[:, None] // 15 % 2, -32768, 32767) * np.ones(shape),
        "noise": rng.integers(-32768, 32768, shape),
        "steps": np.where(np.arange(6000)[:, None] < 3000, 0, rng.integers(-9000, 9000, 16)),
    }[what].astype(np.int16)
    detector = KINDS[kind]()
    spikes, complete = in_pieces(detector, samples, [100] * 30)
    assert complete >= 6000 - detector.lookahead
    if what in ("zero", "constant", "square"):
        assert len(spikes) == 0
    per_ms = np.bincount(spikes["sample"] // 30, minlength=200)
    assert per_ms.max() <= 16 * 2  # a block of the limit may touch two of these milliseconds
    if what in ("saturated", "noise") and kind == "channels":
        assert detector.counters["spikes"] == len(spikes) > 0


def test_the_burst_limit_counts_what_it_leaves_out():
    arrays = arrays_of(channels=128)
    detector = Detector(spec_of(arrays, reach_um=0.0, exclusion=2), arrays)
    rng = np.random.default_rng(0)
    samples = (3 * rng.standard_normal((3000, 128))).astype(np.int16)
    column = places(arrays["position_C2"], arrays["shank_C"])
    for at in range(600, 3000, 300):  # 44 peaks at once, at different depths
        samples[at, column[::3]] -= rng.integers(1500, 3000, 43).astype(np.int16)
    spikes, _ = in_pieces(detector, samples, [])
    assert np.bincount(spikes["sample"])[600::300].tolist() == [32] * 8
    assert detector.counters["over_burst"] >= 8 * 11


def test_a_saved_detector_finds_the_same(tmp_path):
    samples = noisy(3000, 16, spikes=60)
    for kind, make in KINDS.items():
        detector = make()
        save_detector(tmp_path / kind, detector)
        loaded = load_detector(tmp_path / kind)
        assert loaded.units == detector.units
        assert loaded.rate == 30_000
        assert loaded.channels == 16
        wants, _ = in_pieces(detector, samples, [])
        assert in_pieces(loaded, samples, [])[0].tobytes() == wants.tobytes()


def test_damaged_detectors_are_refused_in_one_line(tmp_path):
    def refused(words):
        with pytest.raises(DetectorError, match=words) as caught:
            load_detector(tmp_path / "d")
        assert "\n" not in str(caught.value)

    refused("is not a detector")
    save_detector(tmp_path / "d", unit_detector())
    text = (tmp_path / "d" / JSON_NAME).read_text()
    (tmp_path / "d" / JSON_NAME).write_text(text.replace('"format": 1', '"format": 7'))
    refused("format 7; this rt-neds reads 1")
    (tmp_path / "d" / JSON_NAME).write_text(text[:100])
    refused("cannot be read")
    spec = json.loads(text)
    for field, value, words in [
        ("exclusion", -1, "exclusion, refractory"),
        ("threshold", 0, "a threshold of 0"),
        ("before", 70, "reaches outside"),
        ("units", ["one"], r"template_UWK is \(4, 40, 8\)"),
        ("rate", 1e9, "a rate of"),
    ]:
        (tmp_path / "d" / JSON_NAME).write_text(json.dumps(spec | {field: value}))
        refused(words)
    (tmp_path / "d" / JSON_NAME).write_text(text)
    with (tmp_path / "d" / "detector.safetensors").open("ab") as file:
        file.write(b"x")
    refused("damaged")


def test_a_source_of_another_kind_is_refused_by_name():
    detector = channel_detector()
    position = detector._arrays["position_C2"]
    detector.check_source(30_000.03, position + 70.0, 2.34)
    with pytest.raises(DetectorError, match="25000 samples/s"):
        detector.check_source(25_000.0)
    with pytest.raises(DetectorError, match="4.68 uV per bit and the detector 2.34"):
        detector.check_source(30_000.0, uv_per_bit=4.68)
    with pytest.raises(DetectorError, match="12 channels and the detector 16"):
        detector.check_source(30_000.0, position[:12])
    moved = position.copy()
    moved[7, 1] += 20
    with pytest.raises(DetectorError, match="channel 7 lies at"):
        detector.check_source(30_000.0, moved)
    with pytest.raises(DetectorError, match=r"int16 of shape \(10, 15\)"):
        detector.detect(np.zeros((10, 15), np.int16), 0)
    with pytest.raises(DetectorError, match="float32"):
        detector.detect(np.zeros((10, 16), np.float32), 0)
    with pytest.raises(DetectorError, match="C-contiguous"):
        detector.detect(np.zeros((16, 10), np.int16).T, 0)
