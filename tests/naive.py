"""Slow, obvious twins of everything fast: the test is that fast equals naive."""

import math

import numpy as np


def bins_of(records, rows_of_unit, units, width, first_bin, end_bin):
    """Counts of bins ``[first_bin, end_bin)``, one spike at a time."""
    counts = np.zeros((end_bin - first_bin, units), np.float32)
    unknown = np.zeros(end_bin - first_bin, int)
    before = after = 0
    for sample, unit, _ in records.tolist():
        bin_ = sample // width
        if bin_ < first_bin:
            before += 1
        elif bin_ >= end_bin:
            after += 1
        elif unit < len(rows_of_unit) and rows_of_unit[unit] >= 0:
            counts[bin_ - first_bin, rows_of_unit[unit]] += 1
        else:
            unknown[bin_ - first_bin] += 1
    return counts, unknown, before, after


def bits_per_spike_of_unit(counts, rates):
    """The formula as it is written: null is the unit's mean over the very data scored."""
    from math import lgamma, log

    def negative_log_likelihood(rate_per_bin):
        return sum(
            r - k * log(r) + lgamma(k + 1) for k, r in zip(counts, rate_per_bin, strict=True)
        )

    mean = sum(counts) / len(counts)
    null = negative_log_likelihood([mean] * len(counts))
    return (null - negative_log_likelihood(rates)) / (sum(counts) * log(2))


def surprise_and_bits(counts, rates, usual):
    """Standardised log-likelihood of each unit, and the gain over constant rates, term by term."""
    units = len(usual)
    score, variance, gain, spikes = [0.0] * units, [0.0] * units, 0.0, 0.0
    for count_N, rate_N in zip(counts, rates, strict=True):
        for n in range(units):
            count, rate, constant = float(count_N[n]), float(rate_N[n]), float(usual[n])
            score[n] += (count - rate) * math.log(rate)
            variance[n] += rate * math.log(rate) ** 2
            gain += count * (math.log2(rate) - math.log2(constant))
            gain -= (rate - constant) / math.log(2)
            spikes += count
    return [s / math.sqrt(v) for s, v in zip(score, variance, strict=True)], gain / spikes


def fallen_silent(counts_TN, observed_T, limit_N):
    """Which units were silent for more observed bins than their limit, at each bin."""
    T, N = counts_TN.shape
    out_TN = np.zeros((T, N), bool)
    for n in range(N):
        silent = 0
        for t in range(T):
            if observed_T[t]:
                silent = 0 if counts_TN[t, n] > 0 else silent + 1
            out_TN[t, n] = silent > limit_N[n]
    return out_TN


def longest_silence(fired_T):
    """Bins of the longest run without a spike."""
    longest = now = 0
    for fired in fired_T:
        now = 0 if fired else now + 1
        longest = max(longest, now)
    return longest
