"""Keeps processes alive: forks them, watches their signs of life, replaces the dead and the hung.

The parent loads all that takes long (torch, bundles, compiled kernels) and then only forks: a
replacement begins with everything loaded. It must have no threads and no sockets of its own, since
a fork has neither.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from rt_neds.clock import monotonic_ns
from rt_neds.errors import RtNedsError
from rt_neds.stream.board import Board

CAN_FORK = sys.platform == "linux"
"""macOS can fork as well, but its own libraries do not survive it."""
POLL_S = 0.05
START_S = 120.0
END_S = 3.0
SETTLED_S = 2.0
"""Who lived for so long is replaced at once; one that did not may be the next not to."""
GIVE_UP, MANY_S = 5, 60.0
"""Deaths within so long after which nobody is replaced any more, however long each lived: while
nobody sends, a worker waits for seconds before it does what it dies of."""
READ_BYTES = 1 << 18


class WorkerError(RtNedsError):
    """A process that cannot be kept alive, or its own error."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Lifeline:
    """What ties a forked process to its parent.

    Parameters
    ----------
    board : Board
    place : int
        Which of the beats is ours.
    writer : int
        Our number among all processes ever forked.
    heard : dict of str to list
        What our predecessors wished to be remembered, by key.
    words : socket
        To the parent.

    Attributes
    ----------
    restarts : int
        How many processes were replaced before us; 0 if we are not a replacement.
    """

    def __init__(
        self,
        board: Board,
        place: int,
        writer: int,
        restarts: int,
        heard: dict[str, list],
        words: socket.socket,
    ) -> None:
        self.board, self.writer, self.restarts, self.heard = board, writer, restarts, heard
        parent = multiprocessing.parent_process()
        assert parent is not None
        self._place, self._words, self._parent = place, words, parent.pid
        self._asked_to_stop = False
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, too, and tells us
        signal.signal(signal.SIGTERM, self._on_signal)

    def stop(self) -> bool:
        """Whether to end; asking is the sign of life. Who has lost the parent ends."""
        self.board.beats[self._place] = monotonic_ns()
        return self._asked_to_stop or os.getppid() != self._parent

    def starting(self) -> None:
        """What comes now may take long."""
        self.board.beats[self._place] = 0

    def remember(self, key: str, value: list) -> None:
        """Have our successors know this."""
        self._tell(["heard", key, value])

    def fail(self, error: RtNedsError) -> None:
        """Have the parent end with this error."""
        self._tell(["failed", str(error), error.exit_code])

    def _tell(self, word: list) -> None:
        with contextlib.suppress(OSError):
            self._words.sendall(json.dumps(word).encode() + b"\n")

    def _on_signal(self, *_: object) -> None:
        self._asked_to_stop = True


@dataclass
class _Post:
    """A process that is to be alive, and how it has been doing."""

    name: str
    work: Callable[[Lifeline], None]
    place: int
    process: Any = None
    words: Any = None
    unread: bytes = b""  # the beginning of a word
    started: float = 0.0
    not_before: float = 0.0
    deaths: list[float] = field(default_factory=list)  # of late, when
    beat: int = 0
    silent_s: float = 0.0
    failed: WorkerError | None = None
    hung: bool = False


class Supervisor:
    """Keeps some processes alive.

    Parameters
    ----------
    roles : sequence of (str, callable)
        Name of each process, and what it does until its :class:`Lifeline` says stop. They are
        started in this order and ended in the reverse.
    board : Board
    hang_ms : float
        One that gives no sign of life for longer is replaced.
    say : callable
        Takes a line for a person.
    """

    def __init__(
        self,
        roles: Sequence[tuple[str, Callable[[Lifeline], None]]],
        board: Board,
        hang_ms: float,
        say: Callable[[str], None],
    ) -> None:
        self._board, self._hang_s, self._say = board, hang_ms / 1000, say
        self._posts = [_Post(name, work, place) for place, (name, work) in enumerate(roles)]
        self._heard: dict[str, list] = {}
        self._writers = 0
        self._looked = 0.0

    def run(self, stop: Callable[[], bool]) -> None:
        """Keep them alive until told to stop.

        Raises
        ------
        WorkerError
            The error of one of them that a person must mend, or that one keeps dying at once.
        """
        # What is loaded now is shared with every fork, as long as nobody writes to it.
        gc.collect()
        gc.freeze()
        try:
            self._looked = time.monotonic()
            while not stop():
                for post in self._posts:
                    if post.process is None and time.monotonic() >= post.not_before:
                        self._start(post)
                alive = [post for post in self._posts if post.process is not None]
                # A word longer than a socket holds must not keep its worker until the next look.
                words = [post.words for post in alive]
                wait([*(post.process.sentinel for post in alive), *words], POLL_S)
                if stop():  # whoever ends us may have ended all of our group
                    break
                now = time.monotonic()
                # A parent that slept itself has not seen the others silent.
                elapsed, self._looked = min(now - self._looked, 2 * POLL_S), now
                for post in alive:
                    self._look_at(post, elapsed)
        finally:
            self._end()

    def _start(self, post: _Post) -> None:
        restarts = self._board.restarts if post.started else 0
        self._board.beats[post.place] = 0
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            ours, theirs = socket.socketpair()
            tied = self._board, post.place, self._writers, restarts, self._heard, theirs
            process = multiprocessing.get_context("fork").Process(
                target=_work, args=(post.work, *tied), name=post.name
            )
            # Told to end before it can listen, it would be ended by force.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            try:
                with theirs:
                    process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except OSError as error:  # of memory, processes or files there may be too few for a moment
            how = f"could not begin ({error.strerror or error})"
            self._count_death(post, how, at_once=True)
            self._say(f"the {post.name} {how}; it is tried again")
            return
        post.process, post.words, post.unread = process, ours, b""
        post.started, post.silent_s, post.hung = time.monotonic(), 0.0, False
        self._writers += 1

    def _look_at(self, post: _Post, elapsed: float) -> None:
        self._listen(post)
        beat = int(self._board.beats[post.place])
        post.silent_s = post.silent_s + elapsed if beat == post.beat else 0.0
        post.beat = beat
        if post.silent_s > (self._hang_s if beat else START_S):
            post.hung = True
            post.process.kill()
        if post.hung or not post.process.is_alive():
            post.process.join()
            self._listen(post)
            self._bury(post)

    def _listen(self, post: _Post) -> None:
        while True:
            try:
                came = post.words.recv(READ_BYTES, socket.MSG_DONTWAIT)
            except OSError:
                return
            if not came:
                return
            *words, post.unread = (post.unread + came).split(b"\n")
            for word in words:
                kind, *rest = json.loads(word)
                if kind == "heard":
                    self._heard[rest[0]] = rest[1]
                else:
                    post.failed = WorkerError(rest[0], rest[1])

    def _bury(self, post: _Post) -> None:
        code, process = post.process.exitcode, post.process
        post.words.close()
        post.process = None
        if post.failed is not None:
            raise post.failed
        how = "gave no sign of life" if post.hung else f"ended ({_how(code)})"
        self._count_death(post, how, at_once=time.monotonic() - post.started < SETTLED_S)
        self._board.note_restart()
        self._say(f"the {post.name} (process {process.pid}) {how}; another takes its place")

    def _count_death(self, post: _Post, how: str, *, at_once: bool) -> None:
        """Give up who dies too often; who dies at once again and again is not begun at once."""
        now = time.monotonic()
        post.deaths = [*(died for died in post.deaths if now - died < MANY_S), now]
        if len(post.deaths) >= GIVE_UP:
            raise WorkerError(
                f"the {post.name} {how}, for the {GIVE_UP}th time within a minute; it was "
                "expected to live: see the lines above, and try rt-neds doctor"
            )
        if len(post.deaths) > 1 and at_once:
            post.not_before = now + 0.05 * 2 ** len(post.deaths)

    def _end(self) -> None:
        for post in reversed(self._posts):
            if post.process is None:
                continue
            post.process.terminate()
            post.process.join(END_S)
            if post.process.is_alive():
                post.process.kill()
                post.process.join()


def _work(work: Callable[[Lifeline], None], *tied: Any) -> None:
    lifeline = Lifeline(*tied)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        work(lifeline)
    except RtNedsError as error:
        lifeline.fail(error)


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-exit_code).name
    return f"signal {-exit_code}"
