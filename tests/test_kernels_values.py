"""Test the Triton kernels with extreme clamps, scales and coefficients, and with nan and inf.

Run the tests as tests/test_kernels.py says.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastflow_kernels.coupling import ACTIVATIONS, DIALECTS, CouplingSpec, OutputGrads
from fastflow_kernels.engines.triton import engine, math
from tests.support.coupling import (
    cast,
    check_everything,
    close,
    inverse,
    make,
    plain_forward,
    plain_gradients,
    plain_inverse,
    plain_log_det,
)
from tests.support.kernels import (  # noqa: F401  (fixtures)
    both_kinds,
    default_device,
    kernels_run,
    on_this_machine,
    shapes,
)
from tests.support.modes import sanitize, slow_when_executed

# NumPy warns of overflows to inf, which are intended.
pytestmark = [*on_this_machine, pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")]


@both_kinds
@shapes((2, 7, 4, 5), (5, 7), (2, 1, 3))
def test_coupling_without_gradients_of_parameters(shape: tuple[int, ...], gin: bool) -> None:
    x, a, coupling = make(shape, gin=gin)
    grads = OutputGrads(torch.randn(shape), None)
    with sanitize() as launches:
        dx, da, dg, doffset = engine.backward(x, a, grads, coupling, False)
    assert dg is doffset is None
    assert "_params_bwd_kernel" not in {run.kernel for run in launches}
    stored = {name for run in launches for name in run.stored if run.kernel != "_gin_sums_kernel"}
    assert stored <= {"dx_ptr", "da_ptr"}
    truth = plain_gradients(x, a, coupling, grads, torch.float64)
    baseline = plain_gradients(x, a, coupling, grads, torch.float32)
    close(dx, truth[0], baseline[0], "dx")
    close(da, truth[1], baseline[1], "da")
    with sanitize():
        with_params = engine.backward(x, a, grads, coupling, True)
    assert torch.equal(with_params.x, dx)
    assert torch.equal(with_params.a, da)
    if not gin:
        close(with_params.global_scale, truth[2], baseline[2], "dg")
    close(with_params.global_offset, truth[3], baseline[3], "doffset")


@shapes((2, 7, 4, 5), (5, 7), (2, 1, 3))
def test_gin_launches_nothing_for_its_log_determinant(shape: tuple[int, ...]) -> None:
    x, a, coupling = make(shape, gin=True)
    with sanitize() as launches:
        y, _ = engine.forward(x, a, coupling)
        inverse(y, a, coupling)
    assert "_logdet_kernel" not in {run.kernel for run in launches}
    stored = {name for run in launches for name in run.stored if run.kernel != "_gin_sums_kernel"}
    assert stored <= {"y_ptr", "x_ptr"}


def test_coupling_of_clamp_zero_adds() -> None:
    x, a, coupling = make((2, 6, 3))
    spec = CouplingSpec(0.0, 0.1, "EXP", False)
    check_everything(x, 1e4 * a, coupling._replace(spec=spec))


@shapes((2, 7, 4, 5), (5, 7))
@pytest.mark.parametrize("dialect", DIALECTS)
def test_coupling_of_huge_values_stays_finite(shape: tuple[int, ...], dialect: str) -> None:
    x, a, coupling = make(shape, dialect=dialect)
    x, a = 1e20 * x, 1e30 * a
    y, log_det = engine.forward(x, a, coupling)
    grads = engine.backward(x, a, OutputGrads(torch.randn_like(y), None), coupling, False)
    for t in (y, log_det, grads.x, grads.a):
        assert t.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_coupling_of_scales_of_every_size(activation: str) -> None:
    x, a, coupling = make((2, 40, 3), activation)
    check_everything(x, a, coupling._replace(global_scale=torch.linspace(-60, 60, 40)))


@shapes((2, 7, 3), (3, 7))
def test_log_determinant_of_gin_is_nan_where_a_coefficient_is(shape: tuple[int, ...]) -> None:
    x, a, coupling = make(shape, gin=True)
    a[1, 0] = torch.nan
    for log_det in (engine.forward(x, a, coupling)[1], inverse(x, a, coupling)[1]):
        assert log_det.isnan().tolist() == [k == 1 for k in range(shape[0])]


@shapes((2, 8, 3), (6, 8))
def test_coupling_of_scales_near_the_largest(shape: tuple[int, ...]) -> None:
    """The scale exp(g) reaches 3.3e38. The values are small, so that results are finite."""
    x, a, coupling = make(shape, "EXP")
    g = torch.linspace(87.34, 88.7, shape[1])
    check_everything(1e-3 * x, 1e-3 * a, coupling._replace(global_scale=g))


@shapes((2, 4, 3), (3, 4))
def test_sigmoid_scales_that_torch_takes_for_zero(shape: tuple[int, ...]) -> None:
    """A float32 baseline is useless here, because its 10 / (1 + exp(2 - g)) overflows to 0."""
    x, a, coupling = make(shape, "SIGMOID")
    x, a = 1e3 * x, 0 * a
    g = torch.tensor([-86.0, -86.8, -90.0, -100.0])
    coupling = coupling._replace(global_scale=g, global_offset=torch.zeros(4))
    y, log_det = engine.forward(x, a, coupling)
    truth, expected = plain_forward(*cast(torch.float64, x, a, coupling))
    assert (y - truth).abs().max() < 4e3 * 10 * 2.0**-149  # the rounding of a subnormal exponential
    torch.testing.assert_close(log_det, expected.float())
    assert inverse(y, a, coupling)[0].isfinite().all()


@pytest.mark.parametrize("activation", ["EXP", "SOFTPLUS"])
@shapes((2, 8, 3), (6, 8))
def test_coupling_of_subnormal_scales(shape: tuple[int, ...], activation: str) -> None:
    """1 / scale is out of range, but (y - offset) / scale is not if y - offset is as small."""
    _, a, coupling = make(shape, activation)
    x, a = 1e3 * torch.randn(shape), 1e-3 * a
    g = torch.linspace(-86.0, -100.0, shape[1]) * (2 if activation == "SOFTPLUS" else 1)
    coupling = coupling._replace(global_scale=g, global_offset=torch.zeros(shape[1]))
    y, log_det = engine.forward(x, a, coupling)
    assert y.count_nonzero() > y.numel() // 2
    truth = plain_forward(*cast(torch.float64, x, a, coupling))
    baseline = plain_forward(x, a, coupling)
    close(y, truth[0], baseline[0], "y")
    close(log_det, truth[1], baseline[1], "log_det")
    y = y + 1e-38
    back, minus = inverse(y, a, coupling)
    truth = plain_inverse(*cast(torch.float64, y, a, coupling))
    baseline = plain_inverse(y, a, coupling)
    assert baseline[0].isfinite().sum() > y.numel() // 2
    close(minus, truth[1], baseline[1], "log_det of the inverse")
    again = engine.invert_passive(y, coupling)
    grads = OutputGrads(torch.randn(shape), None)
    engine.invert_and_backward(y, again, a, grads, coupling, False)
    for c in range(shape[1]):  # each by itself, because the baseline's error grows with 1 / scale
        for name, t in (("x", back), ("x reconstructed", again)):
            close(t[:, c], truth[0][:, c], baseline[0][:, c], f"{name}, channel {c}")


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float64, id="fp64", marks=slow_when_executed),
        pytest.param(torch.float32, id="fp32"),
    ],
)
@shapes((3, 6, 4), (7, 6))
def test_coupling_passes_nan_and_inf_through(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, a, coupling = make(shape, x=dtype)
    x.view(-1)[[0, 5]] = torch.tensor([torch.nan, torch.inf], dtype=dtype)
    x[-1, -1] = -torch.inf
    a[0, :3].view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    check_everything(x, a, coupling)


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0])
@shapes((1, 8, 3), (1, 64))
def test_coupling_small_arguments_keep_their_relative_accuracy(
    shape: tuple[int, ...], size: float
) -> None:
    """A kernel with 2 * sigmoid(2z) - 1 in place of tanh would fail."""
    x, a, coupling = make(shape, "EXP")
    # log(exp(0)) = 0, so the log-determinant is the sum of s alone.
    coupling = coupling._replace(global_scale=torch.zeros(shape[1]))
    a = size * a.abs()
    truth = plain_log_det(*cast(torch.float64, x, a, coupling))
    close(engine.forward(x, a, coupling)[1], truth, plain_log_det(x, a, coupling), "log_det")


@triton.jit
def _atan_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, math.atan(tl.load(x_ptr + offs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_atan_to_a_few_ulp_at_every_magnitude(dtype: torch.dtype) -> None:
    block, near = 1024, torch.linspace(0.3, 3.0, 3 * 1024, dtype=torch.float64)
    x = torch.cat((torch.logspace(-30, 30, 5 * block, dtype=torch.float64), near)).to(dtype)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0], dtype=dtype)
    x[:5] = special
    x[5::2] *= -1
    actual = torch.empty_like(x)
    _atan_kernel[(8,)](x, actual, block, enable_fp_fusion=True)
    # NumPy's longdouble has 11 bits more than float64.
    truth = np.arctan(x.cpu().numpy().astype(np.longdouble))
    error = np.abs(actual.cpu().numpy().astype(np.longdouble) - truth)[5:] / np.abs(truth[5:])
    assert error.max() <= 2.5 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual[:5], torch.atan(special), equal_nan=True)


@shapes((2, 7, 4, 5), (6, 7))
@both_kinds
def test_coupling_repeats_bit_for_bit(shape: tuple[int, ...], gin: bool) -> None:
    x, a, coupling = make(shape, gin=gin)
    grads = OutputGrads(torch.randn(shape), torch.randn(shape[0]))

    def run() -> tuple[Tensor | None, ...]:
        backward = engine.backward(x, a, grads, coupling, True)
        return *engine.forward(x, a, coupling), *backward, *inverse(x, a, coupling)

    for first, second in zip(run(), run(), strict=True):
        assert first is second is None or torch.equal(first, second)
