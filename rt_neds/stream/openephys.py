"""Source of Open Ephys: spikes of its ZMQ Interface, or of its Event Broadcaster.

A unit is named ``<electrode>``, or ``<electrode>#<sorted_id>`` where the bundle knows sorted units
of that electrode. We subscribe to everything the ZMQ Interface sends, because its ``message_num``
counts continuous samples too, so that whoever takes only spikes cannot tell loss from samples not
taken, and because a block's samples say that the block's spikes are all here. One channel is
enough; from more than ``MAX_CHANNELS`` spikes could drown, and then the samples are unsubscribed.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import zmq

from rt_neds.clock import ClockFit, monotonic_ns
from rt_neds.errors import StreamError
from rt_neds.frames import SPIKE_DTYPE, SpikeBatch
from rt_neds.openephys_wire import (
    EVENT,
    KINDS,
    MAX_PAYLOAD_BYTES,
    Block,
    Event,
    Malformed,
    Message,
    Spike,
    electrode_of,
    parse,
    parse_broadcast,
    parse_url,
    unit_name,
)
from rt_neds.stream.acquisitions import Acquisitions
from rt_neds.stream.openephys_heartbeat import Heartbeat
from rt_neds.stream.receiver import Announcement
from rt_neds.stream.sockets import next_message
from rt_neds.stream.watermark import Span, Watermark

QUEUE = 20_000
"""Messages held while we are busy, some seconds of spikes; the plugin itself holds 1000."""
HELD_SPIKES = 1 << 16
MESSAGES_PER_READ = 4096
MAX_CHANNELS = 8
MAX_STRANGERS = 4096
UNKNOWN = 0xFFFFFFFF
BEHIND_NS = 5_000_000_000
"""Numbers that jump ahead, and so far behind the clock, are those of another acquisition."""
STRANGE_NS = 2_000_000_000
"""So long spikes that the bundle does not know do not say which stream is ours."""
STOCK_S = 30.0
"""How often electrodes are compared with the units of the bundle, where any is unknown."""
SILENCE_NS = 250_000_000
"""So long the clock may stand in for spikes; then nothing is published until one comes."""
PATIENCE_NS = 2_000_000_000
"""So long nothing need come before it is said."""

COUNTERS = (
    "messages",
    "spikes",
    "events",
    "blocks",
    "other_stream",
    "repeated",
    *(f"malformed_{kind}" for kind in KINDS),
    "lost",
    "epochs",
    "discarded",
    "unknown_electrodes",
    "loss_unknown",
    "heartbeats",
    "heartbeats_unanswered",
)


class OpenEphysSource:
    """Reads the spikes of one stream of an Open Ephys GUI.

    Parameters
    ----------
    url : str
        See :func:`rt_neds.openephys_wire.parse_url`.
    known : Announcement
        The session of the bundle: its units are those that electrodes are matched with, its rate
        the one assumed until a block says another.
    lateness_ms : float
        See :class:`Watermark`.
    before : Announcement, optional
        What a source in a process that has ended had come to announce.
    acquisitions : Acquisitions, optional
        What names them, where several processes read, at once or one after the other.

    Attributes
    ----------
    announced : Announcement
        ``known``, until the rate or the electrodes prove to be others: electrodes are compared
        with the units every ``STOCK_S`` where some are unknown, and units whose electrode has not
        been heard are then no longer announced.
    counters : dict of str to int
        Every message is exactly one of ``spikes``, ``events``, ``blocks``, ``other_stream``,
        ``repeated`` and ``malformed_*``; all but the last two are ``other_stream`` until it is
        known which is ours. ``lost``: message numbers that never came readable.
        ``discarded``: spikes of an acquisition that ended before anything of it was complete.
        ``loss_unknown``: 1 where messages are not counted, or samples were unsubscribed.

    socket : zmq.Socket
        For whoever waits for several at once.

    Raises
    ------
    ConfigError, StreamError
        An address that is none.
    """

    def __init__(
        self,
        url: str,
        known: Announcement,
        lateness_ms: float = 0.0,
        before: Announcement | None = None,
        acquisitions: Acquisitions | None = None,
    ) -> None:
        self.address = parse_url(url)
        if before is not None:
            known = replace(known, rate=before.rate)
        self.announced: Announcement = before or known
        self._said = self.announced
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._known = known
        self._lateness_ms = lateness_ms
        self._stream = self.address.stream or None
        self._strange_ns = 0  # when the first spike or block came, while no stream was ours
        self._parse = parse_broadcast if self.address.broadcaster else parse
        self._numbered = not self.address.broadcaster
        self.counters["loss_unknown"] = int(not self._numbered)
        self._last_number = 0
        self._epoch = self._seq = 0
        self._acquisitions = acquisitions or Acquisitions()
        self._begun = self._named = False
        self._watermark = Watermark(known.rate, lateness_ms)
        self._fit = ClockFit(known.rate)
        self._channels: set[int] = set()
        self._records_S = np.zeros(HELD_SPIKES, SPIKE_DTYPE)
        self._held = 0
        self._lost = 0
        self._ready: deque[SpikeBatch] = deque()
        self._last_message_ns = 0
        self._electrodes = {electrode_of(unit)[0] for unit in known.units} | set(known.units)
        self._sorted = {name for name, number in map(electrode_of, known.units) if number}
        # Who announced all units may not have heard any.
        self._heard = set(self.announced.units) if self.announced != known else set()
        self._strangers: set[str] = set()
        self._stock_at: int | None = None
        self._renumber()
        self.socket = self._subscriber()
        self._made_ns = monotonic_ns()
        self._heartbeat: Heartbeat | None = None
        if not self.address.broadcaster:
            at = f"tcp://{self.address.host}:{self.address.port + 1}"
            self._heartbeat = Heartbeat(at, self.counters, self._made_ns)

    @property
    def trouble(self) -> str:
        """Why nothing of ours has come, for a person; empty once something has, or may yet."""
        if self._last_message_ns or monotonic_ns() - self._made_ns < PATIENCE_NS:
            return ""
        at = f"{self.address.host}:{self.address.port}"
        if self.counters["other_stream"]:
            ours = f"stream {self._stream!r}" if self._stream else "the bundle's electrodes"
            return f"Open Ephys at {at} sends, but nothing of {ours}; ?stream=NAME says which"
        if self._heartbeat is not None and self._heartbeat.answered:
            return f"Open Ephys at {at} answers but sends nothing: does it acquire?"
        plugin = "Event Broadcaster" if self.address.broadcaster else "ZMQ Interface"
        return f"nothing comes from Open Ephys at {at}: does it run, with {plugin} in its chain?"

    def read(self, timeout_ms: int) -> SpikeBatch | None:
        """The next batch, or None if nothing was completed in time. Waits nowhere else."""
        now = monotonic_ns()
        if self._heartbeat is not None:
            self._heartbeat.keep(now)
        self._take_stock()
        deadline = now + timeout_ms * 1_000_000
        for _ in range(MESSAGES_PER_READ):
            if self.announced is not self._said:
                self._said = self.announced
                return None  # a batch returned together with another announcement would be lost
            if self._ready:
                return self._ready.popleft()
            wait_ms = max(0, (deadline - now) // 1_000_000)
            frames = next_message(self.socket, min(wait_ms, 20))
            now = monotonic_ns()
            if frames is None:
                if self._pass_silence(now) or now < deadline:
                    continue
                return None
            self.take(frames, now)
        return None

    def peek_spikes(self, timeout_ms: int) -> bool:
        """Whether a batch is here; it is kept for the next ``read``."""
        if not self._ready and (batch := self.read(timeout_ms)) is not None:
            self._ready.appendleft(batch)
        return bool(self._ready)

    def take(self, frames: list[bytes], received_ns: int) -> None:
        """Take in one message; what it completes comes with the next reads."""
        self.counters["messages"] += 1
        try:
            message = self._parse(frames)
        except Malformed as error:
            self.counters[f"malformed_{error.kind}"] += 1
            return
        if not self._follow_numbers(message, received_ns):
            return
        if not self._is_ours(message, received_ns):
            self.counters["other_stream"] += 1
            return
        self._last_message_ns = received_ns
        if isinstance(message, Block):
            self._take_block(message, received_ns)
            return
        if self._watermark.breaks(message.sample) or (
            self._watermark.jumps(message.sample) and self._is_behind(message.sample, received_ns)
        ):
            self._begin(received_ns, whole=False)
        if isinstance(message, Event):
            self.counters["events"] += 1
        else:
            self.counters["spikes"] += 1
            self._hold(message, received_ns)
        if not self._watermark.by_data:
            self._fit.observe(message.sample, received_ns)
        self._complete(self._watermark.see(message.sample), received_ns)

    def close(self) -> None:
        """Close the sockets."""
        self.socket.close(linger=0)
        if self._heartbeat is not None:
            self._heartbeat.close()

    # -- messages --------------------------------------------------------------------------------

    def _follow_numbers(self, message: Message, received_ns: int) -> bool:
        """Notice loss and restarts; False if the message is one we had."""
        number = message.number
        if not self._begun:
            self._begin(received_ns, whole=number == 1)
        elif number is not None and number <= self._last_number:
            if number == self._last_number != 1:
                self.counters["repeated"] += 1
                return False
            self._begin(received_ns, whole=number == 1)
            self._lose(number - 1)
        elif number is not None and not self.counters["loss_unknown"]:
            self._lose(number - self._last_number - 1)
        self._last_number = number or 0
        return True

    def _is_ours(self, message: Message, received_ns: int) -> bool:
        """Whether it is of our stream: where none is named, the first that shows to be it.

        Events of every stream of the GUI may come, and show nothing. Samples come of the stream
        that was chosen in the plugin, and spikes of an electrode that the bundle knows are ours.
        """
        if self._stream is None and not isinstance(message, Event):
            self._strange_ns = self._strange_ns or received_ns
            if (
                isinstance(message, Block)
                or message.electrode in self._electrodes
                or received_ns - self._strange_ns > STRANGE_NS
            ):
                self._stream = message.stream
        return message.stream == self._stream

    def _lose(self, messages: int) -> None:
        if messages:
            self.counters["lost"] += messages
            self._lost += messages
            self._watermark.lose()

    def _begin(self, received_ns: int, *, whole: bool) -> None:
        """A new acquisition: what is held of the last can never be complete."""
        if (self._held or self._lost) and self._watermark.end is not None:
            self._complete([(self._watermark.end, self._watermark.end)], received_ns)
        self.counters["discarded"] += self._held
        self.counters["epochs"] += 1
        self._held = self._seq = 0
        self._begun, self._named = True, False
        self._fit.restart()
        self._stock_at = None
        self._watermark.begin(whole=whole)

    def _is_behind(self, sample: int, received_ns: int) -> bool:
        """Whether the acquisition that we know was at ``sample`` long ago, by the clock.

        What was lost on the way takes its time; one that began anew has counted for less. Who only
        stalls, or is heard late, is behind as well, but then nothing is left out: nobody asks here.
        """
        due_ns = self._fit.host_ns(sample, received_ns)
        return self._fit.realtime and due_ns is not None and received_ns - due_ns > BEHIND_NS

    def _take_block(self, block: Block, received_ns: int) -> None:
        self.counters["blocks"] += 1
        if self._watermark.block_breaks(block.first) or (
            self._watermark.block_jumps(block.first) and self._is_behind(block.end, received_ns)
        ):
            self._begin(received_ns, whole=False)
        self._channels.add(block.channel)
        if len(self._channels) > MAX_CHANNELS and not self.counters["loss_unknown"]:
            self.counters["loss_unknown"] = 1
            self.socket.subscribe(EVENT)
            self.socket.unsubscribe(b"")
        if block.rate != self._known.rate:
            self._known = replace(self._known, rate=block.rate)
            self.announced = replace(self.announced, rate=block.rate)
            self._fit = ClockFit(block.rate)
            if self._watermark.end is not None:
                self._begin(received_ns, whole=False)
            whole = self._watermark.whole
            self._watermark = Watermark(block.rate, self._lateness_ms)
            self._watermark.begin(whole=whole)
        self._fit.observe(block.end, received_ns)
        self._complete(self._watermark.see_block(block.first, block.end), received_ns)

    def _name(self, end: int, received_ns: int) -> None:
        """Know what to call the acquisition that is complete up to a sample."""
        if self._named:
            self._acquisitions.reached(self._epoch, end, received_ns)
            return
        rate = self._known.rate
        self._epoch = self._acquisitions.name(end, received_ns, rate, self._epoch)
        self._named = True

    def _hold(self, spike: Spike, received_ns: int) -> None:
        if self._held == HELD_SPIKES:  # far more than any lateness: nothing seems to complete them
            if self._watermark.end is not None:
                self._complete([(self._watermark.end, self._watermark.end)], received_ns)
            self.counters["discarded"] += self._held
            self._held = 0
        self._records_S[self._held] = (spike.sample, self._number(spike), 0)
        self._held += 1

    def _complete(self, spans: list[Span], received_ns: int) -> None:
        """Make batches of what is complete now; what is held goes with the first it may."""
        if spans:
            self._name(spans[-1][1], received_ns)
        for index, (first, end) in enumerate(spans):
            held_S = self._records_S[: self._held]
            later = index + 1 < len(spans)
            stay_S = (
                held_S["sample"] >= spans[index + 1][0] if later else np.zeros(len(held_S), bool)
            )
            batch = SpikeBatch(
                self._epoch,
                self._seq,
                first,
                end,
                self._known.rate,
                # Open Ephys states no monotonic time of sending; this is the first that is known.
                received_ns,
                received_ns,
                held_S[~stay_S],
                self._lost,
                max(end, self._watermark.newest),
            )
            self._ready.append(batch)
            self._held = int(stay_S.sum())
            self._records_S[: self._held] = held_S[stay_S]
            self._seq += 1
            self._lost = 0

    def _pass_silence(self, now: int) -> bool:
        """By spikes, let the clock close bins while nothing comes; whether it closed any."""
        silent_ns = now - self._last_message_ns
        if not self._watermark.lateness_s * 1e9 < silent_ns <= SILENCE_NS:
            return False
        zero_ns = self._fit.host_ns(0, now)
        if zero_ns is None or not self._fit.realtime:
            return False
        sample = int((now - zero_ns) * self._known.rate // 1_000_000_000)
        self._complete(self._watermark.pass_to(sample), now)
        return bool(self._ready)

    # -- units -----------------------------------------------------------------------------------

    def _renumber(self) -> None:
        self._place = {unit: index for index, unit in enumerate(self.announced.units)}
        self._number_of: dict[tuple[str, int], int] = {}

    def _number(self, spike: Spike) -> int:
        key = (spike.electrode, spike.sorted_id)
        number = self._number_of.get(key)
        if number is None:
            number = self._identify(*key)
            if len(self._number_of) < len(self._place) + MAX_STRANGERS:
                self._number_of[key] = number
        return number

    def _identify(self, electrode: str, sorted_id: int) -> int:
        if electrode in self._electrodes:
            self._heard.add(electrode)
        elif len(self._strangers) < MAX_STRANGERS:
            self._strangers.add(electrode)
            self.counters["unknown_electrodes"] = len(self._strangers)
        name = unit_name(electrode, sorted_id) if electrode in self._sorted else electrode
        return self._place.get(name, UNKNOWN)

    def _take_stock(self) -> None:
        """Announce the units whose electrodes are heard, if names do not fit."""
        end = self._watermark.end
        if end is None or self._ready:
            return
        if self._stock_at is None:
            self._stock_at = end + round(STOCK_S * self._known.rate)
        fits = not self._strangers and self.announced.units == self._known.units
        if end < self._stock_at or fits:
            return
        self._stock_at = end + round(STOCK_S * self._known.rate)
        units = [
            unit
            for unit in self._known.units
            if unit in self._heard or electrode_of(unit)[0] in self._heard
        ]
        announced = replace(self._known, units=tuple(units or sorted(self._strangers)[:8]))
        if announced != self.announced:
            self.announced = announced
            self._renumber()

    # -- sockets ---------------------------------------------------------------------------------

    def _subscriber(self) -> zmq.Socket:
        socket: zmq.Socket = zmq.Context.instance().socket(zmq.SUB)
        socket.set(zmq.RCVHWM, QUEUE)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.MAXMSGSIZE, MAX_PAYLOAD_BYTES)
        socket.subscribe(b"")
        endpoint = f"tcp://{self.address.host}:{self.address.port}"
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise StreamError(
                f"cannot connect to {endpoint} ({error}); expected something like "
                "openephys://127.0.0.1:5556"
            ) from None
        return socket
