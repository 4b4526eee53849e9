"""Test the eager engine and the kernels at many clamps and sizes of coefficients.

Each pass is checked by itself, by the criterion of tests/support/compare.py. The kernels run as in
tests/test_kernels.py. In Triton's interpreter::

    TRITON_INTERPRET=1 pytest tests/test_clamps.py
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastflow_kernels.engines import eager, soft_clamp

pytest.importorskip("triton")

from fastflow_kernels.coupling import DIALECTS, Coupling, CouplingSpec, OutputGrads
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

# NumPy warns of overflows to inf, which are intended.
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")

CLAMPS = (1e-3, 0.5, 1.9, 2.0, 2.1, 5.0, 8.0, 20.0, 50.0, -1.0, -8.0)
# Each clamp with the fast form where it takes it, and those that do with the plain form as well.
FORMS = (*((clamp, True) for clamp in CLAMPS), *((c, False) for c in CLAMPS if 0.0 < c <= 2.0))
GAINS = (1e-3, 0.1, 1.0, 5.0, 30.0, 300.0)  # standard deviation of a
# The kernels run with fewer clamps, because each one is compiled.
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
) -> tuple[Tensor, Tensor, Coupling]:
    x, a, coupling = make(shape, dialect=dialect, gin=gin, clamp=clamp, x=dtype)
    return x, (gain * torch.randn(a.shape)).to(dtype), coupling


@both_kinds
@both_dialects
@pytest.mark.parametrize(("clamp", "is_fast"), FORMS)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=lambda dtype: str(dtype)[6:],
)
@pytest.mark.parametrize("shape", [(4, 6, 9, 7), (50, 7)], ids=["planes", "rows"])
def test_eager_functions_at_any_clamp(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    clamp: float,
    is_fast: bool,
    dialect: str,
    gin: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose_form(monkeypatch, is_fast)
    for gain in GAINS:
        torch.manual_seed(0)
        check_everything(*inputs_of(shape, clamp, dialect, gin, gain, dtype), engine=eager)


def choose_form(monkeypatch: pytest.MonkeyPatch, is_fast: bool) -> None:
    """Choose the form of the soft clamp, instead of by the processor."""
    monkeypatch.setattr(soft_clamp, "has_fast_tanh", lambda: not is_fast)


@both_kinds
@pytest.mark.parametrize(("clamp", "is_fast"), [form for form in FORMS if abs(form[0]) <= 2.0])
@pytest.mark.parametrize("z", [1e-4, 0.05, 0.3, 0.7, 1.2, 1.7, 1.8, 4.0, 8.0])
def test_eager_functions_where_all_coefficients_are_alike(
    z: float, clamp: float, is_fast: bool, gin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All values have about the same size, so that no error hides behind a larger value."""
    choose_form(monkeypatch, is_fast)
    x, a, coupling = make((4, 6, 9, 7), gin=gin, clamp=clamp)
    size = z / coupling.spec.input_scale * (0.9 + 0.1 * torch.rand(a.shape))
    a = torch.cat(((size * torch.randn(a.shape).sign())[:, :3], a[:, 3:]), 1)
    check_everything(x, a, coupling, engine=eager)


@both_kinds
@pytest.mark.parametrize("clamp", [80.0, 200.0, 1000.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_eager_functions_overflow_only_where_plain_pytorch_does(
    dtype: torch.dtype, clamp: float, gin: bool
) -> None:
    """Only overflows are compared, because no truth exists where exp leaves the dtype's range."""
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
        for value, expected in zip(actual, plain, strict=True):
            assert value is None or (value.isfinite() | ~expected.isfinite()).all()


def test_coefficients_of_the_cheap_form_fit_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest clamp with the cheap form, and clamps below it, which do not take it.

    Dialect "freia" makes input_scale largest there.
    """
    choose_form(monkeypatch, True)
    for clamp in (soft_clamp.LEAST_FAST_CLAMP, 0.5 * soft_clamp.LEAST_FAST_CLAMP, 1e-15):
        for dialect in DIALECTS:
            check_everything(*inputs_of((4, 6, 9, 7), clamp, dialect, False, 1.0), engine=eager)
            spec = CouplingSpec.of(soft_clamp.LEAST_FAST_CLAMP, dialect, "EXP", False)
            for value in soft_clamp._tanh_coefficients(
                spec.input_scale, spec.clamp / math.log(2.0)
            ):
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
            "the sums before GIN's backward are taken before the mean is known, which loses "
            "exp(clamp) of the range"
        )
    with modes.kernels_run(), DEVICE:
        for gain in KERNEL_GAINS:
            torch.manual_seed(0)
            check_everything(*inputs_of(shape, clamp, dialect, gin, gain))
