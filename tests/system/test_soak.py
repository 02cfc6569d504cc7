"""The soak in short: faults injected into real processes, and every bin accounted for."""

import pytest

from rt_neds.frames import DecodedFrame, Flag
from rt_neds.soak import soak
from rt_neds.soak_books import CUT_SHORT, MISSED, NOT_RECORDED, ON_ITS_WAY, UNACCOUNTED, Books
from rt_neds.soak_faults import KILLED, ROTATION
from rt_neds.supervise import CAN_FORK

needs_fork = pytest.mark.skipif(not CAN_FORK, reason="supervision forks, which needs Linux")


def clean(result, unexpected=("stale",)):
    """Nothing is unaccounted or wrong; what only a busy machine can add is forgiven."""
    assert result["ended_early"] is None
    assert result["unaccounted"] == 0, result["unaccounted_bins"]
    assert result["bins_expected"] == sum(result["fates"].values())
    assert not any(result["checks"].values()), result["checks"]
    for fault in result["fault_log"]:
        assert fault["injected"] > 0
        assert fault["reported"] == fault["injected"], fault
        # A machine so busy that the acquisition stalls by itself is no mistake of the books.
        wrong = [line for line in fault["wrong"] if line.split()[0] not in unexpected]
        assert wrong == [], fault


@needs_fork
@pytest.mark.timeout(400)
def test_three_faults_are_told_exactly_and_every_bin_is_accounted_for(tiny):
    kinds = ("dropped", "renumbered", KILLED)
    result = soak(
        minutes=0.25, bundle=str(tiny[1] / "bundle"), modes=("cold",), kinds=kinds,
        period_s=5.0, control=False, spikes_per_s=500.0,
    )  # fmt: skip
    assert [fault["kind"] for fault in result["fault_log"]][:3] == list(kinds)
    clean(result)
    assert result["recovery_ms"]["cold"] > 0
    assert result["bins_published"] > 500


@needs_fork
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_fault_without_a_standby_and_with_one():
    result = soak(minutes=10.0)
    assert {fault["kind"] for fault in result["faults"]} == set(ROTATION)
    clean(result)
    assert result["rss_growth_mb"] < 20


def frame(bin_, spikes=3, unknown=0, flags=0, epoch=1):
    stamps = dict.fromkeys(("sent", "received", "binned", "decoded", "published"), 10)
    return DecodedFrame("p", epoch, bin_, 0, None, flags, spikes, 0, unknown, 0, "m", stamps)


def books_of(bins, state="whole"):
    books = Books()
    for n in bins:
        books.take_entry(["bin", 1, n, 3, 0, state])
    return books


def test_every_bin_that_did_not_come_needs_a_reason():
    books = books_of(range(20))
    for n, state in ((20, "absent"), (21, "cut")):
        books.take_entry(["bin", 1, n, 3, 0, state])
    for n in (0, 1, 2, 3, 5, 6, 7, 15, 16, 17, 19):
        books.take_frame(frame(n))
    handover = {"from": {"epoch": 1, "bin": 8}, "to": {"epoch": 1, "bin": 14}}
    for _ in range(2):  # the status says it every second
        books.take_handover({"handover": handover})
    fates = books.fates()
    # 8 and 14 were written, 9 to 13 were not; 4 and 18 are far from the handover.
    assert (fates[MISSED], fates[ON_ITS_WAY], fates[UNACCOUNTED]) == (5, 2, 2)
    assert (fates[NOT_RECORDED], fates[CUT_SHORT]) == (1, 1)
    assert sum(fates.values()) == 22
    assert books.unaccounted() == [(1, 4), (1, 18)]


def test_the_books_see_what_is_wrong_with_frames():
    books = books_of(range(4))
    books.take_entry(["bin", 1, 4, 2, 0, "holed"])
    books.take_entry(["bin", 1, 5, 0, 0, "absent"])
    for one in (
        frame(0), frame(0), frame(2, spikes=4), frame(1), frame(3, unknown=1),
        frame(4, spikes=2), frame(5, spikes=0), frame(9),
    ):  # fmt: skip
        books.take_frame(one)
    assert books.check() == {
        "repeated": 1, "out_of_order": 1, "wrong_counts": 2, "never_sent": 2, "holes_unflagged": 1,
        "missing_unasked": 0,
    }  # fmt: skip
    books = books_of(range(9))
    for n in range(9):
        books.take_frame(frame(n, flags=int(Flag.MISSING_UNITS) if n in (2, 3, 7) else 0))
    books.muted.append((1, 1, 4))
    assert books.check()["missing_unasked"] == 1
    assert books.missing_in(1, 1, 4) == 2


def test_a_bin_ends_when_the_acquisitions_clock_says_so_even_after_a_slip():
    books = Books()
    books.take_entry(["zero", 1, 0, 1_000])
    books.take_entry(["zero", 1, 30_000, 2_000])
    assert books.ended_ns(1, 30_000) == 1_000_001_000
    assert books.ended_ns(1, 30_600) == 1_020_002_000
    assert books.ended_ns(2, 0) is None
