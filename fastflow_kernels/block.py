"""The evaluation of a block, from its checked call to its result.

:func:`~fastflow_kernels.route.choose_route` decides once, and the code below follows its route in a
straight line. One case shows only later: if the subnet widens the dtype, an inverse starts over in
plain operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow_kernels import torch_private
from fastflow_kernels.call import BlockCall, coefficients
from fastflow_kernels.coupling import Coupling
from fastflow_kernels.dtypes import cast, promoted
from fastflow_kernels.engines import plain
from fastflow_kernels.fork import fork, passive_half
from fastflow_kernels.fused import fused_coupling
from fastflow_kernels.layouts import in_layout, memory_format, packed
from fastflow_kernels.permutations import (
    HouseholderPermutation,
    MatrixPermutation,
    matched_in_graph,
)
from fastflow_kernels.predicates import is_autocast
from fastflow_kernels.route import SMALL_INPUT, Route, choose_route


def evaluate(call: BlockCall) -> tuple[Tensor, Tensor]:
    """Evaluate a block or its inverse: split, coupling, global affine and permutation.

    Returns:
        The output (B, C, *S) and the log-determinant (B,) in nats per sample. The output has the
        promoted dtype of x, the coefficients and the parameters, unless the call says another one,
        and is channels-last if x is. The
        log-determinant is float64 for a float64 output, otherwise float32.

    Raises:
        RuntimeError: Backend "triton" cannot be used, or the subnet writes to its input (see
            :func:`~fastflow_kernels.call.coefficients`).
        InputTypeError, InputValueError: The subnet's output has another shape or device, or is not
            a floating-point tensor.
    """
    route = choose_route(call)
    call = compute_reflections(call, route)
    if route.engine is None:
        return evaluate_plainly([call])
    y, log_det = _inverse(call, route) if call.rev else _forward(call, route)
    return _in_output_dtype(y, call), log_det


def _in_output_dtype(y: Tensor, call: BlockCall) -> Tensor:
    return y if call.output_dtype is None else cast(y, call.output_dtype)


# Above it, or with fewer rows than channels, the reflections' matrix costs more than it saves. The
# speed is 0.63 times as high at (1, 181) with 90 of them, and 1.06 times at (64, 64) with 16.
MOST_SMALL_CHANNELS = 64


def compute_reflections(call: BlockCall, route: Route) -> BlockCall:
    """Return the call with its reflections computed, if it has any and is small or uses them twice.

    On small inputs each operation's overhead counts, and a matrix takes one operation where thin
    products take three. FrEIA 0.2's time divided by ours, before and after: (128, 32) forward 0.76
    and 0.97, (512, 6) training 0.81 and 1.03 (`reverse_permutation`, one thread of an AMD EPYC).
    """
    x, permutation = call.x, call.permutation
    # A graph's compiler sees by itself what is computed twice.
    if not isinstance(permutation, HouseholderPermutation) or torch_private.is_recorded():
        return call
    vectors = permutation.vectors
    is_small_matrix = (
        route.case is SMALL_INPUT
        and isinstance(permutation.base, MatrixPermutation)
        and vectors.shape[1] <= MOST_SMALL_CHANNELS
        and x.numel() >= permutation.base.w.numel()
        and x.dtype is vectors.dtype
        and not is_autocast(x.device)  # a matrix would be rounded to half precision
    )
    if not (is_small_matrix or call.reverse_permutation):
        return call
    return call._replace(permutation=permutation.computed(is_small_matrix))


# --- plain operations -----------------------------------------------------------------------------


def evaluate_plainly(calls: Sequence[BlockCall]) -> tuple[Tensor, Tensor]:
    """Evaluate a block, or consecutive blocks of a chain, by ordinary differentiable operations.

    Args:
        calls: The calls in the order in which they run, in one direction, with one activation. Each
            has the x of the first one.

    Returns:
        See :func:`evaluate`. The log-determinant is that of all blocks.
    """
    x, rev, sums = calls[0].x, calls[0].rev, []
    scales = plain.GlobalScales([call.global_scale for call in calls], calls[0].spec)
    for k, call in enumerate(calls):
        x, sum_s = _invert_plainly(call, x, k, scales) if rev else _run_plainly(call, x, k, scales)
        x = _in_output_dtype(x, call)
        sums.append(sum_s)
    sum_s = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
    return x, scales.log_det(sum_s, x, -1.0 if rev else 1.0)


def _run_plainly(
    call: BlockCall, x: Tensor, k: int, scales: plain.GlobalScales
) -> tuple[Tensor, Tensor]:
    """Return the output of block k for the input x, and the sum of s per sample."""
    x = call.permutation.unpermute(x) if call.reverse_permutation else x
    x1, x2 = plain.split(x)
    a = coefficients(call, x1)
    v, sum_s = plain.transform(x1, x2, a, scales.affine(k, call.global_offset, x1, a), call.spec)
    y = call.permutation.permute(v)
    return (y if y.dim() < 4 else match_format(call.x, y)), sum_s


def _invert_plainly(
    call: BlockCall, y: Tensor, k: int, scales: plain.GlobalScales
) -> tuple[Tensor, Tensor]:
    """Return the input of block k for the output y, and the sum of -s per sample."""
    v = call.permutation.unpermute(y)
    u1, u2 = plain.split(plain.invert_affine(v, scales.affine(k, call.global_offset, v)))
    dtype = promoted(v, call.global_scale)  # the result's dtype, unless the subnet widens it
    a = coefficients(call, _cast_for_subnet(u1, dtype))
    if a.dtype is not dtype:
        dtype = torch.promote_types(dtype, a.dtype)
    x, sum_s = _finish_inverse(call, u1, u2, a, dtype)
    return (x if x.dim() < 4 else match_format(call.x, x)), sum_s


def _cast_for_subnet(u1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return u1 in the dtype of the result, if need be as a copy that only the subnet reads."""
    if u1.dtype is dtype or torch_private.is_recorded():  # a graph counts no versions
        return cast(u1, dtype)
    with torch_private.versions_counted():
        return u1.to(dtype)


def _finish_inverse(
    call: BlockCall, u1: Tensor, u2: Tensor, a: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute what follows the subnet: x in ``dtype``, and the sum of -s per sample."""
    x, sum_s = plain.invert_coupling(u1, u2, a, call.spec)
    x = cast(x, dtype)
    return (call.permutation.permute(x) if call.reverse_permutation else x), sum_s


def match_format(x: Tensor, y: Tensor) -> Tensor:
    """Return y in the memory format of x, except under torch.func, because vmap has no formats."""
    if torch_private.is_transformed():
        return y
    return in_layout(y, memory_format(x))


# --- an engine ------------------------------------------------------------------------------------


def _forward(call: BlockCall, route: Route) -> tuple[Tensor, Tensor]:
    coupling = engine_coupling(call, route)
    x = _coupling_input(call, route)
    passive, x = fork(x, coupling, route.with_gradients)
    a = for_engine(coefficients(call, for_subnet(passive, route)), route)
    # after the subnet, because gradients arrive in the reverse order
    after = call.permutation.after_coupling()
    y, log_det = fused_coupling(x, a, coupling, after, route)
    if after.permutation is not None:
        y = after.permutation.permute(y)
    return in_layout(y, route.layout), log_det


def _inverse(call: BlockCall, route: Route) -> tuple[Tensor, Tensor]:
    engine, permutation = route.engine, call.permutation
    assert engine is not None
    coupling = engine_coupling(call, route)
    y = call.x.contiguous() if route.is_copied else call.x
    if route.folds_affine:
        # Both are u: if x holds u in every channel, the engine does not read v.
        x = v = _unpermuted_affine(call, coupling)
    else:
        v = y if coupling.perm is not None else permutation.unpermute(y)
        x = engine.invert_passive(v, coupling)
    passive = passive_half(x, coupling)
    a = coefficients(call, for_subnet(passive, route))
    if promoted(x, a) is not x.dtype:
        # The subnet widens the dtype. That is rare, so start over with plain operations.
        v = permutation.unpermute(y)
        scales = plain.GlobalScales([call.global_scale], call.spec)
        u = plain.invert_affine(v, scales.affine(0, call.global_offset, v))
        x, sum_s = _finish_inverse(call, *plain.split(u), a, promoted(x, a))
        return in_layout(x, route.layout), scales.log_det(sum_s, x, -1.0)
    log_det = engine.invert_active(v, x, a, coupling)
    del v, a, passive  # free memory ahead of the permutation
    if route.unpermutes_apart:
        x = permutation.permute(x)
    return in_layout(x, route.layout), log_det


def engine_coupling(call: BlockCall, route: Route) -> Coupling:
    """Return the engine's operands beside x and the coefficients."""
    perm, inv = call.permutation.index_pair()
    if perm is not None and inv is not None and torch_private.is_recorded():
        is_both_used = call.reverse_permutation
        perm, inv = matched_in_graph(
            perm, inv, is_both_used or not call.rev, is_both_used or call.rev
        )
    return Coupling(
        call.global_scale.contiguous(),  # a parametrization may expand them
        call.global_offset.contiguous(),
        call.spec,
        perm,
        inv,
        route.unpermutes_inside,
    )


def for_subnet(passive: Tensor, route: Route) -> Tensor:
    """Return the passive half in the layout of the block's input, if the engine has a copy of it.

    A convolution rounds differently in each layout, and that of a stock block runs in the layout of
    the input.
    """
    if not route.is_copied or route.layout is torch.contiguous_format:
        return passive
    # clone(), because contiguous() returns the tensor itself if both layouts fit (one channel)
    with torch_private.versions_counted():
        return passive.clone(memory_format=route.layout)


def for_engine(a: Tensor, route: Route) -> Tensor:
    """Return the coefficients in the layout that the engine reads, now and in the backward pass."""
    if route.is_copied or route.layout is torch.contiguous_format:
        return packed(a)
    return in_layout(a, route.layout)


def _coupling_input(call: BlockCall, route: Route) -> Tensor:
    """Return x in the layout that the engine reads, after a separate inverse permutation if any."""
    x = call.x.contiguous() if route.is_copied else call.x
    if not route.unpermutes_apart:
        return x
    x = call.permutation.unpermute(x)
    return x.contiguous() if route.is_copied else in_layout(x, route.layout)


def _unpermuted_affine(call: BlockCall, coupling: Coupling) -> Tensor:
    """Compute u = (w^-1 y - offset) / scale as one product with a bias, in the layout of y."""
    assert isinstance(call.permutation, MatrixPermutation)  # the route says so
    g, offset = coupling.parameters
    scale = None if call.spec.gin else plain.activated(g, call.spec.activation)
    with torch_private.versions_counted():
        u = call.permutation.unpermute_affine(call.x, scale, offset)
        return u.contiguous(memory_format=memory_format(call.x))
