"""Wire protocol v1: what is packed is unpacked; what is broken is refused and counted."""

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_neds import wire
from rt_neds.errors import WireError
from rt_neds.frames import SPIKE_DTYPE, DecodedFrame, SpikeBatch


def records(n=3):
    out = np.zeros(n, SPIKE_DTYPE)
    out["sample"] = np.arange(n) + 100
    out["unit"] = np.arange(n)
    return out


def header(**changes):
    fields = {"v": 1, "epoch": 7, "seq": 0, "first": 0, "end": 30, "rate": 30_000.0, "n": 3,
              "sent_ns": 1}  # fmt: skip
    return msgpack.packb({k: v for k, v in {**fields, **changes}.items() if v is not None})


def test_the_record_is_sixteen_little_endian_bytes():
    assert SPIKE_DTYPE.itemsize == 16
    assert [SPIKE_DTYPE.fields[name][1] for name in ("sample", "unit", "spare")] == [0, 8, 12]
    one = np.zeros(1, SPIKE_DTYPE)
    one["sample"], one["unit"] = 0x0102030405060708, 0x0A0B0C0D
    assert one.tobytes().hex() == "08070605040302010d0c0b0a00000000"


@settings(deadline=None)
@given(
    epoch=st.integers(-(2**63), 2**63 - 1),
    seq=st.integers(0, 2**62),
    first=st.integers(0, 2**49),
    length=st.integers(0, 10_000),
    n=st.integers(0, 50),
)
def test_spikes_round_trip(epoch, seq, first, length, n):
    batch = SpikeBatch(epoch, seq, first, first + length, 30_000.0, 5, 0, records(n))
    topic, fields, payload = wire.pack_spikes("imec0", batch)
    assert topic == b"spikes/imec0"
    back = wire.unpack_spikes(fields, payload, received_ns=9)
    assert (back.epoch, back.seq, back.first, back.end) == (epoch, seq, first, first + length)
    assert (back.rate, back.sent_ns, back.received_ns) == (30_000.0, 5, 9)
    np.testing.assert_array_equal(back.records_S, batch.records_S)


def test_decoded_round_trip():
    stamps = {"sent": 1, "received": 2, "binned": 3, "decoded": 4, "published": 5}
    frame = DecodedFrame("imec0", 1, 2, 1800, np.float32([1.5, -2]), 5, 10, 1, 2, 3, "abc", stamps)
    topic, fields = wire.pack_decoded(frame)
    assert topic == b"decoded/imec0"
    assert set(msgpack.unpackb(fields)) == {
        "v", "probe", "epoch", "bin", "end", "values", "flags", "spikes", "late", "unknown", "lost",
        "model", "stamps",
    }  # fmt: skip
    back = wire.unpack_decoded(fields)
    np.testing.assert_array_equal(back.values_V, frame.values_V)
    assert back.stamps == stamps
    assert (back.bin, back.flags, back.model) == (2, 5, "abc")


def test_source_round_trip():
    _, fields = wire.pack_source("p", epoch=1, rate=3e4, session="s", units=["a", "b"])
    assert wire.unpack_source(fields) == ("s", 3e4, ["a", "b"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"v": 2}, "version"),
        ({"n": 4}, "payload"),
        ({"n": -1}, "n -1"),
        ({"n": 10**9}, "n 1000000000"),
        ({"first": -1}, "samples"),
        ({"end": -5}, "samples"),
        ({"first": 40}, "samples"),
        ({"end": 2**60}, "samples"),
        ({"first": 2**50 - 30, "end": 2**50}, "samples"),
        ({"seq": -1}, "seq"),
        ({"seq": "0"}, "seq"),
        ({"seq": True}, "seq"),
        ({"epoch": 2**63}, "epoch"),
        ({"epoch": None}, "epoch"),
        ({"rate": 0.0}, "rate"),
        ({"rate": 999.0}, "rate"),
        ({"rate": 1.1e7}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": None}, "rate"),
    ],
)
def test_broken_headers_are_refused_by_name(change, word):
    with pytest.raises(WireError, match=word):
        wire.unpack_spikes(header(**change), records().tobytes(), 0)


def test_a_leap_is_more_than_a_minute_or_sixty_thousand_messages():
    def leaps(seq, first):
        return wire.leaps(SpikeBatch(1, seq, first, first, 3e4, 0, 0, records(0)), 5, 1000)

    assert not leaps(5 + 60_000, 1000 + 60 * 30_000)
    assert leaps(5 + 60_001, 1000)
    assert leaps(5, 1001 + 60 * 30_000)


@pytest.mark.parametrize(
    ("epoch", "seq", "first", "follows"),
    [
        (1, 1, 0, True),
        (1, 60_000, 60 * 30_000, True),
        (2, 1, 0, False),  # another acquisition says nothing of this one
        (1, 0, 0, False),  # the same once more
        (1, 1, -1, False),
        (1, 60_001, 0, False),
        (1, 1, 60 * 30_000 + 1, False),
    ],
)
def test_a_leap_is_believed_for_what_comes_soon_after(epoch, seq, first, follows):
    far = 10**9
    leap = SpikeBatch(1, far, far - 600, far, 3e4, 0, 0, records(0))
    batch = SpikeBatch(epoch, far + seq, far + first, far + first, 3e4, 0, 0, records(0))
    assert wire.follows(leap, batch) is follows


def test_as_many_units_as_a_rig_has_are_announced_and_absurdly_many_are_not():
    units = [f"unit {n}" for n in range(20_000)]
    _, fields = wire.pack_source("p", epoch=1, rate=3e4, session="s", units=units)
    assert wire.unpack_source(fields) == ("s", 3e4, units)
    _, fields = wire.pack_source("p", epoch=1, rate=3e4, session="s", units=["x" * (4 << 20)])
    with pytest.raises(WireError, match="at most 4194304"):
        wire.unpack_source(fields)


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2}, {"session": None}, {"rate": None}, {"rate": 0.0}, {"units": "ab"},
        {"units": ["a", 1]}, {"units": ["a", ["b"]]}, {"units": ["a", "b", "a"]},
    ],
)  # fmt: skip
def test_an_announcement_that_makes_no_sense_is_refused(change):
    _, fields = wire.pack_source("p", epoch=1, rate=3e4, session="s", units=["a", "b"])
    with pytest.raises(WireError):
        wire.unpack_source(msgpack.packb({**msgpack.unpackb(fields), **change}))


@pytest.mark.parametrize(
    ("rate", "n", "good"),
    [
        (0.1, 2, True),  # ten seconds, and where they end
        (0.1, 3, False),
        (0.0, 1, False),
        (-1.0, 0, False),
        (1e7, 1 << 16, True),
        (1e7, (1 << 16) + 1, False),
        (1.1e7, 1, False),
        (float("nan"), 1, False),
    ],
)
def test_a_message_of_a_behaviour_is_no_longer_than_ten_seconds(rate, n, good):
    batch = wire.BehaviourBatch("speed", 1, 0, 0, rate, np.zeros(n, np.float32))
    _, fields, payload = wire.pack_behaviour(batch)
    if good:
        assert len(wire.unpack_behaviour("speed", fields, payload).values) == n
    else:
        with pytest.raises(WireError):
            wire.unpack_behaviour("speed", fields, payload)


@pytest.mark.parametrize("sample", [-1, 1 << 50])
def test_an_event_is_at_a_sample_that_can_be(sample):
    _, fields = wire.pack_event("p", wire.TaskEvent(1, sample, "choice", "left"))
    with pytest.raises(WireError, match="sample"):
        wire.unpack_event(fields)


@pytest.mark.parametrize(
    "change", [{"v": 2}, {"values": [1e300]}, {"values": ["x"]}, {"stamps": [1]}, {"model": None}]
)
def test_a_decoded_frame_that_makes_no_sense_is_refused(change):
    frame = DecodedFrame("p", 1, 2, 3, np.float32([0.5]), 0, 1, 0, 0, 0, "m", {"sent": 1})
    fields = msgpack.unpackb(wire.pack_decoded(frame)[1]) | change
    with pytest.raises(WireError):
        wire.unpack_decoded(msgpack.packb({k: v for k, v in fields.items() if v is not None}))


@pytest.mark.parametrize(
    "bytes_",
    [b"", b"\xff", b"\x93\x01\x02\x03", b"\x81\x01\x02", b"\xc1", header()[:-3], header() + b"x",
     b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\x81\xa1v" * 30_000],
)  # fmt: skip
def test_what_is_not_a_map_is_refused(bytes_):
    with pytest.raises(WireError):
        wire.unpack_spikes(bytes_, b"", 0)


@pytest.mark.parametrize("text", [b"\xff", b"\xe7\x69"])
def test_text_that_is_none_is_refused(text):
    raw = msgpack.packb({"v": 1, "epoch": 0, "sample": 0}) + msgpack.packb("kind")
    raw = bytes([raw[0] + 1]) + raw[1:] + bytes([0xA0 + len(text)]) + text
    with pytest.raises(WireError, match="(?i)utf-8"):
        wire.unpack_event(raw)


def test_a_map_has_keys_of_text_and_no_more_bytes_than_are_allowed():
    with pytest.raises(WireError, match="string keys"):
        wire.unpack_map(msgpack.packb({b"n": 1}))
    longest = {"pad": bytes(wire.MAX_HEADER_BYTES - 8)}
    assert wire.unpack_map(msgpack.packb(longest)) == longest
    with pytest.raises(WireError, match="at most 65536"):
        wire.unpack_map(msgpack.packb({"pad": longest["pad"] + b"x"}))


@settings(max_examples=500, deadline=None)
@given(fields=st.binary(max_size=200), payload=st.binary(max_size=64))
def test_garbage_raises_nothing_else(fields, payload):
    for unpack in (
        lambda: wire.unpack_spikes(fields, payload, 0),
        lambda: wire.unpack_decoded(fields),
        lambda: wire.unpack_source(fields),
    ):
        with pytest.raises(WireError):
            unpack()


@settings(max_examples=300, deadline=None)
@given(
    key=st.sampled_from(["v", "epoch", "seq", "first", "end", "rate", "n", "sent_ns"]),
    value=st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(),
        st.binary(), st.lists(st.integers(0, 9)), st.dictionaries(st.text(), st.integers(0, 9)),
    ),
)  # fmt: skip
def test_one_wrong_field_never_escapes(key, value):
    changed = msgpack.packb({**msgpack.unpackb(header()), key: value})
    try:
        batch = wire.unpack_spikes(changed, records().tobytes(), 0)
    except WireError:
        return
    assert 0 <= batch.first <= batch.end
    assert len(batch.records_S) == 3
