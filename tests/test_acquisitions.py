"""One acquisition has one name, whoever reads it and whenever; another has another."""

import multiprocessing
import os
import time

import pytest

import rt_neds.stream.acquisitions as module
from rt_neds.stream.acquisitions import Acquisitions

RATE, S = 30_000.0, 1_000_000_000
NOW = 10**15


def sample(seconds):
    return round(seconds * RATE)


MET = {  # where one was at a moment, and what is met then, in seconds; is it the same?
    "it goes on": (100.0, 0.0, 105.0, 5.0, True),
    "it goes on, heard late": (100.0, 0.0, 104.2, 5.0, True),
    "it goes on, and had been heard late": (100.0, 0.0, 105.8, 5.0, True),
    "it stalls": (100.0, 0.0, 100.0, 50.0, True),
    "it went back": (100.0, 0.0, 99.9, 50.0, False),
    "another, that began since": (100.0, 0.0, 3.0, 5.0, False),
    "another, further on than ours was": (100.0, 0.0, 110.0, 111.0, False),
    "another, that began soon after a short one": (2.0, 0.0, 4.5, 5.0, False),
    "two that have just begun to read": (0.02, 0.0, 0.025, 0.005, True),
    "another, after one of two seconds": (2.0, 0.0, 0.1, 0.3, False),
}


@pytest.mark.parametrize("name", MET)
def test_a_count_that_goes_on_is_of_the_same(name):
    at_s, then_s, met_s, now_s, same = MET[name]
    acquisitions = Acquisitions()
    first = acquisitions.name(sample(at_s), NOW + round(then_s * S), RATE)
    second = acquisitions.name(sample(met_s), NOW + round(now_s * S), RATE)
    assert (first == second) == same
    assert second >= first > 0


def test_what_follows_the_one_we_read_is_another_however_it_counts():
    acquisitions = Acquisitions()
    first = acquisitions.name(sample(0.2), NOW, RATE)
    second = acquisitions.name(sample(0.3), NOW + S // 10, RATE, previous=first)
    assert second > first
    # Who still reads the first, and meets the second later, calls it so too.
    assert acquisitions.name(sample(0.4), NOW + S // 5, RATE, previous=first) == second
    assert acquisitions.name(sample(0.4), NOW + S // 5, RATE, previous=second + 7) == second


def test_clocks_that_drift_apart_for_hours_make_no_other_of_it():
    acquisitions = Acquisitions()
    epoch = acquisitions.name(0, NOW, RATE)
    for minute in range(1, 600):  # 100 millionths: 3.6 s in ten hours
        at = NOW + minute * 60 * S
        acquisitions.reached(epoch, sample(minute * 60 * 1.0001), at)
    assert acquisitions.name(sample(36_000 * 1.0001), NOW + 36_000 * S, RATE) == epoch


def test_where_one_is_is_written_once_a_second_and_of_the_last_one_named_alone():
    acquisitions = Acquisitions()
    first = acquisitions.name(0, NOW, RATE)
    acquisitions.reached(first, 77, NOW + S - 1)
    assert acquisitions._row["sample"] == 0
    acquisitions.reached(first, 78, NOW + S)
    assert (acquisitions._row["sample"], acquisitions._row["at_ns"]) == (78, NOW + S)
    acquisitions.reached(first, 79, NOW + S + 1)
    assert acquisitions._row["sample"] == 78
    assert acquisitions._lock.acquire(False)  # nobody has it
    acquisitions._lock.release()
    acquisitions.name(5, NOW + 2 * S, RATE, previous=first)
    acquisitions.reached(first, sample(90), NOW + 9 * S)  # another process has not noticed yet
    assert acquisitions._row["sample"] == 5


needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="processes that share need fork"
)


@needs_fork
def test_processes_that_meet_one_at_once_agree(monkeypatch):
    def in_no_hurry():
        time.sleep(0.01)
        return time.time_ns()

    monkeypatch.setattr(module, "time_ns", in_no_hurry)
    monkeypatch.setattr(module, "WAIT_S", 10.0)
    fork = multiprocessing.get_context("fork")
    for _ in range(5):
        acquisitions, names, go = Acquisitions(), fork.Queue(), fork.Event()

        def meet(acquisitions=acquisitions, names=names, go=go):
            go.wait()
            names.put(acquisitions.name(3, NOW, RATE))

        both = [fork.Process(target=meet) for _ in range(2)]
        for process in both:
            process.start()
        go.set()
        assert names.get(timeout=30) == names.get(timeout=30)
        for process in both:
            process.join()


@needs_fork
def test_who_dies_while_naming_keeps_nobody_for_long(monkeypatch):
    acquisitions = Acquisitions()
    first = acquisitions.name(sample(50), NOW, RATE)

    def die():
        acquisitions._lock.acquire()
        os._exit(1)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    began = time.monotonic()
    acquisitions.reached(first, sample(60), NOW + 10 * S)  # on the way of spikes: never waits
    assert time.monotonic() - began < module.WAIT_S
    assert acquisitions.name(sample(60), NOW + 10 * S, RATE) == first
    assert time.monotonic() - began < 20 * module.WAIT_S
