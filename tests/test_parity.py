"""The drop-in against the reference: outputs, log-determinants, inverses and every gradient, by the
design's criterion.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastflow_kernels
import reference
from fastflow_kernels.engines import eager
from fastflow_kernels.coupling import CouplingSpec
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
    ids,
)
from tests.support.compare import assert_close
from tests.support.parity import compare, compare_fresh

# the kernels without a GPU: tests/test_kernels.py
BACKENDS = (
    ["eager", pytest.param("triton", marks=pytest.mark.gpu)] if DEVICE.type == "cuda" else ["eager"]
)
HALF = {name: DTYPES[name] for name in ("bf16", "fp16")}

both_directions = pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@both_directions
def test_block_parity(case: Case, dtype: str, rev: bool) -> None:
    compare(case, DTYPES[dtype], rev, grad=True)


@pytest.mark.plain
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@both_directions
def test_block_parity_of_small_inputs(case: Case, dtype: str, rev: bool) -> None:
    compare(case, DTYPES[dtype], rev, grad=True, backend="auto")


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@both_directions
def test_block_parity_without_gradients(case: Case, dtype: str, rev: bool) -> None:
    compare(case, DTYPES[dtype], rev, grad=False)


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
    compare(Case(shape, name), torch.float32, False, grad=True, backend=backend)


@pytest.mark.parametrize("name", ["hard", "gin"])
@every_backend
def test_block_parity_on_a_large_channels_last_input(name: str, backend: str) -> None:
    """The log-determinant's gradient is handed to every pixel: summing it there must not cost the
    scale's gradient its digits.
    """
    compare(
        Case(Shape(5, 64, (32, 32)), name),
        torch.float32,
        False,
        grad=True,
        backend=backend,
        layout="channels_last",
    )


# Compiling takes half a second a kernel: every case in float32, some in every dtype.
KERNEL_CASES = [
    (case, dtype)
    for dtype in DTYPES
    for case in (HARD_CASES if dtype == "fp32" else HARD_CASES[::4])
]


@pytest.mark.gpu  # without one, tests/test_kernels.py runs them in the interpreter
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
    """A cheap tanh with an absolute error would pass on large coefficients and fail on those of an
    untrained subnet.
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_to_a_few_ulp_at_every_magnitude(dtype: torch.dtype) -> None:
    """Also across the bound of the cheap form; and a value's result does not depend on its
    neighbours.
    """
    magnitudes = torch.cat(
        [
            torch.logspace(-30, 3, 20001, dtype=torch.float64),
            torch.linspace(0.5, 2.5, 40001, dtype=torch.float64),
        ]
    )
    a = (
        torch.cat(
            [magnitudes, -magnitudes, torch.tensor([0.0, math.inf, -math.inf], dtype=torch.float64)]
        )
        .to(dtype)
        .view(1, -1, 1)
    )
    spec = CouplingSpec(clamp=2.0, tanh_scale=1.0, activation="EXP", gin=False)

    def tanh(a: Tensor) -> Tensor:
        return eager._log_factor(a, spec, 1.0, True, torch.empty_like(a), torch.empty_like(a))

    found, truth = tanh(a), 2.0 / math.log(2.0) * torch.tanh(a.double())
    error = (found - truth).abs() / torch.finfo(dtype).eps
    # 4 units in the last place, or the truth's own
    assert (error <= 2.0 * truth.abs()).all(), (error / truth.abs()).nan_to_num().max()
    small = a.abs() < 1.0
    assert torch.equal(tanh(a[small].view(1, -1, 1)), found[small].view(1, -1, 1))
    assert tanh(torch.tensor([[[math.nan], [0.5]]], dtype=dtype)).isnan().flatten().tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_and_its_slope_from_a_sigmoid(dtype: torch.dtype) -> None:
    """What the backward takes: tanh within the error that the bound of the clamp is derived from,
    and the slope to a few ulp of itself.
    """
    a = torch.cat(
        [sign * torch.logspace(-30, 1, 20001, dtype=torch.float64) for sign in (1.0, -1.0)]
    ).to(dtype)
    sigma = eager._small_sigmoid(a, 0.3, torch.empty_like(a))
    found = eager._from_sigmoid(sigma, a, 1.0, torch.empty_like(a))
    unit = torch.finfo(dtype).eps / 2.0
    assert ((found - torch.tanh(0.3 * a.double())).abs() <= 2.0 * unit).all()
    z = 0.3 * a.double()
    slope = 1.0 / torch.cosh(z).square()
    # exp(-2 |z|) feels the two roundings of its argument, half a unit of 2 |z| each; the rest are a
    # few more, the truth's own included
    assert (
        (4.0 * sigma * (1.0 - sigma) - slope).abs() <= (6.0 + 2.0 * z.abs()) * unit * slope
    ).all()
