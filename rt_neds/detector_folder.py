"""What a detector is on disk: a folder with ``detector.json`` and ``detector.safetensors``.

No pickle. The JSON says for which probe, rate and scale it was made and how spikes are found; the
arrays hold the probe's geometry, the noise and, where spikes are assigned to units, templates.

Shape suffixes: C channels (the source's order), U units, W samples and K channels of a template.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rt_neds import __version__
from rt_neds.errors import DetectorError

FORMAT = 1
JSON_NAME = "detector.json"
ARRAYS_NAME = "detector.safetensors"
MAKE = "make one with rt-neds detector"

Arrays = dict[str, NDArray[Any]]


class DetectorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """``detector.json``, typed. Times are in samples.

    Attributes
    ----------
    rate : float
        Samples per second.
    units : list of str
        Ids in the order of unit numbers: channels, or the units of a sorting.
    templates : bool
        Whether peaks are assigned to templates; otherwise each channel is a unit.
    uv_per_bit : float
        Scale of the samples that it was made from; 0 where unknown.
    highpass_hz : float
        Corner of the causal third-order Butterworth filter.
    threshold : float
        Depth of a peak in multiples of its channel's noise.
    reach_um : float
        Peaks of one shank that lie no further apart than this along it are one peak.
    exclusion : int
        ... if also no further apart in time than this.
    refractory : int
        Least distance of two spikes of one unit.
    lag : int
        Most by which a template is moved to fit.
    before : int
        Samples of a template before its deepest point.
    made : dict
        From what it was made, and how; for people.
    """

    format: int
    version: str
    sha256: str
    rate: float
    units: list[str]
    templates: bool
    uv_per_bit: float
    probe: str
    highpass_hz: float
    threshold: float
    reach_um: float
    exclusion: int
    refractory: int
    lag: int
    before: int
    made: dict[str, Any]


SHAPES = {
    "position_C2": ("C", 2),
    "shank_C": ("C",),
    "group_C": ("C",),
    "noise_C": ("C",),
}
SHAPES_OF_TEMPLATES = {
    "template_UWK": ("U", "W", "K"),
    "filter_UWK": ("U", "W", "K"),
    "left_U": ("U",),
    "amplitude_U2": ("U", 2),
    "least_gain_U": ("U",),
    "shift_U": ("U",),
}
DTYPES = {
    "position_C2": np.float64,
    "shank_C": np.int64,
    "group_C": np.int64,
    "left_U": np.int64,
    "shift_U": np.int64,
}
"""float32 where not listed."""


def make_spec(arrays: Arrays, **fields: Any) -> DetectorSpec:
    """A spec of this version, for arrays not yet on disk.

    Raises
    ------
    DetectorError
        The arrays do not fit each other or the fields.
    """
    spec = DetectorSpec(format=FORMAT, version=__version__, sha256="", **fields)
    check(spec, arrays, "these arrays")
    return spec


def save_folder(folder: str | Path, spec: DetectorSpec, arrays: Arrays) -> DetectorSpec:
    """Write a detector; a half-written one never has a readable ``detector.json``.

    Returns
    -------
    DetectorSpec
        As it is on disk.
    """
    folder = Path(folder)
    check(spec, arrays, "these arrays")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON_NAME).unlink(missing_ok=True)
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()},
            folder / ARRAYS_NAME,
        )
        spec = msgspec.structs.replace(spec, sha256=_sha256(folder / ARRAYS_NAME))
        (folder / JSON_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(spec), indent=1))
    except OSError as error:
        raise DetectorError(f"cannot write {folder} ({error.strerror}); name another") from None
    return spec


def load_folder(folder: str | Path) -> tuple[DetectorSpec, Arrays]:
    """Read a detector and check that its two files belong together.

    Raises
    ------
    DetectorError
        No such folder, not a detector, another format, damaged, or arrays of the wrong shape.
    """
    folder = Path(folder)
    path = folder / JSON_NAME
    if not path.is_file():
        raise DetectorError(f"{folder} is not a detector (no {JSON_NAME}); {MAKE}")
    try:
        spec = msgspec.json.decode(path.read_bytes(), type=DetectorSpec)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DetectorError(f"{path} cannot be read ({error}); {MAKE}") from None
    if spec.format != FORMAT:
        raise DetectorError(
            f"{folder} is of detector format {spec.format}; this rt-neds reads {FORMAT}: {MAKE}"
        )
    arrays_path = folder / ARRAYS_NAME
    if not arrays_path.is_file() or _sha256(arrays_path) != spec.sha256:
        raise DetectorError(
            f"{arrays_path} is missing or damaged (SHA-256 differs); copy the detector again"
        )
    try:
        arrays = load_file(arrays_path)
    except (SafetensorError, OSError) as error:
        raise DetectorError(f"{arrays_path} cannot be read ({error}); copy it again") from None
    check(spec, arrays, str(folder))
    return spec, arrays


def check(spec: DetectorSpec, arrays: Arrays, where: str) -> None:
    """Refuse arrays that are missing, of the wrong kind or shape, or absurd; the first is named."""
    sizes = {"U": len(spec.units), "C": len(arrays.get("noise_C", ()))}
    shapes = SHAPES | (SHAPES_OF_TEMPLATES if spec.templates else {})
    for name, shape in shapes.items():
        came = arrays[name].shape if name in arrays else "nothing"
        wants = tuple(sizes.get(str(size), size) for size in shape)
        if name in arrays and len(came) == len(wants):
            wants = tuple(c if w in ("W", "K") else w for c, w in zip(came, wants, strict=True))
        if came != wants or arrays[name].dtype != DTYPES.get(name, np.float32):
            raise DetectorError(
                f"{where}: {name} is {came} of {getattr(arrays.get(name), 'dtype', 'nothing')}; "
                f"expected {wants} of {np.dtype(DTYPES.get(name, np.float32))}: {MAKE}"
            )
        if not np.isfinite(arrays[name]).all():
            raise DetectorError(f"{where}: {name} is not finite everywhere; {MAKE}")
    problem = _problem(spec, arrays, sizes["C"])
    if problem:
        raise DetectorError(f"{where}: {problem}; {MAKE}")


def _problem(spec: DetectorSpec, arrays: Arrays, channels: int) -> str:
    """What a kernel without bounds checks must not be given; empty if there is nothing."""
    if not 0 < channels <= 20_000 or not spec.units:
        return f"{channels} channels and {len(spec.units)} units"
    if not spec.templates and len(spec.units) != channels:
        return f"{len(spec.units)} units of {channels} channels, and no templates"
    if not 1000 <= spec.rate <= 200_000 or not 0 < spec.highpass_hz < spec.rate / 4:
        return f"a rate of {spec.rate} Hz and a high-pass of {spec.highpass_hz} Hz"
    if not 2 <= spec.threshold <= 100:
        return f"a threshold of {spec.threshold} times the noise; expected 2 to 100"
    if (arrays["noise_C"] < 0).any():
        return "a negative noise"
    times = (spec.exclusion, spec.refractory, spec.lag, spec.before)
    if not all(0 <= time <= 200 for time in times) or spec.refractory < 2 * spec.exclusion + 1:
        return f"exclusion, refractory, lag, before of {times} samples"
    if not spec.templates:
        return ""
    _, width, span = arrays["template_UWK"].shape
    if arrays["filter_UWK"].shape != arrays["template_UWK"].shape:
        return "filters and templates of different shapes"
    left_U, shift_U = arrays["left_U"], arrays["shift_U"]
    if not spec.before < width <= 200 or left_U.min() < 0 or left_U.max() + span > channels:
        return "a template that reaches outside its window or probe"
    if np.abs(shift_U).max() > spec.before:
        return f"a unit that is moved by more than {spec.before} samples"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
