"""What serve refuses before it begins, and what it does not end of."""

import contextlib
import os
import sys

import pytest

from rt_neds.cli import main
from rt_neds.config import parse_config
from rt_neds.errors import ConfigError
from rt_neds.result import tell
from rt_neds.serve import load
from rt_neds.serve_config import ServeConfig


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"detector": "d"}, "probe p of rtneds://.* has d detector; .* other sources .* take none"),
        ({"source": "spikeglx://h:4142"}, "has no detector; SpikeGLX sends samples and needs"),
        (
            {"source": "spikeglx://h:4142", "detector": "d", "live": ["x", "y"]},
            "live behaviours x, y with spikeglx://h:4142; .*: serve without them",
        ),
    ],
)
def test_what_does_not_go_together_is_told_in_one_line(table, words):
    config = parse_config({"probe": "p", "bundle": "b", **table}, ServeConfig, "test")
    with pytest.raises(ConfigError, match=words) as caught:
        load(config, print)
    assert "\n" not in str(caught.value)


def test_several_probes_may_be_named_on_the_command_line(capsys):
    assert main(["serve", "--bundle", "b", "--probe", "imec0", "imec0"]) == 2
    assert "probes imec0, imec0; " in capsys.readouterr().err


def test_what_cannot_be_said_ends_nothing(monkeypatch):
    hears, says = os.pipe()
    os.close(hears)
    nobody = open(says, "w", buffering=1)  # noqa: SIM115 (what is left in it cannot be written)
    monkeypatch.setattr(sys, "stderr", nobody)
    tell("a worker began")
    monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
        nobody.close()
