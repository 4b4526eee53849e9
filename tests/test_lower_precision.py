"""Test half precision and autocast: dtypes and ranges of the results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock
from tests.support.cases import (
    Case,
    Shape,
    both_dialects,
    both_directions,
    kinds,
    make_block,
    make_input,
    with_and_without_grad,
)
from tests.support.parity import check_float16_range

pytestmark = pytest.mark.usefixtures("fused")


@kinds
@both_directions
@with_and_without_grad
def test_autocast_keeps_the_log_determinant(name: str, rev: bool, grad: bool) -> None:
    """The log-determinant is accurate to float32.

    It is compared with the formula in float64, for the subnet's coefficients in bfloat16.
    """
    case = Case(Shape(3, 8, (4, 4)), name)
    seen: list[Tensor] = []
    block = make_block(AllInOneBlock, case, torch.float32)
    block.subnet.register_forward_hook(lambda module, arguments, a: seen.append(a))
    x, c = make_input(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        (y,), logdet = block([x], c, rev=rev)
    assert logdet.dtype == torch.float32
    assert seen[0].dtype == torch.bfloat16
    s = block.clamp * torch.tanh(0.1 * seen[0][:, :4].detach().double())
    if block.GIN:
        expected = torch.zeros(3, dtype=torch.float64)
    else:
        expected = (
            s.flatten(1).sum(1)
            + 16 * block.global_scale_activation(block.global_scale.detach().double()).log().sum()
        )
    error = (logdet.detach() - (-expected if rev else expected)).abs().max().item()
    terms = s.abs().flatten(1).sum(1).max().item() + 16 * 8
    assert error <= 4 * torch.finfo(torch.float32).eps * terms
    if grad:
        (y.float().sum() + logdet.sum()).backward()
        assert block.global_offset.grad.dtype == torch.float32


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_block_has_a_float32_log_determinant(name: str, dtype: torch.dtype) -> None:
    case = Case(Shape(3, 8), name)
    block = make_block(AllInOneBlock, case, dtype)
    x, c = make_input(case, dtype)
    for rev in (False, True):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                (y,), logdet = block([x], c, rev=rev)
            assert y.dtype == dtype
            assert logdet.dtype == torch.float32


@pytest.mark.parametrize("name", ["hard", "sigmoid", "gin", "rev"])
@pytest.mark.parametrize("shape", [Shape(3, 7), Shape(2, 6, (3, 5))], ids=str)
@pytest.mark.parametrize(
    "narrow", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"]
)
@with_and_without_grad
def test_inverse_of_a_narrower_input(
    name: str, shape: Shape, narrow: torch.dtype, grad: bool
) -> None:
    """A narrower latent variable is widened to the block's dtype, which is exact.

    The result has the same bits as for an input in the wider dtype.
    """
    case = Case(shape, name)
    wide = torch.float64 if narrow is torch.float32 else torch.float32
    block = make_block(AllInOneBlock, case, wide)
    y, _ = make_input(case, narrow)
    with torch.set_grad_enabled(grad):
        (x,), logdet = block([y], rev=True)
        (expected_x,), expected_logdet = block([y.to(wide)], rev=True)
    assert x.dtype == logdet.dtype == wide
    assert torch.equal(x, expected_x)
    assert torch.equal(logdet, expected_logdet)


@both_dialects
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("input_dtype", ["float32", "half"])
@kinds
def test_dtypes_under_autocast(
    name: str, input_dtype: str, half: torch.dtype, dialect: str
) -> None:
    """The README says that results are float32, unless a soft permutation is the last step.

    Its product runs under autocast.
    """
    block = AllInOneBlock(
        [(8, 4, 4)],
        subnet_constructor=lambda i, o: nn.Conv2d(i, o, 1),
        dialect=dialect,
        **Case(Shape(1, 8, (4, 4)), name).options,
    )
    dtype = half if input_dtype == "half" else torch.float32
    x = torch.randn(3, 8, 4, 4).to(dtype).requires_grad_()
    for rev in (False, True):
        x.grad = None
        block.zero_grad()
        with torch.autocast("cpu", half):
            (y,), logdet = block([x], rev=rev)
        ends_in_product = block.permute_soft and (block.reverse_pre_permute or not rev)
        assert y.dtype == (half if ends_in_product else torch.float32)
        assert logdet.dtype == torch.float32
        (y.float().sum() + logdet.sum()).backward()
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert {p.grad.dtype for p in block.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("small", [1 << 20, 0], ids=["plain", "fused"], indirect=True)
@pytest.mark.usefixtures("small")
def test_float16_overflows_only_where_a_result_does() -> None:
    check_float16_range("auto")
