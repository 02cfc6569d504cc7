"""Linear maps of the fused step, by themselves, and on a processor that has less than this one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rt_neds.stream.fused_arrays import LINE, _panels, round_up, zeros
from rt_neds.stream.fused_products import DOTS, cut_words, linear

WIDTHS = st.integers(1, 150)


def packed_map(rng, outputs, inputs):
    """Weights that are multiples of scales, the greatest of an output 127 times its own."""
    whole_EI = rng.integers(-127, 128, (outputs, inputs))
    whole_EI[np.arange(outputs), rng.integers(0, inputs, outputs)] = 127
    scale_E = rng.integers(1, 2**10, outputs) * 2.0**-14
    return whole_EI * scale_E[:, None], rng.standard_normal(outputs).astype(np.float32).astype(
        float
    )


def mapped(weight_EI, bias_E, x_TI):
    """By the kernel, as :class:`FusedStep` calls it."""
    weights = np.concatenate(list(_panels(True, (weight_EI, bias_E)))).astype(np.float32)
    outputs, (tokens, inputs) = round_up(len(bias_E)), x_TI.shape
    laid, y_TE = zeros(weights.size), np.zeros((tokens, outputs), np.float32)
    laid.view(np.int32)[:] = weights.view(np.int32)
    cut_TW = np.zeros((tokens, round_up(cut_words(inputs), LINE)), np.float32)
    end = linear(
        laid, np.int64(0), np.int64(1), outputs, inputs, tokens, x_TI, np.int64(0), y_TE, cut_TW
    )
    assert end == laid.size
    return y_TE[:, : len(bias_E)]


@settings(max_examples=60, deadline=None)
@given(
    outputs=WIDTHS,
    inputs=WIDTHS,
    tokens=st.integers(1, 8),
    size=st.integers(-60, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_exact_products_whatever_the_shapes_and_sizes(outputs, inputs, tokens, size, seed):
    rng = np.random.default_rng(seed)
    weight_EI, bias_E = packed_map(rng, outputs, inputs)
    # Numbers of one token of very different sizes: what counts is the greatest.
    x_TI = rng.standard_normal((tokens, inputs)) * 2.0 ** (size + rng.integers(-20, 3, inputs))
    x_TI = x_TI.astype(np.float32)
    bias_E = bias_E * 2.0**size
    exact_TE = bias_E + x_TI.astype(np.float64) @ weight_EI.T
    most_T1 = np.abs(x_TI).max(axis=1, keepdims=True).astype(np.float64)
    least_TE = np.abs(bias_E) + most_T1 * np.abs(weight_EI).sum(axis=1)
    error_TE = np.abs(mapped(weight_EI, bias_E, x_TI) - exact_TE)
    assert np.all(error_TE <= 2.0**-21 * least_TE)


def test_tokens_of_which_nothing_is_left_and_which_are_no_numbers():
    rng = np.random.default_rng(0)
    weight_EI, bias_E = packed_map(rng, 70, 33)
    x_TI = np.zeros((4, 33), np.float32)
    x_TI[1], x_TI[2], x_TI[3] = 1e-33, np.nan, 1.0
    got_TE = mapped(weight_EI, bias_E, x_TI)
    np.testing.assert_array_equal(got_TE[0], bias_E.astype(np.float32))
    np.testing.assert_allclose(got_TE[1], bias_E, rtol=1e-6)
    assert np.isnan(got_TE[2]).all()  # and nobody beside it
    np.testing.assert_allclose(got_TE[3], bias_E + weight_EI.sum(axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", [0, 5, 32])
def test_the_greatest_number_takes_no_more_bits_than_there_are(place):
    rng = np.random.default_rng(1)
    weight_EI, _ = packed_map(rng, 32, 33)
    for greatest in (1.0, np.nextafter(np.float32(2), np.float32(0)), 3.0, 1e30, 2.0**-99):
        for sign in (1, -1):
            x_1I = np.zeros((1, 33), np.float32)
            x_1I[0, place] = sign * greatest
            products_1E = x_1I.astype(np.float64) @ weight_EI.T
            got_1E = mapped(weight_EI, np.zeros(32), x_1I)
            np.testing.assert_allclose(got_1E, products_1E, rtol=1e-6)


LESS = """
import sys
import llvmlite.binding as llvm

all_there_is = llvm.get_host_cpu_features

def less():
    there = all_there_is()
    for name in there:
        there[name] = there[name] and not name.startswith(("avx512", "avx10", "avxvnni"))
    return there

llvm.get_host_cpu_features = less
import pytest
from rt_neds.stream import fused_products
assert fused_products.LANES == 8 and not fused_products.DOTS
only, *files = sys.argv[1:]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", only, *files]))
"""


@pytest.mark.timeout(300)
def test_a_processor_with_shorter_vectors_and_no_dot_products_decodes_the_same():
    if not DOTS:
        pytest.skip(
            "this processor has no dot products of bytes, so all tests are of the other way"
        )
    here = Path(__file__).parent
    ran = subprocess.run(
        [
            sys.executable, "-c", LESS,
            "equals_forward or same_bits or one_byte or exact_products",
            str(here / "test_fused.py"), str(here / "test_products.py"),
        ],
        capture_output=True, text=True, timeout=280, cwd=here.parent,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]


def test_weights_are_the_same_however_they_lie():
    # What is packed is read off the weights again: a scale that is not exact would show here.
    rng = np.random.default_rng(2)
    weight_EI, bias_E = packed_map(rng, 40, 24)
    torch.testing.assert_close(
        torch.from_numpy(mapped(weight_EI, bias_E, np.eye(24, dtype=np.float32)[:8])),
        torch.from_numpy((bias_E + weight_EI.T[:8]).astype(np.float32)), rtol=0, atol=1e-6,
    )  # fmt: skip
