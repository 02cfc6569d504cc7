"""A behaviour beside the spikes, over real sockets: shown to the decoder, which goes on without."""

import json

import numpy as np
import pytest
import torch
import zmq

from offline.predict import decode_spans
from offline.train import train
from offline.windows import bin_session
from rt_neds.bundle import build_model, load_spec
from rt_neds.children import serving, wait_for_schema
from rt_neds.frames import SPIKE_DTYPE, SpikeBatch
from rt_neds.health import Health
from rt_neds.model.readout import to_values_TV
from rt_neds.session import load_session
from rt_neds.stream.publisher import Note
from rt_neds.wire import BehaviourBatch, TaskEvent, pack_behaviour, pack_event, pack_spikes
from tests.making import TINY, tiny_config, write_session
from tests.system.test_live import Rig, cli

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A session, and a bundle that has learned with its behaviours shown."""
    folder = tmp_path_factory.mktemp("shown")
    path = write_session(folder / "s.h5", seconds=40)
    behaviour = {name: {**of, "live": True} for name, of in TINY["behaviour"].items()}
    config = tiny_config(behaviour=behaviour)
    train(config, [str(path)], folder)
    return path, folder / "bundle", config


@pytest.mark.parametrize(
    ("live", "series", "asked"),
    [("speed", "speed=wheel.wheel_speed", "choice"), ("choice", "choice", "speed")],
)
def test_a_replayed_behaviour_is_shown_and_the_rest_equals_offline(
    shown, tmp_path, live, series, asked
):
    path, bundle, config = shown
    rig = Rig(bundle, "--live", live)
    with serving(*rig.options) as child:
        schema = wait_for_schema(rig.listener, child)
        frames, notes, _ = rig.replay(
            path, tmp_path, "--speed", "0", "--batch-ms", "7", "--live", series,
            "--bundle", str(bundle),
        )  # fmt: skip
    assert [o["name"] for o in schema.fields["outputs"]] == [asked]
    assert schema.fields["live"] == [live]
    spec = load_spec(bundle)
    binned = bin_session(load_session(path), config.data, config.behaviour)
    assert [frame.bin for frame in frames] == list(range(binned.bins))
    streamed = np.stack([frame.values_V for frame in frames])
    scales = spec.session().scales
    (behaviour,) = (b for b in spec.behaviours if b.name == asked)
    by_shown = {}
    for observed in ({live: scales[live]}, {}):
        raw = decode_spans(
            build_model(bundle, spec),
            binned,
            [(0, binned.bins)],
            wanted=[asked],
            window=300,
            live=observed,
        )[asked]
        values = to_values_TV(torch.from_numpy(raw), behaviour, scales.get(asked))
        by_shown[len(observed)] = values.numpy()
    np.testing.assert_allclose(streamed, by_shown[1], atol=1e-4)
    assert np.abs(by_shown[0] - by_shown[1]).max() > 0.001
    known = int(binned.shown_TM[:, 1 + list(config.behaviour).index(live)].sum())
    assert 0 < known < binned.bins if live == "choice" else known == binned.bins
    assert notes["status"].fields["live"][live] == {
        "shown": known, "hidden": binned.bins - known, "beyond": 0, "late": 0, "skipped": 0,
        "lost": 0,
    }  # fmt: skip
    result = cli(
        "evaluate", "--bundle", str(bundle), "--session", str(path), "--live", live,
        "--baselines", "none", "--json", "-", "--quiet",
    )  # fmt: skip
    scores = json.loads(result.stdout)
    assert scores["live"] == [live]
    assert list(scores["decoding"]) == [asked]
    assert scores["stream_vs_offline_max_abs"] < 1e-4


def batch(seq):
    records = np.zeros(2, SPIKE_DTYPE)
    records["sample"] = seq * 600 + 5
    return pack_spikes("imec0", SpikeBatch(5, seq, seq * 600, (seq + 1) * 600, 3e4, 1, 0, records))


def test_without_it_decoding_goes_on_and_says_so(shown):
    _, bundle, _ = shown
    rig, health = Rig(bundle, "--live", "choice"), Health()
    with zmq.Context() as context, context.socket(zmq.XPUB) as acquisition:
        acquisition.set(zmq.LINGER, 500)
        acquisition.bind(rig.bind)
        with serving(*rig.options) as child:
            wait_for_schema(rig.listener, child)
            for _ in ("spikes", "source", "choice", "events"):
                assert acquisition.poll(30_000), "it never subscribed"
                acquisition.recv()
            for seq in range(100):
                if seq == 20:
                    acquisition.send_multipart(
                        pack_event("imec0", TaskEvent(5, seq * 600, "choice", "left"))
                    )
                    wrong = BehaviourBatch("choice", 5, 0, 1, 50.0, np.ones(1, np.float32))
                    acquisition.send_multipart(pack_behaviour(wrong))
                if seq == 60:
                    acquisition.send_multipart(
                        pack_event("imec0", TaskEvent(5, seq * 600, "choice", None))
                    )
                acquisition.send_multipart(batch(seq))
            status = rig.statuses(lambda s: s["published"] == 100)
    assert status["live"]["choice"] == {
        "shown": 40, "hidden": 60, "beyond": 0, "late": 0, "skipped": 0, "lost": 0,
    }  # fmt: skip
    assert status["source_counters"]["malformed"] == 1
    before = {**status, "live": {"choice": {"shown": 0, "hidden": 0, "beyond": 0}}}
    for second, heard in enumerate((before, status)):
        health.take(Note("status", heard), second * 1_000_000_000)
    said = [finding.says for finding in health.findings(1_000_000_000)]
    assert any("choice was not observed in 60 bins" in says for says in said)


def test_what_cannot_be_shown_is_told_in_one_line(shown, tiny):
    path, bundle, _ = shown
    _, run, _ = tiny
    for options, expected in (
        (("serve", "--bundle", str(run / "bundle"), "--live", "speed"), "can be shown none"),
        (("serve", "--bundle", str(run / "bundle"), "--live", "no"), "tiny: leave it out"),
        (("serve", "--bundle", str(bundle), "--live", "sped"), "choice of session tiny: name one"),
        (("serve", "--bundle", str(bundle), "--live", "speed", "choice"), "nothing to decode"),
        (
            ("serve", "--bundle", str(bundle), "--live", "speed", "--source",
             "openephys://127.0.0.1:1"),
            "serve without them",
        ),
        (("replay", "--session", str(path), "--live", "speed"), "expected NAME=SERIES"),
        (
            ("replay", "--session", str(path), "--live", "sped", "--bundle", str(bundle)),
            "the bundle has speed, choice",
        ),
        (
            ("replay", "--session", str(path), "--live", "s=wheel.speed", "--wait", "1"),
            "did you mean wheel_speed?",
        ),
        (("replay", "--raw", "x.bin", "--as", "spikeglx", "--live", "s=t"), "--session"),
    ):  # fmt: skip
        result = cli(*options, "--probe", "imec0")
        assert result.returncode == 2, options
        assert expected in result.stderr
        assert result.stderr.count("\n") == 1
