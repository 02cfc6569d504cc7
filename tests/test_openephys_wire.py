"""What Open Ephys says is understood, and whatever else comes is refused by kind."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_neds.errors import ConfigError
from rt_neds.openephys_wire import (
    KINDS,
    MAX_HEADER_BYTES,
    Block,
    Event,
    Malformed,
    Spike,
    electrode_of,
    parse,
    parse_broadcast,
    parse_url,
    reply_to,
    unit_name,
)
from rt_neds.wire import MAX_SAMPLE
from tests import naive_openephys as naive

VALID = [
    (parse, naive.spike(3, "E 1", 9000, sorted_id=2), Spike(3, "ProbeA", "E 1", 2, 9000)),
    (parse, naive.spike(3, "T", 1, channels=4), Spike(3, "ProbeA", "T", 0, 1)),
    (parse, naive.spike(3, "T", 1, samples=1), Spike(3, "ProbeA", "T", 0, 1)),
    (parse, naive.ttl(7, 5, 1, 800, word=32), Event(7, "ProbeA", 800, 5, 1)),
    (parse, naive.data(9, 4, 1024, 512), Block(9, "ProbeA", 4, 1024, 1536, 30000.0)),
    (parse_broadcast, naive.broadcast_spike("E", 5), Spike(None, "ProbeA", "E", 0, 5)),
    (parse_broadcast, naive.broadcast_ttl(2, True, 5), Event(None, "ProbeA", 5, 2, 1)),
    (parse_broadcast, naive.packed_spike(300, 17, 5, sorted_id=3), Spike(None, "300", "17", 3, 5)),
    (parse_broadcast, naive.packed_ttl(300, 6, 1, 5), Event(None, "300", 5, 6, 1)),
]


@pytest.mark.parametrize(("read", "frames", "message"), VALID)
def test_messages_as_the_plugins_write_them(read, frames, message):
    assert read(frames) == message


def header(frames, **changes):
    """The same message with other fields: None takes one away."""
    fields = json.loads(frames[1])
    inner = fields.get("spike") or fields.get("content")
    for name, value in changes.items():
        holder = inner if name in inner else fields
        if value is None:
            del holder[name]
        else:
            holder[name] = value
    return [frames[0], json.dumps(fields).encode(), *frames[2:]]


SPIKE, TTL, DATA = naive.spike(3, "E", 9000), naive.ttl(7, 5, 1, 800), naive.data(9, 4, 1024, 512)


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        ([], "envelope"),
        ([b""], "envelope"),
        ([b"EVENT", *SPIKE[1:]], "envelope"),  # no NUL: not what the plugin sends
        ([DATA[0], *SPIKE[1:]], "envelope"),
        ([SPIKE[0], *DATA[1:]], "envelope"),
        (SPIKE[:1], "frames"),
        ([*SPIKE, b""], "frames"),
        ([SPIKE[0], SPIKE[1][:-1], SPIKE[2]], "json"),  # a name with an umlaut costs the last brace
        ([SPIKE[0], b"\xff\xfe", SPIKE[2]], "json"),
        ([SPIKE[0], b'{"a":' + b"[" * 60_000, SPIKE[2]], "json"),
        ([SPIKE[0], b" " * (MAX_HEADER_BYTES + 1), SPIKE[2]], "json"),
        (header(SPIKE, type="parameter"), "field"),
        (header(SPIKE, message_num=0), "field"),
        (header(SPIKE, message_num=None), "field"),
        (header(SPIKE, electrode=None), "field"),
        (header(SPIKE, electrode="x" * 257), "field"),
        (header(SPIKE, sample_num=-1), "field"),
        (header(SPIKE, sample_num=1 << 60), "field"),
        (header(SPIKE, sample_num=10**400), "field"),
        (header(SPIKE, sample_num=1.5), "field"),
        (header(SPIKE, sorted_id=65536), "field"),
        (header(SPIKE, num_channels=1 << 40), "field"),
        (header(DATA, sample_rate=0), "field"),
        (header(DATA, sample_rate=1.0), "field"),  # it would end serve: no bin has a sample
        (header(DATA, num_samples=0), "field"),
        (header(SPIKE, num_channels=2), "payload"),
        ([*SPIKE[:2], SPIKE[2][:-1]], "payload"),
        (SPIKE[:2], "payload"),
        (header(TTL, data_size=9), "payload"),
        ([*TTL[:2], TTL[2][:9]], "payload"),
        (header(DATA, num_samples=511), "payload"),
        ([*DATA[:2], DATA[2][4:]], "payload"),
    ],
)
def test_each_fault_has_its_kind(frames, kind):
    with pytest.raises(Malformed) as caught:
        parse(frames)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        ([], "envelope"),
        ([b"spike", b"{}"], "envelope"),  # the topics of the plugin's documentation
        (naive.packed_spike(1, 2, 3)[:1], "frames"),
        ([b"\0\0", naive.broadcast_spike("E", 5)[1]], "envelope"),
        ([b"\1\0", b"{"], "json"),
        ([b"\1\0", b'{"event_type":"spike"}'], "field"),
        ([b"\1\0", naive.packed_spike(1, 2, 3)[1][:-1]], "payload"),
        ([b"\1\0", naive.packed_spike(1, 2, 3)[1][:30]], "payload"),
        ([b"\1\0", b"\4"], "payload"),
        (naive.packed_spike(1, 2, -3), "field"),
        ([b"\0\0", naive.packed_ttl(1, 2, 3, 4)[1] + b"\0"], "payload"),
    ],
)
def test_each_fault_of_a_broadcast_has_its_kind(frames, kind):
    with pytest.raises(Malformed) as caught:
        parse_broadcast(frames)
    assert caught.value.kind == kind


@st.composite
def mutated(draw):
    """A valid message with bytes changed, cut off or put in, or frames dropped, in any frame."""
    frames = list(draw(st.sampled_from([frames for _, frames, _ in VALID])))
    for _ in range(draw(st.integers(1, 4))):
        which = draw(st.integers(0, len(frames) - 1))
        frame = frames[which]
        at = draw(st.integers(0, len(frame)))
        to = draw(st.integers(at, len(frame)))
        frames[which] = frame[:at] + draw(st.binary(max_size=8)) + frame[to:]
        if len(frames) > 1 and draw(st.integers(0, 9)) == 0:
            del frames[which]
    return frames


@settings(max_examples=400, deadline=None)
@given(st.one_of(mutated(), st.lists(st.binary(max_size=200), max_size=5)))
def test_whatever_comes_is_a_message_or_a_fault_of_a_known_kind(frames):
    for read in (parse, parse_broadcast):
        try:
            message = read(frames)
        except Malformed as error:
            kind, sample = error.kind, 0
        else:
            kind, sample = KINDS[0], message[3] if isinstance(message, Block) else message.sample
        assert kind in KINDS
        assert 0 <= sample < MAX_SAMPLE


@given(st.text(min_size=1, max_size=20), st.integers(0, 65535))
def test_unit_ids_lead_back_to_electrode_and_sorted_id(electrode, sorted_id):
    unit = unit_name(electrode, sorted_id)
    assert unit_name(*electrode_of(unit)) == unit
    if sorted_id:
        assert electrode_of(unit) == (electrode, sorted_id)


@pytest.mark.parametrize("unit", ["a#", "a#0", "a#07", "#3", "a#65536", "a#1234567", "a#x", "a#²"])
def test_what_is_no_sorted_id_belongs_to_the_name(unit):
    assert electrode_of(unit) == (unit, 0)


def test_addresses():
    assert parse_url("openephys://rig") == ("rig", 5556, "", False)
    assert parse_url("openephys://10.0.0.2:6000?stream=ProbeA-AP") == (
        "10.0.0.2", 6000, "ProbeA-AP", False,
    )  # fmt: skip
    assert parse_url("openephys-events://rig") == ("rig", 5557, "", True)


@pytest.mark.parametrize(
    "url",
    ["openephys://", "openephys://h:x", "openephys://h:99999", "openephys://h/p", "tcp://h:1",
     "openephys://h:5556?strem=A", "openephys"],
)  # fmt: skip
def test_wrong_addresses_are_told_in_one_line(url):
    with pytest.raises(ConfigError, match=r"expected openephys://HOST:5556"):
        parse_url(url)


def test_heartbeats_are_answered_in_the_plugins_words():
    assert reply_to(b'{"application":"a","uuid":"u","type":"heartbeat"}') == b"heartbeat received"
    assert reply_to(b'{"type":"event","event":{"type":3}}') == b"message correctly parsed"
    assert reply_to(b"{") == b"JSON message could not be read"
