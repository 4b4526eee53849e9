"""The fused coupling as an autograd node: it keeps x, the coefficients, parameters and index."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflow_kernels import torch_private
from fastflow_kernels.channels import gather_channels, reflect, reflect_backward
from fastflow_kernels.coupling import Coupling, OutputGrads
from fastflow_kernels.dtypes import promoted
from fastflow_kernels.engines import Engine, plain
from fastflow_kernels.layouts import Form
from fastflow_kernels.torch_private import needs_plain


class Fused(NamedTuple):
    """What the fused coupling is told beside x and the coefficients.

    Attributes:
        coupling: What the engine is given.
        inner, outer: Factors of the reflections that follow the coupling, or None.
        form: In which form the engine is given the tensors.
        engine: Computes the coupling.
    """

    coupling: Coupling
    inner: Tensor | None
    outer: Tensor | None
    form: Form
    engine: Engine


def fused_coupling(
    x: Tensor, a: Tensor, fused: Fused, with_gradients: bool
) -> tuple[Tensor, Tensor]:
    """The coupling, the global affine and what is fused of the permutation.

    Args:
        x: (B, C, *S).
        a: (B, 2*C2, *S), the subnet's output.
        fused: All else.
        with_gradients: Whether gradients are enabled.

    Returns:
        y (B, C, *S) and the log-determinant (B,) in nats.
    """
    if not with_gradients:  # autograd would make no node
        return _evaluate(x, a, fused)
    coupling = fused.coupling
    # the scale of GIN is 1, whatever the parameter is
    g = coupling.global_scale.detach() if coupling.spec.gin else coupling.global_scale
    y, log_det = _apply_coupling(x, a, g, coupling.global_offset, fused.inner, fused.outer, fused)
    return y, log_det


def _evaluate(x: Tensor, a: Tensor, fused: Fused) -> tuple[Tensor, Tensor]:
    form = fused.form
    v, log_det = fused.engine.forward(form.take(x), form.take(a), fused.coupling)
    if fused.inner is not None and fused.outer is not None:
        v = reflect(v, fused.inner, fused.outer)
    return form.give(v, x), form.per_sample(log_det, x)


class _Coupling(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        g: Tensor,
        offset: Tensor,
        inner: Tensor | None,
        outer: Tensor | None,
        fused: Fused,
    ) -> tuple[Tensor, Tensor]:
        coupling = fused.coupling
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, g, offset, inner, outer, coupling.perm, coupling.inv)
        # no tensor: those are to be saved, so that hooks see them and changes are noticed
        ctx.constants = coupling.spec, coupling.reverse, coupling.rows_per_sample
        ctx.form, ctx.engine = fused.form, fused.engine
        return _evaluate(x, a, fused)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlog_det: Tensor | None) -> tuple[Tensor | None, ...]:
        x, a, g, offset, inner, outer, perm, inv = ctx.saved_tensors
        spec, reverse, rows_per_sample = ctx.constants
        coupling = Coupling(g, offset, spec, perm, inv, reverse, rows_per_sample)
        if dy is None:
            dy = torch.zeros(x.shape, dtype=promoted(x, a, g), device=x.device)
        if torch.is_grad_enabled() or needs_plain(dy, dlog_det):
            sources = (x, a, g, offset, inner, outer)
            return *_plain_backward(ctx, sources, OutputGrads(dy, dlog_det), coupling), None
        form: Form = ctx.form
        engine: Engine = ctx.engine
        dv, x_taken, a_taken = form.take(dy), form.take(x), form.take(a)
        dinner = douter = None
        if inner is not None:
            v, _ = engine.forward(x_taken, a_taken, coupling)  # again rather than kept
            dv, dinner, douter = reflect_backward(dv, v, inner, outer)
            dinner, douter = dinner.to(inner.dtype), douter.to(outer.dtype)
        want_params = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        dx, da, dg, doffset = engine.backward(
            x_taken, a_taken, OutputGrads(dv, dlog_det), coupling, want_params
        )
        return form.give(dx, x), form.give(da, x), dg, doffset, dinner, douter, None


_apply_coupling = torch_private.direct_apply(_Coupling)


def _plain_backward(
    ctx: Any, sources: tuple[Any, ...], grads: OutputGrads, coupling: Coupling
) -> list[Tensor | None]:
    """The backward through plain operations, itself differentiable."""
    wanted = ctx.needs_input_grad[: len(sources)]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: x also reaches a through the subnet, and that gradient is not this node's to give.
        leaves = [
            t if not want else t.view_as(t) if create_graph else t.detach().requires_grad_()
            for t, want in zip(sources, wanted, strict=True)
        ]
        outputs = _plain_coupling(leaves, coupling)
        # one of them may depend on nothing that takes a gradient: the log-determinant, where only
        # offset does
        pairs = [
            (t, dt)
            for t, dt in zip(outputs, grads, strict=True)
            if dt is not None and t.requires_grad
        ]
        inputs = [t for t, want in zip(leaves, wanted, strict=True) if want]
        if not pairs:
            return [None] * len(wanted)
        gradients = iter(
            torch.autograd.grad(
                [t for t, _ in pairs],
                inputs,
                [dt for _, dt in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [next(gradients) if want else None for want in wanted]


def _plain_coupling(leaves: list[Tensor], coupling: Coupling) -> tuple[Tensor, Tensor]:
    """What :func:`fused_coupling` returns, by plain operations."""
    x, a, g, offset, inner, outer = leaves
    perm, inv = coupling.perm, coupling.inv
    if coupling.reverse and perm is not None and inv is not None:
        x = gather_channels(x, inv, perm)
    x1, x2 = plain.split(x)
    y, log_det = plain.forward(x1, x2, a, g, offset, coupling.spec)
    if perm is not None and inv is not None:
        y = gather_channels(y, perm, inv)
    elif inner is not None:
        y = reflect(y, inner, outer)
    return y, log_det
