"""What Prometheus is told is what was published: exactly."""

import math
import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter

import pytest

from rt_neds.children import (
    collect,
    command,
    finish_replay,
    free_port,
    serving,
    start_replay,
    wait_for_schema,
)
from rt_neds.cli import main
from rt_neds.errors import ConfigError
from rt_neds.frames import Flag
from rt_neds.metrics import MOST_NAMES, SECONDS, Metrics, Rising, parse_listen
from rt_neds.stream.publisher import DecodedListener, Note

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
from prometheus_client.parser import text_string_to_metric_families

S = 1_000_000_000


def scrape(port):
    """Every sample by name and labels but the probe's, in the order of the labels' names."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    out = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for key, value in sorted(sample.labels.items()) if key != "probe")
            assert sample.labels["probe"] == "imec0"
            out[(sample.name, *labels)] = sample.value
    return out


@pytest.mark.timeout(400)
def test_what_is_scraped_is_what_was_published(tiny, tmp_path):
    path, run, _ = tiny
    decoded, spikes, port = f"tcp://127.0.0.1:{free_port()}", free_port(), free_port()
    listener = DecodedListener(decoded, "imec0")
    triggers = []
    options = ("--probe", "imec0", "--bundle", str(run / "bundle"), "--publish", decoded,
               "--source", f"rtneds://127.0.0.1:{spikes}",
               "--set", "trigger.always.when=speed > -1e9",
               "--set", "trigger.right.when=choice.right > 0.5",
               "--set", "trigger.right.hold_ms=40")  # fmt: skip

    class Noting:
        def read(self, timeout_ms):
            message = listener.read(timeout_ms)
            if isinstance(message, Note) and message.kind == "trigger":
                triggers.append(message.fields)
            return message

    with serving(*options) as child:
        wait_for_schema(listener, child)
        telling = subprocess.Popen(
            command("metrics", "--probe", "imec0", "--connect", decoded, "--listen",
                    f"127.0.0.1:{port}", "--quiet"),
        )  # fmt: skip
        try:
            until(lambda: reachable(port) and ("rtneds_serve_total", "published") in scrape(port))
            out = tmp_path / "replay.json"
            sending = start_replay("--session", str(path), "--probe", "imec0", "--bind",
                                   f"tcp://127.0.0.1:{spikes}", "--to", "8", out=out)  # fmt: skip
            frames, _ = collect(Noting(), sending)
            finish_replay(sending, out)
            key = ("rtneds_serve_total", "published")
            until(lambda: scrape(port)[key] == len(frames) == 400)
            told = scrape(port)
            telling.send_signal(signal.SIGTERM)
            assert telling.wait(20) == 0
        finally:
            telling.kill()
            listener.close()

    assert told["rtneds_frames_total",] == len(frames)
    assert told["rtneds_bins_missing_total",] == 0
    for flag in Flag:
        expected = sum(bool(frame.flags & flag) for frame in frames)
        assert told["rtneds_frames_by_flag_total", flag.name.lower()] == expected
    assert told["rtneds_frames_by_flag_total", "none"] == sum(not f.flags for f in frames)
    assert told["rtneds_frames_by_flag_total", "warming"] == 9
    assert told["rtneds_spikes_total",] == sum(frame.spikes for frame in frames) > 0
    for name, stamp in {"receive_to_publish": "received", "bin_end_to_publish": "ended"}.items():
        ns = [f.stamps["published"] - f.stamps[stamp] for f in frames if stamp in f.stamps]
        assert ns
        assert told[f"rtneds_{name}_seconds_count",] == len(ns)
        assert told[f"rtneds_{name}_seconds_sum",] == pytest.approx(sum(ns) / 1e9, rel=1e-9)
        for edge in SECONDS:
            below = sum(one / 1e9 <= edge for one in ns)
            assert told[f"rtneds_{name}_seconds_bucket", str(edge)] == below
    outcomes = Counter((t["rule"], "refused" if t["refused"] else "fired") for t in triggers)
    assert outcomes["always", "refused"] == 1
    for (rule, outcome), count in outcomes.items():
        assert told["rtneds_triggers_total", outcome, rule] == count
    reasons = Counter((t["rule"], why) for t in triggers for why in t["refused"])
    for (rule, reason), count in reasons.items():
        assert told["rtneds_trigger_refusals_total", reason, rule] == count
    assert told["rtneds_serve_total", "bins.bins"] == 400
    assert told["rtneds_serve_total", "supervision.restarts"] == 0
    assert told["rtneds_realtime",] == 1
    assert told["rtneds_heard_seconds_ago",] < 60


def reachable(port):
    try:
        scrape(port)
    except OSError:
        return False
    return True


def until(true, seconds=90):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_counts_rise_on_whoever_counts():
    rising = Rising()
    rising.take({"a": 5}, 1, 10 * S, 100 * S)  # counted before we came
    rising.take({"a": 9, "b": 1}, 1, 11 * S, 101 * S)
    assert rising.totals == {"a": 9, "b": 1}
    rising.take({"a": 2, "b": 0}, 2, S // 2, 102 * S)  # replaced since: it counts from zero
    assert rising.totals == {"a": 11, "b": 1}
    rising.take({"a": 3, "b": 4}, 2, 2 * S, 103 * S)
    assert rising.totals == {"a": 12, "b": 5}
    rising.take({"a": 7, "b": 7}, 3, 90 * S, 104 * S)  # a standby that has counted all along
    assert rising.totals == {"a": 12, "b": 5}
    rising.take({"a": 8, "b": 7}, 3, 91 * S, 105 * S)
    assert rising.totals == {"a": 13, "b": 5}
    rising.take({"a": 1, "b": 8}, 3, 92 * S, 106 * S)  # the same process put together anew
    assert rising.totals == {"a": 14, "b": 6}
    rising.take({str(n): 1 for n in range(10_000)}, 3, 93 * S, 107 * S)
    assert len(rising.totals) == MOST_NAMES


def test_what_breaks_the_rules_is_not_counted_and_does_not_grow():
    metrics = Metrics("p")
    for fields in ({}, {"pid": "x"}, {"pid": 1, "uptime_ns": 1, "bin_counters": 7},
                   {"pid": 1, "uptime_ns": 1, "bin_counters": {"a": -1, "b": "x", "c": 2}},
                   {"pid": 1, "uptime_ns": 1, "actuators": {"x": None}}):  # fmt: skip
        metrics.take(Note("status", fields))
    for n in range(1000):
        metrics.take(Note("trigger", {"rule": f"r{n}", "refused": ["late"]}))
    metrics.take(Note("trigger", {"refused": 5}))
    names = [
        (sample.name, sample.labels.get("counter"))
        for family in metrics.registry.collect()
        for sample in family.samples
    ]
    assert ("rtneds_serve_total", "bins.c") in names
    assert ("rtneds_serve_total", "bins.a") not in names
    assert len(names) < 3 * MOST_NAMES


def test_surprise_is_told_once_it_is_known():
    metrics = Metrics("p")

    def told():
        return metrics.registry.get_sample_value("rtneds_surprise", {"probe": "p"})

    assert math.isnan(told())
    for drift, expected in (
        ({"surprise": 5.5}, 5.5),
        ({"surprise": None}, math.nan),
        ({}, math.nan),
    ):
        metrics.take(Note("status", {"pid": 1, "uptime_ns": 1, "drift": drift}))
        assert told() == pytest.approx(expected, nan_ok=True)


def test_silent_units_are_counted_though_the_status_names_some_of_them():
    metrics, units = Metrics("p"), {"silent": ["a", "b"], "silent_count": 1800}
    metrics.take(Note("status", {"pid": 1, "uptime_ns": 1, "units": units}))
    assert metrics.registry.get_sample_value("rtneds_units_silent", {"probe": "p"}) == 1800


def test_states_of_a_source_are_not_added_up_when_a_worker_is_replaced():
    metrics, value = Metrics("p"), {"unknown_electrodes": 3, "loss_unknown": 1, "spikes": 5}
    for pid in (1, 2):
        metrics.take(Note("status", {"pid": pid, "uptime_ns": 1, "source_counters": value}))
    sample = metrics.registry.get_sample_value
    assert sample("rtneds_unknown_electrodes", {"probe": "p"}) == 3
    assert sample("rtneds_loss_unknown", {"probe": "p"}) == 1
    counted = {"probe": "p", "counter": "source.spikes"}
    assert sample("rtneds_serve_total", counted) == 10
    for name in ("unknown_electrodes", "loss_unknown"):
        assert sample("rtneds_serve_total", counted | {"counter": f"source.{name}"}) is None
    metrics.take(Note("status", {"pid": 2, "uptime_ns": 2}))  # of a source that has none
    assert sample("rtneds_unknown_electrodes", {"probe": "p"}) == 0


def test_mistakes_are_told(capsys, monkeypatch):
    for wrong in ("9469", "x:y", "h:99999", ""):
        with pytest.raises(ConfigError, match="expected HOST:PORT"):
            parse_listen(wrong)
    assert parse_listen("[::1]:80") == ("::1", 80)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["metrics", "--probe", "p", "--listen", address]) == 2
    words = capsys.readouterr().err
    assert words.count("\n") == 1
    assert f"cannot listen at {address}" in words
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    assert main(["metrics", "--probe", "p", "--quiet"]) == 2
    assert "pip install 'rt-neds[metrics]'" in capsys.readouterr().err
