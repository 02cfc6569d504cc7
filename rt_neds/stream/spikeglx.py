"""Source of SpikeGLX: samples fetched from its command server, spikes found by a detector.

SpikeGLX sends nothing by itself. We ask for the samples from where we are to the newest, about once
a millisecond, one question at a time. Its sample count is the clock: it counts on where samples
were lost (zeros stand in for them, and the status word says so), and a connection that is made anew
goes on where the last one ended, as long as SpikeGLX still holds those samples (8 s, or 2 where
memory is short). What it holds no more is a gap of known length.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from socket import AF_INET, SOCK_DGRAM
from socket import socket as Socket
from time import sleep

from rt_neds.clock import monotonic_ns
from rt_neds.errors import StreamError
from rt_neds.frames import SpikeBatch
from rt_neds.spikeglx_wire import (
    KINDS,
    LINK_ERRORS,
    MAX_FETCH,
    Malformed,
    Probe,
    Question,
    Refused,
    Reply,
    channel_list,
    fetch,
    introduce,
    parse_spikeglx_url,
    sample_count,
)
from rt_neds.stream.acquisitions import Acquisitions
from rt_neds.stream.receiver import Announcement
from rt_neds.stream.spikeglx_line import Line, LineError, look_up
from rt_neds.stream.spikeglx_samples import Detector, Samples

PACE_NS = 1_000_000
"""From one fetch to the next: less would be more fetches, not more samples."""
WAIT_NS = 20_000_000
"""From one look to the next for a run that has not begun."""
STALL_NS = 250_000_000
"""After so long without a new sample we ask whether it is the same run."""
UNWATCHED_NS = 1_000_000_000
"""Whoever did not look for so long may have missed the end of a run and the start of another."""
BACKOFF_NS, MAX_BACKOFF_NS = 50_000_000, 2_000_000_000

COUNTERS = (
    "connections",
    "refused",
    "unreachable",
    "disconnected",
    "silent",
    *(f"malformed_{kind}" for kind in KINDS),
    "errors",
    "fetches",
    "empty",
    "samples",
    "lost",
    "missed",
    "skipped",
    "too_late",
    *(f"link_{name}" for name in LINK_ERRORS),
    "epochs",
    "spikes",
)

_REASONS = {
    "refused": "nothing listens there; enable SpikeGLX's command server (in its Options menu) and "
    "see that it listens on this address and port",
    "unreachable": "nobody answers at that address; check the network and the firewall",
    "disconnected": "it closed the connection",
    "silent": "it gave no answer in time",
}

Talk = Generator[Question, Reply, None]


class SpikeGLXSource:
    """Reads one probe of a SpikeGLX server and detects its spikes.

    Parameters
    ----------
    url : str
        See :func:`rt_neds.spikeglx_wire.parse_spikeglx_url`.
    session : str
        Session of the bundle, which SpikeGLX cannot name.
    detector : Detector
        Until it has settled after a gap, that counts as gap: it would find nothing.
    acquisitions : Acquisitions, optional
        What names runs, where several processes read, at once or one after the other.
    reached : callable, optional
        Given an epoch, the first sample of it that the process before us has not decoded, or None:
        if it still goes on we read from there, as far as SpikeGLX holds it.

    Attributes
    ----------
    announced : Announcement or None
        The session, the server's rate and the detector's units, once the server has been asked.
    probe : Probe or None
        What the server says of the probe, gains and geometry included.
    trouble : str
        Why nothing comes, for a person; empty while something does.
    counters : dict of str to int
        ``lost`` samples are ``missed`` (SpikeGLX filled in zeros) or ``skipped`` (it held them no
        more: ``too_late`` says how often). ``link_*``: samples that came with that error bit.
        ``empty`` fetches brought nothing. ``malformed_*``, ``disconnected``, ``silent``,
        ``unreachable`` and ``refused`` (nobody listens) each ended a connection; ``errors`` are the
        server's own.
    socket : socket.socket
        For whoever waits for several sources at once.

    Raises
    ------
    ConfigError, StreamError
        An address that is none. ``read`` raises StreamError or DetectorError where the server has
        no such probe, or one that the detector was not made for.
    """

    def __init__(
        self,
        url: str,
        session: str,
        detector: Detector,
        acquisitions: Acquisitions | None = None,
        reached: Callable[[int], int | None] | None = None,
    ) -> None:
        self.address = parse_spikeglx_url(url)
        self.announced: Announcement | None = None
        self.probe: Probe | None = None
        self.trouble = ""
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._said: Announcement | None = None
        self._session, self._detector = session, detector
        self._where = look_up(self.address.host, self.address.port)
        self._channels = ""
        self._samples = Samples(detector, self.counters)
        # The connection
        self._idle = Socket(AF_INET, SOCK_DGRAM)  # nothing ever comes here
        self._line: Line | None = None
        self._talk: Talk = self._converse()
        self._question: Question | None = None
        self._asked_ns = 0  # 0: the question is not out yet
        self._retry_ns, self._backoff_ns = 0, BACKOFF_NS
        # The run
        self._head, self._head_ns = 0, 0  # the newest sample known of, and when it was
        self._waited = False  # whether we saw that there was no run
        self._acquisitions, self._reached = acquisitions or Acquisitions(), reached
        self._held: SpikeBatch | None = None

    @property
    def socket(self) -> Socket:
        """The connection, or a socket on which nothing comes."""
        return self._idle if self._line is None else self._line.socket

    def read(self, timeout_ms: int) -> SpikeBatch | None:
        """The next batch, or None if nothing was completed in time. Waits nowhere else."""
        if self._held is not None:
            batch, self._held = self._held, None
            return batch
        until_ns = monotonic_ns() + timeout_ms * 1_000_000
        while True:
            if self.announced is not self._said:
                self._said = self.announced
                return None  # a batch returned together with another announcement would be lost
            if self._samples.ready:
                return self._samples.ready.popleft()
            try:
                self._step(until_ns)
            except Malformed as error:
                self._hang_up(f"malformed_{error.kind}", f"it sent what cannot be read: {error}")
            except LineError as error:
                self._hang_up(error.kind, _REASONS[error.kind])
            if not self._samples.ready and monotonic_ns() >= until_ns:
                return None

    def peek_spikes(self, timeout_ms: int) -> bool:
        """Whether a batch is here; it is kept for the next ``read``."""
        if self._held is None:
            self._held = self.read(timeout_ms)
        return self._held is not None

    def close(self) -> None:
        """Close the connection."""
        if self._line is not None:
            self._line.close()
        self._idle.close()

    # -- the connection --------------------------------------------------------------------------

    def _step(self, until_ns: int) -> None:
        """Get one answer, if it comes in time."""
        now = monotonic_ns()
        if self._line is None:
            if not _wait_for(self._retry_ns, now, until_ns):
                return
            self._line = Line(self._where)
            self._talk = self._converse()
            self._question, self._asked_ns = None, 0
        if not self._line.connect(max(0, until_ns - monotonic_ns())):
            return
        if self._question is None:
            self.counters["connections"] += 1
            self._question = next(self._talk)
        if not self._asked_ns:
            if not _wait_for(self._question.after_ns, monotonic_ns(), until_ns):
                return
            self._line.ask(self._question)
            self._asked_ns = monotonic_ns()
        reply = self._line.receive(max(0, until_ns - monotonic_ns()))
        if reply is None:
            return
        self._question = self._talk.send(reply)
        self._asked_ns = 0

    def _hang_up(self, kind: str, reason: str) -> None:
        """End the connection; another is made after a while, longer each time nothing comes."""
        self.counters[kind] += 1
        self.trouble = f"spikeglx://{self.address.host}:{self.address.port}: {reason}"
        if self._line is not None:
            self._line.close()
            self._line = None
        self._retry_ns = monotonic_ns() + self._backoff_ns
        self._backoff_ns = min(2 * self._backoff_ns, MAX_BACKOFF_NS)

    # -- the conversation ------------------------------------------------------------------------

    def _converse(self) -> Talk:
        """All we ask over one connection."""
        while True:
            try:
                probe = yield from introduce(self.address.probe)
                self._meet(probe)
                waited = yield from self._wait_for_run()
                if waited:  # what was said of the probe was said of the run before
                    self._meet((yield from introduce(self.address.probe)))
                yield from self._follow()
            except Refused as error:
                self._bear(error)
                yield from _pause(STALL_NS)

    def _bear(self, error: Refused) -> None:
        """Take an error of the server: wait, unless only a person can mend it."""
        self.counters["errors"] += 1
        if "must be in range" in str(error):
            raise StreamError(
                f"there is no probe {self.address.probe} at {self.address.host}:"
                f"{self.address.port} ({error}); choose another with ?probe=N"
            )
        self.trouble = f"SpikeGLX says: {error}; waiting until it is ready"

    def _meet(self, probe: Probe) -> None:
        detector = self._detector
        if probe.ap != detector.channels:
            raise StreamError(
                f"probe {self.address.probe} has {probe.ap} AP channels and the detector is for "
                f"{detector.channels}; make a detector for this probe or choose another ?probe=N"
            )
        # Places are not compared: the tools that make detectors draw some probes differently.
        one_gain = max(probe.uv_C) < 1.001 * min(probe.uv_C)
        detector.check_source(probe.rate, None, probe.uv_C[0] if one_gain else None)
        self.probe, self._channels = probe, channel_list(probe)
        self._samples.meet(probe.ap, probe.rate)
        announced = Announcement(self._session, probe.rate, tuple(detector.units))
        if announced != self.announced:
            self.announced = announced

    def _wait_for_run(self) -> Generator[Question, Reply, bool]:
        """Wait until a run is there, and find our place in it; whether we had to wait."""
        waited, after_ns = False, 0
        while not (count := (yield from sample_count(self.address.probe, after_ns))):
            waited = self._waited = True
            self.trouble = "SpikeGLX runs, but no run is going; waiting for one to start"
            after_ns = monotonic_ns() + WAIT_NS
        now = monotonic_ns()
        if not self._samples.epoch or self._waited or not self._is_same_run(count, now):
            self._join(count, now)
        self._waited = False
        self._head, self._head_ns = count, now
        return waited

    def _join(self, count: int, now: int) -> None:
        """Begin with the first run that we meet, or with another; we may not be the first to."""
        assert self.probe is not None
        before = self._samples.epoch
        epoch = self._acquisitions.name(count, now, self.probe.rate, before)
        reached = self._reached(epoch) if self._reached is not None else None
        if reached is not None:
            self._samples.begin(epoch, max(0, reached - self._detector.settle))
        else:  # one that we waited for, or that began while we looked away, from its first sample
            self._samples.begin(epoch, 0 if self._waited or before else count)

    def _follow(self) -> Talk:
        """Fetch from where we are, until the run ends or what comes is of another."""
        assert self.probe is not None
        stalled_ns = seen_ns = monotonic_ns()  # when samples came, and when anything was heard
        after_ns = 0
        while True:
            now = monotonic_ns()
            if now - stalled_ns > STALL_NS:
                count = yield from sample_count(self.address.probe)
                now = monotonic_ns()
                if not count or not self._is_same_run(count, now):
                    self._waited = not count
                    return
                self._head, self._head_ns = count, now
                stalled_ns = seen_ns = now
            reply = yield fetch(
                self.address.probe, self.probe, self._channels, self._samples.next, after_ns
            )
            asked_ns, unseen_ns = self._asked_ns, reply.received_ns - seen_ns
            if unseen_ns > UNWATCHED_NS:
                continue  # who knows of which run that was
            seen_ns = reply.received_ns
            if reply.error.startswith("FETCH: Too late"):
                self.counters["too_late"] += 1
                count = yield from sample_count(self.address.probe)
                if count < self._samples.next:
                    return
                self._samples.give_up_to(count)
                continue
            if reply.error:
                self._waited = "ot running" in reply.error
                raise Refused(reply.error)
            self.counters["fetches"] += 1
            size = len(reply.samples_SC)
            full = size == MAX_FETCH
            if size:
                self._samples.take(reply.first, reply.samples_SC, reply.received_ns)
                stalled_ns = reply.received_ns
                self.trouble, self._backoff_ns = "", BACKOFF_NS
            else:
                self.counters["empty"] += 1
            if not full:
                self._head, self._head_ns = self._samples.next, reply.received_ns
                self._acquisitions.reached(self._samples.epoch, self._head, self._head_ns)
            after_ns = 0 if full else asked_ns + PACE_NS

    def _is_same_run(self, count: int, now: int) -> bool:
        """Whether a run with so many samples can be the one we know.

        A probe may stall: that a count grew by little, or not at all, makes it no other run's. But
        one that began since counts no more than the time since then, and less than ours would have
        by now, by all that ours had counted.
        """
        if count < max(self._samples.next, self._head):
            return False
        assert self.probe is not None
        rate = self.probe.rate
        unseen = (now - self._head_ns) / 1e9 * rate
        if count == self._head or count > unseen:
            return True
        return count > self._head + unseen - UNWATCHED_NS / 1e9 * rate


def _wait_for(at_ns: int, now: int, until_ns: int) -> bool:
    """Wait until a moment, or until we may wait no longer; whether the moment has come."""
    if at_ns > now:
        pause_ns = min(at_ns, until_ns) - now
        if pause_ns > 0:
            sleep(pause_ns / 1e9)
    return at_ns <= max(now, until_ns)


def _pause(ns: int) -> Talk:
    yield Question("NOOP", after_ns=monotonic_ns() + ns)
