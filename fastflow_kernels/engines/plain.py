"""The formula as differentiable operations: the first file to read.

Autograd, ``torch.func``, ``torch.compile`` and exports see through these operations. They run where
the engines with hand-derived gradients cannot. A block whose subclass overrides a step also uses
them.

The subnet returns ``a = (a_s, a_t)``, x is split into (x1, x2), and P is the number of pixels::

    s       = clamp * f(input_scale * a_s)        minus its mean if gin; f is tanh or atan
    u       = cat(x1, x2 * exp(s) + shift_scale * a_t)
    v       = u * scale + offset                  scale = activation(global_scale); 1 if gin
    log_det = sum(s) + P * sum(log(scale))

The permutation of v follows: see :mod:`fastflow_kernels.permutations`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastflow_kernels import torch_private
from fastflow_kernels.coupling import ACTIVATIONS, CouplingSpec
from fastflow_kernels.dtypes import accumulator, cast, promoted
from fastflow_kernels.engines.constants import constant, operand


def activated(g: Tensor, activation: str | None) -> Tensor:
    """Return the global scale that belongs to a parameter g, elementwise.

    Args:
        g: The parameter, of any shape.
        activation: "SIGMOID" (10 * sigmoid(g - 2)), "SOFTPLUS" (0.1 * softplus(g, beta=0.5)) or
            "EXP" (exp(g)).

    Raises:
        ValueError: If the activation is not one of these.
    """
    if activation == "SIGMOID":
        return torch.sigmoid(g - operand(2.0, g.dtype)) * operand(10.0, g.dtype)
    if activation == "SOFTPLUS":
        return torch.nn.functional.softplus(g, beta=0.5) * operand(0.1, g.dtype)
    if activation == "EXP":
        return torch.exp(g)
    raise ValueError(
        f"expected activation to be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
    )


def log_slope(scale: Tensor, activation: str | None) -> Tensor | float:
    """Return d log(scale) / d g, given the scale. It is finite even if the scale is 0."""
    if activation == "SIGMOID":
        return 1.0 - 0.1 * scale
    if activation == "SOFTPLUS":  # 0.1 * sigmoid(g / 2) / scale, written as a function of scale
        scale = scale.clamp_min(1e-30)
        return torch.mul(scale, -5.0).expm1_().div_(scale).mul_(-0.1)
    assert activation == "EXP"
    return 1.0


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the passive half of x, C - C//2 channels, and the active half, C//2, as views."""
    active = x.shape[1] // 2
    return split_at(x, x.shape[1] - active, active)


def split_at(x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return the first ``first`` and the last ``last`` channels of x, as views."""
    # Tensor.split is a Python function and five times slower.
    head, tail = torch.split_with_sizes(x, (first, last), 1)
    return head, tail


def forward(
    x1: Tensor, x2: Tensor, a: Tensor, g: Tensor, offset: Tensor, spec: CouplingSpec
) -> tuple[Tensor, Tensor]:
    """Return v and the log-determinant.

    Args:
        x1: The passive half, (B, C1, *S).
        x2: The active half, (B, C2, *S).
        a: The subnet's output, (B, 2*C2, *S).
        g: The parameter of the global scale, before its activation, C elements.
        offset: The global offset, C elements.
        spec: The constants.

    Returns:
        v (B, C, *S) in the promoted dtype, and the log-determinant (B,) in nats.
    """
    dtype, dim = promoted(x1, a, g), x1.dim()
    acc_dtype = accumulator(dtype)
    scale, offset = scale_of(g, spec, dim, acc_dtype), per_channel(offset, dim, acc_dtype)
    v, sum_s = transform(x1, x2, a, scale, offset, spec)
    return cast(v, dtype), add_log_scale(sum_s, scale, count_pixels(v))


def scale_of(g: Tensor, spec: CouplingSpec, dim: int, dtype: torch.dtype) -> Tensor | None:
    """Return the global scale, (1, C, 1, ...) with ``dim`` dimensions, or None for GIN.

    Args:
        g: The parameter, before its activation. C elements, or (K, 1, C, 1, ...) for K blocks.
        spec: The constants.
        dim: Number of dimensions of x.
        dtype: The dtype of the computation.
    """
    return None if spec.gin else activated(per_channel(g, dim, dtype), spec.activation)


def add_log_scale(sum_s: Tensor, scale: Tensor | None, pixels: int) -> Tensor:
    """Return the log-determinant sum_s + pixels * sum(log(scale)), (B,) in nats.

    Args:
        sum_s: The sums of s per sample, (B,).
        scale: The scales of a block, or of several blocks. None for GIN.
        pixels: Number of pixels, negative for the inverse.
    """
    if scale is None:
        return sum_s
    return _add(sum_s, scale.log().sum(), pixels, may_write())


def transform(
    x1: Tensor, x2: Tensor, a: Tensor, scale: Tensor | None, offset: Tensor, spec: CouplingSpec
) -> tuple[Tensor, Tensor]:
    """Do :func:`forward` without the scale's part of the log-determinant.

    Args:
        x1, x2, a, spec: The arguments of :func:`forward`.
        scale: The result of :func:`scale_of`.
        offset: The offset, (1, C, 1, ...) in the dtype of the computation.

    Returns:
        v in the dtype of the computation, and the sum of s per sample, (B,).
    """
    acc_dtype, in_place = offset.dtype, may_write()
    u2, sum_s = couple(cast(x2, acc_dtype), cast(a, acc_dtype), spec, False, in_place)
    u = torch.cat((cast(x1, acc_dtype), u2), 1)
    if scale is None:
        return u + offset, sum_s
    if not in_place:
        return u * scale + offset, sum_s  # the backward of addcmul takes one more pass over u
    if u.dim() == 2:
        return torch.addcmul(offset, u, scale), sum_s
    return u.mul_(scale).add_(offset), sum_s


def may_write() -> bool:
    """Return whether operations may write to fresh results, which costs 0.3 us less.

    They may while nobody takes gradients and nobody records or transforms the operations.
    """
    return not torch.is_grad_enabled() and not torch_private.needs_plain()


def invert_affine(v: Tensor, scale: Tensor | None, offset: Tensor) -> Tensor:
    """Return u = (v - offset) / scale, (B, C, *S) in the dtype of the computation.

    Args:
        v: The input of the inverse after the inverse permutation, (B, C, *S).
        scale: The result of :func:`scale_of`.
        offset: The offset, (1, C, 1, ...) in the dtype of the computation.
    """
    u = cast(v, offset.dtype) - offset
    return u if scale is None else u / scale


def invert_coupling(u1: Tensor, u2: Tensor, a: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor]:
    """Return x = cat(u1, (u2 - 0.1 * a_t) * exp(-s)) and the sum of -s per sample, (B,).

    Args:
        u1: The passive half of u, (B, C1, *S), which is that of :func:`invert_affine`.
        u2: The active half of u, (B, C2, *S).
        a: The subnet's output for u1, (B, 2*C2, *S).
        spec: The constants.

    Returns:
        x (B, C, *S) in the dtype of the computation, and the sum.
    """
    acc_dtype, in_place = accumulator(promoted(u1, a)), may_write()
    x2, sum_s = couple(cast(u2, acc_dtype), cast(a, acc_dtype), spec, True, in_place)
    return torch.cat((cast(u1, acc_dtype), x2), 1), sum_s


def couple(
    x2: Tensor, a: Tensor, spec: CouplingSpec, rev: bool, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Return the coupling of the active half, or its inverse, and the sum of the exponents.

    Args:
        x2: The active half, (B, C2, *S).
        a: The subnet's output, (B, 2*C2, *S).
        spec: The constants; here the clamp may be a tensor.
        rev: Whether to compute the inverse.
        in_place: Whether to write to fresh results, as :func:`may_write` says.

    Returns:
        x2 * exp(s) + shift_scale * a_t and the sum of s per sample, (B,). With ``rev`` these are
        (x2 - shift_scale * a_t) * exp(-s) and the sum of -s. With ``mean_per_pixel`` the second one
        means nothing.
    """
    a_s, a_t = split_at(a, x2.shape[1], x2.shape[1])
    return couple_by(x2, a_s, a_t, spec, rev, in_place)


def couple_by(
    x2: Tensor, a_s: Tensor, a_t: Tensor, spec: CouplingSpec, rev: bool, in_place: bool
) -> tuple[Tensor, Tensor]:
    """Do :func:`couple` with the two halves of the coefficients, each (B, C2, *S)."""
    s = _log_factors(a_s, spec, -spec.clamp if rev else spec.clamp, in_place)
    dims = 1 if s.dim() == 2 else tuple(range(1, s.dim()))
    if spec.gin and s.numel():
        mean = s.mean(1 if spec.mean_per_pixel else dims, keepdim=True)
        s = s - mean
        # 0, or NaN where s is NaN; the graph is the stock block's. A side of GIN has no sum.
        sum_s = mean if spec.mean_per_pixel else 0.0 * mean.flatten()
    else:
        sum_s = s.sum(dims)
    shift = spec.shift_scale
    if in_place:
        if rev:
            return torch.sub(x2, a_t, alpha=shift).mul_(s.exp_()), sum_s
        if shift == 1.0:
            return torch.addcmul(a_t, x2, s.exp_()), sum_s
        return (x2 * s.exp_()).add_(a_t, alpha=shift), sum_s
    if rev:
        return _add(x2, a_t, -shift) * torch.exp(s), sum_s
    return _add(x2 * torch.exp(s), a_t, shift), sum_s


def _log_factors(a_s: Tensor, spec: CouplingSpec, clamp: Any, in_place: bool) -> Tensor:
    """Return s = clamp * f(input_scale * a_s); both constants may be tensors."""
    if spec.activation is not None:  # an AllInOneBlock
        if in_place:
            s = (a_s * constant(spec.input_scale, a_s.dtype)).tanh_()
            return s.mul_(constant(clamp, a_s.dtype))
        return torch.tanh(a_s * operand(spec.input_scale, a_s.dtype)) * operand(clamp, a_s.dtype)
    if spec.function == "sigmoid":
        s = torch.sigmoid(a_s)
        if in_place:
            return s.mul_(constant(2.0 * clamp, s.dtype)).sub_(constant(clamp, s.dtype))
        return s * operand(2.0 * clamp, s.dtype) - operand(clamp, s.dtype)
    z = a_s if spec.input_scale == 1.0 else a_s * operand(spec.input_scale, a_s.dtype)
    s = torch.tanh(z) if spec.function == "tanh" else torch.atan(z)
    return s.mul_(constant(clamp, s.dtype)) if in_place else s * operand(clamp, s.dtype)


def per_channel(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return C elements as (1, C, 1, ...) with ``dim`` dimensions, to broadcast over (B, C, *S).

    Stacked parameters of several blocks have a dimension more, and keep it.
    """
    return cast(t if t.dim() >= dim else t.view(1, -1, *[1] * (dim - 2)), dtype)


def count_pixels(x: Tensor) -> int:
    """Return the number of pixels of (B, C, *S)."""
    return 1 if x.dim() == 2 else math.prod(x.shape[2:])


def _add(x: Tensor, y: Tensor, factor: float, in_place: bool = False) -> Tensor:
    """Return x + factor * y, in one operation unless torch.func.linearize may be tracing it.

    torch.func.linearize of torch 2.13 crashes on the argument ``alpha``.
    """
    if in_place or torch.compiler.is_compiling() or not torch_private.is_watched():
        return torch.add(x, y, alpha=factor)
    return x + factor * y
