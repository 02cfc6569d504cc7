"""Sessions on the grid of bins, kept on disk: training reads the few windows it needs of them.

A folder per session holds plain ``.npy`` arrays and one JSON. Its name is made of the session file
(where it lies, its size, when it was written) and of what the configuration says about bins and
behaviours, so that a changed one is made anew and never mistaken.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from offline.batches import Subject, prepare
from offline.config import TrainConfig
from offline.linear import METHOD, Fits
from offline.windows import BinnedSession
from rt_neds.errors import SessionError
from rt_neds.model.readin import SpikeReadIn
from rt_neds.model.readout import Scale
from rt_neds.session import Session

FORMAT = 9
JSON_NAME = "session.json"
ARRAYS = ("records", "values", "shown", "scored", "split", "trial", "anchors")
OPEN = 16
"""Sessions whose arrays are mapped at a time: a map is a file descriptor, and those are few."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What is small of a session in the cache; fields as of ``Session`` and ``Subject``."""

    path: str
    id: str
    units: list[str]
    rate: float
    domain: list[tuple[int, int]]
    width: int
    present: tuple[str, ...]
    by_trial: tuple[str, ...]
    scales: list[Scale]
    region: list[int]
    mean_rate: list[float]
    length: int


def kept(path: str | Path, config: TrainConfig, cache: Path) -> Subject:
    """Put a session into the cache, unless it is there, and open it.

    Parameters
    ----------
    path : path
        Session file.
    config : TrainConfig
    cache : path
        Folder of the cache; made if need be.

    Returns
    -------
    Subject
        Its arrays stay on disk.

    Raises
    ------
    SessionError, ConfigError
        As of :func:`offline.batches.prepare`.
    """
    folder = cache / _key(Path(path), config)
    if not _whole(folder):
        _write(folder, prepare(path, config))
    entry = msgspec.json.decode((folder / JSON_NAME).read_bytes(), type=Entry)
    return Subject(
        id=entry.id,
        units=entry.units,
        rate=entry.rate,
        present=entry.present,
        scales=entry.scales,
        region_N=np.array(entry.region, np.int64),
        rate_N=np.array(entry.mean_rate, np.float64),
        length=entry.length,
        reach=partial(_open, folder),
        folder=folder,
    )


def held(spikes_in: SpikeReadIn, fitted: Callable[[], Fits]) -> Callable[[], Fits]:
    """As :func:`kept_fits`, of a session that is in memory: so are they."""
    fits = fitted()
    return lambda: fits


def kept_fits(
    folder: Path, scales: list[Scale], spikes_in: SpikeReadIn, fitted: Callable[[], Fits]
) -> Callable[[], Fits]:
    """Put a session's linear decoders beside it, unless they are there.

    Parameters
    ----------
    folder : path
        Of the session.
    scales : list of Scale
        In which they are: of the session, or of a bundle that knows it.
    spikes_in : SpikeReadIn
        On whose features they are.
    fitted : callable
        Fits them.

    Returns
    -------
    callable
        Gives them.
    """
    digest = hashlib.sha256(f"{METHOD} {spikes_in.history}".encode())
    digest.update(msgspec.json.encode(scales))
    for numbers in (spikes_in.mean_KN, spikes_in.sd_KN):
        digest.update(numbers.numpy().tobytes())
    path = folder / f"linear-{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        fits = fitted()
        tensors = {"weight": fits.weight_XUF, "bias": fits.bias_XU}
        tensors["fit"] = torch.from_numpy(fits.fit_T)
        tensors |= {f"out.{name}": tensor for name, tensor in fits.outs.items()}
        part = path.with_name(f"{path.name}.part-{os.getpid()}")
        save_file(tensors, part)
        part.replace(path)
    return partial(_open_fits, path)


def _key(path: Path, config: TrainConfig) -> str:
    """Name of the folder of a session."""
    if not path.is_file():
        raise SessionError(f"no such session file: {path}; check the path")
    stat, said = path.stat(), msgspec.to_builtins(config)
    said["data"] = {k: v for k, v in said["data"].items() if k not in ("cache", "window_bins")}
    parts = {
        "format": FORMAT,
        "file": [str(path.resolve()), stat.st_size, stat.st_mtime_ns],
        "data": said["data"],
        "behaviour": said["behaviour"],
        "schemes": sorted(name for name, weight in config.masking.taught.items() if weight),
        "region": config.masking.region,
    }
    # In the order of the configuration: arrays hold the numbers of its behaviours and classes.
    digest = hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
    return f"{path.stem}-{digest[:16]}"


def _write(folder: Path, subject: Subject) -> None:
    """Write a session's folder; it has its name only once it is whole."""
    binned, anchors = subject.reach()
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    part.mkdir(parents=True, exist_ok=True)
    for name, array in {
        "records": binned.session.records_S,
        "values": binned.values_TM,
        "shown": binned.shown_TM,
        "scored": binned.scored_TM,
        "split": binned.split_T,
        "trial": binned.trial_T,
        "anchors": anchors,
    }.items():
        np.save(part / f"{name}.npy", array, allow_pickle=False)
    entry = Entry(
        path=str(binned.session.path),
        id=subject.id,
        units=subject.units,
        rate=subject.rate,
        domain=[(int(start), int(end)) for start, end in binned.session.domain_K2],
        width=binned.width,
        present=subject.present,
        by_trial=binned.by_trial,
        scales=subject.scales,
        region=subject.region_N.tolist(),
        mean_rate=subject.rate_N.tolist(),
        length=subject.length,
    )
    (part / JSON_NAME).write_bytes(msgspec.json.encode(entry))
    try:
        part.rename(folder)
    except OSError:  # something is there
        if _whole(folder):  # another run was faster; what it wrote is the same
            shutil.rmtree(part)
        else:  # it was being deleted, and that was interrupted
            shutil.rmtree(folder)
            part.rename(folder)


def _whole(folder: Path) -> bool:
    names = (JSON_NAME, *(f"{name}.npy" for name in ARRAYS))
    return all((folder / name).is_file() for name in names)


@lru_cache(maxsize=OPEN)
def _open_fits(path: Path) -> Fits:
    tensors = load_file(path)
    return Fits(
        weight_XUF=tensors.pop("weight"),
        bias_XU=tensors.pop("bias"),
        fit_T=tensors.pop("fit").numpy(),
        outs={name.removeprefix("out."): tensor for name, tensor in tensors.items()},
    )


@lru_cache(maxsize=OPEN)
def _open(folder: Path) -> tuple[BinnedSession, NDArray[np.int64]]:
    entry = msgspec.json.decode((folder / JSON_NAME).read_bytes(), type=Entry)
    arrays = {
        name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
        for name in ARRAYS
    }
    session = Session(
        path=Path(entry.path),
        id=entry.id,
        rate=entry.rate,
        unit_ids=entry.units,
        records_S=arrays["records"],
        domain_K2=np.array(entry.domain, np.int64),
    )
    binned = BinnedSession(
        session,
        entry.width,
        arrays["values"],
        arrays["shown"],
        arrays["scored"],
        arrays["split"],
        arrays["trial"],
        entry.present,
        entry.by_trial,
    )
    return binned, arrays["anchors"]
