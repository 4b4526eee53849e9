"""The coupling between the halves of a chain's activations, as autograd nodes.

The subnet and the next coupling read the same passive half. Each gets an output of its own, so that
the node receives the two gradients apart. The engine adds them while it reads them.
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
from fastflow_kernels.coupling import Coupling, Halves, HalvesGrads
from fastflow_kernels.dtypes import promoted
from fastflow_kernels.engines import ChainEngine, plain
from fastflow_kernels.fused import differentiate
from fastflow_kernels.layouts import packed
from fastflow_kernels.torch_private import needs_plain


def split_for_chain(x: Tensor, with_gradients: bool) -> tuple[Tensor, Halves]:
    """Return the passive half of x for the first subnet, and the halves for the first coupling.

    Args:
        x: (B, C, *S).
        with_gradients: Whether gradients are enabled.
    """
    if with_gradients and x.requires_grad:
        passive, *halves = _apply_split(x)
        return passive, Halves(*halves)
    halves_of_x = Halves(*plain.split(x))
    return halves_of_x.passive, halves_of_x


class _Split(Function):
    """The autograd node x -> (its passive half for the subnet, its two halves)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.like = x.shape, x.dtype, x.device
        passive, active = plain.split(x)
        return passive.view_as(passive), passive, active

    @staticmethod
    def backward(
        ctx: Any, from_subnet: Tensor | None, passive: Tensor | None, active: Tensor | None
    ) -> Tensor:
        if from_subnet is not None:
            passive = from_subnet if passive is None else passive + from_subnet
        shape, dtype, device = ctx.like
        halves = []
        for d, channels in ((passive, shape[1] - shape[1] // 2), (active, shape[1] // 2)):
            size = (shape[0], channels, *shape[2:])
            halves.append(torch.zeros(size, dtype=dtype, device=device) if d is None else d)
        return torch.cat(halves, 1)


_apply_split = torch_private.direct_apply(_Split)


class Step(NamedTuple):
    """One coupling of a chain.

    Attributes:
        coupling: What to compute, with its parameters and permutation.
        engine: What computes it.
        is_last: Whether the chain ends here, so that the whole y is wanted.
        dtype: The dtype of y; None for the promoted one of x, a and the parameters.
    """

    coupling: Coupling
    engine: ChainEngine
    is_last: bool
    dtype: torch.dtype | None = None


def couple(x: Halves, a: Tensor, step: Step, with_gradients: bool) -> tuple[Tensor, Halves, Tensor]:
    """Compute a coupling of a chain with its global affine and its permutation.

    Args:
        x: The block's input, in halves.
        a: The subnet's output, (B, 2*C2, *S), with contiguous samples.
        step: The coupling.
        with_gradients: Whether gradients are enabled.

    Returns:
        The passive half of y for the next subnet, or the whole y of the last block; the halves of
        y; and the sums of s, see :class:`~fastflow_kernels.engines.ChainEngine`.
    """
    if not with_gradients:
        return _couple(x, a, step)
    g, offset = step.coupling.parameters
    passive, *halves, sums = _apply_coupling(x.passive, x.active, a, g, offset, step)
    return passive, Halves(*halves) if halves else x, sums


def _couple(x: Halves, a: Tensor, step: Step) -> tuple[Tensor, Halves, Tensor]:
    dtype = step.dtype or promoted(x.passive, a, step.coupling.global_scale)
    y, halves = _allocate(x, dtype, step.is_last)
    sums = step.engine.forward_halves(x, a, step.coupling, halves)
    return (halves.passive if y is None else y), halves, sums


def _allocate(x: Halves, dtype: torch.dtype, is_last: bool) -> tuple[Tensor | None, Halves]:
    """Return a new tensor in halves for the result, and the whole one if ``is_last``.

    The halves of rows, and those of a single sample, are views of a whole tensor, too. A linear
    layer takes a view as it is.
    """
    batch, passive, *spatial = x.passive.shape
    active, device = x.active.shape[1], x.passive.device
    if is_last or batch == 1 or x.passive.dim() == 2:
        y = torch.empty((batch, passive + active, *spatial), dtype=dtype, device=device)
        return (y if is_last else None), Halves(*plain.split(y))
    return None, Halves(
        torch.empty((batch, passive, *spatial), dtype=dtype, device=device),
        torch.empty((batch, active, *spatial), dtype=dtype, device=device),
    )


class _CouplingInHalves(Function):
    """A coupling of a chain; see :func:`couple`. The last one returns y and the sums alone."""

    @staticmethod
    def forward(
        ctx: Any, passive: Tensor, active: Tensor, a: Tensor, g: Tensor, offset: Tensor, step: Step
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        coupling = step.coupling
        saved = passive, active, a, g, offset, coupling.perm, coupling.inv, coupling.scale
        ctx.save_for_backward(*saved)
        # No tensors here: only saved ones are seen by hooks and checked for in-place changes.
        ctx.constants = coupling.spec, step.engine, step.is_last, step.dtype
        y, halves, sums = _couple(Halves(passive, active), a, step)
        if step.is_last:
            return y, sums
        # The detached tensor shares memory and version with the half, but is another output.
        return y.detach(), *halves, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        passive, active, a, g, offset, perm, inv, scale = ctx.saved_tensors
        spec, engine, is_last, dtype = ctx.constants
        coupling = Coupling(g, offset, spec, perm, inv, scale=scale)
        *of_y, dsums = grads
        dlog_det = None if dsums is None else dsums.select(1, 0)  # each part gets the same
        if torch.is_grad_enabled() or needs_plain(*grads):
            gradients = differentiate(
                partial(_plain_halves, coupling, is_last, dtype),
                ctx,
                (passive, active, a, g, offset),
                (*of_y, dlog_det),
            )
            return *gradients, None
        x = Halves(passive, active)
        dtype = dtype or promoted(passive, a, g)
        halves = _grads_in_halves(of_y, x, dtype)._replace(log_det=dlog_det)
        want_params = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        dx, da, dg, doffset = engine.backward_halves(x, a, halves, coupling, want_params)
        return *dx, da, dg, doffset, None


_apply_coupling = torch_private.direct_apply(_CouplingInHalves)


def _grads_in_halves(of_y: Sequence[Tensor | None], x: Halves, dtype: torch.dtype) -> HalvesGrads:
    """Return the gradients of y, which are those of the whole y or of a node's three outputs.

    Args:
        of_y: The gradients.
        x: The block's input, in halves, of which those of y have the shapes.
        dtype: That of y.
    """
    from_subnet: Tensor | None = None
    if len(of_y) == 1:
        (dy,) = of_y
        passive, active = (None, None) if dy is None else plain.split(packed(dy))
    else:
        from_subnet, passive, active = of_y
    if passive is None:
        passive, from_subnet = from_subnet, None
    grads = [
        torch.zeros(t.shape, dtype=dtype, device=t.device) if d is None else packed(d)
        for d, t in zip((passive, active), x, strict=True)
    ]
    from_subnet = None if from_subnet is None else packed(from_subnet)
    return HalvesGrads(grads[0], grads[1], from_subnet, None)


def _plain_halves(
    coupling: Coupling, is_last: bool, dtype: torch.dtype | None, leaves: list[Tensor]
) -> tuple[Tensor, ...]:
    """Compute what the node returns by plain operations, with the log-determinant for the sums."""
    passive, active, a, g, offset = leaves
    v, log_det = plain.forward(passive, active, a, g, offset, coupling.spec)
    assert coupling.perm is not None
    assert coupling.inv is not None
    v = v if dtype is None else v.to(dtype)
    y = gather_channels(v, coupling.perm, coupling.inv)
    if is_last:
        return y, log_det
    y1, y2 = plain.split(y)
    return y1, y1, y2, log_det


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
