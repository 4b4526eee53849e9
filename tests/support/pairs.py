"""An accelerated block beside a stock one with the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastflow_kernels import accelerate, report
from tests.support.cases import Case, Shape, make_input
from tests.support.peers import freia_block
from tests.support.stock_blocks import PEERS, each_peer, stock_block

EPS = torch.finfo(torch.float64).eps
SHAPE = Shape(3, 6, (4,))


def bound_block() -> type:
    """FrEIA 0.2's block with bound methods for its activations, as FrEIA's main branch has."""

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
    """An accelerated block and a stock one with the same parameters, of one class."""
    cls = peer()
    made = [stock_block(lambda: cls, Case(SHAPE, name), **options) for _ in range(2)]
    accelerate(made[0])
    assert state_of(made[0]) == "accelerated", str(report(made[0]))
    return made[0], made[1]


def state_of(block: nn.Module) -> str:
    (entry,) = report(block).entries
    return entry.state


def evaluate(block: nn.Module, rev: bool, name: str = "hard") -> list[Tensor] | Exception:
    """The results and every gradient, or the error."""
    x, c = make_input(Case(SHAPE, name))
    x.requires_grad_()
    try:
        (y,), logdet = block([x], c, rev=rev)
        weights = torch.linspace(0.5, 2.0, y.numel(), dtype=torch.float64).view(y.shape)
        leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(
            (weights * y).sum() + logdet.sum(), leaves, allow_unused=True
        )
    except Exception as error:
        return error
    return [y.detach(), logdet.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


def assert_same(block: nn.Module, stock: nn.Module, name: str = "hard") -> None:
    """Bit for bit where the stock maths runs; otherwise what rounding leaves, with some hundred
    terms in a sum.
    """
    tolerance = 0.0 if state_of(block) == "stock maths" else 2000 * EPS
    for rev in (False, True):
        actual, expected = evaluate(block, rev, name), evaluate(stock, rev, name)
        if isinstance(expected, Exception):
            assert isinstance(actual, type(expected)), (actual, expected)
            continue
        assert not isinstance(actual, Exception), actual
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a.isnan(), e.isnan())
            assert (
                (a - e).abs().nan_to_num() <= tolerance * e.abs().nan_to_num().max().clamp(min=1.0)
            ).all()


class Exp(nn.Module):
    def forward(self, g: Tensor) -> Tensor:
        return torch.exp(g)


def setting(name: str, value: Any) -> Callable[[nn.Module], object]:
    return lambda block: setattr(block, name, value)
