"""The way of the passive half to the subnet, and of its gradient back."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastflow_kernels import torch_private
from fastflow_kernels.channels import take_channels
from fastflow_kernels.coupling import Coupling
from fastflow_kernels.engines import operators
from fastflow_kernels.torch_private import needs_plain


def fork(x: Tensor, coupling: Coupling, with_gradients: bool) -> tuple[Tensor, Tensor]:
    """Return the passive half for the subnet, (B, C1, *S), and x for the coupling.

    Args:
        x: (B, C, *S).
        coupling: The operands of the engine.
        with_gradients: See :class:`~fastflow_kernels.route.Route`.
    """
    if with_gradients and x.requires_grad:
        passive, x = _apply_fork(x, coupling.inv if coupling.unpermutes_input else None)
        return passive, x
    return passive_half(x, coupling), x


def passive_half(x: Tensor, coupling: Coupling) -> Tensor:
    """Return the channels of x that the coupling does not change, (B, C1, *S).

    They are a view of x, or a copy in its layout if the coupling reads x through its index.
    """
    perm, inv = coupling.perm, coupling.inv
    if not coupling.unpermutes_input or perm is None or inv is None:
        return _take_passive(x, None)
    if needs_plain(x):  # a graph that calls operators
        return operators.gather(x, inv, perm, x.shape[1] - x.shape[1] // 2)
    return _take_passive(x, inv)


def _take_passive(x: Tensor, inv: Tensor | None) -> Tensor:
    passive = x.shape[1] - x.shape[1] // 2
    if inv is None:
        return x.narrow(1, 0, passive)
    with torch_private.versions_counted():
        return take_channels(x, inv[:passive])


class _Fork(Function):
    """The autograd node x -> (its passive half, x).

    Autograd's own slicing would turn the subnet's gradient into a zero-padded copy of x, and add
    two full tensors. That is 5 N of traffic, with N the bytes of x. Here the subnet's gradient is
    added in place to the passive channels of the coupling's gradient (1.5 N). If a hook holds the
    coupling's gradient, it is copied first.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, inv: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.active, ctx.inv = x.shape[1] // 2, inv
        return _take_passive(x, inv), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx1: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, None]:
        if dx1 is None:  # the subnet's output does not depend on its input
            return dx, None
        passive = dx1.shape[1]
        if dx is None or torch.is_grad_enabled() or needs_plain(dx, dx1):
            if ctx.inv is None:
                padding = (0, 0) * (dx1.dim() - 2) + (0, ctx.active)
                padded = torch.nn.functional.pad(dx1, padding)
            else:
                zeros = dx1.new_zeros(dx1.shape[0], passive + ctx.active, *dx1.shape[2:])
                padded = zeros.index_add(1, ctx.inv[:passive], dx1)
            return (padded if dx is None else dx + padded), None
        if torch_private.holders_of(dx) != holders_if_unshared():
            dx = dx.clone()
        if ctx.inv is None:
            dx.narrow(1, 0, passive).add_(dx1)
        else:
            dx.index_add_(1, ctx.inv[:passive], dx1)
        return dx, None


_apply_fork = torch_private.direct_apply(_Fork)


class _CountHolders(Function):
    """An autograd node that counts the holders of its gradient, or makes a gradient to count.

    The node that makes it has no hooks, so that only autograd holds the gradient.
    """

    holders = (0, 0, 0)

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_source: bool) -> Tensor:
        ctx.is_source = is_source
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        if ctx.is_source:
            return dx.clone(), None
        _CountHolders.holders = torch_private.holders_of(dx)
        return dx, None


@cache
def holders_if_unshared() -> tuple[int, int, int]:
    """Return what ``holders_of`` counts for a gradient that only autograd holds.

    The counts depend on the versions of Python and torch.
    """
    with torch_private.unrecorded(), torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, requires_grad=True, device="cpu")
        _CountHolders.apply(_CountHolders.apply(x, False), True).sum().backward()
    return _CountHolders.holders
