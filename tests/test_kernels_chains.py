"""Test chains of blocks on the Triton kernels, which hand each other their activations in halves.

Run the tests as tests/test_kernels.py says.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from fastflow_kernels import AllInOneBlock, accelerate
from tests.support.compare import assert_close
from tests.support.kernels import (  # noqa: F401  (fixtures)
    default_device,
    kernels_run,
    not_interpreted,
    on_this_machine,
    shapes,
    without_a_gpu,
)
from tests.support.peers import freia

pytestmark = [*on_this_machine, pytest.mark.usefixtures("fused")]

BLOCKS = 3


def build(shape: tuple[int, ...], blocks: int, subnet: Callable[[int, int], nn.Module]) -> Any:
    torch.manual_seed(0)
    chain = freia().framework.SequenceINN(*shape[1:])
    for _ in range(blocks):
        chain.append(AllInOneBlock, subnet_constructor=subnet, backend="triton")
    with torch.no_grad():
        for block in chain.module_list:
            block.global_offset.normal_()
            block.global_scale.add_(torch.randn_like(block.global_scale))
    return accelerate(chain)


def subnet_for(shape: tuple[int, ...]) -> Callable[[int, int], nn.Module]:
    if len(shape) == 2:
        return nn.Linear
    return lambda i, o: nn.Conv2d(i, o, 3, padding=1)


def with_backend(chain: nn.Module, backend: str) -> Any:
    chain = copy.deepcopy(chain)
    for block in chain.modules():
        if isinstance(block, AllInOneBlock):
            block.backend = backend
    return chain


def results(chain: nn.Module, x: Tensor, wants: str) -> dict[str, Tensor | None]:
    chain.zero_grad()
    x = x.clone().requires_grad_("x" in wants)
    z, log_det = chain(x)
    found = {"z": z, "log_det": log_det}
    weights = torch.linspace(-1.0, 1.0, z.numel(), dtype=z.dtype, device=z.device).view(z.shape)
    loss = (z * weights).sum() * ("z" in wants)
    if "l" in wants:
        loss = loss - (log_det * torch.arange(1, len(x) + 1, device=z.device)).sum()
    loss.backward()
    return found | {"dx": x.grad} | {name: p.grad for name, p in chain.named_parameters()}


@shapes((3, 7, 4, 5), (2, 2, 3, 3), (1, 8, 4, 4), (5, 9), (3, 6, 1, 1))
@pytest.mark.parametrize("wants", ["xzl", "zl", "xz", "l"])
def test_parity_of_a_chain(shape: tuple[int, ...], wants: str) -> None:
    chain = build(shape, BLOCKS, subnet_for(shape))
    x = torch.randn(shape)
    actual = results(chain, x, wants)
    plain = with_backend(chain, "eager")
    plain.__class__ = freia().framework.SequenceINN  # block by block
    baseline = results(plain, x, wants)
    truth = results(with_backend(plain, "eager").double(), x.double(), wants)
    for name, t in actual.items():
        assert_close(t, truth[name], baseline[name], name)


@shapes((3, 7, 4, 5), (5, 9))
def test_without_gradients(shape: tuple[int, ...]) -> None:
    chain = build(shape, BLOCKS, subnet_for(shape))
    x = torch.randn(shape)
    with_gradients = chain(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for t, expected in zip(chain(x), with_gradients, strict=True):
                assert torch.equal(t, expected.detach())


@shapes((3, 7, 4, 5))
def test_subnets_get_a_contiguous_half(shape: tuple[int, ...]) -> None:
    """A convolution would copy another one."""
    chain = build(shape, BLOCKS, subnet_for(shape))
    contiguous: list[bool] = []
    for block in chain.module_list:
        block.subnet.register_forward_pre_hook(lambda _, x: contiguous.append(x[0].is_contiguous()))
    for with_gradients in (True, False):
        contiguous.clear()
        with torch.set_grad_enabled(with_gradients):
            chain(torch.randn(shape))
        assert contiguous == [True, True, True]


class _Moved(TorchDispatchMode):
    """A mode that counts the bytes that torch's operations read and write. Views move none."""

    bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = function(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        memory = {t.untyped_storage().data_ptr() for t in inputs}
        is_view = not function._schema.is_mutable and all(
            t.untyped_storage().data_ptr() in memory for t in outputs
        )
        if not is_view and "empty" not in str(function):
            self.bytes += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        return result


@not_interpreted
@without_a_gpu
def test_nothing_moves_between_the_kernels_and_the_subnets() -> None:
    """A training step of 8 FastFlow blocks. The kernels' own bytes: tests/test_kernels_traffic.py.

    The kernels do not run, so that all bytes counted are moved by torch's operations. Those of the
    subnets, with the same inputs, are taken off.
    """
    from tests.support.mock_driver import mock_gpu

    shape, blocks = (2, 16, 32, 32), 8
    chain = build(shape, blocks, lambda i, o: nn.Conv2d(i, o, 1))
    one_by_one = copy.deepcopy(chain)
    one_by_one.__class__ = freia().framework.SequenceINN
    x, half = torch.randn(shape), torch.randn(shape[0], shape[1] // 2, *shape[2:])
    dz, dlog_det = torch.randn(shape), torch.randn(shape[0])

    def subnets_alone() -> None:
        for i, block in enumerate(chain.module_list):
            a = block.subnet(half.detach().requires_grad_(i > 0))
            torch.autograd.backward(a, dz)

    def moved(run: Callable[[], None]) -> float:
        """Return the bytes that a run moves, in N for each block."""
        run()  # the kernels are compiled, and the parameters have gradients
        gc.collect()
        with _Moved() as mode:
            run()
        return mode.bytes / blocks / x.nbytes

    with mock_gpu():
        of_subnets = moved(subnets_alone)
        together = moved(lambda: torch.autograd.backward(chain(x), [dz, dlog_det]))
        apart = moved(lambda: torch.autograd.backward(one_by_one(x), [dz, dlog_det]))
    print(f"beside the subnets: together {together - of_subnets:.4f} N for each block and step")
    print(f"one by one {apart - of_subnets:.4f} N")
    # The first passive half is copied, because it is a view of x.
    assert together - of_subnets <= 1 / blocks + 0.02
    # One by one the two gradients of the passive half are added, which moves 1.5 N. The first block
    # has none.
    assert apart - of_subnets >= 1.5 * (blocks - 1) / blocks
