"""Cores are held awake while a stream runs in real time, and no longer."""

import struct

import pytest

from rt_neds import awake as module
from rt_neds.awake import DEVICE, LIGHT_US, VIRTUAL_US, Awake, awake, is_virtual, may_be_held


def asked_of_the_system():
    """What the kernel makes of all who hold it open, in microseconds."""
    with DEVICE.open("rb") as file:
        return struct.unpack("i", file.read(4))[0]


@pytest.fixture
def device(tmp_path):
    file = tmp_path / "cpu_dma_latency"
    file.write_bytes(b"")
    return file


@pytest.mark.parametrize(("virtual", "us"), [(True, VIRTUAL_US), (False, LIGHT_US)])
def test_what_is_asked_for_depends_on_whose_the_cores_are(device, monkeypatch, virtual, us):
    monkeypatch.setattr(module, "is_virtual", lambda: virtual)
    holding = Awake(device=device)
    holding.hold(True)
    holding.hold(True)  # once is enough
    assert device.read_bytes() == struct.pack("i", us)
    assert holding.held
    holding.hold(False)
    holding.hold(False)
    assert not holding.held


def test_where_it_is_refused_or_not_wanted_nothing_is_held(tmp_path, device):
    refused = Awake(device=tmp_path / "no" / "such")
    refused.hold(True)
    assert not refused.held
    assert not may_be_held(tmp_path / "no" / "such")
    assert may_be_held(device)
    device.write_bytes(b"")
    unwanted = Awake(wanted=False, device=device)
    unwanted.hold(True)
    assert not unwanted.held
    assert device.read_bytes() == b""


def test_a_system_that_takes_no_such_number_is_left_alone(device, monkeypatch):
    class Full(module.FileIO):
        def write(self, _):
            raise OSError("no")

    monkeypatch.setattr(module, "FileIO", Full)
    holding = Awake(device=device)
    holding.hold(True)
    assert not holding.held


def test_the_kernel_is_told_and_forgets(monkeypatch):
    if not may_be_held():
        pytest.skip("this system does not let us hold cores awake")
    before = asked_of_the_system()
    monkeypatch.setattr(module, "is_virtual", lambda: True)
    with awake():
        assert asked_of_the_system() == VIRTUAL_US
    assert asked_of_the_system() == before


def test_a_virtual_processor_says_so(tmp_path):
    (tmp_path / "cpuinfo").write_text("model name : x\nflags : fpu hypervisor sse\n")
    assert is_virtual(tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("model name : no hypervisor\nflags : fpu sse\n")
    assert not is_virtual(tmp_path / "cpuinfo")
    assert not is_virtual(tmp_path / "none")
