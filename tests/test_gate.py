"""Each bin goes out once and in order, whatever becomes of the two workers that decode it."""

from hypothesis import given
from hypothesis import strategies as st

from rt_neds.frames import DecodedFrame
from rt_neds.stream.board import Accounted, Board
from rt_neds.stream.gate import Frame, Turns

HOLD = 10
ACTIVE, OTHER = 0, 1


def frame(bin_, writer=ACTIVE, epoch=1):
    return Frame(epoch, bin_, writer, (b"decoded/p", b""))


def bins(frames):
    return [(f.epoch, f.bin, f.writer) for f in frames]


def test_the_standby_waits_and_takes_over_at_the_first_bin_that_is_missed():
    turns = Turns(HOLD)
    assert bins(turns.take(ACTIVE, frame(0), 0)) == [(1, 0, ACTIVE)]
    assert turns.take(OTHER, frame(0, OTHER), 1) == []
    assert turns.take(OTHER, frame(1, OTHER), 20) == []
    assert turns.due_ns == 20 + HOLD
    assert turns.overdue(29) == []
    assert bins(turns.take(ACTIVE, frame(1), 29)) == [(1, 1, ACTIVE)]
    assert turns.due_ns is None
    assert turns.take(OTHER, frame(2, OTHER), 40) == []
    assert turns.take(OTHER, frame(3, OTHER), 45) == []
    assert bins(turns.overdue(50)) == [(1, 2, OTHER), (1, 3, OTHER)]
    assert turns.active == OTHER
    assert bins(turns.take(OTHER, frame(4, OTHER), 60)) == [(1, 4, OTHER)]
    # The one that had only paused comes again with what it owes: nobody needs it any more.
    assert [turns.take(ACTIVE, frame(n), 61) for n in (2, 3, 4)] == [[], [], []]
    assert turns.take(ACTIVE, frame(5), 62) == []
    assert bins(turns.take(OTHER, frame(5, OTHER), 63)) == [(1, 5, OTHER)]


def test_what_the_active_one_leaves_out_comes_from_the_other():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(0), 0)
    for n in (1, 2, 3):
        turns.take(OTHER, frame(n, OTHER), 1)
    came = turns.take(ACTIVE, frame(3), 2)
    assert bins(came) == [(1, 1, OTHER), (1, 2, OTHER), (1, 3, ACTIVE)]
    assert turns.active == ACTIVE


def test_a_replacement_waits_behind_the_one_whose_context_is_full():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(0), 0)
    turns.take(OTHER, frame(0, OTHER), 0)
    assert turns.take(ACTIVE, frame(1, writer=2), 1) == []
    assert bins(turns.take(OTHER, frame(1, OTHER), 2)) == [(1, 1, OTHER)]
    assert (turns.speaks(ACTIVE, 2), turns.speaks(OTHER, OTHER)) == (False, True)
    killed = Turns(HOLD)
    killed.take(ACTIVE, frame(0), 0)
    assert killed.speaks(ACTIVE, ACTIVE)
    assert not killed.speaks(ACTIVE, 2)  # it says its schema before its first frame
    alone = Turns(HOLD)
    alone.take(ACTIVE, frame(0), 0)
    assert bins(alone.take(ACTIVE, frame(5, writer=2), 1)) == [(1, 5, 2)]


def test_an_acquisition_that_is_over_does_not_come_back():
    turns = Turns(HOLD)
    turns.take(ACTIVE, frame(7), 0)
    turns.take(OTHER, frame(8, OTHER), 1)
    came = turns.take(ACTIVE, frame(0, epoch=2), 2)
    assert bins(came) == [(1, 8, OTHER), (2, 0, ACTIVE)]
    assert turns.take(OTHER, frame(9, OTHER), 3) == []
    assert turns.due_ns is None
    assert turns.overdue(100) == []


def test_a_gate_in_the_place_of_another_repeats_nothing():
    turns = Turns(HOLD, last=(1, 4))
    assert turns.take(OTHER, frame(4, OTHER), 0) == []
    assert bins(turns.take(OTHER, frame(5, OTHER), 1)) == [(1, 5, OTHER)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["active", "other", "both", "restart", "wait"]), st.integers(1, 25)
        ),
        max_size=80,
    )
)
def test_every_bin_that_anyone_delivered_goes_out_once_and_in_order(events):
    """Workers that pause, leave out bins, and are replaced; both number bins alike."""
    turns, now, out, delivered = Turns(HOLD), 0, [], set()
    next_bin, writer = [0, 0], [ACTIVE, OTHER]
    for what, amount in events:
        now += amount
        out += turns.overdue(now)
        places = {"active": [0], "other": [1], "both": [0, 1]}.get(what, [])
        for place in places:
            at = next_bin[place]
            next_bin[place] += 1
            delivered.add(at)
            out += turns.take(place, frame(at, writer[place]), now)
        if what == "restart":
            place = amount % 2
            writer[place] += 2
            next_bin[place] = max(next_bin)
    out += turns.overdue(now + HOLD)
    numbers = [f.bin for f in out]
    assert numbers == sorted(set(numbers))
    assert set(numbers) <= delivered
    if delivered:
        assert {n for n in delivered if n > numbers[0]} <= set(numbers)


class Nowhere:
    def __init__(self):
        self.notes = []

    def write(self, frame):
        pass

    def note(self, kind, fields):
        self.notes.append(fields)

    def beside(self, probe):
        return self


def test_the_board_knows_how_long_there_was_nothing_and_which_bins_are_missing():
    board, sink = Board(["a", "b"], 1), Nowhere()

    def write(writer, probe, epoch, bin_):
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
    told = sink.notes[-1]["supervision"]
    assert (told["restarts"], told["handovers"], told["bins_missed"]) == (1, 1, 2)
    assert told["recovery_ms"] > 0
    assert told["handover"] == {"from": {"epoch": 1, "bin": 8}, "to": {"epoch": 1, "bin": 11}}
    write(2, "a", 2, 40)  # another acquisition: no bins of it are missing
    assert board.status("a")["bins_missed"] == 2
    assert board.last("a") == (2, 40)
    assert board.last("b") is None
