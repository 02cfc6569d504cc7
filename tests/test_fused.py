"""The fused step: equal to the network it was made from, for ever, and without allocating."""

import tracemalloc

import numpy as np
import pytest
import torch
from numba.core.runtime import _nrt_python, rtsys

from rt_neds.bench_input import SIZES as SERVED
from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import NEDS, SCHEMES, SPIKES
from rt_neds.model.readout import Behaviour
from rt_neds.model.rounding import round_weights, rounded_weights
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.fused import FusedStep
from rt_neds.stream.fused_between import gelu
from rt_neds.stream.fused_kernel import fused_step
from rt_neds.stream.fused_products import DOTS

BEHAVIOURS = (
    Behaviour(name="speed", kind="continuous"),
    Behaviour(name="choice", kind="categorical", classes=("left", "right", "none")),
    Behaviour(name="licks", kind="poisson"),
    Behaviour(name="position", kind="continuous"),
)
NAMES = [b.name for b in BEHAVIOURS]
SCHEME = torch.tensor([SCHEMES.index("decoding")])
ATOL = 1e-5

SIZES = [
    # dim, heads, layers, context, history, widen, units, memory, linear decoder
    (32, 2, 3, 6, (1, 3), 2, 12, 0, True),
    (24, 3, 2, 33, (2,), 2, 7, 9, False),  # heads and widths that fill no panel
    (40, 1, 2, 31, (1, 5, 25), 3, 30, 0, True),  # the ring and its sink fill one panel exactly
    (6, 3, 1, 1, (4, 1), 1, 3, 5, True),  # a bin that sees only itself; one layer is first and last
    (32, 2, 2, 4, (1, 3), 2, 12, 40, False),  # many a hole is longer than the context
    (128, 4, 2, 100, (1, 5, 25), 2, 50, 500, True),
]


def random_model(size=SIZES[0], seed: int = 0) -> NEDS:
    """Every parameter drawn, so that nothing is hidden behind a zero."""
    dim, heads, layers, context, history, widen, units, memory, linear = size
    torch.manual_seed(seed)
    config = ModelConfig(
        dim=dim,
        heads=heads,
        layers=layers,
        context=context,
        history=history,
        widen=widen,
        memory=memory,
        linear=linear,
    )
    model = NEDS(config, BEHAVIOURS, {"other": 4, "a": units}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for parts in model.sessions:
            parts.spikes_in.mean_KN.uniform_(0, 1)
            parts.spikes_in.sd_KN.uniform_(0.5, 2)
            if linear:
                parts.linear.weight_UF.normal_(std=0.1)
                parts.linear.bias_U.normal_()
    return model


def random_stream(model: NEDS, bins: int, seed: int = 0, shown: float = 0.8, session: str = "a"):
    rng = np.random.default_rng(seed)
    units = model.parts(session).units
    counts_TN = rng.poisson(rng.uniform(0, 2, units), (bins, units)).astype(np.float32)
    observed_T = rng.random(bins) < shown
    return counts_TN, observed_T, rng.random(units) < 0.3


def shown_to_torch(model: NEDS, counts_TN, observed_T):
    """Counts, values and what is observed, as the reference takes them."""
    observed_1TM = torch.zeros(1, len(counts_TN), len(model.modalities), dtype=torch.bool)
    observed_1TM[0, :, 0] = torch.from_numpy(observed_T)
    values_1TM = torch.zeros(observed_1TM.shape, dtype=model.hidden_D.dtype)
    return torch.from_numpy(counts_TN)[None], values_1TM, observed_1TM


def offline(model: NEDS, counts_TN, observed_T, wanted, missing_N=None):
    missing = None if missing_N is None else torch.from_numpy(missing_N)[None, None]
    shown = shown_to_torch(model, counts_TN, observed_T)
    with torch.no_grad():
        outputs = model("a", *shown, SCHEME, missing_BTN=missing, wanted=wanted)
    return torch.cat([outputs[name][0] for name in wanted], dim=1).numpy()


def streamed(step: FusedStep, counts_TN, observed_T):
    return np.stack([step.step(c, o).copy() for c, o in zip(counts_TN, observed_T, strict=True)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "wanted", [NAMES, ["licks"], ["position", "speed"], ["choice"] * 7], ids=len
)
@pytest.mark.parametrize("some_missing", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
def test_equals_forward(size, wanted, some_missing, rounded):
    model = random_model(size, seed=len(wanted))
    model = round_weights(model) if rounded else model
    counts_TN, observed_T, missing_N = random_stream(model, 120)
    missing_N = missing_N if some_missing else None
    step = FusedStep(model, "a", wanted, missing_N)
    expected_TO = offline(model, counts_TN, observed_T, wanted, missing_N)
    np.testing.assert_allclose(streamed(step, counts_TN, observed_T), expected_TO, atol=ATOL)


@pytest.mark.parametrize("first_bin", [0, 7, 123_456_789])
@pytest.mark.parametrize("shown", [0.0, 0.5, 1.0])
def test_equals_step_by_step(first_bin, shown):
    model = random_model()
    counts_TN, observed_T, missing_N = random_stream(model, 60, shown=shown)
    step = FusedStep(model, "a", NAMES, missing_N)
    step.reset(first_bin)
    state = model.start("a", first_bin=first_bin)
    missing = torch.from_numpy(missing_N)[None, None]
    counts, values, observed = shown_to_torch(model, counts_TN, observed_T)
    for t in range(len(counts_TN)):
        cut = slice(t, t + 1)
        outputs = model.step(
            "a", state, counts[:, cut], values[:, cut], observed[:, cut], SCHEME,
            missing_BTN=missing, wanted=NAMES,
        )  # fmt: skip
        expected_O = torch.cat([outputs[name][0, 0] for name in NAMES]).numpy()
        np.testing.assert_allclose(step.step(counts_TN[t], observed_T[t]), expected_O, atol=ATOL)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wanted", [NAMES, ["licks"]], ids=len)
@pytest.mark.parametrize("shown", [0.2, 0.8])
@pytest.mark.parametrize("rounded", [False, True])
def test_bins_together_give_the_same_bits_as_one_by_one(size, wanted, shown, rounded):
    model = random_model(size)
    model = round_weights(model) if rounded else model
    counts_TN, observed_T, missing_N = random_stream(model, 150, shown=shown)
    step = FusedStep(model, "a", wanted, missing_N)
    for first_bin in (0, 987_654_321):
        step.reset(first_bin)
        expected_TO = streamed(step, counts_TN, observed_T)
        step.reset(first_bin)
        rng, t, got = np.random.default_rng(len(wanted)), 0, []
        while t < len(counts_TN):
            cut = slice(t, t + rng.integers(1, CHUNK + 1))
            got.append(step.steps(counts_TN[cut], observed_T[cut]).copy())
            t = cut.stop
        np.testing.assert_array_equal(np.concatenate(got), expected_TO)


def test_rounded_weights_are_read_in_one_byte():
    model = random_model((64, 2, 3, 10, (1, 3), 2, 5, 9, True))
    whole = FusedStep(model, "a", NAMES).nbytes
    rounded = list(rounded_weights(model, "a"))
    weights = sum(w.numel() for _, w in rounded)
    outputs = sum(len(w) for name, w in rounded if not name.startswith("sessions."))
    saved = whole - FusedStep(round_weights(model), "a", NAMES).nbytes
    # Each of the trunk's has a scale, and what its sums begin at, where they are of bytes.
    assert saved == 3 * weights - 4 * outputs * (2 if DOTS else 1)


@pytest.mark.parametrize("name", ["layers.1.narrow", "sessions.1.spikes_in.linear"])
def test_one_weight_that_does_not_fit_and_all_are_kept_whole(name):
    model = random_model((64, 2, 3, 10, (1, 3), 2, 5, 9, True))
    whole = FusedStep(model, "a", NAMES).nbytes
    weight = round_weights(model).get_submodule(name).weight
    assert FusedStep(model, "a", NAMES).nbytes < whole
    with torch.no_grad():
        weight[3, 5] = 1 + 2**-12
    assert FusedStep(model, "a", NAMES).nbytes == whole
    counts_TN, observed_T, _ = random_stream(model, 30)
    got_TO = streamed(FusedStep(model, "a", NAMES), counts_TN, observed_T)
    np.testing.assert_allclose(got_TO, offline(model, counts_TN, observed_T, NAMES), atol=ATOL)


def test_how_another_sessions_weights_lie_changes_nothing():
    model = round_weights(random_model())
    nbytes = FusedStep(model, "a", NAMES).nbytes
    with torch.no_grad():
        model.parts("other").spikes_in.linear.weight[3, 5] = 1 + 2**-12
    assert FusedStep(model, "a", NAMES).nbytes == nbytes


def test_forgets_when_told():
    model = random_model()
    counts_TN, observed_T, _ = random_stream(model, 50)
    step = FusedStep(model, "a", NAMES)
    first_TO = streamed(step, counts_TN, observed_T)
    step.reset()
    np.testing.assert_array_equal(streamed(step, counts_TN, observed_T), first_TO)
    step.reset(first_bin=987_654_321)  # only distances between bins matter
    np.testing.assert_allclose(streamed(step, counts_TN, observed_T), first_TO, atol=ATOL)


def test_two_steps_do_not_disturb_each_other():
    one, two = random_model(seed=1), random_model(seed=2)
    counts_TN, observed_T, _ = random_stream(one, 20)
    alone_TO = streamed(FusedStep(one, "a", NAMES), counts_TN, observed_T)
    a, b = FusedStep(one, "a", NAMES), FusedStep(two, "a", ["licks"])
    for t in range(len(counts_TN)):
        np.testing.assert_array_equal(a.step(counts_TN[t], observed_T[t]), alone_TO[t])
        b.step(counts_TN[t], observed_T[t])


def test_what_is_not_observed_is_not_read():
    model = random_model()
    counts_TN, observed_T, _ = random_stream(model, 40)
    poked_TN = np.where(observed_T[:, None], counts_TN, np.float32(np.nan))
    step = FusedStep(model, "a", NAMES)
    expected_TO = streamed(step, counts_TN, observed_T)
    step.reset()
    np.testing.assert_array_equal(streamed(step, poked_TN, observed_T), expected_TO)


def test_does_not_drift():
    model = random_model()
    counts_TN, observed_T, _ = random_stream(model, 20_000)
    step = FusedStep(model, "a", NAMES)
    tail = model.config.receptive_field + 50
    got_TO = streamed(step, counts_TN, observed_T)[-50:]
    expected_TO = offline(model, counts_TN[-tail:], observed_T[-tail:], NAMES)[-50:]
    np.testing.assert_allclose(got_TO, expected_TO, atol=ATOL)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("size", list(SERVED))
def test_a_million_bins_of_a_served_size_stay_equal_to_forward(size):
    bins = 1_000_000
    torch.manual_seed(0)
    model = round_weights(NEDS(ModelConfig(**SERVED[size]), BEHAVIOURS, {"a": 400}).eval())
    rng = np.random.default_rng(0)
    tail, block = model.config.receptive_field + 50, 10_000
    step, worst = FusedStep(model, "a", NAMES), 0.0
    for start in range(0, bins, block):
        counts_TN = rng.poisson(0.2, (block, 400)).astype(np.float32)
        got_TO = streamed(step, counts_TN, np.ones(block, bool))[-50:]
        if (start + block) % (bins // 10) == 0:
            expected_TO = offline(model, counts_TN[-tail:], np.ones(tail, bool), NAMES)[-50:]
            worst = max(worst, float(np.abs(got_TO - expected_TO).max()))
    assert worst < 1e-4


def test_extreme_activations_stay_exact():
    # Large weights drive the softmax to one key and the activation to both of its ends.
    model = random_model()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.qkv.weight.mul_(8)
            layer.widen.weight.mul_(8)
    counts_TN, observed_T, _ = random_stream(model, 60)
    expected_TO = offline(model.double(), counts_TN.astype(np.float64), observed_T, NAMES)
    got_TO = streamed(FusedStep(model.float(), "a", NAMES), counts_TN, observed_T)
    error = np.abs(got_TO - expected_TO).max()
    reference = np.abs(offline(model, counts_TN, observed_T, NAMES) - expected_TO).max()
    assert error < max(10 * reference, ATOL)


def test_gelu_far_out_and_of_what_is_no_number():
    x = np.array([[-1e30, -40, -1, 0, 2, 40, 1e30, np.nan]], np.float32)
    exact = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    gelu(x, 1, x.shape[1])
    np.testing.assert_allclose(x, exact, rtol=1e-6, atol=1e-7)  # a NaN equals a NaN here


def test_allocates_nothing():
    model = random_model()
    counts_TN, observed_T, _ = random_stream(model, 10)
    step = FusedStep(model, "a", NAMES)
    streamed(step, counts_TN, observed_T)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for t in range(1000):
            step.step(counts_TN[t % 10], True)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1024, "something is kept from each step"
    assert peak - before < 4096, "an array is made in each step"


def test_allocates_nothing_inside_the_kernel():
    step = FusedStep(random_model(), "a", NAMES)
    counts_N = np.ones(12, np.float32)
    _nrt_python.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        for _ in range(100):
            step.step(counts_N, True)
        after = rtsys.get_allocation_stats()
    finally:
        _nrt_python.memsys_disable_stats()
    assert after.alloc == before.alloc
    assert after.free == before.free


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rounded", [False, True])
def test_streams_together_give_the_same_bits_as_alone(size, rounded):
    model = random_model(size)
    model = round_weights(model) if rounded else model
    asked = {"a": NAMES, "other": ["licks", "choice"]}  # of 12 units, say, and of 4
    streams, alone = {}, {}
    for n, (session, wanted) in enumerate([*asked.items(), ("a", ["speed"])]):
        counts_TN, observed_T, missing_N = random_stream(model, 90, seed=n, session=session)
        missing_N = missing_N if n == 1 else None
        step = FusedStep(model, session, wanted, missing_N)
        step.reset(1000 * n)
        alone[n] = streamed(step, counts_TN, observed_T)
        next_TN = step.next_TN()
        step.reset(1000 * n)
        streams[n] = step, counts_TN, observed_T, next_TN.copy()
    steps = [step for step, *_ in streams.values()]
    assert all(step.share(steps[0]) for step in steps)
    rng, at, got = np.random.default_rng(0), dict.fromkeys(streams, 0), {n: [] for n in streams}
    while any(at[n] < 90 for n in streams):
        cuts, room = {}, CHUNK
        for n in rng.permutation(list(streams)):
            bins = min(int(rng.integers(0, 4)), 90 - at[n], room)
            if bins:
                cuts[n], room = slice(at[n], at[n] + bins), room - bins
                at[n] += bins
        if not cuts:
            continue
        raws = FusedStep.together(
            [streams[n][0] for n in cuts],
            [streams[n][1][cut] for n, cut in cuts.items()],
            [streams[n][2][cut] for n, cut in cuts.items()],
            [()] * len(cuts),
        )
        for n, raw_TO in zip(cuts, raws, strict=True):
            got[n].append(raw_TO.copy())
    for n, (step, _, _, next_TN) in streams.items():
        np.testing.assert_array_equal(np.concatenate(got[n]), alone[n])
        np.testing.assert_allclose(step.next_TN()[-1], next_TN[-1], atol=ATOL)


def test_only_the_same_trunk_is_shared():
    model, other = random_model(), random_model(seed=1)
    step = FusedStep(model, "a", NAMES)
    assert FusedStep(model, "other", ["licks"]).share(step)
    assert not FusedStep(other, "a", NAMES).share(step)
    assert not FusedStep(round_weights(random_model()), "a", NAMES).share(step)


def test_is_compiled_once_whatever_it_is_given():
    model = random_model()
    step = FusedStep(model, "a", NAMES)
    counts_N = random_stream(model, 1)[0][0]
    expected_O = step.step(counts_N, True).copy()
    read_only_N, strided_N = counts_N.copy(), np.repeat(counts_N, 2)[::2]
    read_only_N.flags.writeable = False
    for counts, yes in [
        (read_only_N, np.True_),
        (strided_N, 1),
        (counts_N.astype(np.int64), True),
    ]:
        step.reset(np.int64(0))
        np.testing.assert_array_equal(step.step(counts, yes), expected_O)
    other = round_weights(random_model(SIZES[3]))
    FusedStep(other, "a", ["choice"]).step(np.zeros(3, np.float32), True)
    assert len(fused_step.signatures) == 1


def test_refuses_what_it_cannot_be():
    model = random_model()
    for wanted in ([], [SPIKES], ["speed", SPIKES]):
        with pytest.raises(ValueError, match="behaviour"):
            FusedStep(model, "a", wanted)
    with pytest.raises(ValueError):
        FusedStep(model, "a", ["unheard of"])
    with pytest.raises(ValueError, match="counts for 12 units"):
        FusedStep(model, "a", NAMES).step(np.zeros(5, np.float32), True)
    full = NEDS(ModelConfig(dim=16, heads=2, attention="full"), BEHAVIOURS, {"a": 5})
    with pytest.raises(ValueError, match="causal"):
        FusedStep(full, "a", NAMES)
