"""What is wrong with a stream, in words: from its frames and status messages to sentences.

Pure: it opens nothing and draws nothing. Counters of a status only ever grow, so what matters now
is by how much they grew in the last seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rt_neds.frames import DecodedFrame, Flag

if TYPE_CHECKING:
    from rt_neds.stream.publisher import Note

RECENT_NS = 10_000_000_000
UNHEARD_NS = 3_000_000_000
"""A status comes once a second."""
BEYOND = 0.05
"""Share of bins in which what is observed live may lie beyond what training saw."""

Level = Literal["wrong", "doubtful", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that is the matter.

    Attributes
    ----------
    level : {"wrong", "doubtful", "note"}
        ``wrong``: do not act on what is decoded; ``doubtful``: something was lost or is not as it
        should be; ``note``: good to know.
    says : str
        What is the matter.
    do : str
        What to do about it, where something can be done.
    """

    level: Level
    says: str
    do: str = ""


FLAGS: dict[Flag, tuple[str, str]] = {
    Flag.GAP: ("samples are missing in what the decoder remembers", ""),
    Flag.LATE: (
        "frames come out later than a bin, or spikes after their bin",
        "see `rt-neds doctor`; a greater lateness_ms if spikes come late",
    ),
    Flag.WARMING: ("context, or memory, of the decoder are not yet full", ""),
    Flag.STALE: ("the source had fallen silent", ""),
    Flag.SLIPPED: ("the sample clock jumped against this machine's", ""),
    Flag.RESTARTED: ("the acquisition began anew, or another process decodes", ""),
    Flag.UNKNOWN_UNITS: (
        "spikes come from units that the bundle does not know",
        "serve the bundle of today's session",
    ),
    Flag.MISSING_UNITS: ("units of the bundle are not in the stream", "see which electrodes sort"),
}

GREW: dict[str, Finding] = {
    "source_counters.lost": Finding(
        "doubtful", "{n} messages of the source lost", "its machine, or the network, is too slow"
    ),
    "source_counters.malformed*": Finding(
        "doubtful", "{n} messages that make no sense", "see docs/wire.md"
    ),
    "source_counters.repeated": Finding("note", "{n} messages came twice"),
    "source_counters.too_late": Finding(
        "doubtful",
        "asked SpikeGLX too late {n} times: samples are lost",
        "a longer stream buffer there",
    ),
    "source_counters.missed": Finding("doubtful", "{n} samples of SpikeGLX lost"),
    "source_counters.skipped": Finding(
        "doubtful", "{n} samples of SpikeGLX skipped to catch up", "this machine is too slow"
    ),
    "source_counters.heartbeats_unanswered": Finding(
        "doubtful", "Open Ephys left {n} heartbeats unanswered"
    ),
    "bin_counters.spikes_late": Finding(
        "doubtful", "{n} spikes came after their bin had closed", "a greater lateness_ms"
    ),
    "bin_counters.spikes_far": Finding("doubtful", "{n} spikes from hours ahead thrown away"),
    "bin_counters.bins_skipped": Finding(
        "doubtful", "{n} bins had no data at all and were skipped"
    ),
    "frame_counters.late": Finding(
        "doubtful", "{n} frames came out more than a bin late", "see `rt-neds doctor`"
    ),
    "frame_counters.stale": Finding("doubtful", "the source fell silent {n} times"),
    "frame_counters.slips": Finding(
        "wrong", "the sample clock slipped {n} times", "is the probe's clock locked?"
    ),
    "supervision.restarts": Finding(
        "doubtful", "{n} processes of serve were replaced", "see what serve printed"
    ),
    "supervision.bins_missed": Finding(
        "doubtful", "{n} bins not decoded while a process was replaced", "standby = true"
    ),
    "gate.late": Finding(
        "doubtful", "{n} frames held up behind two workers", "see `rt-neds doctor`"
    ),
    "gate.refused": Finding("doubtful", "{n} bins of an acquisition that was over came too late"),
}
"""Counters of the status, and what it means if one grew by ``n``; ``*`` sums all that begin so."""


def counter(status: Mapping[str, Any], path: str) -> int:
    """A counter of a status; 0 where it has none of that name."""
    group, name = path.split(".")
    counters = status.get(group) or {}
    if name.endswith("*"):
        return sum(int(n) for key, n in counters.items() if key.startswith(name[:-1]))
    return int(counters.get(name) or 0)


class Health:
    """Takes in what is heard of one probe, and says what is the matter with it."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = {}
        self._recent: deque[tuple[int, dict[str, Any]]] = deque()
        self._heard_ns = 0
        self._frame: DecodedFrame | None = None
        self._missed: deque[tuple[int, int]] = deque()

    def take(self, message: DecodedFrame | Note | None, now_ns: int) -> None:
        """Take in one message, heard at host time ``now_ns``."""
        if message is None:
            return
        self._heard_ns = now_ns
        if isinstance(message, DecodedFrame):
            last, self._frame = self._frame, message
            if last is not None and message.epoch == last.epoch and message.bin > last.bin + 1:
                self._missed.append((now_ns, message.bin - last.bin - 1))
        elif message.kind == "status":
            if message.fields.get("uptime_ns", 0) < self.status.get("uptime_ns", 0):
                self._recent.clear()  # another process, which counts anew
            self.status = message.fields
            self._recent.append((now_ns, self.status))

    def findings(self, now_ns: int) -> list[Finding]:
        """What is the matter now or was a moment ago, the worst first; empty if all is well."""
        if not self._heard_ns:
            return [Finding("wrong", "no serve heard yet", "is it running, and on this address?")]
        if now_ns - self._heard_ns > UNHEARD_NS:
            ago = (now_ns - self._heard_ns) / 1e9
            return [Finding("wrong", f"serve not heard for {ago:.0f} s", "is it still running?")]
        while self._recent and now_ns - self._recent[0][0] > RECENT_NS:
            self._recent.popleft()
        while self._missed and now_ns - self._missed[0][0] > RECENT_NS:
            self._missed.popleft()
        parts = (self._source, self._flags, self._grown, self._live, self._acts, self._drift)
        found = [finding for part in parts for finding in part()]
        order = ("wrong", "doubtful", "note")
        return sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.level))

    def _source(self) -> Iterator[Finding]:
        state, trouble = self.status.get("source"), str(self.status.get("trouble") or "")[:200]
        if trouble:
            yield Finding("wrong", trouble)
        elif state == "silent" and (again := self._grew("source_counters.repeated")) > 0:
            yield Finding(
                "wrong",
                f"nothing new is arriving: {again} messages that were had before came just now",
                "for a capture played again start serve anew; an acquisition needs a new epoch",
            )
        elif state == "silent":
            yield Finding("wrong", "no spikes are arriving", "is the acquisition running?")
        elif state == "waiting":
            yield Finding("wrong", "no spikes have come yet", "start the acquisition")

    def _flags(self) -> Iterator[Finding]:
        flags = Flag(self._frame.flags) if self._frame is not None else Flag(0)
        units = self.status.get("units") or {}
        for flag, (says, do) in FLAGS.items():
            if not flags & flag:
                continue
            if flag is Flag.MISSING_UNITS:
                yield from self._units_gone(units, says, do)
                continue
            yield Finding("wrong", says, do)

    @staticmethod
    def _units_gone(units: Mapping[str, Any], says: str, do: str) -> Iterator[Finding]:
        if silent := units.get("silent_count"):
            names = ", ".join(units["silent"][:3]) + (" ..." if silent > 3 else "")
            fell = f"{silent} of {units['bundle']} units have fallen silent ({names})"
            yield Finding("wrong", fell, "look at the sorting; their stand-ins are used meanwhile")
        if units.get("missing"):
            yield Finding("wrong", f"{units['missing']} of {units['bundle']} {says}", do)
        elif not silent:
            yield Finding("wrong", says, do)

    def _grown(self) -> Iterator[Finding]:
        of_samples = "missed" in (self.status.get("source_counters") or {})
        for path, grown in GREW.items():
            if path == "source_counters.lost" and of_samples:
                continue  # what SpikeGLX lost is what it missed and what was skipped, in samples
            if (grew := self._grew(path)) > 0:
                yield replace(grown, says=f"{grown.says.format(n=grew)} just now")
        other = self._grew("source_counters.other_stream")
        if other > 0 and not self._grew("source_counters.spikes"):
            yield Finding(
                "wrong",
                f"no spike came just now, but {other} messages of other streams of Open Ephys",
                "name the probe's stream in the source, ?stream=NAME",
            )
        if missed := sum(bins for _, bins in self._missed):
            yield Finding("doubtful", f"{missed} bins were not heard just now")

    def _grew(self, path: str) -> int:
        before = self._recent[0][1] if self._recent else self.status
        return counter(self.status, path) - counter(before, path)

    def _live(self) -> Iterator[Finding]:
        for name, now in (self.status.get("live") or {}).items():
            hidden = now["hidden"] - self._before("live", name).get("hidden", now["hidden"])
            if hidden > 0:
                yield Finding(
                    "doubtful",
                    f"{name} was not observed in {hidden} bins just now; decoded without it",
                    "is it being sent, with the epoch and samples of the spikes?",
                )
            before = self._before("live", name)
            shown = now["shown"] - before.get("shown", now["shown"])
            beyond = now.get("beyond", 0) - before.get("beyond", now.get("beyond", 0))
            if beyond > BEYOND * shown:
                yield Finding(
                    "doubtful",
                    f"{name} was beyond what training saw in {beyond} of {shown} bins just now",
                    "is it sent in the unit, and with the sign, that it was trained on?",
                )

    def _acts(self) -> Iterator[Finding]:
        for rule, now in (self.status.get("triggers") or {}).items():
            before = self._before("triggers", rule)
            if now["refused"] > before.get("refused", now["refused"]):
                why = ", ".join(now["why"])
                yield Finding("doubtful", f"trigger {rule} held, and was refused: {why}")
        for name, now in (self.status.get("actuators") or {}).items():
            before = self._before("actuators", name)
            for what in ("failed", "dropped", "late", "overdue"):
                count = now.get(what, 0)
                grew = count - before.get(what, count)
                if grew > 0:
                    yield Finding(
                        "wrong", f"{name}: {grew} {what} just now", "see docs/triggers.md"
                    )

    def _before(self, group: str, name: str) -> Mapping[str, Any]:
        status = self._recent[0][1] if self._recent else {}
        return (status.get(group) or {}).get(name) or {}

    def _drift(self) -> Iterator[Finding]:
        drift = self.status.get("drift") or {}
        if drift.get("drifted"):
            yield Finding(
                "wrong",
                "units do not fire as the bundle expects: in the last "
                f"{drift['seconds']:.0f} s {drift['surprise']:.1f} times as far from it as usual"
                + (f" ({', '.join(drift['units'][:3])} the most)" if drift.get("units") else ""),
                "if it stays so, look at the sorting, or fine-tune on today's recording",
            )
