"""The evaluation of a block, from its checked call to its result.

:func:`~fastflow_kernels.route.choose_route` decides once, and the code below follows its route in a
straight line. One case shows only later: if the subnet widens the dtype, an inverse starts over in
plain operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow_kernels import torch_private
from fastflow_kernels.call import BlockCall, coefficients
from fastflow_kernels.coupling import Coupling
from fastflow_kernels.dtypes import accumulator, cast, promoted
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
    if isinstance(call.permutation, HouseholderPermutation):
        call = compute_reflections(call, call.permutation, route)
    if route.engine is None:
        return evaluate_plainly(call)
    y, log_det = _inverse(call, route) if call.rev else _forward(call, route)
    return (y if call.output_dtype is None else cast(y, call.output_dtype)), log_det


# Above it, or with fewer rows than channels, the reflections' matrix costs more than it saves. The
# speed is 0.63 times as high at (1, 181) with 90 of them, and 1.06 times at (64, 64) with 16.
MOST_SMALL_CHANNELS = 64


def compute_reflections(
    call: BlockCall, permutation: HouseholderPermutation, route: Route
) -> BlockCall:
    """Return the call with its reflections computed, if it is small or uses them twice.

    On small inputs each operation's overhead counts, and a matrix takes one operation where thin
    products take three. FrEIA 0.2's time divided by ours, before and after: (128, 32) forward 0.76
    and 0.97, (512, 6) training 0.81 and 1.03 (`reverse_permutation`, one thread of an AMD EPYC).
    """
    if torch_private.is_recorded():  # a graph's compiler sees by itself what is computed twice
        return call
    x, vectors = call.x, permutation.vectors
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


def evaluate_plainly(call: BlockCall) -> tuple[Tensor, Tensor]:
    """Evaluate a block by ordinary differentiable operations: see :func:`evaluate`."""
    y, sum_s, scale = transform_plainly(call, call.x, None)
    pixels = plain.count_pixels(y)
    return y, plain.add_log_scale(sum_s, scale, -pixels if call.rev else pixels)


def transform_plainly(
    call: BlockCall, x: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Do :func:`evaluate_plainly` without the scale's part of the log-determinant.

    Args:
        call: The call.
        x: The block's input, of the shape and device of the call's x.
        scale: The global scale, if it is known. It counts if it has the dtype of the computation.

    Returns:
        The output; the sum of s per sample (B,), negative for the inverse; and the scale.
    """
    if call.rev:
        y, sum_s, scale = _invert_plainly(call, x, scale)
    else:
        x = call.permutation.unpermute(x) if call.reverse_permutation else x
        x1, x2 = plain.split(x)
        a = coefficients(call, x1)
        dtype = promoted(x1, a, call.global_scale)
        scale, offset = _scale_and_offset(call, x, dtype, scale)
        v, sum_s = plain.transform(x1, x2, a, scale, offset, call.spec)
        y = call.permutation.permute(cast(v, dtype))
    if y.dim() > 3:
        y = match_format(call.x, y)
    return (y if call.output_dtype is None else cast(y, call.output_dtype)), sum_s, scale


def _invert_plainly(
    call: BlockCall, y: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    v = call.permutation.unpermute(y)
    dtype = promoted(v, call.global_scale)  # the result's dtype, unless the subnet widens it
    scale, offset = _scale_and_offset(call, v, dtype, scale)
    u1, u2 = plain.split(plain.invert_affine(v, scale, offset))
    a = coefficients(call, _cast_for_subnet(u1, dtype))
    if a.dtype is not dtype:
        dtype = torch.promote_types(dtype, a.dtype)
    x, sum_s = _finish_inverse(call, u1, u2, a, dtype)
    return x, sum_s, scale


def _scale_and_offset(
    call: BlockCall, x: Tensor, dtype: torch.dtype, scale: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Return scale and offset in the dtype in which a result of ``dtype`` is computed."""
    dim, acc_dtype = x.dim(), accumulator(dtype)
    if scale is None or scale.dtype is not acc_dtype:
        scale = plain.scale_of(call.global_scale, call.spec, dim, acc_dtype)
    return scale, plain.per_channel(call.global_offset, dim, acc_dtype)


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
        scale, offset = _scale_and_offset(call, v, promoted(v, call.global_scale), None)
        u = plain.invert_affine(v, scale, offset)
        x, sum_s = _finish_inverse(call, *plain.split(u), a, promoted(x, a))
        log_det = plain.add_log_scale(sum_s, scale, -plain.count_pixels(x))
        return in_layout(x, route.layout), log_det
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
