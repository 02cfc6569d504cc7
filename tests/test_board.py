"""The board: how long there was nothing, which bins are missing, and of which probe."""

from rt_neds.frames import DecodedFrame
from rt_neds.stream.board import Accounted, Board


class Nowhere:
    def __init__(self, probe="a"):
        self.probe, self.notes = probe, []

    def write(self, frame):
        pass

    def note(self, kind, fields):
        self.notes.append((self.probe, fields))

    def beside(self, probe):
        other = Nowhere(probe)
        other.notes = self.notes
        return other


def test_the_board_knows_how_long_there_was_nothing_and_which_bins_are_missing(monkeypatch):
    now = [10**15]
    monkeypatch.setattr("rt_neds.stream.board.monotonic_ns", lambda: now[0])
    board, sink = Board(["a", "b"], 1), Nowhere()

    def write(writer, probe, epoch, bin_):
        now[0] += 120_000_000
        decoded = DecodedFrame(probe, epoch, bin_, 0, None, 0, 0, 0, 0, 0, "m")
        Accounted(sink, board, writer, "a").beside(probe).write(decoded)

    assert board.status("a")["recovery_ms"] is None
    assert board.last("a") is None
    write(0, "a", 1, 5)
    write(0, "a", 1, 8)  # a hole of the stream's own is no matter of ours
    assert board.status("a") == {
        "restarts": 0, "handovers": 0, "bins_missed": 0, "recovery_ms": None, "handover": None,
    }  # fmt: skip
    board.note_restart()
    write(1, "a", 1, 11)
    Accounted(sink, board, 1, "a").note("status", {"x": 1})
    of, told = sink.notes[-1][0], sink.notes[-1][1]["supervision"]
    assert (of, told["restarts"], told["handovers"], told["bins_missed"]) == ("a", 1, 1, 2)
    assert told["recovery_ms"] == 120
    assert told["handover"] == {"from": {"epoch": 1, "bin": 8}, "to": {"epoch": 1, "bin": 11}}
    write(2, "a", 2, 40)  # another acquisition: no bins of it are missing
    assert board.status("a")["bins_missed"] == 2
    write(1, "a", 2, 30)  # nor of what is sent again
    assert board.status("a")["bins_missed"] == 2
    assert board.last("a") == (2, 30)
    assert board.last("b") is None
    write(3, "b", 2, 40)  # whoever is the first takes nobody's place
    assert (board.last("a"), board.last("b")) == ((2, 30), (2, 40))
    Accounted(sink, board, 1, "a").beside("b").note("status", {})
    assert sink.notes[-1][0] == "b"
    assert sink.notes[-1][1]["supervision"]["handovers"] == 0
