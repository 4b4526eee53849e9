"""The backward pass on a GPU: the gradients in one pass over memory.

For reversible chains, which keep no activations, the same pass writes the active half of the
inverse.

Notation: see :mod:`~fastflow_kernels.engines.triton.forward`.
"""

from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow_kernels.coupling import (
    ChainCouplingGrads,
    ChainGrads,
    Coupling,
    CouplingGrads,
    Halves,
    OutputGrads,
)
from fastflow_kernels.engines.triton import plan
from fastflow_kernels.engines.triton.inverse import write_active
from fastflow_kernels.engines.triton.launch import (
    Launch,
    Operands,
    Prepared,
    aligned,
    dtype_of,
    empty_of,
    empty_partials,
    gaps_of,
    key_in_chain,
    key_of,
    on_its_device,
    pointers_of,
    values_of,
)
from fastflow_kernels.engines.triton.math import clamp_slope, clamped, exp_of_factor, product
from fastflow_kernels.engines.triton.sums import prepare_gin_sums, prepare_params
from fastflow_kernels.engines.triton.tiles import (
    columns,
    halves,
    in_halves,
    index,
    inverse_scale,
    load,
    sample,
    scale,
    total,
)
from fastflow_kernels.layouts import packed


@triton.jit
def _coupling_bwd_kernel(
    y_ptr, dy_ptr, dlogdet_ptr, x_ptr, a_ptr, g_ptr, offset_ptr, inv_ptr, sums_ptr,
    dx_ptr, da_ptr, part_ptr, x2_ptr, dy2_ptr, dsub_ptr, dx2_ptr,
    B, P, stride_xb, stride_ab, stride_dyb, stride_dxb, stride_l,
    stride_x2b, stride_dy2b, stride_dsub,
    C: tl.constexpr, ACTIVE: tl.constexpr, FUNCTION: tl.constexpr, CLAMP: tl.constexpr,
    INPUT_SCALE: tl.constexpr, SHIFT_SCALE: tl.constexpr, ACTIVATION: tl.constexpr,
    UNPERMUTES_INPUT: tl.constexpr, INVERT: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients; with INVERT also reconstruct the active half of x.

    With dv = dy[:, inv], du = dv * scale and t = f(z) for z = input_scale * a_s::

        dx   = cat(du1, du2 * exp(s))
        da_t = shift_scale * du2
        da_s = (du2 * x2 * exp(s) + dlogdet) * clamp * input_scale * f'(z)

    Per channel it also sums dv (for offset) and dv * u (for scale). s = clamp * t and u are
    computed again. dsub, if there, is added to dy's passive half.

    - GIN: there is no dlogdet. The mean is subtracted from s and from du2 * x2 * exp(s).
    - UNPERMUTES_INPUT: x1 and x2 are those of x[:, inv], and dx has the channel order of x.
    - INVERT, not with GIN: x2 is written, not read. With u2 = (y[:, inv[C1:]] - offset) / scale,
      x2 * exp(s) = u2 - shift_scale * a_t.

    A program computes one tile of channel pairs in TILES_PER_PROGRAM tiles of columns. P (unless
    ROWS) and the strides but stride_l arrive divided by ALIGN.

    Args:
        y_ptr: Input (B, C, P), contiguous, with INVERT; otherwise None.
        dy_ptr: Input (B, C, P), stride_dyb between samples.
        dlogdet_ptr: Input (B,), stride_l between samples, or None.
        x_ptr: Input (B, C, P), stride_xb between samples. With INVERT it is contiguous, and x2 is
            an output.
        a_ptr: Input (B, 2*C2, P), stride_ab between samples.
        g_ptr: Input (C,), the global scale before its activation; None for a side.
        offset_ptr: Input (C,) with INVERT; otherwise None.
        inv_ptr: Input (C,), int64, or None for the identity.
        sums_ptr: Input (2, B, PARTS) or, per pixel, (2, B, P) for GIN, or None: sums of s and of
            dv2 * x2 * exp(s), both before the mean is subtracted from s.
        dx_ptr: Output (B, C, P), stride_dxb between samples.
        da_ptr: Output (B, 2*C2, P), contiguous.
        part_ptr: Output (2, groups, C), or None: sums of dv and of dv * u. For ACTIVATION = None
            (GIN) it is (1, groups, C), the sums of dv.
        x2_ptr, dy2_ptr, dx2_ptr: The active halves of x, dy and dx, (B, C2, P), stride_x2b and
            stride_dy2b between samples, or None. With one, the pointer without "2" is the passive
            half. dx2 has no gaps.
        dsub_ptr: Input (B, C1, P), stride_dsub between samples, or None: the gradient of y's
            passive half from the next subnet.
    """
    if not ROWS:
        P = P * ALIGN
    C2: tl.constexpr = ACTIVE
    C1: tl.constexpr = C - C2
    CHANNEL_TILES: tl.constexpr = (max(C1, C2) + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    group = tl.program_id(0) // CHANNEL_TILES
    c = (tl.program_id(0) % CHANNEL_TILES) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_passive = c < C1
    is_active = c < C2
    j1 = index(inv_ptr, c, is_passive)[:, None]
    j2 = index(inv_ptr, C1 + c, is_active)[:, None]
    scale1 = scale(g_ptr, c, is_passive, ACTIVATION, ACC_DTYPE)[:, None]
    scale2 = scale(g_ptr, C1 + c, is_active, ACTIVATION, ACC_DTYPE)[:, None]
    if INVERT:
        factor2, boost2 = inverse_scale(scale2)
        offset2 = load(offset_ptr + C1 + c, is_active, ACC_DTYPE)[:, None]
    doffset1 = tl.zeros((BLOCK_CHANNELS,), ACC_DTYPE)
    doffset2 = tl.zeros((BLOCK_CHANNELS,), ACC_DTYPE)
    dscale1 = tl.zeros((BLOCK_CHANNELS,), ACC_DTYPE)
    dscale2 = tl.zeros((BLOCK_CHANNELS,), ACC_DTYPE)
    for i in range(TILES_PER_PROGRAM):
        b, p, mask_columns = columns(group * TILES_PER_PROGRAM + i, B, P, BLOCK_COLUMNS, ROWS)
        mask_passive = is_passive[:, None] & mask_columns
        mask_active = is_active[:, None] & mask_columns
        offs = c[:, None] * P + p
        offs_y1 = j1 * P + p
        offs_y2 = j2 * P + p
        offs_x1 = offs_y1 if UNPERMUTES_INPUT else offs
        offs_x2 = offs_y2 if UNPERMUTES_INPUT else C1 * P + offs
        dy_ptrs = halves(dy_ptr, dy2_ptr, b, stride_dyb, stride_dy2b, C, C1, P, ALIGN)
        x_ptrs = halves(x_ptr, x2_ptr, b, stride_xb, stride_x2b, C, C1, P, ALIGN)
        a_tile_ptr = a_ptr + b * stride_ab * ALIGN + offs
        dx_ptrs = halves(dx_ptr, dx2_ptr, b, stride_dxb, None, C, C1, P, ALIGN)
        da_tile_ptr = da_ptr + b * (2 * C2) * P + offs

        # The order of loads and stores decides how many registers the compilers need:
        # see bench/TUNING.md.
        a_s = load(a_tile_ptr, mask_active, ACC_DTYPE)
        if INVERT:
            a_t = load(a_tile_ptr + C2 * P, mask_active, ACC_DTYPE)
            y2 = load(y_ptr + b * C * P + offs_y2, mask_active, ACC_DTYPE)
        else:
            x2 = load(x_ptrs[1] + offs_x2, mask_active, ACC_DTYPE)
        dv2 = load(in_halves(dy_ptrs, dy2_ptr, j2, C1, offs_y2), mask_active, ACC_DTYPE)
        if C1 > 0:
            dv1 = load(in_halves(dy_ptrs, dy2_ptr, j1, C1, offs_y1), mask_passive, ACC_DTYPE)
        if dsub_ptr is not None:
            dsub_sample_ptr = sample(dsub_ptr, b, stride_dsub, C1, P, ALIGN)
            dv2 += load(dsub_sample_ptr + offs_y2, mask_active & (j2 < C1), ACC_DTYPE)
            dv1 += load(dsub_sample_ptr + offs_y1, mask_passive & (j1 < C1), ACC_DTYPE)
        z = INPUT_SCALE * a_s
        t = clamped(z, FUNCTION, CLAMP)
        s = CLAMP * t
        if sums_ptr is not None:
            count = C2 * P if PARTS > 0 else C2
            mean = total(sums_ptr, b, b < B, p, P, PARTS) / count
            s -= mean
        if INVERT:
            u2 = (y2 - offset2) * factor2 * boost2
            x2_e = u2 - SHIFT_SCALE * a_t
            tl.store(x_ptrs[1] + offs_x2, x2_e * exp_of_factor(-s, CLAMP), mask=mask_active)
        else:
            e = exp_of_factor(s, CLAMP)
            x2_e = x2 * e
        ds = tl.zeros((1, 1), ACC_DTYPE)
        if sums_ptr is not None:
            # The sum was taken with exp(s + mean), and without the scale, which is 1 for GIN.
            sum_h = total(sums_ptr, b + B, b < B, p, P, PARTS)
            ds -= sum_h * exp_of_factor(-mean, CLAMP) / count
        if dlogdet_ptr is not None:
            ds += load(dlogdet_ptr + b * stride_l, b < B, ACC_DTYPE)
        if INVERT:
            e = exp_of_factor(s, CLAMP)
        du2 = dv2 * scale2
        if C1 > 0:
            tl.store(dx_ptrs[0] + offs_x1, dv1 * scale1, mask=mask_passive)
        tl.store(dx_ptrs[1] + offs_x2, du2 * e, mask=mask_active)
        tl.store(da_tile_ptr + C2 * P, SHIFT_SCALE * du2, mask=mask_active)
        da_s = (du2 * x2_e + ds) * (CLAMP * INPUT_SCALE * clamp_slope(z, t, FUNCTION))
        tl.store(da_tile_ptr, da_s, mask=mask_active)
        if part_ptr is not None:
            doffset1 += tl.sum(dv1, axis=1)
            doffset2 += tl.sum(dv2, axis=1)
            if ACTIVATION is not None:
                x1 = load(x_ptrs[0] + offs_x1, mask_passive, ACC_DTYPE)
                if not INVERT:
                    a_t = load(a_tile_ptr + C2 * P, mask_active, ACC_DTYPE)
                dscale1 += tl.sum(product(dv1, x1), axis=1)
                if not INVERT:
                    u2 = x2_e + SHIFT_SCALE * a_t
                dscale2 += tl.sum(product(dv2, u2), axis=1)
    if part_ptr is not None:
        part_ptr += group.to(tl.int64) * C + c
        tl.store(part_ptr, doffset1, mask=is_passive)
        tl.store(part_ptr + C1, doffset2, mask=is_active)
        if ACTIVATION is not None:
            part_ptr += (tl.num_programs(0) // CHANNEL_TILES).to(tl.int64) * C
            tl.store(part_ptr, dscale1, mask=is_passive)
            tl.store(part_ptr + C1, dscale2, mask=is_active)


# In the order of Operands.strides. Those behind stride_l are left out but in a chain.
_STRIDES = (
    "stride_xb", "stride_ab", "stride_dyb", "stride_dxb", "stride_l",
    "stride_x2b", "stride_dy2b", "stride_dsub",
)  # fmt: skip


@lru_cache(maxsize=1024)
def _prepare(*key: Any) -> Prepared:
    """Prepare the backward pass for the operands of a key: see :func:`key_of`."""
    operands = Operands(*key)
    dtype, acc_dtype = operands.dtype, operands.acc_dtype
    strides = dict(zip_longest(_STRIDES, operands.strides))
    stride_l = strides.pop("stride_l")
    has_y = operands.dtypes[1] is not None
    gin_sums = prepare_gin_sums(
        operands, strides["stride_ab"], strides["stride_xb"], strides["stride_dyb"]
    )
    # The tile is sized by the accumulator's dtype. Values of six tensors are alive at once, so that
    # registers limit the tile, not the width of an access.
    tiles = operands.plan(
        operands.channel_pairs,
        acc_dtype.itemsize,
        plan.BACKWARD_ROWS,
        plan.COLUMNS_WITH_SUMS if operands.want_params else plan.COLUMNS,
    )
    values = values_of(operands, tiles, **strides)
    if len(operands.strides) < len(_STRIDES):
        values |= dict.fromkeys(("x2_ptr", "dy2_ptr", "dsub_ptr", "dx2_ptr"))
    values |= {
        # If several rows make a sample, the gradient was repeated for each row in a new tensor.
        "stride_l": stride_l if operands.rows_per_sample == 1 else 1,
        "INVERT": has_y,
        "PARTS": 1 if gin_sums is None else gin_sums.launch.values["PARTS"],
    }
    launch = Launch(_coupling_bwd_kernel, tiles.programs, tiles.warps, values)
    if not operands.want_params:
        return Prepared(dtype, acc_dtype, launch, gin_sums)
    partials = (1 if operands.spec.gin else 2, tiles.groups, operands.channels)
    finish = prepare_params(operands, tiles.groups, stride_l)
    return Prepared(dtype, acc_dtype, launch, gin_sums, partials, finish)


@on_its_device
def backward(
    x: Tensor,
    a: Tensor,
    grads: OutputGrads,
    coupling: Coupling,
    want_params: bool,
    dx: Tensor | None = None,
) -> CouplingGrads:
    """Return the gradients.

    See :class:`~fastflow_kernels.engines.Engine`. New gradients are contiguous.
    """
    return _backward((None, x, dx), a, grads, coupling, want_params)


@on_its_device
def invert_and_backward(
    y: Tensor, x: Tensor, a: Tensor, grads: OutputGrads, coupling: Coupling, want_params: bool
) -> CouplingGrads:
    """Write the active channels of x and return the gradients.

    See :class:`~fastflow_kernels.engines.Engine`. The gradients are contiguous.
    """
    # GIN's means are needed first, so everything is read twice in any case. A side keeps no u.
    if coupling.spec.gin or coupling.is_side:
        write_active(y, x, a, coupling)
        return _backward((None, x, None), a, grads, coupling, want_params)
    return _backward((y.contiguous(), x, None), a, grads, coupling, want_params)


def _backward(
    values: tuple[Tensor | None, Tensor, Tensor | None],
    a: Tensor,
    grads: OutputGrads,
    coupling: Coupling,
    want_params: bool,
) -> CouplingGrads:
    """Compute the gradients from the values (y, x, dx).

    With y, also write the active channels of x. With dx, write the gradient of x there.
    """
    y, x, dx = values
    g, offset, inv = coupling.global_scale, coupling.global_offset, coupling.inv
    a, dy = packed(a), packed(grads.y)
    log_det = None if coupling.spec.gin else grads.log_det
    log_det_of_rows = log_det
    if log_det is not None and coupling.rows_per_sample > 1:
        log_det_of_rows = log_det.repeat_interleave(coupling.rows_per_sample)
    stride_xb = x.stride(0) if y is None else None  # x is contiguous if it is written
    stride_dyb = None if dy.is_contiguous() else dy.stride(0)
    stride_dxb = None if dx is None or dx.is_contiguous() else dx.stride(0)
    stride_l = 0 if log_det is None else log_det.stride(0)
    prepared = _prepare(
        *key_of(
            x,
            coupling,
            (x.dtype, None if y is None else y.dtype, a.dtype),
            (stride_xb, a.stride(0), stride_dyb, stride_dxb, stride_l),
            (dy.dtype, None if log_det is None else log_det.dtype),
            want_params,
        )
    )
    is_aligned = aligned(y, x, a, dy, log_det, log_det_of_rows, g, offset, inv, dx)
    dx, da = empty_of(x, x.dtype) if dx is None else dx, empty_of(a, a.dtype)
    is_apart = coupling.is_side and a.shape[1] == x.shape[1]
    if is_apart:  # a is a_s alone, and the kernel also writes the gradient of a_t
        da = torch.empty((len(a), 2 * a.shape[1], *a.shape[2:]), dtype=a.dtype, device=a.device)
    sums = None if prepared.gin_sums is None else prepared.gin_sums(is_aligned, a, dy, x, inv)
    partials = empty_partials(prepared, x.device)
    offset_of_u = None if y is None else offset
    prepared.launch(
        is_aligned, y, dy, log_det_of_rows, x, a, g, offset_of_u, inv, sums,
        dx, da, partials,
    )  # fmt: skip
    if prepared.finish is None or g is None or offset is None:
        return CouplingGrads(dx, da.narrow(1, 0, a.shape[1]) if is_apart else da, None, None)
    dg = None if coupling.spec.gin else torch.empty_like(g)
    doffset = torch.empty_like(offset)
    prepared.finish(is_aligned, partials, log_det, g, dg, doffset)
    return CouplingGrads(dx, da, dg, doffset)


@partial(on_its_device, position=1)
def backward_in_chain(
    x: Tensor | Halves, a: Tensor, grads: ChainGrads, coupling: Coupling, want_params: bool
) -> ChainCouplingGrads:
    """Return the gradients of :func:`~fastflow_kernels.engines.triton.forward.forward_in_chain`.

    See :class:`~fastflow_kernels.engines.ChainEngine`.
    """
    (g, offset), inv, log_det = coupling.parameters, coupling.inv, grads.log_det
    dsub = grads.from_subnet
    x1, x2, stride_xb, stride_x2b = pointers_of(x)
    dy1, dy2, stride_dyb, stride_dy2b = pointers_of(grads.y)
    strides = (
        stride_xb, a.stride(0), stride_dyb, None, 0 if log_det is None else log_det.stride(0),
        stride_x2b, stride_dy2b, None if dsub is None else gaps_of(dsub),
    )  # fmt: skip
    dtypes = (x1.dtype, None, dtype_of(x2), a.dtype)
    grad_dtypes = (dy1.dtype, dtype_of(log_det), dtype_of(dy2), dtype_of(dsub))
    prepared = _prepare(*key_in_chain(x, coupling, dtypes, strides, grad_dtypes, want_params))
    is_aligned = aligned(x1, x2, a, dy1, dy2, dsub, log_det, g, inv)
    dx1, dx2 = empty_of(x1, x1.dtype), None if x2 is None else empty_of(x2, x2.dtype)
    dx, da = dx1 if dx2 is None else Halves(dx1, dx2), empty_of(a, a.dtype)
    partials = empty_partials(prepared, a.device)
    prepared.launch(
        is_aligned, None, dy1, log_det, x1, a, g, None, inv, None,
        dx1, da, partials, x2, dy2, dsub, dx2,
    )  # fmt: skip
    if prepared.finish is None:
        return ChainCouplingGrads(dx, da, None, None)
    dg, doffset = torch.empty_like(g), torch.empty_like(offset)
    prepared.finish(is_aligned, partials, log_det, g, dg, doffset)
    return ChainCouplingGrads(dx, da, dg, doffset)
