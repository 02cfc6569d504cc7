"""Samples for the SpikeGLX emulator: SpikeGLX's own, or made up from a session's spikes.

Shape suffixes: S samples, C channels (AP, then LF, then the status word), W samples of a waveform.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rt_neds.errors import SessionError
from rt_neds.session import Session
from rt_neds.spikeglx_wire import MISSED

SYNC = 1 << 6
BEFORE_PEAK, AFTER_PEAK = 12, 36
NOISE_UV = 10.0
NOISE_SAMPLES = 30_011  # the noise repeats after a second and a bit: a prime, to fit no bin
REACH_UM, PITCH_UM = 25.0, 20.0
AP_CHANNELS = 384
NP2 = (21, 24)
"""Types whose gain is fixed, to 80 where the file does not say; later ones count from 2000."""
_MAPS = ("snsShankMap", "snsGeomMap")


class Failure(Exception):
    """A command that the emulator answers with ``ERROR``."""


class ProbeFacts(NamedTuple):
    """What a probe is, as SpikeGLX tells it.

    Attributes
    ----------
    ap, lf, status : int
        Channels, in this order.
    rate : float
        Samples per second.
    max_int : int
    volts : float
        What ``max_int`` counts are at the amplifier's output.
    gains : tuple of float
        Of each AP channel.
    lf_gain : float
    serial, part : str
    type : int
    sites_C : ndarray, shape (ap, 3)
        Shank, x and z in micrometres.
    """

    ap: int
    lf: int
    status: int
    rate: float
    max_int: int
    volts: float
    gains: tuple[float, ...]
    lf_gain: float
    serial: str
    part: str
    type: int
    sites_C: NDArray[np.float64]

    @property
    def channels(self) -> int:
        """All of them."""
        return self.ap + self.lf + self.status


class Recording(Protocol):
    """Samples ``[0, end)`` of a probe, at random."""

    name: str
    probe: ProbeFacts
    end: int

    def samples(self, first: int, end: int) -> NDArray[np.int16]:
        """All channels of the samples ``[first, end)``, shape (samples, channels)."""


class RawRecording:
    """An AP file of SpikeGLX (``.bin``), with the ``.meta`` file beside it.

    Raises
    ------
    SessionError
        No such files, or files that do not fit each other.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        meta_path = path.with_suffix(".meta")
        for file in (path, meta_path):
            if not file.is_file():
                raise SessionError(
                    f"no file {file}; an AP recording of SpikeGLX (.bin) with its .meta beside it "
                    "was expected"
                )
        meta = read_meta(meta_path)
        try:
            self.probe = _probe_of(meta)
        except (KeyError, ValueError, IndexError) as error:
            raise SessionError(
                f"{meta_path} lacks or garbles {error}; the .meta of an imec AP file was expected"
            ) from None
        frame = 2 * self.probe.channels
        size = path.stat().st_size
        if size < frame or size % frame:
            raise SessionError(
                f"{path} has {size} bytes, which are no samples of {self.probe.channels} channels "
                "as its .meta has them; copy both files again"
            )
        self.name = path.name.partition(".")[0]
        self._samples_SC = np.memmap(path, "<i2", "r").reshape(-1, self.probe.channels)
        self.end = len(self._samples_SC)

    def samples(self, first: int, end: int) -> NDArray[np.int16]:
        """All channels of the samples ``[first, end)``."""
        return self._samples_SC[first:end]


class SynthesisedRecording:
    """What a probe would have recorded of a session's spikes.

    Each unit has a place on the probe and a waveform of its own; under it lies noise. Samples are a
    function of session and seed alone. What the session did not record is zeros, marked as missed.

    Parameters
    ----------
    session : Session
    seed : int
    ap, lf : int
        Channels of the probe; ``lf`` of them carry a slow oscillation.

    Attributes
    ----------
    peaks_N : ndarray of int
        AP channel on which each unit is largest.
    """

    def __init__(
        self, session: Session, *, seed: int = 0, ap: int = AP_CHANNELS, lf: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.name, self.end = session.id.replace("/", "_").replace(" ", "_"), session.end
        channel = np.arange(ap)
        sites_C = np.stack([np.zeros(ap), 27.0 + 32 * (channel % 2), PITCH_UM * (channel // 2)], 1)
        self.probe = ProbeFacts(
            ap, lf, 1, session.rate, 512, 0.6, (500.0,) * ap, 250.0, "0", "NP1010", 0, sites_C
        )
        self._session = session
        self._samples_S = np.ascontiguousarray(session.records_S["sample"])
        self._units_S = session.records_S["unit"]
        uv = 1e6 * 0.6 / 512 / 500
        self._noise_SC = np.rint(
            rng.standard_normal((NOISE_SAMPLES, ap), np.float32) * (NOISE_UV / uv)
        ).astype(np.int16)
        units = len(session.unit_ids)
        self.peaks_N = rng.permutation((np.arange(units) + 0.5) * ap / units).astype(int)
        self._waveforms = [self._waveform(rng, uv, peak) for peak in self.peaks_N.tolist()]

    def samples(self, first: int, end: int) -> NDArray[np.int16]:
        """All channels of the samples ``[first, end)``."""
        probe = self.probe
        out_SC = np.zeros((end - first, probe.channels), np.int16)
        sample_S = np.arange(first, end)
        ap_SC = out_SC[:, : probe.ap]
        np.take(self._noise_SC, sample_S, axis=0, mode="wrap", out=ap_SC)
        self._add_spikes(ap_SC, first, end)
        if probe.lf:
            slow_S = 100 * np.sin(2 * np.pi * 8 * sample_S / probe.rate)
            out_SC[:, probe.ap : -1] = slow_S[:, None]
        status_S = out_SC[:, -1]
        status_S[:] = SYNC * (sample_S // round(probe.rate / 2) % 2)
        self._blank(out_SC, first, end)
        return out_SC

    def _add_spikes(self, ap_SC: NDArray[np.int16], first: int, end: int) -> None:
        low, high = np.searchsorted(self._samples_S, (first - AFTER_PEAK, end + BEFORE_PEAK))
        for sample, unit in zip(
            self._samples_S[low:high].tolist(), self._units_S[low:high].tolist(), strict=True
        ):
            channel, waveform_WC = self._waveforms[unit]
            at = sample - BEFORE_PEAK - first
            start, stop = max(0, at), min(end - first, at + len(waveform_WC))
            width = waveform_WC.shape[1]
            ap_SC[start:stop, channel : channel + width] += waveform_WC[start - at : stop - at]
        if high > low:
            limit = self.probe.max_int - 1
            np.clip(ap_SC, -limit, limit, out=ap_SC)

    def _blank(self, out_SC: NDArray[np.int16], first: int, end: int) -> None:
        """Mark as missed what lies outside the session's domain."""
        done = first
        for low, high in [*self._session.domain_K2.tolist(), (end, end)]:
            if low > done:
                gap_SC = out_SC[done - first : min(low, end) - first]
                gap_SC[:, :-1] = 0
                gap_SC[:, -1] |= MISSED
            done = max(done, high)
            if done >= end:
                return

    def _waveform(
        self, rng: np.random.Generator, uv: float, peak: int
    ) -> tuple[int, NDArray[np.int16]]:
        """First channel and counts: a trough and its slow rebound, fading with the distance."""
        t = (np.arange(BEFORE_PEAK + AFTER_PEAK) - BEFORE_PEAK) / 30.0  # ms
        width, amplitude = rng.uniform(0.7, 1.5), rng.uniform(70, 250)
        shape_W = -np.exp(-((t / (0.1 * width)) ** 2)) + 0.35 * np.exp(
            -(((t - 0.45 * width) / (0.2 * width)) ** 2)
        )
        away_C = np.hypot(*(self.probe.sites_C[:, 1:] - self.probe.sites_C[peak, 1:]).T)
        fading_C = np.exp(-0.5 * (away_C / REACH_UM) ** 2)
        near = np.flatnonzero(fading_C > 0.05)
        low, high = int(near[0]), int(near[-1]) + 1
        counts_WC = amplitude / uv * shape_W[:, None] * fading_C[None, low:high]
        return low, np.rint(counts_WC).astype(np.int16)


# -- .meta ---------------------------------------------------------------------------------------


def read_meta(path: Path) -> dict[str, str]:
    """Lines ``key=value`` of a .meta file; the ``~`` before long values is left out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip().lstrip("~"): value.strip() for key, _, value in pairs}


def _probe_of(meta: dict[str, str]) -> ProbeFacts:
    ap, lf, status = (int(count) for count in meta["snsApLfSy"].split(","))
    if ap < 1 or status < 1 or ap + lf + status != int(meta["nSavedChans"]):
        raise ValueError(f"snsApLfSy={meta['snsApLfSy']}")
    kind = int(meta.get("imDatPrb_type", 0))
    rows = [row.split() for row in re.findall(r"\(([^(),]*)\)", meta["imroTbl"])]
    saved = _saved(meta, ap)
    fixed = float(meta.get("imChan0apGain", 80)) if kind in NP2 or kind >= 2000 else 0.0
    return ProbeFacts(
        ap,
        lf,
        status,
        float(meta["imSampRate"]),
        int(meta.get("imMaxInt", 512)),
        float(meta["imAiRangeMax"]),
        tuple(fixed or float(rows[channel][3]) for channel in saved),
        fixed or float(rows[0][4]),
        meta.get("imDatPrb_sn", meta.get("imProbeSN", "0")),
        meta.get("imDatPrb_pn", ""),
        kind,
        _sites(meta, saved, 15.0 if fixed else PITCH_UM),
    )


def _saved(meta: dict[str, str], ap: int) -> list[int]:
    """Which of the acquired AP channels the file has."""
    words = meta.get("snsSaveChanSubset", "all")
    if words == "all":
        return list(range(ap))
    saved: list[int] = []
    for word in words.split(","):
        low, _, high = word.partition(":")
        saved += range(int(low), int(high or low) + 1)
    if len(saved) < ap:
        raise ValueError(f"snsSaveChanSubset={words}")
    return saved[:ap]


def _sites(meta: dict[str, str], saved: list[int], pitch_um: float) -> NDArray[np.float64]:
    """Shank, x and z: from the map of geometry, or, in files from before 2023, of shanks."""
    exact = "snsGeomMap" in meta
    found = re.findall(r"\(([^():]*):([^():]*):([^():]*):[01]\)", meta[_MAPS[exact]])
    sites = np.array(found, dtype=np.float64).reshape(-1, 3)
    if not exact:
        sites *= (1.0, 32.0, pitch_um)  # columns and rows
    # The maps list what was saved, in the versions that can save less than all.
    if len(sites) == len(saved):
        return sites
    return sites[saved]
