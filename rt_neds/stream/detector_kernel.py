"""The compiled part of the detector: filter and reference, find peaks, assign them to templates.

Three kernels, in the order the samples take. Rows are samples. Columns are channels in the order
of their place on the probe (shank, depth, side), so that neighbours of a channel, and the channels
that a template covers, are a range of columns; only the first kernel knows the source's order.

Shape suffixes: S samples given, C channels, R rows of the buffer, G groups of the reference,
U units, W rows of a template, K channels of a template, P spikes pending.
"""

from __future__ import annotations

import numba
import numpy as np

GRID = 1 / 16
"""Medians are exact on a grid of this many bits: far below the noise, and found by counting."""

# Places in the int64 array `at_X` that the kernels share.
ROW = 0  # next row to look for peaks in
SEEN = 1  # first row that was never looked at
FILLED = 2  # first row of the buffer that holds no samples yet
FIRST = 3  # sample number of row 0
PENDING = 4  # spikes found and not yet given
BLOCK = 5  # block of the burst limit that is being counted
IN_BLOCK = 6  # peaks taken in it
UNASSIGNED = 7  # peaks that no template explains
OVER = 8  # peaks left out by the burst limit
SLOTS = 9

# Places in the float32 and int64 arrays of settings.
THRESHOLD, LEAST_GAIN = 0, 1
EXCLUSION, REFRACTORY, LAG, BEFORE, BURST, BLOCK_ROWS = 0, 1, 2, 3, 4, 5


@numba.njit(boundscheck=False)
def _below(values_C, n, step):  # type: ignore[no-untyped-def]
    bound = np.float32(step * GRID)
    count = np.int32(0)
    for c in range(n):
        count += np.int32(values_C[c] <= bound)
    return count


@numba.njit(
    numba.float32(numba.float32[::1], numba.int64, numba.float32),
    cache=True,
    nogil=True,
    boundscheck=False,
)
def median(values_C, n, near):  # type: ignore[no-untyped-def]
    """Return the lower median of the first ``n`` values, rounded up to GRID; start near a guess.

    Counting how many values lie below a guess takes a handful of vector instructions; sorting does
    not vectorise. The guess changes how long it takes and never what comes out.
    """
    half = (n + 1) // 2
    high = np.int64(np.ceil(near / GRID))
    low = high
    step = 1
    while _below(values_C, n, high) < half:
        low = high
        high += step
        step *= 2
    if low == high:
        low = high - 1
        step = 2
        while _below(values_C, n, low) >= half:
            high = low
            low -= step
            step *= 2
    while high - low > 1:
        middle = (low + high) >> 1
        if _below(values_C, n, middle) >= half:
            high = middle
        else:
            low = middle
    return np.float32(high * GRID)


@numba.njit(
    numba.void(
        numba.types.Array(numba.int16, 2, "C", readonly=True),  # samples_SC
        numba.int64,  # begin
        numba.int64,  # end
        numba.int64[::1],  # column_C
        numba.float32[::1],  # base_C
        numba.float32[:, ::1],  # sos_26
        numba.float32[:, ::1],  # state_4C
        numba.int64[::1],  # group_end_G
        numba.int64[::1],  # member_C
        numba.float32[::1],  # reference_G
        numba.float32[::1],  # per_noise_C
        numba.float32[::1],  # scratch_C
        numba.float32[:, ::1],  # rows_RC
        numba.int64[::1],  # at_X
    ),
    cache=True,
    nogil=True,
    boundscheck=False,
    fastmath={"contract"},
)
def condition(  # type: ignore[no-untyped-def]
    samples_SC,
    begin,
    end,
    column_C,
    base_C,
    sos_26,
    state_4C,
    group_end_G,
    member_C,
    reference_G,
    per_noise_C,
    scratch_C,
    rows_RC,
    at_X,
):
    """Filter, reference and scale samples ``[begin, end)`` into the rows from ``at_X[FILLED]`` on.

    Parameters
    ----------
    samples_SC : int16 array
        In the source's order of channels.
    column_C : int64 array
        Source channel of each column.
    base_C : float32 array
        Subtracted first: the first sample after a reset, so that filters need not settle from 0.
    sos_26 : float32 array
        Two second-order sections of a high-pass, as scipy has them.
    state_4C : float32 array
        What the sections remember.
    group_end_G, member_C : int64 arrays
        Columns of each group that shares a reference, one group after the other.
    reference_G : float32 array
        Last medians: where the search for the next begins.
    per_noise_C : float32 array
        One over the noise of each column; 0 for a column not to be used.
    rows_RC : float32 array
        Filled with multiples of the noise.
    """
    channels = len(column_C)
    b0, b1, b2, a1, a2 = sos_26[0, 0], sos_26[0, 1], sos_26[0, 2], sos_26[0, 4], sos_26[0, 5]
    d0, d1, d2, c1, c2 = sos_26[1, 0], sos_26[1, 1], sos_26[1, 2], sos_26[1, 4], sos_26[1, 5]
    row = at_X[FILLED]
    for s in range(begin, end):
        for c in range(channels):
            scratch_C[c] = np.float32(samples_SC[s, column_C[c]]) - base_C[c]
        for c in range(channels):
            x = scratch_C[c]
            y = b0 * x + state_4C[0, c]
            state_4C[0, c] = b1 * x - a1 * y + state_4C[1, c]
            state_4C[1, c] = b2 * x - a2 * y
            z = d0 * y + state_4C[2, c]
            state_4C[2, c] = d1 * y - c1 * z + state_4C[3, c]
            state_4C[3, c] = d2 * y - c2 * z
            rows_RC[row, c] = z
        start = 0
        for g in range(len(group_end_G)):
            stop = group_end_G[g]
            for i in range(start, stop):
                scratch_C[i - start] = rows_RC[row, member_C[i]]
            reference_G[g] = median(scratch_C, stop - start, reference_G[g])
            for i in range(start, stop):
                rows_RC[row, member_C[i]] -= reference_G[g]
            start = stop
        for c in range(channels):
            rows_RC[row, c] *= per_noise_C[c]
        row += 1
    at_X[FILLED] = row


@numba.njit(boundscheck=False)
def _is_peak(rows_RC, row, c, low, high, exclusion):  # type: ignore[no-untyped-def]
    """Whether nothing in reach is deeper; of equals, the earlier and then the first column is."""
    value = rows_RC[row, c]
    if rows_RC[row - 1, c] <= value or rows_RC[row + 1, c] < value:
        return False
    for r in range(row - exclusion, row + exclusion + 1):
        for k in range(low, high):
            other = rows_RC[r, k]
            if other < value:
                return False
            if other == value and (r < row or (r == row and k < c)):
                return False
    return True


@numba.njit(boundscheck=False)
def _within_burst(at_X, row, settings_X):  # type: ignore[no-untyped-def]
    """Count a peak against the most that a block of rows may have; blocks lie on a fixed grid."""
    block = (at_X[FIRST] + row) // settings_X[BLOCK_ROWS]
    if block > at_X[BLOCK]:
        at_X[BLOCK] = block
        at_X[IN_BLOCK] = 0
    if at_X[IN_BLOCK] >= settings_X[BURST]:
        at_X[OVER] += 1
        return False
    at_X[IN_BLOCK] += 1
    return True


@numba.njit(
    numba.void(
        numba.float32[:, ::1],  # rows_RC
        numba.int64[:, ::1],  # reach_C2
        numba.float32[::1],  # limits_X
        numba.int64[::1],  # settings_X
        numba.int64[::1],  # last_C
        numba.int64[:, ::1],  # pending_P2
        numba.int64[::1],  # at_X
    ),
    cache=True,
    nogil=True,
    boundscheck=False,
)
def find_peaks(rows_RC, reach_C2, limits_X, settings_X, last_C, pending_P2, at_X):  # type: ignore[no-untyped-def]
    """Append ``(sample, column)`` of each negative peak in the rows that can be judged by now.

    A peak is the deepest of its neighbourhood in space (``reach_C2``, a range of columns) and time
    (``EXCLUSION`` rows to both sides), at or beyond the threshold, and no other of its column lies
    less than ``REFRACTORY`` rows before.
    """
    channels = rows_RC.shape[1]
    threshold = -limits_X[THRESHOLD]
    exclusion = settings_X[EXCLUSION]
    row = at_X[ROW]
    while row + exclusion < at_X[FILLED]:
        crossing = np.int32(0)
        for c in range(channels):
            crossing += np.int32(rows_RC[row, c] <= threshold)
        if crossing:
            sample = at_X[FIRST] + row
            for c in range(channels):
                if rows_RC[row, c] > threshold or sample - last_C[c] < settings_X[REFRACTORY]:
                    continue
                if not _is_peak(rows_RC, row, c, reach_C2[c, 0], reach_C2[c, 1], exclusion):
                    continue
                if _within_burst(at_X, row, settings_X):
                    last_C[c] = sample
                    pending_P2[at_X[PENDING], 0] = sample
                    pending_P2[at_X[PENDING], 1] = c
                    at_X[PENDING] += 1
        row += 1
    at_X[ROW] = row
    at_X[SEEN] = row


@numba.njit(boundscheck=False, fastmath=True)
def _project(rows_RC, top, left, filter_WK):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for w in range(filter_WK.shape[0]):
        part = np.float32(0.0)
        for k in range(filter_WK.shape[1]):
            part += rows_RC[top + w, left + k] * filter_WK[w, k]
        total += part
    return total


@numba.njit(
    numba.void(
        numba.float32[:, ::1],  # rows_RC
        numba.int64[:, ::1],  # reach_C2
        numba.float32[::1],  # limits_X
        numba.int64[::1],  # settings_X
        numba.int64[::1],  # near_end_C
        numba.int64[::1],  # near_unit
        numba.float32[:, :, ::1],  # template_UWK
        numba.float32[:, :, ::1],  # filter_UWK
        numba.int64[::1],  # left_U
        numba.float32[::1],  # energy_U
        numba.float32[:, ::1],  # amplitude_U2
        numba.float32[::1],  # least_gain_U
        numba.int64[::1],  # shift_U
        numba.int64[::1],  # last_U
        numba.int64[:, ::1],  # tried_C2
        numba.int64[:, ::1],  # pending_P2
        numba.int64[::1],  # at_X
    ),
    cache=True,
    nogil=True,
    boundscheck=False,
)
def assign_peaks(  # type: ignore[no-untyped-def]
    rows_RC,
    reach_C2,
    limits_X,
    settings_X,
    near_end_C,
    near_unit,
    template_UWK,
    filter_UWK,
    left_U,
    energy_U,
    amplitude_U2,
    least_gain_U,
    shift_U,
    last_U,
    tried_C2,
    pending_P2,
    at_X,
):
    """Append ``(sample, unit)`` of each peak that a template explains, and take it away.

    Peaks are found as in :func:`find_peaks`. For each, every unit that is large there, at every lag
    up to ``LAG`` rows, has a gain: by how much its best amplitude lowers the squared distance in
    units of the noise, ``2 a p - a a e`` with ``p`` the samples on the unit's filter. The best unit
    is subtracted from the rows, and the search goes back ``EXCLUSION`` rows for what it had hidden,
    but never further than twice that behind the first row not seen: what lies before is settled.
    """
    channels = rows_RC.shape[1]
    threshold = -limits_X[THRESHOLD]
    exclusion, lags = settings_X[EXCLUSION], settings_X[LAG]
    wait = max(exclusion, template_UWK.shape[1] - settings_X[BEFORE] + lags)
    row = at_X[ROW]
    while row + wait < at_X[FILLED]:
        at_X[SEEN] = max(at_X[SEEN], row + 1)
        crossing = np.int32(0)
        for c in range(channels):
            crossing += np.int32(rows_RC[row, c] <= threshold)
        again = False
        sample = at_X[FIRST] + row
        for c in range(channels if crossing else 0):
            if rows_RC[row, c] > threshold:
                continue
            bits = np.int64(rows_RC[row, c] * np.float32(1024.0))
            if tried_C2[c, 0] == sample and tried_C2[c, 1] == bits:
                continue
            if not _is_peak(rows_RC, row, c, reach_C2[c, 0], reach_C2[c, 1], exclusion):
                continue
            if not _within_burst(at_X, row, settings_X):
                continue
            best, best_gain, best_lag = -1, np.float32(0.0), 0
            best_amplitude = np.float32(0.0)
            for i in range(near_end_C[c - 1] if c else 0, near_end_C[c]):
                u = near_unit[i]
                for lag in range(-lags, lags + 1):
                    if abs(sample + lag - last_U[u]) < settings_X[REFRACTORY]:
                        continue
                    p = _project(rows_RC, row + lag - settings_X[BEFORE], left_U[u], filter_UWK[u])
                    a = min(max(p / energy_U[u], amplitude_U2[u, 0]), amplitude_U2[u, 1])
                    gain = a * (np.float32(2.0) * p - a * energy_U[u])
                    if gain > best_gain and gain >= least_gain_U[u]:
                        best, best_gain, best_lag, best_amplitude = u, gain, lag, a
            if best < 0:
                if tried_C2[c, 0] != sample:
                    at_X[UNASSIGNED] += 1
                tried_C2[c, 0] = sample
                tried_C2[c, 1] = bits
                continue
            if tried_C2[c, 0] == sample:
                at_X[UNASSIGNED] -= 1
                tried_C2[c, 0] = -1
            top, left = row + best_lag - settings_X[BEFORE], left_U[best]
            for w in range(template_UWK.shape[1]):
                for k in range(template_UWK.shape[2]):
                    rows_RC[top + w, left + k] -= best_amplitude * template_UWK[best, w, k]
            last_U[best] = sample + best_lag
            pending_P2[at_X[PENDING], 0] = sample + best_lag - shift_U[best]
            pending_P2[at_X[PENDING], 1] = best
            at_X[PENDING] += 1
            again = True
        if again:
            row = max(row - exclusion, at_X[SEEN] - 1 - 2 * exclusion, 0)
        else:
            row += 1
    at_X[ROW] = row


@numba.njit(
    numba.int64(
        numba.int64[:, ::1],  # pending_P2
        numba.int64[::1],  # at_X
        numba.int64,  # complete
        numba.int64[::1],  # unit_of
        numba.int64[:, ::1],  # given_P2
    ),
    cache=True,
    nogil=True,
    boundscheck=False,
)
def settle(pending_P2, at_X, complete, unit_of, given_P2):  # type: ignore[no-untyped-def]
    """Move spikes before ``complete`` from pending to given, sorted by sample and unit.

    ``given_P2`` then holds SPIKE_DTYPE records seen as pairs. Returns how many. The spikes come
    nearly sorted, so that sorting by insertion is a walk.
    """
    given = kept = 0
    for i in range(at_X[PENDING]):
        sample, unit = pending_P2[i, 0], pending_P2[i, 1]
        if sample >= complete:
            pending_P2[kept, 0], pending_P2[kept, 1] = sample, unit
            kept += 1
            continue
        unit = unit_of[unit]
        j = given
        while j > 0 and (
            given_P2[j - 1, 0] > sample
            or (given_P2[j - 1, 0] == sample and given_P2[j - 1, 1] > unit)
        ):
            given_P2[j, 0], given_P2[j, 1] = given_P2[j - 1, 0], given_P2[j - 1, 1]
            j -= 1
        given_P2[j, 0], given_P2[j, 1] = sample, unit
        given += 1
    at_X[PENDING] = kept
    return given
