"""What bench concludes from what it measured."""

import itertools
import os
import socket

import numpy as np
import pytest

from rt_neds import children
from rt_neds.bench import late_line, show, term_lines, terms
from rt_neds.bench_input import random_bundle
from rt_neds.bench_step import Fetched, bench_step, paced, percentiles
from rt_neds.bundle import load_spec
from rt_neds.children import free_port
from rt_neds.frames import DecodedFrame
from rt_neds.latency import Tally, stolen_ms


def test_counts_are_shown_whole(capsys):
    took = percentiles([1.0] * 200)
    step = {"step_us": {"hot": took, "paced": took}, "eager_us": {"hot": took, "paced": took}}
    ratios = {"window_over_step": 1.0, "eager_over_step": 1.0, "eager_over_step_paced": 1.0}
    about = {"machine": {"cpu": "a cpu"}, "device": "cpu", "model": "small", "units": 3}
    show({**about, **step, **ratios, "window_us": took, "max_abs_error": 0.0})
    shown = capsys.readouterr().out
    assert " 200 " in shown
    assert "200.00" not in shown


def report(p50, p99_9, missed, control_p50=0.3, control_p99_9=2.0):
    ours = {"p50": p50, "p99": 1.0, "p99_9": p99_9, "max": 9.0}
    control = {"p50": control_p50, "p99": 1.0, "p99_9": control_p99_9, "max": 9.0}
    return {"missed": missed, "stages_ms": {"bin_end_to_publish": ours, "control": control}}


def test_terms_allow_the_control_and_so_many_steps():
    met = terms(report(0.3 + 0.119, 2.0 + 0.299, 4), control_missed=4, step_ms=0.1)
    assert [met[name]["met"] for name in ("p50_ms", "p99_9_ms", "missed")] == [True] * 3
    assert met["p50_ms"] == {"came": pytest.approx(0.419), "may": 0.42, "met": True}
    assert met["p99_9_ms"]["may"] == 2.3
    failed = terms(report(0.3 + 0.121, 2.0 + 0.301, 5), control_missed=4, step_ms=0.1)
    assert [failed[name]["met"] for name in ("p50_ms", "p99_9_ms", "missed")] == [False] * 3
    assert failed["missed"] == {"came": 5, "may": 4, "met": False}
    lines = term_lines(failed)
    assert len(lines) == 3
    assert all(line.startswith("NOT met: ") for line in lines)
    assert lines[2].endswith("5, may be 4")


def test_terms_of_a_run_without_bins_are_not_met():
    nothing = terms(report(float("nan"), float("nan"), 10), control_missed=0, step_ms=0.1)
    assert not any(nothing[name]["met"] for name in ("p50_ms", "p99_9_ms", "missed"))


def test_a_late_bin_counts_once_where_it_was_first_late():
    tally, ms, frames = Tally(bin_ms=20.0), 1_000_000, []
    for bin, (sent, received, published) in enumerate(
        [(1, 2, 3), (1, 2, 20), (1, 2, 21), (1, 22, 23), (30, 31, 32), (30, 31, 32)]
    ):
        end = (bin + 1) * 600  # 20 ms of 30 kHz, and 20 ms of the sender's clock
        stamps = dict(sent=sent, received=received, binned=received, decoded=published)
        stamps["published"] = published
        frame = DecodedFrame(
            probe="p", epoch=0, bin=bin, end=end, values_V=np.zeros(0, np.float32), flags=0,
            spikes=0, late=0, unknown=0, lost=0, model="m",
            stamps={name: (20 * (bin + 1) + at) * ms for name, at in stamps.items()},
        )  # fmt: skip
        frames.append(frame)
    said = {"first": 0, "zero_ns": 0, "rate": 30_000.0}
    tally.take(frames[:5], said)
    assert tally.stalls == 1  # from the third on
    tally.take(frames[5:], said)
    assert tally.stalls == 2  # another turn, another stall
    assert tally.late_when == {"sent": 2, "received": 1, "published": 1}
    assert tally.longest == [  # 60 to 100 ms into the first turn, and alone in the second
        {"s": 0.06, "ms": 32.0, "bins": 3, "when": "published"},
        {"s": 0.12, "ms": 32.0, "bins": 1, "when": "sent"},
    ]
    report = tally.report(tally, expected=7)
    assert report["missed"] == 4 + 1  # one never came
    assert report["late_when"] == tally.late_when
    line = "decoded: 2 late when sent, 1 late when received, 1 late when published, in 2 stalls"
    assert late_line("decoded", tally.late_when, 2, [], None) == line
    line += " (at most 32 ms, 0.1 s into a turn)"
    assert late_line("decoded", tally.late_when, 2, tally.longest, None) == line
    assert late_line("decoded", tally.late_when, 2, tally.longest, 20.0).startswith(
        line + "; 20 ms of"
    )


def test_what_a_host_took_is_told_or_not_known(tmp_path):
    assert stolen_ms(tmp_path) is None
    (tmp_path / "stat").write_text("cpu 1 2 3 4 5 6 7\n")  # a kernel that does not say
    assert stolen_ms(tmp_path) is None
    (tmp_path / "stat").write_text("cpu 1 2 3 4 5 6 7 250 9 0\ncpu0 1\n")
    assert stolen_ms(tmp_path) == 250_000 / os.sysconf("SC_CLK_TCK")
    tally = Tally(bin_ms=20.0)
    tally.steal(100.0, 130.0)
    tally.steal(200.0, 210.0)
    assert tally.stolen_ms == 40.0
    tally.steal(None, None)
    tally.steal(200.0, 210.0)
    assert tally.stolen_ms is None


def test_paced_steps_take_turns_and_are_all_timed():
    calls = []

    class Noted:
        def __init__(self, name):
            self.name = name

        def steps(self, counts_TN, observed_T):
            calls.append((self.name, int(counts_TN[0][0]), observed_T))

        def fetch(self):
            calls.append((self.name, "fetched"))

    counts_TN = np.arange(3, dtype=np.float32)[:, None]
    paced({"a": Fetched(Noted("a")), "b": Noted("b")}, counts_TN, 2, 0.0)
    one = [("a", "fetched"), ("a", 0, (True,)), ("b", 0, (True,))]
    assert calls == [*one, ("a", "fetched"), ("a", 1, (True,)), ("b", 1, (True,))]
    calls.clear()
    took = paced({"a": Noted("a"), "b": Noted("b")}, counts_TN, 4, 0.001)
    assert {name: len(us) for name, us in took.items()} == {"a": 4, "b": 4}
    assert calls[:4] == [("a", 0, (True,)), ("b", 0, (True,)), ("a", 1, (True,)), ("b", 1, (True,))]
    assert calls[-1] == ("b", 0, (True,))
    assert percentiles([1.0, 2.0, 3.0])["p50"] == 2.0


def test_a_random_bundle_is_a_bundle_and_its_step_is_measured(tmp_path):
    path = random_bundle(tmp_path / "b", "small", 7, 5.0, 2)
    assert load_spec(path).bin_ms == 5.0
    result = bench_step(
        bundle=str(path), size="small", units=7, behaviours=2, seconds=0.2, device="cpu"
    )
    assert result["max_abs_error"] < 1e-4
    assert result["window_over_step"] > 1
    assert set(result) >= {"step_us", "eager_us", "window_us", "eager_over_step"}
    assert set(result["step_us"]) == {"hot", "paced", "fetched"}


def test_a_free_port_is_one_that_nobody_holds_nor_the_next(monkeypatch):
    taken, free = free_port(), free_port()
    monkeypatch.setattr(children, "PORTS", (taken, free))
    monkeypatch.setattr(children, "_ports", itertools.cycle((taken, free)))
    for held in (taken, taken + 1):
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", held))
            assert free_port() == free
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", taken))
        second.bind(("127.0.0.1", free + 1))
        with pytest.raises(children.ChildError, match="no port from"):
            free_port()
