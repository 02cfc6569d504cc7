"""Small detectors and recordings for tests."""

import numpy as np

from rt_neds.detector_folder import make_spec
from rt_neds.stream.detector import Detector

RATE = 30_000.0


def geometry(channels, shanks=1):
    """Two columns of sites 20 um apart, on one shank or more; sites in no order."""
    per_shank = channels // shanks
    index = np.arange(channels)
    shank_C = index // per_shank
    position_C2 = np.stack(
        [index % 2 * 32.0 + 250.0 * shank_C, (index % per_shank) // 2 * 20.0], axis=1
    )
    order = np.random.default_rng(3).permutation(channels)
    return position_C2[order], shank_C[order].astype(np.int64)


def arrays_of(channels=16, shanks=1, groups=1, noise=10.0):
    position_C2, shank_C = geometry(channels, shanks)
    return {
        "position_C2": position_C2,
        "shank_C": shank_C,
        "group_C": (np.arange(channels) % groups).astype(np.int64),
        "noise_C": np.full(channels, noise, np.float32),
    }


def spec_of(arrays, *, units=None, **changes):
    fields = {
        "rate": RATE,
        "units": units or [f"ch{c:03d}" for c in range(len(arrays["noise_C"]))],
        "templates": units is not None,
        "uv_per_bit": 2.34,
        "probe": "test",
        "highpass_hz": 300.0,
        "threshold": 5.0,
        "reach_um": 50.0,
        "exclusion": 6,
        "refractory": 30,
        "lag": 2,
        "before": 12,
        "made": {},
    }
    return make_spec(arrays, **(fields | changes))


def channel_detector(**about):
    arrays = arrays_of(**about)
    return Detector(spec_of(arrays), arrays)


def shape_of_spike(width=40, before=12):
    t = np.arange(width) - before
    return -np.exp(-((t / 4.0) ** 2)) + 0.35 * np.exp(-(((t - 12) / 7.0) ** 2))


def with_templates(arrays, units=4, span=8, width=40, depth=12.0, seed=0):
    """Templates at random places, each with its own fall-off, added to the arrays."""
    rng = np.random.default_rng(seed)
    channels = len(arrays["noise_C"])
    left_U = rng.integers(0, channels - span + 1, units)
    template_UWK = np.zeros((units, width, span), np.float32)
    for u in range(units):
        centre = rng.integers(2, span - 2)
        fall_K = np.exp(-np.abs(np.arange(span) - centre) / rng.uniform(0.8, 3))
        template_UWK[u] = depth * rng.uniform(0.8, 2) * shape_of_spike(width)[:, None] * fall_K
    return arrays | {
        "template_UWK": template_UWK,
        "filter_UWK": template_UWK.copy(),
        "left_U": left_U.astype(np.int64),
        "amplitude_U2": np.tile(np.array([0.6, 1.6], np.float32), (units, 1)),
        "least_gain_U": np.full(units, 30.0, np.float32),
        "shift_U": rng.integers(-3, 4, units),
    }


def unit_detector(units=4, **about):
    arrays = with_templates(arrays_of(**about), units)
    return Detector(spec_of(arrays, units=[f"u{u}" for u in range(units)]), arrays)


def noisy(samples, channels, seed=0, spikes=0, depth=150.0, common=15.0):
    """Noise, an offset per channel, a common signal, and spikes with neighbours, as int16."""
    rng = np.random.default_rng(seed)
    x_SC = 10 * rng.standard_normal((samples, channels)) + rng.uniform(-200, 200, channels)
    x_SC += common * rng.standard_normal((samples, 1))
    shape_W = shape_of_spike()
    for _ in range(spikes):
        at, c = rng.integers(0, max(1, samples - 40)), rng.integers(channels)
        for k in range(channels):
            x_SC[at : at + 40, k] += (
                depth * np.exp(-abs(k - c) / 2) * shape_W[: max(0, samples - at)]
            )
    return np.clip(np.rint(x_SC), -32768, 32767).astype(np.int16)


def in_pieces(detector, samples_SC, sizes, first=0):
    """Detect in chunks of the given sizes, then the rest at once."""
    detector.reset(first)
    found, at = [], 0
    for size in [*sizes, len(samples_SC)]:
        piece = np.ascontiguousarray(samples_SC[at : at + size])
        spikes, complete = detector.detect(piece, first + at)
        found.append(spikes)
        at += len(piece)
    return np.concatenate(found), complete
