"""Spikes from raw samples: causal, on one core, the same however the samples are cut.

Samples are filtered, freed of what all channels share, and scaled to the noise; what is deep and
the deepest of its neighbourhood is a peak; with templates, a peak becomes a spike of the unit that
explains it best. See ``detector_kernel`` for how, and ``docs/detection.md`` for how well.

Shape suffixes: S samples, C channels, R rows of the buffer, P spikes pending, U units.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rt_neds.detector_folder import Arrays, DetectorSpec, load_folder, save_folder
from rt_neds.errors import DetectorError
from rt_neds.frames import SPIKE_DTYPE
from rt_neds.stream.detector_kernel import (
    BLOCK,
    FILLED,
    FIRST,
    IN_BLOCK,
    OVER,
    PENDING,
    ROW,
    SEEN,
    SLOTS,
    UNASSIGNED,
    assign_peaks,
    condition,
    find_peaks,
    settle,
)

ROWS = 768
"""Rows of the buffer: it stays in a core's cache, and what is kept is moved rarely."""
BLOCK_MS = 1
"""The most peaks that are taken are counted over so many milliseconds, on a fixed grid."""
SETTLE_MS = 3
"""After a reset nothing is found for so long: filters settle, and templates need a past."""
COUNTERS = ("samples", "spikes", "unassigned", "over_burst", "discarded", "resets")


def places(position_C2: NDArray[np.float64], shank_C: NDArray[np.int64]) -> NDArray[np.int64]:
    """Channels in the order of their place on the probe: by shank, then depth, then side."""
    return np.lexsort((position_C2[:, 0], position_C2[:, 1], shank_C)).astype(np.int64)


class Conditioner:
    """Filter, reference and scaling of samples, continued from call to call.

    Parameters
    ----------
    spec : DetectorSpec
    arrays : dict
        ``position_C2``, ``shank_C``, ``group_C``, ``noise_C`` of the detector.
    """

    def __init__(self, spec: DetectorSpec, arrays: Arrays) -> None:
        from scipy.signal import butter

        self.column_C = places(arrays["position_C2"], arrays["shank_C"])
        channels = len(self.column_C)
        self._sos_26 = butter(3, spec.highpass_hz, "highpass", fs=spec.rate, output="sos").astype(
            np.float32
        )
        noise_C = arrays["noise_C"][self.column_C]
        self._per_noise_C = np.zeros(channels, np.float32)
        self._per_noise_C[noise_C > 0] = 1 / noise_C[noise_C > 0]
        group_C = arrays["group_C"][self.column_C]
        self._member_C = np.argsort(group_C, kind="stable").astype(np.int64)
        self._group_end_G = np.cumsum(np.unique(group_C, return_counts=True)[1]).astype(np.int64)
        self._state_4C = np.zeros((4, channels), np.float32)
        self._base_C = np.zeros(channels, np.float32)
        self._reference_G = np.zeros(len(self._group_end_G), np.float32)
        self._scratch_C = np.zeros(channels, np.float32)
        self._fresh = True

    def reset(self) -> None:
        """Forget; the next samples follow on nothing."""
        self._fresh = True

    def fill(
        self,
        samples_SC: NDArray[np.int16],
        begin: int,
        end: int,
        rows_RC: NDArray[np.float32],
        at_X: NDArray[np.int64],
    ) -> None:
        """Condition samples ``[begin, end)`` into the rows from ``at_X[FILLED]`` on."""
        if self._fresh:
            self._base_C[:] = samples_SC[begin, self.column_C]
            self._state_4C[:] = 0
            self._reference_G[:] = 0
            self._fresh = False
        condition(
            samples_SC,
            begin,
            end,
            self.column_C,
            self._base_C,
            self._sos_26,
            self._state_4C,
            self._group_end_G,
            self._member_C,
            self._reference_G,
            self._per_noise_C,
            self._scratch_C,
            rows_RC,
            at_X,
        )

    def rows(self, samples_SC: NDArray[np.int16]) -> NDArray[np.float32]:
        """Conditioned samples in a new array, shape (S, C), columns in the order of places."""
        rows_SC = np.empty(samples_SC.shape, np.float32)
        if len(samples_SC):
            self.fill(samples_SC, 0, len(samples_SC), rows_SC, np.zeros(SLOTS, np.int64))
        return rows_SC


class Detector:
    """Finds the spikes of one probe.

    Parameters
    ----------
    spec : DetectorSpec
    arrays : dict
        As :func:`rt_neds.detector_folder.check` wants them.

    Attributes
    ----------
    units : tuple of str
        Ids in the order of the ``unit`` field of the spikes.
    channels : int
        What a source must deliver; without SpikeGLX's status channel.
    rate : float
        Samples per second.
    settle : int
        After a reset nothing is found in so many samples.
    lookahead : int
        At most so many samples lie between the newest sample and ``complete``.
    counters : dict of str to int
        ``samples`` and ``spikes`` seen and given, ``unassigned`` peaks that no template explains,
        ``over_burst`` peaks left out because a millisecond had more than a quarter as many as the
        probe has channels, ``discarded`` spikes not yet given when it was reset, ``resets``.
    """

    def __init__(self, spec: DetectorSpec, arrays: Arrays) -> None:
        self.spec = spec
        self.units = tuple(spec.units)
        self.channels = len(arrays["noise_C"])
        self.rate = spec.rate
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._arrays = arrays
        self._front = Conditioner(spec, arrays)
        column_C = self._front.column_C
        self._unit_of = np.arange(len(self.units)) if spec.templates else column_C
        self._reach_C2 = _reach(arrays, column_C, spec.reach_um)
        block_rows = max(1, round(spec.rate * BLOCK_MS / 1000))
        burst = max(16, self.channels // 4)
        self._limits_X = np.array([spec.threshold, 0], np.float32)
        self._settings_X = np.array(
            [spec.exclusion, spec.refractory, spec.lag, spec.before, burst, block_rows], np.int64
        )
        self._width = arrays["template_UWK"].shape[1] if spec.templates else 0
        after = max(spec.exclusion, self._width - spec.before + spec.lag) + 1
        moved = spec.lag + int(np.abs(arrays["shift_U"]).max()) if spec.templates else 0
        # How far behind the next row a spike may still be found, and what must be kept for that.
        self._behind = 2 * spec.exclusion + moved if spec.templates else 0
        self._kept = 3 * spec.exclusion + spec.before + spec.lag + 2
        self.settle = max(round(spec.rate * SETTLE_MS / 1000), self._kept + moved)
        self.lookahead = after - 1 + self._behind
        self._rows_RC = np.zeros((ROWS + self._kept + after, self.channels), np.float32)
        most = burst * 2 * (len(self._rows_RC) // block_rows + 4)
        self._pending_P2 = np.zeros((most, 2), np.int64)
        self._given_P2 = np.zeros((most, 2), np.int64)
        self._at_X = np.zeros(SLOTS, np.int64)
        self._last_U = np.zeros(len(self.units), np.int64)
        self._tried_C2 = np.zeros((self.channels, 2), np.int64)
        if spec.templates:
            self._near_end_C, self._near_unit = _near(arrays, spec.before)
            self._energy_U = np.einsum(
                "uwk,uwk->u", arrays["template_UWK"], arrays["filter_UWK"]
            ).astype(np.float32)
        self._begin(0)

    def reset(self, first: int) -> None:
        """Forget everything; the next sample has this number. What was not yet given is dropped."""
        self.counters["discarded"] += int(self._at_X[PENDING])
        self.counters["resets"] += 1
        self._begin(first)

    def detect(self, samples_SC: NDArray[np.int16], first: int) -> tuple[NDArray[np.void], int]:
        """Take in samples and return the spikes that are certain by now.

        Parameters
        ----------
        samples_SC : ndarray of int16, shape (samples, channels)
            C-contiguous, as they came, any number of them.
        first : int
            Number of the first; they must follow on the last, or on a reset.

        Returns
        -------
        spikes : ndarray of SPIKE_DTYPE
            Sorted by sample, then unit. All lie before ``complete``, none before the last one.
        complete : int
            Every spike before this sample has been given.

        Raises
        ------
        DetectorError
            Samples of another kind, number of channels or place in time.
        """
        if samples_SC.dtype != np.int16 or samples_SC.shape[1:] != (self.channels,):
            raise DetectorError(
                f"samples are {samples_SC.dtype} of shape {samples_SC.shape}; this detector takes "
                f"int16 of (samples, {self.channels}): use the channels it was made from"
            )
        if not samples_SC.flags.c_contiguous:
            raise DetectorError("samples are not C-contiguous; give one row per sample")
        if first != self._next:
            raise DetectorError(
                f"samples from {first} on, expected {self._next}; reset the detector over a gap"
            )
        self._next += len(samples_SC)
        self.counters["samples"] += len(samples_SC)
        at, given = 0, []
        while at < len(samples_SC):
            room = len(self._rows_RC) - int(self._at_X[FILLED])
            if room == 0:
                self._make_room()
                continue
            end = min(at + room, len(samples_SC))
            self._front.fill(samples_SC, at, end, self._rows_RC, self._at_X)
            self._seek()
            given.append(self._settled())
            at = end
        self.counters["unassigned"] += int(self._at_X[UNASSIGNED])
        self.counters["over_burst"] += int(self._at_X[OVER])
        self._at_X[UNASSIGNED] = self._at_X[OVER] = 0
        if len(given) == 1:
            return given[0], self._complete
        return np.concatenate(given) if given else np.empty(0, SPIKE_DTYPE), self._complete

    def check_source(
        self,
        rate: float,
        position_C2: NDArray[np.float64] | None = None,
        uv_per_bit: float | None = None,
    ) -> None:
        """Refuse a source that this detector was not made for.

        Parameters
        ----------
        rate : float
            Samples per second; may differ by 0.1 %, as calibrated rates do.
        position_C2 : ndarray, shape (channels, 2), optional
            Places of the channels in um; only distances between channels are compared.
        uv_per_bit : float, optional

        Raises
        ------
        DetectorError
            It names what differs.
        """
        if abs(rate - self.rate) > 1e-3 * self.rate:
            raise DetectorError(
                f"the source has {rate:g} samples/s and the detector {self.rate:g}; "
                "make it from a recording of this probe"
            )
        mine = self.spec.uv_per_bit
        if uv_per_bit and mine and abs(uv_per_bit - mine) > 1e-3 * mine:
            raise DetectorError(
                f"the source has {uv_per_bit:g} uV per bit and the detector {mine:g}; "
                "set the gain it was made with or make it again"
            )
        if position_C2 is None:
            return
        if len(position_C2) != self.channels:
            raise DetectorError(
                f"the source has {len(position_C2)} channels and the detector {self.channels}; "
                "make it from a recording of the same channels"
            )
        theirs_C2 = np.asarray(position_C2, np.float64) - position_C2[0]
        mine_C2 = self._arrays["position_C2"] - self._arrays["position_C2"][0]
        wrong = np.flatnonzero(np.abs(theirs_C2 - mine_C2).max(axis=1) > 1.0)
        if len(wrong):
            c = int(wrong[0])
            raise DetectorError(
                f"channel {c} lies at {tuple(theirs_C2[c])} um from channel 0 and in the detector "
                f"at {tuple(mine_C2[c])}; make it from a recording with the same channel map"
            )

    # -- inside ----------------------------------------------------------------------------------

    def _begin(self, first: int) -> None:
        self._front.reset()
        self._at_X[:] = 0
        self._at_X[FIRST] = first
        self._at_X[ROW] = self.settle
        # No search goes back to before the first row that may hold a spike.
        self._at_X[SEEN] = self.settle + 1 + 2 * self.spec.exclusion
        self._at_X[BLOCK] = -1
        self._at_X[IN_BLOCK] = 0
        self._last_U[:] = first - self.spec.refractory - self.settle
        self._tried_C2[:] = -1
        self._next = self._complete = first

    def _make_room(self) -> None:
        """Move what is still needed to the front of the buffer."""
        at_X, rows_RC = self._at_X, self._rows_RC
        keep = min(int(at_X[ROW]) - self._kept, int(at_X[FILLED]))
        filled = int(at_X[FILLED])
        rows_RC[: filled - keep] = rows_RC[keep:filled]
        at_X[ROW] -= keep
        at_X[SEEN] -= keep
        at_X[FILLED] -= keep
        at_X[FIRST] += keep

    def _seek(self) -> None:
        if not self.spec.templates:
            find_peaks(
                self._rows_RC,
                self._reach_C2,
                self._limits_X,
                self._settings_X,
                self._last_U,
                self._pending_P2,
                self._at_X,
            )
            return
        arrays = self._arrays
        assign_peaks(
            self._rows_RC,
            self._reach_C2,
            self._limits_X,
            self._settings_X,
            self._near_end_C,
            self._near_unit,
            arrays["template_UWK"],
            arrays["filter_UWK"],
            arrays["left_U"],
            self._energy_U,
            arrays["amplitude_U2"],
            arrays["least_gain_U"],
            arrays["shift_U"],
            self._last_U,
            self._tried_C2,
            self._pending_P2,
            self._at_X,
        )

    def _settled(self) -> NDArray[np.void]:
        """Take from the pending spikes those that no later one can come before."""
        at_X = self._at_X
        behind = int(at_X[FIRST] + at_X[ROW]) - self._behind
        self._complete = max(self._complete, min(behind, self._next))
        given = settle(self._pending_P2, at_X, self._complete, self._unit_of, self._given_P2)
        self.counters["spikes"] += given
        return self._given_P2[:given].copy().view(SPIKE_DTYPE).reshape(given)


def _reach(arrays: Arrays, column_C: NDArray[np.int64], reach_um: float) -> NDArray[np.int64]:
    """First and end column of the neighbourhood of each column: along its shank, both sides."""
    depth_C = arrays["position_C2"][column_C, 1]
    shank_C = arrays["shank_C"][column_C]
    reach_C2 = np.empty((len(column_C), 2), np.int64)
    for c in range(len(column_C)):
        near = np.flatnonzero(
            (shank_C == shank_C[c]) & (np.abs(depth_C - depth_C[c]) <= reach_um + 1e-6)
        )
        reach_C2[c] = near[0], near[-1] + 1
    return reach_C2


SEED = 0.5
"""A peak may be a unit's where its template is at least this share of its deepest."""


def _near(arrays: Arrays, before: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Units that may cause a peak on each column: where theirs end, and the units."""
    template_UWK, left_U = arrays["template_UWK"], arrays["left_U"]
    channels = len(arrays["noise_C"])
    depth_UK = -template_UWK.min(axis=1)
    large_UK = depth_UK >= SEED * depth_UK.max(axis=1, keepdims=True)
    of_column: list[list[int]] = [[] for _ in range(channels)]
    for unit, k in zip(*np.nonzero(large_UK), strict=True):
        of_column[int(left_U[unit] + k)].append(int(unit))
    ends = np.cumsum([len(units) for units in of_column]).astype(np.int64)
    return ends, np.array([unit for units in of_column for unit in units], np.int64)


def load_detector(folder: str | Path) -> Detector:
    """Read a detector that :func:`save_detector` or ``rt-neds detector`` wrote.

    Raises
    ------
    DetectorError
        Not a detector, of another format, or damaged.
    """
    return Detector(*load_folder(folder))


def save_detector(folder: str | Path, detector: Detector) -> None:
    """Write a detector as JSON and safetensors, without pickle."""
    save_folder(folder, detector.spec, detector._arrays)
