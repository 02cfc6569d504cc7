"""The tables of rules: what cannot be meant is refused before anything begins."""

import subprocess
import sys

import pytest

from rt_neds.config import parse_config
from rt_neds.errors import ConfigError
from rt_neds.frames import Flag
from rt_neds.serve_config import ServeConfig, each_probe
from rt_neds.stream.trigger import REASONS
from rt_neds.trigger_config import DRIFTED, REFUSABLE, TriggerConfig, flags_of


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"when": "a > 1", "refuse": ["lat"]}, "refuse 'lat'; there are gap, late, .*"),
        ({"when": "a > 1", "hold": 3}, "unknown key trigger.go.hold; did you mean .*hold_ms"),
        ({"when": "a > 1", "hold_ms": -1}, "hold_ms -1; 0 to 86400000 ms can be had"),
        ({"when": "a > 1", "refractory_ms": -1}, "refractory_ms -1; 0 to"),
        ({"when": "a > 1", "max_age_ms": -1}, "max_age_ms -1; 0 to"),
        ({"when": "a > 1", "ttl": {"line": 0}}, ">= 1"),
        ({"when": "a > 1", "ttl": {"line": 257}}, "<= 256"),
        ({"when": "a > 1", "ttl": {"line": 1, "to": "ipc://x"}}, "expected an address"),
        ({"when": "a > 1", "ttl": {"line": 1, "pulse_ms": 0}}, "pulse_ms 0"),
        ({"when": "a > 1", "ttl": {"line": 1, "pulse_ms": 10001}}, "pulse_ms 10001; 1 to 10000 ms"),
        ({"when": "a > 1", "ttl": {"line": 1, "puls_ms": 1}}, "trigger.go.ttl.puls_ms; did you"),
        ({"when": "a > 1", "nido": {"lines": "D/port1/line2", "bits": 4}}, "bits 4 raise none"),
        ({"when": "a > 1", "nido": {"lines": "x", "bits": 0}}, ">= 1"),
        ({"when": "a > 1", "refractory_ms": 49, "ttl": {"line": 1}}, "ttl.pulse_ms 50; a firing"),
        ({"when": "a > 1", "nido": {"lines": "x", "bits": 1}}, "nido.pulse_ms 10; a firing"),
        ({"when": "a > 1", "nido": {"lines": "a b", "bits": 1}}, "lines 'a b'"),
        ({"when": "a > 1", "nido": {"lines": "a\nb", "bits": 1}}, "lines 'a"),
        ({"when": "a > 1", "nido": {"lines": "a", "bits": 1, "pulse_ms": 0}}, "pulse_ms 0"),
        ({"when": "a > 1", "nido": {"lines": "a", "bits": 1, "pulse_ms": 10001}}, "1 to 10000 ms"),
        ({"when": "a > 1", "nido": {"lines": "a", "bits": 1, "to": "host"}}, "HOST:PORT"),
        ({"when": "a > 1", "nido": {"lines": "a", "bits": 1, "to": "host:0"}}, "HOST:PORT"),
        ({"when": "a > 1", "nido": {"lines": "a", "bits": 1, "to": "host:65536"}}, "HOST:PORT"),
        ({}, "required field `when`"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(table, words):
    with pytest.raises(ConfigError, match=words):
        parse_config({"probe": "p", "trigger": {"go": table}}, ServeConfig, "test")


def test_without_a_word_a_rule_refuses_whatever_can_be_refused():
    assert {flag.name.lower() for flag in Flag} | {"drifted"} == set(REFUSABLE)
    config = TriggerConfig(when="a > 1")
    assert set(config.refuse) == set(REFUSABLE)
    assert flags_of(config.refuse) == flags_of([*config.refuse, "gap"]) == sum(Flag) + DRIFTED
    assert len({*REASONS}) == len(Flag) + 4  # nor do two reasons share a bit


def test_a_time_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="hold_ms nan"):
        TriggerConfig(when="a > 1", hold_ms=float("nan"))


def test_a_rule_listens_to_one_probe():
    table = {"bundle": "b", "probe": "p q", "trigger": {"go": {"when": "a > 1"}}}
    with pytest.raises(ConfigError, match="trigger go: probe .not named.; name one of p, q"):
        each_probe(parse_config(table, ServeConfig, "test"))
    table["trigger"]["go"]["probe"] = "q"
    with pytest.raises(ConfigError, match="trigger go: probe q; name one of p: a rule"):
        each_probe(parse_config({**table, "probe": "p"}, ServeConfig, "test"))
    first, second = each_probe(parse_config(table, ServeConfig, "test"))
    assert (list(first.trigger), list(second.trigger)) == ([], ["go"])


def test_serve_refuses_a_wrong_rule_before_it_begins(tiny):
    done = subprocess.run(
        [sys.executable, "-m", "rt_neds.cli", "serve", "--probe", "p", "--bundle",
         str(tiny[1] / "bundle"), "--set", "trigger.go.when=spead > 1"],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "rt-neds: trigger go: 'spead' at character 1 of 'spead > 1'; expected one of the outputs "
        "speed, speed.sd, choice.left, choice.right\n"
    )
