"""Real recordings through the whole path: config -> train -> serve <- replay, equal to offline.

Training is cut to a few steps: what is tested is the path. Scores are benchmarks' business.
"""

import numpy as np
import pytest

from offline.config import TrainConfig
from offline.evaluate import evaluate, offline_values
from offline.train import train
from offline.windows import bin_session
from rt_neds.bundle import build_model, load_spec
from rt_neds.children import serving, wait_for_schema
from rt_neds.config import config_path, load_config
from rt_neds.session import load_session
from tests.system.test_live import Rig

pytestmark = [pytest.mark.data, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("file", "config_name", "memory", "clip_s"),
    [
        # A memory short enough to be settled within the clip.
        ("rat_w_maze.h5", "rat-w-maze.toml", 10, (280.0, 300.0)),
        # Spans a hole of 229 s.
        ("ibl_probe_30_trials.h5", "ibl-probe.toml", 0, (850.0, 1130.0)),
    ],
)
def test_a_recording_replayed_into_serve_equals_offline(
    data_dir, tmp_path, file, config_name, memory, clip_s
):
    path = data_dir / file
    changes = ["training.steps=3", "training.batch=2", f"model.memory={memory}"]
    config = load_config(config_path(config_name), TrainConfig, changes)
    train(config, [str(path)], tmp_path / "run")
    bundle = tmp_path / "run" / "bundle"
    rig = Rig(bundle)
    with serving(*rig.options) as child:
        wait_for_schema(rig.listener, child)
        frames, _, _ = rig.replay(
            path, tmp_path, "--speed", "0", "--batch-ms", "20",
            "--from", str(clip_s[0]), "--to", str(clip_s[1]),
        )  # fmt: skip
    spec, session = load_spec(bundle), load_session(path)
    binned = bin_session(session, config.data, config.behaviour)
    warm = spec.model.receptive_field
    inside = binned.shown_TM[:, 0]
    # A run that began at the clip's start has seen less than the offline pass, until it is warm.
    settled = [f for f in frames if inside[max(0, f.bin - warm) : f.bin + 1].all()]
    started = {bin_ for bin_ in (f.bin for f in frames) if not inside[bin_ - 1]}
    assert len(settled) > 300
    first, stop = frames[0].bin + warm, frames[-1].bin + 1
    offline = offline_values(
        build_model(bundle, spec),
        spec.session(),
        binned,
        [(first, stop)],
        list(spec.behaviours),
        300,
    )
    at = 0
    compared = [f for f in frames if f.bin >= first]
    for b in spec.behaviours:
        streamed = np.stack([f.values_V[at : at + 2] for f in compared])
        expected = offline[b.name][[f.bin - first for f in compared]]
        sd = spec.session().scales[b.name].sd
        assert np.abs(streamed - expected).max() / sd < 1e-4
        at += 2
    if "ibl" in file:
        assert len(started) == 1  # the third piece of the recording began anew, by itself
        assert len(frames) < (clip_s[1] - clip_s[0]) * 50 / 3  # and the hole was not published


def test_evaluate_a_recording(data_dir, tmp_path):
    path = data_dir / "ibl_probe_30_trials.h5"
    config = load_config(config_path("ibl-probe.toml"), TrainConfig, ["training.steps=3"])
    train(config, [str(path)], tmp_path / "run")
    result = evaluate(tmp_path / "run" / "bundle", path)
    assert result["stream_vs_offline_max_abs"] < 1e-4
    scores = result["decoding"]["wheel_speed"]
    assert scores["r2_profile"] > 0
    assert result["baselines"]["ridge"]["wheel_speed"]["r2"] > scores["r2_profile"]
