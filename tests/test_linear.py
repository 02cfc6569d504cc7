"""The linear decoder a network begins at: fitted as written, heard unseen, believed as is due."""

import copy
import dataclasses

import msgspec
import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

import offline.linear as linear
from offline import alone, beginning, cache
from offline.alone import (
    as_kept,
    left_to_regression,
    regressions_alone,
    regressions_validated,
)
from offline.batches import bin_windows, draw_windows, prepare
from offline.beginning import build, fit_linear
from offline.cache import kept
from offline.config import TrainConfig
from offline.finetune import begin_at_bundle
from offline.metrics import r2
from offline.predict import decode_spans
from offline.processes import Processes
from offline.train import train
from offline.validation import Validation, validate
from rt_neds.bundle import build_model, load_spec
from rt_neds.config import config_path, load_config
from rt_neds.model.linear import LinearDecoder, where_said
from rt_neds.model.neds import SCHEMES
from rt_neds.model.readout import Behaviour, Scale, to_values_TV
from tests.making import stopped_at_eight, tiny_config, write_session

SPEED = Behaviour(name="speed", kind="continuous")
CHOICE = Behaviour(name="choice", kind="categorical", classes=("left", "right"))
LINEAR = {"linear": True, "history": [1, 4]}


def config_of(**sections):
    return tiny_config(model=LINEAR, **sections)


def of_behaviours(config, *names):
    return msgspec.structs.replace(config, behaviour={n: config.behaviour[n] for n in names})


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return write_session(tmp_path_factory.mktemp("linear") / "s.h5", seconds=300.0, units=8)


@pytest.fixture(scope="module")
def begun(session):
    """A network at its beginning, and its subject."""
    config = config_of()
    subject = prepare(session, config)
    torch.manual_seed(0)
    model = build(config, [subject]).eval()
    fit_linear(model, [subject])
    return config, model, subject


@pytest.mark.parametrize(("bins", "features"), [(60, 7), (30, 80)])
def test_each_regression_is_ridge_with_classes_weighed_alike(bins, features, monkeypatch):
    rng, penalty = np.random.default_rng(0), 0.3
    monkeypatch.setattr(linear, "PENALTIES", (penalty,))
    z_SF = rng.normal(size=(bins, features)).astype(np.float32)
    class_S = rng.integers(0, 2, bins)
    late_S = rng.uniform(0.1, 1.0, bins)
    target_SR = np.eye(2)[class_S] + 0.1 * rng.normal(size=(bins, 2))
    piece_S = 1 + np.arange(bins) * linear.PIECES // bins
    weight_XRF, bias_XR = linear.ridge(z_SF, target_SR, piece_S, class_S, late_S)
    for x in range(1 + linear.PIECES):
        seen = piece_S != x
        weight_S = late_S.copy()
        for c in (0, 1):
            weight_S[class_S == c] /= weight_S[seen & (class_S == c)].sum()
        plain = Ridge(alpha=penalty).fit(z_SF[seen], target_SR[seen], 0.5 * weight_S[seen])
        np.testing.assert_allclose(weight_XRF[x], plain.coef_, atol=2e-4)
        np.testing.assert_allclose(bias_XR[x], plain.intercept_, atol=2e-4)


def test_the_penalty_is_the_one_that_foretells_pieces_left_out(monkeypatch):
    rng = np.random.default_rng(1)
    z_SF = rng.normal(size=(200, 50)).astype(np.float32)
    target_SR = z_SF[:, :1] + 3.0 * rng.normal(size=(200, 1))
    piece_S, none_S = 1 + np.arange(200) // 40, np.zeros(200, int)
    chosen, _ = linear.ridge(z_SF, target_SR, piece_S, none_S, np.ones(200))
    errors = []
    for penalty in linear.PENALTIES:
        error = 0.0
        for x in range(1, 6):
            seen, target_S = piece_S != x, target_SR[:, 0]
            fitted = Ridge(alpha=penalty).fit(z_SF[seen], target_S[seen], np.ones(160) / 160)
            error += np.square(fitted.predict(z_SF[~seen]) - target_S[~seen]).sum()
        errors.append(error)
    monkeypatch.setattr(linear, "PENALTIES", (linear.PENALTIES[int(np.argmin(errors))],))
    alone, _ = linear.ridge(z_SF, target_SR, piece_S, none_S, np.ones(200))
    np.testing.assert_allclose(chosen, alone)


def test_pieces_are_contiguous_training_and_split_no_trial(begun):
    _, _, subject = begun
    binned = copy.copy(subject.binned)
    binned.trial_T = np.arange(binned.bins, dtype=np.int32) // 97  # some lie across a border
    fit_T = linear.pieces(binned)
    assert ((fit_T > 0) == binned.of_split("train")).all()
    assert (np.diff(fit_T[fit_T > 0]) >= 0).all()
    assert fit_T.max() == linear.PIECES
    for trial in np.unique(binned.trial_T[binned.of_split("train") & (binned.trial_T >= 0)]):
        assert len(np.unique(fit_T[(binned.trial_T == trial) & (fit_T > 0)])) == 1


def test_training_hears_of_no_bin_what_was_fitted_to_it(begun, monkeypatch):
    config, model, subject = begun
    binned = subject.binned
    fit_T = linear.pieces(binned)
    monkeypatch.setattr(linear, "PENALTIES", (0.1,))
    arguments = (model.behaviours, subject.scales, model.parts("tiny").spikes_in)
    before = linear.fit(binned, *arguments)
    spoilt = copy.copy(binned)
    spoilt.values_TM = np.where((fit_T == 3)[:, None], 1 - binned.values_TM, binned.values_TM)
    after = linear.fit(spoilt, *arguments)
    for x in range(1 + linear.PIECES):
        same = torch.allclose(before.weight_XUF[x], after.weight_XUF[x], atol=1e-6)
        assert same == (x == 3), x

    rng = np.random.default_rng(0)
    draw = draw_windows([subject], config, rng, 6)
    batch = bin_windows(draw, slice(None), config, torch.device("cpu"), dict.fromkeys(
        ("spikes", "ahead", "speed", "choice"), 1))  # fmt: skip
    for first, fit_of_window in zip(draw.firsts_B, batch.fits[2].numpy(), strict=True):
        assert (fit_of_window == binned.cut(fit_T, first, first + len(fit_of_window))).all()


def test_nothing_is_fitted_but_what_is_scored_and_recorded_in_training(session, monkeypatch):
    monkeypatch.setattr(linear, "PENALTIES", (0.1,))
    config = config_of()
    subject = prepare(session, config)
    binned, spikes_in = subject.binned, build(config, [subject]).parts("tiny").spikes_in
    binned.scored_TM[3000:3200, 1:], binned.shown_TM[5000:5200, 0] = False, False
    usable = binned.scored_TM & binned.shown_TM[:, :1] & binned.of_split("train")[:, None]
    arguments = ((SPEED, CHOICE), subject.scales, spikes_in)
    before = linear.fit(binned, *arguments)
    binned.values_TM = np.where(usable, binned.values_TM, 1 - binned.values_TM)
    after = linear.fit(binned, *arguments)
    assert before.weight_XUF.any()
    assert torch.equal(before.weight_XUF, after.weight_XUF)
    assert torch.equal(before.bias_XU, after.bias_XU)
    for name, tensor in before.outs.items():
        assert torch.equal(tensor, after.outs[name])


def test_what_is_fitted_of_a_behaviour_does_not_hang_on_its_place(session, begun):
    config, model, subject = begun
    turned = of_behaviours(config, "choice", "speed")
    other = prepare(session, turned)
    spikes_in = model.parts("tiny").spikes_in
    fits = linear.fit(subject.binned, model.behaviours, subject.scales, spikes_in)
    after = linear.fit(other.binned, model.behaviours[::-1], other.scales, spikes_in)
    assert torch.equal(fits.weight_XUF[:, [1, 2, 0]], after.weight_XUF)
    assert torch.equal(fits.bias_XU[:, [1, 2, 0]], after.bias_XU)
    for name, tensor in fits.outs.items():
        assert torch.equal(tensor, after.outs[name])


def test_how_much_regression_is_believed_is_found_on_bins_it_was_not_fitted_to(begun, monkeypatch):
    _, model, subject = begun
    binned, spikes_in, told = subject.binned, model.parts("tiny").spikes_in, {}

    def noted(out, said_SR, value_S, behaviour, scale, trials):
        told[behaviour.name] = said_SR, value_S, trials

    monkeypatch.setattr(linear, "begin_out", noted)
    fits = linear.fit(binned, model.behaviours, subject.scales, spikes_in)
    for m, name in enumerate(("speed", "choice"), start=1):
        said_SR, value_S, trials = told[name]
        bins_S = np.flatnonzero(binned.of_split("train") & binned.scored_TM[:, m])
        z_SF, rows = linear.features(binned, bins_S, spikes_in), where_said(model.behaviours)[name]
        expected_SR = [
            (fits.weight_XUF[x, rows].numpy() @ z_F + fits.bias_XU[x, rows].numpy())
            for x, z_F in zip(fits.fit_T[bins_S], z_SF, strict=True)
        ]
        np.testing.assert_allclose(said_SR, expected_SR, atol=1e-3)
        np.testing.assert_array_equal(value_S, binned.values_TM[bins_S, m])
        assert trials == (len(np.unique(binned.trial_T[bins_S])) if name == "choice" else 0)


def test_features_are_what_the_read_in_makes_of_recorded_bins(begun):
    _, model, subject = begun
    binned, spikes_in = copy.deepcopy(subject.binned), model.parts("tiny").spikes_in
    binned.shown_TM[4000:4010, 0] = False
    bins_S = np.array([0, 1, 50, 3000, 4000, 4005, 4012, 9000])
    counts_TN = binned.counts_TN(0, binned.bins)
    counts_TN[4000:4010] = 0
    with torch.no_grad():
        z_TF = spikes_in.standardise(torch.from_numpy(counts_TN)[None])[0].numpy()
    found_SF = linear.features(binned, bins_S, spikes_in)
    np.testing.assert_allclose(found_SF, z_TF[bins_S], atol=1e-5)


def test_what_is_said_does_not_hang_on_what_units_are_divided_by(begun, monkeypatch):
    _, model, subject = begun
    parts = model.parts("tiny")
    monkeypatch.setattr(linear, "PENALTIES", (0.1,))
    said = []
    for uneven in (False, True):
        spikes_in = copy.deepcopy(parts.spikes_in)
        if uneven:
            factor_KN = torch.rand_like(spikes_in.sd_KN) + 0.2
            all_alike = spikes_in.sd_KN.norm() / (spikes_in.sd_KN * factor_KN).norm()
            spikes_in.sd_KN.mul_(factor_KN * all_alike)
        decoder = LinearDecoder(parts.linear.weight_UF.shape[1], model.behaviours)
        fits = linear.fit(subject.binned, model.behaviours, subject.scales, spikes_in)
        fits.give(decoder)
        z_SF = linear.features(subject.binned, np.arange(200, 400), spikes_in)
        said.append(decoder(torch.from_numpy(z_SF)))
    torch.testing.assert_close(said[0], said[1], atol=1e-3, rtol=1e-3)


def test_where_training_ends_the_decoder_of_all_of_it_speaks():
    torch.manual_seed(0)
    decoder = LinearDecoder(4, (SPEED, CHOICE))
    weight_XUF, bias_XU = torch.randn(3, 3, 4), torch.randn(3, 3)
    z_BTF, fit_BT = torch.randn(2, 5, 4), torch.randint(0, 3, (2, 5))
    said = decoder(z_BTF, (weight_XUF, bias_XU, fit_BT))
    for b in range(2):
        for t in range(5):
            x = fit_BT[b, t]
            torch.testing.assert_close(said[b, t], weight_XUF[x] @ z_BTF[b, t] + bias_XU[x])


def test_a_network_begins_as_good_as_regression(begun):
    _, model, subject = begun
    binned, spans = subject.binned, subject.binned.spans("test")
    raws = decode_spans(model, binned, spans, wanted=["speed", "choice"], window=300)
    bins = np.concatenate([np.arange(a, b) for a, b in spans])
    true_S = binned.values_TM[bins, 1]
    value_SV = to_values_TV(torch.from_numpy(raws["speed"]), SPEED, subject.scales[0]).numpy()
    z_SF = linear.features(binned, bins, model.parts("tiny").spikes_in)
    weight_F, bias = model.parts("tiny").linear.weight_UF[0], model.parts("tiny").linear.bias_U[0]
    by_ridge = z_SF @ weight_F.numpy() + bias.item()
    by_ridge = by_ridge * subject.scales[0].sd + subject.scales[0].mean
    assert r2(true_S, by_ridge) > 0.2
    assert r2(true_S, value_SV[:, 0]) > r2(true_S, by_ridge) - 0.03
    scored = binned.scored_TM[bins, 2]
    right = raws["choice"][scored].argmax(axis=1) == binned.values_TM[bins, 2][scored]
    assert right.mean() > 0.75
    off = np.abs(value_SV[:, 0] - true_S) / value_SV[:, 1]
    assert 0.55 < (off < 1).mean() < 0.95  # and it knows about how sure to be


def test_chance_is_not_believed_and_never_its_contrary():
    rng = np.random.default_rng(0)
    side_S = np.repeat([0, 1, 1, 0, 1, 0, 0, 1], 20)
    said_SR = np.stack([side_S - 0.5, 0.5 - side_S], axis=1)  # by chance, the wrong way round
    out = LinearDecoder(4, (CHOICE,)).out["choice"]
    linear.begin_out(out, said_SR, side_S, CHOICE, Scale(), trials=8)
    assert 0 < out.weight[0, 0] < 1.5
    assert out.weight[0, 1] == 0
    speed_S = rng.normal(size=4000).astype(np.float32)
    out = LinearDecoder(4, (SPEED,)).out["speed"]
    linear.begin_out(out, rng.normal(size=(4000, 1)), speed_S, SPEED, Scale())
    said = torch.tensor([[-2.0], [2.0]])
    low, high = to_values_TV(out(said).detach(), SPEED, Scale())[:, 0]
    assert abs(high - low) < 0.8  # of 4
    linear.begin_out(out, speed_S[:, None], speed_S, SPEED, Scale())
    low, high = to_values_TV(out(said).detach(), SPEED, Scale())[:, 0]
    assert low < -1.8
    assert high > 1.8


def test_eight_labels_do_not_say_which_class_is_common_and_eight_hundred_do():
    for trials, expected in ((8, (2 + 4) / (8 + 8)), (800, 0.25)):
        rng = np.random.default_rng(trials)
        side_S = np.repeat(np.arange(trials) % 4 == 0, 20).astype(int)  # a quarter of the trials
        # A decoder that was fitted to few of the rare class takes everything for the common one.
        said_SR = np.stack([0 * side_S, 0 * side_S - 0.5], axis=1) + rng.normal(size=2) * 1e-3
        out = LinearDecoder(4, (CHOICE,)).out["choice"]
        linear.begin_out(out, said_SR, side_S, CHOICE, Scale(), trials=trials)
        raw_SC = out(torch.from_numpy(said_SR).float()).detach()
        stated = torch.softmax(raw_SC, dim=1)[:, 1].mean()
        assert stated == pytest.approx(expected, abs=0.03)


def test_where_spikes_are_hidden_nothing_is_said(begun):
    _, model, _ = begun
    model = copy.deepcopy(model)
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.poisson(0.5, (1, 30, 8)).astype(np.float32))
    observed = torch.zeros(1, 30, 3, dtype=torch.bool)
    observed[:, 10:, 0] = True
    arguments = (counts, torch.zeros(1, 30, 3), observed, torch.tensor([SCHEMES.index("decoding")]))
    with torch.no_grad():
        before = model("tiny", *arguments, wanted=["speed"])["speed"]
        model.parts("tiny").linear.bias_U += 1.0
        after = model("tiny", *arguments, wanted=["speed"])["speed"]
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.isclose(before[:, 10:], after[:, 10:]).all()


def begun_at(bundle, tmp_path, config, name):
    """A new session, and the network that begins it at a bundle."""
    path = write_session(tmp_path / f"{name}.h5", session_id=name, units=5, seed=3)
    subject = prepare(path, config)
    model = build(config, [subject]).eval()
    fit_linear(model, [subject], begin_at_bundle(model, bundle, config))
    return subject, model


def test_a_new_session_begins_at_its_own_regression_and_what_others_make_of_it(
    session, tmp_path, monkeypatch
):
    monkeypatch.setattr("offline.alone._shown", lambda gain_X: True)
    config = config_of()
    folder = train(config, [str(session)], tmp_path / "run")["bundle"]
    subject, model = begun_at(folder, tmp_path, config, "n")
    parts, (span,) = model.parts("n"), subject.binned.spans("val")
    z_SF = linear.features(subject.binned, np.arange(*span), parts.spikes_in)
    with torch.no_grad():
        said = parts.linear.read_out("speed", parts.linear(torch.from_numpy(z_SF)[None]))[0]
    assert said.std(dim=0).max() > 0.1
    raws = decode_spans(model, subject.binned, [span], wanted=["speed"], window=300)["speed"]
    others = build_model(folder, load_spec(folder)).parts("tiny").behaviour_out["speed"]
    for mine, other in zip(
        parts.behaviour_out["speed"].parameters(), others.parameters(), strict=True
    ):
        assert torch.equal(mine, other)
    with torch.no_grad():
        for parameter in parts.behaviour_out.parameters():
            parameter.zero_()
    bare = decode_spans(model, subject.binned, [span], wanted=["speed"], window=300)["speed"]
    torch.testing.assert_close(torch.from_numpy(bare), said, atol=1e-4, rtol=0)
    assert np.abs(raws - bare).max() > 1e-3  # what the other session learned is heard


def test_a_new_sessions_own_read_in_says_nothing_yet(session, tmp_path):
    config = config_of()
    folder = train(config, [str(session)], tmp_path / "run")["bundle"]
    subject, model = begun_at(folder, tmp_path, config, "n")
    (span,) = subject.binned.spans("val")
    before = decode_spans(model, subject.binned, [span], wanted=["speed"], window=300)["speed"]
    with torch.no_grad():
        model.spikes_shared.weight += 1.0  # what it is made of, was there anything
    after = decode_spans(model, subject.binned, [span], wanted=["speed"], window=300)["speed"]
    np.testing.assert_array_equal(before, after)


def test_a_share_of_training_hears_regression_alone(begun):
    _, model, _ = begun
    model = copy.deepcopy(model).train()
    model.token_dropout.p = 0.0
    parts, z = model.parts("tiny"), torch.randn(400, 1, 2 * 8)
    torch.manual_seed(0)
    with torch.no_grad():
        token = model._token(0, "tiny", z, parts.linear(z), torch.zeros(400, 1, 3))
        alone = model.spikes_shared.bias + model.linear_in(parts.linear(z))
        whole = model.eval()._token(0, "tiny", z, parts.linear(z), torch.zeros(400, 1, 3))
    heard_B = (token - alone).abs().amax(dim=(1, 2)) > 1e-6
    assert 0.4 < heard_B.float().mean() < 0.6
    torch.testing.assert_close(token[heard_B], whole[heard_B])


def test_a_session_the_bundle_knows_is_fitted_anew_and_read_out_as_before(session, tmp_path):
    config = config_of()
    bundle = train(config, [str(session)], tmp_path / "run")["bundle"]
    subject = prepare(session, config)
    model = build(config, [subject])
    known = begin_at_bundle(model, bundle, config)
    model.parts("tiny").linear.weight_UF.zero_()
    theirs = build_model(bundle, load_spec(bundle)).parts("tiny").linear.state_dict()
    for of in model.parts("tiny").linear.out.state_dict(), theirs:
        for name in of:
            if name.endswith("bias"):
                of[name] += 0.25  # as if it had been learned
    fit_linear(model, [subject], known)
    for name, tensor in model.parts("tiny").linear.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0)


def test_the_trunk_finds_what_is_said_by_name(session, tmp_path):
    config = config_of()
    bundle = train(config, [str(session)], tmp_path / "run")["bundle"]
    only = of_behaviours(config, "choice")
    model = build(only, [prepare(session, only)])
    begin_at_bundle(model, bundle, only)
    known = build_model(bundle, load_spec(bundle))
    at = where_said(known.behaviours)["choice"]
    assert torch.equal(model.linear_in.weight, known.linear_in.weight[:, at])


def test_a_behaviour_that_a_known_session_had_not_begins_at_its_regression(session, tmp_path):
    config = config_of()
    bundle = train(of_behaviours(config, "speed"), [str(session)], tmp_path / "run")["bundle"]
    subject = prepare(session, config)
    model = build(config, [subject])
    fit_linear(model, [subject], begin_at_bundle(model, bundle, config))
    theirs = build_model(bundle, load_spec(bundle)).parts("tiny").linear.out["speed"].state_dict()
    expected = {f"speed.{key}": tensor for key, tensor in theirs.items()}
    fitted = subject.hear().outs
    expected |= {key: fitted[key] for key in ("choice.weight", "choice.bias")}
    assert fitted["choice.weight"].any()
    for key, tensor in model.parts("tiny").linear.out.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_a_behaviour_that_the_bundle_does_not_know_takes_nothing_of_another(session, tmp_path):
    config = config_of()
    bundle = train(of_behaviours(config, "speed"), [str(session)], tmp_path / "run")["bundle"]
    fast = {"fast": config.behaviour["speed"]}  # as wide as the one that is left out
    other = msgspec.structs.replace(config, behaviour=fast)
    subject = prepare(session, other)
    model = build(other, [subject])
    fresh = copy.deepcopy(model)
    begin_at_bundle(model, bundle, other)
    assert torch.equal(model.linear_in.weight, fresh.linear_in.weight)
    assert not torch.equal(model.spikes_shared.weight, fresh.spikes_shared.weight)


def test_what_cannot_be_fitted_says_nothing(session):
    config = config_of(data={"train_minutes": 0.004})  # a quarter of a second
    subject = prepare(session, config)
    model = build(config, [subject])
    fit_linear(model, [subject])
    assert not model.parts("tiny").linear.weight_UF.any()


def test_of_what_has_one_value_in_training_nothing_is_said(session):
    config = config_of()
    subject = prepare(session, config)
    subject.binned.values_TM[subject.binned.of_split("train"), 2] = 1.0
    model = build(config, [subject])
    fit_linear(model, [subject])
    decoder = model.parts("tiny").linear
    assert decoder.weight_UF[0].any()
    assert not decoder.weight_UF[1:].any()
    assert not any(tensor.any() for tensor in decoder.out["choice"].state_dict().values())
    assert decoder.out["speed"].weight.any()


def test_late_in_a_trial_and_in_each_class_bins_count_as_written(session, begun, monkeypatch):
    _, model, subject = begun
    binned, told = subject.binned, []
    real = linear.ridge

    def noted(root_SF, target_SR, piece_S, class_S, late_S):
        told.append((class_S, late_S))
        return real(root_SF, target_SR, piece_S, class_S, late_S)

    monkeypatch.setattr(linear, "ridge", noted)
    linear.fit(binned, model.behaviours, subject.scales, model.parts("tiny").spikes_in)
    (speed_S, even_S), (choice_S, late_S) = told
    assert not speed_S.any()
    assert (even_S == 1).all()
    bins_S = np.flatnonzero(binned.of_split("train") & binned.scored_TM[:, 2])
    np.testing.assert_array_equal(choice_S, binned.values_TM[bins_S, 2])
    for trial in np.unique(binned.trial_T[bins_S]):
        mine = late_S[binned.trial_T[bins_S] == trial]
        expected = [((n + 1) / len(mine)) ** 2 for n in range(len(mine))]
        np.testing.assert_allclose(mine, expected)


def test_a_count_begins_at_its_mean_rate():
    licks = Behaviour(name="licks", kind="poisson")
    rng = np.random.default_rng(0)
    count_S = rng.poisson(0.3, 4000).astype(np.float32)
    out = LinearDecoder(4, (licks,)).out["licks"]
    linear.begin_out(out, 1e-3 * rng.normal(size=(4000, 1)), count_S, licks, Scale())
    assert out.bias.item() == pytest.approx(np.log(count_S.mean()), abs=0.01)


def test_what_was_fitted_is_kept_and_fitted_anew_when_it_must_be(session, tmp_path, monkeypatch):
    config, fitted = config_of(), []

    def counting(*arguments):
        fitted.append(1)
        return linear.fit(*arguments)

    monkeypatch.setattr(beginning, "fit", counting)

    def begin(config):
        torch.manual_seed(0)
        subject = kept(session, config, tmp_path / "cache")
        model = build(config, [subject])
        fit_linear(model, [subject])
        return subject, model

    subject, model = begin(config)
    again, same = begin(config)
    assert len(fitted) == 1
    fresh = prepare(session, config)
    torch.manual_seed(0)
    in_memory = build(config, [fresh])
    fit_linear(in_memory, [fresh])
    for other in (same, in_memory):
        for name, tensor in model.parts("tiny").state_dict().items():
            assert torch.equal(tensor, other.parts("tiny").state_dict()[name]), name
    for one in (again, fresh):
        assert one.hear().weight_XUF.equal(subject.hear().weight_XUF)
        np.testing.assert_array_equal(one.hear().fit_T, subject.hear().fit_T)
    fitted.clear()
    begin(tiny_config(model={**LINEAR, "history": [1, 8]}))  # other features
    begin(config_of(data={"train_minutes": 2.0}))  # other bins
    subject = kept(session, config, tmp_path / "cache")
    subject.scales[0] = msgspec.structs.replace(subject.scales[0], high=99.0)  # those of a bundle
    fit_linear(model, [subject])
    model.parts("tiny").spikes_in.sd_KN += 0.1
    fit_linear(model, [subject])
    monkeypatch.setattr(cache, "METHOD", -1)  # by other rules
    begin(config)
    assert len(fitted) == 5


def test_a_network_must_be_shown_to_decode_better_than_regression(begun):
    config, model, subject = begun

    def validated():
        return validate(model, [subject], config, "val", "cpu")

    here = Processes(torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    regression = regressions_validated(model, [subject], here, validated)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    both = {"tiny": ["speed", "choice"]}
    now = validated()
    assert left_to_regression(now, regression, [subject], here) == both  # it is regression
    fits = subject.hear()
    outs = {key: -tensor for key, tensor in fits.outs.items()}  # what was likely is unlikely
    worse = dataclasses.replace(subject, hear=lambda: dataclasses.replace(fits, outs=outs))
    spoilt = regressions_validated(model, [worse], here, validated)
    assert left_to_regression(now, spoilt, [subject], here) == {"tiny": []}
    assert left_to_regression(spoilt, regression, [subject], here) == both
    kept = as_kept(spoilt, regression, {"tiny": ["speed"]})["tiny"]
    assert kept["speed"] == regression.scores["tiny"]["speed"]
    assert kept["choice"] == spoilt.scores["tiny"]["choice"]


def test_several_sessions_are_decided_on_together():
    def val(**scores):
        return Validation({name: {"speed": s, "choice": c} for name, (s, c) in scores.items()}, {})

    here = Processes(torch.device("cpu"))
    alone = val(a=(0.3, 0.1), b=(0.3, 0.2))
    assert left_to_regression(val(a=(0.2, 0.0), b=(0.5, 0.2)), alone, [], here) == {
        "a": ["choice"],  # worse than its own in a as well, but better in the mean
        "b": ["choice"],
    }
    assert left_to_regression(val(a=(0.3, 0.1), b=(0.3, 0.2)), alone, [], here) == {
        "a": [],
        "b": [],
    }
    # One that hardly moves in validation does not decide for all.
    alone, now = (val(**{s: (v, 0.1) for s, v in of.items()}) for of in STILL)
    assert left_to_regression(now, alone, [], here) == {"a": [], "b": [], "c": []}


STILL = {"a": 0.1, "b": 0.2, "c": -100.0}, {"a": 0.4, "b": 0.5, "c": -110.0}


def test_what_trials_and_windows_lose_adds_up_to_the_scores(begun):
    config, model, subject = begun
    val = validate(model, [subject], config, "val", "cpu")
    scores, losses = val.scores["tiny"], val.losses["tiny"]
    scored = subject.binned.scored_TM & subject.binned.of_split("val")[:, None]
    share = losses["speed"].sum() / scored[:, 1].sum()
    assert share == pytest.approx(1 - scores["speed"], rel=1e-5)
    trials = np.unique(subject.binned.trial_T[scored[:, 2]])
    assert len(losses["choice"]) == len(trials)
    assert losses["choice"].mean() / np.log(2) == pytest.approx(1 - scores["choice"], rel=1e-5)


@pytest.mark.parametrize(
    ("gain_X", "shown"),
    [
        ([], False),
        ([0.3], False),  # one trial shows nothing
        ([0.0, 0.0], False),
        ([0.1, 0.1, 0.11], True),
        ([0.3, 0.1, 0.2, 0.2], True),
        ([0.3, -0.1, 0.2, -0.1], False),  # better in the mean, as chance has it
        ([-0.3, -0.1, -0.2, -0.2], False),
    ],
)
def test_gains_are_told_from_chance(gain_X, shown):
    assert alone._shown(np.array(gain_X)) is shown


NOISE_X = 0.01 * np.array([1.0, -1.0, 2.0, -2.0, 1.0, -1.0])


def test_what_is_kept_is_the_step_that_is_best_with_regression_where_that_is_better(
    session, tmp_path, monkeypatch
):
    speed, choice = [0.1, 0.1, 0.5, 0.3, 0.5], [0.2, 0.2, 0.1, 0.9, 0.1]
    noise = [0, 1, 1, 100, 1]  # that choice is .9 after 12 steps is chance
    calls = iter(range(9))  # regression; at the beginning, after 6 and 12 steps; what is kept

    def scripted(model, subjects, *rest):
        n = next(calls)
        losses = {"speed": 1 - speed[n] + NOISE_X[::-1], "choice": 1 - choice[n] + NOISE_X}
        losses["speed"] += n * np.roll(NOISE_X, 1)
        losses["choice"] = losses["choice"] + noise[n] * NOISE_X
        return Validation({"tiny": {"speed": speed[n], "choice": choice[n]}}, {"tiny": losses})

    monkeypatch.setattr("offline.train.validate_all", scripted)
    monkeypatch.setattr("offline.train.calibrate", lambda *rest: {})
    summary = train(config_of(), [str(session)], tmp_path / "run")
    assert summary["best_step"] == 6  # of speed .5 and choice, by regression, .2
    assert summary["best_score"] == pytest.approx(0.35)
    assert summary["by_regression"] == {"tiny": ["choice"]}
    assert summary["val"] == {"tiny": {"speed": 0.5, "choice": 0.2}}
    parts = build_model(summary["bundle"], load_spec(summary["bundle"])).parts("tiny")
    assert not any(parameter.any() for parameter in parts.behaviour_out["choice"].parameters())
    assert any(parameter.any() for parameter in parts.behaviour_out["speed"].parameters())
    subject = prepare(session, config_of())
    fresh = build(config_of(), [subject])
    fit_linear(fresh, [subject])
    for key, tensor in parts.linear.out["choice"].state_dict().items():
        torch.testing.assert_close(tensor, subject.hear().outs[f"choice.{key}"])
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with torch.no_grad(), regressions_alone(fresh, [subject]):
        fresh.parts("tiny").behaviour_out["speed"].linear.weight += 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


def test_resume_hears_what_it_heard(session, tmp_path, monkeypatch):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(config_of(), [str(session)], whole)
    with stopped_at_eight(monkeypatch):
        train(config_of(), [str(session)], parted)
    train(config_of(), [str(session)], parted, resume=True)
    weights = [load_spec(run / "bundle").sha256 for run in (whole, parted)]
    assert weights[0] == weights[1]


def test_the_real_wheel_is_decoded_from_the_first_step_as_by_ridge(data_dir, tmp_path):
    changes = ["training.steps=1", "training.learning_rate=1e-9", "data.refit=false"]
    config = load_config(config_path("ibl-probe.toml"), TrainConfig, changes)
    summary = train(config, [str(data_dir / "ibl_probe_30_trials.h5")], tmp_path / "run")
    (val,) = summary["val"].values()
    assert val["wheel_speed"] > 0.25  # fold 0, validation; a network from nothing: -3.5
