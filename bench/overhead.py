"""Measure the Python overhead of one block on launch-bound inputs.

    python -m pytest bench/overhead.py

The driver does nothing, so the times hold everything except the GPU's work. The subnet returns a
stored tensor. A training step includes autograd's engine and the accumulation into ``.grad``. The
test ``test_autograd_alone`` shows how much these two take.

Compiled calls stand beside eager ones: each operator beside the launcher that it calls, and a chain
of 8 blocks. The chain's subnets really run, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.fastflow import SequenceFlow
from fastflow_kernels import AllInOneBlock, GLOWCouplingBlock, accelerate
from fastflow_kernels.coupling import Coupling, CouplingSpec, OutputGrads
from fastflow_kernels.engines import operator_constants
from fastflow_kernels.engines.available import triton_engine
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


def _measure(benchmark: Any, function: Callable[[], object], iterations: int = 200) -> None:
    for _ in range(50):  # compile and fill the caches
        function()
    benchmark.pedantic(function, rounds=60, iterations=iterations)


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


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mode", ["forward", "inverse", "train-step"])
def test_glow(benchmark: Any, mode: str, shape: tuple[int, ...]) -> None:
    """Time a GLOW block, which has two sides, so twice as many launches as the blocks above."""
    is_step = mode == "train-step"
    a = torch.randn(shape, requires_grad=is_step)  # C / 2 scales and as many shifts
    block = GLOWCouplingBlock(
        [shape[1:]], subnet_constructor=lambda *_: Stored(a), backend="triton"
    )
    x = torch.randn(shape, requires_grad=is_step)
    dy, dlogdet = torch.randn(shape), torch.randn(shape[0])

    def step() -> None:
        (y,), logdet = block([x])
        torch.autograd.backward([y, logdet], [dy, dlogdet])

    with torch.set_grad_enabled(is_step):
        _measure(benchmark, step if is_step else lambda: block([x], rev=mode == "inverse"))


# --- compiled calls -------------------------------------------------------------------------------


OPERATORS = (
    "coupling_forward",
    "coupling_backward",
    "invert_passive",
    "invert_active",
    "invert_and_backward",
)


def _launcher_and_operator(name: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return a call of an operator, and one of the launcher behind it with the same tensors."""
    batch, channels = SHAPES["rows"]
    x, y, a, dy = torch.randn(4, batch, channels)
    g, offset = torch.randn(2, channels)
    dlogdet, perm = torch.randn(batch), torch.randperm(channels)
    spec = CouplingSpec.of(2.0, "freia", "SOFTPLUS", False)
    coupling = Coupling(g, offset, spec, perm, torch.argsort(perm))
    engine, grads = triton_engine(), OutputGrads(dy, dlogdet)
    calls: dict[str, tuple[Callable[[], object], tuple[Any, ...]]] = {
        "coupling_forward": (partial(engine.forward, x, a, coupling), (x, a)),
        "coupling_backward": (
            partial(engine.backward, x, a, grads, coupling, True),
            (dy, dlogdet, x, a, True),
        ),
        "invert_passive": (partial(engine.invert_passive, y, coupling), (y,)),
        "invert_active": (partial(engine.invert_active, y, x, a, coupling), (y, x, a)),
        "invert_and_backward": (
            partial(engine.invert_and_backward, y, x, a, grads, coupling, True),
            (dy, dlogdet, y, x, a, True),
        ),
    }
    launcher, tensors = calls[name]
    operator = getattr(torch.ops.fastflow_kernels, name).default
    constants = operator_constants.encoded(coupling, by_pixels=False)
    return launcher, partial(operator, *tensors, g, offset, perm, coupling.inv, constants)


@pytest.mark.parametrize("how", ["launcher", "operator"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(benchmark: Any, name: str, how: str) -> None:
    launcher, operator = _launcher_and_operator(name)
    with torch.no_grad():
        _measure(benchmark, launcher if how == "launcher" else operator)


@pytest.mark.parametrize("how", ["eager", "together", "compiled"])
@pytest.mark.parametrize("mode", ["forward", "inverse", "train-step"])
@pytest.mark.parametrize("dialect", ["anomalib", "freia"])
def test_chain_of_8(benchmark: Any, mode: str, how: str, dialect: str) -> None:
    """Time 8 blocks of (4, 64) with linear subnets. Divide by 8 for one block.

    "together" is the chain after ``accelerate``, "eager" calls one block after the other.
    Dialect "freia" holds an index. That of "anomalib" holds a matrix, in which a graph looks for
    the index, here on the CPU.
    """
    shape = SHAPES["rows"]
    chain: Any = SequenceFlow(
        [
            AllInOneBlock(
                [shape[1:]], subnet_constructor=nn.Linear, dialect=dialect, backend="triton"
            )
            for _ in range(8)
        ]
    )
    if how == "together":
        accelerate(chain)
    if how == "compiled":
        torch._dynamo.reset()
        chain = torch.compile(chain, fullgraph=True, dynamic=False)
    x = torch.randn(shape, requires_grad=mode == "train-step")
    dz, dlogdet = torch.randn(shape), torch.randn(shape[0])

    def step() -> None:
        torch.autograd.backward(chain(x), [dz, dlogdet])

    if mode == "train-step":
        _measure(benchmark, step, 25)
        return
    with torch.no_grad():
        _measure(benchmark, lambda: chain(x, rev=mode == "inverse"), 25)
