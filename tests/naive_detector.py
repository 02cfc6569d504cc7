"""The slow, obvious twin of the detector: numpy and scipy, whole arrays, one peak at a time."""

import numpy as np
from scipy.signal import butter, sosfilt

GRID = 1 / 16


def median_on_grid(values):
    """Lower median, rounded up to the grid."""
    return np.ceil(np.sort(values)[(len(values) + 1) // 2 - 1] / GRID) * GRID


def conditioned(samples_SC, rate, highpass_hz, group_C, noise_C):
    """Filtered, referenced and scaled samples, channels in the source's order."""
    sos = butter(3, highpass_hz, "highpass", fs=rate, output="sos")
    rows_SC = sosfilt(sos, samples_SC.astype(float) - samples_SC[0], axis=0)
    for group in np.unique(group_C):
        inside = group_C == group
        for row_C in rows_SC:
            row_C[inside] -= median_on_grid(row_C[inside])
    scale_C = np.divide(1, noise_C, where=noise_C > 0, out=np.zeros(len(noise_C)))
    return rows_SC * scale_C


def peaks(rows_SC, depth_C, shank_C, threshold, reach_um, exclusion, refractory, begin):
    """Negative peaks ``(sample, channel)``, given channels in the order of their places."""
    found, last = [], {}
    for s in range(begin, len(rows_SC) - exclusion):
        for c in np.flatnonzero(rows_SC[s] <= -threshold):
            near = (shank_C == shank_C[c]) & (np.abs(depth_C - depth_C[c]) <= reach_um)
            around = rows_SC[s - exclusion : s + exclusion + 1][:, near]
            if around.min() < rows_SC[s, c]:
                continue
            first = np.argwhere(around == rows_SC[s, c])[0]
            if first[0] != exclusion or np.flatnonzero(near)[first[1]] != c:
                continue
            if s - last.get(c, -(10**9)) >= refractory:
                last[c] = s
                found.append((s, int(c)))
    return found


def assigned(rows_SC, spec, arrays, reach, begin):
    """``(sample, unit)`` by the same rules as ``assign_peaks``, without burst limit."""
    rows_SC = rows_SC.astype(np.float64).copy()
    templates, filters = arrays["template_UWK"], arrays["filter_UWK"]
    width, span = templates.shape[1:]
    exclusion = spec.exclusion
    wait = max(exclusion, width - spec.before + spec.lag)
    energy = (templates.astype(float) * filters).sum(axis=(1, 2))
    depth_UK = -templates.min(axis=1)
    found, tried, last = [], {}, {}
    s, seen = begin, begin + 1 + 2 * exclusion
    while s + wait < len(rows_SC):
        seen, again = max(seen, s + 1), False
        for c in range(rows_SC.shape[1]):
            value = rows_SC[s, c]
            if value > -spec.threshold or tried.get((s, c)) == int(np.float32(value) * 1024):
                continue
            around = rows_SC[s - exclusion : s + exclusion + 1, reach[c][0] : reach[c][1]]
            first = np.argwhere(around == around.min())[0]
            if (first[0] - exclusion, first[1] + reach[c][0]) != (0, c):
                continue
            best = (0.0, None)
            for u in range(len(templates)):
                k = c - arrays["left_U"][u]
                if not 0 <= k < span or depth_UK[u, k] < 0.5 * depth_UK[u].max():
                    continue
                for lag in range(-spec.lag, spec.lag + 1):
                    if abs(s + lag - last.get(u, -(10**9))) < spec.refractory:
                        continue
                    top, left = s + lag - spec.before, arrays["left_U"][u]
                    piece = rows_SC[top : top + width, left : left + span]
                    p = (piece * filters[u]).sum()
                    a = np.clip(p / energy[u], *arrays["amplitude_U2"][u])
                    gain = a * (2 * p - a * energy[u])
                    if gain >= arrays["least_gain_U"][u] and gain > best[0]:
                        best = (gain, (u, lag, a, top, left))
            if best[1] is None:
                tried[s, c] = int(np.float32(value) * 1024)
                continue
            u, lag, a, top, left = best[1]
            rows_SC[top : top + width, left : left + span] -= a * templates[u]
            last[u] = s + lag
            found.append((int(s + lag - arrays["shift_U"][u]), u))
            again = True
        s = max(s - exclusion, seen - 1 - 2 * exclusion) if again else s + 1
    return sorted(found)
