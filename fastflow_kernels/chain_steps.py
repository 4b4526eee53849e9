"""The couplings of consecutive blocks of a chain, as autograd nodes.

The next subnet and the next coupling read the same passive half. Each gets an output of its own, so
that the node receives the two gradients apart. The Triton kernels add them while they read them,
the eager engine adds them in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflow_kernels import torch_private
from fastflow_kernels.channels import gather_channels
from fastflow_kernels.coupling import ChainGrads, Coupling, Halves
from fastflow_kernels.dtypes import promoted
from fastflow_kernels.engines import ChainEngine, plain
from fastflow_kernels.fork import holders_if_unshared
from fastflow_kernels.fused import differentiate
from fastflow_kernels.layouts import packed
from fastflow_kernels.torch_private import needs_plain


class Step(NamedTuple):
    """One coupling of a chain.

    Attributes:
        coupling: What to compute, with its parameters and permutation.
        engine: What computes it.
        halves: Whether y is wanted in halves.
        dtype: The dtype of y; None for the promoted one of x, a and the parameters.
    """

    coupling: Coupling
    engine: ChainEngine
    halves: bool
    dtype: torch.dtype | None = None


def passive_of(x: Tensor | Halves) -> Tensor:
    """Return the passive half of x, (B, C1, *S)."""
    if isinstance(x, Halves):
        return x.passive
    return x.narrow(1, 0, x.shape[1] - x.shape[1] // 2)


def couple(
    x: Tensor | Halves, a: Tensor, step: Step, with_gradients: bool
) -> tuple[Tensor, Tensor | Halves, Tensor]:
    """Compute a coupling of a chain with its global affine and its permutation.

    Args:
        x: The block's input.
        a: The subnet's output, (B, 2*C2, *S), with contiguous samples.
        step: The coupling.
        with_gradients: Whether gradients are enabled.

    Returns:
        The passive half of y for the next subnet; y; and the sums of s, see
        :class:`~fastflow_kernels.engines.ChainEngine`.
    """
    if not with_gradients:
        y, sums = _couple(x, a, step)
        return passive_of(y), y, sums
    g, offset = step.coupling.parameters
    tensors = x if isinstance(x, Halves) else (x, None)
    passive, *parts, sums = _apply_coupling(*tensors, a, g, offset, step)
    return passive, Halves(*parts) if step.halves else parts[0], sums


def _couple(x: Tensor | Halves, a: Tensor, step: Step) -> tuple[Tensor | Halves, Tensor]:
    first, active = (x.passive, x.active) if isinstance(x, Halves) else (x, None)
    channels = first.shape[1] + (0 if active is None else active.shape[1])
    batch, _, *spatial = first.shape
    dtype, device = step.dtype or promoted(first, a, step.coupling.global_scale), first.device
    y: Tensor | Halves
    if step.halves:
        sizes = channels - channels // 2, channels // 2
        y = Halves(*(torch.empty((batch, n, *spatial), dtype=dtype, device=device) for n in sizes))
    else:
        y = torch.empty((batch, channels, *spatial), dtype=dtype, device=device)
    return y, step.engine.forward_in_chain(x, a, step.coupling, y)


class _CouplingInChain(Function):
    """A coupling of a chain: see :func:`couple`. With ``active`` x is its passive half."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, active: Tensor | None, a: Tensor, g: Tensor, offset: Tensor, step: Step
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        coupling = step.coupling
        ctx.save_for_backward(x, active, a, g, offset, coupling.perm, coupling.inv, coupling.scale)
        # No tensors here: only saved ones are seen by hooks and checked for in-place changes.
        ctx.constants = coupling.spec, step.engine, step.halves, step.dtype
        y, sums = _couple(x if active is None else Halves(x, active), a, step)
        # The detached tensor shares memory and version with y, but is another output.
        passive = passive_of(y).detach()
        return (passive, *y, sums) if isinstance(y, Halves) else (passive, y, sums)

    @staticmethod
    def backward(
        ctx: Any, from_subnet: Tensor | None, dy: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, active, a, g, offset, perm, inv, scale = ctx.saved_tensors
        spec, engine, halves, dtype = ctx.constants
        coupling = Coupling(g, offset, spec, perm, inv, scale=scale)
        *dy_active, dsums = others
        dlog_det = None if dsums is None else dsums.select(1, 0)  # each part gets the same
        if torch.is_grad_enabled() or needs_plain(from_subnet, dy, *others):
            gradients = differentiate(
                partial(_plainly, coupling, halves, dtype),
                ctx,
                (x, active, a, g, offset),
                (from_subnet, dy, *dy_active, dlog_det),
            )
            return *gradients, None
        if from_subnet is not None and dy is not None:
            # The engine may write to dy. A hook may hold it.
            dy = dy if torch_private.holders_of(dy) == holders_if_unshared() else dy.clone()
        dtype = dtype or promoted(x, a, g)
        of_y: Tensor | Halves
        if halves:
            (d_active,) = dy_active
            channels = len(perm) // 2
            of_y = Halves(
                _filled(dy, x, len(perm) - channels, dtype), _filled(d_active, x, channels, dtype)
            )
        else:
            of_y = _filled(dy, x, len(perm), dtype)
        grads = ChainGrads(of_y, None if from_subnet is None else packed(from_subnet), dlog_det)
        want_params = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        of_x = x if active is None else Halves(x, active)
        dx, da, dg, doffset = engine.backward_in_chain(of_x, a, grads, coupling, want_params)
        return *(dx if isinstance(dx, Halves) else (dx, None)), da, dg, doffset, None


_apply_coupling = torch_private.direct_apply(_CouplingInChain)


def _filled(dy: Tensor | None, x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Return a gradient with contiguous samples, or zeros of (B, channels, *S) for None."""
    if dy is None:
        return torch.zeros((len(x), channels, *x.shape[2:]), dtype=dtype, device=x.device)
    return packed(dy)


def _plainly(
    coupling: Coupling, halves: bool, dtype: torch.dtype | None, leaves: list[Tensor]
) -> tuple[Tensor, ...]:
    """Compute what the node returns by plain operations, with the log-determinant for the sums."""
    x, active, a, g, offset = leaves
    x1, x2 = plain.split(x) if active is None else (x, active)
    v, log_det = plain.forward(x1, x2, a, g, offset, coupling.spec)
    assert coupling.perm is not None
    assert coupling.inv is not None
    y = gather_channels(v if dtype is None else v.to(dtype), coupling.perm, coupling.inv)
    y1, y2 = plain.split(y)
    return (y1, y1, y2, log_det) if halves else (y1, y, log_det)


def log_det_with_gradient(
    engine: ChainEngine, couplings: Sequence[Coupling], pixels: int, sums: Sequence[Tensor]
) -> Tensor:
    """Do :meth:`ChainEngine.log_det_of_chain <fastflow_kernels.engines.ChainEngine>`.

    Args:
        engine: The engine.
        couplings: Consecutive couplings.
        pixels: Pixels of a sample, P.
        sums: Their sums of s, from :func:`couple`.
    """
    log_det: Tensor = _apply_log_det(engine, couplings, pixels, *sums)
    return log_det


class _LogDetOfChain(Function):
    """The sums of consecutive couplings -> their log-determinant.

    The gradient of log(scale) is a matter of each coupling's node, which gets the gradient of the
    log-determinant for that of its sums.
    """

    @staticmethod
    def forward(
        ctx: Any, engine: ChainEngine, couplings: Sequence[Coupling], pixels: int, *sums: Tensor
    ) -> Tensor:
        ctx.parts = [t.shape[1] for t in sums]
        return engine.log_det_of_chain(sums, couplings, pixels)

    @staticmethod
    def backward(ctx: Any, dlog_det: Tensor) -> tuple[Tensor | None, ...]:
        column = dlog_det.unsqueeze(1)
        return None, None, None, *(column.expand(-1, parts) for parts in ctx.parts)


_apply_log_det = torch_private.direct_apply(_LogDetOfChain)
