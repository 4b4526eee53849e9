"""Test half_output: under autocast a chain's state stays in half precision, as in the stock one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastflow_kernels import AllInOneBlock, ReversibleSequence, accelerate, restore
from tests.support.blocks import through_a_file
from tests.support.cases import make_subnet
from tests.support.compare import assert_close
from tests.support.memory import bytes_kept_for_backward
from tests.support.peers import freia, freia_block
from tests.support.small_inputs import plain_and_fused

HALF = torch.bfloat16
SHAPE = (2, 7, 6, 5)


def stock_chain(depth: int = 3, **options: object) -> nn.Module:
    torch.manual_seed(0)
    chain: nn.Module = freia().framework.SequenceINN(*SHAPE[1:])
    for _ in range(depth):
        chain.append(freia_block(), subnet_constructor=make_subnet(2, 2.0), **options)
    return chain


def results(chain: nn.Module, x: Tensor, rev: bool = False) -> list[Tensor]:
    """Return z, the log-determinant and, forward, the gradients of x and the parameters."""
    x = x.clone().requires_grad_(not rev)
    with torch.autocast("cpu", HALF, enabled=x.dtype is torch.float32):
        z, log_det = chain(x, rev=rev)
    if rev:
        return [z, log_det]
    ((0.5 * z.to(x.dtype) ** 2).sum() - log_det.sum()).backward()
    found = [z, log_det, x.grad, *(p.grad for p in chain.parameters())]
    return [t.detach() for t in found if t is not None]


@plain_and_fused
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("options", [{}, {"gin_block": True}, {"reverse_permutation": True}])
@pytest.mark.usefixtures("small")
def test_results_are_as_accurate_as_the_stock_chains(options: dict[str, bool], rev: bool) -> None:
    stock = stock_chain(**options)
    truth = copy.deepcopy(stock).double()
    ours = accelerate(copy.deepcopy(stock), half_output=True)
    x = torch.randn(SHAPE)
    expected, baseline = results(truth, x.double(), rev), results(stock, x, rev)
    actual = results(ours, x, rev)
    # The stock inverse returns float32, too, unless a permutation comes last.
    assert actual[0].dtype is (torch.float32 if rev else HALF)
    assert rev or baseline[0].dtype is HALF
    assert actual[1].dtype is torch.float32
    for i, (t, wide, half) in enumerate(zip(actual, expected, baseline, strict=True)):
        # Everything is computed from values in half precision, whose rounding is the floor's unit.
        assert_close(t.to(HALF), wide, half.to(HALF), f"result {i}")


@pytest.mark.usefixtures("fused")
def test_half_of_the_bytes_are_kept() -> None:
    stock = stock_chain(depth=4)
    x = torch.randn(SHAPE)

    def kept(chain: nn.Module) -> int:
        subnets = [block.subnet for block in chain.module_list]

        def run() -> Tensor:
            with torch.autocast("cpu", HALF):
                return chain(x)[0].float().sum()

        return bytes_kept_for_backward(chain, run, subnets)

    wide = kept(accelerate(copy.deepcopy(stock)))
    half = kept(accelerate(copy.deepcopy(stock), half_output=True))
    # The first x is float32 in both. The other blocks keep two bytes less for each of its values.
    assert wide - half == 3 * x.numel() * 2


@plain_and_fused
@pytest.mark.usefixtures("small")
def test_without_autocast_nothing_changes() -> None:
    stock, x = stock_chain(), torch.randn(SHAPE)
    wide, half = (accelerate(copy.deepcopy(stock), half_output=flag) for flag in (False, True))
    for before, after in zip(wide(x), half(x), strict=True):
        assert torch.equal(before, after)


@plain_and_fused
@pytest.mark.usefixtures("small")
def test_a_block_of_ours_takes_the_option() -> None:
    block = AllInOneBlock([SHAPE[1:]], subnet_constructor=make_subnet(2, 2.0), half_output=True)
    x = torch.randn(SHAPE)
    assert block([x])[0][0].dtype is torch.float32
    with torch.autocast("cpu", HALF):
        (y,), log_det = block([x])
    assert y.dtype is HALF
    assert log_det.dtype is torch.float32


@pytest.mark.usefixtures("fused")
def test_the_option_survives_a_copy_and_can_be_taken_back() -> None:
    chain, x = accelerate(stock_chain(), half_output=True), torch.randn(SHAPE)

    def dtype(model: nn.Module) -> torch.dtype:
        with torch.autocast("cpu", HALF):
            return model(x)[0].dtype

    assert dtype(copy.deepcopy(chain)) is dtype(through_a_file(chain)) is HALF
    assert dtype(accelerate(chain)) is torch.float32
    assert dtype(restore(chain)) is HALF  # the stock blocks'


@plain_and_fused
@pytest.mark.usefixtures("small")
def test_autocast_leaves_float64_alone() -> None:
    chain, x = accelerate(stock_chain().double(), half_output=True), torch.randn(SHAPE).double()
    with torch.autocast("cpu", HALF):
        z, log_det = chain(x)
    assert z.dtype is log_det.dtype is torch.float64


def test_reversible_chains_refuse_it() -> None:
    chain = stock_chain()
    before = type(chain)
    with pytest.raises(ValueError, match="at most one of reversible and half_output"):
        accelerate(chain, reversible=True, half_output=True)
    assert type(chain) is before


def test_a_block_of_an_earlier_version_has_no_such_attribute() -> None:
    block = AllInOneBlock([SHAPE[1:]], subnet_constructor=make_subnet(2, 2.0))
    del block.half_output
    with torch.autocast("cpu", HALF):
        assert block([torch.randn(SHAPE)])[0][0].dtype is torch.float32


@pytest.mark.usefixtures("fused")
def test_a_reversible_chain_ignores_it_while_it_reconstructs() -> None:
    chain = ReversibleSequence(*SHAPE[1:])
    for _ in range(3):
        chain.append(AllInOneBlock, subnet_constructor=make_subnet(2, 2.0), half_output=True)
    with torch.autocast("cpu", HALF):
        z, log_det = chain(torch.randn(SHAPE))
    assert z.dtype is torch.float32
    (z.sum() - log_det.sum()).backward()
