"""Operations on the channels (dimension 1) of a tensor: gather, matrix product, reflections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fastflow_kernels import torch_private
from fastflow_kernels.layouts import as_rows, from_rows, memory_format
from fastflow_kernels.predicates import is_autocast, is_small
from fastflow_kernels.torch_private import needs_plain

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def gather_channels(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Return x[:, index], with a gradient that is a gather, too.

    The gradient of index_select itself scatters with additions.

    Args:
        x: (B, C, *S).
        index: int64 (C,), a permutation.
        inverse: argsort(index).

    Returns:
        A new (B, C, *S).
    """
    # in this order, because a compiled graph must not depend on sizes
    if needs_plain(x):
        return x.index_select(1, index)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return take_channels(x, index)
    if is_small(x):
        return x.index_select(1, index)
    return _Gather.apply(x, index, inverse)


def take_channels(x: Tensor, index: Tensor) -> Tensor:
    """Return x[:, index] in the memory format of x, without gradients.

    On a channels-last x index_select would return a contiguous tensor, and be many times slower.
    """
    if memory_format(x) is torch.contiguous_format:
        return x.index_select(1, index)
    return from_rows(as_rows(x).index_select(1, index), x)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return take_channels(x, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return gather_channels(dy, inverse, index), None, None


def multiply_channels(x: Tensor, w: Tensor) -> Tensor:
    """Multiply the channels of x by w.

    The operation is the stock block's, so that TF32 and autocast treat it alike.

    Args:
        x: (B, C, *S) of rank 0 to 3.
        w: (C, C) or (C, C, 1, ...). Its dtype is integer if it stands for an index.

    Returns:
        (B, C, *S).
    """
    if w.dtype is not x.dtype:
        w = _match_dtype(w, x)
    if (
        not (x.requires_grad and torch.is_grad_enabled())
        or w.requires_grad
        or needs_plain(x)
        or is_small(x)
    ):
        return product(x, w)
    return _Multiply.apply(x, w)


def _match_dtype(w: Tensor, x: Tensor) -> Tensor:
    """Return w in the dtype of x if that is wider. Autocast chooses dtypes itself."""
    if not w.is_floating_point():
        return w.to(x.dtype)
    is_wider = torch.promote_types(w.dtype, x.dtype) is x.dtype
    return w.to(x.dtype) if is_wider and not is_autocast(x.device) else w


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the channels of x (B, C, *S) by w, (C, C) or (C, C, 1, ...), and add a bias (C,)."""
    rank = x.dim() - 2
    if rank == 0:
        return F.linear(x, w, bias)
    return _CONVOLUTIONS[rank](x, w if w.dim() > 2 else w.view(*w.shape, *[1] * rank), bias)


class _Multiply(Function):
    """The product with a fixed matrix as an autograd node; unlike a convolution it saves no x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        ctx.dtype = x.dtype
        return product(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return multiply_backward(dy, w).to(ctx.dtype), None


def multiply_backward(dy: Tensor, w: Tensor) -> Tensor:
    """Return the gradient of x from that of multiply_channels(x, w)."""
    return multiply_channels(dy, w.flatten(1).T.to(dy.dtype))


def reflect(v: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """Compute v - outer^T (inner v) on dimension 1, in full precision also under autocast.

    Args:
        v: (B, C, *S).
        inner, outer: (K, C).

    Returns:
        (B, C, *S) in the promoted dtype.
    """
    if is_autocast(v.device):
        with torch.autocast(v.device.type, enabled=False):
            return reflect(v, inner, outer)
    if not torch.is_grad_enabled():
        # detached, because matmul copies v if a factor requires a gradient
        inner, outer = inner.detach(), outer.detach()
        if not needs_plain(v) and memory_format(v) is not torch.contiguous_format:
            return from_rows(reflect(as_rows(v), inner, outer), v)
    dtype = torch.promote_types(v.dtype, inner.dtype)
    v, inner, outer = (t.to(dtype) for t in (v, inner, outer))
    if v.dim() == 2:
        return torch.addmm(v, v @ inner.T, outer, alpha=-1.0)
    # einsum multiplies no sizes: Inductor of torch 2.13 cannot compare products of sizes
    if torch_private.is_recorded():
        return v - torch.einsum("kc,bk...->bc...", outer, torch.einsum("kc,bc...->bk...", inner, v))
    flat = v.flatten(2)
    return torch.baddbmm(flat, outer.T.expand(v.shape[0], -1, -1), inner @ flat, alpha=-1.0).view(
        v.shape
    )


def reflect_backward(
    dz: Tensor, v: Tensor, inner: Tensor, outer: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of v, inner and outer of :func:`reflect`, in the dtype of its result."""
    if memory_format(v) is not torch.contiguous_format:
        dv, dinner, douter = reflect_backward(as_rows(dz), as_rows(v), inner, outer)
        return from_rows(dv, v), dinner, douter
    v, inner, outer = (t.detach().to(dz.dtype) for t in (v, inner, outer))  # detached: see reflect
    if v.dim() == 2:
        dq = dz @ outer.T
        return torch.addmm(dz, dq, inner, alpha=-1.0), -(dq.T @ v), -((v @ inner.T).T @ dz)
    flat, dz_flat = v.flatten(2), dz.flatten(2)
    dq = outer @ dz_flat
    dinner = -(dq @ flat.transpose(1, 2)).sum(0)
    douter = -((inner @ flat) @ dz_flat.transpose(1, 2)).sum(0)
    return (
        torch.baddbmm(dz_flat, inner.T.expand(v.shape[0], -1, -1), dq, alpha=-1.0).view(v.shape),
        dinner,
        douter,
    )
