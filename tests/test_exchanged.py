"""Something that a stock block reads may be exchanged after accelerate, and takes effect.

The fused block honours it, or the stock maths runs.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastflow_kernels import accelerate, report, restore
from tests.support.cases import Case, make_block, make_input
from tests.support.pairs import (
    SHAPE,
    Exp,
    assert_same,
    pair,
    peers,
    setting,
    state_of,
    with_softplus,
)
from tests.support.peers import anomalib_block, freia_block
from tests.support.stock_blocks import released

pytestmark = pytest.mark.usefixtures("fused")


# --- on the block ---------------------------------------------------------------------------------


class Flip(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return x.flip(1)


def double(x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
    return (x / 2.0 if rev else 2.0 * x), 0.1 * a.flatten(1).sum(1)


EXCHANGES: dict[str, Callable[[nn.Module], object]] = {
    "permute_function": setting("permute_function", lambda x, w: x),
    "permute_function, a module": setting("permute_function", Flip()),
    "GIN": lambda block: setattr(block, "GIN", not block.GIN),
    "GIN, a tensor": setting("GIN", torch.tensor(True)),
    "reverse_pre_permute": lambda block: setattr(
        block, "reverse_pre_permute", not block.reverse_pre_permute
    ),
    "householder, more": setting("householder", 5),
    "householder, none": setting("householder", 0),
    "splits": setting("splits", [4, 2]),
    "splits in place": lambda block: block.splits.__setitem__(slice(None), [4, 2]),
    "sum_dims": setting("sum_dims", (2,)),
    "in_channels": setting("in_channels", 5),
    "input_rank": setting("input_rank", 2),
    "conditional": lambda block: setattr(block, "conditional", not block.conditional),
    "condition_channels": setting("condition_channels", 99),
    "dims_c": setting("dims_c", [(99, 4)]),
    "activation": setting("global_scale_activation", torch.exp),
    "activation, a module": setting("global_scale_activation", Exp()),
    "_affine": setting("_affine", double),
    "_permute": setting("_permute", lambda x, rev=False: (x.flip(1), x.mean())),
    "_pre_permute": setting("_pre_permute", lambda x, rev=False: x.flip(1)),
    "_construct_householder_permutation": setting(
        "_construct_householder_permutation",
        lambda: torch.eye(6, dtype=torch.float64).flip(0)[..., None],
    ),
}
CASES = ["hard", "gin", "soft-rev-exp", "hh3-rev-cond"]


@peers
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_what_is_exchanged_on_the_block_takes_effect(
    exchange: str, name: str, peer: Callable[[], Any]
) -> None:
    block, stock = pair(peer, name)
    for b in (block, stock):
        EXCHANGES[exchange](b)
    assert_same(block, stock, name)
    copied = copy.deepcopy(block)
    assert_same(copied, stock, name)
    before = dict(vars(block))
    restore(block)
    assert vars(block).keys() == before.keys() - {"_fastflow"}
    assert_same(block, stock, name)


CLAMPS: dict[str, Any] = {
    "integer": 3,
    "float": 0.7,
    "negative": -1.3,
    "zero": 0,
    "bool": True,
    "float32 of NumPy": np.float32(1.9),
    "float64 of NumPy": np.float64(1.9),
    "infinite": float("inf"),
    "nan": float("nan"),
    "tensor": torch.tensor(1.2, dtype=torch.float64),
    "vector": torch.linspace(1.0, 2.0, 3, dtype=torch.float64)[:, None],
}


@peers
@pytest.mark.parametrize("clamp", CLAMPS)
def test_another_clamp(clamp: str, peer: Callable[[], Any]) -> None:
    block, stock = pair(peer)
    block.clamp = stock.clamp = CLAMPS[clamp]
    assert_same(block, stock)
    if clamp in ("integer", "float", "negative", "bool") or "NumPy" in clamp:
        assert state_of(block) == "accelerated"
    block.clamp = stock.clamp = 1.4
    assert state_of(block) == "accelerated"
    assert_same(block, stock)


@peers
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_clamp_that_becomes_a_parameter_and_a_number_again(
    kind: str, peer: Callable[[], Any]
) -> None:
    block, stock = pair(peer)
    for b in (block, stock):
        del b.clamp
        value = torch.tensor(1.2, dtype=torch.float64)
        if kind == "parameter":
            b.clamp = nn.Parameter(value)
        else:
            b.register_buffer("clamp", value)
    assert "its clamp has changed" in report(block).entries[0].reason
    assert_same(block, stock)
    for b in (block, stock):
        del b.clamp
    assert_same(block, stock)  # both raise
    block.clamp = stock.clamp = 1.4
    assert state_of(block) == "accelerated"
    assert_same(block, stock)


def _learned_beta(block: nn.Module) -> None:
    del block.softplus.beta
    block.softplus.beta = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))


SOFTPLUS: dict[str, Callable[[nn.Module], object]] = {
    "beta": lambda block: setattr(block.softplus, "beta", 1.0),
    "beta, a tensor": lambda block: setattr(
        block.softplus, "beta", torch.tensor(0.5, dtype=torch.float64)
    ),
    "beta, a parameter": _learned_beta,
    "threshold": lambda block: setattr(block.softplus, "threshold", 0.1),
    "module": setting("softplus", nn.ELU(2.0)),
    "another softplus": lambda block: setattr(block, "softplus", nn.Softplus(beta=2.0)),
    "forward": lambda block: setattr(block.softplus, "forward", torch.exp),
    "hook": lambda block: block.softplus.register_forward_hook(lambda module, args, out: 2.0 * out),
    "gone": lambda block: delattr(block, "softplus"),
}


@with_softplus
@pytest.mark.parametrize("exchange", SOFTPLUS)
def test_what_the_activation_reads(exchange: str, peer: Callable[[], Any]) -> None:
    block, stock = pair(peer)
    for b in (block, stock):
        SOFTPLUS[exchange](b)
    assert state_of(block) == "stock maths"
    assert_same(block, stock)
    # A copy of FrEIA 0.2's block keeps reading the softplus of the block that it was copied from.
    if exchange != "gone":
        assert_same(copy.deepcopy(block), copy.deepcopy(stock))
    for b in (block, stock):
        b.softplus = nn.Softplus(beta=0.5)
    assert state_of(block) == "accelerated"
    assert_same(block, stock)


@pytest.mark.peers
def test_softplus_of_a_block_that_was_copied_before() -> None:
    """FrEIA 0.2's activation is a lambda, which a copy shares with the block that made it."""
    first, stock = (
        make_block(freia_block(), Case(SHAPE, "hard"), torch.float64, 3) for _ in range(2)
    )
    block = copy.deepcopy(first)
    stock.load_state_dict(block.state_dict())
    accelerate(block)
    block.softplus.beta = 3.0  # nothing reads it
    assert state_of(block) == "accelerated"
    assert_same(block, stock)
    first.softplus.beta = stock.softplus.beta = 3.0
    assert state_of(block) == "stock maths"
    assert_same(block, stock)


# --- on the class ---------------------------------------------------------------------------------

STEPS: dict[str, Callable[..., Any]] = {
    "_affine": lambda self, x, a, rev=False: double(x, a, rev),
    "_permute": lambda self, x, rev=False: (x.flip(1), x.mean()),
    "_pre_permute": lambda self, x, rev=False: x.flip(1),
    "_construct_householder_permutation": lambda self: torch.eye(6, dtype=torch.float64).flip(0)[
        ..., None
    ],
    "forward": lambda self, x, c=(), rev=False, jac=True: ((2.0 * x[0],), x[0].flatten(1).sum(1)),
}


@peers
@pytest.mark.parametrize("name", ["hard", "soft-rev-exp", "hh3-rev-cond"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_patched_on_the_class_takes_effect(
    step: str, name: str, peer: Callable[[], Any]
) -> None:
    block, stock = pair(peer, name)
    with mock.patch.object(type(stock), step, STEPS[step]):
        assert report(block).entries[0].reason == f"its {step} has changed since it was accelerated"
        assert_same(block, stock, name)
        copied = copy.deepcopy(block)
        assert_same(copied, stock, name)
        through_pickle = (
            pickle.loads(pickle.dumps(block)) if peer in (anomalib_block, freia_block) else None
        )
    for b in (block, copied):
        assert state_of(b) == "accelerated"
        assert_same(b, stock, name)
    # The pickle was made while the step was patched, so it runs the stock maths.
    if through_pickle is not None:
        assert_same(through_pickle, stock, name)


@pytest.mark.peers
def test_a_step_patched_on_a_subclass_takes_effect() -> None:
    base: Any = anomalib_block()

    class Named(base):
        pass

    block, stock = pair(lambda: Named)
    for step in ("_affine", "forward"):
        setattr(Named, step, STEPS[step])
        assert state_of(block) == "stock maths"
        assert_same(block, stock)
        delattr(Named, step)
        assert state_of(block) == "accelerated"


@pytest.mark.peers
def test_accelerate_again_asks_a_block_that_has_changed() -> None:
    block, stock = pair(anomalib_block)
    for b in (block, stock):
        b.global_scale_activation = torch.exp
        b.reverse_pre_permute = True
    assert state_of(block) == "stock maths"
    accelerate(block)
    assert "EXP" in report(block).changed[0].reason
    assert state_of(block) == "accelerated"
    assert_same(block, stock)
    block._affine = double
    with pytest.warns(UserWarning, match="no block of the model runs fused"):
        accelerate(block)
    del block._affine
    assert state_of(block) == "accelerated"


# --- compiled -------------------------------------------------------------------------------------


@released
@pytest.mark.parametrize(
    "exchange",
    [
        "permute_function",
        "GIN",
        "activation",
        "_affine",
        "splits in place",
        "clamp",
        "clamp, a tensor",
        "class",
    ],
)
def test_what_is_exchanged_after_compilation_takes_effect(
    exchange: str, peer: Callable[[], Any]
) -> None:
    """A method that is set on the block itself is compared with a compiled stock block.

    torch 2.7 does not notice it there, either.
    """
    torch._dynamo.reset()
    block, stock = pair(peer)
    compiled, compiled_stock = (
        torch.compile(b.__call__, backend="eager", fullgraph=True) for b in (block, stock)
    )
    expected_of = compiled_stock if exchange == "_affine" else stock
    x, _ = make_input(Case(SHAPE, "hard"))

    def assert_compiled_is_stock() -> None:
        (y,), logdet = compiled([x])
        (expected,), expected_logdet = expected_of([x])
        torch.testing.assert_close((y, logdet), (expected, expected_logdet), rtol=1e-12, atol=1e-12)

    assert_compiled_is_stock()
    context = (
        mock.patch.object(type(stock), "_affine", STEPS["_affine"])
        if exchange == "class"
        else nullcontext()
    )
    with context:
        for b in (block, stock):
            if exchange.startswith("clamp"):
                b.clamp = torch.tensor(1.1, dtype=torch.float64) if "tensor" in exchange else 1.1
            elif exchange == "splits in place":
                b.splits[:] = [3, 3]
            elif exchange != "class":
                EXCHANGES[exchange](b)
        assert_compiled_is_stock()
