"""Side effects: names that are added, memory that is needed, the order of gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastflow_kernels import AllInOneBlock, ReversibleSequence, accelerate, report
from fastflow_kernels.accelerated import (
    AcceleratedBlock,
    AcceleratedChain,
    AcceleratedSequence,
)
from fastflow_kernels.chain import FusedChain
from fastflow_kernels.reversible import ReversibleChain
from tests.support.memory import Peak
from tests.support.peers import freia_block

pytestmark = pytest.mark.usefixtures("fused")

OPTIONS: dict[str, dict[str, Any]] = {
    "hard": {},
    "soft": {"permute_soft": True},
    "householder": {"learned_householder_permutation": 2},
    "reverse": {"reverse_permutation": True},
    "soft-reverse": {"permute_soft": True, "reverse_permutation": True},
}
each_permutation = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def public_names(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def test_accelerated_classes_add_no_public_names() -> None:
    """They would hide those of a user's subclass."""
    assert public_names(AcceleratedBlock) - public_names(nn.Module) == {
        name for name in AcceleratedBlock.__annotations__ if not name.startswith("_")
    } & public_names(AcceleratedBlock)
    assert public_names(AcceleratedSequence) == public_names(FusedChain) == {"forward"}
    assert public_names(AcceleratedChain) == public_names(ReversibleChain)


@pytest.mark.peers
def test_names_of_a_subclass_stay_its_own() -> None:
    stock: Any = freia_block()

    class Mine(stock):
        prefix, stock_type, own_attributes = "mine", "AAPL", ()

        def takes_link(self) -> str:
            return self.prefix

    block = Mine([(4,)], subnet_constructor=nn.Linear)
    accelerate(block)
    assert (block.takes_link(), block.stock_type, block.own_attributes) == ("mine", "AAPL", ())
    assert report(block).entries[0].kind.endswith("Mine")


def test_report_asks_nothing_of_classes_that_are_not_blocks() -> None:
    class Other(nn.Module):
        stock_type = _fastflow_stock = "AAPL"

    assert report(nn.Sequential(Other())).entries == ()


@pytest.mark.parametrize("rows", [4, 20000], ids=["small", "large"])
@pytest.mark.parametrize("gradients", [False, True])
def test_data_wider_than_a_soft_permutation(rows: int, gradients: bool) -> None:
    class Narrow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.weight.dtype))

    block = AllInOneBlock([(8,)], subnet_constructor=Narrow, permute_soft=True)
    x = torch.randn(rows, 8, dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        (y,), _ = block([x])
    (expected,), _ = block.double()([x])
    assert y.dtype is torch.float64
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def peak_of(call: Any) -> float:
    with Peak() as peak:
        call()
    return peak.most


@each_permutation
def test_the_backward_of_a_chain_needs_the_same_whatever_the_permutation(
    options: dict[str, Any],
) -> None:
    """The memory is counted in inputs; 1.5 and the thin matrices are allowed.

    A product makes new tensors, which are freed before the subnet's backward. Otherwise 2 more
    would be alive while that runs.
    """
    shape = (64, 32, 32)

    def peak(options: dict[str, Any]) -> float:
        chain = ReversibleSequence(*shape)
        for _ in range(3):
            chain.append(AllInOneBlock, subnet_constructor=Twice, **options)
        x = torch.randn(4, *shape, requires_grad=True)
        z, log_det = chain(x)
        return peak_of((z.square().sum() - log_det.sum()).backward) / x.nbytes

    assert peak(options) <= peak({}) + 1.6


@each_permutation
def test_the_backward_needs_the_same_whatever_the_layout(options: dict[str, Any]) -> None:
    """The memory is counted in inputs; a copy in another layout would be 1 more.

    Channels-last has a log-determinant for each pixel, which is 1/64 of an input of 64 channels.
    Twice that is allowed.
    """

    def peak(layout: torch.memory_format) -> float:
        block = AllInOneBlock([(64, 32, 32)], subnet_constructor=Twice, **options)
        x = torch.randn(4, 64, 32, 32).contiguous(memory_format=layout).requires_grad_()
        (y,), log_det = block([x])
        return peak_of((y.square().sum() - log_det.sum()).backward) / x.nbytes

    assert peak(torch.channels_last) <= peak(torch.contiguous_format) + 1 / 32


class Twice(nn.Module):
    """A subnet that needs one tensor of its output's size in its backward pass."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.count, self.weight = channels_out, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.cat((x, x), 1)[:, : self.count]


def test_gradients_of_reflections_come_before_the_subnets() -> None:
    block = AllInOneBlock([(64,)], subnet_constructor=nn.Linear, learned_householder_permutation=2)
    order: list[str] = []
    for name, p in block.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    (y,), log_det = block([torch.randn(100, 64)])
    (y.sum() + log_det.sum()).backward()
    assert order.index("vk_householder") < order.index("subnet.weight")


def test_a_chain_reads_a_blocks_subnet_when_it_runs() -> None:
    chain = ReversibleSequence(6)
    for _ in range(3):
        chain.append(AllInOneBlock, subnet_constructor=nn.Linear)
    replacement = nn.Linear(3, 6)
    chain[1].register_forward_pre_hook(lambda block, _: setattr(block, "subnet", replacement))
    z, log_det = chain(torch.randn(20, 6))
    loss = z.square().sum() - log_det.sum()
    assert torch.autograd.grad(loss, replacement.weight)[0].abs().max() > 0


def test_a_shallow_copy_of_a_chain_has_its_own_spacing() -> None:
    chain = ReversibleSequence(6)
    chain.checkpoint_every = 4
    copied = copy.copy(chain)
    copied.checkpoint_every = 2
    assert (chain.checkpoint_every, copied.checkpoint_every) == (4, 2)


def test_a_parametrization_is_computed_once_a_call() -> None:
    calls: list[int] = []

    class Counted(nn.Module):
        def forward(self, g: Tensor) -> Tensor:
            calls.append(1)
            return g

    block = AllInOneBlock([(6,)], subnet_constructor=nn.Linear)
    parametrize.register_parametrization(block, "global_scale", Counted())
    calls.clear()
    block([torch.randn(20, 6)])
    assert len(calls) == 1
    calls.clear()
    block.load_state_dict(block.state_dict())
    assert not calls
