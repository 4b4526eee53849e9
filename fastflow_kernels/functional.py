"""The block as a function: input checks, and how gradients flow through the coupling, its subnet
and the permutation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastflow_kernels import dispatch, modes
from fastflow_kernels.engines import eager
from fastflow_kernels.errors import InputTypeError, InputValueError
from fastflow_kernels.layouts import as_rows, from_rows, memory_format
from fastflow_kernels.permutations import (
    HouseholderPermutation,
    IndexPermutation,
    MatrixPermutation,
    Permutation,
    gather_channels,
    reflect,
    reflect_bwd,
    take_channels,
)
from fastflow_kernels.coupling import CouplingSpec

# --- checks ---------------------------------------------------------------------------------------


def single_input(
    x: Sequence[Tensor], channels: int, rank: int, shape: tuple[int, ...] | None = None
) -> Tensor:
    """Check a block's input before any work and return its one tensor.

    Args:
        x: A list or tuple with one tensor (B, C, *S).
        channels: C.
        rank: Number of spatial dimensions, 0 to 3.
        shape: (C, *S) if it is fixed, else None.

    Raises:
        InputTypeError: Not a list or tuple of tensors, or of a dtype that is neither floating,
            integer nor boolean.
        InputValueError: Not exactly one tensor, or one of another shape.
    """
    if not isinstance(x, (list, tuple)):
        if isinstance(x, Tensor):
            raise InputTypeError(
                f"expected a list with one tensor, got a tensor of shape {tuple(x.shape)}: call "
                "block([x])"
            )
        raise InputTypeError(f"expected a list with one tensor, got {type(x).__name__}")
    if len(x) != 1:
        raise InputValueError(f"expected exactly one input tensor, got {len(x)}")
    x = x[0]
    _check_dense(x, "the input")
    if x.dtype not in _DTYPES and x.dtype not in _INTEGERS:
        raise InputTypeError(
            f"expected the input in a floating-point dtype, got {x.dtype}; "
            f"{', '.join(map(str, _DTYPES))} are supported"
        )
    size = x.shape
    if len(size) != rank + 2 or size[1] != channels:
        spatial = "".join(f", S{i + 1}" for i in range(rank))
        raise InputValueError(
            f"expected an input of shape (B, {channels}{spatial}), got {tuple(size)}"
        )
    if shape is not None and size[1:] != shape:
        raise InputValueError(
            f"expected an input of shape (B, {', '.join(map(str, shape))}), got {tuple(size)}"
        )
    return x


def check_conditions(
    c: Sequence[Tensor] | None, dims_c: Sequence[Sequence[int]], x: Tensor
) -> Sequence[Tensor]:
    """Check a block's conditions before any work and return them.

    Args:
        c: A list of tensors (B, C_k, *S), or None for none; of any dtype, for they are joined to x,
            and promoted (labels, masks). As in the stock blocks, they may be split in another way
            than declared, and where none is declared they are ignored.
        dims_c: The declared shapes, of which the first number counts: C_k.
        x: The block's input, (B, C, *S).

    Raises:
        InputTypeError: Not a list or tuple of tensors.
        InputValueError: Another number of conditions than declared, or one of another shape.
    """
    if not dims_c:
        return ()
    c = () if c is None else c
    if isinstance(c, Tensor) or not isinstance(c, (list, tuple)):
        raise InputTypeError(
            f"expected the conditions as a list of tensors, got {type(c).__name__}"
        )
    if len(c) != len(dims_c):
        dims_c = _as_given(c, dims_c)
    batch, _, *spatial = x.shape
    for k, condition in enumerate(c):
        _check_dense(condition, "condition", k)
        expected = (batch, dims_c[k][0], *spatial)
        if condition.shape != expected:
            if (
                condition.shape[1:2] != expected[1:2]
                and (given := _as_given(c, dims_c)) is not dims_c
            ):
                return check_conditions(c, given, x)
            raise InputValueError(
                f"expected condition {k} of shape {expected}, got {tuple(condition.shape)}"
            )
        if condition.device != x.device:
            raise InputValueError(
                f"expected condition {k} on {x.device}, where the input is; got {condition.device}"
            )
    return c


def _as_given(c: Sequence[Tensor], dims_c: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """The shapes of conditions that are split in another way than declared, if together they have
    as many channels.
    """
    given = [tuple(t.shape[1:]) for t in c if isinstance(t, Tensor) and t.dim() > 1]
    if len(given) == len(c) and sum(shape[0] for shape in given) == sum(dims[0] for dims in dims_c):
        return given
    if len(c) != len(dims_c):
        raise InputValueError(f"expected {len(dims_c)} condition(s), got {len(c)}")
    return dims_c


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# which promote as soon as they are computed with
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def _check_floating(t: Any, what: str) -> None:
    if not isinstance(t, Tensor) or t.layout is not torch.strided:
        _check_dense(t, what)
    if t.dtype not in _DTYPES:
        raise InputTypeError(
            f"expected {what} in a floating-point dtype, got {t.dtype}; "
            f"{', '.join(map(str, _DTYPES))} are supported"
        )


def _check_dense(t: Any, what: str, k: int | None = None) -> None:
    if isinstance(t, Tensor) and t.layout is torch.strided:
        return
    what = what if k is None else f"{what} {k}"
    if not isinstance(t, Tensor):
        raise InputTypeError(f"expected {what} to be a tensor, got {type(t).__name__}")
    raise InputTypeError(f"expected {what} as a dense tensor, got layout {t.layout}")


class _SubnetInLayout(NamedTuple):
    """A subnet whose input is to lie as the block's input does, of which the kernels took a copy in
    another layout.

    A convolution rounds otherwise in each layout, and the stock block's runs in that of its input.
    """

    subnet: Callable[[Tensor], Tensor]
    layout: torch.memory_format


_Subnet = Callable[[Tensor], Tensor] | _SubnetInLayout


def _coefficients(subnet: _Subnet, x1: Tensor, conditions: Sequence[Tensor], x: Tensor) -> Tensor:
    """Run the subnet on the passive half and the conditions and check what comes back."""
    if isinstance(subnet, _SubnetInLayout):
        subnet, layout = subnet
        # contiguous() would leave a single channel of a single sample as it is
        x1 = x1.clone(memory_format=layout)
    version = None
    if conditions:
        a = subnet(torch.cat((x1, *conditions), 1))
    else:
        version = None if torch.compiler.is_compiling() or x1.is_inference() else x1._version
        a = subnet(x1)
    _check_floating(a, "the subnet's output")
    size = x.shape
    if a.shape != size or size[1] % 2:  # an odd channel stays alone
        expected = (size[0], size[1] // 2 * 2, *size[2:])
        if a.shape != expected:
            raise InputValueError(
                f"expected the subnet to return shape {expected}, got {tuple(a.shape)}"
            )
    if a.device != x.device:
        raise InputValueError(
            f"expected the subnet's output on {x.device}, where the input is; got {a.device}"
        )
    if version is not None and x1._version != version:
        raise RuntimeError(
            "the subnet changed its input in place; use out-of-place operations at its start (such "
            "as ReLU(inplace=False))"
        )
    return a


def starts_in_place(subnet: Callable[[Tensor], Tensor]) -> bool:
    """Whether the first layer of a module writes to its input."""
    while isinstance(subnet, torch.nn.Module) and subnet._modules:
        subnet = next(iter(subnet._modules.values()))
    return bool(getattr(subnet, "inplace", False))


# Elements up to which the kernels' input is handed to autograd in two halves: one Python node less
# (some 15 us of a train step) for 2 N of traffic more than with _Fork, which take as long from here
# on where a GPU moves 3 TB/s. On a CPU the traffic is dearer at every size that is not run in plain
# operations anyway (train step, AMD EPYC: 1.00 times slower at 32K elements, 1.04 at 256K, 1.05 at
# 1M).
_LAUNCH_BOUND = 1 << 20


def _in_halves(x: Tensor, operations: ModuleType) -> bool:
    return operations is not eager and x.numel() <= _LAUNCH_BOUND


# --- the block ------------------------------------------------------------------------------------


def all_in_one_block(
    x: Tensor,
    subnet: Callable[[Tensor], Tensor],
    global_scale: Tensor,
    global_offset: Tensor,
    permutation: Permutation,
    spec: CouplingSpec,
    conditions: Sequence[Tensor] = (),
    *,
    rev: bool = False,
    reverse_permutation: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One affine coupling block: split, coupling, global affine, permutation, with its
    log-determinant; or the inverse.

    Args:
        x: (B, C, *S), floating point; the output of the forward direction if ``rev``.
        subnet: Maps cat(x1, *conditions) (B, C - C//2 + sum C_k, *S) to the coefficients (B, 2 *
            (C//2), *S).
        global_scale: C elements, before its activation.
        global_offset: C elements.
        permutation: See :mod:`fastflow_kernels.permutations`.
        spec: The coupling's constants.
        conditions: Tensors (B, C_k, *S).
        rev: Compute the inverse.
        reverse_permutation: Undo the permutation before the coupling (Putzky & Welling 2019).
        backend: "auto", "eager" or "triton".

    Returns:
        The output (B, C, *S) in the promoted dtype of x, the coefficients and the parameters,
        channels-last where x is; and the log-determinant (B,) in nats per sample, float64 for a
        float64 output and float32 otherwise.

    Raises:
        RuntimeError: ``backend="triton"`` cannot be honoured, or the subnet writes to its input.
        InputTypeError, InputValueError: The subnet returns another shape, or no floating-point
            tensor.
    """
    backend = dispatch.resolved(backend)
    if dispatch.is_plain(x, backend, _dearer_by(permutation)) or (rev and torch.is_grad_enabled()):
        if rev and backend == "triton" and x.numel():
            raise RuntimeError(
                "backend 'triton' has no gradient of the inverse: call it under torch.no_grad(), "
                "or use backend='auto'"
            )
        return _plain(
            x,
            subnet,
            global_scale,
            global_offset,
            permutation,
            spec,
            conditions,
            rev,
            reverse_permutation,
        )
    backend = dispatch.unless_annealed(backend, x, spec)
    direction = _inverse if rev else _forward
    layout = memory_format(x)
    # a parametrization may expand them
    global_scale, global_offset = global_scale.contiguous(), global_offset.contiguous()
    rows, spec = _pixels_as_rows(x, layout, spec, backend)
    taken = x if rows else dispatch.coverable(x, backend)
    copied = taken is not x and layout is not torch.contiguous_format
    x, gathers = taken, reverse_permutation
    if reverse_permutation and _folds_reverse(x, permutation, rows, backend):
        gathers, spec = False, spec._replace(reverse=True)
    if gathers and not rev:
        # in the layout of x, which is not `layout` where x is a contiguous copy for the kernels
        x = permutation.unpermute(x).contiguous(memory_format=memory_format(x))
    net = _SubnetInLayout(subnet, layout) if copied else subnet
    out, logdet = direction(
        x, net, global_scale, global_offset, permutation, spec, conditions, rows, backend
    )
    if gathers and rev:
        out = permutation.permute(out)
    if layout is not torch.contiguous_format:
        out = out.contiguous(memory_format=layout)
    return out, logdet


def _folds_reverse(x: Tensor, permutation: Permutation, rows: bool, backend: str) -> bool:
    """Whether undoing the permutation ahead of the coupling costs no pass over x: the kernels read
    it through the index.

    Not the eager functions: they would gather piece by piece what one index_select takes at once
    (0.3 ns an element at rank 0, 0.1 on planes), and the passive half, which the subnet gets, once
    more.
    """
    return (
        isinstance(permutation, IndexPermutation) and dispatch.pick(x, backend, rows) is not eager
    )


def _plain(
    x: Tensor,
    subnet: Callable[[Tensor], Tensor],
    g: Tensor,
    offset: Tensor,
    permutation: Permutation,
    spec: CouplingSpec,
    conditions: Sequence[Tensor],
    rev: bool,
    reverse_permutation: bool,
) -> tuple[Tensor, Tensor]:
    """The block as ordinary differentiable operations."""
    given = x
    if rev:
        v = permutation.unpermute(x)
        u, scale = eager.composite_inv_affine(v, g, offset, spec)
        u1, u2 = eager.halves(u)
        dtype = eager.promoted(v, g)  # of the result, where no subnet widens it
        a = _coefficients(subnet, u1 if u1.dtype is dtype else u1.to(dtype), conditions, x)
        y, logdet = eager.composite_inv_coupling(u1, u2, a, scale, spec)
        if a.dtype is not dtype or y.dtype is not dtype:
            y = y.to(eager.promoted(v, g, a))
        if reverse_permutation:
            y = permutation.permute(y)
    else:
        if reverse_permutation:
            x = permutation.unpermute(x)
        x1, x2 = eager.halves(x)
        v, logdet = eager.composite_fwd(
            x1, x2, _coefficients(subnet, x1, conditions, x), g, offset, spec
        )
        y = permutation.permute(v)
    # vmap knows no memory formats
    if (
        x.dim() > 3
        and not torch._C._are_functorch_transforms_active()
        and (layout := memory_format(given)) is not torch.contiguous_format
    ):
        y = y.contiguous(memory_format=layout)
    return y, logdet


def _forward(
    x: Tensor,
    subnet: _Subnet,
    g: Tensor,
    offset: Tensor,
    permutation: Permutation,
    spec: CouplingSpec,
    conditions: Sequence[Tensor],
    rows: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    indexed = isinstance(permutation, IndexPermutation)
    grad = torch.is_grad_enabled()
    operations = dispatch.pick(x, backend, rows)
    perm, inv = permutation if isinstance(permutation, IndexPermutation) else (None, None)
    halves: Sequence[Tensor | None] = (None, None)
    index = inv if spec.reverse else None
    if not (grad and x.requires_grad):
        x1 = _passive_half(x, index)
    elif index is None and _in_halves(x, operations):
        halves = eager.halves(x)
        x1, x = halves[0], x.detach()
    else:
        x1, x = _Fork.apply(x, index)
    a = _coefficients(subnet, x1, conditions, x)
    a = a.contiguous(memory_format=memory_format(x)) if rows else dispatch.packed(operations, a)
    # what of the permutation is part of the coupling: an index, reflections, or a fixed matrix
    # where the kernels do not apply scale and offset for nothing; the rest comes after it
    inner = outer = matrix = rest = None
    if isinstance(permutation, HouseholderPermutation) and not permutation.is_dense():
        inner, outer = permutation.factors()
        rest = permutation.base
    elif (
        isinstance(permutation, MatrixPermutation) and operations is eager and permutation.folds(x)
    ):
        matrix, spec = permutation, spec._replace(folded=True)
    elif not indexed:
        rest = permutation
    call = _Call(perm, inv, matrix, spec, rows, operations)
    if grad:  # where nothing takes a gradient, autograd makes no node
        # GIN does not depend on g
        y, logdet = _apply_coupling(
            x, *halves, a, g.detach() if spec.gin else g, offset, inner, outer, call
        )
    else:
        y, logdet = _coupling(x, a, g, offset, inner, outer, call)
    return (y if rest is None else rest.permute(y)), logdet


def _inverse(
    y: Tensor,
    subnet: _Subnet,
    g: Tensor,
    offset: Tensor,
    permutation: Permutation,
    spec: CouplingSpec,
    conditions: Sequence[Tensor],
    rows: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    indexed = isinstance(permutation, IndexPermutation)
    operations = dispatch.pick(y, backend, rows)
    perm, inv = permutation if indexed else (None, None)
    as_taken: Callable[[Tensor], Tensor] = as_rows if rows else _itself
    if (
        isinstance(permutation, MatrixPermutation)
        and operations is eager
        and permutation.folds(y)
        and _keeps_dtype(y, g)
    ):
        spec = spec._replace(folded=True)
        with torch.inference_mode(False), torch.no_grad():  # see coupling_inv_passive
            x = v = permutation.unpermute_affine(y, eager.scale_or_none(g, spec), offset)
        x = v = x.contiguous(memory_format=memory_format(y) if rows else torch.contiguous_format)
    else:
        v = y if indexed else permutation.unpermute(y)
        x = operations.coupling_inv_passive(as_taken(v), g, offset, perm, inv, spec)
        x = from_rows(x, y) if rows else x
    a = _coefficients(subnet, _passive_half(x, inv if spec.reverse else None), conditions, y)
    # the subnet widens: rare enough to start over with plain operations
    if eager.promoted(x, a) is not x.dtype:
        u, scale = eager.composite_inv_affine(permutation.unpermute(y), g, offset, spec)
        x, logdet = eager.composite_inv_coupling(*eager.halves(u), a, scale, spec)
        return (permutation.permute(x) if spec.reverse else x), logdet
    a = as_taken(a) if rows else dispatch.packed(operations, a)
    logdet = operations.coupling_inv_active(
        as_taken(v), as_taken(x), a, g, offset, perm, inv, spec, True
    )
    return x, _per_sample(logdet, y) if rows else logdet


def _dearer_by(permutation: Permutation) -> int:
    """How many times larger an input may be and still be small: a soft permutation's product is
    most of the work, fused or not.

    (2, 96, 16, 16) takes 1.1 times as long fused, with and without gradients, (2048, 64) 1.03 times
    with and 0.95 without, AMD EPYC.
    """
    if not isinstance(permutation, MatrixPermutation):
        return 1
    return 4 if torch.is_grad_enabled() else 2


def _keeps_dtype(y: Tensor, g: Tensor) -> bool:
    """Whether a product of y has the dtype that the inverse promises; not so under autocast, or
    where g is wider.
    """
    return y.dtype is eager.promoted(y, g) and not dispatch.is_autocast(y.device)


# --- channels last: the coupling runs on pixels as on samples of rank 0 ---------------------------


def _pixels_as_rows(
    x: Tensor, layout: torch.memory_format, spec: CouplingSpec, backend: str
) -> tuple[bool, CouplingSpec]:
    """Whether the coupling is given pixels as rows, and what it is then told."""
    rows = layout is not torch.contiguous_format
    if not (rows and spec.gin):
        return rows, spec
    if dispatch.pick(x, backend, rows) is not eager:
        # the mean of GIN runs over all rows of a sample, which the kernels have no form for: a
        # contiguous copy
        return False, spec
    return True, spec._replace(gin_rows=math.prod(x.shape[2:]))


def _itself(x: Tensor) -> Tensor:
    return x


def _per_sample(logdet: Tensor, x: Tensor) -> Tensor:
    """Of every row (B * P,) -> of every sample (B,)."""
    return logdet.view(x.shape[0], -1).sum(1)


# --- gradients ------------------------------------------------------------------------------------


def _passive_half(x: Tensor, index: Tensor | None) -> Tensor:
    """The channels that the subnet gets: the first ones as a view, or those that the index names
    first, in the layout of x.
    """
    c1 = x.shape[1] - x.shape[1] // 2
    return x.narrow(1, 0, c1) if index is None else take_channels(x, index[:c1])


class _Fork(Function):
    """x -> (its passive half for the subnet, x itself for the coupling); see _LAUNCH_BOUND.

    Autograd's own slicing would turn the subnet's gradient into a zero-padded copy of x and add two
    full tensors (5 N of traffic); here it is added into the passive rows of the coupling's gradient
    (1.5 N), unless a hook has kept that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.c2, ctx.index = x.shape[1] // 2, index
        return _passive_half(x, index), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx1: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, None]:
        if dx1 is None:  # the subnet does not depend on its input
            return dx, None
        c1 = dx1.shape[1]
        if dx is None or torch.is_grad_enabled() or dispatch.needs_composite(dx, dx1):
            if ctx.index is None:
                padded = torch.nn.functional.pad(dx1, (0, 0) * (dx1.dim() - 2) + (0, ctx.c2))
            else:
                padded = dx1.new_zeros(dx1.shape[0], c1 + ctx.c2, *dx1.shape[2:]).index_add(
                    1, ctx.index[:c1], dx1
                )
            return (padded if dx is None else dx + padded), None
        if _holders(dx) != _holders_of_nobody_else():
            dx = dx.clone()
        if ctx.index is None:
            dx.narrow(1, 0, c1).add_(dx1)
        else:
            dx.index_add_(1, ctx.index[:c1], dx1)
        return dx, None


def _holders(t: Tensor) -> tuple[int, int, int]:
    """How many references there are to a tensor, to its storage as Python knows it, and to the
    memory.
    """
    storage = t.untyped_storage()
    return sys.getrefcount(t), sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


class _Handed(Function):
    """A gradient handed to :class:`_Fork` or its like by a node without hooks."""

    found = (0, 0, 0)

    @staticmethod
    def forward(ctx: Any, x: Tensor, hands: bool) -> Tensor:
        ctx.hands = hands
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        if ctx.hands:
            return dx.clone(), None
        _Handed.found = _holders(dx)
        return dx, None


@cache
def _holders_of_nobody_else() -> tuple[int, int, int]:
    """What :func:`_holders` finds for a gradient that only autograd holds, which depends on the
    versions of Python and torch.
    """
    with modes.unrecorded(), torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, requires_grad=True, device="cpu")
        _Handed.apply(_Handed.apply(x, False), True).sum().backward()
    return _Handed.found


class _Call(NamedTuple):
    """What the coupling is told beside the tensors that take gradients."""

    perm: Tensor | None
    inv: Tensor | None
    matrix: MatrixPermutation | None  # the product that scale and offset are folded into
    spec: CouplingSpec
    rows: bool  # channels last
    operations: ModuleType


def _coupling(
    x: Tensor,
    a: Tensor,
    g: Tensor,
    offset: Tensor,
    inner: Tensor | None,
    outer: Tensor | None,
    call: _Call,
) -> tuple[Tensor, Tensor]:
    """The coupling and what it takes of the permutation."""
    v, logdet = call.operations.coupling_fwd(
        *((as_rows(x), as_rows(a)) if call.rows else (x, a)),
        g,
        offset,
        call.perm,
        call.inv,
        call.spec,
        True,
    )
    if inner is not None and outer is not None:
        v = reflect(v, inner, outer)
    if call.rows:
        v, logdet = from_rows(v, x), _per_sample(logdet, x)
    if call.matrix is not None:
        v = call.matrix.permute_affine(v, eager.scale_or_none(g, call.spec), offset)
    return v, logdet


class _Coupling(Function):
    """The fused coupling, what it takes of the permutation included, with its hand-derived
    backward; keeps x, a and the parameters.

    The gradient of x goes to x, or where the halves of x are given to those.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x1: Tensor | None,
        x2: Tensor | None,
        a: Tensor,
        g: Tensor,
        offset: Tensor,
        inner: Tensor | None,
        outer: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        # saved for autograd to notice if it is changed meanwhile
        w = None if call.matrix is None else call.matrix.w
        ctx.save_for_backward(x, x1, x2, a, g, offset, inner, outer, call.perm, call.inv, w)
        ctx.call = call
        return _coupling(x, a, g, offset, inner, outer, call)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlogdet: Tensor | None) -> tuple[Tensor | None, ...]:
        x, x1, _, a, g, offset, inner, outer, perm, inv, _ = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros(x.shape, dtype=eager.promoted(x, a, g), device=x.device)
        if torch.is_grad_enabled() or dispatch.needs_composite(dy, dlogdet):
            return *_composite_backward(ctx, dy, dlogdet), None
        dinner = douter = None
        _, _, matrix, spec, rows, operations = ctx.call
        need_params = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        du = (
            dy
            if matrix is None
            else matrix.permute_affine_bwd(
                dy, eager.scale_or_none(g, spec), eager.promoted(x, a, g)
            )
        )
        given = x
        if rows:
            du, x, a = as_rows(du), as_rows(x), as_rows(a)
        if inner is not None:
            # again rather than kept
            v, _ = operations.coupling_fwd(x, a, g, offset, None, None, spec, False)
            du, dinner, douter = reflect_bwd(du, v, inner, outer)
            dinner, douter = dinner.to(inner.dtype), douter.to(outer.dtype)
        dx, da, dg, doffset = operations.coupling_bwd(
            du, dlogdet, x, a, g, offset, perm, inv, spec, need_params
        )
        if rows:
            dx, da = from_rows(dx, given), from_rows(da, given)
        if matrix is not None and need_params:
            doffset = matrix.offset_bwd(dy, offset)
        if x1 is None:
            return dx, None, None, da, dg, doffset, dinner, douter, None
        return None, *eager.halves(dx), da, dg, doffset, dinner, douter, None


# Function.apply but for what it does in Python first, 5 us for nine arguments: looking for
# transforms, which needs_composite has done, for a setup_context, which there is none of, and for
# tensors that leaked out of a transform, which the C++ takes as well.
_apply_coupling = super(Function, _Coupling).apply


def _composite_backward(ctx: Any, dy: Tensor, dlogdet: Tensor | None) -> list[Tensor | None]:
    """The backward through plain operations, itself differentiable."""
    *sources, perm, inv, _ = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        wanted = ctx.needs_input_grad[: len(sources)]
        # views, to differentiate by the coupling's own use of x1 and not by the subnet's, which led
        # to a
        leaves = [
            t if not need else t.view_as(t) if create_graph else t.detach().requires_grad_()
            for t, need in zip(sources, wanted, strict=True)
        ]
        x, x1, x2, a, g, offset, inner, outer = leaves
        if x1 is None:
            x1, x2 = eager.halves(gather_channels(x, inv, perm) if ctx.call.spec.reverse else x)
        y, logdet = eager.composite_fwd(x1, x2, a, g, offset, ctx.call.spec)
        if perm is not None:
            y = gather_channels(y, perm, inv)
        elif inner is not None:
            y = reflect(y, inner, outer)
        elif ctx.call.matrix is not None:
            y = ctx.call.matrix.permute(y)
        # one of them may depend on nothing that takes a gradient: the log-determinant, where only
        # offset does
        pairs = [
            (t, dt)
            for t, dt in ((y, dy), (logdet, dlogdet))
            if dt is not None and t is not None and t.requires_grad
        ]
        inputs = [t for t, need in zip(leaves, wanted, strict=True) if need and t is not None]
        if not pairs:
            return [None] * len(wanted)
        outputs, gradients = [t for t, _ in pairs], [dt for _, dt in pairs]
        found = iter(
            torch.autograd.grad(
                outputs, inputs, gradients, create_graph=create_graph, allow_unused=True
            )
        )
    return [next(found) if need else None for need in wanted]


# --- the backward of a block from its output alone, for chains that keep no activations -----------


class Reversed(NamedTuple):
    """What :func:`all_in_one_block_bwd` finds.

    Attributes:
        x: The block's input, computed from its output.
        dx, dg, doffset: The gradients of x, global_scale and global_offset; the latter two None
            unless wanted, dg None for GIN.
    """

    x: Tensor
    dx: Tensor
    dg: Tensor | None
    doffset: Tensor | None


def all_in_one_block_bwd(
    y: Tensor,
    dy: Tensor,
    dlogdet: Tensor | None,
    subnet: Callable[[Tensor], Tensor],
    global_scale: Tensor,
    global_offset: Tensor,
    permutation: Permutation,
    spec: CouplingSpec,
    conditions: Sequence[Tensor] = (),
    *,
    need_x: bool,
    need_params: bool,
    reverse_permutation: bool = False,
    backend: str = "auto",
) -> Reversed:
    """Undo :func:`all_in_one_block` and differentiate it, running the subnet once for both.

    The gradients of the conditions, of a :class:`HouseholderPermutation`'s vectors and of what the
    subnet depends on are added to the ``grad`` of those tensors, which therefore should be leaves
    that nobody else holds.

    Args:
        y: The block's output, (B, C, *S).
        dy, dlogdet: Gradients of its two results; dlogdet may be None.
        subnet, global_scale, global_offset, permutation, spec, conditions, reverse_permutation,
        backend: As given to the block. need_x: Whether the gradient of x is wanted.
        need_params: Whether those of global_scale and global_offset are.
    """
    backend = dispatch.unless_annealed(dispatch.resolved(backend), y, spec)
    layout = memory_format(y)
    rows, spec = _pixels_as_rows(y, layout, spec, backend)
    taken = y if rows else dispatch.coverable(y, backend)
    net = (
        _SubnetInLayout(subnet, layout)
        if taken is not y and layout is not torch.contiguous_format
        else subnet
    )
    y = taken
    operations = dispatch.pick(y, backend, rows)
    g, offset = global_scale.contiguous(), global_offset.contiguous()
    if isinstance(permutation, IndexPermutation):
        (perm, inv), v, dv = permutation, y, dy
    else:
        (perm, inv), (v, dv) = (None, None), _unpermuted(permutation, y, dy)
    given = v
    if rows:
        v, dv = as_rows(v), as_rows(dv)
    elif operations is not eager:
        v = dispatch.packed(operations, v)
    x = operations.coupling_inv_passive(v, g, offset, perm, inv, spec)
    whole = from_rows(x, given) if rows else x
    # reflections ahead of the coupling learn from the gradient of its input, whoever else wants
    # that
    need_dx = need_x or (
        reverse_permutation
        and isinstance(permutation, HouseholderPermutation)
        and permutation.vectors.requires_grad
    )
    with torch.enable_grad():
        # .data, lest autograd takes the active channels, written below, for a change of what the
        # subnet keeps
        x1 = whole.data.narrow(1, 0, x.shape[1] - x.shape[1] // 2).requires_grad_(need_dx)
        a = _coefficients(net, x1, conditions, whole)
    a_taken = as_rows(a.detach()) if rows else dispatch.packed(operations, a.detach())
    dx, da, dg, doffset = operations.coupling_inv_bwd(
        v, x, dv, dlogdet, a_taken, g, offset, perm, inv, spec, need_params
    )
    del v, dv, y, dy
    if rows:
        dx, da = from_rows(dx, given), from_rows(da, given)
    if a.requires_grad:
        torch.autograd.backward(a, da)
    if x1.grad is not None:
        dx.narrow(1, 0, x1.shape[1]).add_(x1.grad)
    if reverse_permutation:
        whole, dx = _repermuted(permutation, whole, dx)
    return Reversed(_in_layout(whole, layout), _in_layout(dx, layout), dg, doffset)


def _in_layout(x: Tensor, layout: torch.memory_format) -> Tensor:
    return x if layout is torch.contiguous_format else x.contiguous(memory_format=layout)


def _unpermuted(
    permutation: MatrixPermutation | HouseholderPermutation, y: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """v with permute(v) = y, and its gradient; those of a permutation's parameters are added to
    their ``grad``.
    """
    v = _solved(permutation, permutation.permute, permutation.unpermute, y)
    return v, permutation.permute_bwd(dy) if isinstance(
        permutation, MatrixPermutation
    ) else _pulled(permutation.permute, v, dy)


def _repermuted(permutation: Permutation, v: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """x with unpermute(x) = v, and its gradient; those of a permutation's parameters are added to
    their ``grad``.
    """
    x = _solved(permutation, permutation.unpermute, permutation.permute, v)
    return x, _pulled(permutation.unpermute, x, dv) if isinstance(
        permutation, HouseholderPermutation
    ) else permutation.unpermute_bwd(dv)


def _solved(
    permutation: Permutation,
    function: Callable[[Tensor], Tensor],
    inverse: Callable[[Tensor], Tensor],
    y: Tensor,
) -> Tensor:
    """x with function(x) = y, where inverse(function(x)) is x but for what the matrix was rounded
    by.

    A rotation made in float32 is orthogonal to 1e-7, which float64 sees. Each step of refinement
    multiplies the error by that: after two, 12 blocks are undone as exactly as with rotations made
    in float64; after one, the input is 5 to 60 times as far off. Both together make a float64 train
    step longer by 12% with (4, 64, 32, 32), 20% with (64, 128) and 34% with (4096, 64), AMD EPYC.
    """
    x = inverse(y)
    base = permutation.base if isinstance(permutation, HouseholderPermutation) else permutation
    if y.dtype is torch.float64 and isinstance(base, MatrixPermutation):
        for _ in range(2):
            x = x + inverse(y - function(x))
    return x


def _pulled(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of x from that of function(x)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        torch.autograd.backward(function(x), gradient)
    assert x.grad is not None  # no permutation ignores its input
    return x.grad
