"""A short session, a free port, and a source to be fed by hand."""

import pytest

from rt_neds.children import free_port
from rt_neds.session import load_session
from rt_neds.stream.openephys import OpenEphysSource
from tests.making import write_session
from tests.openephys.checking import known


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return load_session(write_session(tmp_path_factory.mktemp("oe") / "s.h5", seconds=8))


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def source(port):
    """A source of five electrodes, to be fed by hand."""
    source = OpenEphysSource(f"openephys://127.0.0.1:{port}", known(["E0", "E1", "E2", "E3", "E4"]))
    yield source
    source.close()
