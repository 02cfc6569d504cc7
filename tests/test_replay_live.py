"""What a replay sends of a task's states is what training was shown."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from offline.config import BehaviourConfig, DataConfig
from offline.windows import bin_session
from rt_neds.cli import main
from rt_neds.errors import ConfigError, SessionError
from rt_neds.replay_live import States, Track, named, tracks_of
from rt_neds.session import load_session
from rt_neds.stream.live import LiveBehaviours
from tests.making import write_session

WIDTH = 600


def shown_live(session, config, monkeypatch, messages: int):
    """Class of each bin, NaN where none is shown, when messages of so many samples come."""
    training = {"config": {"behaviour": {"state": msgspec.to_builtins(config)}}}
    monkeypatch.setattr("rt_neds.bundle.load_spec", lambda _: SimpleNamespace(training=training))
    (track,) = tracks_of(session, {"state": None}, "B", 1)
    live = LiveBehaviours({"state": tuple(config.classes)})
    live.begin_run(1)
    bins, closed, shown = -(-session.end // WIDTH), 0, []
    for end in range(messages, session.end + messages, messages):
        for event in track.due(0, end):
            live.take_event(event, session.rate, end - messages)
        while (closed + 1) * WIDTH <= end and closed < bins:
            closed += 1
            shown.append(float(live.at(1, closed * WIDTH, WIDTH)[0]))
    assert live.counters["state"]["late"] == live.counters["state"]["skipped"] == 0
    return np.array(shown)


def as_trained(session, config):
    b = bin_session(session, DataConfig(), {"state": config})
    return np.where(b.shown_TM[:, 1], b.values_TM[:, 1], np.nan)


@pytest.mark.parametrize("messages", [30, 333, 600, 2500])
@pytest.mark.parametrize("known_from", ["start", "end", "stim_on_time"])
def test_states_of_trials(tmp_path, monkeypatch, messages, known_from):
    session = load_session(write_session(tmp_path / "s.h5", seconds=20))
    classes = {"left": 1, "right": 0}
    config = BehaviourConfig(
        source="trials.choice", kind="categorical", classes=classes, known_from=known_from
    )
    expected = as_trained(session, config)
    assert np.isnan(expected).any()
    shown = shown_live(session, config, monkeypatch, messages)
    np.testing.assert_array_equal(shown, expected[: len(shown)])
    assert len(shown) >= len(expected) - 1


def test_a_source_may_be_a_list_of_one(tmp_path, monkeypatch):
    session = load_session(write_session(tmp_path / "s.h5", seconds=20))
    of = {"source": ["wheel.wheel_speed"], "kind": "continuous", "transform": "none"}
    training = {"config": {"behaviour": {"speed": of}}}
    monkeypatch.setattr("rt_neds.bundle.load_spec", lambda _: SimpleNamespace(training=training))
    (track,) = tracks_of(session, {"speed": None}, "B", 1)
    assert len(list(track.due(0, session.end))) == 1000


@pytest.mark.parametrize("seed", range(5))
def test_states_over_time_on_edges_of_bins_and_beside_them(tmp_path, monkeypatch, seed):
    path, out = write_session(tmp_path / "s.h5", seconds=20), tmp_path / "o.h5"
    rng = np.random.default_rng(seed)
    steps = rng.choice([1, 299, 300, 600, 601, 4000], 200)
    when = np.cumsum(steps) / 30_000
    states = rng.choice(["3", "7", "9", ""], 200, p=[0.4, 0.4, 0.1, 0.1])
    rows = [f"{t!r},{state}" for t, state in zip(when.tolist(), states, strict=True)]
    (tmp_path / "task.csv").write_text("\n".join(["time,state", *rows]))
    argv = ["prepare", "session", str(path), "--tables", str(tmp_path / "task.csv")]
    assert main([*argv, "--out", str(out), "--quiet"]) == 0
    config = BehaviourConfig(
        source="task.state", kind="categorical", classes={"sits": 3, "runs": 7}
    )
    session = load_session(out)
    expected = as_trained(session, config)
    assert len(np.unique(expected[np.isfinite(expected)])) == 2
    shown = shown_live(session, config, monkeypatch, 30)
    np.testing.assert_array_equal(shown, expected[: len(shown)])


def track_of(samples, values, domain):
    series = SimpleNamespace(
        samples_L=np.array(samples), values_L=np.array(values), domain_K2=np.array(domain)
    )
    session = SimpleNamespace(path="s.h5", rate=30_000.0, series=lambda source: series)
    return Track(session, "speed", "wheel.wheel_speed", 3)


def sent(batches):
    return [(b.seq, b.first, float(b.values[0])) for b in batches]


def test_what_was_recorded_is_sent_when_it_is_due_and_once():
    at = [90, 100, 200, 300, 400, 500, 510, 600]
    values = [9.0, 1.0, np.nan, 3.0, 4.0, 5.0, 9.0, 6.0]
    track = track_of(at, values, [[100, 500], [550, 600]])  # edges belong to it
    assert sent(track.due(0, 99)) == []
    assert sent(track.due(0, 400)) == [(0, 100, 1.0), (1, 300, 3.0), (2, 400, 4.0)]
    assert sent(track.due(0, 400)) == []
    assert sent(track.due(450, 700)) == [(3, 500, 5.0), (4, 600, 6.0)]
    track = track_of(at, values, [[100, 500], [550, 600]])
    (batch, *_) = track.due(300, 400)  # whoever begins there is not told of what was before
    assert (batch.seq, batch.first, batch.epoch, batch.name) == (0, 300, 3, "speed")
    assert batch.rate == 30_000.0 / 100
    assert sent(track.due(0, 500)) == [(2, 500, 5.0)]


@pytest.mark.parametrize(("at", "values"), [([10], [1.0]), ([10, 10, 10], [1.0, 2.0, 3.0])])
def test_what_is_no_series_cannot_be_sent(at, values):
    with pytest.raises(SessionError, match="has fewer than two values to send"):
        track_of(at, values, [[0, 100]])


def test_a_trials_value_is_sent_from_when_it_is_known_to_the_end_of_the_trial():
    columns = {
        "trials.choice": np.array([1.0, 0.0, 1.0, 0.0, 5.0, 1.0]),
        "trials.feedback_time": np.array([0.2, np.nan, 0.9, 0.5, 0.6, -0.1]),
        "trials.end": np.array([0.4, 0.45, 0.8, 0.7, 0.75, 0.1]),
    }
    session = SimpleNamespace(
        numbers=columns.__getitem__,
        samples=lambda seconds: np.round(np.nan_to_num(seconds) * 1000).astype(np.int64),
    )
    config = {"source": "trials.choice", "classes": {"left": 1, "right": 0}}
    config["known_from"] = "feedback_time"
    expected = [  # of the second trial nobody is told, the fifth is of no class
        (0, "left"), (100, None), (200, "left"), (400, None),
        (500, "right"), (700, None), (900, "left"), (900, None),
    ]  # fmt: skip

    def events(*spans):
        states = States(session, "choice", config, 7)
        return [(e.sample, e.value) for span in spans for e in states.due(*span)]

    assert events((0, 1000)) == expected
    assert events((0, 200), (0, 201), (0, 900), (0, 901)) == expected  # each once, before its edge
    assert events((0, 200)) == expected[:2]
    assert events((400, 1000)) == expected[3:]  # whoever begins there is not told of before
    (event, *_) = States(session, "choice", config, 7).due(0, 10)
    assert (event.epoch, event.kind) == (7, "choice")


def test_states_over_time_are_sent_as_they_change_to_the_end_of_what_was_recorded():
    series = SimpleNamespace(
        samples_L=np.array([0, 10, 20, 30, 50, 60]),
        values_L=np.array([1.0, 0.0, 0.0, 1.0, 1.0, 7.0]),
        domain_K2=np.array([[0, 30], [45, 60]]),
    )
    config = {"source": "task.state", "classes": {"left": 1, "right": 0}}
    states = States(SimpleNamespace(series=lambda source: series), "state", config, 7)
    assert [(e.sample, e.value) for e in states.due(0, 100)] == [
        (0, "left"), (9, "right"), (29, "left"), (30, None), (49, "left"), (59, None), (60, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("of", "live", "words"),
    [
        ({"transform": "speed", "kind": "continuous"}, {"x": None}, "is made of position.x and no"),
        ({"transform": "none", "kind": "continuous"}, {"y": None}, "NAME=SERIES.*bundle has x"),
    ],
)
def test_what_is_no_series_of_the_session_must_be_named(monkeypatch, of, live, words):
    training = {"config": {"behaviour": {"x": {"source": "position.x", **of}}}}
    monkeypatch.setattr("rt_neds.bundle.load_spec", lambda _: SimpleNamespace(training=training))
    with pytest.raises(ConfigError, match=words):
        tracks_of(None, live, "B", 1)


def test_a_named_series_is_sent_as_it_is_whatever_the_bundle_makes_of_it(monkeypatch):
    of = {"source": "task.state", "kind": "categorical", "transform": "none", "classes": {}}
    training = {"config": {"behaviour": {"state": of}}}
    monkeypatch.setattr("rt_neds.bundle.load_spec", lambda _: SimpleNamespace(training=training))
    series = SimpleNamespace(
        samples_L=np.array([0, 10]), values_L=np.zeros(2), domain_K2=np.array([[0, 30]])
    )
    session = SimpleNamespace(rate=1e3, series=lambda source: series)
    (track,) = tracks_of(session, {"state": "wheel.speed"}, "B", 1)
    assert isinstance(track, Track)


def test_what_live_takes():
    assert named(["a=b.c", "d"]) == {"a": "b.c", "d": None}
    for wrong in ("=b", "a=", ""):
        with pytest.raises(ConfigError, match="expected NAME=SERIES"):
            named([wrong])
