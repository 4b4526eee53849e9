"""The fused coupling as an autograd node, which saves x, coefficients, parameters and index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastflow_kernels import torch_private
from fastflow_kernels.channels import gather_channels, reflect, reflect_backward
from fastflow_kernels.coupling import Coupling, OutputGrads
from fastflow_kernels.dtypes import promoted
from fastflow_kernels.engines import Engine, plain
from fastflow_kernels.permutations import AfterCoupling
from fastflow_kernels.route import Route
from fastflow_kernels.torch_private import needs_plain


def fused_coupling(
    x: Tensor, a: Tensor, coupling: Coupling, after: AfterCoupling, route: Route
) -> tuple[Tensor, Tensor]:
    """Compute the coupling, the global affine and the fused part of the permutation.

    Args:
        x: (B, C, *S).
        a: (B, 2*C2, *S), the subnet's output.
        coupling: The engine's operands beside them.
        after: What follows the coupling. Reflections are computed here, the permutation is not.
        route: The call's route.

    Returns:
        y (B, C, *S) and the log-determinant (B,) in nats.
    """
    if not route.with_gradients:  # autograd would record nothing
        return _couple_and_reflect(x, a, coupling, after.inner, after.outer, route)
    # GIN's scale is 1 and does not depend on the parameter
    g = coupling.global_scale
    if coupling.spec.gin and g is not None:
        g = g.detach()
    y, log_det = _apply_coupling(
        x, a, g, coupling.global_offset, after.inner, after.outer, coupling, route
    )
    return y, log_det


def _couple_and_reflect(
    x: Tensor,
    a: Tensor,
    coupling: Coupling,
    inner: Tensor | None,
    outer: Tensor | None,
    route: Route,
) -> tuple[Tensor, Tensor]:
    assert route.engine is not None
    v, log_det = route.engine.forward(x, a, coupling)
    if inner is not None and outer is not None:
        v = reflect(v, inner, outer)
    return v, log_det


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
        coupling: Coupling,
        route: Route,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, g, offset, inner, outer, coupling.perm, coupling.inv)
        # No tensors here: only saved ones are seen by hooks and checked for in-place changes.
        ctx.constants = coupling.spec, coupling.unpermutes_input
        ctx.engine = route.engine
        return _couple_and_reflect(x, a, coupling, inner, outer, route)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlog_det: Tensor | None) -> tuple[Tensor | None, ...]:
        x, a, g, offset, inner, outer, perm, inv = ctx.saved_tensors
        spec, unpermutes_input = ctx.constants
        coupling = Coupling(g, offset, spec, perm, inv, unpermutes_input)
        if dy is None:
            dy = torch.zeros(x.shape, dtype=promoted(x, a, g), device=x.device)
        if torch.is_grad_enabled() or needs_plain(dy, dlog_det):
            sources = (x, a, g, offset, inner, outer)
            gradients = differentiate(
                partial(_plain_coupling, coupling), ctx, sources, OutputGrads(dy, dlog_det)
            )
            return *gradients, None, None
        engine: Engine = ctx.engine
        dinner = douter = None
        if inner is not None:
            v, _ = engine.forward(x, a, coupling)  # computed again, to save memory
            dy, dinner, douter = reflect_backward(dy, v, inner, outer)
            dinner, douter = dinner.to(inner.dtype), douter.to(outer.dtype)
        want_params = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        dx, da, dg, doffset = engine.backward(
            x, a, OutputGrads(dy, dlog_det), coupling, want_params
        )
        return dx, da, dg, doffset, dinner, douter, None, None


_apply_coupling = torch_private.direct_apply(_Coupling)


def differentiate(
    compute: Callable[[list[Any]], tuple[Tensor, ...]],
    ctx: Any,
    sources: tuple[Any, ...],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Compute the gradients of a node by plain operations, which are differentiable again.

    Args:
        compute: Computes what the node computes, by differentiable operations.
        ctx: The node.
        sources: The node's first arguments, which may take gradients.
        grads: The gradients of its results.
    """
    wanted = ctx.needs_input_grad[: len(sources)]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because a depends on x through the subnet, and that path is not this node's.
        leaves = [
            t if not want else t.view_as(t) if create_graph else t.detach().requires_grad_()
            for t, want in zip(sources, wanted, strict=True)
        ]
        outputs = compute(leaves)
        # An output may not require a gradient: the log-determinant, if only offset does.
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


def _plain_coupling(coupling: Coupling, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute what :func:`fused_coupling` returns by plain operations."""
    x, a, g, offset, inner, outer = leaves
    perm, inv = coupling.perm, coupling.inv
    if coupling.unpermutes_input and perm is not None and inv is not None:
        x = gather_channels(x, inv, perm)
    x1, x2 = plain.split(x)
    y, log_det = plain.forward(x1, x2, a, g, offset, coupling.spec)
    if perm is not None and inv is not None:
        y = gather_channels(y, perm, inv)
    elif inner is not None:
        y = reflect(y, inner, outer)
    return y, log_det
