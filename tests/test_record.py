"""Recording: real processes, a full disk, a kill, a disk that is slow."""

import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import zmq

from rt_neds import cli, record, stopping
from rt_neds.capture import MAX_FRAMES, Capture, CaptureError, Stream
from rt_neds.children import free_port
from rt_neds.errors import DeviceError

pytestmark = pytest.mark.timeout(300)


@contextlib.contextmanager
def publishing(*ports):
    with zmq.Context() as context, contextlib.ExitStack() as stack:
        sockets = []
        for port in ports:
            socket = stack.enter_context(context.socket(zmq.XPUB))
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.XPUB_NODROP, 1)
            socket.bind(f"tcp://127.0.0.1:{port}")
            sockets.append(socket)
        yield sockets


class Recording:
    """A ``record`` process and the two streams it hears."""

    def __init__(self, folder, *options, limit=None, prefix=()):
        self.folder, self.options, self.limit, self.prefix = folder, options, limit, prefix
        self.ports = free_port(), free_port()

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self.spikes, self.decoded = self._stack.enter_context(publishing(*self.ports))
        code = "import sys; from rt_neds.cli import main; "
        if self.limit is not None:
            limits = (self.limit, self.limit)
            code += f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, {limits}); "
        source, decoded = (f"tcp://127.0.0.1:{port}" for port in self.ports)
        self.child = subprocess.Popen(
            [*self.prefix, sys.executable, "-c", code + "sys.exit(main(sys.argv[1:]))", "record",
             "--probe", "imec0", "--out", str(self.folder), "--source", source, "--decoded",
             decoded, "--quiet", "--min-free-gb", "0", *self.options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        for socket in (self.spikes, self.decoded):
            assert socket.poll(30_000), "it never subscribed"
            assert socket.recv() == b"\x01"
        return self

    def __exit__(self, *_):
        if self.child.poll() is None:
            self.child.kill()
        self.child.communicate()
        self._stack.close()

    def end(self, how=signal.SIGTERM):
        self.child.send_signal(how)
        out, err = self.child.communicate(timeout=60)
        return self.child.returncode, out, err

    def read(self):
        reader = Capture(self.folder)
        return [(m.stream, m.frames) for m in reader], reader

    def wait_for(self, messages):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(CaptureError):  # it may only just have begun
                if len(self.read()[0]) >= messages:
                    return
            time.sleep(0.1)
        raise AssertionError("it was never on the disk")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_everything_on_both_streams_is_written_whatever_it_is(tmp_path, how):
    garbage = [
        [b""],
        [b"spikes/imec0"],
        [b"\xff\xfe", b"", b"x" * 100_000],
        [b"spikes/other", b"1"],
    ]
    began = time.monotonic()
    with Recording(tmp_path / "c", "--json", "-", "--max-file-mb", "0.05") as one:
        before = time.monotonic_ns()
        for message in garbage:
            one.spikes.send_multipart(message)
        one.spikes.send_multipart([b"x"] * (MAX_FRAMES + 1))
        one.decoded.send_multipart([b"decoded/imec0", b"2"])
        one.spikes.send_multipart([b"last"])
        one.wait_for(6)
        code, out, err = one.end(how)
        messages, reader = one.read()
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert {key: summary[key] for key in ("spikes", "decoded", "oversized")} == {
        "spikes": 5, "decoded": 1, "oversized": 1,
    }  # fmt: skip
    assert [list(f) for s, f in messages if s == Stream.SPIKES] == [*garbage, [b"last"]]
    assert [f for s, f in messages if s == Stream.DECODED] == [(b"decoded/imec0", b"2")]
    assert reader.damage == ""
    assert reader.ended["why"] == "stopped"
    assert reader.about["probe"] == "imec0"
    assert 0 < summary["seconds"] < time.monotonic() - began
    assert summary["files"] == len(list((tmp_path / "c").iterdir())) > 1
    assert all(before < m.received_ns < time.monotonic_ns() for m in reader)


class Scripted:
    """Streams on which the next message comes so many milliseconds after the last."""

    def __init__(self, waits_ms):
        self.waits_ms, self.now_ms = list(waits_ms), 0

    def read(self, timeout_ms):
        if not self.waits_ms or self.waits_ms[0] > timeout_ms:
            self.now_ms += timeout_ms
            if self.waits_ms:
                self.waits_ms[0] -= timeout_ms
            return
        self.now_ms += self.waits_ms.pop(0)
        yield len(self.waits_ms) % 2, self.now_ms, [b"x"]


@pytest.mark.parametrize(
    ("waits_ms", "taken", "ends_ms"),
    [
        ([], 0, 250),
        ([0, 200, 240], 3, 690),  # on its way when the signal came
        ([0, 260, 0], 1, 250),  # quiet for long enough
        ([100] * 50, 11, 1100),  # a stream that nobody stops
        ([900, 200, 200], 0, 250),
    ],
)
def test_told_to_stop_it_takes_what_is_on_its_way(monkeypatch, waits_ms, taken, ends_ms):
    streams, counts = Scripted(waits_ms), {"spikes": 0, "decoded": 0, "oversized": 0}
    monkeypatch.setattr(record.time, "monotonic", lambda: streams.now_ms / 1000)
    disk = SlowWriter()
    disk.put, disk.failure = lambda packed: None, None
    record._listen(streams, disk, counts, lambda: True)
    assert (sum(counts.values()), streams.now_ms) == (taken, ends_ms)


def test_killed_it_loses_at_most_what_had_not_been_flushed(tmp_path):
    with Recording(tmp_path / "c") as one:
        for n in range(100):
            one.spikes.send_multipart([b"early", str(n).encode()])
        one.wait_for(100)
        for n in range(100):
            one.spikes.send_multipart([b"late", str(n).encode()])
        one.end(signal.SIGKILL)
        messages, reader = one.read()
    sent = [(b"early", str(n).encode()) for n in range(100)]
    sent += [(b"late", str(n).encode()) for n in range(100)]
    assert [frames for _, frames in messages] == sent[: len(messages)]
    assert len(messages) >= 100
    assert reader.ended is None


def test_a_disk_that_takes_no_more_ends_it_in_one_line_and_keeps_the_rest(tmp_path):
    pytest.importorskip("resource", reason="no limits on the size of files here")
    with Recording(tmp_path / "c", limit=200_000) as one:
        for n in itertools.count():
            if one.child.poll() is not None:
                break
            with contextlib.suppress(zmq.Again):
                one.spikes.send_multipart([b"spikes/imec0", b"%d" % n, bytes(1000)], zmq.NOBLOCK)
            time.sleep(0.001)
        err = one.child.communicate()[1]
        messages, reader = one.read()
    assert one.child.returncode == 1
    assert err.startswith("rt-neds: cannot write to ")
    assert err.count("\n") == 1
    assert [frames[1] for _, frames in messages] == [b"%d" % n for n in range(len(messages))]
    assert 180 <= len(messages) < 200  # each has a little over 1000 bytes
    assert "cut short" in reader.damage


def test_a_disk_that_takes_no_more_in_the_very_end_is_no_success(tmp_path):
    pytest.importorskip("resource", reason="no limits on the size of files here")
    with Recording(tmp_path / "c", limit=200_000) as one:
        for n in range(300):
            one.spikes.send_multipart([b"spikes/imec0", b"%d" % n, bytes(1000)])
        code, _, err = one.end()
    assert code == 1
    assert err.startswith("rt-neds: cannot write to ")


FULL_DISK = """
mount -t tmpfs -o size=400k none "$1" && shift && {
    folder=$1; shift
    "$@"; code=$?
    cp -r "$folder" "$folder.kept"; exit $code
}
"""


def test_a_disk_that_is_full_ends_it_in_one_line_and_keeps_the_rest(tmp_path):
    """A real one, of 400 kB, that only this process and its children see."""
    disk, out = tmp_path / "disk", tmp_path / "c.kept"
    disk.mkdir()
    apart = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    trial = ["mount -t tmpfs -o size=4k none $0", str(disk)]
    if not shutil.which("unshare") or subprocess.run([*apart, *trial], check=False).returncode:
        pytest.skip("no disk may be mounted here")
    script = FULL_DISK.replace('"$folder.kept"', f'"{out}"')
    wrapped = [*apart, script, "sh", str(disk), str(disk / "c")]
    with Recording(disk / "c", prefix=wrapped) as one:
        for n in itertools.count():
            if one.child.poll() is not None:
                break
            with contextlib.suppress(zmq.Again):
                one.spikes.send_multipart([b"spikes/imec0", b"%d" % n, bytes(1000)], zmq.NOBLOCK)
            time.sleep(0.001)
        err = one.child.communicate()[1]
        one.folder = out
        messages, _ = one.read()
    assert one.child.returncode == 1
    assert err.startswith("rt-neds: cannot write to ")
    assert "No space left" in err
    assert err.count("\n") == 1
    assert [frames[1] for _, frames in messages] == [b"%d" % n for n in range(len(messages))]
    assert 300 < len(messages) < 400


def test_at_its_limit_it_ends_in_one_line_and_deletes_nothing(tmp_path):
    limits = ("--max-total-gb", "0.00002", "--max-file-mb", "0.005")  # 20 kB in files of 5
    with Recording(tmp_path / "c", *limits) as one:
        for n in range(40):
            one.spikes.send_multipart([b"spikes/imec0", b"%d" % n, bytes(1000)])
        _, err = one.child.communicate(timeout=60)
        messages, reader = one.read()
    assert one.child.returncode == 1
    assert "--max-total-gb" in err
    assert err.count("\n") == 1
    assert [frames[1] for _, frames in messages] == [b"%d" % n for n in range(len(messages))]
    assert 14 <= len(messages) < 20
    assert reader.damage == ""
    assert reader.ended["why"] == "failed"
    assert reader.ended["messages"] == len(messages)


class SlowWriter:
    """Writes when it is let to; fails when it is told to."""

    def __init__(self):
        self.may_write, self.failure, self.written = threading.Event(), None, []

    def append(self, packed):
        self.may_write.wait()
        if self.failure is not None:
            raise self.failure
        self.written.append(packed)

    def sync(self):
        pass


def test_what_waits_for_a_slow_disk_is_bounded_and_kept_in_order(monkeypatch):
    monkeypatch.setattr(record, "WAITING_BYTES", 1000)
    writer = SlowWriter()
    disk = record.Disk(writer)
    disk.start()
    packed = [b"%03d" % n * 33 for n in range(60)]
    handed = []

    def hand_over():
        for one in packed:
            disk.put(one)
            handed.append(one)

    hand = threading.Thread(target=hand_over)
    hand.start()
    hand.join(0.5)
    assert hand.is_alive()  # it waits, and does not fill the memory
    assert len(handed) <= 2 * 11 + 1  # what waits, and what is being written
    writer.may_write.set()
    hand.join(10)
    disk.finish()
    assert writer.written == packed


def test_whatever_ends_it_what_came_is_written_and_the_sockets_are_closed(monkeypatch, tmp_path):
    closed, original = [], record.CaptureWriter.append

    class Failing:
        def __init__(self, addresses):
            self.reads = 0

        def read(self, timeout_ms):
            self.reads += 1
            if self.reads > 1:
                raise MemoryError("no more")
            return [(0, n, [b"spikes/imec0", bytes([n])]) for n in range(50)]

        def close(self):
            closed.append(True)

    def slow(self, packed):
        time.sleep(0.005)
        original(self, packed)

    monkeypatch.setattr("rt_neds.stream.raw.RawListener", Failing)
    monkeypatch.setattr(record.CaptureWriter, "append", slow)
    with pytest.raises(MemoryError):
        record.record(
            "imec0", tmp_path / "c", max_file=10**6, max_total=10**7, min_free=0,
            stop=lambda: False, say=lambda line: None,
        )  # fmt: skip
    capture = Capture(tmp_path / "c")
    assert [message.frames[1][0] for message in capture] == list(range(50))
    assert capture.ended is not None
    assert capture.ended["why"] == "failed"
    assert capture.ended["messages"] == 50
    assert closed == [True]


def test_a_failure_of_the_disk_reaches_whoever_hands_over(monkeypatch):
    monkeypatch.setattr(record, "WAITING_BYTES", 10)
    writer = SlowWriter()
    writer.failure = DeviceError("full")
    writer.may_write.set()
    disk = record.Disk(writer)
    disk.start()

    def put_many():
        for _ in range(100):
            disk.put(b"x" * 10)

    with pytest.raises(DeviceError, match="full"):
        put_many()
    disk.finish()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--max-file-mb", "0"], "0 < max-file"),
        (["--max-total-gb", "0.1"], "0 < max-file"),
        (["--min-free-gb", "-1"], "0 < max-file"),
        (["--seconds", "0"], "more than 0"),
        (["--source", "nonsense"], "cannot connect"),
        (["--decoded", "rtneds://x"], "cannot connect"),
        (["--source", "tcp://127.0.0.1:71106"], "port 71106; 1 to 65535 was expected"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, tmp_path, monkeypatch, args, words):
    monkeypatch.setattr(stopping.signal, "signal", lambda *_: None)
    code = cli.main(["record", "--probe", "imec0", "--out", str(tmp_path / "c"), *args])
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "c").exists()


def test_it_stops_when_told_and_says_what_never_came(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping.signal, "signal", lambda *_: None)
    source, decoded = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    args = ["record", "--probe", "p", "--out", str(tmp_path / "c"), "--source", source]
    args += ["--decoded", decoded, "--min-free-gb", "0", "--seconds", "0.4"]
    began = time.monotonic()
    assert cli.main(args) == 0
    assert time.monotonic() - began > 0.4
    told = capsys.readouterr().err.splitlines()
    assert told[1].startswith("0 messages of the spike stream and 0 decoded, ")
    assert [line.partition(" was")[0] for line in told[2:]] == [
        f"nothing came from {source}:", f"nothing came from {decoded}:"
    ]  # fmt: skip


def test_a_disk_with_less_than_is_to_stay_free_is_not_begun_on(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping.signal, "signal", lambda *_: None)
    args = ["record", "--probe", "p", "--out", str(tmp_path / "c"), "--min-free-gb", "1e8"]
    assert cli.main(args) == 1
    assert "and 1e+08 are to stay so; recording stopped" in capsys.readouterr().err


def test_recording_needs_no_torch():
    code = "import sys, rt_neds.record, rt_neds.stream.raw; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
