"""The eager engine's functions by themselves; at every clamp: tests/test_clamps.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastflow_kernels.coupling import Coupling, CouplingSpec, OutputGrads
from fastflow_kernels.engines import eager, soft_clamp


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
        clamp = soft_clamp.SoftClamp(spec, 1, is_fast=True)
        return clamp.log_factors(a, 1.0, torch.empty_like(a), torch.empty_like(a))

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
    sigma = soft_clamp._small_sigmoid(a, 0.3, torch.empty_like(a))
    found = soft_clamp._tanh_from_sigmoid(sigma, a, 1.0, torch.empty_like(a))
    unit = torch.finfo(dtype).eps / 2.0
    assert ((found - torch.tanh(0.3 * a.double())).abs() <= 2.0 * unit).all()
    z = 0.3 * a.double()
    slope = 1.0 / torch.cosh(z).square()
    # exp(-2 |z|) feels the two roundings of its argument, half a unit of 2 |z| each; the rest are a
    # few more, the truth's own included
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
        found = (together, *eager.invert_and_backward(y, together, a, grads, coupling, True))
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                eps = torch.finfo(theirs.dtype).eps
                torch.testing.assert_close(
                    mine, theirs, rtol=8 * eps, atol=64 * eps * theirs.abs().max().item()
                )
