"""A capture goes out as it came: bytes, order, garbage, timing."""

import pytest
import zmq

from rt_neds import cli
from rt_neds.capture import Capture, Stream
from rt_neds.children import free_port
from rt_neds.replay_capture import replay_capture
from tests.capturing import write_capture
from tests.hearing import heard_while

MS = 1_000_000
MESSAGES = [  # disorder, garbage, and a message of the other stream
    (50 * MS, Stream.SPIKES, (b"spikes/imec0", b"late", b"\x00" * 16)),
    (50 * MS, Stream.SPIKES, (b"spikes/imec0", b"early", b"")),
    (90 * MS, Stream.DECODED, (b"decoded/imec0", b"not to be sent")),
    (150 * MS, Stream.SPIKES, (b"\xff\x00",)),
    (140 * MS, Stream.SPIKES, (b"spikes/imec0", b"its stamp goes back", b"1", b"2", b"3")),
    (450 * MS, Stream.SPIKES, (b"source/imec0", b"last")),
]
SENT = [frames for _, stream, frames in MESSAGES if stream == Stream.SPIKES]


def heard(folder, speed):
    """What a subscriber hears of a replay, when (ns), and what the replay says."""
    bind = f"tcp://127.0.0.1:{free_port()}"
    result = {}

    def send():
        result.update(replay_capture(Capture(folder), bind=bind, speed=speed, wait_s=10))

    messages = heard_while(bind, send)
    return [tuple(one) for one, _ in messages], [at_ns for _, at_ns in messages], result


@pytest.mark.parametrize("speed", [0.0, 0.5, 1.0, 4.0])
def test_it_is_sent_as_it_came(tmp_path, speed):
    write_capture(tmp_path, MESSAGES)
    frames, stamps, result = heard(tmp_path, speed)
    assert frames == SENT
    assert (result["messages"], result["probe"], result["damage"]) == (5, "imec0", "")
    elapsed = (stamps[-1] - stamps[0]) / 1e9
    if speed:
        # A busy machine makes it later, never earlier; and the next are not put off by it.
        assert 0.4 / speed - 0.05 <= elapsed < 0.4 / speed + 2
        assert (stamps[2] - stamps[0]) / 1e9 >= 0.1 / speed - 0.05
        assert result["seconds"] >= 0.4 / speed
    else:
        assert result["behind_ms_max"] == 0
        assert result["seconds"] < 0.4


def test_of_a_damaged_capture_it_sends_what_can_be_read_and_says_so(tmp_path, capsys):
    write_capture(tmp_path, MESSAGES)
    path = tmp_path / "000000.capture"
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"its stamp") + 3])
    frames, _, result = heard(tmp_path, 0.0)
    assert frames == SENT[:3]
    assert "cut short" in result["damage"]
    assert result["unread_bytes"] > 0


@pytest.mark.parametrize(
    ("messages", "args", "words"),
    [
        (None, [], "is no capture"),
        (MESSAGES, ["--from", "3"], "leave them out"),
        (MESSAGES, ["--as", "openephys"], "leave them out"),
        (MESSAGES, ["--probe", "imec1"], "leave them out"),
        (MESSAGES, ["--speed", "-1"], "was expected"),
        (MESSAGES, ["--wait", "0.1"], "nobody subscribed to spikes/imec0"),
        (MESSAGES, ["--bind", "nonsense"], "cannot bind"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, tmp_path, messages, args, words):
    if messages is not None:
        write_capture(tmp_path, messages)
    bind = [] if "--bind" in args else ["--bind", f"tcp://127.0.0.1:{free_port()}"]
    assert cli.main(["replay", "--capture", str(tmp_path), *bind, *args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert words in err


def test_a_capture_without_spikes_is_told(tmp_path):
    write_capture(tmp_path, [(1, Stream.DECODED, (b"decoded/imec0", b""))])
    bind = f"tcp://127.0.0.1:{free_port()}"
    with zmq.Context() as context, context.socket(zmq.SUB) as listener:
        listener.connect(bind)
        listener.subscribe(b"")
        with pytest.raises(cli.RtNedsError, match="nothing of the spike stream"):
            replay_capture(Capture(tmp_path), bind=bind, speed=0)


@pytest.mark.parametrize("sender", ["rtneds", "openephys"])
def test_a_part_without_a_recording_is_told_before_anybody_is_waited_for(tiny, capsys, sender):
    argv = ["replay", "--session", str(tiny[0]), "--probe", "p", "--as", sender]
    for part in (["--from", "1000"], ["--from", "20", "--to", "10"]):
        assert cli.main([*argv, *part]) == 2  # not after 30 s, for want of a listener
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert f"nothing recorded {' '.join(part)}; it was recorded from 0 to 60 s" in told


def test_a_session_needs_a_probe(capsys):
    assert cli.main(["replay", "--session", "s.h5"]) == 2
    assert "--probe NAME" in capsys.readouterr().err
