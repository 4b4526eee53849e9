"""Subnets and wrappers that tests build blocks with, and helpers for a block's results."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Stored(nn.Module):
    """A subnet that returns a stored tensor for every input.

    The tensor is a buffer, so that ``to()`` converts it.
    """

    a: Tensor

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)

    def forward(self, x: Tensor) -> Tensor:
        return self.a


class Function(nn.Module):
    """A subnet that calls a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Counting(nn.Module):
    """A linear map of the channels that counts its calls."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.einsum("oi,bi...->bo...", self.weight, x)


class TakesTensor(nn.Module):
    """A wrapper of a block that takes a tensor and returns two, in one direction."""

    def __init__(self, block: nn.Module, rev: bool) -> None:
        super().__init__()
        self.block, self.rev = block, rev

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return unwrapped(self.block([x], rev=self.rev))


def unwrapped(result: tuple[tuple[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the output and the log-determinant out of a block's result."""
    (y,), log_det = result
    return y, log_det


Results = dict[str, Tensor | None]


def evaluate(
    model: nn.Module,
    x: Tensor,
    c: list[Tensor],
    rev: bool = False,
    grad: bool = True,
    wrap: bool = True,
) -> Results:
    """Return the output, the log-determinant, and gradients of a random linear function of both.

    Args:
        model: A block, which takes a list and returns a tuple; or one of FrEIA's containers.
        x: Input.
        c: Conditions.
        rev: Whether to evaluate the inverse.
        grad: Whether to return the gradients of the input, the conditions and the parameters.
            A gradient that does not exist is None.
        wrap: Whether the model is a block.
    """
    x, c = x.detach().requires_grad_(grad), [t.detach().requires_grad_(grad) for t in c]
    with torch.set_grad_enabled(grad):
        result = model([x] if wrap else x, c, rev=rev)
    y, log_det = unwrapped(result) if wrap else result
    results: Results = {"output": y.detach(), "log-det": log_det.detach()}
    if not grad:
        return results
    generator = torch.Generator().manual_seed(2)
    dy, dlog_det = (
        torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t)
        for t in (y, log_det)
    )
    model.zero_grad()
    # Use both, because GIN's log-determinant is part of the graph although it is 0.
    torch.autograd.backward([y, log_det], [dy, dlog_det])
    results |= {"grad x": x.grad, **{f"grad c{i}": t.grad for i, t in enumerate(c)}}
    results |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return results


def through_a_file(module: nn.Module) -> nn.Module:
    """Save a module as a whole, and return it loaded."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def contents(block: nn.Module) -> dict[str, Tensor]:
    """Return copies of a block's parameters and buffers."""
    return {
        name: t.detach().clone() for name, t in [*block.named_parameters(), *block.named_buffers()]
    }


def permutation_of(block: Any) -> Tensor:
    """Return the index of a hard permutation, with y[:, j] = v[:, index[j]]."""
    w = block.w_perm.detach()
    return w if w.dim() == 1 else w.flatten(1).argmax(1)
