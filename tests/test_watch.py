"""What is on the screen is what the last schema speaks of."""

import io

import numpy as np
import pytest
from rich.console import Console

from rt_neds.frames import DecodedFrame
from rt_neds.stream.publisher import Note
from rt_neds.watch import View

STAMPS = {"sent": 1, "received": 1, "binned": 1, "decoded": 1, "published": 2}


def schema(*names, model="m"):
    outputs = [
        {"name": name, "kind": "continuous", "unit": "u", "classes": [], "offset": 2 * n, "size": 2}
        for n, name in enumerate(names)
    ]
    return Note("schema", {"bin_ms": 20.0, "rate": 3e4, "model": model, "outputs": outputs})


def frame(*means, bin_=5, model="m"):
    values_V = np.repeat(np.array(means, np.float32), 2)
    return DecodedFrame("p", 1, bin_, 3600, values_V, 0, 3, 0, 0, 0, model, dict(STAMPS))


def view(*messages):
    one = View("p")
    for message in messages:
        one.take(message)
    return one


def screen(one):
    paper = io.StringIO()
    Console(width=100, file=paper).print(one.render(100))
    return paper.getvalue()


def test_what_is_decoded_is_shown():
    shown = screen(view(schema("x", "y"), frame(1, 7)))
    assert "1.00 ± 1.00 u" in shown
    assert "7.00 ± 7.00 u" in shown


@pytest.mark.parametrize("other", [schema("x", "y"), schema("x", model="other"), schema("y")])
def test_serve_started_anew_with_another_bundle_begins_another_screen(other):
    one = view(schema("x"), frame(7), other)
    assert "waits for spikes" in screen(one)
    assert "7.00" not in screen(one)
    names, model = [o["name"] for o in other.fields["outputs"]], other.fields["model"]
    one.take(frame(*[2] * len(names), model=model))
    assert screen(one).count("2.00 ± 2.00 u") == len(names)
    assert one._range == dict.fromkeys(names, (2, 2))


def test_a_schema_said_again_changes_nothing():
    assert "7.00 ± 7.00 u" in screen(view(schema("x"), frame(7), schema("x")))


def test_frames_that_are_not_of_the_schema_are_counted_and_not_shown():
    one = view(schema("x", "y"), frame(1, 1), frame(9, bin_=6), frame(9, 9, bin_=7, model="other"))
    assert (one.frames, one.holes) == (3, 0)
    assert "9.00" not in screen(one)
    one.take(frame(2, 2, bin_=9))
    assert (one.frames, one.holes) == (4, 1)
    assert "2.00 ± 2.00 u" in screen(one)


def test_frames_before_any_schema_are_counted():
    one = view(frame(1), frame(2, bin_=8))
    assert (one.frames, one.holes) == (2, 2)
    one.take(schema("x", "y"))
    assert "waits for spikes" in screen(one)


def test_all_is_well_only_once_something_was_decoded(monkeypatch):
    monkeypatch.setattr("rt_neds.health.Health.findings", lambda self, now: [])
    one = view(schema("x"))
    assert "all well" not in screen(one)
    one.take(frame(7))
    assert "all well" in screen(one)
