"""What a detector has to know of a probe: its noise, and what each unit's spikes look like.

Both are taken from samples that went through the detector's own filter and reference, so that
templates are of the shape that it will meet live.

Shape suffixes: C channels (the source's order) or columns (the order of their places), S samples,
U units, W samples and K columns of a template, L lags.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from offline.prepare.recording import Raw
from offline.prepare.spikes import Tell
from rt_neds.detector_folder import Arrays, DetectorSpec, make_spec
from rt_neds.errors import ConfigError
from rt_neds.stream.detector import Conditioner

HIGHPASS_HZ = 300.0
THRESHOLD = 5.0
THRESHOLD_OF_TEMPLATES = 4.0
"""Lower, because a peak of noise fits no template."""
REACH_UM = 60.0
EXCLUSION_MS, REFRACTORY_MS, LAG_MS = 0.3, 1.0, 0.1
BEFORE_MS, WIDTH_MS = 0.6, 1.6
SPAN = 40
"""Columns of a template: what it leaves of a large spike at its sides passes for small units."""
SPIKES = 500
"""Of a unit, evenly over the baseline, make its template."""
FEWEST = 20
LEAST_GAIN = 30.0
LEAST_DEPTH = 3.0
"""Units not so deep, in multiples of the noise, are left out."""
AMPLITUDES = (0.6, 1.6)
NOISE_PIECES, NOISE_S = 20, 0.5
RIDGE = 0.1
"""Added to the noise's covariance: filters must not live on differences smaller than this."""


def calibrate(raw: Raw, first: int, end: int) -> tuple[DetectorSpec, Arrays]:
    """A detector whose units are the channels, with noise from the samples ``[first, end)``.

    The noise of a channel is the median absolute deviation over 0.6745, the median over short
    pieces of it, so that neither spikes nor a disturbed piece matter. A channel that is constant,
    or ten times as noisy as the median one, is not used.

    Raises
    ------
    ConfigError
        Too short, or no channel with a signal.
    """
    arrays: Arrays = {
        "position_C2": raw.position_C2,
        "shank_C": raw.shank_C,
        "group_C": raw.group_C,
        "noise_C": np.ones(len(raw.channels), np.float32),
    }
    noise_PC = []
    for rows_SC in _noise_pieces(raw, first, end, Conditioner(_spec(raw, arrays), arrays)):
        median_C = np.median(rows_SC, axis=0)
        noise_PC.append(np.median(np.abs(rows_SC - median_C), axis=0) / 0.6745)
    noise_C = np.empty(len(raw.channels), np.float32)
    column_C = Conditioner(_spec(raw, arrays), arrays).column_C
    noise_C[column_C] = np.median(noise_PC, axis=0)
    if not (noise_C > 0).any():
        raise ConfigError(f"{raw.name} is constant on every channel; name a recording with signal")
    noise_C[noise_C > 10 * np.median(noise_C[noise_C > 0])] = 0
    arrays["noise_C"] = noise_C
    return _spec(raw, arrays), arrays


def _spec(raw: Raw, arrays: Arrays, units: list[str] | None = None) -> DetectorSpec:
    def samples(ms: float) -> int:
        return max(1, round(ms * raw.rate / 1000))

    return make_spec(
        arrays,
        rate=raw.rate,
        units=units or [f"ch{c:03d}" for c in range(len(raw.channels))],
        templates=units is not None,
        uv_per_bit=raw.uv_per_bit,
        probe=raw.name,
        highpass_hz=HIGHPASS_HZ,
        threshold=THRESHOLD_OF_TEMPLATES if units else THRESHOLD,
        reach_um=REACH_UM,
        exclusion=samples(EXCLUSION_MS),
        refractory=samples(REFRACTORY_MS),
        lag=samples(LAG_MS),
        before=samples(BEFORE_MS),
        made={"channels": list(raw.channels)},
    )


def _noise_pieces(
    raw: Raw, first: int, end: int, front: Conditioner
) -> Iterator[NDArray[np.float32]]:
    """Conditioned samples of short pieces, spread evenly."""
    length = round(NOISE_S * raw.rate)
    pieces = min(NOISE_PIECES, (end - first) // length)
    if pieces < 1:
        raise ConfigError(
            f"{raw.name} has {(end - first) / raw.rate:.3g} s to calibrate with; expected at least "
            f"{NOISE_S} s"
        )
    for at in np.linspace(first, end - length, pieces).astype(int):
        front.reset()
        yield front.rows(raw.read(at, at + length))[length // 50 :]


def with_templates(
    raw: Raw,
    spec: DetectorSpec,
    arrays: Arrays,
    trains: dict[str, NDArray[np.int64]],
    first: int,
    end: int,
    tell: Tell = lambda what, done: None,
) -> tuple[DetectorSpec, Arrays, dict[str, str]]:
    """Make of a detector of channels one of sorted units.

    Parameters
    ----------
    trains : dict of str to int64 array
        Samples of each unit's spikes, as the sorter has them; the detector will report the same.
    first, end : int
        The baseline: only spikes inside it are used.
    tell : callable

    Returns
    -------
    spec, arrays
        Of the detector.
    left_out : dict of str to str
        Units that got no template, and why.
    """
    width, before = round(WIDTH_MS * raw.rate / 1000), spec.before
    front = Conditioner(spec, arrays)
    chosen = {unit: _spread(train, first, end) for unit, train in trains.items()}
    left_out = {
        unit: f"{len(train)} spikes; expected at least {FEWEST}"
        for unit, train in chosen.items()
        if len(train) < FEWEST
    }
    chosen = {unit: train for unit, train in chosen.items() if unit not in left_out}
    trains_of = list(chosen.values())
    mean_UWC = _averages(raw, front, trains_of, first, end, before, width + 2 * before, tell)
    noise_CC = _noise_covariance(raw, first, end, front)
    shank_C = arrays["shank_C"][front.column_C]
    units, parts = [], []
    for unit, mean_WC in zip(chosen, mean_UWC, strict=True):
        # The deepest point may lie a little off the sorter's time; that is kept as a shift.
        near_WC = mean_WC[before : 3 * before + 1]
        at, column = np.unravel_index(near_WC.argmin(), near_WC.shape)
        depth = -near_WC[at, column]
        if depth < LEAST_DEPTH:
            left_out[unit] = f"{depth:.1f} times the noise deep; expected {LEAST_DEPTH:g}"
            continue
        template_WC = mean_WC[at : at + width]
        left = _where(template_WC, shank_C)
        span = slice(left, left + min(SPAN, len(shank_C)))
        units.append(unit)
        parts.append(
            (
                template_WC[:, span],
                template_WC[:, span] @ np.linalg.inv(noise_CC[span, span]),
                left,
                int(at) - before,
            )
        )
    if not units:
        raise ConfigError(
            f"no unit of {raw.name} can be assigned to ({'; '.join(left_out.values()) or 'none'}); "
            "name a sorting of this recording"
        )
    templates, filters, lefts, shifts = zip(*parts, strict=True)
    arrays = arrays | {
        "template_UWK": np.ascontiguousarray(templates, np.float32),
        "filter_UWK": np.ascontiguousarray(filters, np.float32),
        "left_U": np.array(lefts, np.int64),
        "shift_U": np.array(shifts, np.int64),
        "amplitude_U2": np.tile(np.array(AMPLITUDES, np.float32), (len(units), 1)),
        "least_gain_U": np.full(len(units), LEAST_GAIN, np.float32),
    }
    return _spec(raw, arrays, units), arrays, left_out


def _spread(train: NDArray[np.int64], first: int, end: int) -> NDArray[np.int64]:
    """At most SPIKES of the spikes in the baseline, evenly spread."""
    inside = np.sort(train[(train >= first) & (train < end)])
    if len(inside) <= SPIKES:
        return inside
    return inside[np.linspace(0, len(inside) - 1, SPIKES).astype(int)]


def _averages(
    raw: Raw,
    front: Conditioner,
    trains: list[NDArray[np.int64]],
    first: int,
    end: int,
    before: int,
    length: int,
    tell: Tell,
) -> NDArray[np.float32]:
    """Mean conditioned samples around each unit's spikes, from twice ``before`` before them."""
    sum_UWC = np.zeros((len(trains), length, len(raw.channels)), np.float32)
    count_U = np.zeros((len(trains), 1, 1), np.float32)
    unit_S = np.repeat(np.arange(len(trains)), [len(train) for train in trains])
    sample_S = np.concatenate(trains) if trains else np.zeros(0, np.int64)
    order = np.argsort(sample_S, kind="stable")
    unit_S, sample_S = unit_S[order], sample_S[order]
    front.reset()
    kept_SC, next_spike = np.zeros((0, len(raw.channels)), np.float32), 0
    for at, samples_SC in raw.pieces(first, end):
        rows_SC = np.concatenate([kept_SC, front.rows(samples_SC)])
        zero = at - len(kept_SC)
        while next_spike < len(sample_S):
            top = sample_S[next_spike] - 2 * before - zero
            if top + length > len(rows_SC):
                break
            if top >= 0:
                sum_UWC[unit_S[next_spike]] += rows_SC[top : top + length]
                count_U[unit_S[next_spike]] += 1
            next_spike += 1
        kept_SC = rows_SC[-length:]
        tell("templates", (at + len(samples_SC) - first) / (end - first))
    sum_UWC /= np.maximum(count_U, 1)
    return sum_UWC


def _where(template_WC: NDArray[np.float32], shank_C: NDArray[np.int64]) -> int:
    """First of the SPAN columns that hold most of a template, on one shank if it is long enough."""
    energy_C = (template_WC**2).sum(axis=0)
    span = min(SPAN, len(energy_C))
    inside = np.convolve(energy_C, np.ones(span), "valid")
    whole = shank_C[: len(inside)] == shank_C[span - 1 :]
    return int(np.where(whole, inside, -1).argmax() if whole.any() else inside.argmax())


def _noise_covariance(raw: Raw, first: int, end: int, front: Conditioner) -> NDArray[np.float64]:
    """Covariance of the columns' noise, in multiples of it; spikes are clipped away."""
    total_CC, count = np.zeros((len(raw.channels),) * 2), 0
    for rows_SC in _noise_pieces(raw, first, end, front):
        quiet_SC = np.clip(rows_SC[::3], -3, 3)
        total_CC += quiet_SC.T @ quiet_SC
        count += len(quiet_SC)
    return total_CC / count + RIDGE * np.eye(len(total_CC))
