"""What is on the screen is what the last schema speaks of."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from rt_neds import watch
from rt_neds.frames import DecodedFrame
from rt_neds.health import Finding
from rt_neds.stream.publisher import Note
from rt_neds.watch import SHOWN, View, describe, spark

MS = 1_000_000

STAMPS = {"sent": 1, "received": 1, "binned": 1, "decoded": 1, "published": 2}


def schema(*names, model="m"):
    outputs = [
        {"name": name, "kind": "continuous", "unit": "u", "classes": [], "offset": 2 * n, "size": 2}
        for n, name in enumerate(names)
    ]
    return Note("schema", {"bin_ms": 20.0, "rate": 3e4, "model": model, "outputs": outputs})


def frame(*means, bin_=5, model="m", epoch=1, **stamps):
    values_V = np.repeat(np.array(means, np.float32), 2)
    stamps = {**STAMPS, **stamps}
    return DecodedFrame("p", epoch, bin_, 3600, values_V, 0, 3, 0, 0, 0, model, stamps)


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


def test_an_acquisition_that_begins_anew_leaves_no_hole():
    one = view(frame(1, bin_=5), frame(1, bin_=900, epoch=2), frame(1, bin_=903, epoch=2))
    assert one.summary()["holes"] == 2


def test_latency_is_counted_from_when_spikes_came_and_from_when_values_went(monkeypatch):
    monkeypatch.setattr(watch.time, "monotonic_ns", lambda: 30 * MS)
    one = view(schema("x"), frame(1, received=2 * MS, binned=7 * MS, published=10 * MS))
    assert one.summary()["receive_to_publish_ms"] == dict.fromkeys(
        ("p50", "p99", "p99_9", "max"), 8
    )
    assert one.publish_to_screen.percentiles_ms()["max"] == 20
    assert "receive to publish   8.00" in screen(one)


def test_the_time_on_the_screen_is_that_of_the_recording():
    assert "bin 5  0.12 s  3 spikes" in screen(view(schema("x"), frame(7)))


def test_the_line_of_a_value_goes_from_its_lowest_to_its_highest():
    shown = screen(view(schema("x"), *(frame(x, bin_=n) for n, x in enumerate([4, 2, 3, 4]))))
    assert "█ ▄█" in shown


@pytest.mark.parametrize(
    ("values", "low", "high", "width", "line"),
    [
        ([], 0, 1, 9, ""),
        ([2, 2], 2, 2, 9, ""),
        ([-1, 0, 0.5, 1, 7], 0, 1, 9, "  ▄██"),
        ([9, 9, 0, 0, 0, 1, 1, 1], 0, 1, 3, " █"),  # the newest are all there
    ],
)
def test_lines(values, low, high, width, line):
    assert spark(values, low, high, width) == line


@pytest.mark.parametrize(
    ("output", "values", "words"),
    [
        ({"kind": "continuous", "unit": "m/s"}, [1, 0.25], "1.00 ± 0.25 m/s"),
        ({"kind": "poisson"}, [0.25], "0.250 per bin"),
        ({"kind": "categorical", "classes": ["left", "right"]}, [0.25, 0.75], "right 0.75"),
    ],
)
def test_a_value_in_words(output, values, words):
    assert describe(output, values) == words


def test_probabilities_are_drawn_from_nought_to_one():
    told = schema("choice")
    told.fields["outputs"][0] |= {"kind": "categorical", "classes": ["left", "right"]}
    assert "▄▄▄" in screen(view(told, *(frame(0.5, bin_=n) for n in range(3))))


def test_the_status_is_on_the_screen(monkeypatch):
    monkeypatch.setattr(watch.time, "monotonic_ns", lambda: 9_000 * MS)
    rules = {
        "go": {"fired": 3, "refused": 1, "fired_ns": 6_500 * MS, "why": []},
        "stay": {"fired": 0, "refused": 0, "fired_ns": 0, "why": []},
    }
    status = {"source_counters": {"lost": 4, "malformed_spikes": 1, "malformed_source": 2},
              "bin_counters": {"bins": 90}, "triggers": rules}  # fmt: skip
    shown = screen(view(Note("status", status)))
    assert "trigger go: fired 3, the last 2.5 s ago; refused 1" in shown
    assert "trigger stay: fired 0; refused 0" in shown
    assert "since the start: bins 90  lost 4  malformed 3  late spikes 0" in shown


@pytest.mark.parametrize("more", [0, 1])
def test_the_worst_findings_are_shown_and_the_rest_are_counted(monkeypatch, more):
    found = [Finding("wrong", "number 0"), *(Finding("note", f"number {n}") for n in range(1, 9))]
    found = found[: SHOWN + more]
    monkeypatch.setattr("rt_neds.health.Health.findings", lambda self, now: found)
    one = view(schema("x"), frame(7))
    shown = screen(one)
    assert [f"number {n}" in shown for n in range(9)] == [n < SHOWN for n in range(9)]
    assert re.findall(r"and \d more", shown) == ["and 1 more"] * more
    assert one._health().border_style == "red"


def test_all_is_well_only_once_something_was_decoded(monkeypatch):
    monkeypatch.setattr("rt_neds.health.Health.findings", lambda self, now: [])
    one = view(schema("x"))
    assert "all well" not in screen(one)
    one.take(frame(7))
    assert "all well" in screen(one)
