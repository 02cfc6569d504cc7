"""Configuration: strict, with the nearest right name for a wrong one."""

from pathlib import Path

import pytest

from offline.config import TrainConfig
from offline.sweep import SweepConfig
from rt_neds.config import config_path, load_config
from rt_neds.errors import ConfigError
from rt_neds.serve_config import ServeConfig, source_endpoint

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ENOUGH = '[behaviour.x]\nsource = "position.x"\n'


def load(tmp_path, text, *overrides):
    path = tmp_path / "c.toml"
    path.write_text(text)
    return load_config(path, TrainConfig, overrides)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[trainning]\nsteps = 3", "unknown key trainning; did you mean training"),
        (
            "[training]\nlearning_rat = 3",
            "training.learning_rat; did you mean training.learning_rate",
        ),
        ('[behaviour.x]\nsorce = "a"', "behaviour.x.sorce; did you mean behaviour.x.source"),
        ("[training]\nsteps = 'many'", "training.steps: Expected `int`"),
        ("[behaviour.x]\nsource = 3", "behaviour.x.source: Expected"),
        (ENOUGH + "[behaviour.y]\nsource = 'w.y'\nweight = -1", "behaviour.y: w.y: weight is -1"),
        ("[training]\nsteps = 0", "steps"),
        (ENOUGH + "[model]\ndim = 30\nheads = 4", "even multiple of heads"),
        (ENOUGH + "[data]\nfractions = [0.5, 0.1, 0.1]", "sum to 1"),
        (ENOUGH + "[masking]\nschemes = { decodng = 1.0 }", "no scheme decodng"),
        ("[behaviour.x]\nkind = 'categorical'\nsource = 'trials.choice'", "classes"),
        ("[training]\nsteps = 3", "behaviour"),
        ("steps = = 3", "not valid TOML"),
    ],
)
def test_wrong_configurations_are_told_in_one_line(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "no.toml", TrainConfig)
    with pytest.raises(ConfigError, match="folder"):
        load_config(tmp_path, TrainConfig)


def test_overrides(tmp_path):
    config = load(
        tmp_path, ENOUGH, "training.steps=7", "data.split=blocked", "model.history=[2, 3]"
    )
    assert (config.training.steps, config.data.split) == (7, "blocked")
    assert config.model.history == (2, 3)
    with pytest.raises(ConfigError, match="did you mean training.steps"):
        load(tmp_path, ENOUGH, "training.step=7")
    with pytest.raises(ConfigError, match="expected section.key=value"):
        load(tmp_path, ENOUGH, "training.steps")


@pytest.mark.parametrize("name", sorted(p.name for p in CONFIGS.glob("*.toml")))
def test_every_configuration_that_comes_with_us_is_complete(name):
    kind = {"serve.toml": ServeConfig, "sweep.toml": SweepConfig}.get(name, TrainConfig)
    assert load_config(config_path(name), kind) is not None


@pytest.mark.parametrize("value", ["nan", "inf", "-1.0", "1e12", "1e30"])
@pytest.mark.parametrize(
    "key",
    [
        "lateness_ms",
        "stale_ms",
        "slip_ms",
        "hang_ms",
        "trigger.r.hold_ms",
        "trigger.r.refractory_ms",
        "trigger.r.max_age_ms",
        "trigger.r.ttl.pulse_ms",
    ],
)
def test_times_that_nobody_can_wait_for_are_told_in_one_line(key, value):
    given = ("trigger.r.when=x > 1", "trigger.r.ttl.line=1", "trigger.r.refractory_ms=1000")
    name = key.rpartition(".")[2]
    with pytest.raises(
        ConfigError, match=rf"{name} (.*; .* can be had.*; correct that|is \w+; a finite number)"
    ) as caught:
        load_config(None, ServeConfig, (*given, f"{key}={value}"))
    assert "\n" not in str(caught.value)


def test_bins_are_not_held_open_for_longer_than_memory_lasts():
    with pytest.raises(ConfigError, match="lateness_ms 60001; 0 to 60000 ms can be had"):
        load_config(None, ServeConfig, ("lateness_ms=60001",))


def test_a_device_is_one_of_two():
    with pytest.raises(ConfigError, match="device 'gpu'; expected 'cpu' or 'cuda'"):
        load_config(None, ServeConfig, ("device=gpu",))


@pytest.mark.parametrize("key", ["stale_ms", "slip_ms", "hang_ms"])
def test_times_that_must_not_be_zero(key):
    with pytest.raises(ConfigError, match=f"{key} 0; .* can be had"):
        load_config(None, ServeConfig, (f"{key}=0.0",))


def test_sources():
    assert source_endpoint("rtneds://host:5570") == "tcp://host:5570"
    for wrong in ("host:5570", "http://host:5570", "rtneds://"):
        with pytest.raises(ConfigError, match="expected rtneds://HOST:PORT"):
            source_endpoint(wrong)
