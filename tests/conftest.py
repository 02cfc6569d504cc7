"""Shared fixtures: one torch thread, and the real recordings where they are."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

DATA = Path(
    os.environ.get(
        "RT_NEDS_TEST_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    )
)


@pytest.fixture(autouse=True)
def chance() -> None:
    """What a test draws does not depend on which were run before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real recordings; the test is skipped, with the reason, where it is absent."""
    if not (DATA / "rat_w_maze.h5").is_file():
        pytest.skip(f"no recordings in {DATA}; set RT_NEDS_TEST_DATA to the folder that has them")
    return DATA


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A tiny session and a bundle trained on it: ``(session path, run folder, summary)``."""
    from offline.train import train
    from tests.making import tiny_config, write_session

    folder = tmp_path_factory.mktemp("tiny")
    session = write_session(folder / "tiny.h5")
    summary = train(tiny_config(), [str(session)], folder / "run")
    return session, folder / "run", summary
