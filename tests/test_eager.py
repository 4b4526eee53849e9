"""Test the eager engine's functions by themselves. tests/test_clamps.py tests all clamps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastflow_kernels.coupling import Coupling, CouplingSpec, OutputGrads
from fastflow_kernels.engines import eager, processor, soft_clamp


@pytest.mark.parametrize("is_fast", [True, False], ids=["fast form", "plain form"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_to_a_few_ulp_at_every_magnitude(dtype: torch.dtype, is_fast: bool) -> None:
    """The magnitudes cross the bound of the cheap form.

    A value's result must not depend on its neighbours.
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
    spec = CouplingSpec(clamp=2.0, input_scale=1.0, activation="EXP", gin=False)

    def tanh(a: Tensor) -> Tensor:
        clamp = soft_clamp.SoftClamp(spec, 1, is_fast)
        return clamp.log_factors(a, 1.0, torch.empty_like(a), torch.empty_like(a))

    unit = math.log(2.0) if is_fast else 1.0
    actual, truth = tanh(a), 2.0 / unit * torch.tanh(a.double())
    error = (actual - truth).abs() / torch.finfo(dtype).eps
    # At most 4 units in the last place. In float64 these include the truth's own error.
    assert (error <= 2.0 * truth.abs()).all(), (error / truth.abs()).nan_to_num().max()
    small = a.abs() < 1.0
    assert torch.equal(tanh(a[small].view(1, -1, 1)), actual[small].view(1, -1, 1))
    assert tanh(torch.tensor([[[math.nan], [0.5]]], dtype=dtype)).isnan().flatten().tolist() == [
        True,
        False,
    ]


def test_form_of_the_soft_clamp_is_chosen_by_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    has_fast_tanh = processor.has_fast_tanh.__wrapped__  # without the cache
    monkeypatch.setattr(processor, "_vendor", lambda: "vendor_id : GenuineIntel")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert has_fast_tanh()
    with monkeypatch.context() as patch:
        patch.setattr(processor, "_vendor", lambda: "vendor_id : AuthenticAMD")
        assert not has_fast_tanh()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkl, "is_available", lambda: False)
        assert not has_fast_tanh()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not has_fast_tanh()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_and_its_slope_from_a_sigmoid(dtype: torch.dtype) -> None:
    """The backward pass uses both.

    The error of tanh is the one from which the bound of the clamp is derived. The slope is exact to
    a few ulp of itself.
    """
    a = torch.cat(
        [sign * torch.logspace(-30, 1, 20001, dtype=torch.float64) for sign in (1.0, -1.0)]
    ).to(dtype)
    sigma = soft_clamp._small_sigmoid(a, 0.3, torch.empty_like(a))
    actual = soft_clamp._tanh_from_sigmoid(sigma, a, 1.0, torch.empty_like(a))
    unit = torch.finfo(dtype).eps / 2.0
    assert ((actual - torch.tanh(0.3 * a.double())).abs() <= 2.0 * unit).all()
    z = 0.3 * a.double()
    slope = 1.0 / torch.cosh(z).square()
    # The argument of exp(-2 |z|) has two roundings of half a unit of 2 |z| each. The other 6 units
    # are for the remaining roundings, including the truth's own.
    assert (
        (4.0 * sigma * (1.0 - sigma) - slope).abs() <= (6.0 + 2.0 * z.abs()) * unit * slope
    ).all()


@pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
@pytest.mark.parametrize("shape", [(3, 7), (2, 9, 61, 67), (2, 2, 4)], ids=str)
def test_inverse_and_backward_in_one_are_those_apart(shape: tuple[int, ...], gin: bool) -> None:
    batch, channels, *spatial = shape
    spec, perm = CouplingSpec.of(1.9, "anomalib", "SIGMOID", gin), torch.randperm(channels)
    for x_dtype, a_dtype in (
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ):
        y, dy = torch.randn(shape, dtype=x_dtype), torch.randn(shape, dtype=x_dtype)
        a = torch.randn(batch, channels // 2 * 2, *spatial).to(a_dtype)
        g, offset, dlogdet = (
            torch.randn(channels, dtype=x_dtype),
            torch.randn(channels, dtype=x_dtype),
            torch.randn(batch),
        )
        coupling, grads = Coupling(g, offset, spec, perm, perm.argsort()), OutputGrads(dy, dlogdet)
        x = eager.invert_passive(y, coupling)
        together = x.clone()
        eager.invert_active(y, x, a, coupling)
        expected = (x, *eager.backward(x, a, grads, coupling, True))
        actual = (together, *eager.invert_and_backward(y, together, a, grads, coupling, True))
        for value, truth in zip(actual, expected, strict=True):
            assert (value is None) == (truth is None)
            if truth is not None:
                eps = torch.finfo(truth.dtype).eps
                torch.testing.assert_close(
                    value, truth, rtol=8 * eps, atol=64 * eps * truth.abs().max().item()
                )
