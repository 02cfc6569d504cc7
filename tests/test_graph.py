"""The step that a GPU replays: equal to the network, on any device, captured or not."""

import ctypes
import functools
import gc
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from rt_neds.errors import BundleError
from rt_neds.model.neds import SPIKES
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.cuda_driver import compile_cuda
from rt_neds.stream.decoder import make_step
from rt_neds.stream.fused import FusedStep
from rt_neds.stream.graph import GraphStep
from rt_neds.stream.graph_kernel import source_of
from tests.test_fused import (
    ATOL,
    NAMES,
    SIZES,
    offline,
    random_model,
    random_stream,
    streamed,
)

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
threads = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
TEAM, WARPS = 2, 2
ON_CPU = Path(__file__).with_name("cuda_on_cpu.hpp")
ON = {  # device, captured, one launch
    "cpu": pytest.param(("cpu", False, False)),
    "cpu, one launch": pytest.param(("cpu", False, True), marks=threads),
    "cuda": pytest.param(("cuda", False, False), marks=gpu),
    "cuda, captured": pytest.param(("cuda", True, False), marks=gpu),
    "cuda, one launch": pytest.param(("cuda", False, True), marks=gpu),
    "cuda, one launch, captured": pytest.param(("cuda", True, True), marks=gpu),
}


class Threads:
    """The kernel of a GPU, compiled for this processor: threads are its warps, of one lane each."""

    built: ClassVar[dict[str, ctypes.CDLL]] = {}

    def __init__(self, source: str, features: int, folder: Path) -> None:
        if source not in self.built:
            kernel, library = folder / "kernel.cu", folder / f"kernel{len(self.built)}.so"
            kernel.write_text(source)
            subprocess.run(
                ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", "-w", "-x", "c++",
                 f'-DKERNEL="{kernel}"', str(ON_CPU), "-o", str(library)],
                check=True,
            )  # fmt: skip
            self.built[source] = ctypes.CDLL(str(library))
        self._library, self._features = self.built[source], features

    def launch(self, grid, *addresses):
        self._library.launch(*grid, self._features, *map(ctypes.c_void_p, addresses))


@pytest.fixture(params=ON.values(), ids=ON.keys())
def make(request, monkeypatch, tmp_path):
    device, captured, one_launch = request.param
    if device == "cpu":
        monkeypatch.setattr(
            "rt_neds.stream.graph_kernel.find_launcher",
            lambda model, units, device: (
                TEAM,
                Threads(
                    source_of(model, TEAM, warps=WARPS, lanes=1),
                    len(model.config.history) * max(units),
                    tmp_path,
                ),
            ),
        )

    def make(model, wanted=NAMES, missing_N=None, session="a"):
        step = GraphStep(
            model, session, wanted, missing_N, device, captured=captured, one_launch=one_launch
        )
        assert not step.many_because
        return step

    make.one_launch = one_launch
    return make


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wanted", [NAMES, ["licks"], ["position", "speed"]], ids=len)
@pytest.mark.parametrize("some_missing", [False, True])
def test_equals_forward_over_some_turns_of_the_ring(make, size, wanted, some_missing):
    model = random_model(size, seed=len(wanted))
    bins = min(250, 3 * model.config.context + 40)
    counts_TN, observed_T, missing_N = random_stream(model, bins)
    missing_N = missing_N if some_missing else None
    expected_TO = offline(model, counts_TN, observed_T, wanted, missing_N)
    got_TO = streamed(make(model, wanted, missing_N), counts_TN, observed_T)
    np.testing.assert_allclose(got_TO, expected_TO, atol=ATOL)


def test_equals_the_cpu_step_far_from_bin_zero_and_after_resets(make):
    model = random_model()
    counts_TN, observed_T, _ = random_stream(model, 40)
    graph, fused = make(model), FusedStep(model, "a", NAMES)
    for first_bin in (0, 7, 123_456_789, 2**40 + 3):
        graph.reset(first_bin)
        fused.reset(first_bin)
        np.testing.assert_allclose(
            streamed(graph, counts_TN, observed_T),
            streamed(fused, counts_TN, observed_T),
            atol=ATOL,
        )


def test_a_reset_forgets_everything(make):
    model = random_model()
    counts_TN, observed_T, _ = random_stream(model, 50)
    step = make(model)
    first_TO = streamed(step, counts_TN, observed_T)
    step.reset()
    np.testing.assert_array_equal(streamed(step, counts_TN, observed_T), first_TO)


def test_a_queue_of_bins_gives_the_same(make):
    model = random_model()
    counts_TN, observed_T, _ = random_stream(model, CHUNK)
    step = make(model)
    one_by_one_TO = streamed(step, counts_TN, observed_T)
    step.reset()
    np.testing.assert_array_equal(step.steps(counts_TN, observed_T), one_by_one_TO)


def test_what_is_not_observed_is_not_read(make):
    model = random_model()
    counts_TN, observed_T, _ = random_stream(model, 40)
    poked_TN = np.where(observed_T[:, None], counts_TN, np.float32(np.nan))
    step = make(model)
    expected_TO = streamed(step, counts_TN, observed_T)
    step.reset()
    np.testing.assert_array_equal(streamed(step, poked_TN, observed_T), expected_TO)


def test_the_model_it_was_made_from_stays_where_it_is_and_can_change(make):
    model = random_model()
    counts_TN, observed_T, _ = random_stream(model, 20)
    step = make(model)
    expected_TO = streamed(step, counts_TN, observed_T)
    assert model.hidden_D.device.type == "cpu"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    step.reset()
    np.testing.assert_array_equal(streamed(step, counts_TN, observed_T), expected_TO)


def test_other_shapes_are_refused_by_name(make):
    model = random_model()
    with pytest.raises(BundleError, match=r"counts_N is \(5,\) and \(12,\)"):
        make(model).step(np.zeros(5, np.float32), True)
    with pytest.raises(BundleError, match=r"missing_N is \(4,\) and \(12,\)"):
        make(model, missing_N=np.zeros(4, bool))
    for wanted in ([], [SPIKES]):
        with pytest.raises(ValueError, match="behaviour"):
            make(model, wanted)


def several(make, model):
    """Three streams of one network: of other units, other behaviours, one begun far from bin 0."""
    streams = {
        "a": make(model),
        "other": make(model, ["licks"], session="other"),
        "far": make(model, ["choice", "speed"]),
    }
    streams["far"].reset(987_654_321)
    stream_of = {"other": "other"}
    return streams, {
        name: random_stream(model, 60, seed=n, session=stream_of.get(name, "a"))[:2]
        for n, name in enumerate(streams)
    }


@pytest.mark.parametrize("size", SIZES)
def test_streams_together_give_what_each_gives_alone(make, size):
    model = random_model(size)
    alone, inputs = several(make, model)
    expected = {name: streamed(alone[name], *inputs[name]) for name in alone}
    next_TN = {name: alone[name].next_TN().copy() for name in alone}
    steps, _ = several(make, model)
    first = {name: streamed(steps[name], *(x[:9] for x in inputs[name])) for name in steps}
    assert all(step.share(steps["a"]) for step in steps.values())
    # Sharing has lost nothing of what each knew; from here on whoever has bins goes along.
    rng, at, got = np.random.default_rng(0), dict.fromkeys(steps, 9), {n: [] for n in steps}
    while any(at[name] < 60 for name in steps):
        cuts = {
            name: slice(at[name], min(60, at[name] + int(rng.integers(0, 4)))) for name in steps
        }
        cuts = {name: cut for name, cut in cuts.items() if cut.stop > cut.start}
        if not cuts:
            continue
        raws = GraphStep.together(
            [steps[name] for name in cuts],
            [inputs[name][0][cut] for name, cut in cuts.items()],
            [inputs[name][1][cut] for name, cut in cuts.items()],
            [()] * len(cuts),
        )
        for (name, cut), raw_TO in zip(cuts.items(), raws, strict=True):
            got[name].append(raw_TO.copy())
            at[name] = cut.stop
    for name in steps:
        got_TO = np.concatenate([first[name], *got[name]])
        if make.one_launch:
            np.testing.assert_array_equal(got_TO, expected[name])
        np.testing.assert_allclose(got_TO, expected[name], atol=ATOL)
        np.testing.assert_allclose(steps[name].next_TN()[-1], next_TN[name][-1], atol=ATOL)


def test_only_streams_of_one_trunk_are_shared_and_who_is_gone_is_left_out(make):
    model, other = random_model(), random_model(seed=1)
    one, two, three = make(model), make(model), make(model)
    assert not make(other).share(one)
    assert two.share(one)
    assert two.share(one)  # and they stay
    del two
    gc.collect()
    assert three.share(one)
    assert len(one._group.streams.streams) == 2
    counts_TN, observed_T, _ = random_stream(model, 20)
    expected_TO = streamed(make(model), counts_TN, observed_T)
    np.testing.assert_allclose(streamed(three, counts_TN, observed_T), expected_TO, atol=ATOL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_cpu_decodes_and_one_line_says_so(tiny):
    from rt_neds.bundle import build_model, load_spec

    spec = load_spec(tiny[1] / "bundle")
    model, lines = build_model(tiny[1] / "bundle", spec), []
    step = make_step(model, spec, spec.session(), np.zeros(6, bool), "cuda", lines.append)
    assert isinstance(step, FusedStep)
    assert len(lines) == 1
    assert "decoding on the CPU" in lines[0]


def test_a_gpu_that_does_not_let_itself_be_captured_is_told_of(tiny, monkeypatch):
    from rt_neds.bundle import build_model, load_spec

    def fails(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore words")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("rt_neds.stream.decoder.GraphStep", fails)
    spec = load_spec(tiny[1] / "bundle")
    model, lines = build_model(tiny[1] / "bundle", spec), []
    step = make_step(model, spec, spec.session(), np.zeros(6, bool), "cuda", lines.append)
    assert isinstance(step, FusedStep)
    assert len(lines) == 1
    assert "not permitted when stream is capturing; decoding on the CPU" in lines[0]


def test_a_gpu_that_cannot_do_it_in_one_launch_does_it_in_many(tiny, monkeypatch):
    from rt_neds.bundle import build_model, load_spec

    def fails(*args):
        raise RuntimeError("no libnvrtc.so.13\nmore words")

    monkeypatch.setattr("rt_neds.stream.graph_kernel.find_launcher", fails)
    on_cpu = functools.partial(GraphStep, captured=False, one_launch=True)
    monkeypatch.setattr("rt_neds.stream.decoder.GraphStep", lambda *a, **k: on_cpu(*a[:4], "cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec, lines = load_spec(tiny[1] / "bundle"), []
    model = build_model(tiny[1] / "bundle", spec)
    session = spec.session()
    step = make_step(model, spec, session, np.zeros(6, bool), "cuda", lines.append)
    assert lines == ["no libnvrtc.so.13; a step is many launches, and takes several times longer"]
    counts_TN, observed_T, _ = random_stream(model, 20, session=session.id)
    expected = FusedStep(model, session.id, [b.name for b in spec.behaviours])
    np.testing.assert_allclose(
        streamed(step, counts_TN, observed_T), streamed(expected, counts_TN, observed_T), atol=ATOL
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="NVRTC is there")
def test_what_does_not_come_with_pytorch_is_named():
    with pytest.raises(RuntimeError, match=r"no libnvrtc\.so\..*, which PyTorch for NVIDIA"):
        compile_cuda("", "sm_90")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_equals_uncaptured_and_memory_stays_flat():
    model = random_model(SIZES[-1])
    counts_TN, observed_T, _ = random_stream(model, 300)
    graph = GraphStep(model, "a", NAMES, None, "cuda")
    eager = GraphStep(model, "a", NAMES, None, "cuda", captured=False)
    np.testing.assert_allclose(
        streamed(graph, counts_TN, observed_T), streamed(eager, counts_TN, observed_T), atol=ATOL
    )
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for t in range(10_000):
        graph.step(counts_TN[t % 300], True)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
