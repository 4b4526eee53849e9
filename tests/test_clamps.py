"""Every clamp and size of coefficients, by the one criterion of accuracy: the eager functions and
the kernels, each pass by itself.

TRITON_INTERPRET=1 pytest tests/test_clamps.py   # the kernels in Triton's interpreter; otherwise as
tests/test_kernels.py says
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastflow_kernels.engines import eager

pytest.importorskip("triton")

from fastflow_kernels.coupling import DIALECTS, CouplingSpec, OutputGrads
from tests.support import modes
from tests.support.cases import DEVICE, both_dialects
from tests.support.coupling import (
    check_everything,
    inverse,
    make,
    plain_forward,
    plain_gradients,
    plain_inverse,
)
from tests.support.modes import INTERPRETED

# numpy's: overflow to inf is meant
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")

CLAMPS = (1e-3, 0.5, 1.9, 2.0, 2.1, 5.0, 8.0, 20.0, 50.0, -1.0, -8.0)
GAINS = (1e-3, 0.1, 1.0, 5.0, 30.0, 300.0)  # standard deviation of a
# The kernels get a few, for each clamp is compiled.
KERNEL_CLAMPS = (*CLAMPS[::2], 50.0) if INTERPRETED else (2.0, 50.0)
KERNEL_GAINS = (0.1, 5.0, 300.0)
both_kinds = pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])


def inputs_of(
    shape: tuple[int, ...],
    clamp: float,
    dialect: str,
    gin: bool,
    gain: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    x, a, coupling = make(shape, dialect=dialect, gin=gin, clamp=clamp, x=dtype)
    return x, (gain * torch.randn(a.shape)).to(dtype), coupling


@both_kinds
@both_dialects
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=lambda dtype: str(dtype)[6:],
)
@pytest.mark.parametrize("shape", [(4, 6, 9, 7), (50, 7)], ids=["planes", "rows"])
def test_eager_functions_at_any_clamp(
    shape: tuple[int, ...], dtype: torch.dtype, clamp: float, dialect: str, gin: bool
) -> None:
    for gain in GAINS:
        torch.manual_seed(0)
        check_everything(*inputs_of(shape, clamp, dialect, gin, gain, dtype), engine=eager)


@both_kinds
@pytest.mark.parametrize("clamp", [c for c in CLAMPS if abs(c) <= 2.0])
@pytest.mark.parametrize("z", [1e-4, 0.05, 0.3, 0.7, 1.2, 1.7, 1.8, 4.0, 8.0])
def test_eager_functions_where_all_coefficients_are_alike(
    z: float, clamp: float, gin: bool
) -> None:
    """The criterion measures by the largest value, and here none is larger than others: no error
    hides behind it.
    """
    x, a, coupling = make((4, 6, 9, 7), gin=gin, clamp=clamp)
    size = z / coupling.spec.tanh_scale * (0.9 + 0.1 * torch.rand(a.shape))
    a = torch.cat(((size * torch.randn(a.shape).sign())[:, :3], a[:, 3:]), 1)
    check_everything(x, a, coupling, engine=eager)


@both_kinds
@pytest.mark.parametrize("clamp", [80.0, 200.0, 1000.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_eager_functions_overflow_only_where_plain_pytorch_does(
    dtype: torch.dtype, clamp: float, gin: bool
) -> None:
    """Where exp leaves the dtype's range there is no truth to compare with."""
    for gain in (1.0, 30.0, 300.0):
        x, a, coupling = inputs_of((4, 6, 9, 7), clamp, "anomalib", gin, gain, dtype)
        y, log_det = eager.forward(x, a, coupling)
        grads = OutputGrads(torch.randn_like(y), torch.randn_like(log_det))
        backward = eager.backward(x, a, grads, coupling, True)
        actual = [y, log_det, *backward, *inverse(x, a, coupling, eager)]
        plain = [
            *plain_forward(x, a, coupling),
            *plain_gradients(x, a, coupling, grads),
            *plain_inverse(x, a, coupling),
        ]
        for ours, expected in zip(actual, plain, strict=True):
            assert ours is None or (ours.isfinite() | ~expected.isfinite()).all()


def test_coefficients_of_the_cheap_form_fit_in_float32() -> None:
    """At the least clamp that takes it, where dialect "freia" makes tanh_scale largest, and just
    below, where it does not.
    """
    for clamp in (eager._LEAST_CLAMP, 0.5 * eager._LEAST_CLAMP, 1e-15):
        for dialect in DIALECTS:
            check_everything(*inputs_of((4, 6, 9, 7), clamp, dialect, False, 1.0), engine=eager)
            spec = CouplingSpec.of(eager._LEAST_CLAMP, dialect, "EXP", False)
            for value in eager._tanh_coefficients(spec.tanh_scale, spec.clamp / math.log(2.0)):
                assert 1e-30 < abs(value) < 1e30


@pytest.mark.kernels
@both_kinds
@both_dialects
@pytest.mark.parametrize("clamp", KERNEL_CLAMPS)
@pytest.mark.parametrize("shape", [(2, 7, 4, 5), (9, 7)], ids=["planes", "rows"])
def test_kernels_at_any_clamp(
    shape: tuple[int, ...], clamp: float, dialect: str, gin: bool
) -> None:
    if gin and abs(clamp) > 20.0:
        pytest.skip(
            "the sums ahead of GIN's backward are taken before the mean is known: exp(clamp) of "
            "range is lost"
        )
    with modes.kernels_run(), DEVICE:
        for gain in KERNEL_GAINS:
            torch.manual_seed(0)
            check_everything(*inputs_of(shape, clamp, dialect, gin, gain))
