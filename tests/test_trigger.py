"""Rules: what is written is what is meant, and each event is decided once."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_neds.condition import MAX_DEPTH, parse_condition, value_names
from rt_neds.errors import ConfigError
from rt_neds.frames import DecodedFrame, Flag
from rt_neds.stream.trigger import HANDED, NO_AGE, Triggered, Triggers, bins_of
from rt_neds.trigger_config import TriggerConfig, rules_of
from tests import naive_trigger

OUTPUTS = [
    {"name": "wheel_speed", "kind": "continuous", "classes": [], "offset": 0, "size": 2},
    {"name": "choice", "kind": "categorical", "classes": ["left", "right"], "offset": 2, "size": 2},
    {"name": "licks", "kind": "poisson", "classes": [], "offset": 4, "size": 1},
    {"name": "block", "kind": "categorical", "classes": ["0.2", "a b"], "offset": 5, "size": 2},
]
SCHEMA = {"outputs": OUTPUTS, "bin_ms": 20.0, "rate": 30_000.0}
NAMES = value_names(OUTPUTS)
MS = 1_000_000


def test_names_are_those_of_the_schema():
    assert NAMES == {
        "wheel_speed": 0, "wheel_speed.sd": 1, "choice.left": 2, "choice.right": 3, "licks": 4,
        "block.0.2": 5, "block.a b": 6,
    }  # fmt: skip


def made(frames, schema=SCHEMA, **options):
    """Triggers of one rule, and what it said of some frames."""
    rules = rules_of({"p": {"go": TriggerConfig(**options)}})
    triggers = Triggers(rules)
    triggers.bind(schema)
    return [triggers.take(frame) for frame in frames], triggers


def frame(bin_, values, flags=0, epoch=1, age_ms=None, monkey=0):
    stamps = {"decoded": 7}
    if age_ms is not None:
        stamps["ended"] = monkey - round(age_ms * MS)
    values_V = np.zeros(7, np.float32)
    values_V[: len(values)] = values
    return DecodedFrame(
        "p", epoch, bin_, 600 * (bin_ + 1), values_V, flags, 0, 0, 0, 0, "m", stamps
    )


# -- the grammar ---------------------------------------------------------------------------------

comparisons = st.tuples(
    st.sampled_from(["<", "<=", ">", ">="]),
    st.sampled_from([n for n in NAMES if n[-1] not in "b2"]),
    st.integers(-2, 2).map(lambda n: n / 2),
    st.booleans(),  # the number first
)
trees = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.tuples(st.just("not"), inner),
        st.tuples(st.sampled_from(["and", "or"]), inner, inner),
        st.tuples(st.sampled_from(["and", "or"]), inner, inner, inner),
    ),
    max_leaves=12,
)
values = st.lists(
    st.one_of(st.integers(-2, 2).map(lambda n: n / 2), st.just(float("nan")), st.just(np.inf)),
    min_size=7, max_size=7,
)  # fmt: skip


@given(trees, st.lists(values, min_size=1, max_size=5))
def test_a_condition_means_what_its_tree_means(tree, rows):
    frames = [frame(2 * n, row) for n, row in enumerate(rows)]  # holes: every bin is an event
    took, _ = made(frames, when=naive_trigger.written(tree))
    fired, last = [], False
    for row, said in zip(rows, took, strict=True):
        true = naive_trigger.holds(tree, {name: row[at] for name, at in NAMES.items()})
        fired.append(bool(said))
        assert bool(said) == (bool(true) and not last)  # decided events end when it is false
        last = bool(true)


@pytest.mark.parametrize(
    ("text", "values", "true"),
    [
        ("wheel_speed<-0.5", [-1], True),
        ("0.9 < choice.left and wheel_speed <= .5", [0.5, 0, 0.95], True),
        ("0 < licks or 0 > licks", [], False),
        ("0 <= licks and 0 >= licks", [], True),
        ("not licks > 1 or choice.left > 2", [], True),
        ("not (licks > 1 or choice.left > -1)", [], False),
        # and binds tighter than or, not tighter than and
        ("licks > 1 and licks > 1 or licks < 1", [], True),
        ("licks > 1 and (licks > 1 or licks < 1)", [], False),
        ("not licks > 1 and licks > 1", [], False),
        ("'block.a b' >= 1e0 and block.0.2 < +2", [0, 0, 0, 0, 0, 1, 1], True),
        ("wheel_speed.sd > 0.25", [0, 0.5], True),
        ('"block.a b" >= 1', [0, 0, 0, 0, 0, 1, 1], True),
        ("\n  licks > -1\n", [], True),
    ],
)
def test_examples(text, values, true):
    took, _ = made([frame(0, values)], when=text)
    assert bool(took[0]) is true


@pytest.mark.parametrize("true", [True, False])
def test_the_deepest_condition_is_still_found_right(true):
    text = "licks > 1 or licks < 1 and (" * MAX_DEPTH + "licks < 1" + ")" * MAX_DEPTH
    took, _ = made([frame(0, [])], when=text if true else text.replace("(licks <", "(licks >"))
    assert bool(took[0]) is true
    text = "not " * MAX_DEPTH + f"choice.left {'>' if true else '<'} -1"
    took, _ = made([frame(0, [])], when=text)
    assert bool(took[0]) is true


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing at character 1 .*expected an output"),
        ("whel_speed > 1", "'whel_speed' at character 1 .*one of the outputs wheel_speed, .*licks"),
        ("choice > 1", "'choice' at character 1 .*choice.left, choice.right"),
        ("licks > 1 and", "nothing at character 14 .*expected an output"),
        ("licks > 1 licks < 2", "'licks' at character 11 .*expected and, or, or the end"),
        ("licks >> 1", "'>' at character 8 .*expected a number"),
        ("licks = 1", "'= 1' at character 7 .*<, <=, >"),
        ("licks == 1", "'== 1' at character 7"),
        ("licks > inf", "'inf' at character 9 .*expected a number"),
        ("licks > 1e999", "expected a number"),
        ("licks > nan", "expected a number"),
        ("licks > 1x", "'1x' at character 9"),
        ("(licks > 1", "nothing at character 11 .*expected and, or, or \\)"),
        ("licks > 1)", "'\\)' at character 10"),
        ("1 < 2", "'2' at character 5 .*expected an output"),
        ("licks > choice.left", "'choice.left' at character 9 .*expected a number"),
        ("0 < licks < 1", "'<' at character 11 .*expected and, or, or the end"),
        ("__import__('os')", "'__import__' at character 1"),
        ("not " * 30 + "licks > 1", f"at most {MAX_DEPTH} brackets"),
        ("(" * 600, f"at most {MAX_DEPTH} brackets"),
        ("licks > 1 or " * 100 + "licks > 2", "at most 1000"),
        ("and", "'and' at character 1"),
        ("licks > 1 \x00", "at character 11"),
    ],
)
def test_mistakes_are_told_in_one_line_that_names_the_place(text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_condition(text, NAMES, "trigger go")
    assert str(caught.value).startswith("trigger go: ")
    assert "\n" not in str(caught.value)


@given(st.text(max_size=60))
@settings(max_examples=300)
def test_no_text_does_anything_but_parse_or_say_why_not(text):
    with contextlib.suppress(ConfigError):
        assert parse_condition(text, NAMES, "trigger go")


# -- events --------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.sampled_from([1] * 8 + [2, 5]),  # bins further
        st.sampled_from([0] * 12 + [1]),  # another acquisition
        st.booleans(),
        st.sampled_from([0, 0, 0, 2, 36, 128]),
        st.sampled_from([NO_AGE, 5 * MS, 40 * MS, 40 * MS + 1]),
    ),
    max_size=60,
)


@given(
    steps,
    st.sampled_from([0, 20, 60, 61]),
    st.sampled_from([0, 100, 400]),
    st.sampled_from([0, 40]),
    st.sampled_from([0, 2 | 4, 255]),
)
def test_every_event_is_decided_once_as_the_plain_twin_decides(steps, hold, refractory, age, mask):
    names = [str(flag.name).lower() for flag in Flag if flag & mask]
    options = {"hold_ms": hold, "refractory_ms": refractory, "max_age_ms": age, "refuse": names}
    config = TriggerConfig(when="licks > 0.5", **options)
    triggers = Triggers(rules_of({"p": {"go": config}}))
    triggers.bind(SCHEMA)
    plain, got, epoch, bin_ = [], [], 1, 0
    for further, another, true, flags, how_old in steps:
        epoch, bin_ = (epoch + 1, 0) if another else (epoch, bin_ + further)
        plain.append((epoch, bin_, true, flags, how_old))
        one = frame(bin_, [0, 0, 0, 0, float(true)], flags, epoch)
        if how_old != NO_AGE:
            one.stamps["ended"] = 0
        got.append(take_at(triggers, one, how_old))
    expected = naive_trigger.decisions(
        plain, max(1, bins_of(hold, 20)), bins_of(refractory, 20), age * MS, mask
    )
    words = {int(flag): str(flag.name).lower() for flag in Flag}
    for said, reasons in zip(got, expected, strict=True):
        if reasons is None:
            assert said == ()
        else:
            assert set(said[0]["refused"]) == {words.get(reason, reason) for reason in reasons}
    decided = [said[0]["refused"] for said in got if said]
    status = triggers.status()["go"]
    assert (status["fired"], status["refused"]) == (decided.count([]), sum(map(bool, decided)))


def take_at(triggers, one, now):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rt_neds.stream.trigger.monotonic_ns", lambda: now)
        return triggers.take(one)


def test_a_bin_that_lasts_is_held_for_its_width_and_fires_once():
    on, off = [0, 0, 0, 0, 1], []
    took, triggers = made([frame(n, on) for n in range(10)], when="licks > 0.5", hold_ms=60)
    assert [n for n, said in enumerate(took) if said] == [2]
    assert took[2] == [
        {"rule": "go", "epoch": 1, "bin": 2, "sample": 1800, "decoded_ns": 7,
         "sent_ns": took[2][0]["sent_ns"], "refused": []}
    ]  # fmt: skip
    assert triggers.take(frame(10, off)) == ()
    assert [bool(triggers.take(frame(n, on))) for n in range(11, 15)] == [False, False, True, False]


def test_a_refused_event_does_not_fire_later():
    on = [0, 0, 0, 0, 1]
    frames = [frame(0, on, Flag.WARMING | Flag.GAP), *(frame(n, on) for n in range(1, 5))]
    took, _ = made(frames, when="licks > 0.5")
    assert [said[0]["refused"] if said else None for said in took] == [["gap", "warming"]] + [
        None
    ] * 4


def test_what_was_held_over_bins_not_to_be_believed_does_not_fire():
    on, off = [0, 0, 0, 0, 1], []
    held = [Flag.STALE | Flag.LATE, Flag.UNKNOWN_UNITS, 0]
    frames = [frame(n, on, flags) for n, flags in enumerate(held)]
    frames += [frame(3, off, Flag.GAP), *(frame(n, on) for n in (4, 5, 6))]
    # A hole breaks the hold, so that what came before it is held no more.
    frames += [frame(7, off), frame(8, on, Flag.GAP), *(frame(n, on) for n in (10, 11, 12))]
    took, _ = made(frames, when="licks > 0.5", hold_ms=60)
    assert [(said[0]["bin"], said[0]["refused"]) for said in took if said] == [
        (2, ["late", "stale", "unknown_units"]), (6, []), (12, []),
    ]  # fmt: skip
    took, _ = made(frames[:3], when="licks > 0.5", hold_ms=60, refuse=["unknown_units"])
    assert took[2][0]["refused"] == ["unknown_units"]


def drift(surprise):
    return {"drift": {"surprise": surprise, "drifted": surprise is not None and surprise > 2}}


def test_nothing_fires_while_units_have_drifted_unless_told_to():
    on, off = [0, 0, 0, 0, 1], []
    for refuse, told in ((None, ["drifted"]), (["late"], [])):
        options = {} if refuse is None else {"refuse": refuse}
        _, triggers = made([], when="licks > 0.5", **options)
        bins = iter(range(99))

        def decided(triggers=triggers, bins=bins):
            (said,) = triggers.take(frame(next(bins), on))
            triggers.take(frame(next(bins), off))
            return said["refused"]

        for status, expected in (
            ({}, []), (drift(None), []), (drift(1.1), []), (drift(2.5), told),
            (drift(None), told),  # a worker that has just begun does not know
            ({"drift": {}}, told), (drift(1.0), []),
        ):  # fmt: skip
            triggers.heed(status)
            assert decided() == expected


def test_whoever_decides_next_knows_what_was_decided():
    """State is in memory that forks share: here another Triggers on the same memory."""
    on = [0, 0, 0, 0, 1]
    took, before = made([frame(n, on) for n in range(3)], when="licks > 0.5", refractory_ms=1000)
    assert took[0]
    after = Triggers(rules_of({"p": {"go": TriggerConfig(when="licks > 0.5", refractory_ms=1000)}}))
    after._state_RC, after._stream = before._state_RC, before._stream
    after.bind(SCHEMA)
    assert after.take(frame(7, on)) == ()  # the event goes on behind the hole
    assert after.take(frame(8, [])) == ()
    assert after.take(frame(9, on))[0]["refused"] == ["refractory"]
    assert after.take(frame(10, [])) == ()
    assert after.take(frame(0, on, epoch=2))[0]["refused"] == ["refractory"]
    assert after.take(frame(1, [], epoch=2)) == ()
    assert after.take(frame(49 - 11, [], epoch=2)) == ()
    assert after.take(frame(50 - 11, on, epoch=2))[0]["refused"] == []
    assert after.status()["go"]["fired"] == 2


def test_whoever_decides_next_knows_what_was_held():
    on, options = [0, 0, 0, 0, 1], {"when": "licks > 0.5", "hold_ms": 40}
    _, before = made([frame(0, on, Flag.LATE)], **options)
    after = Triggers(rules_of({"p": {"go": TriggerConfig(**options)}}))
    after._state_RC, after._stream = before._state_RC, before._stream
    after.bind(SCHEMA)
    assert after.take(frame(1, on))[0]["refused"] == ["late"]


def test_what_fires_is_handed_over_with_the_time_that_is_left():
    handed = []
    configs = {"slow": TriggerConfig(when="licks > 0.5"),
               "go": TriggerConfig(when="licks > 0.5", max_age_ms=40)}  # fmt: skip
    rules = rules_of({"o": {"other": TriggerConfig(when="licks > 0.5")}, "p": configs})
    triggers = Triggers(rules[1:], handed.append)
    triggers.bind(SCHEMA)
    one = frame(0, [0, 0, 0, 0, 1])
    one.stamps["ended"] = 0
    said = take_at(triggers, one, 30 * MS)
    assert [(s["rule"], s["refused"]) for s in said] == [("slow", []), ("go", [])]
    assert [HANDED.unpack(h) for h in handed] == [
        (1, 30 * MS, 1030 * MS), (2, 30 * MS, 40 * MS),
    ]  # fmt: skip


def test_frames_before_the_schema_and_of_another_length_decide_nothing():
    triggers = Triggers(rules_of({"p": {"go": TriggerConfig(when="licks > 0.5")}}))
    assert triggers.take(frame(0, [0, 0, 0, 0, 1])) == ()
    triggers.bind(SCHEMA)
    short = frame(0, [])
    short.values_V = np.ones(6, np.float32)
    assert triggers.take(short) == ()


def test_values_are_where_the_last_schema_says():
    _, triggers = made([], when="licks > 0.5")
    moved = [{**output, "offset": 6 - output["offset"]} for output in OUTPUTS if output["size"] < 2]
    assert triggers.take(frame(0, [0, 0, 1])) == ()
    triggers.bind({**SCHEMA, "outputs": moved})
    assert triggers.take(frame(1, [0, 0, 1]))


def test_the_status_says_when_a_rule_fired_last_and_why_it_did_not():
    on, off = [0, 0, 0, 0, 1], []
    _, triggers = made([], when="licks > 0.5")
    assert triggers.status() == {"go": {"fired": 0, "refused": 0, "fired_ns": 0, "why": []}}
    for n, (values, flags) in enumerate([(on, 0), (off, 0), (on, Flag.GAP)]):
        take_at(triggers, frame(n, values, flags), (70 + n) * MS)
    assert triggers.status() == {
        "go": {"fired": 1, "refused": 1, "fired_ns": 70 * MS, "why": ["gap"]}
    }


@pytest.mark.parametrize(
    ("ms", "bin_ms", "bins"),
    [(0, 20, 0), (60, 20, 3), (61, 20, 4), (99.9, 33.3, 3), (20, 33.3, 1)],
)
def test_so_many_bins_last_at_least_so_long(ms, bin_ms, bins):
    assert bins_of(ms, bin_ms) == bins


def test_the_sink_says_what_was_decided_after_the_frame():
    came = []

    class Sink:
        def write(self, frame):
            came.append(frame.bin)

        def note(self, kind, fields):
            came.append((kind, fields))

        def beside(self, probe):
            return self

    triggers = Triggers(rules_of({"p": {"go": TriggerConfig(when="licks > 0.5")}}))
    sink = Triggered(Sink(), {"p": triggers}, "q")
    sink.note("schema", SCHEMA)
    sink.write(frame(0, [0, 0, 0, 0, 1]))
    assert [c for c in came if c != ("schema", SCHEMA)] == [0]  # no rules of that probe
    other = sink.beside("p")
    other.note("schema", SCHEMA)
    other.write(frame(1, [0, 0, 0, 0, 1]))
    assert came[-2] == 1
    assert came[-1][0] == "trigger"
    assert came[-1][1]["bin"] == 1
    other.write(frame(2, []))
    other.note("status", drift(2.5))
    other.write(frame(3, [0, 0, 0, 0, 1]))
    assert came[-1][1]["refused"] == ["drifted"]
