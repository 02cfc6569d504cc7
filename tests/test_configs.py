"""Every configuration that is shipped runs as it is, on sessions that have what it names."""

import h5py
import msgspec
import numpy as np
import pytest
from temporaldata import Data, Interval

from offline.config import TrainConfig
from offline.train import train
from rt_neds.bundle import load_spec
from rt_neds.config import config_path, load_config
from rt_neds.simulate import simulate_file

PAPERS = (
    "neds-single",
    "neds-multi",
    "mtm",
    "ndt1-stitch",
    "ibl-bwb-pretrain",
    "ibl-bwb-finetune",
)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A simulated session with the splits of the public IBL files."""
    path = tmp_path_factory.mktemp("papers") / "s.h5"
    simulate_file(path, units=20, minutes=2.0, seed=0)
    with h5py.File(path) as file:
        data = Data.from_hdf5(file, lazy=False)
    end = data.domain.end[-1]
    for split, cuts in {"pretrain": (0, 0.9, 1.0), "ts1": (0, 0.4, 0.6, 1.0)}.items():
        names = ("train", "val", "test")
        for name, low, high in zip(names, cuts[:-1], cuts[1:], strict=False):
            piece = Interval(np.array([low * end]), np.array([high * end]))
            setattr(data, f"{split}_{name}_domain", piece)
    with h5py.File(path, "w") as file:
        data.to_hdf5(file)
    return path


def small(name: str, steps: int = 2) -> TrainConfig:
    """The configuration, with the network and the run made small and nothing else."""
    config = load_config(config_path(f"{name}.toml"), TrainConfig, [])
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, dim=16, layers=2, heads=2),
        training=msgspec.structs.replace(
            config.training, steps=steps, batch=4, validate_every=steps, device="cpu"
        ),
    )


@pytest.mark.parametrize("name", [n for n in PAPERS if n != "ibl-bwb-finetune"])
def test_a_papers_configuration_runs(name, session, tmp_path):
    summary = train(small(name), [str(session)], tmp_path)
    scores = next(iter(summary["val"].values()))
    assert scores
    assert all(np.isfinite(score) for score in scores.values())
    if name in ("mtm", "ndt1-stitch"):
        assert load_spec(tmp_path / "bundle").behaviours == []


def test_pretraining_hands_over_to_fine_tuning(session, tmp_path):
    train(small("ibl-bwb-pretrain"), [str(session)], tmp_path / "pretrained")
    config = small("ibl-bwb-finetune")
    bundle = tmp_path / "pretrained" / "bundle"
    train(config, [str(session)], tmp_path / "tuned", init=bundle)
    assert len(load_spec(tmp_path / "tuned" / "bundle").behaviours) == 4
