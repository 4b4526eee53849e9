"""Test the reference against the stock blocks.

Results must agree to the last bits of float64, and state dicts and random draws exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from reference import AllInOneBlock
from tests.support.cases import (
    CASES,
    Case,
    both_directions,
    ids,
    make_block,
    make_input,
    make_subnet,
)
from tests.support.peers import anomalib_block
from tests.support.stock_blocks import released, stock_block

pytestmark = pytest.mark.peers

# Both peers have the formula of dialect "anomalib". FrEIA's main branch, with dialect "freia", has
# never been released.
cases = [case for case in CASES if case.dialect == "anomalib"]

EPS = torch.finfo(torch.float64).eps


def assert_last_bits(
    actual: torch.Tensor, expected: torch.Tensor, terms: int, name: str, magnitude: float = 1.0
) -> None:
    """Assert that results are equal except for the order of a sum.

    The tolerance is 4 + sqrt(terms) roundings of the largest magnitude.

    Args:
        actual: The reference's result in float64.
        expected: The stock block's result in float64.
        terms: Number of terms of the sum.
        name: Name of the result, for messages.
        magnitude: Size of the terms, if they are larger than the sum.
    """
    assert actual.shape == expected.shape, name
    assert actual.dtype == expected.dtype == torch.float64, name
    if expected.numel() == 0:
        return
    difference = (actual - expected).abs().max().item()
    allowed = (4 + terms**0.5) * EPS * max(expected.abs().max().item(), magnitude)
    assert difference <= allowed, f"{name}: {difference:.3g} > {allowed:.3g}"


def pair(peer: Callable[[], type], case: Case) -> tuple[nn.Module, AllInOneBlock]:
    """Return a stock block, and a reference that has loaded its state dict strictly."""
    stock = stock_block(peer, case, seed=0)
    block = make_block(AllInOneBlock, case, seed=9)
    block.load_state_dict(stock.state_dict(), strict=True)
    return stock, block


def keep_householder_matrices(block: nn.Module) -> list[torch.Tensor]:
    """Make a block keep each matrix that it builds from its reflections, with its gradient."""
    kept, construct = [], block._construct_householder_permutation

    def build() -> torch.Tensor:
        kept.append(construct())
        kept[-1].retain_grad()
        return kept[-1]

    block._construct_householder_permutation = build
    return kept


@released
@both_directions
@pytest.mark.parametrize("case", cases, ids=ids(cases))
def test_values_and_gradients_equal(case: Case, rev: bool, peer: Callable[[], type]) -> None:
    stock, block = pair(peer, case)
    x, c = make_input(case)
    results, matrices = [], keep_householder_matrices(stock)
    for b in (stock, block):
        xs = x.clone().requires_grad_()
        cs = [t.clone().requires_grad_() for t in c]
        (y,), log_det = b([xs], cs, rev=rev)
        weights = torch.randn(
            y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
        )
        ((y * weights).sum() + (log_det * torch.arange(1.0, len(x) + 1)).sum()).backward()
        result = {
            "y": y,
            "log_det": log_det,
            "x.grad": xs.grad,
            **{f"c{i}.grad": t.grad for i, t in enumerate(cs)},
        }
        results.append(result | {f"{name}.grad": p.grad for name, p in b.named_parameters()})
    expected, actual = results
    assert actual.keys() == expected.keys()
    # dH/dv of a unit vector v has terms of up to 2 + 2 + 4 that cancel. They cancel entirely with
    # one channel, where H = -1.
    terms_of_vk = 8 * sum(w.grad.norm().item() for w in matrices)
    # GIN's log-determinant is 0: a sum of log-factors of up to the clamp each, whose partial sums
    # grow like a random walk.
    terms_of_logdet = stock.clamp * x.numel() ** 0.5 if stock.GIN else 0.0
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        else:
            terms = terms_of_vk if "vk" in name else terms_of_logdet if name == "log_det" else 0.0
            assert_last_bits(actual[name], value, x.numel(), name, magnitude=max(1.0, terms))
    assert actual["x.grad"].abs().sum() > 0


@released
@pytest.mark.parametrize("case", cases, ids=ids(cases))
def test_state_dict_loads_both_ways(case: Case, peer: Callable[[], type]) -> None:
    stock, block = pair(peer, case)
    expected, actual = stock.state_dict(), block.state_dict()
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value), key
    state = make_block(AllInOneBlock, case, seed=11).state_dict()
    stock.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in stock.state_dict().items())
    named = {name: p.requires_grad for name, p in stock.named_parameters()}
    assert {name: p.requires_grad for name, p in block.named_parameters()} == named
    assert list(dict(block.named_parameters())) == list(named)


# The stock blocks draw a rotation from NumPy's generator.
seeded = [case for case in cases if not case.options.get("permute_soft")]


@pytest.mark.parametrize("case", seeded, ids=ids(seeded))
@pytest.mark.parametrize("init", [None, 0.01, 0.37, 3.3])
def test_same_seed_gives_anomalibs_block(case: Case, init: float | None) -> None:
    options = case.options if init is None else {**case.options, "global_affine_init": init}
    blocks, states = [], []
    for cls in (anomalib_block(), AllInOneBlock):
        torch.manual_seed(17)
        blocks.append(
            cls(case.dims_in, case.dims_c, subnet_constructor=make_subnet(case.rank), **options)
        )
        states.append(torch.random.get_rng_state())
    expected, actual = (block.state_dict() for block in blocks)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value), key
    assert torch.equal(*states)


DOCUMENTED = [
    "in_channels",
    "splits",
    "clamp",
    "GIN",
    "householder",
    "reverse_pre_permute",
    "conditional",
    "condition_channels",
]
DOCUMENTED += ["input_rank", "sum_dims", "last_jac", "dims_in", "dims_c"]


@released
def test_documented_attributes_are_there(peer: Callable[[], type]) -> None:
    stock, block = pair(peer, next(case for case in cases if case.name == "hh3-rev-cond"))
    for name in DOCUMENTED:
        assert getattr(block, name) == getattr(stock, name), name
    assert block.output_dims([(1, 2)]) == stock.output_dims([(1, 2)])
    x = torch.randn(3)
    assert torch.equal(block.global_scale_activation(x), stock.global_scale_activation(x))
