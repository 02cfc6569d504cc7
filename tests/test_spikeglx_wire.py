"""Replies are read the same however they are cut; whatever else comes is refused by kind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_neds.errors import ConfigError
from rt_neds.spikeglx_wire import (
    KINDS,
    MAX_CHANNELS,
    MAX_LINE,
    MAX_LINES,
    Fetch,
    Malformed,
    Refused,
    ReplyReader,
    channel_list,
    fetch,
    introduce,
    number,
    parse_spikeglx_url,
)
from rt_neds.wire import MAX_SAMPLE

ASKED = Fetch(1000, 5, 300)


def give(reader, data, sizes=()):
    """Feed bytes in pieces, through the reader's own space; the reply, and what was not taken."""
    sizes = list(sizes)
    while data:
        space = reader.space()
        assert len(space) > 0
        size = min(len(space), len(data), sizes.pop(0) if sizes else len(data))
        space[:size] = data[:size]
        data = data[size:]
        reply = reader.took(size)
        if reply is not None:
            return reply, data
    return None, data


def samples(first, samples_SC):
    head = f"BINARY_DATA {samples_SC.shape[1]} {len(samples_SC)} uint64({first})\n"
    return head.encode() + samples_SC.astype("<i2").tobytes() + b"OK\n"


def reader_for(asked):
    reader = ReplyReader()
    reader.expect(asked)
    return reader


@st.composite
def replies(draw):
    """``(what was asked, bytes, what they say)``."""
    if draw(st.booleans()):
        lines = draw(st.lists(st.text("abcXYZ 0=_.#", max_size=30), max_size=20))
        lines = [line for line in lines if line != "OK" and not line.startswith("ERROR")]
        return None, "".join(f"{line}\n" for line in [*lines, "OK"]).encode(), tuple(lines)
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from([None, ASKED])), b"ERROR FETCH: Too late.\n", "FETCH: Too late."
    count, first = draw(st.integers(0, 300)), draw(st.integers(1000, MAX_SAMPLE - 1))
    values_SC = np.random.default_rng(draw(st.integers(0, 99))).integers(
        -32768, 32768, (count, 5), dtype=np.int16
    )
    return ASKED, samples(first, values_SC), (first, values_SC.tolist())


def said(reply):
    if reply.error:
        return reply.error
    if reply.samples_SC.shape[1]:
        return reply.first, reply.samples_SC.tolist()
    return reply.lines


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(replies(), st.lists(st.integers(1, 500), max_size=40)), max_size=5))
def test_any_cut_gives_the_same_replies(conversation):
    reader = ReplyReader()
    for (asked, data, what), sizes in conversation:
        reader.expect(asked)
        reply, left = give(reader, data, sizes)
        assert not left
        assert said(reply) == what


def test_byte_by_byte():
    values_SC = np.arange(60, dtype=np.int16).reshape(12, 5)
    reply, _ = give(reader_for(ASKED), samples(1000, values_SC), [1] * 1000)
    assert said(reply) == (1000, values_SC.tolist())


@st.composite
def garbage(draw):
    """A valid reply with bytes changed, cut off or put in, or anything at all."""
    asked, data, _ = draw(replies())
    if draw(st.booleans()):
        return asked, draw(st.binary(max_size=3000))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        to = draw(st.integers(at, min(len(data), at + 40)))
        data = data[:at] + draw(st.binary(max_size=8)) + data[to:]
    return asked, data


@settings(max_examples=150, deadline=None)
@given(garbage(), st.lists(st.integers(1, 500), max_size=20), st.integers(0, 3))
def test_whatever_comes_is_a_reply_or_waits_or_has_a_known_kind(sent, sizes, times):
    asked, data = sent
    reader = reader_for(asked)
    bound = 4 * MAX_LINE + 2 * ASKED.channels * ASKED.most
    kind = KINDS[0]
    try:
        give(reader, data * 3**times, sizes)
    except Malformed as error:
        kind = error.kind
    assert kind in KINDS
    assert len(reader._buffer) <= bound
    assert len(reader._lines) <= MAX_LINES


@pytest.mark.parametrize(
    ("asked", "data", "kind"),
    [
        (ASKED, b"BINARY_DATA 5 1 uint64(1000)\n" + bytes(10) + b"NO\n", "tail"),
        (ASKED, b"BINARY_DATA 5 1 uint64(1000)\n" + bytes(12) + b"OK\n", "tail"),
        (ASKED, b"BINARY_DATA 5 1 uint64(1000)\n" + bytes(10) + b"OK\nX", "excess"),
        (ASKED, b"BINARY_DATA 4 1 uint64(1000)\n", "shape"),
        (ASKED, b"BINARY_DATA 5 301 uint64(1000)\n", "shape"),
        (ASKED, b"BINARY_DATA 5 1 uint64(999)\n", "shape"),
        (ASKED, b"BINARY_DATA 5 1 uint64(%d)\n" % MAX_SAMPLE, "shape"),
        (ASKED, b"BINARY_DATA 99999 999999999 uint64(1000)\n", "shape"),
        (ASKED, b"BINARY_DATA 5 1 uint64(1000)\r\n", "header"),
        (ASKED, b"BINARY_DATA 5 -1 uint64(1000)\n", "header"),
        (ASKED, b"BINARY_DATA 5 1\n", "header"),
        (ASKED, b"OK\n", "header"),
        (None, b"x" * (MAX_LINE + 1), "line"),
        (None, b"x" * MAX_LINE + b"y\n", "line"),
        (None, b"\xe4\n", "line"),
        (None, b"a\n" * (MAX_LINES + 1), "line"),
        (None, b"a\nOK\nb\n", "excess"),
        (None, b"ERROR no\nOK\n", "excess"),
    ],
)
def test_each_fault_has_its_kind(asked, data, kind):
    with pytest.raises(Malformed) as caught:
        give(reader_for(asked), data)
    assert caught.value.kind == kind


@pytest.mark.parametrize("channels", [0, 5, 9, 99999])
def test_a_reply_without_samples_may_count_any_channels(channels):
    reply, left = give(
        reader_for(ASKED), b"BINARY_DATA %d 0 uint64(1000)\nOK\n" % channels, [1] * 99
    )
    assert (len(reply.samples_SC), reply.first, left) == (0, 1000, b"")


def test_bytes_that_nothing_asked_for():
    reader = reader_for(None)
    give(reader, b"half a li")
    with pytest.raises(Malformed, match="9 bytes that nothing asked for"):
        reader.expect(None)


def test_samples_stay_what_they_are_while_a_larger_reply_is_awaited():
    reader = reader_for(Fetch(0, 2, 4))
    reply, _ = give(reader, samples(0, np.full((4, 2), 7, np.int16)))
    reader.expect(Fetch(4, MAX_CHANNELS, 300))
    assert (reply.samples_SC == 7).all()


# -- questions -----------------------------------------------------------------------------------

ANSWERS = {
    "GETVERSION": ["SpikeGLX v20250325 api v4.0.2"],
    "GETSTREAMSAMPLERATE": ["30000.390639"],
    "GETSTREAMACQCHANS": ["3 3 1"],
    "GETSTREAMMAXINT": ["512"],
    "GETSTREAMSN": ["18005116811 0"],
    "GETSTREAMI16TOVOLTS": ["2.34375e-06"],
    "GETGEOMMAP": [
        "head_numShanks=1",
        *(
            f"ch{c}_{name}={value}"
            for c in range(3)
            for name, value in {"s": 0, "x": 27.5, "z": c, "u": 1}.items()
        ),
    ],
}  # fmt: skip


def ask(answers):
    """What :func:`introduce` makes of some answers: an error is a str."""
    from rt_neds.spikeglx_wire import Reply

    talk = introduce(2)
    question = next(talk)
    while True:
        word, *rest = question.command.split()
        assert rest[:2] in ([], ["2", "2"]) or (word, rest) == ("GETGEOMMAP", ["2"])
        answer = answers[word]
        reply = Reply(error=answer) if isinstance(answer, str) else Reply(tuple(answer))
        try:
            question = talk.send(reply)
        except StopIteration as end:
            return end.value


def test_a_probe_as_the_server_describes_it():
    probe = ask(ANSWERS)
    assert (probe.ap, probe.lf, probe.status, probe.max_int) == (3, 3, 1, 512)
    assert probe.rate == 30000.390639
    assert probe.sites_C == ((0, 27.5, 0.0, 1), (0, 27.5, 1.0, 1), (0, 27.5, 2.0, 1))
    assert channel_list(probe) == "0#1#2#6#"
    assert channel_list(probe._replace(lf=0)) == "-1#"
    question = fetch(2, probe, channel_list(probe), 77)
    assert question.command == "FETCH 2 2 77 3000 0#1#2#6# 1"
    assert question.fetch == (77, 4, 3000)


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("GETVERSION", []),
        ("GETVERSION", ["a", "b"]),
        ("GETSTREAMSAMPLERATE", ["nan"]),
        ("GETSTREAMSAMPLERATE", ["-1"]),
        ("GETSTREAMSAMPLERATE", ["3" * 100]),
        ("GETSTREAMACQCHANS", ["384 1"]),
        ("GETSTREAMACQCHANS", ["384 0 0"]),
        ("GETSTREAMACQCHANS", ["0 384 1"]),
        ("GETSTREAMACQCHANS", ["99999999 0 1"]),
        ("GETSTREAMMAXINT", ["zero"]),
        ("GETSTREAMI16TOVOLTS", ["0"]),
        ("GETGEOMMAP", []),
        ("GETGEOMMAP", [line for line in ANSWERS["GETGEOMMAP"] if line != "ch1_z=1"]),
        ("GETGEOMMAP", [*ANSWERS["GETGEOMMAP"], "ch2_x=1e99"]),
    ],
)
def test_answers_that_make_no_sense(word, answer):
    with pytest.raises(Malformed) as caught:
        ask({**ANSWERS, word: answer})
    assert caught.value.kind == "value"


def test_what_the_server_refuses():
    with pytest.raises(Refused, match="never validated"):
        ask(
            {
                **ANSWERS,
                "GETSTREAMSAMPLERATE": "GETSTREAMSAMPLERATE: Run parameters never validated.",
            }
        )


@settings(deadline=None)
@given(st.text(max_size=40))
def test_numbers_are_bounded(text):
    value, kind = 1.0, "value"
    try:
        value = number(text, 1, 10)
    except Malformed as error:
        kind = error.kind
    assert (1 <= value <= 10, kind) == (True, "value")


def test_addresses():
    assert parse_spikeglx_url("spikeglx://rig") == ("rig", 4142, 0)
    assert parse_spikeglx_url("spikeglx://10.0.0.2:5000?probe=3") == ("10.0.0.2", 5000, 3)


@pytest.mark.parametrize(
    "url",
    ["spikeglx://", "spikeglx://h:x", "spikeglx://h:99999", "spikeglx://h/p", "tcp://h:1",
     "spikeglx://h?probe=imec0", "spikeglx://h?prob=1", "spikeglx://h?probe=-1"],
)  # fmt: skip
def test_wrong_addresses_are_told_in_one_line(url):
    with pytest.raises(ConfigError, match="expected spikeglx://HOST:4142"):
        parse_spikeglx_url(url)
