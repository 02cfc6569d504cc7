"""The probe's clock against the host's: followed, not fooled by delays, and slips are seen."""

import numpy as np
import pytest

from rt_neds.clock import ClockFit, same_rate, samples_per_bin
from rt_neds.errors import ConfigError

RATE = 30_000.0
MS = 1_000_000


def feed(fit, seconds, rate=RATE, start=0.0, delay=lambda rng: 0.0, shift_s=0.0, seed=0):
    rng = np.random.default_rng(seed)
    slips = 0
    for k in range(int(seconds * 100)):
        t = start + k / 100
        slips += fit.observe(round((t - shift_s) * rate), round((t + delay(rng)) * 1e9))
    return slips


def test_the_fit_ignores_delays_which_only_ever_come_late():
    fit = ClockFit(RATE)
    feed(fit, 30, delay=lambda rng: rng.exponential(0.004) + (0.5 if rng.random() < 0.01 else 0))
    assert fit.realtime
    error_ms = (fit.host_ns(round(29 * RATE), round(29e9)) - 29e9) / 1e6
    assert 0 <= error_ms < 1


def test_a_rate_that_is_off_by_fifty_ppm_is_followed_and_is_no_slip():
    fit = ClockFit(RATE)
    assert feed(fit, 300, rate=RATE * (1 + 50e-6)) == 0
    error_ms = (fit.host_ns(round(299 * RATE * (1 + 50e-6)), round(299e9)) - 299e9) / 1e6
    assert abs(error_ms) < 1
    assert fit.status()["ppm"] == pytest.approx(-50, abs=1)  # the probe's clock is the faster
    assert len(fit._minima) == ClockFit.KEPT


def test_a_slip_is_seen_once_and_a_stall_is_not_one():
    fit = ClockFit(RATE)
    assert feed(fit, 30) == 0
    assert feed(fit, 4.2, start=30, shift_s=0.05) == 1  # samples went missing without a word
    assert fit.last_slip_ms == pytest.approx(50, abs=1)
    assert feed(fit, 30, start=34.2, shift_s=0.05) == 0
    assert fit.slips == 1
    assert feed(fit, 30, start=64.2) == 1  # and back: now they come too soon
    assert fit.last_slip_ms == pytest.approx(-50, abs=1)
    stalled = ClockFit(RATE)
    assert feed(stalled, 30) == 0
    assert feed(stalled, 1.5, start=30, delay=lambda rng: 0.3) == 0
    assert feed(stalled, 30, start=31.5) == 0
    for start in (61.5, 71.5, 81.5):  # nor are some
        assert feed(stalled, 2.5, start=start, delay=lambda rng: 0.3) == 0
        assert feed(stalled, 7.5, start=start + 2.5) == 0


def test_the_fit_begins_with_the_second_second_and_knows_nothing_of_another_epoch():
    fit = ClockFit(RATE)
    feed(fit, 1.9)
    assert fit.host_ns(0, 0) is None
    feed(fit, 1.1, start=1.9)
    assert fit.host_ns(0, 0) == pytest.approx(0, abs=MS)
    feed(fit, 27, start=3)
    assert fit.realtime
    fit.restart()
    assert not fit.realtime
    assert fit.host_ns(0, 0) is None
    for k in range(500):
        assert not fit.observe(k * 300, (100_000 + k * 10) * MS)
    assert fit.host_ns(0, 100_000 * MS) == pytest.approx(100_000 * MS, abs=MS)


def test_a_measured_rate_is_the_nominal_one_and_another_is_not():
    assert same_rate(30_030, 30_000)
    assert not same_rate(30_031, 30_000)
    assert not same_rate(29_969, 30_000)


def test_samples_of_which_nanoseconds_would_overflow_are_followed_too():
    fit, far = ClockFit(RATE), (1 << 50) - 10**9
    for k in range(1000):
        fit.observe(far + k * 300, k * 10 * MS)
    assert fit.realtime
    assert abs(fit.host_ns(far + 900 * 300, 9000 * MS) - 9000 * MS) < 0.1 * MS


def test_a_replay_at_another_speed_is_not_late_but_not_real_time():
    fit = ClockFit(RATE)
    feed(fit, 30, rate=RATE * 20)
    assert not fit.realtime
    assert fit.slips == 0


def test_bins_of_no_samples_are_refused():
    assert samples_per_bin(20.0, 30_000) == 600
    assert samples_per_bin(20.0, 29_999.7) == 600
    with pytest.raises(ConfigError, match="at least one"):
        samples_per_bin(0.001, 30_000)
