"""Captures: whatever is cut or corrupted, what is read is a prefix of what was written."""

import errno
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_neds import capture
from rt_neds.capture import (
    MAGIC,
    MAX_FRAMES,
    MAX_RECORD_BYTES,
    Capture,
    CaptureError,
    CaptureWriter,
    Stream,
    pack_record,
)
from rt_neds.errors import ConfigError, DeviceError, RtNedsError, WireError
from tests.capturing import write_capture

MESSAGES = st.lists(
    st.tuples(
        st.integers(-(1 << 63), (1 << 63) - 1),
        st.sampled_from([Stream.SPIKES, Stream.DECODED]),
        st.lists(st.binary(max_size=60), min_size=1, max_size=4).map(tuple),
    ),
    max_size=12,
)


def contents(reader):
    return [(m.received_ns, m.stream, m.frames) for m in reader]


def places(data):
    """Begin and end of each record of a file, by the page that describes the format."""
    assert data.startswith(MAGIC)
    at, found = len(MAGIC), []
    while at < len(data):
        length, crc = struct.unpack_from("<II", data, at)
        body = data[at + 8 : at + 8 + length]
        assert zlib.crc32(struct.pack("<I", length) + body) == crc
        found.append((at, at + 8 + length))
        at += 8 + length
    return found


def whole_before(files, which, byte):
    """Messages whose records end at or before a byte of a file; the first of a file is a note."""
    before = sum(len(places(data)) - 1 for data in files[:which])
    return before + sum(end <= byte for _, end in places(files[which])[1:])


def read_anyhow(folder):
    """What can be read, and the reader; nothing, where even the beginning is not a capture's."""
    try:
        reader = Capture(folder)
    except CaptureError:
        return [], None
    return contents(reader), reader


@given(MESSAGES, st.integers(1, 600))
@settings(deadline=None, max_examples=30)
def test_what_was_written_is_read_back(messages, max_file):
    with tempfile.TemporaryDirectory() as folder:
        write_capture(Path(folder), messages, max_file=max_file)
        reader = Capture(folder)
        assert contents(reader) == messages
        assert reader.damage == ""
        assert reader.unread_bytes == 0
        assert reader.ended["why"] == "test"
        assert reader.messages == len(messages)
        assert contents(reader) == messages  # it can be read again
        if max_file == 1:
            assert len(list(Path(folder).iterdir())) == max(1, len(messages))


@given(MESSAGES, st.integers(1, 600), st.data())
@settings(deadline=None, max_examples=50)
def test_cut_anywhere_it_is_readable_up_to_there(messages, max_file, data):
    with tempfile.TemporaryDirectory() as folder:
        write_capture(Path(folder), messages, max_file=max_file)
        paths = sorted(Path(folder).iterdir())
        files = [path.read_bytes() for path in paths]
        which = data.draw(st.integers(0, len(files) - 1), "file")
        cut = data.draw(st.integers(0, len(files[which]) - 1), "cut")
        paths[which].write_bytes(files[which][:cut])
        read, reader = read_anyhow(folder)
        boundary = cut in [end for _, end in places(files[which])]
        if reader is None:
            assert which == 0
            assert cut < places(files[0])[0][1]
        else:
            assert read == messages[: whole_before(files, which, cut)]
            assert reader.ended is None
            # At the end of a record of the last file nothing looks wrong, but it has not ended.
            assert bool(reader.damage) == (not boundary or which < len(files) - 1)


@given(MESSAGES, st.integers(1, 600), st.data())
@settings(deadline=None, max_examples=50)
def test_a_corrupted_byte_ends_the_reading_at_its_record(messages, max_file, data):
    with tempfile.TemporaryDirectory() as folder:
        write_capture(Path(folder), messages, max_file=max_file)
        paths = sorted(Path(folder).iterdir())
        files = [path.read_bytes() for path in paths]
        which = data.draw(st.integers(0, len(files) - 1), "file")
        at = data.draw(st.integers(0, len(files[which]) - 1), "byte")
        spoilt = bytearray(files[which])
        spoilt[at] ^= data.draw(st.integers(1, 255), "flip")
        paths[which].write_bytes(spoilt)
        read, reader = read_anyhow(folder)
        if reader is None:
            assert which == 0
            assert at < places(files[0])[0][1]
            return
        assert read == messages[: whole_before(files, which, at)]
        assert reader.damage.startswith(paths[which].name)
        begin = max([0, *(end for _, end in places(files[which]) if end <= at)])
        assert reader.unread_bytes == sum(map(len, files[which:])) - begin


@pytest.mark.parametrize("left", [1, 7, 8, 10])
def test_damage_says_where_and_how_much(tmp_path, left):
    record = pack_record(1, Stream.SPIKES, [b"x" * 100])
    write_capture(tmp_path, [(1, Stream.SPIKES, (b"x" * 100,))] * 5)
    path = tmp_path / "000000.capture"
    whole = path.read_bytes()
    third = whole.index(record) + 2 * len(record)
    path.write_bytes(whole[: third + left])
    reader = Capture(tmp_path)
    assert len(list(reader)) == 2
    assert reader.damage == f"000000.capture at byte {third}: cut short"
    assert reader.unread_bytes == left


def test_a_tail_of_zeros_as_a_power_cut_leaves_it_is_no_record(tmp_path):
    write_capture(tmp_path, [(1, Stream.SPIKES, (b"a",))])
    with open(tmp_path / "000000.capture", "ab") as file:
        file.write(bytes(4096))
    reader = Capture(tmp_path)
    assert contents(reader) == [(1, Stream.SPIKES, (b"a",))]
    assert "length of 0" in reader.damage


def test_the_longest_record_is_read_back_and_no_longer_one_is_read_for(tmp_path):
    frame = bytes(MAX_RECORD_BYTES - struct.calcsize("<qHHI"))
    write_capture(tmp_path, [(1, Stream.SPIKES, (frame,))])
    assert contents(Capture(tmp_path)) == [(1, Stream.SPIKES, (frame,))]
    with open(tmp_path / "000000.capture", "ab") as file:
        file.write(struct.pack("<II", MAX_RECORD_BYTES + 1, 0))
    reader = Capture(tmp_path)
    assert len(contents(reader)) == 1
    assert f"a length of {MAX_RECORD_BYTES + 1} bytes" in reader.damage


def test_a_missing_file_and_a_foreign_one_are_noticed(tmp_path):
    messages = [(n, Stream.SPIKES, (bytes([n]),)) for n in range(4)]
    write_capture(tmp_path / "a", messages, max_file=1)
    write_capture(tmp_path / "b", messages, max_file=1)
    shutil.copy(tmp_path / "b" / "000002.capture", tmp_path / "a" / "000002.capture")
    reader = Capture(tmp_path / "a")
    assert contents(reader) == messages[:2]
    assert "not what follows" in reader.damage
    (tmp_path / "a" / "000001.capture").unlink()
    assert contents(reader) == messages[:1]
    assert "000001.capture is missing" in reader.damage
    (tmp_path / "a" / "000000.capture").unlink()
    with pytest.raises(CaptureError, match="is no capture"):
        Capture(tmp_path / "a")


def test_messages_that_are_missing_between_files_are_noticed(tmp_path):
    record = pack_record(1, Stream.SPIKES, [b"x" * 100])
    write_capture(tmp_path, [(1, Stream.SPIKES, (b"x" * 100,))] * 5, max_file=3 * len(record))
    path = tmp_path / "000000.capture"
    path.write_bytes(path.read_bytes()[: -len(record)])
    reader = Capture(tmp_path)
    assert len(contents(reader)) == 2
    assert reader.damage == "000001.capture at byte 0: it follows 3 messages, not 2"


def test_only_the_note_of_its_end_ends_a_capture(tmp_path):
    write_capture(tmp_path, [])
    path = tmp_path / "000000.capture"
    data = path.read_bytes()
    begin, _ = places(data)[-1]
    path.write_bytes(data[:begin] + pack_record(1, Stream.NOTE, [b"mark", b"\x80"]))
    reader = Capture(tmp_path)
    assert (contents(reader), reader.damage, reader.ended) == ([], "", None)


def test_a_body_that_another_program_packed_wrongly_is_damage(tmp_path):
    def checked(body):
        length = struct.pack("<I", len(body))
        return length + struct.pack("<I", zlib.crc32(length + body)) + body

    bodies = (
        struct.pack("<qHH", 0, 1, 0),  # no frames
        struct.pack("<qHH", 0, 1, 9),  # sizes beyond the end
        struct.pack("<qHHI", 0, 1, 1, 5) + b"four",
        struct.pack("<qHHI", 0, 1, 1, 3) + b"four",  # sizes that leave something over
    )
    for n, body in enumerate(bodies):
        folder = tmp_path / str(n)
        write_capture(folder, [])
        with open(folder / "000000.capture", "ab") as file:
            file.write(checked(body))
        reader = Capture(folder)
        assert contents(reader) == []
        assert reader.damage


@pytest.mark.parametrize("frames", [[], [b""] * (MAX_FRAMES + 1), [bytes(MAX_RECORD_BYTES)]])
def test_what_is_no_message_of_ours_is_not_packed(frames):
    with pytest.raises(WireError):
        pack_record(0, Stream.SPIKES, frames)


def test_a_folder_that_holds_a_capture_is_refused(tmp_path):
    write_capture(tmp_path, [])
    with pytest.raises(ConfigError, match="holds a capture already"):
        write_capture(tmp_path, [])


def append_many(writer, record):
    for _ in range(100):
        writer.append(record)


@pytest.mark.parametrize(("length", "least"), [(400, 8000), (3000, 6000)])
def test_the_total_is_never_exceeded_and_what_came_first_is_kept(tmp_path, length, least):
    record = pack_record(7, Stream.SPIKES, [b"x" * length])
    writer = CaptureWriter(
        tmp_path, {"probe": "imec0"}, max_file=2000, max_total=10_000, min_free=0
    )
    with pytest.raises(DeviceError, match="max-total-gb"):
        append_many(writer, record)
    writer.close({"why": "failed"})
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    reader = Capture(tmp_path)
    assert len(contents(reader)) == writer.records
    assert least < size <= 10_000
    assert reader.ended["why"] == "failed"
    assert len(list(tmp_path.iterdir())) > 1


@pytest.mark.parametrize("max_file", [1, 1 << 20])
def test_there_is_room_for_the_end_whatever_the_total(tmp_path, max_file):
    record = pack_record(7, Stream.SPIKES, [b"x" * 400])
    for max_total in range(5000, 5000 + len(record), 40):
        folder = tmp_path / str(max_total)
        writer = CaptureWriter(
            folder, {"probe": "p"}, max_file=max_file, max_total=max_total, min_free=0
        )
        with pytest.raises(DeviceError):
            append_many(writer, record)
        writer.close({"why": "failed"})
        assert sum(path.stat().st_size for path in folder.iterdir()) <= max_total


class Disk:
    """Files that take a few bytes at a time, and from some byte on none."""

    def __init__(self, monkeypatch, at_once=1 << 30, room=1 << 30):
        self.at_once, self.room = at_once, room
        monkeypatch.setattr(capture, "open", self.open, raising=False)

    def open(self, *args, **options):
        self.file = open(*args, **options)  # noqa: SIM115 (the writer closes it)
        return self

    def write(self, view):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(view[: min(self.at_once, self.room)])
        self.room -= taken
        return taken

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()


def test_a_disk_that_takes_a_little_at_a_time_gets_all(tmp_path, monkeypatch):
    messages = [(n, Stream.SPIKES, (bytes(n),)) for n in range(30)]
    with monkeypatch.context() as patch:
        Disk(patch, at_once=7)
        write_capture(tmp_path, messages)
    assert contents(Capture(tmp_path)) == messages


def test_after_a_disk_that_failed_nothing_more_is_written(tmp_path, monkeypatch):
    record = pack_record(1, Stream.SPIKES, [bytes(100)])
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        writer = CaptureWriter(tmp_path, {"probe": "p"}, max_file=9999, max_total=9999, min_free=0)
        writer.append(record)
        writer.append(record)
        disk.room = len(record) + 10
        with pytest.raises(DeviceError, match="No space left"):
            writer.sync()
        size = (tmp_path / "000000.capture").stat().st_size
        disk.room = 1 << 30  # somebody freed it: too late, half a record is there
        writer.close({"why": "failed"})
    assert (tmp_path / "000000.capture").stat().st_size == size
    reader = Capture(tmp_path)
    assert contents(reader) == [(1, Stream.SPIKES, (bytes(100),))]
    assert (reader.damage != "", reader.unread_bytes) == (True, 10)


def test_a_disk_that_keeps_nothing_is_no_success(tmp_path, monkeypatch):
    writer = CaptureWriter(tmp_path, {"probe": "p"}, max_file=9999, max_total=9999, min_free=0)

    def fsync(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(capture.os, "fsync", fsync)
        with pytest.raises(DeviceError, match="Input/output error"):
            writer.sync()
        writer.close({"why": "failed"})
    assert Capture(tmp_path).ended is None


def test_what_waits_for_the_disk_is_bounded(tmp_path):
    writer = CaptureWriter(
        tmp_path, {"probe": "p"}, max_file=1 << 30, max_total=1 << 30, min_free=0
    )
    record = pack_record(1, Stream.SPIKES, [bytes(10_000)])
    for _ in range(250):
        writer.append(record)
    assert writer.bytes - (tmp_path / "000000.capture").stat().st_size < 1 << 20
    writer.close({"why": "test"})


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"v": 2}, "format 2; 1 was expected"),
        ({"probe": 5}, "no name of capture or probe"),
        ({"started_ns": -1}, "no time"),
        ({"started_unix_ns": "noon"}, "no time"),
    ],
)
def test_a_beginning_that_says_something_else_is_told(tmp_path, about, words):
    limits = {"max_file": 9999, "max_total": 9999, "min_free": 0}
    CaptureWriter(tmp_path, {"probe": "p", **about}, **limits).close({"why": "test"})
    with pytest.raises(CaptureError, match=words):
        Capture(tmp_path)


@pytest.mark.parametrize(("stream", "kind"), [(Stream.SPIKES, b"file"), (Stream.NOTE, b"end")])
def test_a_beginning_is_the_note_of_a_file(tmp_path, stream, kind):
    about = {"v": 1, "capture": "c", "probe": "p", "started_ns": 1, "started_unix_ns": 1}
    record = pack_record(1, stream, [kind, msgpack.packb(about)])
    (tmp_path / "000000.capture").write_bytes(MAGIC + record)
    with pytest.raises(CaptureError, match="no note of whose it is"):
        Capture(tmp_path)


def test_a_power_cut_takes_nothing_of_a_file_that_is_full_nor_of_an_end(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def watched(descriptor):
        of = os.fstat(descriptor)
        synced.append((of.st_ino, of.st_size))
        fsync(descriptor)

    monkeypatch.setattr(capture.os, "fsync", watched)
    record = pack_record(1, Stream.SPIKES, [b"x" * 100])
    write_capture(tmp_path, [(1, Stream.SPIKES, (b"x" * 100,))] * 7, max_file=3 * len(record))
    files = [path.stat() for path in sorted(tmp_path.glob("*.capture"))]
    assert len(files) == 3  # each is filled anew
    assert {(of.st_ino, of.st_size) for of in files} < set(synced)
    names = [place for place, (inode, _) in enumerate(synced) if inode == tmp_path.stat().st_ino]
    assert len(names) == 3
    whole = synced.index((files[0].st_ino, files[0].st_size))
    assert whole < names[1], "the next file is begun when the last is on the disk"


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    writer = CaptureWriter(tmp_path, {"probe": "p"}, max_file=1, max_total=9999, min_free=0)
    record = pack_record(1, Stream.SPIKES, [b"x"])
    writer.append(record)
    (tmp_path / "000001.capture").write_bytes(b"somebody's")
    with pytest.raises(DeviceError, match="exists"):
        writer.append(record)
    writer.close({"why": "failed"})
    writer.close({"why": "failed"})  # once more does nothing
    assert (tmp_path / "000001.capture").read_bytes() == b"somebody's"


def test_a_file_that_cannot_be_read_ends_the_reading(tmp_path):
    messages = [(n, Stream.SPIKES, (bytes([n]),)) for n in range(3)]
    write_capture(tmp_path, messages, max_file=1)
    (tmp_path / "000001.capture").unlink()
    (tmp_path / "000001.capture").mkdir()
    reader = Capture(tmp_path)
    assert contents(reader) == messages[:1]
    assert reader.damage.startswith("000001.capture at byte 0")


def test_free_disk_is_left_alone(tmp_path, monkeypatch):
    free = 5_000_000
    usage = type("Usage", (), {"free": property(lambda self: free)})()
    monkeypatch.setattr(capture.shutil, "disk_usage", lambda folder: usage)
    limits = {"max_file": 1 << 20, "max_total": 1 << 30}
    writer = CaptureWriter(tmp_path / "a", {"probe": "p"}, min_free=1_000_000, **limits)
    writer.append(pack_record(1, Stream.SPIKES, [b"kept"]))
    free = 999_999
    with pytest.raises(DeviceError, match="min-free-gb"):
        writer.sync()
    writer.close({"why": "failed"})
    assert contents(Capture(tmp_path / "a")) == [(1, Stream.SPIKES, (b"kept",))]
    with pytest.raises(DeviceError, match="min-free-gb"):
        CaptureWriter(tmp_path / "b", {"probe": "p"}, min_free=1_000_000, **limits)


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RtNedsError, match="name another folder"):
        write_capture(tmp_path / "file" / "under", [])


def test_the_reader_on_the_page_reads_what_ours_reads(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "recording.md").read_text(encoding="utf-8")
    names = {}
    exec(page.partition("```python")[2].partition("```")[0], names)
    messages = [(n, n % 2 + 1, (b"x" * n, b"", b"y")) for n in range(50)]
    write_capture(tmp_path, messages, max_file=700)
    read = [(at, stream, tuple(frames)) for at, stream, frames in names["messages"](tmp_path)]
    assert [one for one in read if one[1] != Stream.NOTE] == messages == contents(Capture(tmp_path))
    notes = [frames[0] for _, stream, frames in read if stream == Stream.NOTE]
    assert notes == [b"file"] * len(list(tmp_path.iterdir())) + [b"end"]
