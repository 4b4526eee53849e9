"""The evaluation of a coupling block of FrEIA, which transforms its halves one after the other.

Each side reads one half through a subnet and transforms the other one. A side writes its result to
where it stays: to channels of the block's output, which the next side's subnet reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastflow_kernels import block, torch_private
from fastflow_kernels.block import for_engine, for_subnet, match_format
from fastflow_kernels.call import (
    BlockCall,
    PermutationCall,
    SidesCall,
    ordered_sides,
    side_coefficients,
)
from fastflow_kernels.coupling import Coupling, CouplingSpec, OutputGrads
from fastflow_kernels.dtypes import accumulator, cast, promoted
from fastflow_kernels.engines import Engine, plain
from fastflow_kernels.fused import differentiate
from fastflow_kernels.layouts import in_layout
from fastflow_kernels.route import Route, choose_route
from fastflow_kernels.torch_private import needs_plain


def evaluate(call: BlockCall | SidesCall | PermutationCall) -> tuple[Tensor, Any]:
    """Evaluate a call of any module that we run, or its inverse.

    Returns:
        The output (B, C, *S), as :func:`fastflow_kernels.block.evaluate` does, and the
        log-determinant (B,) in nats. Modules of FrEIA that preserve volume return 0.0 for it.
    """
    if isinstance(call, BlockCall):
        return block.evaluate(call)
    if isinstance(call, PermutationCall):
        if call.rev:
            return call.permutation.unpermute(call.x), 0.0
        return call.permutation.permute(call.x), 0.0
    if call.spec.function == "additive":
        return _plain(call)[0], 0.0
    route = choose_route(call)
    if route.engine is None or 0 in call.sizes:
        y, sums = _plain(call)
    else:
        y, sums = _fused(call, route, route.engine)
    if call.spec.gin:
        return y, 0.0
    return y, sums[0] if len(sums) == 1 else sums[0] + sums[1]


# --- plain operations -----------------------------------------------------------------------------


def _plain(call: SidesCall) -> tuple[Tensor, list[Any]]:
    """Compute a block or its inverse by ordinary differentiable operations."""
    parts, sums, in_place = split(call.x, call.sizes), [], plain.may_write()
    for side in ordered_sides(call):
        a = side_coefficients(call, side, None if side.passive is None else parts[side.passive])
        parts[side.active], sum_s = transform(parts[side.active], a, call.spec, call.rev, in_place)
        sums.append(sum_s)
    y = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    return (y if y.dim() < 4 else match_format(call.x, y)), sums


def transform(
    x: Tensor, a: tuple[Tensor, ...], spec: CouplingSpec, rev: bool, in_place: bool = False
) -> tuple[Tensor, Any]:
    """Transform the active part by plain operations: see :func:`plain.couple`.

    The coefficients are those of :func:`~fastflow_kernels.call.side_coefficients`.
    """
    if spec.function == "additive":
        return (x - a[0] if rev else x + a[0]), 0.0
    a_s, a_t = a if len(a) > 1 else plain.split_at(a[0], x.shape[1], x.shape[1])
    dtype = promoted(x, a_s, a_t)
    acc_dtype = accumulator(dtype)
    if x.dtype is a_s.dtype is a_t.dtype is acc_dtype:
        return plain.couple_by(x, a_s, a_t, spec, rev, in_place)
    halves = cast(a_s, acc_dtype), cast(a_t, acc_dtype)
    y, sum_s = plain.couple_by(cast(x, acc_dtype), *halves, spec, rev, in_place)
    return cast(y, dtype), sum_s


def joined(a: tuple[Tensor, ...]) -> Tensor:
    """Return coefficients in one tensor, as the engines take them."""
    return a[0] if len(a) == 1 else torch.cat(a, 1)


def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return consecutive channels of x, (B, C, *S), as views of these sizes."""
    return list(torch.split_with_sizes(x, sizes, 1)) if len(sizes) > 1 else [x]


# --- an engine ------------------------------------------------------------------------------------


def _fused(call: SidesCall, route: Route, engine: Engine) -> tuple[Tensor, list[Any]]:
    """Compute a block or its inverse by an engine."""
    x = call.x.contiguous() if route.is_copied else call.x
    output, sums, first = _Output(call, engine, x, route), [], ordered_sides(call)[0].passive
    if route.with_gradients and x.requires_grad and first is not None:
        output.shared = _Shared()
        *before, passive = _apply_parts(x, call.sizes, first, output.shared)
    else:
        before = split(x, call.sizes)
        passive = None if first is None else before[first]
    # The parts as the subnets see them: those of x, until a side has written its own.
    parts, y = before[:], x
    for i, side in enumerate(ordered_sides(call)):
        if i:
            passive = None if side.passive is None else parts[side.passive]
        passive = None if passive is None else for_subnet(passive, route)
        coefficients = [for_engine(t, route) for t in side_coefficients(call, side, passive)]
        a, shift = coefficients if len(coefficients) > 1 else (coefficients[0], None)
        if i < len(call.sides) - 1:
            rest = None
        else:  # the last side also takes care of the parts that it does not write
            rest = parts[1 - side.active] if len(parts) > 1 else None
        operands = before[side.active], a, shift, rest, output, side.active
        if route.with_gradients:
            y, sum_s = _apply_side(*operands)
        else:
            y, sum_s = _run_side(*operands)
        parts[side.active] = y
        sums.append(sum_s)
    return in_layout(y, route.layout), sums


class _Output:
    """The tensor that the sides of a call write to, and what they have in common.

    Attributes:
        y: The tensor (B, C, *S), once a side has begun.
        shared: What their backward passes share, if x is split and takes a gradient.
    """

    y: Any = None
    shared: _Shared | None = None

    def __init__(self, call: SidesCall, engine: Engine, x: Tensor, route: Route) -> None:
        self.spec, self.engine, self.rev, self.sizes = call.spec, engine, call.rev, call.sizes
        self.shape, self.device = x.shape, x.device
        self.layout = torch.contiguous_format if route.is_copied else route.layout

    def range_of(self, part: int) -> tuple[int, int]:
        """Return the first channel of a part and the number of its channels."""
        return sum(self.sizes[:part]), self.sizes[part]

    def write(
        self, x: Tensor, a: Tensor, coupling: Coupling, rest: Tensor | None, part: int
    ) -> Tensor:
        """Transform a part and write it to y, and return the sum of s per sample.

        Args:
            x: The part before.
            a: Its coefficients, or a_s alone.
            coupling: What to compute.
            rest: The other part as it ends up, if y must be complete afterwards. It is there
                already if a side has written it.
            part: Which part it is.
        """
        dtype = promoted(x, a, coupling.shift, rest)
        y = self.y
        if y is None or y.dtype is not dtype:
            with torch_private.versions_counted():
                y = torch.empty(
                    self.shape, dtype=dtype, device=self.device, memory_format=self.layout
                )
            if rest is not None:
                y.narrow(1, *self.range_of(1 - part)).copy_(rest)
            self.y = y
        # Use .data: otherwise autograd sees this as a change to what the next subnet has saved.
        target = y.data.narrow(1, *self.range_of(part))
        if self.rev:
            return self.engine.invert_active(x, target, a, coupling)
        return self.engine.forward(x, a, coupling, target)[1]

    def is_complete(self, rest: Tensor | None) -> bool:
        """Return whether a side that got this ``rest`` is the last one."""
        return rest is not None or len(self.sizes) == 1


def _run_side(
    x: Tensor,
    a: Tensor,
    shift: Tensor | None,
    rest: Tensor | None,
    output: _Output,
    part: int,
) -> tuple[Tensor, Tensor]:
    """Compute one side as :class:`_Side` does, without gradients."""
    sum_s = output.write(x, a, Coupling(None, None, output.spec, shift=shift), rest, part)
    y: Tensor = output.y
    return (y if output.is_complete(rest) else y.narrow(1, *output.range_of(part))), sum_s


class _Shared:
    """What the backward nodes of a call's sides share.

    Attributes:
        dx: The gradient of the whole x while they write to it, each to its own part, with the
            number of the backward pass. Passes of several threads may run at once.
    """

    dx: tuple[int, Tensor] | None = None

    def of_this_pass(self) -> Tensor | None:
        """Return the tensor if this backward pass has made it."""
        dx = self.dx
        return dx[1] if dx is not None and dx[0] == torch_private.backward_pass() else None


class _Parts(Function):
    """The autograd node x -> (its parts for the sides, the part that the first subnet reads).

    The sides have written their parts' gradients to one tensor, unless something else was added.
    Autograd's own split would copy all of them. See also :class:`fastflow_kernels.fork._Fork`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: tuple[int, ...], passive: int, shared: _Shared
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.constants = sizes, passive, shared, x.shape, x.dtype, x.device
        parts = split(x, sizes)
        return *parts, parts[passive].view_as(parts[passive])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        sizes, passive, shared, shape, dtype, device = ctx.constants
        dx, shared.dx = shared.of_this_pass(), None
        *of_parts, of_passive = grads
        is_plain = torch.is_grad_enabled() or needs_plain(*grads)
        if dx is None or is_plain:
            dx = torch.zeros(shape, dtype=dtype, device=device)
        targets = split(dx, sizes)
        for i, d in enumerate(of_parts):
            if d is None:
                targets[i].zero_()
            elif is_plain:
                targets[i] = d
            elif d.data_ptr() != targets[i].data_ptr():
                targets[i].copy_(d)
        if of_passive is not None:
            if is_plain:
                targets[passive] = targets[passive] + of_passive
            else:
                targets[passive].add_(of_passive)
        return (torch.cat(targets, 1) if is_plain else dx), None, None, None


_apply_parts = torch_private.direct_apply(_Parts)


class _Side(Function):
    """One side as an autograd node, which saves its part of x and the coefficients.

    Coefficients a_t that come apart are not saved, because no gradient depends on them.

    On a CPU it also saves exp(s), so that it needs as much memory as FrEIA's block.

    The last side returns the whole y. The one before returns what it has written, for a subnet.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        shift: Tensor | None,
        rest: Tensor | None,
        output: _Output,
        part: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        exp = None
        if x.device.type == "cpu" and x.dtype is a.dtype is accumulator(x.dtype):
            exp = torch.empty(x.shape, dtype=x.dtype, memory_format=output.layout)
        ctx.save_for_backward(x, a, exp)
        ctx.constants = output.spec, output.engine, output.shared, output.shape, output.layout
        ctx.shift_dtype = None if shift is None else shift.dtype
        coupling = Coupling(None, None, output.spec, exp=exp, shift=shift)
        sum_s = output.write(x, a, coupling, rest, part)
        ctx.own = output.range_of(part)
        ctx.rest = None if rest is None else output.range_of(1 - part)
        ctx.is_whole = output.is_complete(rest)
        if ctx.is_whole:
            return output.y, sum_s
        # A view of y would keep y's graph alive, which contains the view. The detached tensor
        # still counts changes together with y.
        return output.y.detach().narrow(1, *ctx.own), sum_s

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        x, a, exp = ctx.saved_tensors
        spec, engine, shared, shape, layout = ctx.constants
        drest = None
        if dy is None:
            dy = torch.zeros(x.shape, dtype=promoted(x, a), device=x.device)
        elif ctx.is_whole:
            drest = None if ctx.rest is None else dy.narrow(1, *ctx.rest)
            dy = dy.narrow(1, *ctx.own)
        dshift = None if ctx.shift_dtype is None else cast(dy, ctx.shift_dtype)
        if torch.is_grad_enabled() or needs_plain(dy, dsum):
            dx, da = differentiate(
                lambda leaves: _transform_by_s(leaves[0], leaves[1], spec),
                ctx,
                (x, a),
                (dy, dsum),
            )
            return dx, da, dshift, drest, None, None
        target = None
        if shared is not None:
            whole = shared.of_this_pass()
            if whole is None:
                whole = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
                shared.dx = torch_private.backward_pass(), whole
            target = whole.narrow(1, *ctx.own)
        coupling = Coupling(None, None, spec, exp=exp)
        operands = OutputGrads(dy, dsum), coupling, False, target
        dx, da, *_ = engine.backward(x, a, *operands)
        return dx, da, dshift, drest, None, None


def _transform_by_s(x: Tensor, a: Tensor, spec: CouplingSpec) -> tuple[Tensor, Any]:
    """Do :func:`transform`. If a is a_s alone, any a_t gives the same gradients."""
    coefficients = (a,) if a.shape[1] > x.shape[1] else (a, torch.zeros_like(a))
    return transform(x, coefficients, spec, False)


_apply_side = torch_private.direct_apply(_Side)
