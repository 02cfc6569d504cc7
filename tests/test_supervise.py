"""A worker that fails by itself is replaced as one that is killed: a GPU that is gone, say."""

import errno
import os
import signal
import time
from types import SimpleNamespace

import pytest

from rt_neds import supervise
from rt_neds.errors import ConfigError, DeviceError
from rt_neds.stream.board import Board
from rt_neds.supervise import CAN_FORK, GIVE_UP, Supervisor, WorkerError

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="supervision forks, which needs Linux")


def test_whatever_a_worker_raises_another_takes_its_place(tmp_path, capfd):
    board, said = Board(["p"], 1), []

    def work(line):
        (tmp_path / str(line.writer)).write_text(str(line.restarts))
        while not line.stop():
            if line.writer < 2:  # as PyTorch says it
                raise RuntimeError("CUDA error: device-side assert triggered")

    supervisor = Supervisor([("decoding worker", work)], board, 60_000, said.append)
    supervisor.run(lambda: (tmp_path / "2").exists())
    assert [(tmp_path / str(n)).read_text() for n in range(3)] == ["0", "1", "2"]
    assert board.restarts == 2
    assert all("exit code 1" in line and "another takes its place" in line for line in said)
    assert capfd.readouterr().err.count("RuntimeError: CUDA error") == 2


def test_who_ends_all_processes_at_once_is_not_told_that_they_died(tmp_path):
    """As systemd does: the workers may be gone before we are asked to stop."""
    board, said = Board(["p"], 1), []

    def work(line):
        (tmp_path / "began").touch()

    supervisor = Supervisor([("worker", work)], board, 60_000, said.append)
    supervisor.run(lambda: (tmp_path / "began").exists())
    assert said == []
    assert board.restarts == 0


def live(line, seconds=60.0):
    """Give signs of life until told to stop."""
    until = time.monotonic() + seconds
    while not line.stop() and time.monotonic() < until:
        signal.sigtimedwait([signal.SIGUSR1], 0.01)


def test_one_that_hangs_is_replaced_and_who_has_much_to_load_is_not(tmp_path):
    hang_s, said = 0.8, []

    def work(line):
        if line.writer == 0:
            live(line, 0.1)
            time.sleep(60)
        time.sleep(1.25 * hang_s)  # its first sign of life is still to come
        live(line, 0.1)
        line.starting()
        time.sleep(1.25 * hang_s)
        live(line, 0.3)
        (tmp_path / "lives").write_text(str(line.restarts))
        live(line)

    began, board = time.monotonic(), Board(["p"], 1)
    supervisor = Supervisor([("worker", work)], board, 1000 * hang_s, said.append)
    supervisor.run((tmp_path / "lives").exists)
    assert time.monotonic() - began > 3.5 * hang_s
    assert len(said) == board.restarts == 1
    assert "gave no sign of life" in said[0]
    assert (tmp_path / "lives").read_text() == "1"


def test_nobody_is_silent_while_the_whole_machine_sleeps(tmp_path, monkeypatch):
    now, board = [0.0], Board(["p"], 1)
    monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def work(line):
        line.stop()
        time.sleep(0.5)
        (tmp_path / "lives").touch()
        live(line)

    def stop():
        now[0] += 100
        return board.restarts > 0 or (tmp_path / "lives").exists()

    Supervisor([("worker", work)], board, 60_000, lambda line: None).run(stop)
    assert board.restarts == 0


def test_the_last_to_begin_is_the_first_to_end_and_who_does_not_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "END_S", 1.5)

    def work(name):
        def work(line):
            (tmp_path / name).write_text(str(os.getpid()))
            live(line)
            with (tmp_path / "ended").open("a") as file:
                file.write(name)
            time.sleep(60 * (name == "b"))

        return name, work

    supervisor = Supervisor([work(name) for name in "abc"], Board(["p"], 3), 60_000, print)
    supervisor.run(lambda: all((tmp_path / name).exists() for name in "abc"))
    assert (tmp_path / "ended").read_text() == "cba"
    for name in "abc":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)


def test_who_is_told_to_end_before_it_listens_ends_by_itself(tmp_path, monkeypatch):
    class Interrupted(supervise.Lifeline):
        def __init__(self, *tied):
            os.kill(os.getpid(), signal.SIGTERM)
            super().__init__(*tied)

    monkeypatch.setattr(supervise, "Lifeline", Interrupted)
    said, before = [], signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def work(line):
        (tmp_path / "told").write_text(str(line.stop()))

    supervisor = Supervisor([("worker", work)], Board(["p"], 1), 60_000, said.append)
    supervisor.run(lambda: (tmp_path / "told").exists())
    assert (tmp_path / "told").read_text() == "True"
    assert said == []
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_key_that_ends_the_parent_is_not_for_the_workers(tmp_path):
    said = []

    def work(line):
        os.kill(os.getpid(), signal.SIGINT)
        live(line, 0.1)
        (tmp_path / "lives").touch()
        live(line)

    supervisor = Supervisor([("worker", work)], Board(["p"], 1), 60_000, said.append)
    supervisor.run((tmp_path / "lives").exists)
    assert said == []


def dying(monkeypatch, tmp_path, **constants):
    """Let a worker die until it is given up, eight times at the most."""
    for name, value in constants.items():
        monkeypatch.setattr(supervise, name, value)

    def work(line):
        (tmp_path / str(line.writer)).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    supervisor = Supervisor([("worker", work)], Board(["p"], 1), 60_000, lambda line: None)
    supervisor.run(lambda: (tmp_path / "7").exists())


def test_one_that_keeps_dying_is_given_up_however_long_it_lived_each_time(tmp_path, monkeypatch):
    """While nobody sends, a worker that cannot work waits for seconds before that shows."""
    with pytest.raises(WorkerError, match=f"for the {GIVE_UP}th time within a minute"):
        dying(monkeypatch, tmp_path, SETTLED_S=0.0)
    assert len(list(tmp_path.iterdir())) == GIVE_UP


def test_one_that_dies_now_and_then_is_replaced_each_time(tmp_path, monkeypatch):
    dying(monkeypatch, tmp_path, SETTLED_S=0.0, MANY_S=0.0)
    assert len(list(tmp_path.iterdir())) == 8


def test_one_that_dies_at_once_is_not_begun_at_once_again_and_again(tmp_path, monkeypatch):
    began = time.monotonic()
    with pytest.raises(WorkerError, match="for the 4th time"):
        dying(monkeypatch, tmp_path, GIVE_UP=4)
    assert time.monotonic() - began > 0.2 + 0.4


@pytest.mark.parametrize("kind", [DeviceError, ConfigError])
def test_what_a_person_must_mend_ends_it(kind):
    def work(line):
        raise kind("no such card; expected one: choose device = cpu")

    supervisor = Supervisor([("worker", work)], Board(["p"], 1), 60_000, lambda line: None)
    with pytest.raises(WorkerError, match="no such card") as caught:
        supervisor.run(lambda: False)
    assert caught.value.exit_code == kind.exit_code


def test_one_that_is_killed_is_named_with_its_signal(tmp_path):
    said = []

    def work(line):
        if line.writer == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / "lives").touch()
        live(line)

    supervisor = Supervisor([("worker", work)], Board(["p"], 1), 60_000, said.append)
    supervisor.run(lambda: (tmp_path / "lives").exists())
    assert len(said) == 1
    assert "SIGKILL" in said[0]


@pytest.mark.parametrize("units", [10, 4000, 100_000])
def test_what_is_remembered_may_be_long(tmp_path, units):
    """As an announcement may be."""
    ids = [f"{n:036}" for n in range(units)]

    def work(line):
        if line.writer == 0:
            line.remember("p", ["session", 3e4, ids])
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / "heard").write_text(str(line.heard == {"p": ["session", 3e4, ids]}))
        live(line)

    supervisor = Supervisor([("worker", work)], Board(["p"], 1), 60_000, lambda line: None)
    supervisor.run(lambda: (tmp_path / "heard").exists())
    assert (tmp_path / "heard").read_text() == "True"


def test_a_word_that_a_worker_could_not_finish_is_no_word(tmp_path):
    def work(line):
        if line.writer == 0:
            line.remember("p", ["whole"])
            line._words.sendall(b'["heard", "q", ["half')
            os.kill(os.getpid(), signal.SIGKILL)
        if line.writer == 1:
            line.remember("r", ["also whole"])
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / "heard").write_text(str(line.heard))
        live(line)

    supervisor = Supervisor([("worker", work)], Board(["p"], 1), 60_000, lambda line: None)
    supervisor.run(lambda: (tmp_path / "heard").exists())
    assert (tmp_path / "heard").read_text() == "{'p': ['whole'], 'r': ['also whole']}"


@pytest.mark.parametrize("failures", [1, GIVE_UP])
def test_a_system_that_cannot_fork_now_is_asked_again(tmp_path, monkeypatch, failures):
    """Of memory, or of processes, there may be too few for a moment."""
    said, fork, may = [], os.fork, iter([True] + failures * [False])

    def fork_or_not():
        if next(may, True):
            return fork()
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    def first(line):
        live(line)
        (tmp_path / "ended").touch()

    def second(line):
        (tmp_path / "lives").write_text(str(line.restarts))
        first(line)

    monkeypatch.setattr(os, "fork", fork_or_not)
    board = Board(["p"], 2)
    supervisor = Supervisor([("first", first), ("second", second)], board, 60_000, said.append)
    if failures < GIVE_UP:
        supervisor.run((tmp_path / "lives").exists)
        assert (tmp_path / "lives").read_text() == "0"
        assert board.restarts == 0
        assert len(said) == 1
        assert "the second could not begin (Resource temporarily unavailable)" in said[0]
    else:
        with pytest.raises(WorkerError, match="second could not begin .*for the 5th time"):
            supervisor.run((tmp_path / "lives").exists)
    assert (tmp_path / "ended").exists()
