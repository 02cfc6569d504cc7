"""Windows on their way through training: where they lie, and what of them is shown and asked."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from offline.batches import bin_windows, draw_windows, prepare
from tests.making import tiny_config, write_session

ENTRIES = dict.fromkeys(("spikes", "ahead", "speed", "choice"), 1)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A session with a hole that begins and ends inside of bins; a third is held out."""
    path = tmp_path_factory.mktemp("batches") / "s.h5"
    write_session(path, domain=[(0.0, 20.01), (22.005, 60.0)])
    return prepare(path, tiny_config(data={"fractions": [0.6, 0.2, 0.2]}))


def config_of(scheme):
    return tiny_config(masking={"schemes": {scheme: 1.0}}, model={"history": [1, 4]})


def drawn(subject, scheme, size=200):
    draw = draw_windows([subject], config_of(scheme), np.random.default_rng(0), size)
    bins_BT = draw.firsts_B[:, None] + np.arange(tiny_config().data.window_bins)

    def of(allowed_T):
        """Where a moved bin may be shown or asked: both that it touches on the grid allow it."""
        allowed = set(np.flatnonzero(allowed_T).tolist())
        return np.array([[{t, t + 1} <= allowed for t in row] for row in bins_BT.tolist()])

    return draw, of


def test_a_window_touches_a_bin_of_training_at_any_place(subject):
    draw, _ = drawn(subject, "decoding", size=2000)
    binned, T = subject.binned, tiny_config().data.window_bins
    anchors = np.flatnonzero(binned.of_split("train") & binned.scored_TM[:, 1:].any(axis=1))
    after_B = np.searchsorted(anchors, draw.firsts_B)
    away_B = anchors[np.minimum(after_B, len(anchors) - 1)] - draw.firsts_B
    assert ((away_B >= 0) & (away_B < T)).all()
    assert draw.firsts_B.min() < anchors[0] - T // 2
    assert draw.firsts_B.max() > anchors[-1] - T // 2
    assert ((draw.part_B >= 0) & (draw.part_B < 1)).all()


def test_a_moved_bin_is_shown_and_asked_what_both_that_it_touches_allow(subject):
    binned = subject.binned
    train_T = binned.of_split("train")
    draw, of = drawn(subject, "decoding")
    np.testing.assert_array_equal(draw.masks.observed_BTM[:, :, 0], of(binned.shown_TM[:, 0]))
    assert not draw.masks.observed_BTM[:, :, 1:].any()
    for m in (1, 2):
        expected = of(binned.scored_TM[:, m] & train_T)
        np.testing.assert_array_equal(draw.masks.asked_BTM[:, :, m], expected)
    draw, of = drawn(subject, "encoding")
    expected = of(binned.scored_TM[:, 0] & train_T)
    np.testing.assert_array_equal(draw.masks.asked_BTM[:, :, 0], expected)
    for m in (1, 2):
        expected = of(binned.shown_TM[:, m] & train_T)
        np.testing.assert_array_equal(draw.masks.observed_BTM[:, :, m], expected)


@pytest.mark.parametrize("scheme", ["decoding", "encoding"])
def test_a_batch_is_what_was_recorded_between_the_bins_of_the_grid(subject, scheme):
    binned, scale = subject.binned, subject.scales[0]
    draw, _ = drawn(subject, scheme, size=20)
    config, part = config_of(scheme), slice(5, 20)
    batch = bin_windows(draw, part, config, torch.device("cpu"), ENTRIES)
    records_S, past = binned.session.records_S, max(config.model.history) - 1
    for b, (first, later) in enumerate(zip(draw.firsts_B[part], draw.part_B[part], strict=True)):
        edges = np.arange(first - past, first + 41) * 600 + int(later * 600) - 0.5
        spikes = (records_S["sample"], records_S["unit"])
        expected, _, _ = np.histogram2d(*spikes, bins=(edges, np.arange(7) - 0.5))
        if scheme == "encoding":  # of spikes that are hidden there is no past
            expected[:past] = 0
        np.testing.assert_array_equal(batch.counts_BTN[b], expected)
        at_T = np.arange(first, first + 40)
        inside_T = (at_T >= 0) & (at_T < binned.bins - 1)
        speed_T = np.interp(at_T + later, np.arange(binned.bins), binned.values_TM[:, 1])
        targets_TM = batch.targets_BTM[b].numpy()[inside_T]
        np.testing.assert_allclose(targets_TM[:, 1], speed_T[inside_T], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(targets_TM[:, 2], binned.values_TM[at_T[inside_T], 2])
        inputs_TM = batch.inputs_BTM[b].numpy()[inside_T]
        z_T = (speed_T[inside_T] - scale.mean) / scale.sd
        np.testing.assert_allclose(inputs_TM[:, 1], z_T, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(inputs_TM[:, 2], targets_TM[:, 2])
    # What a silent unit's loss is divided by is a tenth of the mean rate, not nothing.
    expected_N = subject.rate_N + 0.1 * subject.rate_N.mean()
    np.testing.assert_allclose(batch.rate_N, expected_N, rtol=1e-5)


def test_sessions_are_drawn_by_the_root_of_their_length(subject):
    lengths = {"a": 900, "b": 100, "c": 400}
    subjects = [dataclasses.replace(subject, id=name, length=n) for name, n in lengths.items()]
    rng, config = np.random.default_rng(0), config_of("decoding")
    count = Counter(draw_windows(subjects, config, rng, 1).subject.id for _ in range(900))
    for name, share in (("a", 3 / 6), ("b", 1 / 6), ("c", 2 / 6)):
        assert count[name] / 900 == pytest.approx(share, abs=0.06)
