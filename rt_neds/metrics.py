"""``rt-neds metrics``: the decoded stream as Prometheus counts it. A subscriber like any other.

Frames and triggers are counted as they are heard; what only ``serve`` knows comes from its status.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rt_neds.clock import monotonic_ns
from rt_neds.errors import ConfigError, StreamError
from rt_neds.frames import DecodedFrame, Flag
from rt_neds.stopping import asked_to_stop
from rt_neds.stream.publisher import DecodedListener, Note
from rt_neds.trigger_config import flag_name
from rt_neds.wire import DEFAULT_DECODED

DEFAULT_LISTEN = "127.0.0.1:9469"
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)
UNHEARD = "rt-neds metrics without prometheus-client; install it: pip install 'rt-neds[metrics]'"
MOST_NAMES = 256
"""Rules, reasons and counters that get a series of their own: what comes cannot grow us."""

OF_A_WORKER = {"source_counters": "source", "bin_counters": "bins", "frame_counters": "validity"}
"""Tables of the status that begin anew with each worker."""
STATES = {
    "unknown_electrodes": "Electrodes that spike and that the bundle does not know",
    "loss_unknown": "1 where it cannot be told whether messages of the source were lost",
}
"""What a source has among its counters that is not counted up."""


class Rising:
    """Counts that go on rising when the process that counts is replaced, or another takes over.

    Attributes
    ----------
    totals : dict of str to int
        What has been counted, by name.
    """

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._pid: int | None = None
        self._heard_ns = 0

    def take(self, counts: dict[str, int], pid: int, uptime_ns: int, now_ns: int) -> None:
        """Take in what one process has counted since it began.

        Parameters
        ----------
        counts : dict of str to int
        pid, uptime_ns : int
            Of the process. One that began after we last heard another counts from zero; one that
            has been there longer (a standby) has counted what the other had.
        now_ns : int
            Host time.
        """
        if self._pid not in (None, pid):
            began_since = now_ns - uptime_ns >= self._heard_ns
            self._last = {} if began_since else dict(counts)
        for name, count in counts.items():
            if name not in self.totals and len(self.totals) >= MOST_NAMES:
                continue
            last = self._last.get(name, 0)
            more = count - last if count >= last else count  # its counters began anew
            self.totals[name] = self.totals.get(name, 0) + more
        self._last, self._pid, self._heard_ns = dict(counts), pid, now_ns


class Metrics:
    """All that is told of one probe.

    Parameters
    ----------
    probe : str

    Attributes
    ----------
    registry : prometheus_client.CollectorRegistry

    Raises
    ------
    ConfigError
        prometheus-client is not there.
    """

    def __init__(self, probe: str) -> None:
        try:
            import prometheus_client
        except ImportError:
            raise ConfigError(UNHEARD) from None
        prometheus_client.disable_created_metrics()
        self.registry = prometheus_client.CollectorRegistry()
        self._probe = probe
        self._last: DecodedFrame | None = None
        self._heard_s = 0.0
        self._worker, self._serve = Rising(), Rising()
        self._names: set[tuple[str, str]] = set()

        def make(kind: Any, name: str, words: str, *labels: str, **options: Any) -> Any:
            metric = kind(
                f"rtneds_{name}", words, ["probe", *labels], registry=self.registry, **options
            )
            return metric if labels else metric.labels(probe)

        counter, gauge = prometheus_client.Counter, prometheus_client.Gauge
        self._frames = make(counter, "frames", "Decoded bins heard")
        self._flagged = make(counter, "frames_by_flag", "Decoded bins by flag", "flag")
        self._missing = make(counter, "bins_missing", "Bins of an epoch never heard")
        self._spikes = make(counter, "spikes", "Spikes of the bins heard")
        self._late = make(counter, "spikes_late", "Spikes that came after their bin closed")
        self._unknown = make(counter, "spikes_unknown", "Spikes of units the bundle does not know")
        self._lost = make(
            counter, "messages_lost", "Messages of the source that never came; of SpikeGLX, samples"
        )
        self._triggers = make(counter, "triggers", "Events decided", "rule", "outcome")
        self._reasons = make(counter, "trigger_refusals", "Refusals by reason", "rule", "reason")
        self._counted = make(counter, "serve", "Counters of serve's status", "counter")
        histogram = prometheus_client.Histogram
        self._receive_to_publish = make(
            histogram,
            "receive_to_publish_seconds",
            "From the message that closed a bin to its frame",
            buckets=SECONDS,
        )
        self._end_to_publish = make(
            histogram,
            "bin_end_to_publish_seconds",
            "From a bin's end by the clock fit to its frame; real-time streams only",
            buckets=SECONDS,
        )
        self._realtime = make(gauge, "realtime", "Whether the stream runs at the probe's own rate")
        self._surprise = make(
            gauge, "surprise", "How far spikes are from what is foreseen; about 1 is usual"
        )
        self._surprise.set(float("nan"))
        self._silent = make(gauge, "units_silent", "Units that have fallen silent")
        self._states = {name: make(gauge, name, words) for name, words in STATES.items()}
        self._source = make(gauge, "source_state", "1 for the state of the source", "state")
        silent = make(gauge, "heard_seconds_ago", "Since anything was heard of serve")
        silent.set_function(
            lambda: time.monotonic() - self._heard_s if self._heard_s else float("inf")
        )
        for flag in Flag:  # a flag that never came is zero, and not unknown
            self._flagged.labels(probe, flag_name(flag))
        self._flagged.labels(probe, "none")

    def take(self, message: DecodedFrame | Note | None) -> None:
        """Take in one message."""
        if message is None:
            return
        self._heard_s = time.monotonic()
        if isinstance(message, DecodedFrame):
            self._take_frame(message)
        elif message.kind == "status":
            self._take_status(message.fields)
        elif message.kind == "trigger":
            self._take_trigger(message.fields)

    def _take_frame(self, frame: DecodedFrame) -> None:
        last, self._last = self._last, frame
        if last is not None and frame.epoch == last.epoch:
            self._missing.inc(max(0, frame.bin - last.bin - 1))
        self._frames.inc()
        for flag in Flag:
            if frame.flags & flag:
                self._flagged.labels(self._probe, flag_name(flag)).inc()
        if not frame.flags:
            self._flagged.labels(self._probe, "none").inc()
        for counter, count in (
            (self._spikes, frame.spikes),
            (self._late, frame.late),
            (self._unknown, frame.unknown),
            (self._lost, frame.lost),
        ):
            counter.inc(max(0, count))
        stamps = frame.stamps
        if "published" in stamps and "received" in stamps:
            self._receive_to_publish.observe((stamps["published"] - stamps["received"]) / 1e9)
        if "published" in stamps and "ended" in stamps:
            self._end_to_publish.observe((stamps["published"] - stamps["ended"]) / 1e9)

    def _take_trigger(self, fields: dict[str, Any]) -> None:
        rule, refused = str(fields.get("rule"))[:80], fields.get("refused") or []
        self._count(self._triggers, rule, "refused" if refused else "fired")
        for reason in refused if isinstance(refused, list) else [refused]:
            self._count(self._reasons, rule, str(reason)[:80])

    def _count(self, counter: Any, rule: str, what: str) -> None:
        if (rule, what) in self._names or len(self._names) < MOST_NAMES:
            self._names.add((rule, what))
            counter.labels(self._probe, rule, what).inc()

    def _take_status(self, fields: dict[str, Any]) -> None:
        now, pid, uptime = monotonic_ns(), fields.get("pid", 0), fields.get("uptime_ns", 0)
        if not isinstance(pid, int) or not isinstance(uptime, int):
            return
        own = {"published": fields.get("published")}
        for table, short in OF_A_WORKER.items():
            counts = _table(fields.get(table))
            own |= {f"{short}.{name}": n for name, n in counts.items() if name not in STATES}
        for name, counts in _table(fields.get("live")).items():
            own |= {f"live.{name}.{what}": n for what, n in _table(counts).items()}
        shared = {f"supervision.{name}": n for name, n in _table(fields.get("supervision")).items()}
        for thing, counts in _table(fields.get("actuators")).items():
            shared |= {f"actuator.{thing}.{name}": n for name, n in _table(counts).items()}
        self._advance(self._worker, _whole(own), pid, uptime, now)
        self._advance(self._serve, _whole(shared), 0, 0, now)  # outlives the workers
        self._realtime.set(bool(fields.get("realtime")))
        surprise = _table(fields.get("drift")).get("surprise")
        self._surprise.set(surprise if isinstance(surprise, float) else float("nan"))
        self._silent.set(_whole(_table(fields.get("units"))).get("silent_count", 0))
        of_source = _whole(_table(fields.get("source_counters")))
        for name, gauge in self._states.items():
            gauge.set(of_source.get(name, 0))
        for state in ("waiting", "streaming", "silent"):
            self._source.labels(self._probe, state).set(fields.get("source") == state)

    def _advance(
        self, rising: Rising, counts: dict[str, int], pid: int, uptime: int, now: int
    ) -> None:
        before = dict(rising.totals)
        rising.take(counts, pid, uptime, now)
        for name, total in rising.totals.items():
            self._counted.labels(self._probe, name).inc(total - before.get(name, 0))


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _whole(counts: dict[str, Any]) -> dict[str, int]:
    """Those that are counts; not flags, times or names."""
    return {
        name: count for name, count in counts.items() if type(count) is int and 0 <= count < 1 << 53
    }


def parse_listen(listen: str) -> tuple[str, int]:
    """Host and port of an address to listen at.

    Raises
    ------
    ConfigError
        It is none.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 1 << 16:
        raise ConfigError(f"--listen {listen}; expected HOST:PORT such as {DEFAULT_LISTEN}")
    return host.strip("[]"), int(port)


def tell(
    probe: str,
    connect: str,
    listen: str,
    stop: Callable[[], bool],
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Listen to ``serve`` and answer Prometheus until told to stop; say where, once it is so.

    Raises
    ------
    ConfigError, StreamError
    """
    metrics, (host, port) = Metrics(probe), parse_listen(listen)
    from prometheus_client import start_http_server

    listener = DecodedListener(connect, probe)
    try:
        try:
            server, thread = start_http_server(port, host, metrics.registry)
        except OSError as error:
            raise StreamError(
                f"cannot listen at {listen} ({error.strerror}); end what uses it or give another "
                "--listen"
            ) from None
        say(f"metrics of {probe} at http://{listen}/metrics")
        while not stop():
            metrics.take(listener.read(200))
        server.shutdown()
        server.server_close()
        thread.join(5)
    finally:
        listener.close()


# -- command -------------------------------------------------------------------------------------

HAS_RESULT = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--probe", required=True, help="name of the probe, such as imec0")
    parser.add_argument(
        "--connect", default=DEFAULT_DECODED, metavar="URL", help="where serve publishes"
    )
    parser.add_argument(
        "--listen",
        default=DEFAULT_LISTEN,
        metavar="HOST:PORT",
        help=f"where Prometheus comes to ask (default {DEFAULT_LISTEN})",
    )


def run(args: argparse.Namespace) -> None:
    stop = asked_to_stop()
    say = (lambda line: None) if args.quiet else partial(print, file=sys.stderr)
    tell(args.probe, args.connect, args.listen, stop, say)
