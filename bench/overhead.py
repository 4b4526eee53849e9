"""Measure the Python overhead of one block on launch-bound inputs.

    python -m pytest bench/overhead.py

The driver does nothing, so the times hold everything except the GPU's work. The subnet returns a
stored tensor. A training step includes autograd's engine and the accumulation into ``.grad``. The
test ``test_autograd_alone`` shows how much these two take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastflow_kernels import AllInOneBlock
from tests.support.blocks import Stored

pytest.importorskip("triton")

# Small, because autograd's own additions really run, on the CPU.
SHAPES = {"rows": (4, 64), "planes": (1, 16, 4, 4)}


@pytest.fixture(autouse=True)
def _mock_gpu() -> Iterator[None]:
    from tests.support.mock_driver import mock_gpu

    with mock_gpu():
        yield


def _block(shape: tuple[int, ...], grad: bool, **options: Any) -> tuple[AllInOneBlock, Tensor]:
    a = torch.randn(shape, requires_grad=grad)
    block = AllInOneBlock(
        [shape[1:]], subnet_constructor=lambda *_: Stored(a), backend="triton", **options
    )
    return block, torch.randn(shape, requires_grad=grad)


def _measure(benchmark: Any, function: Callable[[], object]) -> None:
    for _ in range(50):  # compile and fill the caches
        function()
    benchmark.pedantic(function, rounds=60, iterations=200)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dialect", ["anomalib", "freia"])
def test_forward_without_gradients(benchmark: Any, shape: tuple[int, ...], dialect: str) -> None:
    block, x = _block(shape, False, dialect=dialect)
    with torch.no_grad():
        _measure(benchmark, lambda: block([x]))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dialect", ["anomalib", "freia"])
def test_forward_with_gradients(benchmark: Any, shape: tuple[int, ...], dialect: str) -> None:
    block, x = _block(shape, True, dialect=dialect)
    _measure(benchmark, lambda: block([x]))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dialect", ["anomalib", "freia"])
def test_train_step(benchmark: Any, shape: tuple[int, ...], dialect: str) -> None:
    block, x = _block(shape, True, dialect=dialect)
    dy, dlogdet = torch.randn(shape), torch.randn(shape[0])

    def step() -> None:
        (y,), logdet = block([x])
        torch.autograd.backward([y, logdet], [dy, dlogdet])

    _measure(benchmark, step)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_inverse(benchmark: Any, shape: tuple[int, ...]) -> None:
    block, x = _block(shape, False)
    with torch.no_grad():
        _measure(benchmark, lambda: block([x], rev=True))


def test_autograd_alone(benchmark: Any) -> None:
    """Time a product and its gradients for four leaves, as many as a block has.

    This is autograd's own part of a training step.
    """
    leaves = [torch.randn(2, 2, requires_grad=True) for _ in range(4)]
    dy = torch.randn(2, 2)

    def step() -> None:
        torch.autograd.backward([torch.addcmul(leaves[0], leaves[1], leaves[2]) + leaves[3]], [dy])

    _measure(benchmark, step)


class _EmptyFunction(torch.autograd.Function):
    """A Function that takes, saves and returns as many tensors as a block, and computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, x2: Tensor, a: Tensor, g: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x1, x2, a, g, offset)
        return torch.empty_like(a), torch.empty(a.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlogdet: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train-step"])
def test_function_alone(benchmark: Any, backward: bool) -> None:
    """Time an empty Function with a block's inputs and outputs, and the split of x before it.

    This is the least that a block with an autograd Function of its own can take.
    """
    shape = SHAPES["rows"]
    x, a = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    g, offset = torch.randn(shape[1], requires_grad=True), torch.randn(shape[1], requires_grad=True)
    dy, dlogdet = torch.randn(shape), torch.randn(shape[0])

    def step() -> None:
        y, logdet = _EmptyFunction.apply(
            *torch.split_with_sizes(x, (shape[1] - shape[1] // 2, shape[1] // 2), 1), a, g, offset
        )
        if backward:
            torch.autograd.backward([y, logdet], [dy, dlogdet])

    _measure(benchmark, step)
