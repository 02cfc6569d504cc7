"""Actuators of one rule."""

import pytest

from rt_neds.actuators import Actuators
from rt_neds.trigger_config import (
    rules_of,
)
from tests.actuators.checking import rule


@pytest.fixture
def act():
    """Start the actuators of one rule; ends them after the test."""
    running = []

    def act(said=None, **options):
        say = said if callable(said) else (said if said is not None else []).append
        actuators = Actuators(rules_of({"p": {"go": rule(**options)}}), say)
        actuators.start()
        running.append(actuators)
        return actuators

    yield act
    for actuators in running:
        actuators.end()
