"""Export to NWB: what the capture held, in seconds, in a file that others' tools accept."""

import tempfile
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.captured import Contents
from offline.nwb import AGE, _columns, export
from rt_neds import cli
from rt_neds.capture import Capture, Stream
from rt_neds.frames import SPIKE_DTYPE, DecodedFrame, SpikeBatch
from rt_neds.wire import (
    BehaviourBatch,
    pack_behaviour,
    pack_decoded,
    pack_map,
    pack_source,
    pack_spikes,
)
from tests.capturing import write_capture

RATE = 30_000.0
BATCH, BIN = 300, 600
MS = 1_000_000


def output(name, kind, offset, size, *, unit="", classes=()):
    return {"name": name, "kind": kind, "unit": unit, "classes": list(classes), "offset": offset,
            "size": size}  # fmt: skip


SCHEMA = {
    "probe": "imec0", "bin_ms": 20.0, "rate": RATE, "model": "m1", "session": "s", "bundle": "b",
    "outputs": [
        output("speed", "continuous", 0, 2, unit="rad/s"),
        output("choice", "categorical", 2, 2, classes=["left", "right"]),
        output("licks", "poisson", 4, 1),
    ],
}  # fmt: skip


def spikes(epoch, seq, records, received_ns, *, first=None):
    first = seq * BATCH if first is None else first
    records_S = np.array([(s, u, 0) for s, u in records], SPIKE_DTYPE)
    batch = SpikeBatch(epoch, seq, first, first + BATCH, RATE, received_ns, 0, records_S)
    return received_ns, Stream.SPIKES, pack_spikes("imec0", batch)


def bin_(
    epoch, number, received_ns, *, flags=0, model="m1", values=(1, 2, 0.25, 0.75, 3), width=BIN
):
    frame = DecodedFrame(
        "imec0", epoch, number, (number + 1) * width, np.array(values, np.float32), flags,
        0, 0, 0, 0, model, {"published": 1},
    )  # fmt: skip
    return received_ns, Stream.DECODED, pack_decoded(frame)


def two_runs(began_ns):
    """Two acquisition runs, the second 5 s of host time after the first."""
    units = {"session": "s", "units": ["s/a", "s/b", "s/silent"]}
    later_ns = began_ns + 5000 * MS
    return [
        (began_ns, Stream.SPIKES, pack_source("imec0", epoch=1, rate=RATE, **units)),
        (began_ns, Stream.DECODED, pack_map("schema", "imec0", SCHEMA)),
        spikes(1, 0, [(30, 1), (15, 0), (60, 9)], began_ns + 10 * MS),  # unit 9 was not announced
        spikes(1, 1, [(310, 0)], began_ns + 27 * MS),  # 7 ms late, which must not count
        (began_ns, Stream.DECODED, pack_map("decoded", "imec0", {"nonsense": 1})),
        bin_(1, 0, began_ns + 28 * MS, flags=4),
        (began_ns, Stream.DECODED, pack_map("trigger", "imec0", {
            "rule": "fast", "bin": 0, "sample": 600, "sent_ns": 2, "refused": "gap",
        })),
        spikes(1, 1, [(310, 0)], began_ns + 29 * MS),  # repeated
        spikes(1, 4, [(1300, 0)], began_ns + 50 * MS),  # two are missing
        (began_ns, Stream.SPIKES, pack_map("events", "imec0", {
            "epoch": 2, "sample": 150, "kind": "stim", "value": "left\0",
        })),
        (later_ns, Stream.SPIKES, pack_source("imec0", epoch=2, rate=RATE, **units)),
        spikes(2, 0, [(3, 1), (-5, 0)], later_ns + 10 * MS),
        spikes(2, 1, [], later_ns + 20 * MS),
        bin_(2, 0, later_ns + 21 * MS),
        bin_(2, 0, later_ns + 22 * MS),  # repeated
        (later_ns, Stream.SPIKES, [b"behaviour/wheel", msgpack.packb({}), b""]),
        (later_ns, Stream.SPIKES, pack_behaviour(BehaviourBatch(
            "wheel", 2, 0, 150, 100.0, np.array([1.0, 2.0], np.float32)))),
        (later_ns, Stream.SPIKES, pack_behaviour(BehaviourBatch(
            "wheel", 1, 0, 300, 100.0, np.array([np.nan], np.float32)))),
        (later_ns, Stream.SPIKES, pack_behaviour(BehaviourBatch(
            "wheel", 3, 0, 300, 100.0, np.array([4.0], np.float32)))),  # of no run
        (later_ns, Stream.SPIKES, [b"\xff"]),
        (later_ns, Stream.DECODED, pack_map("status", "imec0", {})),
    ]  # fmt: skip


@pytest.fixture
def capture(tmp_path):
    write_capture(tmp_path / "c", [])
    began_ns = Capture(tmp_path / "c").about["started_ns"]
    folder = tmp_path / "capture"
    write_capture(folder, two_runs(began_ns - 1000 * MS))
    return folder


def test_what_a_capture_holds_is_placed_on_one_clock(capture):
    contents = Contents(Capture(capture))
    assert contents.starts_s() == {1: 0.0, 2: 5.0}
    names, time_S, place_S, dropped = contents.spikes()
    assert names == ["s/a", "s/b", "s/silent"]
    np.testing.assert_allclose(
        time_S, [15 / RATE, 30 / RATE, 310 / RATE, 1300 / RATE, 5 + 3 / RATE]
    )
    assert place_S.tolist() == [0, 1, 0, 0, 1]
    assert dropped == 2
    np.testing.assert_allclose(
        contents.observed_K2(), [[0, 0.02], [0.04, 0.05], [5, 5.02]], atol=1e-9
    )
    assert contents.skipped == {"malformed": 2, "repeated": 2, "other": 2, "unplaced": 1}
    time_L, value_L = contents.behaviour("wheel")
    np.testing.assert_allclose(time_L, [0.01, 5.005, 5.015])
    np.testing.assert_array_equal(value_L, [np.nan, 1, 2])


def test_a_run_never_begins_before_the_one_before_it_ended(tmp_path):
    # As a replay faster than real time leaves it: 20 ms of samples within a millisecond.
    messages = [spikes(epoch, seq, [], epoch * MS) for epoch in (1, 2) for seq in (0, 1)]
    write_capture(tmp_path / "c", messages)
    assert Contents(Capture(tmp_path / "c")).starts_s() == {1: 0.0, 2: 0.02}


def test_outputs_beyond_the_values_that_came_are_no_columns():
    outputs = [output("a", "poisson", 0, 1), output("b", "categorical", 1, 2, classes="xy")]
    names = [name for name, *_ in _columns(outputs, np.zeros((4, 3), np.float32))]
    assert names == ["a", "b"]
    for schema in (outputs, None):
        ((name, _, _, at),) = _columns(schema, np.zeros((4, 2), np.float32))
        assert (name, at) == ("values", slice(None))


def test_events_are_in_the_order_of_time(tmp_path):
    pynwb = pytest.importorskip("pynwb", reason="pynwb is not installed (extra nwb)")
    events = [
        (MS, Stream.SPIKES, pack_map("events", "imec0", {
            "epoch": 1, "sample": sample, "kind": "stim", "value": sample,
        }))
        for sample in (250, 50, 150)
    ]  # fmt: skip
    write_capture(tmp_path / "c", [spikes(1, 0, [], 10 * MS), *events])
    export(tmp_path / "c", tmp_path / "x.nwb")
    with pynwb.NWBHDF5IO(str(tmp_path / "x.nwb"), "r") as file:
        table = file.read().get_events_table("events")
        np.testing.assert_allclose(table["timestamp"][:] * RATE, [50, 150, 250])
        assert table["annotation"][:].tolist() == ["stim: 50", "stim: 150", "stim: 250"]


def announcement(*units, epoch=1):
    return MS, Stream.SPIKES, pack_source("imec0", epoch=epoch, rate=RATE, session="s", units=units)


def test_a_spike_is_of_the_unit_that_its_number_meant_when_it_came(tmp_path):
    messages = [
        spikes(1, 0, [(1, 0)], MS),  # recording began within the run: the first list is all we know
        announcement("a", "b"),
        spikes(1, 1, [(301, 0)], 2 * MS),
        announcement("a", "b"),
        spikes(1, 2, [(601, 0), (602, 2)], 3 * MS),
        announcement("b", "a", "c"),
        spikes(1, 3, [(901, 1), (902, 2), (903, 0), (904, 3)], 4 * MS),
    ]
    write_capture(tmp_path / "c", messages)
    names, time_S, place_S, dropped = Contents(Capture(tmp_path / "c")).spikes()
    np.testing.assert_allclose(time_S * RATE, [1, 301, 601, 901, 902, 903])
    assert [names[place] for place in place_S] == ["a", "a", "a", "a", "c", "b"]
    assert dropped == 2  # 2 when there were two, 3 when there were three


def test_bins_of_another_bundle_are_counted_from_its_own(tmp_path):
    wider = {"model": "wide", "width": 5 * BIN}
    before_zero = msgpack.unpackb(bin_(1, 0, MS, model="none")[2][1]) | {"bin": -1}
    messages = [
        *(bin_(1, n, MS) for n in range(10)),
        *(bin_(1, n, MS, **wider) for n in (2, 3, 3, 4)),  # serve was started with another bundle
        bin_(1, 25, MS),  # and once more with the first
        bin_(1, 4, MS),
        *(bin_(2, n, MS) for n in range(2)),  # another run
        (MS, Stream.DECODED, pack_map("decoded", "imec0", before_zero)),
    ]
    schema = (MS, Stream.DECODED, pack_map("schema", "imec0", SCHEMA))
    write_capture(tmp_path / "c", [schema, *messages])
    contents = Contents(Capture(tmp_path / "c"))
    ends = {model: decoded.ends for model, decoded in contents.decoded.items()}
    narrow = [*range(10), 25, 0, 1]
    assert ends == {
        "m1": [(n + 1) * BIN for n in narrow],
        "wide": [(n + 1) * 5 * BIN for n in (2, 3, 4)],
    }
    assert contents.skipped["repeated"] == 3


FAR = 3600 * int(RATE)


def heard(tmp_path, messages):
    """Of spikes ``(epoch, seq, first)``, one each: samples that are exported, starts, skipped."""
    write_capture(
        tmp_path / "c",
        [spikes(e, seq, [(first, 0)], n * MS, first=first)
         for n, (e, seq, first) in enumerate(messages)],
    )  # fmt: skip
    contents = Contents(Capture(tmp_path / "c"))
    sent = {epoch: np.concatenate(run.samples).tolist() for epoch, run in contents.runs.items()}
    return sent, contents.starts_s(), contents.skipped


@pytest.mark.parametrize(
    "absurd", [{"seq": 1 << 62}, {"first": 10**14}, {"first": 1 << 49}, {"epoch": 9, "first": FAR}]
)
@pytest.mark.parametrize("at", [0, 5, 10])
def test_one_absurd_number_costs_the_export_nothing_else(tmp_path, absurd, at):
    stream = [(1, n, n * BATCH) for n in range(10)]
    later = [(2, n, n * BATCH) for n in range(3)]
    spoilt = {"epoch": 1, "seq": at, "first": at * BATCH} | absurd
    messages = [*stream[:at], tuple(spoilt.values()), *stream[at:], *later]
    sent, starts, skipped = heard(tmp_path, messages)
    assert sent == {1: [first for _, _, first in stream], 2: [first for _, _, first in later]}
    assert starts == {1: 0.0, 2: pytest.approx(10 * BATCH / RATE)}
    assert (skipped["malformed"], skipped["repeated"]) == (1, 0)


def test_a_leap_that_the_next_message_agrees_with_is_exported(tmp_path):
    joined = [(1, 100_000, FAR), (1, 100_001, FAR + BATCH)]  # recording began within the run
    pause = [(1, 100_002, 2 * FAR), (1, 100_002, 2 * FAR), (1, 100_003, 2 * FAR + BATCH)]
    sent, starts, skipped = heard(tmp_path, [*joined, *pause])
    assert sent == {1: [FAR, FAR + BATCH, 2 * FAR, 2 * FAR + BATCH]}
    assert starts == {1: 0.0}
    assert (skipped["malformed"], skipped["repeated"]) == (0, 1)


INTEGERS = st.integers(-(1 << 63), (1 << 64) - 1)
ANYTHING = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@st.composite
def nearly_right(draw):
    """A message of ours with one field replaced, or taken away."""
    good = [m for m in two_runs(10**12) if m[2][0] not in (b"behaviour/wheel", b"\xff")]
    received_ns, stream, (topic, header, *payload) = draw(st.sampled_from(good))
    fields = msgpack.unpackb(header)
    name = draw(st.sampled_from(sorted(fields)))
    if name == "outputs" and draw(st.booleans()):
        one = draw(st.sampled_from(fields["outputs"]))
        one[draw(st.sampled_from(sorted(one)))] = draw(ANYTHING)
    elif draw(st.booleans()):
        fields[name] = draw(ANYTHING)
    else:
        del fields[name]
    return received_ns, stream, [topic, msgpack.packb(fields), *payload]


@given(st.lists(nearly_right(), min_size=1, max_size=6))
@settings(deadline=None, max_examples=150)
def test_whatever_came_is_read_or_counted(spoilt):
    with tempfile.TemporaryDirectory() as folder:
        write_capture(Path(folder), [*spoilt[::2], *two_runs(10**12), *spoilt[1::2]])
        contents = Contents(Capture(folder))
        assert {1, 2} <= set(contents.runs)
        _, time_S, _, _ = contents.spikes()
        assert (time_S >= 0).all()
        assert (np.diff(time_S) >= 0).all()
        for decoded in contents.decoded.values():
            assert len(decoded.ends) == len(decoded.flags) == len(decoded.values)


def test_what_is_left_out_is_told_in_words(tmp_path, capsys):
    pytest.importorskip("pynwb", reason="pynwb is not installed (extra nwb)")
    write_capture(tmp_path / "c", [spikes(1, 0, [(5, 0)], MS), (1, Stream.SPIKES, [b"\xff"])])
    assert cli.main(["export", str(tmp_path / "c"), "--out", str(tmp_path / "x.nwb")]) == 0
    told = capsys.readouterr().err
    assert "decoded bins of 1 run to" in told
    assert "messages left out: 1 of the status or of other probes" in told


def test_a_damaged_capture_is_exported_as_far_as_it_goes_and_that_is_told(tmp_path, capsys):
    pytest.importorskip("pynwb", reason="pynwb is not installed (extra nwb)")
    folder, out = tmp_path / "c", tmp_path / "x.nwb"
    write_capture(folder, [spikes(1, 0, [(5, 0)], MS), spikes(1, 1, [(305, 0)], 11 * MS)])
    file = folder / "000000.capture"
    file.write_bytes(file.read_bytes()[:-20])  # in the note of its end
    summary = export(folder, out, {})
    assert summary["spikes"] == 2
    where, _, why = summary["damage"].partition(": ")
    assert why == "cut short"
    good = int(where.removeprefix("000000.capture at byte "))
    assert summary["unread_bytes"] == file.stat().st_size - good > 0
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "y.nwb")]) == 0
    assert f"{summary['unread_bytes']} bytes were not read" in capsys.readouterr().err


def test_without_announcement_units_are_called_by_their_numbers(tmp_path):
    write_capture(tmp_path / "c", [spikes(1, 0, [(1, 7), (2, 3), (3, 1 << 31)], MS)])
    names, _, place_S, dropped = Contents(Capture(tmp_path / "c")).spikes()
    assert [names[place] for place in place_S] == ["7", "3"]
    assert dropped == 1


@pytest.mark.parametrize("age", ["90 days", "P", "PT", "P90", "90D", "P1D/2D"])
def test_an_age_that_is_none(tmp_path, capsys, age):
    out = str(tmp_path / "x.nwb")
    assert cli.main(["export", str(tmp_path), "--out", out, "--subject", "m", "--age", age]) == 2
    told = capsys.readouterr().err
    assert f"age {age!r}" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("age", ["P90D", "P3M2W", "P1DT12H", "PT36H", "P90D/P120D", "P90D/"])
def test_an_age(age):
    assert AGE.fullmatch(age)


def test_pynwb_reads_what_was_written_and_the_inspector_finds_nothing_critical(capture, tmp_path):
    pynwb = pytest.importorskip("pynwb", reason="pynwb is not installed (extra nwb)")
    out = tmp_path / "x.nwb"
    subject = {"subject_id": "m1", "species": "Mus musculus", "sex": "U", "age": "P90D"}
    summary = export(capture, out, subject)
    expected = {"epochs": 2, "units": 3, "spikes": 5, "bins": 2, "triggers": 1, "events": 1}
    expected["observed"] = 3
    assert {key: summary[key] for key in expected} == expected
    assert summary["damage"] == ""
    with pynwb.NWBHDF5IO(str(out), "r") as file:
        nwb = file.read()
        assert nwb.units["unit_name"][:].tolist() == ["s/a", "s/b", "s/silent"]
        np.testing.assert_allclose(nwb.units["spike_times"][1], [30 / RATE, 5 + 3 / RATE])
        assert len(nwb.units["spike_times"][2]) == 0
        assert nwb.units.resolution == 1 / RATE
        np.testing.assert_allclose(nwb.units["obs_intervals"][0][-1], [5, 5.02])
        wheel = nwb.processing["behavior"]["observed_wheel"]
        np.testing.assert_allclose(wheel.timestamps[:], [0.01, 5.005, 5.015])
        np.testing.assert_array_equal(wheel.data[:], [np.nan, 1, 2])
        started = nwb.session_start_time.timestamp()
        about = Capture(capture).about
        zero_ns = Contents(Capture(capture)).runs[1].zero_ns
        wanted = (about["started_unix_ns"] + zero_ns - about["started_ns"]) / 1e9
        assert started == pytest.approx(wanted, abs=1e-3)
        decoded = nwb.processing["behavior"].data_interfaces
        assert set(decoded) == {
            "decoded_flags", "decoded_speed", "decoded_speed_sd", "decoded_choice", "decoded_licks",
            "observed_wheel",
        }  # fmt: skip
        assert decoded["decoded_flags"].data[:].tolist() == [4, 0]
        np.testing.assert_allclose(decoded["decoded_speed"].timestamps[:], [0.02, 5.02])
        assert decoded["decoded_speed"].data[:].tolist() == [1, 1]
        assert decoded["decoded_speed"].unit == "rad/s"
        assert decoded["decoded_speed_sd"].data[:].tolist() == [2, 2]
        assert decoded["decoded_choice"].data[:].tolist() == [[0.25, 0.75]] * 2
        assert "left, right" in decoded["decoded_choice"].description
        assert nwb.subject.subject_id == "m1"
        triggers, events = nwb.get_events_table("triggers"), nwb.get_events_table("events")
        assert triggers["annotation"][:].tolist() == ["fast (refused: gap)"]
        np.testing.assert_allclose(triggers["timestamp"][:], [0.02])
        assert events["annotation"][:].tolist() == ["stim: left?"]
        np.testing.assert_allclose(events["timestamp"][:], [5.005])
    inspector = pytest.importorskip("nwbinspector", reason="nwbinspector is not installed")
    bad = [inspector.Importance.CRITICAL, inspector.Importance.ERROR,
           inspector.Importance.PYNWB_VALIDATION]  # fmt: skip
    found = list(inspector.inspect_nwbfile(nwbfile_path=out))
    assert [message for message in found if message.importance in bad] == []
    with pytest.raises(cli.RtNedsError, match="name of a new"):
        export(capture, out)


def test_names_that_nwb_would_refuse_or_mix_up_are_exported_all_the_same(tmp_path):
    pynwb = pytest.importorskip("pynwb", reason="pynwb is not installed (extra nwb)")
    outputs = [
        output(name, "poisson", at, 1) for at, name in enumerate(("a/b", "a:b", "flags", "\0"))
    ]
    messages = [
        spikes(1, 0, [(5, 0)], MS),
        (MS, Stream.DECODED, pack_map("schema", "imec0", {**SCHEMA, "outputs": outputs})),
        bin_(1, 0, MS, values=(1, 2, 3, 4)),
        bin_(1, 1, MS, model="other", values=(5,)),  # no schema tells of it
    ]
    write_capture(tmp_path / "c", messages)
    assert export(tmp_path / "c", tmp_path / "x.nwb")["bins"] == 2
    with pynwb.NWBHDF5IO(str(tmp_path / "x.nwb"), "r") as file:
        decoded = file.read().processing["behavior"].data_interfaces
        assert [decoded[name].data[0] for name in (
            "decoded_a_b_m1", "decoded_a_b_m1_", "decoded_flags_m1_", "decoded_?_m1",
        )] == [1, 2, 3, 4]  # fmt: skip
        assert decoded["decoded_values_other"].data[:].tolist() == [[5]]


def test_without_pynwb_one_line_says_what_to_install(capsys, capture, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynwb", None)
    assert cli.main(["export", str(capture), "--out", str(tmp_path / "x.nwb")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "rt-neds[nwb]" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["no", "--out", "x.nwb"], "is no capture"),
        (["empty", "--out", "x.nwb"], "has no spikes"),
        (["empty", "--out", "x.h5"], "new .nwb file"),
        (["empty", "--out", "no/x.nwb"], "no/x.nwb lies in no existing folder; create it"),
        (["empty", "--out", "x.nwb", "--sex", "F"], "add --subject"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, tmp_path, monkeypatch, args, words):
    pytest.importorskip("pynwb", reason="pynwb is not installed (extra nwb)")
    monkeypatch.chdir(tmp_path)
    write_capture(tmp_path / "empty", [(1, Stream.SPIKES, [b"\xff"])])
    assert cli.main(["export", *args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert words in err
