"""The formula as differentiable operations: the first file to read.

Autograd, ``torch.func``, ``torch.compile`` and exports see through these operations. They run where
the hand-derived engines do not, and steps that a subclass overrides are made of them.

With ``a = (a_s, a_t)`` from the subnet, x = (x1, x2) and P pixels::

    s       = clamp * tanh(tanh_scale * a_s)      minus its mean per sample if gin
    u       = cat(x1, x2 * exp(s) + 0.1 * a_t)
    v       = u * scale + offset                  scale = activation(global_scale); 1 if gin
    log_det = sum(s) + P * sum(log(scale))

The permutation of v comes after that: see :mod:`fastflow_kernels.permutations`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastflow_kernels import torch_private
from fastflow_kernels.coupling import Coupling, CouplingSpec
from fastflow_kernels.dtypes import accumulator, cast, promoted
from fastflow_kernels.engines.constants import constant_like


def activated(g: Tensor, activation: str) -> Tensor:
    """The global scale of a parameter g, elementwise.

    Args:
        g: Of any shape.
        activation: "SIGMOID" (10 * sigmoid(g - 2)), "SOFTPLUS" (0.1 * softplus(g, beta=0.5)) or
            "EXP" (exp(g)).
    """
    if activation == "SIGMOID":
        return torch.sigmoid(g - constant_like(2.0, g)) * constant_like(10.0, g)
    if activation == "SOFTPLUS":
        return torch.nn.functional.softplus(g, beta=0.5) * constant_like(0.1, g)
    return torch.exp(g)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The passive half of x, C - C//2 channels, and the active one, C//2, as views."""
    active = x.shape[1] // 2
    return split_at(x, x.shape[1] - active, active)


def split_at(x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """The first and the last channels of x, as views."""
    # Tensor.split is a Python function, five times slower
    head, tail = torch.split_with_sizes(x, (first, last), 1)
    return head, tail


def forward(x1: Tensor, x2: Tensor, a: Tensor, coupling: Coupling) -> tuple[Tensor, Tensor]:
    """v and the log-determinant.

    Args:
        x1: The passive half, (B, C1, *S).
        x2: The active half, (B, C2, *S).
        a: The subnet's output, (B, 2*C2, *S).
        coupling: Its permutation is not applied.

    Returns:
        v (B, C, *S) in the promoted dtype, and the log-determinant (B,) in nats.
    """
    spec, dtype = coupling.spec, promoted(x1, a, coupling.global_scale)
    wide = accumulator(dtype)
    u2, sum_s = couple(cast(x2, wide), cast(a, wide), spec)
    u = torch.cat((cast(x1, wide), u2), 1)
    offset = _channelwise(coupling.global_offset, u)
    scale = _scale(coupling, u)
    if scale is None:
        v = u + offset
    elif torch.is_grad_enabled() or torch_private.is_recorded() or torch_private.is_transformed():
        v = u * scale + offset  # not addcmul: its backward takes one more pass over u
    elif u.dim() == 2:
        v = torch.addcmul(offset, u, scale)
    else:
        v = u.mul_(scale).add_(offset)
    return cast(v, dtype), _log_det(sum_s, scale, u, 1.0)


def invert_affine(v: Tensor, coupling: Coupling) -> tuple[Tensor, Tensor | None]:
    """u = (v - offset) / scale, in the dtype of the computation; and scale, None for GIN."""
    v = cast(v, accumulator(promoted(v, coupling.global_scale)))
    u = v - _channelwise(coupling.global_offset, v)
    scale = _scale(coupling, v)
    return (u, None) if scale is None else (u / scale, scale)


def invert_coupling(
    u1: Tensor, u2: Tensor, a: Tensor, scale: Tensor | None, spec: CouplingSpec
) -> tuple[Tensor, Tensor]:
    """x = cat(u1, (u2 - 0.1 * a_t) * exp(-s)) and the log-determinant of the inverse.

    Args:
        u1, u2: The halves of what :func:`invert_affine` returned.
        a: The subnet's output for u1.
        scale: What :func:`invert_affine` returned.
        spec: The constants.
    """
    wide = accumulator(promoted(u1, a))
    x2, sum_s = couple(cast(u2, wide), cast(a, wide), spec, rev=True)
    x = torch.cat((cast(u1, wide), x2), 1)
    return x, _log_det(sum_s, scale, x, -1.0)


def couple(x2: Tensor, a: Tensor, spec: CouplingSpec, rev: bool = False) -> tuple[Tensor, Tensor]:
    """The coupling of the active half, or its inverse.

    Args:
        x2: The active half, (B, C2, *S).
        a: The subnet's output, (B, 2*C2, *S).
        spec: The constants; here the clamp may be a tensor.
        rev: Compute the inverse.

    Returns:
        x2 * exp(s) + 0.1 * a_t and the sum of s per sample; in reverse (x2 - 0.1 * a_t) * exp(-s)
        and the sum of -s.
    """
    a_s, a_t = split_at(a, x2.shape[1], x2.shape[1])
    # in place where nobody needs what is overwritten: 0.3 us less an operation
    in_place = not torch.is_grad_enabled() and not torch_private.is_traced()
    s = a_s * constant_like(spec.tanh_scale, a)
    clamp = constant_like(-spec.clamp if rev else spec.clamp, a)
    s = s.tanh_().mul_(clamp) if in_place else torch.tanh(s) * clamp
    dims = tuple(range(1, s.dim()))
    if spec.gin and s.numel():
        mean = s.mean(dims, keepdim=True)
        s = s - mean
        sum_s = 0.0 * mean.flatten()  # exact, and part of the graph as the stock block's is
    else:
        sum_s = s.sum(dims)
    if in_place:
        e = s.exp_()
        if rev:
            return torch.sub(x2, a_t, alpha=0.1).mul_(e), sum_s
        return (x2 * e).add_(a_t, alpha=0.1), sum_s
    e = torch.exp(s)
    return _add(x2, a_t, -0.1) * e if rev else _add(x2 * e, a_t, 0.1), sum_s


def _scale(coupling: Coupling, like: Tensor) -> Tensor | None:
    """The global scale, (1, C, 1, ...); None for GIN, where it is 1."""
    if coupling.spec.gin:
        return None
    return activated(_channelwise(coupling.global_scale, like), coupling.spec.activation)


def _channelwise(t: Tensor, like: Tensor) -> Tensor:
    """C elements as (1, C, 1, ...) in the dtype of ``like``."""
    dim = like.dim()
    return cast(t if t.dim() == dim else t.view(1, -1, *[1] * (dim - 2)), like.dtype)


def _log_det(sum_s: Tensor, scale: Tensor | None, x: Tensor, sign: float) -> Tensor:
    if scale is None:
        return sum_s
    return _add(sum_s, scale.log().sum(), sign if x.dim() == 2 else sign * math.prod(x.shape[2:]))


def _add(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """x + factor * y, in one operation unless torch.func.linearize may look on.

    That crashes on ``alpha`` in torch 2.13.
    """
    if torch.compiler.is_compiling() or not torch_private.is_watched():
        return torch.add(x, y, alpha=factor)
    return x + factor * y
