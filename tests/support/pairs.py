"""Pairs of an accelerated and a stock block with the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastflow_kernels import accelerate, report
from tests.support.blocks import Results, evaluate
from tests.support.cases import Case, Shape, make_input
from tests.support.peers import freia_block
from tests.support.stock_blocks import PEERS, each_peer, stock_block

EPS = torch.finfo(torch.float64).eps
SHAPE = Shape(3, 6, (4,))


def bound_block() -> type:
    """Return FrEIA 0.2's block with bound methods as activations, like FrEIA's main branch."""

    stock: Any = freia_block()

    class AllInOneBlock(stock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if hasattr(self, "softplus"):
                self.global_scale_activation = self._softplus_global_scale_activation

        def _softplus_global_scale_activation(self, a: Tensor) -> Tensor:
            return 0.1 * self.softplus(a)

    return AllInOneBlock


peers = each_peer({**PEERS, "bound": bound_block})
with_softplus = each_peer({"freia0.2": freia_block, "bound": bound_block})


def pair(
    peer: Callable[[], Any], name: str = "hard", **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Return an accelerated and a stock block of one class with the same parameters."""
    cls = peer()
    block, stock = (stock_block(lambda: cls, Case(SHAPE, name), **options) for _ in range(2))
    accelerate(block)
    assert state_of(block) == "accelerated", str(report(block))
    return block, stock


def state_of(block: nn.Module) -> str:
    (entry,) = report(block).entries
    return entry.state


def results_or_error(block: nn.Module, rev: bool, name: str) -> Results | Exception:
    try:
        return evaluate(block, *make_input(Case(SHAPE, name)), rev)
    except Exception as error:
        return error


def assert_same(block: nn.Module, stock: nn.Module, name: str = "hard") -> None:
    """Assert that a block gives a stock block's results.

    They are equal if the stock maths runs. Otherwise they differ by the rounding of sums of some
    hundred terms.
    """
    tolerance = 0.0 if state_of(block) == "stock maths" else 2000 * EPS
    for rev in (False, True):
        actual, expected = (results_or_error(b, rev, name) for b in (block, stock))
        if isinstance(expected, Exception):
            assert isinstance(actual, type(expected)), (actual, expected)
            continue
        assert not isinstance(actual, Exception), actual
        assert actual.keys() == expected.keys()
        for key, e in expected.items():
            a = actual[key]
            if a is None or e is None:
                assert a is e, key
                continue
            assert torch.equal(a.isnan(), e.isnan())
            assert (
                (a - e).abs().nan_to_num() <= tolerance * e.abs().nan_to_num().max().clamp(min=1.0)
            ).all()


class Exp(nn.Module):
    def forward(self, g: Tensor) -> Tensor:
        return torch.exp(g)


def setting(name: str, value: Any) -> Callable[[nn.Module], object]:
    return lambda block: setattr(block, name, value)
