"""Open Ephys: bins are those of the native stream, by whichever plugin they come."""

import threading

import numpy as np
import pytest

from rt_neds.openephys_emulator import Emulator, pieces, send_session
from rt_neds.session import load_session
from rt_neds.stream.watermark import TAIL
from tests.making import write_session
from tests.openephys.checking import (
    BLOCK,
    WIDTH,
    accounted,
    bins_of,
    native,
    through_sockets,
)


@pytest.mark.parametrize(
    ("channels", "block", "lateness_ms"),
    [(1, BLOCK, 0.0), (3, 700, 0.0), (0, BLOCK, 0.0), (0, 2048, 80.0)],
)
def test_bins_are_those_of_the_native_stream(session, port, channels, block, lateness_ms):
    got, source = through_sockets(
        session, port, lambda e: send_session(e, session, speed=0, block=block),
        channels=channels, lateness_ms=lateness_ms,
    )  # fmt: skip
    frames, binner = bins_of(got, 6)
    expected = native(session)
    begin = frames[0][1]
    assert begin == 0 if channels else begin < 10  # without blocks the first spike tells
    last = session.end // WIDTH - (0 if channels else 10)
    assert [f[1] for f in frames][: last - begin] == list(range(begin, last))
    for _, bin_, observed, counts, lost, unknown in frames:
        if bin_ < session.end // WIDTH:
            assert (observed, counts) == expected[bin_]
        assert lost == unknown == 0
    assert source.counters["spikes"] == len(session.records_S)
    assert source.counters["events"] == 2 * len(session.intervals("trials"))
    assert source.counters["lost"] == source.counters["discarded"] == 0
    assert binner.counters["spikes_late"] == 0
    assert accounted(source)


def test_what_was_not_recorded_is_a_hole_here_as_there(tmp_path, port):
    path = write_session(
        tmp_path / "s.h5", seconds=8, domain=[(0.0, 3.01), (3.333, 5.0), (7.0, 8.0)]
    )
    session = load_session(path)
    got, _ = through_sockets(session, port, lambda e: send_session(e, session, speed=0))
    frames, _ = bins_of(got, 6)
    ours = {f[1]: f[2:4] for f in frames if f[1] < session.end // WIDTH}
    assert ours == native(session)


def test_spikes_are_sent_out_of_order_as_the_detector_finds_them(session):
    sent = list(pieces(session, BLOCK))
    whole = np.concatenate([piece.records_S for piece in sent])
    assert sorted(whole.tolist()) == sorted(session.records_S.tolist())
    assert (np.diff(whole["sample"]) < 0).sum() > 50
    for piece in sent[1:]:
        samples, units = piece.records_S["sample"], piece.records_S["unit"]
        assert ((samples >= piece.first - TAIL) & (samples < piece.end - TAIL)).all()
        assert (np.diff(units.astype(int)) >= 0).all()


def test_bins_by_way_of_the_event_broadcaster(session, port):
    got, source = through_sockets(
        session, port, lambda e: send_session(e, session, speed=0), broadcaster=True
    )
    frames, _ = bins_of(got, 6)
    expected = native(session)
    assert len(frames) > 350
    assert all(f[2:4] == expected[f[1]] for f in frames if f[1] in expected)
    assert source.counters["loss_unknown"] == 1
    assert source.counters["spikes"] == len(session.records_S)


def test_open_ephys_own_listener_hears_the_event_broadcaster(session, port):
    listener = pytest.importorskip(
        "open_ephys.streaming", reason="pip install open-ephys-python-tools"
    ).EventListener(port=port)
    emulator = Emulator(
        f"tcp://127.0.0.1:{port}", "ProbeA", session.unit_ids, session.rate, broadcaster=True,
        lossless=True,
    )  # fmt: skip
    assert emulator.wait_for_subscriber(10)
    spikes, events = [], []

    def on_spike(info):
        spikes.append((info["sample_number"], info["electrode"]))
        if len(spikes) == 400:
            raise KeyboardInterrupt  # its own way to end

    sending = threading.Thread(target=send_session, args=(emulator, session), kwargs={"speed": 0})
    sending.start()
    listener.start(ttl_callback=events.append, spike_callback=on_spike)
    listener.context.destroy(linger=0)
    sending.join()
    emulator.close()
    sent = np.concatenate([piece.records_S for piece in pieces(session, BLOCK)])[:400]
    assert spikes == [(s, session.unit_ids[u]) for s, u, _ in sent.tolist()]
    assert events[0] == {
        "event_type": "ttl", "stream": "ProbeA", "source_node": 105, "sample_rate": 30000.0,
        "channel_name": "trials", "sample_number": 30_000, "line": 0, "state": True,
    }  # fmt: skip
