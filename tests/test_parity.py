"""Test the drop-in against the reference by the criterion of tests/support/compare.py.

Outputs, log-determinants, inverses and all gradients are compared.
"""

from __future__ import annotations

import pytest
import torch

import fastflow_kernels
import reference
from tests.support.blocks import Stored, unwrapped
from tests.support.cases import (
    CASES,
    CLAMP_CASES,
    DEVICE,
    DTYPES,
    HARD_CASES,
    LARGE_CASES,
    LAYOUTS,
    SHAPES,
    Case,
    Shape,
    both_directions,
    ids,
)
from tests.support.compare import assert_close
from tests.support.parity import compare, compare_fresh
from tests.support.small_inputs import LIMIT, small_up_to

pytestmark = pytest.mark.usefixtures("fused")

# tests/test_kernels_blocks.py tests the kernels without a GPU.
BACKENDS = (
    ["eager", pytest.param("triton", marks=pytest.mark.gpu)] if DEVICE.type == "cuda" else ["eager"]
)
HALF = {name: DTYPES[name] for name in ("bf16", "fp16")}

every_backend = pytest.mark.parametrize("backend", BACKENDS)


# Backend, number of elements up to which an input is small, and with gradients or not, by name.
WAYS = {
    "fused": ("eager", 0, True),
    "fused without gradients": ("eager", 0, False),
}
if DEVICE.type == "cpu":  # on a GPU no input is small
    WAYS["plain"] = ("auto", LIMIT, True)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@both_directions
@pytest.mark.parametrize("way", WAYS)
def test_block_parity(case: Case, dtype: str, rev: bool, way: str) -> None:
    backend, small, grad = WAYS[way]
    with small_up_to(small):
        compare(case, DTYPES[dtype], rev, grad, backend)


@pytest.mark.parametrize("case", CLAMP_CASES, ids=ids(CLAMP_CASES))
@pytest.mark.parametrize("dtype", DTYPES)
@both_directions
def test_block_parity_of_clamps(case: Case, dtype: str, rev: bool) -> None:
    compare(case, DTYPES[dtype], rev, grad=not rev)


@pytest.mark.parametrize("case", HARD_CASES, ids=ids(HARD_CASES))
@pytest.mark.parametrize("dtype", HALF)
@both_directions
def test_block_parity_in_half_precision(case: Case, dtype: str, rev: bool) -> None:
    compare(case, HALF[dtype], rev, grad=not rev)


@pytest.mark.parametrize("case", LARGE_CASES, ids=ids(LARGE_CASES))
@both_directions
@every_backend
def test_block_parity_on_large_shapes(case: Case, rev: bool, backend: str) -> None:
    compare(case, torch.float32, rev, grad=not rev, backend=backend)


LAYOUT_CASES = [
    Case(shape, name) for shape in (SHAPES[0], SHAPES[6]) for name in ("hard", "gin", "soft")
]


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=ids(LAYOUT_CASES))
@pytest.mark.parametrize("layout", LAYOUTS)
@both_directions
def test_block_parity_in_any_layout(case: Case, layout: str, rev: bool) -> None:
    compare(case, torch.float32, rev, grad=True, layout=layout)


@pytest.mark.parametrize(
    "shape", [Shape(70_000, 2), Shape(3, 4096), Shape(1, 4097, (1, 2))], ids=str
)
@pytest.mark.parametrize("name", ["hard", "gin", "rev"])
@every_backend
def test_block_parity_at_extreme_sizes(shape: Shape, name: str, backend: str) -> None:
    # "freia" holds an index. A matrix of 4096 channels would take the reference seconds.
    compare(Case(shape, name, "freia"), torch.float32, False, grad=True, backend=backend)


@pytest.mark.parametrize("name", ["hard", "gin"])
@every_backend
def test_block_parity_on_a_large_channels_last_input(name: str, backend: str) -> None:
    """Every pixel gets the log-determinant's gradient.

    Its sum must not cost the scale's gradient accuracy.
    """
    compare(
        Case(Shape(5, 64, (32, 32)), name),
        torch.float32,
        False,
        grad=True,
        backend=backend,
        layout="channels_last",
    )


# Compiling takes half a second a kernel, so only some cases run in every dtype.
KERNEL_CASES = [
    (case, dtype)
    for dtype in DTYPES
    for case in (HARD_CASES if dtype == "fp32" else HARD_CASES[::4])
]


@pytest.mark.gpu  # without one, tests/test_kernels_blocks.py runs them
@pytest.mark.parametrize(("case", "dtype"), KERNEL_CASES, ids=lambda value: str(value))
@both_directions
def test_kernels_parity(case: Case, dtype: str, rev: bool) -> None:
    compare(case, DTYPES[dtype], rev, grad=not rev, backend="triton")


@every_backend
@pytest.mark.parametrize("activation", ["SIGMOID", "SOFTPLUS", "EXP"])
@pytest.mark.parametrize("shape", [(64, 8, 8), (33, 5, 3), (64,)], ids=str)
def test_log_det_of_a_fresh_block(activation: str, shape: tuple[int, ...], backend: str) -> None:
    compare_fresh(activation, shape, backend)


SMALL_SCALES = [1e-3, 1.0, 30.0]


@pytest.mark.parametrize("gain", SMALL_SCALES)
@pytest.mark.parametrize("clamp", [0.5, 1.9, 5.0])
def test_log_det_of_small_and_large_coefficients(gain: float, clamp: float) -> None:
    """A cheap tanh with an absolute error would pass only on large coefficients.

    It would fail on the small coefficients of an untrained subnet.
    """
    torch.manual_seed(3)
    a = gain * torch.randn(4, 64, 24, 24)
    x = torch.randn(4, 64, 24, 24)
    results = []
    for cls, dtype in (
        (fastflow_kernels.AllInOneBlock, torch.float32),
        (reference.AllInOneBlock, torch.float32),
        (reference.AllInOneBlock, torch.float64),
    ):
        torch.manual_seed(4)
        block = cls(
            [(64, 24, 24)],
            subnet_constructor=lambda *_: Stored(a),
            affine_clamping=clamp,
            global_affine_type="EXP",
        ).to(dtype)
        with torch.no_grad():
            results.append(
                [t for rev in (False, True) for t in unwrapped(block([x.to(dtype)], rev=rev))]
            )
    for actual, baseline, truth in zip(*results, strict=True):
        assert_close(actual, truth, baseline, f"gain {gain}, clamp {clamp}")
