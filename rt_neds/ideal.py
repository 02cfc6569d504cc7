"""The hidden states of the simulated animal, and the exact causal observer of them.

At every 20 ms bin the simulated animal is in one of J states: idle, at some phase of a movement of
some size, or at some phase of the whisking that follows feedback. A movement is a chain of states
that is walked one state per bin, so its whole course is settled when it starts. Units fire with
Poisson counts whose log rates are sums of a known tonic part, a stimulus part and a part that is a
function of the state alone. That makes the posterior over states, given all counts so far, a
forward filter: shift every chain by one bin, let new movements start, weigh by the likelihood.

The filter is exact: the simulator draws its latents from these very states (`StateSpace`) and
priors (`Priors`), and spike counts are Poisson whatever the refractoriness (see
`simulate.place_spikes`). The observer is told more than a decoder is: all parameters, the slow
drift, the block, and when trials start (the next one too), show their stimulus and end. Its scores
are therefore upper bounds. It is not told the stimulus, choice, outcome or anything of movements.

Shapes: T bins, N units, J states, K movement templates, M states of one set of K chains, S stimuli
(side * 5 + contrast), R trials, U start bins, Q bins of stimulus response, G sizes of whisking.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from temporaldata import Data

Float = NDArray[np.float64]
Single = NDArray[np.float32]
Int = NDArray[np.int64]

CONTRASTS = np.array([0.0, 0.0625, 0.125, 0.25, 1.0])
SALIENCE = CONTRASTS / (CONTRASTS + 0.15)  # what a contrast is worth to units and to the animal
CONTRAST_ODDS = np.array([1, 2, 2, 2, 2]) / 9
BLOCKS = (1, 0, -1)  # rows of `Priors.stimulus_BS`; also the values of `trials.block_prior`
PROBABILITY_LEFT = {1: 0.8, 0: 0.2, -1: 0.5}

LEAD = 10  # bins of preparation before the wheel turns
TAIL = 5  # bins after the wheel stops in which lagging units still follow it
FEEDBACK = 30  # bins of the response to feedback, which begins TAIL bins after the response
STIMULUS = 20  # bins for which a stimulus drives units
MOVE_SPONTANEOUS = 2  # movement sets: 0 right choice, 1 left choice, 2 between trials
SPONTANEOUS_PER_BIN = 0.004
SPEED_UNIT = 3.0  # rad/s, the median peak speed; log gains are per this speed
WHISKER_REST = 0.4


def bell(n: int) -> Float:
    """Speed of a minimum-jerk movement that lasts `n` bins, at bin centres, with peak 1."""
    x = (np.arange(n) + 0.5) / n
    return 16 * x**2 * (1 - x) ** 2


def _normal_weights(z: Float) -> Float:
    weight = np.exp(-0.5 * z**2)
    return weight / weight.sum()


@dataclass(frozen=True)
class StateSpace:
    """Every state the animal can be in, as columns.

    Column 0 is idle. Then come three sets of K movement chains (`set_slice`), then the feedback
    chains in the order outcome (wrong, right), whisking size, phase.

    Attributes
    ----------
    duration_K, peak_K : movement time in bins, and peak speed in rad/s, of each template.
    prior_K, spontaneous_prior_K : probabilities of the templates inside and between trials.
    first_K, last_K : first and last state of each chain, relative to its set.
    phase_J : bins since the wheel began to turn (negative: preparing); 0 where meaningless.
    speed_J : wheel speed, rad/s.    whisker_J : whisker motion energy above rest.
    direction_J : +1 left choice, -1 right, ramping with the phase; 0 elsewhere.
    outcome_J : +1 rewarded, -1 not, with the time course of the feedback response; 0 elsewhere.
    """

    duration_K: Int
    peak_K: Float
    prior_K: Float
    spontaneous_prior_K: Float
    whisking_prior_G: Float
    first_K: Int
    last_K: Int
    phase_J: Int
    speed_J: Float
    whisker_J: Float
    direction_J: Float
    outcome_J: Float

    @property
    def n_move(self) -> int:
        """M, the number of states of one set of movement chains."""
        return int(self.last_K[-1]) + 1

    @property
    def n_sizes(self) -> int:
        """G, the number of sizes of the whisking after feedback."""
        return len(self.whisking_prior_G)

    def set_slice(self, which: int) -> slice:
        """Columns of one set of movement chains (0 right, 1 left, 2 spontaneous)."""
        return slice(1 + which * self.n_move, 1 + (which + 1) * self.n_move)

    @property
    def feedback_slice(self) -> slice:
        """Columns of the feedback chains, reshapable to (2, G, FEEDBACK)."""
        return slice(1 + 3 * self.n_move, len(self.phase_J))


def state_space() -> StateSpace:
    """The states of every simulated session: 10 peak speeds x 5 durations, 4 whisking sizes."""
    z_speed, z_time = np.linspace(-2, 2, 10), np.linspace(-1.6, 1.6, 5)
    peak = SPEED_UNIT * np.exp(0.5 * z_speed)
    duration = np.round(14 * np.exp(0.35 * z_time)).astype(np.int64)
    duration_K, peak_K = np.repeat(duration, len(peak)), np.tile(peak, len(duration))
    time_weight = np.repeat(_normal_weights(z_time), len(peak))
    prior_K = time_weight * np.tile(_normal_weights(z_speed), len(duration))
    # Between trials movements are smaller: the same templates, drawn from one sd lower.
    small_K = time_weight * np.tile(_normal_weights(z_speed + 1), len(duration))
    length_K = LEAD + duration_K + TAIL
    last_K = np.cumsum(length_K) - 1

    rise = np.arange(LEAD) / LEAD
    fall = np.arange(TAIL, 0, -1) / (TAIL + 1)
    phase, speed, ramp = [], [], []
    for n_bins, top in zip(duration_K, peak_K, strict=True):
        phase.append(np.arange(-LEAD, n_bins + TAIL))
        speed.append(np.concatenate([np.zeros(LEAD), top * bell(int(n_bins)), np.zeros(TAIL)]))
        ramp.append(np.concatenate([rise, np.ones(n_bins), fall]))
    speed_M, ramp_M = np.concatenate(speed), np.concatenate(ramp)
    # Whiskers follow the wheel by one bin; a chain ends at speed 0, so the roll never mixes chains.
    whisker_M = 1.2 * np.sqrt(np.roll(speed_M, 1) / SPEED_UNIT)

    size_G = np.exp(np.linspace(-1.0, 0.8, 4))
    shape_F = bell(FEEDBACK)
    n_feedback = 2 * len(size_G) * FEEDBACK
    whisking = np.tile((size_G[:, None] * shape_F).ravel(), 2)
    outcome = np.repeat([-1.0, 1.0], n_feedback // 2) * np.tile(shape_F, 2 * len(size_G))
    none = np.zeros(n_feedback)
    return StateSpace(
        duration_K, peak_K, prior_K, small_K, np.array([0.2, 0.3, 0.3, 0.2]),
        first_K=last_K - length_K + 1, last_K=last_K,
        phase_J=np.concatenate([[0], np.tile(np.concatenate(phase), 3), none]).astype(np.int64),
        speed_J=np.concatenate([[0], np.tile(speed_M, 3), none]),
        whisker_J=np.concatenate([[0], np.tile(whisker_M, 3), whisking]),
        direction_J=np.concatenate([[0], -ramp_M, ramp_M, 0 * ramp_M, none]),
        outcome_J=np.concatenate([[0], np.zeros(3 * len(speed_M)), outcome]),
    )  # fmt: skip


@dataclass(frozen=True)
class Priors:
    """What the animal does, as probabilities; the simulator draws from them.

    Attributes
    ----------
    stimulus_BS : stimulus given the block (rows as `BLOCKS`).
    left_BS : probability of a left choice given block and stimulus: psychometric, with lapses.
    start_SU : preparation starts this many bins after the stimulus bin; onset is LEAD bins later.
    """

    stimulus_BS: Float
    left_BS: Float
    start_SU: Float
    hazard_SU: Float = field(init=False)

    def __post_init__(self) -> None:
        left_over = 1 - np.cumsum(self.start_SU, axis=1) + self.start_SU
        hazard = np.minimum(self.start_SU / np.maximum(left_over, 1e-300), 1.0)
        hazard[:, -1] = 1.0
        object.__setattr__(self, "hazard_SU", hazard)


def priors() -> Priors:
    """The priors of every simulated session."""
    left = np.array([PROBABILITY_LEFT[b] for b in BLOCKS])[:, None]
    stimulus_BS = np.concatenate([(1 - left) * CONTRAST_ODDS, left * CONTRAST_ODDS], axis=1)
    signed_S = np.concatenate([-SALIENCE, SALIENCE])
    bias = np.array([1.0, -1.0, 0.0])[:, None]
    left_BS = 0.03 + 0.94 / (1 + np.exp(-(5.5 * signed_S + 0.9 * bias)))
    # Log-normal time to start; strong stimuli are quicker. One second and a half at the most.
    u = np.arange(70) + 0.5
    median = np.tile(5 + 14 * (1 - SALIENCE), 2)[:, None]
    start_SU = np.exp(-0.5 * (np.log(u / median) / 0.55) ** 2) / u
    return Priors(stimulus_BS, left_BS, start_SU / start_SU.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Timing:
    """What the observer is told, in bins: trial r is [start_R, end_R); blocks as in `BLOCKS`."""

    n_bins: int
    start_R: Int
    stimulus_R: Int
    end_R: Int
    block_R: Int


@dataclass(frozen=True)
class Tuning:
    """Log gains of the units.

    Attributes
    ----------
    state_NJ : log gain in each state, shape (N, J), float32.
    stimulus_NS : log gain for each stimulus at the peak of the response, float32.
    kernel_NQ : time course of the stimulus response from the stimulus bin on, peak 1, float32.
    """

    state_NJ: Single
    stimulus_NS: Single
    kernel_NQ: Single


@dataclass(frozen=True)
class Traces:
    """Posterior means, one value a bin: speed (rad/s), whisker energy, probability of left."""

    wheel_speed: Float
    whisker_motion_energy: Float
    choice: Float


class Observer:
    """The ideal observer of one session.

    Parameters
    ----------
    tuning, space, prior
        The generative model.
    """

    def __init__(self, tuning: Tuning, space: StateSpace, prior: Priors) -> None:
        self.tuning, self.space, self.prior = tuning, space, prior
        m = space.n_move
        # Inside a trial: idle, right chains, left chains, feedback. Between trials: idle, chains.
        inside = np.r_[0 : 1 + 2 * m, space.feedback_slice]
        between = np.r_[0, space.set_slice(MOVE_SPONTANEOUS)]
        self._inside_NJ = np.ascontiguousarray(tuning.state_NJ[:, inside])
        self._between_NJ = np.ascontiguousarray(tuning.state_NJ[:, between])
        self._inside_gain_NJ = np.exp(self._inside_NJ)
        self._between_gain_NJ = np.exp(self._between_NJ)
        chains = space.set_slice(0)
        feedback = space.feedback_slice
        one = np.ones(m)
        # Columns: probability, speed, whisker energy: three sums in one product.
        self._read_M3 = np.stack([one, space.speed_J[chains], space.whisker_J[chains]], axis=1)
        self._whisker_F = space.whisker_J[feedback].reshape(2, space.n_sizes, FEEDBACK)

    def observe(self, counts_TN: NDArray[np.uint8], tonic_TN: Single, timing: Timing) -> Traces:
        """Estimate what the animal is doing, at each bin from the counts up to that bin.

        Parameters
        ----------
        counts_TN
            Spikes of each unit in each 20 ms bin.
        tonic_TN
            Counts expected in the idle state without a stimulus: baseline, drift and block.
        timing
            What the observer is told about the task.

        Returns
        -------
        Traces
            Posterior means; `choice` is 0.5 outside trials and the prior before the stimulus.
        """
        out_T3 = np.zeros((timing.n_bins, 3))
        out_T3[:, 2] = 0.5
        stop = 0
        for start, stimulus, end, block in zip(
            timing.start_R, timing.stimulus_R, timing.end_R, timing.block_R, strict=True
        ):
            now = slice(stop, start)
            out_T3[now, :2] = self._between(counts_TN[now], tonic_TN[now])
            b, now = BLOCKS.index(block), slice(stimulus, end)
            out_T3[start:stimulus, 2] = self.prior.stimulus_BS[b] @ self.prior.left_BS[b]
            out_T3[now] = self._inside(counts_TN[now], tonic_TN[now], b)
            stop = end
        out_T3[stop:, :2] = self._between(counts_TN[stop:], tonic_TN[stop:])
        return Traces(out_T3[:, 0], out_T3[:, 1] + WHISKER_REST, out_T3[:, 2])

    def _between(self, counts_TN: NDArray[np.uint8], tonic_TN: Single) -> Float:
        """Filter one pause between trials, from idle; speed and whisker energy, shape (T, 2)."""
        space = self.space
        log_TJ = counts_TN.astype(np.float32) @ self._between_NJ - tonic_TN @ self._between_gain_NJ
        idle, move_M = 1.0, np.zeros(space.n_move)
        may_start_T = may_start(len(counts_TN), space)
        out_T2 = np.zeros((len(counts_TN), 2))
        for t, log_J in enumerate(log_TJ):
            ended = move_M[space.last_K].sum()
            started = (idle + ended) * SPONTANEOUS_PER_BIN if may_start_T[t] else 0.0
            idle += ended - started
            move_M[1:] = move_M[:-1]
            move_M[space.first_K] = started * space.spontaneous_prior_K
            weight_J = _weights(log_J)
            idle *= weight_J[0]
            move_M *= weight_J[1:]
            total, speed, whisker = move_M @ self._read_M3
            scale = 1 / (idle + total)
            idle *= scale
            move_M *= scale
            out_T2[t] = speed * scale, whisker * scale
        return out_T2

    def _log_likelihood(
        self, counts_TN: NDArray[np.uint8], tonic_TN: Single
    ) -> tuple[Single, Single]:
        """Log likelihood of each state: (Q, S, 1 + 2M) while the stimulus acts, then (T - Q, J)."""
        tuning, n_head = self.tuning, 1 + 2 * self.space.n_move
        q = min(STIMULUS, len(counts_TN))
        counts_TN = counts_TN.astype(np.float32)
        log_TJ = counts_TN @ self._inside_NJ
        kernel_QN = tuning.kernel_NQ[:, :q].T
        drive_QSN = kernel_QN[:, None, :] * tuning.stimulus_NS.T
        n_stimuli = drive_QSN.shape[1]
        rate_QSN = np.exp(drive_QSN) * tonic_TN[:q, None, :]
        expected = rate_QSN.reshape(q * n_stimuli, -1) @ self._inside_gain_NJ[:, :n_head]
        early_QSJ = log_TJ[:q, None, :n_head] - expected.reshape(q, n_stimuli, n_head)
        early_QSJ += (drive_QSN @ counts_TN[:q, :, None])[:, :, :1]
        return early_QSJ, log_TJ[q:] - tonic_TN[q:] @ self._inside_gain_NJ

    def _inside(self, counts_TN: NDArray[np.uint8], tonic_TN: Single, block: int) -> Float:
        """Filter one trial from its stimulus to its end; speed, whisker, P(left), (T, 3)."""
        space, prior, m = self.space, self.prior, self.space.n_move
        early_QSJ, late_TJ = self._log_likelihood(counts_TN, tonic_TN)
        n_stimuli = prior.start_SU.shape[0]
        left_S = prior.left_BS[block]
        choice_SC = np.stack([1 - left_S, left_S], axis=1)
        side_S = np.arange(n_stimuli) // len(CONTRASTS)
        right_SC = side_S[:, None] == np.arange(2)
        outcome_SCO = np.stack([~right_SC, right_SC], axis=2).astype(np.float64)
        idle_S = prior.stimulus_BS[block].copy()
        move_SCM = np.zeros((n_stimuli, 2, m))
        feedback_COGF = np.zeros((2, 2, space.n_sizes, FEEDBACK))
        out_T3 = np.zeros((len(counts_TN), 3))
        for t in range(len(counts_TN)):
            ended_SC = move_SCM[:, :, space.last_K].sum(axis=2)
            started_S = idle_S * prior.hazard_SU[:, min(t, prior.hazard_SU.shape[1] - 1)]
            idle_S -= started_S
            started_SC = started_S[:, None] * choice_SC
            move_SCM[:, :, 1:] = move_SCM[:, :, :-1]
            move_SCM[:, :, space.first_K] = started_SC[:, :, None] * space.prior_K
            # What reaches the end of a feedback chain falls off: the trial, told to be still
            # running, contradicts it. After this the stimulus no longer matters and is summed out.
            feedback_COGF[..., 1:] = feedback_COGF[..., :-1]
            entered_CO = (ended_SC[:, :, None] * outcome_SCO).sum(axis=0)
            feedback_COGF[..., 0] = entered_CO[:, :, None] * space.whisking_prior_G
            if t < len(early_QSJ):
                weight_SJ = _weights(early_QSJ[t])
                idle_S *= weight_SJ[:, 0]
                move_SCM *= weight_SJ[:, 1:].reshape(n_stimuli, 2, m)
            else:
                weight_J = _weights(late_TJ[t - len(early_QSJ)])
                idle_S *= weight_J[0]
                move_SCM *= weight_J[1 : 1 + 2 * m].reshape(2, m)
                feedback_COGF *= weight_J[1 + 2 * m :].reshape(2, space.n_sizes, FEEDBACK)
            read_SC3 = move_SCM @ self._read_M3
            feedback_C = feedback_COGF.sum(axis=(1, 2, 3))
            left = read_SC3[:, 1, 0].sum() + feedback_C[1] + idle_S @ left_S
            scale = 1 / (idle_S.sum() + read_SC3[..., 0].sum() + feedback_C.sum())
            idle_S *= scale
            move_SCM *= scale
            feedback_COGF *= scale
            whisking = (feedback_COGF * self._whisker_F).sum()
            whisker = read_SC3[..., 2].sum() * scale + whisking
            out_T3[t] = read_SC3[..., 1].sum() * scale, whisker, left * scale
        return out_T3


def _weights(log_likelihood: Single) -> Float:
    """Likelihoods up to a factor. The state that made the counts is never far below the best."""
    return np.exp((log_likelihood - log_likelihood.max()).astype(np.float64))


def may_start(n_bins: int, space: StateSpace) -> NDArray[np.bool_]:
    """Bins of a pause at which a movement may start so that it is over when the trial begins."""
    longest = LEAD + int(space.duration_K.max()) + TAIL
    return np.arange(n_bins) + longest <= n_bins


def scores(session: Data, last: float = 0.2) -> dict[str, float]:
    """Score the ideal observer stored in a simulated session, on the last part of the session.

    R2 over bins of `wheel_speed` and `whisker_motion_energy`; balanced accuracy of `choice` in the
    bin of movement onset, over trials (nan where one choice never occurs). `last` is a fraction.
    """
    best, result = session.ideal, {}
    first = int(len(best) * (1 - last))
    for group, name in (("wheel", "wheel_speed"), ("whisker", "whisker_motion_energy")):
        true_T, mean_T = (getattr(g, name)[first:] for g in (getattr(session, group), best))
        result[name] = 1 - float(((true_T - mean_T) ** 2).sum() / len(true_T) / true_T.var())
    onset_R = (session.trials.movement_onset_time * session.wheel.sampling_rate).astype(np.int64)
    right_R = (best.choice[onset_R] > 0.5) == (session.trials.choice == 1)
    scored = onset_R >= first
    hits = [right_R[scored & (session.trials.choice == side)] for side in (0, 1)]
    result["choice"] = float(np.mean([h.mean() if len(h) else np.nan for h in hits]))
    return result
