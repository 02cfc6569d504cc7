"""Make a session like those of the International Brain Laboratory, with known best answers.

A mouse turns a wheel to report the side of a stimulus. Its trials, wheel and whiskers are drawn
from `ideal.Priors` and `ideal.StateSpace`; units fire according to `ideal.Tuning`, on top of a slow
shared drift; and `ideal.Observer` says how well anything causal could have decoded it.

The clock counts samples at 30 000 Hz and everything that drives a unit is constant inside a 20 ms
bin, so the counts in those bins carry all there is to know. Events are stamped somewhere inside the
bin in which they begin. Behaviour sample k is the value in bin k, stamped with the bin's end.

Shapes: T bins, N units, J states, R trials, S stimuli, Q bins of stimulus response, C cells (a unit
in a bin with spikes), P spikes.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from temporaldata import ArrayDict, Data, Interval, IrregularTimeSeries, RegularTimeSeries

from rt_neds import ideal
from rt_neds.errors import ConfigError
from rt_neds.ideal import TAIL, Float, Int, Single
from rt_neds.task import Task, draw_task

RATE = 30_000  # samples per second
BIN = 600  # samples per 20 ms bin
BINS_PER_S = RATE // BIN
REFRACTORY = 60  # samples, 2 ms
MOST_SPIKES = 9  # more than this many in one bin would not leave room for the refractory time
TOP_RATE = 100.0  # spikes per second

# Strength of tuning by region, in depth order from the tip: probes that pass from thalamus through
# hippocampus to visual cortex. Each region has its own mixture, so that tuning tells the region.
REGIONS: dict[str, dict[str, float]] = {
    "PO": dict(stimulus=0.4, choice=0.8, wheel=1.3, whisker=2.0, block=0.5, reward=0.5),
    "LP": dict(stimulus=1.6, choice=0.8, wheel=1.0, whisker=0.5, block=0.7, reward=0.4),
    "DG": dict(stimulus=0.1, choice=0.5, wheel=0.5, whisker=0.4, block=1.0, reward=1.2),
    "CA1": dict(stimulus=0.2, choice=0.6, wheel=0.9, whisker=0.8, block=1.8, reward=2.0),
    "VISa": dict(stimulus=1.2, choice=1.8, wheel=1.0, whisker=0.8, block=0.8, reward=0.6),
}
# Standard deviation over units of the log gain that each variable can bring, before the region's
# factor. Wheel: at the median peak speed. Set so that the best decoder is good and not perfect.
STRENGTH = dict(stimulus=0.35, choice=0.135, wheel=0.6, whisker=0.16, block=0.06, reward=0.25)
DRIFT = 0.25  # sd of the log rate over time that the shared drift causes in a typical unit


@dataclass(frozen=True)
class World:
    """Everything about one session: what was drawn, and the parameters it was drawn with.

    `tonic_TN` is the counts expected in each bin when idle (baseline, drift, block); `baseline_N`
    the rate with every gain at 1 and `mean_rate_N` the rate expected over the session, in spikes/s.
    """

    space: ideal.StateSpace
    prior: ideal.Priors
    task: Task
    tuning: ideal.Tuning
    region_N: NDArray[np.str_]
    baseline_N: Float
    tonic_TN: Single
    mean_rate_N: Float
    counts_TN: NDArray[np.uint8]


def simulate(*, units: int = 300, minutes: float = 20.0, seed: int = 0) -> Data:
    """Simulate one session with the traces of its ideal observer.

    Parameters
    ----------
    units
        Number of units, at least 1.
    minutes
        Length of the session, at least 1.
    seed
        The same arguments give the same spikes and behaviour, bit for bit.

    Returns
    -------
    temporaldata.Data
        A brainsets session with IBL names: `spikes`, `units`, `trials`, `wheel`, `whisker`, and
        `ideal`, the best causal estimates of `wheel_speed`, `whisker_motion_energy` (posterior
        means) and `choice` (probability of left) on the same 50 Hz grid.

    Raises
    ------
    ConfigError
        An argument is out of its range.
    """
    world = make_world(units=units, minutes=minutes, seed=seed)
    rng_place, rng_whisker, rng_stamp = _generators(seed)[3:]
    observer = ideal.Observer(world.tuning, world.space, world.prior)
    traces = observer.observe(world.counts_TN, world.tonic_TN, world.task.timing)
    sample, unit = place_spikes(world.counts_TN, rng_place)
    state_T, seconds = world.task.state_T, world.task.timing.n_bins / BINS_PER_S
    domain = Interval(start=0.0, end=seconds)
    whisker_T = ideal.WHISKER_REST + world.space.whisker_J[state_T]
    whisker_T += rng_whisker.normal(0, 0.08, len(state_T)).clip(-0.3, 0.3)
    session = f"sim_{seed:04d}"
    return Data(
        brainset=Data(id="rt_neds_simulated"),
        subject=Data(id="simulated_mouse", species="MUS_MUSCULUS"),
        session=Data(id=session),
        spikes=IrregularTimeSeries(timestamps=sample / RATE, unit_index=unit, domain=domain),
        units=_units(world, np.bincount(unit, minlength=units) / seconds, session),
        trials=_trials(world, rng_stamp),
        wheel=_series(wheel_speed=world.space.speed_J[state_T]),
        whisker=_series(whisker_motion_energy=whisker_T),
        ideal=_series(
            wheel_speed=traces.wheel_speed,
            whisker_motion_energy=traces.whisker_motion_energy,
            choice=traces.choice,
        ),
        domain=domain,
    )


def simulate_file(
    path: str | os.PathLike[str], *, units: int = 300, minutes: float = 20.0, seed: int = 0
) -> dict[str, Any]:
    """Simulate one session into a brainsets HDF5 file.

    Parameters
    ----------
    path
        The file to write; replaced if it is there, and left alone if anything fails.
    units, minutes, seed
        As for `simulate`.

    Returns
    -------
    dict
        `session`, `units`, `spikes`, `trials`, `minutes`, `mean_rate` (spikes/s per unit), and
        `ideal`: the observer's scores over the last fifth of the session.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigError(
            f"{path} lies in no existing folder; expected a file name inside one; "
            f"create {path.parent} or give another path"
        )
    session = simulate(units=units, minutes=minutes, seed=seed)
    partial = path.with_name(path.name + ".partial")
    try:
        session.save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    n_spikes, seconds = len(session.spikes.timestamps), float(session.domain.end[-1])
    return {
        "session": session.session.id,
        "units": units,
        "spikes": n_spikes,
        "trials": len(session.trials),
        "minutes": seconds / 60,
        "mean_rate": n_spikes / units / seconds,
        "ideal": ideal.scores(session),
    }


def make_world(*, units: int, minutes: float, seed: int) -> World:
    """Draw behaviour, units and spike counts; arguments as for `simulate`."""
    _check(units, minutes, seed)
    rng_task, rng_unit, rng_count = _generators(seed)[:3]
    space, prior = ideal.state_space(), ideal.priors()
    task = draw_task(round(minutes * 60 * BINS_PER_S), space, prior, rng_task)
    region_N = np.repeat(list(REGIONS), np.diff(np.linspace(0, units, 6).round().astype(int)))
    baseline_N = np.clip(5 * np.exp(rng_unit.normal(0, 1.1, units)), 0.1, 40.0)
    tuning, block_N = _draw_tuning(region_N, baseline_N, space, rng_unit)
    tonic_TN = _tonic(baseline_N, block_N, task.timing, rng_unit)
    counts_TN, mean_rate_N = _draw_counts(tonic_TN, tuning, task, rng_count)
    return World(space, prior, task, tuning, region_N, baseline_N, tonic_TN, mean_rate_N, counts_TN)


def _check(units: int, minutes: float, seed: int) -> None:
    if units < 1:
        raise ConfigError(f"{units} units; expected 1 or more; give a larger number of units")
    if not 1 <= minutes <= 600:
        raise ConfigError(f"{minutes} minutes; expected 1 to 600; give another length")
    if seed < 0:
        raise ConfigError(f"seed {seed}; expected 0 or more; give another seed")


def _generators(seed: int) -> list[Generator]:
    """Independent generators, so that the behaviour is the same whatever the number of units."""
    return [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(6)]


def _draw_tuning(
    region_N: NDArray[np.str_], baseline_N: Float, space: ideal.StateSpace, rng: Generator
) -> tuple[ideal.Tuning, Float]:
    """Draw the units' log gains; also their log gain in left blocks (negated in right ones)."""
    # Fast units are modulated less, which also bounds the number of spikes a bin can hold.
    shrink_N = np.minimum(1.0, (5 / baseline_N) ** 0.3)
    gain: dict[str, Float] = {}
    for name, sd in STRENGTH.items():
        region = np.array([REGIONS[r][name] for r in region_N])
        gain[name] = sd * region * shrink_N * rng.normal(0, 1, len(region_N)).clip(-2.5, 2.5)
    # Some units follow the wheel, some lead it; they saturate at various speeds.
    lead_N = rng.integers(-TAIL, TAIL + 1, len(region_N))
    knee_N = rng.choice([1.0, 4.0], len(region_N))
    state_NJ = gain["choice"][:, None] * space.direction_J
    state_NJ += gain["whisker"][:, None] * space.whisker_J
    state_NJ += gain["reward"][:, None] * space.outcome_J
    for n, (lead, knee) in enumerate(zip(lead_N, knee_N, strict=True)):
        # Chains begin and end at rest for longer than any lead, so the roll never mixes chains.
        seen_J = np.roll(space.speed_J, -lead) / ideal.SPEED_UNIT
        state_NJ[n] += gain["wheel"][n] * knee * -np.expm1(-seen_J / knee)
    # No unit exceeds TOP_RATE in any state (but for drift and stimulus), to fit MOST_SPIKES.
    room_N = np.log(TOP_RATE / baseline_N) / np.maximum(state_NJ.max(axis=1), 1e-9)
    state_NJ *= np.minimum(room_N, 1.0)[:, None]

    # Positive on the unit's preferred side, weakly negative on the other.
    stimulus_NS = np.concatenate(
        [np.where(gain["stimulus"][:, None] < 0, 1.0, -0.3) * ideal.SALIENCE,
         np.where(gain["stimulus"][:, None] > 0, 1.0, -0.3) * ideal.SALIENCE], axis=1
    ) * np.abs(gain["stimulus"][:, None])  # fmt: skip
    latency_N = rng.uniform(1.5, 4.5, (len(region_N), 1))
    after = np.maximum(np.arange(ideal.STIMULUS) + 0.5 - latency_N, 0.0)
    kernel_NQ = after / 3 * np.exp(1 - after / 3)
    tuning = ideal.Tuning(*(a.astype(np.float32) for a in (state_NJ, stimulus_NS, kernel_NQ)))
    return tuning, gain["block"]


def _tonic(baseline_N: Float, block_N: Float, timing: ideal.Timing, rng: Generator) -> Single:
    """Expected counts per bin when idle: baseline, three slow shared factors, block; (T, N)."""
    seconds = timing.n_bins // BINS_PER_S + 2
    at_T = np.arange(timing.n_bins) / BINS_PER_S
    log_TN = np.repeat(np.log(baseline_N / BINS_PER_S)[None].astype(np.float32), len(at_T), axis=0)
    for minutes in (2.0, 5.0, 15.0):
        keep = math.exp(-1 / (60 * minutes))
        factor = rng.normal(0, 1, seconds)
        factor[1:] *= math.sqrt(1 - keep**2)
        for i in range(1, seconds):
            factor[i] += keep * factor[i - 1]
        factor_T = np.interp(at_T, np.arange(seconds), factor).astype(np.float32)
        load_N = rng.normal(0, DRIFT / math.sqrt(3), len(baseline_N)).astype(np.float32)
        log_TN += factor_T[:, None] * load_N
    # The block is in force from its first trial's start to the next block's.
    sign_R = np.select([timing.block_R == 1, timing.block_R == 0], [1, -1], 0)
    trial_T = np.searchsorted(timing.start_R, np.arange(len(at_T)), side="right")
    sign_T = np.concatenate([[0], sign_R])[trial_T].astype(np.float32)
    log_TN += sign_T[:, None] * block_N.astype(np.float32)
    return np.exp(log_TN, out=log_TN)


def _draw_counts(
    tonic_TN: Single, tuning: ideal.Tuning, task: Task, rng: Generator
) -> tuple[NDArray[np.uint8], Float]:
    """Draw Poisson counts (T, N), and the mean rate expected of each unit, spikes/s."""
    # No matrix product here: their last bits may depend on the number of threads.
    gain_NJ = np.exp(tuning.state_NJ)
    stimulus_T = np.full(len(tonic_TN), -1)
    since_T = np.zeros(len(tonic_TN), dtype=np.int64)
    for stim, s in zip(task.timing.stimulus_R, task.stimulus_R, strict=True):
        stimulus_T[stim : stim + ideal.STIMULUS] = s
        since_T[stim : stim + ideal.STIMULUS] = np.arange(ideal.STIMULUS)
    counts_TN = np.empty(tonic_TN.shape, dtype=np.uint8)
    total_N = np.zeros(tonic_TN.shape[1])
    for begin in range(0, len(tonic_TN), 4096):
        now = slice(begin, begin + 4096)
        rate_TN = tonic_TN[now] * gain_NJ[:, task.state_T[now]].T
        shown = np.flatnonzero(stimulus_T[now] >= 0)
        drive_TN = tuning.stimulus_NS.T[stimulus_T[now][shown]]
        rate_TN[shown] *= np.exp(drive_TN * tuning.kernel_NQ.T[since_T[now][shown]])
        counts_TN[now] = np.minimum(rng.poisson(rate_TN), MOST_SPIKES)
        total_N += rate_TN.sum(axis=0, dtype=np.float64)
    return counts_TN, total_N / len(tonic_TN) * BINS_PER_S


def place_spikes(counts_TN: NDArray[np.uint8], rng: Generator) -> tuple[Int, Int]:
    """Give the counted spikes times, no two of a unit closer than 2 ms.

    Inside its bin a unit's spikes are uniform over the arrangements that keep the distance to each
    other and to the unit's spike before. Counts thus stay Poisson, and times inside a bin carry no
    information: the ideal observer needs the counts alone.

    Returns
    -------
    sample, unit : ndarray of int64
        Sample index at 30 000 Hz and unit of each spike, sorted by time.
    """
    unit_C, bin_C = np.nonzero(counts_TN.T)
    count_C = counts_TN.T[unit_C, bin_C].astype(np.int64)
    first_C = np.cumsum(count_C) - count_C
    cell_P = np.repeat(np.arange(len(count_C)), count_C)
    rank_P = np.arange(len(cell_P)) - first_C[cell_P]
    # Ordered uniform numbers within each cell, from one sort.
    u_P = np.minimum(np.sort(cell_P + rng.random(len(cell_P))) - cell_P, 1 - 1e-9)

    after_C = np.zeros(len(count_C), dtype=bool)  # the unit also fired in the bin before
    after_C[1:] = (unit_C[1:] == unit_C[:-1]) & (bin_C[1:] == bin_C[:-1] + 1)
    # A cell's earliest sample depends on the last spike of the cell before. Runs of cells that push
    # each other are short, so repeating until nothing moves takes a few rounds.
    wait_C = np.zeros(len(count_C), dtype=np.int64)
    while True:
        free_C = BIN - wait_C - REFRACTORY * (count_C - 1)
        shift_P = (u_P * free_C[cell_P]).astype(np.int64) + REFRACTORY * rank_P
        sample_P = (bin_C * BIN + wait_C)[cell_P] + shift_P
        last_C = sample_P[first_C + count_C - 1]
        ready = np.concatenate([[0], last_C[:-1]]) + REFRACTORY - bin_C * BIN
        needed_C = np.where(after_C, np.maximum(ready, 0), 0)
        if np.array_equal(needed_C, wait_C):
            break
        wait_C = needed_C
    unit_P = unit_C[cell_P]
    order = np.argsort(sample_P * counts_TN.shape[1] + unit_P)
    return sample_P[order], unit_P[order]


def _series(**values: Float) -> RegularTimeSeries:
    """A 50 Hz series whose sample k is stamped with the end of bin k."""
    return RegularTimeSeries(sampling_rate=float(BINS_PER_S), domain_start=1 / BINS_PER_S, **values)


def _units(world: World, firing_rate_N: Float, session: str) -> ArrayDict:
    n_units = len(world.region_N)
    return ArrayDict(
        id=np.array([f"{session}/{n}" for n in range(n_units)]),
        probe_id=np.full(n_units, "probe00"),
        region_beryl=world.region_N,
        depths=np.round(np.linspace(20, 3840, n_units), 0),
        firing_rate=firing_rate_N,
        baseline_rate=world.baseline_N,
        expected_rate=world.mean_rate_N,
    )


def _trials(world: World, rng: Generator) -> Interval:
    """The trial table; each event falls on a random sample of the bin in which it begins."""
    task, timing = world.task, world.task.timing

    def stamp(bin_R: Int) -> Float:
        return (bin_R * BIN + rng.integers(0, BIN, len(bin_R))) / RATE

    side_R, contrast_R = np.divmod(task.stimulus_R, len(ideal.CONTRASTS))
    correct_R = task.left_R == (side_R == 1)
    contrast = ideal.CONTRASTS[contrast_R]
    stim_on, response = stamp(timing.stimulus_R), stamp(task.response_R)
    end = timing.end_R * BIN / RATE
    times = {
        "start": timing.start_R * BIN / RATE,
        "end": end,
        "stim_on_time": stim_on,
        "go_cue_time": stim_on + 30 / RATE,
        "movement_onset_time": stamp(task.onset_R),
        "response_time": response,
        "feedback_time": response + 30 / RATE,
        "stim_off_time": end - 0.1,
    }
    return Interval(
        **times,
        choice=task.left_R.astype(np.int64),
        reward=correct_R.astype(np.int64),
        feedback_type=np.where(correct_R, 1, -1),
        block_prior=timing.block_R,
        probability_left=np.array([ideal.PROBABILITY_LEFT[int(b)] for b in timing.block_R]),
        stimulus_side=side_R,
        stimulus_contrast=contrast_R,
        contrast_left=np.where(side_R == 1, contrast, np.nan),
        contrast_right=np.where(side_R == 0, contrast, np.nan),
        is_valid=np.ones(len(side_R), dtype=bool),
        trial_index=np.arange(len(side_R)),
        timekeys=list(times),
    )
