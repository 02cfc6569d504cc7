"""What is measured is made up: bundles with random weights, sessions of Poisson spikes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SIZES: dict[str, dict[str, Any]] = {
    "small": {"dim": 128, "layers": 4, "heads": 4},
    "base": {"dim": 256, "layers": 5, "heads": 8},
    "large": {"dim": 256, "layers": 22, "heads": 8},
}
SESSION_ID = "bench"


def random_bundle(
    folder: Path,
    size: str,
    units: int,
    bin_ms: float,
    behaviours: int,
    context: int = 100,
    longest_silence_s: float = 0.0,
) -> Path:
    """A bundle with random weights: latency does not depend on their values.

    ``longest_silence_s`` is what it knows of every unit; 0 for nothing.
    """
    from rt_neds.bundle import BundleSession, save_bundle
    from rt_neds.model.config import ModelConfig
    from rt_neds.model.neds import NEDS
    from rt_neds.model.readout import Behaviour, Scale

    names = [f"behaviour_{i}" for i in range(behaviours)]
    model = NEDS(
        ModelConfig(**SIZES[size], context=context),
        [Behaviour(name=name, kind="continuous") for name in names],
        {SESSION_ID: units},
    )
    session = BundleSession(
        id=SESSION_ID,
        units=[f"{SESSION_ID}/{n}" for n in range(units)],
        rate=30_000.0,
        scales=dict.fromkeys(names, Scale()),
        behaviours=names,
        longest_silence=[longest_silence_s] * units if longest_silence_s else [],
    )
    save_bundle(folder, model, bin_ms=bin_ms, sessions=[session], training={"random": True})
    return folder


def poisson_session(
    path: Path, session_id: str, units: list[str], rate: float, seconds: float
) -> Path:
    """A session file of Poisson spikes, ``rate`` per second in all."""
    from temporaldata import ArrayDict, Data, Interval, IrregularTimeSeries

    rng = np.random.default_rng(0)
    n = rng.poisson(rate * seconds)
    domain = Interval(start=np.array([0.0]), end=np.array([seconds]))
    spikes = IrregularTimeSeries(
        timestamps=np.sort(rng.uniform(0, seconds, n)),
        unit_index=rng.integers(0, len(units), n),
        domain=domain,
    )
    data = Data(
        session=Data(id=session_id),
        units=ArrayDict(id=np.array(units)),
        spikes=spikes,
        domain=domain,
    )
    import h5py

    with h5py.File(path, "w") as file:
        data.to_hdf5(file)
    return path
