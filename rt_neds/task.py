"""The trials of a simulated session: when they are, what is hidden in them, what lies between.

Shapes: T bins, R trials, S stimuli, U start bins, K movement templates, G sizes of whisking, B
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from rt_neds import ideal
from rt_neds.ideal import FEEDBACK, LEAD, TAIL, Int

UNBIASED_TRIALS = 90


@dataclass(frozen=True)
class Task:
    """The trials drawn: `timing` is what an observer may know, the rest is hidden.

    `state_T` is the column of `ideal.StateSpace` in each bin; stimuli count side * 5 + contrast.
    """

    timing: ideal.Timing
    state_T: Int
    stimulus_R: Int
    left_R: NDArray[np.bool_]
    onset_R: Int
    response_R: Int


def _draw_blocks(n_trials: int, rng: Generator) -> Int:
    """Block of each trial: 90 unbiased, then runs of 20-100 (mostly short) of alternate sides."""
    blocks = [-1] * UNBIASED_TRIALS
    side = int(rng.integers(2))
    while len(blocks) < n_trials:
        length = 20 + int(rng.exponential(40))
        blocks += [side] * min(length, 100)
        side = 1 - side
    return np.array(blocks[:n_trials], dtype=np.int64)


def draw_task(n_bins: int, space: ideal.StateSpace, prior: ideal.Priors, rng: Generator) -> Task:
    """Draw trials one after another until the session is full, and pauses between them."""
    state_T = np.zeros(n_bins, dtype=np.int64)
    blocks = _draw_blocks(n_bins // 100 + UNBIASED_TRIALS, rng)
    rows: list[tuple[int, ...]] = []
    longest = prior.start_SU.shape[1] + LEAD + int(space.duration_K.max()) + TAIL + FEEDBACK
    stop = 0
    while True:
        start = stop + int(rng.integers(60, 160))
        stim = start + int(rng.integers(20, 35))
        block = int(blocks[len(rows)])
        b = ideal.BLOCKS.index(block)
        s = int(rng.choice(prior.stimulus_BS.shape[1], p=prior.stimulus_BS[b]))
        left = bool(rng.random() < prior.left_BS[b, s])
        chain = stim + int(rng.choice(prior.start_SU.shape[1], p=prior.start_SU[s]))
        k = int(rng.choice(len(space.prior_K), p=space.prior_K))
        size = int(rng.choice(space.n_sizes, p=space.whisking_prior_G))
        feedback = chain + LEAD + int(space.duration_K[k]) + TAIL
        end = feedback + FEEDBACK
        # Whether a trial takes place must not depend on how long it turns out.
        if stim + longest > n_bins:
            break
        _draw_pause(state_T[stop:start], space, rng)
        first = space.set_slice(int(left)).start + space.first_K[k]
        state_T[chain:feedback] = np.arange(first, first + feedback - chain)
        outcome = int(left == (s >= len(ideal.CONTRASTS)))
        first = space.feedback_slice.start + (outcome * space.n_sizes + size) * FEEDBACK
        state_T[feedback:end] = np.arange(first, first + FEEDBACK)
        rows.append((start, stim, end, block, s, left, chain + LEAD, feedback - TAIL))
        stop = end
    _draw_pause(state_T[stop:], space, rng)
    start_R, stim_R, end_R, block_R, stimulus_R, left_R, *movement = np.array(rows).T.copy()
    timing = ideal.Timing(n_bins, start_R, stim_R, end_R, block_R)
    return Task(timing, state_T, stimulus_R, left_R.astype(bool), *movement)


def _draw_pause(state_T: Int, space: ideal.StateSpace, rng: Generator) -> None:
    """Fill a pause, a view of the session's states, with occasional movements."""
    chance_T = rng.random(len(state_T)) < ideal.SPONTANEOUS_PER_BIN
    free = 0
    for t in np.flatnonzero(chance_T & ideal.may_start(len(state_T), space)):
        if t < free:
            continue
        k = int(rng.choice(len(space.prior_K), p=space.spontaneous_prior_K))
        first = space.set_slice(ideal.MOVE_SPONTANEOUS).start + space.first_K[k]
        free = int(t + space.last_K[k] - space.first_K[k] + 1)
        state_T[t:free] = np.arange(first, first + free - t)
