"""Test that the constructor refuses bad options before it builds anything, and extreme options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import reference
from fastflow_kernels import AllInOneBlock
from tests.support.blocks import Counting, permutation_of
from tests.support.cases import (
    both_dialects,
    make_subnet,
)

pytestmark = pytest.mark.usefixtures("fused")


# Options, exception, and a pattern of the message (what was expected, and what came), by name.
BAD_OPTIONS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no subnet": (
        {"subnet_constructor": None},
        ValueError,
        "expected a subnet_constructor.*got None",
    ),
    "subnet not callable": (
        {"subnet_constructor": 3},
        TypeError,
        "subnet_constructor.*callable.*got int",
    ),
    "subnet, not its constructor": (
        {"subnet_constructor": nn.Linear(2, 4)},
        TypeError,
        "subnet_constructor.*callable.*got Linear",
    ),
    "dialect": ({"dialect": "FrEIA"}, ValueError, "dialect.*anomalib.*freia.*got 'FrEIA'"),
    "dialect none": ({"dialect": None}, ValueError, "dialect.*anomalib.*freia.*got None"),
    "backend": ({"backend": "cuda"}, ValueError, "backend.*auto.*eager.*triton.*got 'cuda'"),
    "backend type": ({"backend": None}, TypeError, "backend.*auto.*eager.*triton.*got NoneType"),
    "affine type": (
        {"global_affine_type": "softplus"},
        ValueError,
        "global_affine_type.*SIGMOID.*SOFTPLUS.*EXP.*got 'softplus'",
    ),
    "affine type none": (
        {"global_affine_type": None},
        ValueError,
        "global_affine_type.*SIGMOID.*SOFTPLUS.*EXP.*got None",
    ),
    "init type": (
        {"global_affine_init": "one"},
        TypeError,
        "global_affine_init.*number.*got 'one'",
    ),
    "clamp type": ({"affine_clamping": "two"}, TypeError, "affine_clamping.*number.*got 'two'"),
    "clamp none": ({"affine_clamping": None}, TypeError, "affine_clamping.*number.*got None"),
    "clamp 0 in freia": (
        {"affine_clamping": 0.0, "dialect": "freia"},
        ValueError,
        "affine_clamping=0.*zero.*freia",
    ),
    "householder -1": (
        {"learned_householder_permutation": -1},
        ValueError,
        "learned_householder_permutation.*got -1",
    ),
    "householder 1.5": (
        {"learned_householder_permutation": 1.5},
        (TypeError, ValueError),
        "learned_householder_permutation.*got 1.5",
    ),
    "householder True": (
        {"learned_householder_permutation": True},
        TypeError,
        "learned_householder_permutation.*integer.*got True",
    ),
    "5 dimensions": (
        {"dims_in": [(4, 2, 2, 2, 2)]},
        ValueError,
        r"rank 0 to 3.*got dims_in \[\(4, 2, 2, 2, 2\)\]",
    ),
    "no dimension": ({"dims_in": [()]}, ValueError, r"dims_in.*got \[\(\)\]"),
    "half a pixel": (
        {"dims_in": [(4, 2.5)]},
        TypeError,
        r"dims_in as a list of shapes.*got \[\(4, 2.5\)\]",
    ),
    "text": ({"dims_in": ["4"]}, TypeError, "dims_in as a list of shapes.*got"),
    "negative size": ({"dims_in": [(4, -1)]}, ValueError, r"no negative size.*\(4, -1\)"),
    "no channel": ({"dims_in": [(0, 2)]}, ValueError, r"at least one channel.*\(0, 2\)"),
    "negative channels": ({"dims_in": [(-4,)]}, ValueError, r"at least one channel.*\(-4,\)"),
    "two inputs": ({"dims_in": [(4,), (4,)]}, ValueError, "one shape.*got 2"),
    "no input": ({"dims_in": []}, ValueError, "one shape.*got 0"),
    "a shape, not a list": (
        {"dims_in": (4, 8, 8)},
        TypeError,
        r"dims_in as a list of shapes.*got \(4, 8, 8\)",
    ),
    "a number, not a list": ({"dims_in": 4}, TypeError, "dims_in as a list of shapes.*got 4"),
    "condition": (
        {"dims_c": [(4, 2)]},
        ValueError,
        r"conditions.*spatial shape \(\).*got dims_c \[\(4, 2\)\]",
    ),
    "second condition": (
        {"dims_c": [(4,), (4, 2)]},
        ValueError,
        r"conditions.*spatial shape.*\(4, 2\)",
    ),
    "condition, not a list": (
        {"dims_c": (4,)},
        TypeError,
        r"dims_c as a list of shapes.*got \(4,\)",
    ),
    "condition without a shape": (  # SequenceINN.append(block, cond=0)
        {"dims_c": [None]},
        TypeError,
        r"got \[None\]: append\(block, cond=0, cond_shape=\(8,\)\) needs both",
    ),
}
for activation in ("SIGMOID", "SOFTPLUS", "EXP"):
    for value in (
        0.0,
        -1.0,
        math.nan,
        math.inf,
        -math.inf,
        *([10.0, 10.5] if activation == "SIGMOID" else []),
    ):
        options = {"global_affine_init": value, "global_affine_type": activation}
        BAD_OPTIONS[f"{activation} {value}"] = (
            options,
            ValueError,
            rf"global_affine_init in \(0, .*{activation}.*got {value}",
        )
for value in (math.nan, math.inf, -math.inf):
    BAD_OPTIONS[f"clamp {value}"] = (
        {"affine_clamping": value},
        ValueError,
        f"finite affine_clamping, got {value}",
    )


@pytest.mark.parametrize("bad", BAD_OPTIONS, ids=[name.replace(" ", "_") for name in BAD_OPTIONS])
def test_constructor_refuses(bad: str) -> None:
    options, error, match = BAD_OPTIONS[bad]
    built = []
    good = {"dims_in": [(4,)], "subnet_constructor": lambda *sizes: built.append(sizes)}
    state = torch.random.get_rng_state()
    with pytest.raises(error, match=match):
        AllInOneBlock(**{**good, **options})
    assert not built, "a subnet was built"
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers were drawn"


def test_constructor_refuses_a_subnet_that_is_none() -> None:
    with pytest.raises(TypeError, match="subnet_constructor to return a module, got NoneType"):
        AllInOneBlock([(4,)], subnet_constructor=lambda i, o: None)  # type: ignore[return-value]


@pytest.mark.parametrize("value", ["2", None, [1]])
def test_constructor_refuses_reflections_that_are_no_number(value: Any) -> None:
    state = torch.random.get_rng_state()
    with pytest.raises((TypeError, ValueError)):
        AllInOneBlock([(4,)], subnet_constructor=Counting, learned_householder_permutation=value)
    assert torch.equal(torch.random.get_rng_state(), state), "random numbers were drawn"


@both_dialects
@pytest.mark.parametrize(
    ("activation", "init"),
    [("EXP", 1e39), ("EXP", 1e-50), ("SIGMOID", 1e-40), ("SIGMOID", 9.999999), ("SOFTPLUS", 1e-12)],
)
def test_extreme_initial_scale_is_finite(activation: str, init: float, dialect: str) -> None:
    """The initial scale is allowed, but the stock block's formula overflows in float32.

    The result must never be a silent infinity.
    """
    options = {"global_affine_init": init, "global_affine_type": activation, "dialect": dialect}
    block, stock = (
        cls([(3,)], [], make_subnet(0), **options)
        for cls in (AllInOneBlock, reference.AllInOneBlock)
    )
    assert block.global_scale.isfinite().all()
    # The tolerance is a few float32 roundings.
    assert (block.global_scale / stock.global_scale - 1).abs().max() < 1e-6


def test_zero_clamp_is_additive_coupling() -> None:
    block = AllInOneBlock(
        [(6, 3)], subnet_constructor=make_subnet(1), affine_clamping=0.0, gin_block=True
    ).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    (y,), logdet = block([x])
    a = block.subnet(x[:, :3])
    expected = torch.cat((x[:, :3], x[:, 3:] + 0.1 * a[:, 3:]), 1)[:, permutation_of(block)]
    assert torch.equal(logdet, torch.zeros(2, dtype=torch.float64))
    assert (y - expected).abs().max() <= 4 * torch.finfo(torch.float64).eps * expected.abs().max()
    expected_grad = torch.autograd.grad(expected.square().sum(), x, retain_graph=True)[0]
    grad = torch.autograd.grad(y.square().sum(), x)[0]
    assert (grad - expected_grad).abs().max() <= 16 * torch.finfo(
        torch.float64
    ).eps * expected_grad.abs().max()
    (back,), _ = block([y], rev=True)
    assert (back - x).abs().max() <= 16 * torch.finfo(torch.float64).eps * y.abs().max()
