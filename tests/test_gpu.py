"""Test graph capture, bitwise repeatability and sizes beyond 32-bit offsets on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock

pytestmark = pytest.mark.gpu


class Flow(nn.Module):
    """A few blocks, as a module that maps a tensor to the output and the summed log-determinant."""

    def __init__(self, shape: tuple[int, ...], steps: int = 3, **options: object) -> None:
        super().__init__()
        subnet = (lambda i, o: nn.Conv2d(i, o, 3, padding=1)) if len(shape) == 3 else nn.Linear
        self.blocks = nn.ModuleList(
            AllInOneBlock([shape], subnet_constructor=subnet, **options) for _ in range(steps)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for block in self.blocks:
            (x,), logdet = block([x])
            total = total + logdet
        return x, total


def step(flow: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the results and gradients of one training step."""
    x = x.detach().requires_grad_()
    flow.zero_grad(set_to_none=True)
    z, logdet = flow(x)
    (z.square().sum() - logdet.sum()).backward()
    return [
        z.detach().clone(),
        logdet.detach().clone(),
        x.grad.clone(),
        *(p.grad.clone() for p in flow.parameters() if p.requires_grad),
    ]


shapes = pytest.mark.parametrize("shape", [(64, 512), (4, 32, 16, 16)], ids=["rows", "planes"])


@shapes
@pytest.mark.parametrize("how", ["graphed callables", "reduce-overhead"])
def test_cuda_graph_of_a_whole_flow(shape: tuple[int, ...], how: str) -> None:
    """Capture once and replay on other values, three times in a row."""
    flow = Flow(shape[1:]).cuda()
    plain = copy.deepcopy(flow)
    example = torch.randn(shape, device="cuda", requires_grad=True)
    if how == "graphed callables":
        flow = torch.cuda.make_graphed_callables(flow, (example,))
    else:
        torch._dynamo.reset()
        flow = torch.compile(flow, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        x = torch.randn(shape, device="cuda")
        if how != "graphed callables":
            torch.compiler.cudagraph_mark_step_begin()
        for actual, eager in zip(step(flow, x), step(plain, x), strict=True):
            tolerance = 1e-4 * eager.abs().max().item()
            torch.testing.assert_close(actual, eager, rtol=1e-4, atol=tolerance)


@shapes
@pytest.mark.parametrize("options", [{}, {"gin_block": True}], ids=["affine", "gin"])
def test_steps_repeat_bit_for_bit(shape: tuple[int, ...], options: dict) -> None:
    block = AllInOneBlock(
        [shape[1:]], subnet_constructor=lambda i, o: nn.Identity(), backend="triton", **options
    ).cuda()
    a = torch.randn(shape, device="cuda", requires_grad=True)
    block.subnet.forward = lambda x: a
    x = torch.randn(shape, device="cuda", requires_grad=True)
    results = []
    for _ in range(3):
        x.grad = a.grad = None
        block.zero_grad(set_to_none=True)
        (y,), logdet = block([x])
        torch.autograd.backward([y, logdet], [torch.ones_like(y), torch.ones_like(logdet)])
        results.append([y, logdet, x.grad, a.grad, block.global_offset.grad])
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


class Twice(nn.Module):
    """A subnet that copies its input.

    A convolution may refuse this many elements, and may round one sample differently than many.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x), 1)


def test_more_elements_than_32_bits_count() -> None:
    """Batch offsets are 64-bit, so the last sample of 2.2e9 elements comes out as it does alone."""
    shape = (33, 1024, 256, 256)
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    block = (
        AllInOneBlock([shape[1:]], subnet_constructor=lambda i, o: Twice(), backend="triton")
        .cuda()
        .bfloat16()
    )
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        (y,), logdet = block([x])
        (expected,), expected_logdet = block([x[-1:].clone()])
        assert torch.equal(y[-1:], expected)
        assert torch.equal(logdet[-1:], expected_logdet)
        (back,), _ = block([y[-1:]], rev=True)
        assert (back - x[-1:]).abs().max() < 0.1
