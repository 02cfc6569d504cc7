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
        ({"seq": -1}, "seq"),
        ({"seq": "0"}, "seq"),
        ({"seq": True}, "seq"),
        ({"epoch": 2**63}, "epoch"),
        ({"epoch": None}, "epoch"),
        ({"rate": 0.0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": None}, "rate"),
    ],
)
def test_broken_headers_are_refused_by_name(change, word):
    with pytest.raises(WireError, match=word):
        wire.unpack_spikes(header(**change), records().tobytes(), 0)


@pytest.mark.parametrize(
    "bytes_",
    [b"", b"\xff", b"\x93\x01\x02\x03", b"\x81\x01\x02", b"\xc1", header()[:-3], header() + b"x",
     b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\x81\xa1v" * 30_000],
)  # fmt: skip
def test_what_is_not_a_map_is_refused(bytes_):
    with pytest.raises(WireError):
        wire.unpack_spikes(bytes_, b"", 0)


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
