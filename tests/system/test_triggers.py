"""Triggers of real ``serve`` processes: once per event, whoever decides, and done as they say."""

import os
import signal

import numpy as np
import pytest

from rt_neds.children import serving, wait_for_schema
from rt_neds.frames import Flag
from rt_neds.stream.trigger import Triggers
from rt_neds.supervise import CAN_FORK
from rt_neds.trigger_config import TriggerConfig, rules_of
from tests.actuators.checking import NetworkEvents
from tests.system.test_supervision import Rig, children

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not CAN_FORK, reason="supervision forks, which is safe on Linux alone"),
]
REFRACTORY = 10


class TriggerRig(Rig):
    """Hears triggers, too, and knows what the frames it heard should have decided."""

    def __init__(self, tiny, **rule):
        super().__init__(tiny)
        threshold = float(np.median(self.undisturbed()[:, 0]))
        self.rule = {"when": f"speed > {threshold}", "refractory_ms": 200.0, **rule}
        for key, value in self.rule.items():
            self.options += ("--set", f"trigger.fast.{key}={value}")
        self.triggers = []

    def hear(self, enough, seconds=60):
        def read(timeout_ms, read=self.listener.read):
            message = read(timeout_ms)
            if message is not None and getattr(message, "kind", "") == "trigger":
                self.triggers.append(message.fields)
                return None
            return message

        self.listener.read, before = read, self.listener.read
        try:
            super().hear(enough, seconds)
        finally:
            self.listener.read = before

    def drain(self):
        """Number of rules that fired, all told, once serve has ended."""
        fired = sum(not d["refused"] for d in self.triggers)
        while (message := self.listener.read(1000)) is not None:
            fired += getattr(message, "kind", "") == "trigger" and not message.fields["refused"]
        return fired

    def decided(self, frames):
        """What a Triggers of our own says of frames."""
        triggers = Triggers(rules_of({"imec0": {"fast": TriggerConfig(**self.rule)}}))
        triggers.bind(self.schema)
        return [said[0] for frame in frames if (said := triggers.take(frame))]


def keys(decided):
    return [(d["rule"], d["epoch"], d["bin"], d["sample"], tuple(d["refused"])) for d in decided]


def test_with_a_standby_every_event_is_decided_once_whatever_becomes_of_the_workers(tiny):
    server = NetworkEvents()
    with TriggerRig(tiny, **{"ttl.line": 2, "ttl.to": server.address}) as rig:
        rig.rule = {key: value for key, value in rig.rule.items() if "." not in key}
        with serving(*rig.options, "--set", "standby=true") as child:
            rig.schema = wait_for_schema(rig.listener, child).fields
            rig.hear_frames(60)
            first = rig.hear_status()
            actuators, _gate, *workers = children(child.pid)
            assert first["pid"] in workers
            rig.signal(first["pid"], signal.SIGKILL, 60)
            second = rig.hear_status(lambda s: s["pid"] != first["pid"])
            rig.signal(second["pid"], signal.SIGSTOP, 100)
            os.kill(actuators, signal.SIGKILL)
            rig.hear_status(lambda s: s["supervision"]["restarts"] == 3)
            rig.hear_frames(60)
            last = rig.frames[-1].bin
            rig.hear(lambda: rig.frames[-1].bin > last + 60)
            status = rig.hear_status()
        fired_in_all = rig.drain()
    bins = rig.check_bins()
    assert bins == list(range(bins[0], bins[0] + len(bins)))
    decided = rig.decided(rig.frames)
    # The message of the last frame may not have been heard.
    assert keys(rig.triggers) == keys(decided)[: len(rig.triggers)]
    assert len(decided) - len(rig.triggers) <= 1
    fired = [d for d in rig.triggers if not d["refused"]]
    refused = [d for d in rig.triggers if d["refused"]]
    assert min(np.diff([d["bin"] for d in fired])) >= REFRACTORY
    assert len(fired) > 8
    assert {"warming"} <= {why for d in refused for why in d["refused"]}
    for d in rig.triggers:
        assert d["decoded_ns"] < d["sent_ns"]
    told = status["triggers"]["fast"]
    assert abs(told["fired"] - len(fired)) <= 1
    assert told["fired_ns"] in {d["sent_ns"] for d in fired}

    # The line went up for each, or it is counted why not: whoever acts was killed in between.
    acted = status["actuators"]["fast.ttl"]
    ups = server.heard.count("TTL Line=2 State=1")
    assert acted["done"] <= ups <= fired_in_all
    missed = acted["late"] + acted["failed"] + acted["dropped"]
    assert acted["done"] + missed >= len(fired) - 2
    assert server.heard[-1] == "TTL Line=2 State=0"
    server.close()


@pytest.mark.slow  # whether a refusal falls into the few frames heard depends on the machine
def test_a_replaced_worker_refuses_for_a_context_and_keeps_the_refractory_time(tiny):
    with TriggerRig(tiny) as rig, serving(*rig.options) as child:
        rig.schema = wait_for_schema(rig.listener, child).fields
        rig.hear_frames(60)
        first = rig.hear_status()
        before = len(rig.frames)
        heard = keys(rig.triggers)
        assert heard == keys(rig.decided(rig.frames))[: len(heard)]
        os.kill(first["pid"], signal.SIGKILL)
        rig.hear_frames(100)
        status = rig.hear_status(lambda s: s["supervision"]["restarts"] == 1)
    flags = {frame.bin: frame.flags for frame in rig.frames}
    restarted = {frame.bin for frame in rig.frames[before:] if frame.flags & Flag.RESTARTED}
    assert restarted
    since = [d for d in rig.triggers if d["bin"] in restarted]
    assert since
    # Warming, too, only if the other was killed in the middle of a step (decision 0035).
    assert all("restarted" in d["refused"] for d in since)
    events = [(d["epoch"], d["bin"]) for d in rig.triggers]
    assert len(set(events)) == len(events)
    fired = [d["bin"] for d in rig.triggers if not d["refused"]]
    assert min(np.diff(fired)) >= REFRACTORY
    assert all(flags[bin_] == 0 for bin_ in fired if bin_ in flags)
    assert fired[-1] > max(restarted)
    # Counted on where the other stopped.
    assert status["triggers"]["fast"]["fired"] >= len([b for b in fired if b < min(restarted)])
