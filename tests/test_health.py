"""What is said in words is what frames and counters say in numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rt_neds.frames import DecodedFrame, Flag
from rt_neds.health import FLAGS, GREW, RECENT_NS, Health, counter
from rt_neds.stream.publisher import Note

S = 1_000_000_000


def frame(bin_: int, flags: int = 0, epoch: int = 1) -> DecodedFrame:
    return DecodedFrame(
        probe="imec0",
        epoch=epoch,
        bin=bin_,
        end=bin_ * 600,
        values_V=np.zeros(2, np.float32),
        flags=flags,
        spikes=0,
        late=0,
        unknown=0,
        lost=0,
        model="m",
        stamps={},
    )


def status(uptime_s: float = 100, source: str = "streaming", **more: Any) -> Note:
    return Note("status", {"source": source, "uptime_ns": int(uptime_s * S), **more})


def said(health: Health, now_ns: int) -> str:
    return "; ".join(finding.says for finding in health.findings(now_ns))


def test_all_well_says_nothing():
    health = Health()
    for second in range(20):
        health.take(status(second, source_counters={"lost": 3}), second * S)
        health.take(frame(second), second * S)
    assert health.findings(19 * S) == []


@pytest.mark.parametrize(("beyond", "told"), [(2, False), (3, True), (50, True)])
def test_a_live_behaviour_in_another_unit_is_told(beyond, told):
    health = Health()
    for second, (shown, out) in enumerate([(1000, 7), (1050, 7 + beyond)]):
        live = {"wheel_speed": {"shown": shown, "hidden": 0, "beyond": out}}
        health.take(status(live=live), second * S)
    words = f"wheel_speed was beyond what training saw in {beyond} of 50 bins just now"
    assert (words in said(health, S)) is told


def test_nobody_heard_and_no_longer_heard():
    health = Health()
    assert "no serve heard" in said(health, 0)
    health.take(status(), S)
    assert health.findings(2 * S) == []
    assert "not heard for 9 s" in said(health, 10 * S)


@pytest.mark.parametrize("flag", list(FLAGS))
def test_every_flag_of_the_last_frame_has_a_sentence(flag):
    health = Health()
    health.take(frame(1, int(flag)), S)
    assert FLAGS[flag][0] in said(health, S)
    health.take(frame(2), S)
    assert health.findings(S) == []


def test_each_of_several_flags_has_its_sentence():
    health = Health()
    health.take(frame(1, Flag.GAP | Flag.SLIPPED), S)
    assert {finding.says for finding in health.findings(S)} == {
        FLAGS[Flag.GAP][0], FLAGS[Flag.SLIPPED][0],
    }  # fmt: skip


def test_a_source_of_which_nothing_came_yet_is_told():
    health = Health()
    health.take(status(1, "waiting"), S)
    assert said(health, S) == "no spikes have come yet"


def test_flags_are_all_known():
    assert set(FLAGS) == set(Flag)


@pytest.mark.parametrize("path", list(GREW))
def test_what_grew_is_said_for_ten_seconds_and_then_no_more(path):
    group, name = path.split(".")
    name = name.replace("*", "_header")
    health = Health()
    health.take(status(1, **{group: {name: 7}}), S)
    health.take(status(2, **{group: {name: 12}}), 2 * S)
    assert GREW[path].says.format(n=5) in said(health, 2 * S)
    after = 2 + RECENT_NS // S + 1
    for second in range(3, after + 1):
        health.take(status(second, **{group: {name: 12}}), second * S)
    assert health.findings(after * S) == []


@pytest.mark.parametrize(
    ("spikes", "other", "told"), [(0, 900, True), (1, 900, False), (0, 0, False)]
)
def test_messages_of_other_streams_and_no_spikes_are_told(spikes, other, told):
    health = Health()
    for second, grown in enumerate((0, 1)):
        counts = {"spikes": 7 + grown * spikes, "other_stream": 5 + grown * other}
        health.take(status(second, source_counters=counts), second * S)
    words = "no spike came just now, but 900 messages of other streams of Open Ephys"
    assert (words in said(health, S)) is told


def test_what_spikeglx_lost_is_samples_and_said_once():
    health = Health()
    for second, lost in ((1, 0), (2, 7)):
        counters = {"lost": 3 * lost, "missed": lost, "skipped": 2 * lost, "too_late": 0}
        health.take(status(second, source_counters=counters), second * S)
    assert [finding.says for finding in health.findings(2 * S)] == [
        "7 samples of SpikeGLX lost just now",
        "14 samples of SpikeGLX skipped to catch up just now",
    ]


def test_another_process_counts_anew():
    health = Health()
    health.take(status(500, source_counters={"lost": 2}), S)
    health.take(status(1, source_counters={"lost": 9}), 2 * S)
    assert health.findings(2 * S) == []


def test_bins_that_never_came():
    health = Health()
    for bin_ in (1, 2, 6):
        health.take(frame(bin_), S)
    assert "3 bins were not heard" in said(health, S)
    health.take(frame(900, epoch=2), S)  # another acquisition is no hole
    assert "3 bins" in said(health, S)
    later = S + RECENT_NS + 1
    health.take(frame(901, epoch=2), later)
    assert health.findings(later) == []


def test_source_units_triggers_and_drift():
    health = Health()
    rule = {"fired": 1, "refused": 0, "fired_ns": 5, "why": []}
    hand = {"done": 1, "overdue": 0, "late": 0, "failed": 0, "dropped": 0, "took_ms": 0.1}
    units = {"bundle": 300, "missing": 12, "unknown": 0}
    health.take(status(1, triggers={"go": rule}, actuators={"go.ttl": hand}), S)
    health.take(
        status(
            2,
            "silent",
            units=units,
            triggers={"go": rule | {"refused": 2, "why": ["late"]}},
            actuators={"go.ttl": hand | {"failed": 1, "overdue": 2}},
            drift={"drifted": True, "surprise": 3.21, "seconds": 30.0},
        ),
        2 * S,
    )
    health.take(frame(1, Flag.MISSING_UNITS), 2 * S)
    findings = health.findings(2 * S)
    text = said(health, 2 * S)
    for words in (
        "no spikes are arriving",
        "12 of 300 units",
        "trigger go held, and was refused: late",
        "go.ttl: 1 failed",
        "go.ttl: 2 overdue",
        "3.2 times as far",
    ):
        assert words in text
    levels = [finding.level for finding in findings]
    assert levels == sorted(levels, key=["wrong", "doubtful", "note"].index)


@pytest.mark.parametrize(("silent", "named"), [(3, "a, b, c"), (4, "a, b, c ...")])
def test_units_that_fell_silent_are_named_and_it_is_said_once(silent, named):
    health, units = Health(), {"bundle": 9, "missing": 0, "unknown": 0}
    units |= {"silent": list("abcd")[:silent], "silent_count": silent}
    health.take(status(1, units=units), S)
    health.take(frame(1, Flag.MISSING_UNITS), S)
    assert said(health, S) == f"{silent} of 9 units have fallen silent ({named})"


def test_what_was_not_observed_or_refused_is_said_when_it_grows_and_not_for_ever():
    health = Health()
    for second, more in ((1, 0), (2, 5), (13, 5)):
        live = {"wheel_speed": {"shown": 50, "hidden": 7 + more, "beyond": 0}}
        rule = {"fired": 0, "refused": 1 + more, "fired_ns": 0, "why": ["late"]}
        health.take(status(second, live=live, triggers={"go": rule}), second * S)
        told = [
            "wheel_speed was not observed in 5 bins just now; decoded without it",
            "trigger go held, and was refused: late",
        ]
        assert said(health, second * S) == "; ".join(told * (second == 2))


def test_a_capture_played_again_is_told_from_an_acquisition_that_is_silent():
    health = Health()
    for second, repeated in ((1, 5), (2, 905)):
        health.take(status(second, "silent", source_counters={"repeated": repeated}), second * S)
    assert "nothing new is arriving: 900 messages that were had before" in said(health, 2 * S)
    assert "no spikes are arriving" not in said(health, 2 * S)


def test_trouble_of_a_source_is_said_in_its_own_words():
    health = Health()
    health.take(status(1, "waiting", trouble="nothing listens at 127.0.0.1:4142"), S)
    assert said(health, S) == "nothing listens at 127.0.0.1:4142"


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30))
def test_whatever_a_counter_does_only_its_growth_is_said(values):
    health = Health()
    for second, value in enumerate(values, start=1):
        health.take(status(second, source_counters={"lost": value}), second * S)
    window = values[-1 - min(len(values) - 1, RECENT_NS // S) :]
    grew = window[-1] - window[0]
    expected = [f"{grew} messages of the source lost just now"] if grew > 0 else []
    assert [finding.says for finding in health.findings(len(values) * S)] == expected


def test_counters_of_one_beginning_are_summed():
    of = {"source_counters": {"malformed_header": 2, "malformed_spike": 3, "messages": 9}}
    assert counter(of, "source_counters.malformed*") == 5
    assert counter(of, "source_counters.none") == 0
