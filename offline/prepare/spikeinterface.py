"""Sessions from what SpikeInterface reads: a raw recording and a detector, or a sorting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from temporaldata import Data

from offline.prepare.recording import Raw, refuse_pickles
from offline.prepare.spikes import Tell, detect_recording
from offline.prepare.writing import session_data
from rt_neds.errors import ConfigError
from rt_neds.stream.detector import Detector


def load_analyzer(path: str | Path) -> Any:
    """A SortingAnalyzer.

    Raises
    ------
    ConfigError
        There is none, or its recording is kept as a pickle.
    """
    import spikeinterface as si

    if not Path(path).exists():
        raise ConfigError(f"no such SortingAnalyzer: {path}; check the path")
    refuse_pickles(Path(path))
    try:
        # What was computed is read when it is asked for: models of it are pickles, too.
        analyzer = si.load_sorting_analyzer(path, load_extensions=False)
    except Exception as error:  # spikeinterface raises whatever it meets
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{path} cannot be read ({reason}); expected the folder of a SortingAnalyzer"
        ) from None
    if not hasattr(analyzer, "sorting"):
        raise ConfigError(
            f"{path} holds a {type(analyzer).__name__}; expected a SortingAnalyzer of one segment"
        )
    # The recording's, not the sorting's: a last segment without spikes is not among the latter.
    segments = len(analyzer.rec_attributes["num_samples"])
    if segments != 1:
        raise ConfigError(
            f"the recording of {path} has {segments} segments; expected one: make a SortingAnalyzer"
            " of each, for nothing says how much time lies between them"
        )
    return analyzer


def from_detector(raw: Raw, detector: Detector, session_id: str, tell: Tell) -> Data:
    """The session that ``serve`` would have seen: every spike that the detector finds."""
    spikes_S, first, end = detect_recording(raw, detector, tell)
    spikes_S = spikes_S[(spikes_S["sample"] >= first) & (spikes_S["sample"] < end)]
    return session_data(
        session_id,
        spikes_S["sample"] / raw.rate,
        spikes_S["unit"].astype(np.int64),
        {"id": np.array(detector.units)},
        np.array([[first, end]]) / raw.rate,
        session=Data(id=session_id, sampling_rate=raw.rate),
    )


def from_analyzer(analyzer: Any, session_id: str) -> Data:
    """The sorter's spikes as they are. Live there is no sorter: train on a detector's instead."""
    spikes_S = analyzer.sorting.to_spike_vector()
    rate = float(analyzer.sampling_frequency)
    units = {"id": np.array([str(unit) for unit in analyzer.unit_ids])}
    if analyzer.has_extension("unit_locations"):
        units["depth_um"] = analyzer.get_extension("unit_locations").get_data()[:, 1]
    return session_data(
        session_id,
        spikes_S["sample_index"] / rate,
        spikes_S["unit_index"].astype(np.int64),
        units,
        np.array([[0.0, analyzer.get_total_duration()]]),
        session=Data(id=session_id, sampling_rate=rate),
    )
