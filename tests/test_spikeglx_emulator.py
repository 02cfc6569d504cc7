"""The emulator of SpikeGLX: what it says, what it plays, and our source on it."""

import contextlib
import itertools
import socket
import threading
import time

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rt_neds.spikeglx_wire
import rt_neds.stream.spikeglx as module
from rt_neds.children import free_port
from rt_neds.cli import main
from rt_neds.errors import ConfigError, SessionError, StreamError
from rt_neds.session import load_session
from rt_neds.spikeglx_emulator import Server, play
from rt_neds.spikeglx_recording import RawRecording, SynthesisedRecording, read_meta
from rt_neds.spikeglx_run import Run
from rt_neds.spikeglx_wire import MISSED, Reply, introduce
from rt_neds.stream.detector import Detector
from rt_neds.stream.spikeglx import SpikeGLXSource
from tests.detecting import spec_of
from tests.making import write_session
from tests.spikeglx.checking import PATIENCE_S, frames_of, read_until

AP = 16


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    path = tmp_path_factory.mktemp("glx") / "s.h5"
    return load_session(
        write_session(path, seconds=6, domain=[(0.0, 3.01), (3.333, 5.0), (5.5, 6.0)])
    )


@pytest.fixture(scope="module")
def recording(session):
    return SynthesisedRecording(session, ap=AP, lf=AP)


def detector_for(recording, session):
    """Spikes of the channels on which units are largest, under the names of the units."""
    probe = recording.probe
    names = {int(c): name for c, name in zip(recording.peaks_N, session.unit_ids, strict=True)}
    arrays = {
        "position_C2": np.ascontiguousarray(probe.sites_C[:, 1:]),
        "shank_C": probe.sites_C[:, 0].astype(np.int64),
        "group_C": np.zeros(probe.ap, np.int64),
        "noise_C": np.full(probe.ap, 4.3, np.float32),
    }
    spec = spec_of(arrays, rate=probe.rate, reach_um=20.0, uv_per_bit=2.34375)
    units = [names.get(c, f"ch{c}") for c in range(probe.ap)]
    return Detector(msgspec.structs.replace(spec, units=units), arrays)


@pytest.fixture
def emulator(recording):
    """Start an emulator of the recording; all are closed in the end."""
    made = []

    def make(*, speed=0.0, first=0, end=None, held_s=8.0, running=True, what=recording, **options):
        run = Run(what, first, end or what.end, speed, held_s)
        made.append(Server("tcp://127.0.0.1:0", run, **options))
        if running:
            run.start()
        return made[-1], run

    yield make
    for server in made:
        server.close()


class Client:
    """A socket, and lines."""

    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", int(server.endpoint.split(":")[-1])))
        self.socket.settimeout(PATIENCE_S)
        self.file = self.socket.makefile("rb")

    def ask(self, line):
        """Lines of the answer, without the ``OK``; an error as it comes."""
        self.socket.sendall(line.encode() + b"\n")
        lines = []
        while True:
            lines.append(self.file.readline().decode())
            if lines[-1] == "OK\n":
                return [one.rstrip("\n") for one in lines[:-1]]
            if lines[-1].startswith("ERROR") or not lines[-1]:
                return lines[-1].rstrip("\n")

    def fetch(self, first, most, channels="-1#", step=1, stream="2 0"):
        self.socket.sendall(f"FETCH {stream} {first} {most} {channels} {step}\n".encode())
        head = self.file.readline().decode()
        if head.startswith("ERROR"):
            return head.rstrip("\n")
        count, samples = map(int, head.split()[1:3])
        assert head.split()[0] == "BINARY_DATA"
        body = self.file.read(2 * count * samples)
        assert self.file.readline() == b"OK\n"
        return int(head[head.index("(") + 1 : -2]), np.frombuffer(body, "<i2").reshape(-1, count)


# -- what it says --------------------------------------------------------------------------------


def test_what_a_probe_is(emulator, recording):
    client = Client(emulator()[0])
    assert client.ask("GETSTREAMACQCHANS 2 0") == ["16 16 1"]
    assert client.ask("getstreamsamplerate 2 0") == ["30000.000000"]
    assert client.ask("GETSTREAMMAXINT 2 0") == ["512"]
    assert client.ask("GETSTREAMI16TOVOLTS 2 0 3") == ["2.34375e-06"]
    assert client.ask("GETSTREAMI16TOVOLTS 2 0 20") == ["4.6875e-06"]
    assert client.ask("GETSTREAMVOLTAGERANGE 2 0") == ["-0.6 0.6"]
    assert client.ask("GETIMECCHANGAINS 0 0") == ["500 250"]
    assert client.ask("GETSTREAMNP 2") == ["1"]
    assert client.ask("GETSTREAMNP 0") == ["0"]
    assert client.ask("GETVERSION")[0].startswith("SpikeGLX v")
    assert client.ask("MAPSAMPLE 2 0 777 2 0") == ["777"]
    assert client.ask("NOOP") == []
    geometry = client.ask("GETGEOMMAP 0")
    assert len(geometry) == 4 + 4 * AP
    assert "ch3_x=59" in geometry
    assert float(client.ask("GETTIME")[0]) >= 0


def test_our_own_questions_are_understood(emulator, recording):
    server, _ = emulator(probe=2)
    client, talk = Client(server), introduce(2)
    question = next(talk)
    while True:
        try:
            question = talk.send(Reply(tuple(client.ask(question.command))))
        except StopIteration as end:
            probe = end.value
            break
    assert (probe.ap, probe.lf, probe.status, probe.rate) == (AP, AP, 1, 30000.0)
    sites_C = recording.probe.sites_C[:, 1:].tolist()
    assert [list(site[1:3]) for site in probe.sites_C] == sites_C


def test_errors(emulator):
    server, _ = emulator(running=False)

    def error(line):
        return Client(server).ask(line)

    assert error("FLY") == "ERROR CmdWorker: Unknown command [FLY]."
    assert error("GETSTREAMSAMPLERATE 2 1") == (
        "ERROR GETSTREAMSAMPLERATE: imec stream-ip must be in range[0..0]."
    )
    assert error("GETSTREAMSAMPLERATE 2") == (
        "ERROR GETSTREAMSAMPLERATE: Requires at least 2 params."
    )
    assert error("GETSTREAMSN 0 0") == "ERROR GETSTREAMSN: nidq stream not enabled."
    assert error("GETSTREAMSN 7 0").endswith("must be in set {-2,0,1,2}.")
    assert error("FETCH 2 0 0 10") == "ERROR FETCH: Not running or stream not enabled."
    assert error("SETRECORDENAB 1") == "ERROR SETRECORDENAB: Run not yet started."
    assert error("NIDOSET") == "ERROR NIDOSET: Requires params {lines, bits}."


def test_runs_are_started_stopped_and_named(emulator):
    server, run = emulator(running=False, speed=1)
    client = Client(server)
    assert client.ask("ISRUNNING") == ["0"]
    assert client.ask("GETSTREAMSAMPLECOUNT 2 0") == ["0"]
    assert client.ask("SETRUNNAME my run") == []
    assert client.ask("STARTRUN") == []
    assert client.ask("STARTRUN") == "ERROR STARTRUN: Already running."
    assert client.ask("SETRECORDENAB 1") == []
    assert client.ask("ISRUNNING") == client.ask("ISSAVING") == ["1"]
    assert client.ask("GETRUNNAME") == ["my run"]
    deadline = time.monotonic() + PATIENCE_S
    while client.ask("GETSTREAMSAMPLECOUNT 2 0") == ["0"]:
        assert time.monotonic() < deadline
    assert client.ask("STOPRUN") == []
    assert client.fetch(0, 10) == "ERROR FETCH: Not running or stream not enabled."
    assert not run.running
    assert client.ask("NIDOSET Dev4/port0/line5,Dev4/port0/line6 255") == []
    assert server.rig.digital == [("Dev4/port0/line5,Dev4/port0/line6", 255)]


def test_params_are_taken_line_by_line(emulator):
    client = Client(emulator(running=False)[0])
    client.socket.sendall(b"SETPARAMS\n")
    assert client.file.readline() == b"READY\n"
    client.socket.sendall(b"snsNotes=hello = world\nother=1\n\n")
    assert client.file.readline() == b"OK\n"
    assert "snsNotes=hello = world" in client.ask("GETPARAMS")


def test_five_errors_end_a_connection_and_so_does_idling(emulator):
    client = Client(emulator()[0])
    for _ in range(4):
        assert client.ask("FLY").startswith("ERROR")
    assert client.ask("NOOP") == []  # forgiven
    for _ in range(5):
        assert client.ask("FLY").startswith("ERROR")
    with contextlib.suppress(ConnectionError):
        assert client.file.readline() == b""
    idle = Client(emulator(idle_s=0.1)[0])
    with contextlib.suppress(ConnectionError):
        assert idle.file.readline() == b""


def test_channels_are_a_set_in_ascending_order(emulator, recording):
    server, _ = emulator()
    first, all_SC = Client(server).fetch(500, 40)
    assert first == 500
    np.testing.assert_array_equal(all_SC, recording.samples(500, 540))
    _, some_SC = Client(server).fetch(500, 40, "32#3#7#3#")
    np.testing.assert_array_equal(some_SC, all_SC[:, [3, 7, 32]])
    assert Client(server).fetch(500, 40, "3#33#") == "ERROR Channel 33 out of range [0..32]."
    assert Client(server).fetch(500, 40, "#") == "ERROR Bad channel string format."
    _, none_SC = Client(server).fetch(10**9, 40, "3#7#")
    assert none_SC.shape == (0, recording.probe.channels)
    _, means_SC = Client(server).fetch(500, 40, "0#1#", 16)
    expected = [np.trunc(all_SC[a : a + 16, :2].mean(axis=0)) for a in (0, 16, 32)]
    np.testing.assert_array_equal(means_SC, expected)
    assert Client(server).fetch(0, 40, stream="-2 0").startswith("ERROR FETCH: Not running")


def test_who_is_too_late_is_told_and_who_is_early_gets_nothing(emulator):
    server, run = emulator(speed=1, held_s=0.05)
    client = Client(server)
    deadline = time.monotonic() + PATIENCE_S
    while client.fetch(0, 10) != "ERROR FETCH: Too late.":
        assert time.monotonic() < deadline
    assert run.too_late == 1
    first, samples_SC = client.fetch(10**9, 10)
    assert (first, len(samples_SC)) == (10**9, 0)
    count = int(client.ask("GETSTREAMSAMPLECOUNT 2 0")[0])
    assert count % 12 == 0
    assert run.zero_ns is not None


# -- what it plays -------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_samples_are_the_same_however_they_are_cut(recording, data):
    first = data.draw(st.integers(0, recording.end - 1))
    end = data.draw(st.integers(first + 1, min(first + 4000, recording.end)))
    cuts = sorted(data.draw(st.lists(st.integers(first, end), max_size=6)))
    whole_SC = recording.samples(first, end)
    pieces = [
        recording.samples(a, b) for a, b in zip([first, *cuts], [*cuts, end], strict=True) if b > a
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), whole_SC)


def test_a_synthesised_recording_holds_the_spikes_of_the_session(recording, session):
    all_SC = recording.samples(0, recording.end)
    again_SC = SynthesisedRecording(session, ap=AP, lf=AP).samples(0, 1000)
    np.testing.assert_array_equal(again_SC, all_SC[:1000])
    inside = ~(all_SC[:, -1] & MISSED).astype(bool)
    for low, high in session.domain_K2.tolist():
        assert inside[low:high].all()
    assert inside.sum() == (session.domain_K2[:, 1] - session.domain_K2[:, 0]).sum()
    assert (all_SC[~inside, :-1] == 0).all()
    records = session.records_S
    peaks = all_SC[records["sample"], recording.peaks_N[records["unit"]]]
    assert np.mean(peaks < -15) > 0.97  # the smallest unit is 70 uV, 30 counts, deep
    assert np.percentile(all_SC[inside][:, :AP], 5) > -12
    assert abs(all_SC[:, AP : 2 * AP]).max() in (99, 100)


def write_raw(folder, samples_SC, meta_text, name="run_g0_t0.imec0.ap"):
    path = folder / f"{name}.bin"
    samples_SC.astype("<i2").tofile(path)
    path.with_suffix(".meta").write_text(meta_text)
    return path


META = """nSavedChans=5
snsApLfSy=4,0,1
acqApLfSy=4,0,1
imSampRate=30000.390639481
imAiRangeMax=0.6
imMaxInt=512
imDatPrb_type=0
imDatPrb_sn=18005116811
imDatPrb_pn=NP1010
snsSaveChanSubset=0:3,768
~imroTbl=(0,4)(0 0 0 500 250 1)(1 0 0 500 250 1)(2 0 0 1000 250 1)(3 0 0 500 250 1)
~snsGeomMap=(NP1010,1,0,70)(0:27:0:1)(0:59:0:1)(0:11:20:1)(0:43:20:1)
"""


def test_a_raw_recording_is_played_as_it_is(tmp_path, emulator):
    samples_SC = np.arange(5000, dtype=np.int16).reshape(1000, 5)
    raw = RawRecording(write_raw(tmp_path, samples_SC, META))
    assert raw.end == 1000
    assert raw.probe.gains == (500, 500, 1000, 500)
    assert raw.probe.sites_C[2].tolist() == [0, 11, 20]
    client = Client(emulator(what=raw)[0])
    assert client.ask("GETSTREAMSAMPLERATE 2 0") == ["30000.390639"]
    assert client.ask("GETSTREAMI16TOVOLTS 2 0 2") == ["1.17187e-06"]
    assert client.ask("GETSTREAMSN 2 0") == ["18005116811 0"]
    np.testing.assert_array_equal(client.fetch(10, 2000)[1], samples_SC[10:])


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ("nSavedChans=5", "nSavedChans=6", "snsApLfSy"),
        ("imSampRate", "other", "imSampRate"),
        ("(0:43:20:1)", "", "index"),
        ("snsSaveChanSubset=0:3,768", "snsSaveChanSubset=0:1", "snsSaveChanSubset"),
    ],
)
def test_a_meta_file_that_does_not_fit_is_told_in_one_line(tmp_path, old, new, word):
    path = write_raw(tmp_path, np.zeros((9, 5), np.int16), META.replace(old, new))
    with pytest.raises(SessionError, match=word) as caught:
        RawRecording(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_cut(tmp_path):
    with pytest.raises(SessionError, match="no file"):
        RawRecording(tmp_path / "none.bin")
    path = write_raw(tmp_path, np.zeros(44, np.int16), META)
    with pytest.raises(SessionError, match="88 bytes, which are no samples of 5 channels"):
        RawRecording(path)


def test_real_recordings_are_played(data_dir, tmp_path, emulator):
    folder = data_dir / "neuropixels_raw"
    whole_SC = np.fromfile(folder / "ap_385ch_1000samples_int16.dat", "<i2").reshape(-1, 385)
    for meta in sorted(folder.glob("*.ap.meta")):
        assert read_meta(meta)["typeThis"] == "imec"
        raw = RawRecording(write_raw(tmp_path, whole_SC, meta.read_text(), meta.stem))
        client = Client(emulator(what=raw)[0])
        assert client.ask("GETSTREAMACQCHANS 2 0") == ["384 0 1"]
        volts = float(client.ask("GETSTREAMI16TOVOLTS 2 0 0")[0])
        assert volts == pytest.approx(0.5 / 8192 / 80 if "NP2" in meta.name else 0.6 / 512 / 500)
        np.testing.assert_array_equal(client.fetch(0, 1000)[1], whole_SC)


# -- with our source -----------------------------------------------------------------------------


def source_on(server, detector, **options):
    port = server.endpoint.split(":")[-1]
    return SpikeGLXSource(f"spikeglx://127.0.0.1:{port}", "tiny", detector, **options)


def in_one_piece(recording, detector, low, high):
    """What a detector finds in all samples of ``[low, high)`` at once."""
    detector.reset(low)
    samples_SC = np.ascontiguousarray(recording.samples(low, high)[:, : recording.probe.ap])
    return detector.detect(samples_SC, low)


def test_the_source_finds_what_the_detector_finds(emulator, recording, session, monkeypatch):
    monkeypatch.setattr(module, "PACE_NS", 0)
    for one in (module, rt_neds.spikeglx_wire):
        monkeypatch.setattr(one, "MAX_FETCH", 700)
    detector, reference = detector_for(recording, session), detector_for(recording, session)
    server, run = emulator(running=False)
    source = source_on(server, detector)
    threading.Timer(0.2, run.start).start()
    domain = session.domain_K2.tolist()
    parts = [in_one_piece(recording, reference, low, high) for low, high in domain]
    got = read_until(source, parts[-1][1])
    source.close()
    found = np.concatenate([batch.records_S for batch in got])
    np.testing.assert_array_equal(found, np.concatenate([spikes for spikes, _ in parts]))
    assert len(found) > 300
    missed = sum(b[0] - a[1] for a, b in itertools.pairwise(domain))
    assert source.counters["missed"] == source.counters["lost"] == missed
    frames, _ = frames_of(got, units=AP)
    holes = [(a[1], b[0]) for a, b in itertools.pairwise(domain)]
    for bin_, observed, *_ in frames:
        touched = any(
            bin_ * 600 < end + detector.settle and (bin_ + 1) * 600 > complete
            for (_, complete), (_, end) in zip(parts, holes, strict=False)
        )
        assert observed is not touched
    assert frames[0][0] == 1  # in the first 3 ms the detector had not settled
    assert [f[0] for f in frames] == list(range(1, parts[-1][1] // 600))


def test_in_real_time_nothing_is_lost_and_a_restart_is_seen(emulator, recording, session):
    server, run = emulator(running=False, speed=1)
    source = source_on(server, detector_for(recording, session))
    client = Client(server)
    threading.Timer(0.2, run.start).start()
    first = read_until(source, 20_000)
    assert client.ask("STOPRUN") == []
    deadline = time.monotonic() + PATIENCE_S
    while "ot running" not in source.trouble:
        assert time.monotonic() < deadline
        source.read(10)
    assert client.ask("STARTRUN") == []
    again = read_until(source, 20_000)
    source.close()
    assert source.counters["epochs"] == 2
    assert source.counters["lost"] == source.counters["disconnected"] == 0
    n = min(len(frames_of(first, AP)[0]), len(frames_of(again, AP)[0]))
    assert frames_of(first, AP)[0][:n] == frames_of(again, AP)[0][:n]
    assert n > 25


# -- replay --------------------------------------------------------------------------------------


def test_a_replay_waits_for_somebody_and_says_what_it_gave(recording, session):
    result = {}

    port = free_port()
    playing = threading.Thread(
        target=lambda: result.update(
            play(recording, bind=f"tcp://127.0.0.1:{port}", speed=0, wait_s=PATIENCE_S)
        )
    )
    playing.start()
    detector = detector_for(recording, session)
    source = SpikeGLXSource(f"spikeglx://127.0.0.1:{port}", "tiny", detector)
    got = read_until(source, recording.end - 200)
    playing.join(PATIENCE_S)
    source.close()
    assert not playing.is_alive()
    assert got[0].first == detector.settle
    assert result["samples"] == recording.end == result["end"]
    assert result["commands"]["FETCH"] >= result["fetches"] > 10
    assert result["zero_ns"] is None


def test_a_replay_that_nobody_asks(recording):
    with pytest.raises(StreamError, match="nobody asked for samples"):
        play(recording, bind="tcp://127.0.0.1:0", wait_s=0.05)
    with pytest.raises(ConfigError, match="a part of the recording"):
        play(recording, bind="tcp://127.0.0.1:0", from_s=100)
    with pytest.raises(ConfigError, match="expected something like tcp://127.0.0.1:4142"):
        play(recording, bind="ipc://x")
    held = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(StreamError, match="stop what holds that port"):
        play(recording, bind=f"tcp://127.0.0.1:{held.getsockname()[1]}")
    held.close()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--raw", "f.bin", "--probe", "imec0"), "holds no spikes"),
        (("--raw", "f.bin", "--probe", "imec0", "--as", "spikeglx"), "no file f.bin"),
        (("--raw", "f.bin", "--as", "spikeglx"), "no probe was named"),
        (("--raw", "f.bin", "--probe", "left", "--as", "spikeglx"), "expected imec0"),
    ],
)
def test_wrong_options_are_told_in_one_line(options, word, capsys):
    assert main(["replay", *options]) == 2
    said = capsys.readouterr().err
    assert word in said
    assert said.count("\n") == 1
