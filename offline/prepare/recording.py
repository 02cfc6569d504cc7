"""Raw recordings through SpikeInterface: opened by what the folder looks like, read in pieces.

Shape suffixes: S samples, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rt_neds.errors import ConfigError

PIECE_S = 1.0
OPENED = ("recording", "sorting", "cached")
"""Names under which SpikeInterface, of whatever version, looks for a pickle in a folder."""


@dataclass(frozen=True)
class Raw:
    """One probe's raw int16 samples and what its file says of them.

    Attributes
    ----------
    recording : spikeinterface BaseRecording
    position_C2 : ndarray of float64
        Places of the channels in um: across, along.
    shank_C, group_C : ndarray of int64
        Shank, and which channels are sampled at the same moment (one group if not known).
    uv_per_bit : float
        0 where unknown.
    """

    recording: Any
    name: str
    rate: float
    samples: int
    channels: tuple[str, ...]
    position_C2: NDArray[np.float64]
    shank_C: NDArray[np.int64]
    group_C: NDArray[np.int64]
    uv_per_bit: float

    def read(self, first: int, end: int) -> NDArray[np.int16]:
        """Samples ``[first, end)``, C-contiguous, shape (S, C)."""
        return np.ascontiguousarray(self.recording.get_traces(start_frame=first, end_frame=end))

    def pieces(self, first: int, end: int) -> Iterator[tuple[int, NDArray[np.int16]]]:
        """The samples ``[first, end)`` in pieces of a second: number of the first, samples."""
        step = max(1, round(PIECE_S * self.rate))
        for at in range(first, end, step):
            yield at, self.read(at, min(at + step, end))


def open_recording(path: str | Path, stream: str | None = None) -> Raw:
    """Open what SpikeInterface can read: a SpikeGLX or Open Ephys folder, or a saved recording.

    Parameters
    ----------
    path : path
        The folder.
    stream : str, optional
        Name of the stream, such as ``imec0.ap``, where the folder has several.

    Raises
    ------
    ConfigError
        Nothing readable, several streams and none named, not int16, or no probe geometry.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"no such recording: {path}; check the path")
    if not path.is_dir():  # SpikeInterface would take a pickle
        raise ConfigError(f"{path} is a file; name the folder of the recording")
    refuse_pickles(path)
    return as_raw(_read(path, stream), str(path))


def refuse_pickles(path: Path) -> None:
    """Refuse a folder in which lies a pickle that SpikeInterface would open by itself.

    Raises
    ------
    ConfigError
    """
    found = [path / (name + end) for name in OPENED for end in (".pickle", ".pkl")]
    zarr = path / "recording" / ".zarray"
    if zarr.is_file() and '"pickle"' in zarr.read_text():
        found.append(zarr.parent)
    for one in filter(Path.exists, found):
        raise ConfigError(
            f"{one} is a pickle, which could run any code; take it out of the folder, and name the "
            "raw recording with --recording where it is needed"
        )


def as_raw(recording: Any, name: str) -> Raw:
    """Check a SpikeInterface recording and take from it what a detector needs.

    Raises
    ------
    ConfigError
        It is not int16, has several segments, or no probe geometry.
    """
    if recording.get_num_segments() != 1:
        raise ConfigError(
            f"{name} has {recording.get_num_segments()} segments; expected one: choose it with "
            "SpikeInterface (select_segments) and save it"
        )
    if np.dtype(recording.get_dtype()) != np.int16:
        raise ConfigError(
            f"{name} is {recording.get_dtype()}; expected the raw int16 samples that the "
            "acquisition delivers live: name the recording before any preprocessing"
        )
    try:
        position_C2 = np.asarray(recording.get_channel_locations(), np.float64)[:, -2:]
        shank_C = recording.get_probe().shank_ids if recording.has_probe() else None
    except Exception:
        raise ConfigError(
            f"{name} has no probe geometry; attach a probe with SpikeInterface and save it"
        ) from None
    channels = recording.get_num_channels()
    shifts = recording.get_property("inter_sample_shift")
    gains = recording.get_channel_gains()
    return Raw(
        recording=recording,
        name=name,
        rate=float(recording.get_sampling_frequency()),
        samples=int(recording.get_num_samples()),
        channels=tuple(str(channel) for channel in recording.channel_ids),
        position_C2=np.ascontiguousarray(position_C2),
        shank_C=_numbered(shank_C, channels),
        group_C=_numbered(None if shifts is None else np.round(shifts, 6), channels),
        uv_per_bit=0.0 if gains is None else float(np.median(gains)),
    )


def _numbered(labels: Any, channels: int) -> NDArray[np.int64]:
    if labels is None or len(labels) != channels:
        return np.zeros(channels, np.int64)
    return np.unique(np.asarray(labels), return_inverse=True)[1].astype(np.int64)


def raw_of(recording: Any, name: str) -> Raw:
    """The samples before all preprocessing that a SpikeInterface recording was made from.

    Raises
    ------
    ConfigError
        As :func:`as_raw`; or its frames are not those of the raw recording.
    """
    root = recording
    while root.get_parent() is not None:
        root = root.get_parent()
    if root.get_num_samples() != recording.get_num_samples():
        raise ConfigError(
            f"{name} is of {recording.get_num_samples()} samples, cut from a recording of "
            f"{root.get_num_samples()}; name the raw recording of the same samples with --recording"
        )
    return as_raw(root, name)


def _read(path: Path, stream: str | None) -> Any:
    import spikeinterface as si
    from spikeinterface.extractors import get_neo_streams, read_openephys, read_spikeglx

    kinds = {
        "*.ap.bin": ("spikeglx", read_spikeglx),
        "*.oebin": ("openephysbinary", read_openephys),
    }
    try:
        for pattern, (kind, read) in kinds.items():
            if path.is_dir() and next(path.rglob(pattern), None):
                names, _ = get_neo_streams(kind, path)
                return read(path, stream_name=_choose(path, stream, list(names)))
        return si.load(path)
    except ConfigError:
        raise
    except Exception as error:  # neo and spikeinterface raise whatever they meet
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{path} cannot be read ({reason}); expected a SpikeGLX or Open Ephys folder, or a "
            "recording that SpikeInterface saved"
        ) from None


def _choose(path: Path, stream: str | None, names: list[str]) -> str:
    """The named stream, or the only one that may hold spikes."""
    if stream is not None and stream not in names:
        raise ConfigError(f"no stream {stream} in {path}; there are {', '.join(names)}")
    may = [name for name in names if not name.upper().endswith(("SYNC", "LF", "LFP", "NIDQ"))]
    if stream is None and len(may) != 1:
        raise ConfigError(
            f"{path} has the streams {', '.join(names)}; name the probe's with --stream"
        )
    return stream or may[0]
