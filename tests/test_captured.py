"""What a capture holds: when its runs began and ended, and what of it cannot be."""

import numpy as np
import pytest

from offline.captured import MOST_BEHAVIOURS, Contents
from rt_neds.capture import Capture, Stream
from rt_neds.wire import BehaviourBatch, pack_behaviour, pack_map
from tests.capturing import write_capture
from tests.test_nwb import BIN, MS, SCHEMA, bin_, output, spikes


def test_a_runs_zero_is_by_its_least_delayed_message_and_its_end_the_last_of_anything(tmp_path):
    messages = [
        spikes(1, 0, [], 1040 * MS),  # 30 ms late
        spikes(1, 1, [], 1020 * MS),
        spikes(2, 0, [], 3010 * MS),
        spikes(2, 1, [], 3050 * MS),  # late
        spikes(2, 2, [], 3060 * MS),
        bin_(2, 0, 3061 * MS),  # of 600 samples, where 900 were heard
        spikes(3, 0, [], 3020 * MS, first=3000),  # begun 0.1 s ago, were it not for the second
        spikes(3, 1, [], 3030 * MS, first=3300),
    ]
    write_capture(tmp_path / "c", messages)
    starts = Contents(Capture(tmp_path / "c")).starts_s()
    assert starts == pytest.approx({1: 0.0, 2: 2.0, 3: 2.0 + 0.03 - 0.1})


def test_a_trigger_is_of_the_run_that_was_decoded_last(tmp_path):
    fields = {"rule": "fast", "bin": 0, "sample": 600, "sent_ns": 2, "refused": ""}
    trigger = (9 * MS, Stream.DECODED, pack_map("trigger", "imec0", fields))
    messages = [trigger, spikes(1, 0, [], MS), bin_(1, 0, MS), trigger, spikes(2, 0, [], MS),
                bin_(2, 0, MS), trigger]  # fmt: skip
    write_capture(tmp_path / "c", messages)
    contents = Contents(Capture(tmp_path / "c"))
    assert contents.marks["triggers"] == [(1, 600, "fast"), (2, 600, "fast")]
    assert contents.skipped["unplaced"] == 1


def test_what_does_not_fit_what_came_before_is_malformed(tmp_path):
    before_all = {**SCHEMA, "model": "m2", "outputs": [output("a", "poisson", -1, 1)]}
    of_none = {**SCHEMA, "model": "m3", "outputs": [output("a", "poisson", 0, 0)]}
    messages = [
        spikes(1, 0, [], MS),
        bin_(1, 0, MS),
        bin_(1, 1, MS, values=(1, 2)),
        bin_(1, 2, MS),
        *((MS, Stream.DECODED, pack_map("schema", "imec0", of)) for of in (before_all, of_none)),
        *(
            (MS, Stream.SPIKES, pack_behaviour(
                BehaviourBatch(f"b{n}", 1, 0, 0, 100.0, np.zeros(1, np.float32))))
            for n in range(MOST_BEHAVIOURS + 1)
        ),
    ]  # fmt: skip
    write_capture(tmp_path / "c", messages)
    contents = Contents(Capture(tmp_path / "c"))
    assert contents.decoded["m1"].ends == [BIN, 3 * BIN]
    assert contents.schemas == {}
    assert len(contents.behaviours) == MOST_BEHAVIOURS
    assert contents.skipped["malformed"] == 4
