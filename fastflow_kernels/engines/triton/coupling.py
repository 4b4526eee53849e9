"""The coupling on a GPU: split, soft-clamped affine coupling, global affine and permutation in one
pass over memory.

The launchers ``coupling_*`` have twins of the same signature in ``fastflow_kernels.engines.eager``.
Notation, as in :class:`~fastflow_kernels.coupling.CouplingSpec`: x (B, C, *S), C1 = C - C//2 passive
and C2 = C//2 active channels, a (B, 2*C2, *S) the halves (a_s, a_t), P = prod(S), y[:, j] = v[:,
perm[j]], inv = argsort(perm).

Every kernel walks channel pairs (c, C1 + c) and finds the permuted channel of each through ``inv``,
except the forward on rows: there scattered stores of single values would be slow, and values are
gathered through ``perm`` instead.

Constants are constexpr: a Python float that arrives as an argument is float32 on the device and
would spoil float64.
"""

import math
from collections.abc import Callable
from functools import lru_cache, reduce, wraps
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow_kernels.coupling import CouplingSpec
from fastflow_kernels.engines.triton.launch import (
    BACKWARD_ROWS,
    FORWARD_ROWS,
    alignment,
    by_rows,
    plan,
    uncovered,
)
from fastflow_kernels.engines.triton.math import exp_of_factor, product, tanh_of_factor
from fastflow_kernels.engines.triton.prepared import Launch, aligned
from fastflow_kernels.engines.triton.reduce import (
    ACCUMULATORS,
    GinSums,
    logdet_launch,
    params_launch,
)
from fastflow_kernels.engines.triton.tiles import (
    columns,
    index,
    inverse_scale,
    load,
    log_scale_sum,
    scale,
    total,
)

__all__ = [
    "coupling_bwd",
    "coupling_fwd",
    "coupling_inv_active",
    "coupling_inv_bwd",
    "coupling_inv_passive",
    "uncovered",
]

# A program's channel constants (index, scale, offset: up to 16 bytes a channel) and partial sums
# are small against 3 and 5 values a column from these many columns on.
_COLUMNS = 32
_COLUMNS_BWD = 64


@triton.jit
def _coupling_fwd_kernel(
    x_ptr, a_ptr, g_ptr, offset_ptr, inv_ptr, sums_ptr, y_ptr, part_ptr, B, P, stride_xb, stride_ab,
    C: tl.constexpr, CLAMP: tl.constexpr, TANH_SCALE: tl.constexpr, ACT: tl.constexpr,
    REVERSE: tl.constexpr, PARTS: tl.constexpr,
    MUL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y[:, inv] = u * scale + offset, u = cat(x1, x2 * exp(s) + 0.1 * a_t), s = clamp *
    tanh(tanh_scale * a_s).

    With REVERSE for u = cat(x1, ...) of x[:, inv]: then a channel of y depends on that channel of
    x.

    Program: one tile of channel pairs by pixels of one sample. P and the strides come divided by
    MUL.

    x_ptr: (B, C, P), stride_xb between samples.
    a_ptr: (B, 2*C2, P), stride_ab between samples.
    g_ptr, offset_ptr: (C,).
    inv_ptr: int64 (C,), or None for the identity.
    sums_ptr: (B, PARTS), partial sums of s per sample, whose mean is taken off s (GIN); or None.
    y_ptr: (B, C, P) contiguous, out.
    part_ptr: (B, programs per sample) sums of s, out; or None.
    """
    P = P * MUL
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    TILES: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    b, p, exists = columns(program // TILES, B, P, BLOCK_P, False)
    c = (program % TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_passive = c < C1
    is_active = c < C2
    passive = is_passive[:, None] & exists
    active = is_active[:, None] & exists
    x_ptr += b * stride_xb * MUL
    a_ptr += b * stride_ab * MUL
    y_ptr += b * C * P
    at = c[:, None] * P + p

    at1 = index(inv_ptr, c, is_passive)[:, None] * P + p
    at2 = index(inv_ptr, C1 + c, is_active)[:, None] * P + p

    a_s = load(a_ptr + at, active, ACC)
    a_t = load(a_ptr + C2 * P + at, active, ACC)
    x2 = load(x_ptr + (at2 if REVERSE else C1 * P + at), active, ACC)
    x1 = load(x_ptr + (at1 if REVERSE else at), passive, ACC)
    y1 = (
        x1 * scale(g_ptr, c, is_passive, ACT, ACC)[:, None]
        + load(offset_ptr + c, is_passive, ACC)[:, None]
    )
    tl.store(y_ptr + at1, y1, mask=passive)
    t = tanh_of_factor(TANH_SCALE * a_s, CLAMP)  # 0 where masked
    s = CLAMP * t
    if part_ptr is not None:
        tl.store(part_ptr + program, CLAMP * tl.sum(t))
    if sums_ptr is not None:
        s -= total(sums_ptr, b, B, PARTS) / (C2 * P)
    u2 = x2 * exp_of_factor(s, CLAMP) + 0.1 * a_t
    y2 = (
        u2 * scale(g_ptr, C1 + c, is_active, ACT, ACC)[:, None]
        + load(offset_ptr + C1 + c, is_active, ACC)[:, None]
    )
    tl.store(y_ptr + at2, y2, mask=active)


@triton.jit
def _coupling_rows_fwd_kernel(
    x_ptr, a_ptr, g_ptr, offset_ptr, perm_ptr, sums_ptr, y_ptr, logdet_ptr, B, stride_xb, stride_ab,
    C: tl.constexpr, CLAMP: tl.constexpr, TANH_SCALE: tl.constexpr, ACT: tl.constexpr,
    REVERSE: tl.constexpr,
    MUL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr, LOOPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The same for one pixel, P = 1, gathering each output channel's input through perm; with the
    log-determinant.

    Program: LOOPS tiles of all channels by BLOCK_B samples. The strides come divided by MUL.

    x_ptr: (B, C), stride_xb between samples.
    a_ptr: (B, 2*C2), stride_ab between samples.
    g_ptr, offset_ptr: (C,).
    perm_ptr: int64 (C,), or None for the identity.
    sums_ptr: (B,), sum of s per sample, whose mean is taken off s (GIN); or None.
    y_ptr: (B, C) contiguous, out.
    logdet_ptr: (B,), out; or None.
    """
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    j = tl.arange(0, BLOCK_C)
    is_channel = j < C
    c = index(perm_ptr, j, is_channel)
    is_active = is_channel & (c >= C1)
    factor = scale(g_ptr, c, is_channel, ACT, ACC)[:, None]
    offset = load(offset_ptr + c, is_channel, ACC)[:, None]
    if logdet_ptr is not None:
        log_scale = log_scale_sum(g_ptr, c, is_channel, ACT, ACC)
    for i in range(LOOPS):
        b, _, exists = columns(tl.program_id(0) * LOOPS + i, B, 1, BLOCK_B, True)
        channel = is_channel[:, None] & exists
        active = is_active[:, None] & exists
        a_at = a_ptr + b * stride_ab * MUL + (c[:, None] - C1)
        a_s = load(a_at, active, ACC)
        a_t = load(a_at + C2, active, ACC)
        x = load(x_ptr + b * stride_xb * MUL + (j if REVERSE else c)[:, None], channel, ACC)
        t = tanh_of_factor(TANH_SCALE * a_s, CLAMP)
        s = CLAMP * t  # 0 for passive channels, so that u = x there
        if logdet_ptr is not None:
            tl.store(
                logdet_ptr + b, CLAMP * tl.sum(t, axis=0, keep_dims=True) + log_scale, mask=exists
            )
        if sums_ptr is not None:
            s = tl.where(active, s - total(sums_ptr, b, B, 1) / C2, 0.0)
        y = (x * exp_of_factor(s, CLAMP) + 0.1 * a_t) * factor + offset
        tl.store(y_ptr + b * C + j[:, None], y, mask=channel)


@triton.jit
def _store_gradients(
    dx1_at, dx2_at, da_at, dv1, dv2, x2_e, t, e, ds, scale1, scale2, passive, active, P,
    C2: tl.constexpr, CLAMP: tl.constexpr, TANH_SCALE: tl.constexpr,
):  # fmt: skip
    """dx and da as in :func:`_coupling_bwd_kernel`, from x2 * exp(s), t = tanh, e = exp(s) and ds,
    what else the gradient of s has.
    """
    du2 = dv2 * scale2
    tl.store(dx1_at, dv1 * scale1, mask=passive)
    tl.store(dx2_at, du2 * e, mask=active)
    tl.store(da_at + C2 * P, 0.1 * du2, mask=active)
    tl.store(da_at, (du2 * x2_e + ds) * (CLAMP * TANH_SCALE * (1.0 - t * t)), mask=active)


@triton.jit
def _store_sums(
    part_ptr, group, c, is_passive, is_active, doffset1, doffset2, dscale1, dscale2,
    C: tl.constexpr, C1: tl.constexpr, TILES: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """A program's sums for offset and, but for ACT = None (GIN), for scale: part_ptr (2, groups,
    C).
    """
    part_at = part_ptr + group.to(tl.int64) * C + c
    tl.store(part_at, doffset1, mask=is_passive)
    tl.store(part_at + C1, doffset2, mask=is_active)
    if ACT is not None:
        part_at += (tl.num_programs(0) // TILES).to(tl.int64) * C
        tl.store(part_at, dscale1, mask=is_passive)
        tl.store(part_at + C1, dscale2, mask=is_active)


@triton.jit
def _coupling_bwd_kernel(
    dy_ptr, dlogdet_ptr, x_ptr, a_ptr, g_ptr, inv_ptr, sums_ptr, dx_ptr, da_ptr, part_ptr, B, P,
    stride_xb, stride_ab, stride_l,
    C: tl.constexpr, CLAMP: tl.constexpr, TANH_SCALE: tl.constexpr, ACT: tl.constexpr,
    REVERSE: tl.constexpr, PARTS: tl.constexpr,
    MUL: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
    LOOPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """With dv = dy[:, inv] and du = dv * scale, and s, u computed again:

        dx = cat(du1, du2 * exp(s)),  da_t = 0.1 * du2,  da_s = (du2 * x2 * exp(s) + dlogdet) *
        clamp * tanh_scale * (1 - tanh**2)

    and per channel the sums of dv (for offset) and dv * u (for scale). GIN: no dlogdet; du2 * x2 *
    exp(s) less its mean per sample. With REVERSE x1, x2 are those of x[:, inv], and dx lies as x
    does.

    Program: one tile of channel pairs, LOOPS tiles of columns. P (unless ROWS) and the strides come
    divided by MUL.

    dy_ptr: (B, C, P) contiguous.
    dlogdet_ptr: (B,) with stride_l, or None.
    x_ptr: (B, C, P), stride_xb between samples.
    a_ptr: (B, 2*C2, P), stride_ab between samples.
    g_ptr: (C,).
    inv_ptr: int64 (C,), or None for the identity.
    sums_ptr: (2, B, PARTS), partial sums of s and of dv2 * x2 * exp(s) before the mean is taken off
    s (GIN); or None.
    dx_ptr: (B, C, P) contiguous, out.
    da_ptr: (B, 2*C2, P) contiguous, out.
    part_ptr: (2, groups, C), out: sums of dv and of dv * u, the latter not for ACT = None (GIN); or
    None.
    """
    if not ROWS:
        P = P * MUL
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    TILES: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    group = tl.program_id(0) // TILES
    c = (tl.program_id(0) % TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_passive = c < C1
    is_active = c < C2
    j1 = index(inv_ptr, c, is_passive)[:, None]
    j2 = index(inv_ptr, C1 + c, is_active)[:, None]
    scale1 = scale(g_ptr, c, is_passive, ACT, ACC)[:, None]
    scale2 = scale(g_ptr, C1 + c, is_active, ACT, ACC)[:, None]
    doffset1 = tl.zeros((BLOCK_C,), ACC)
    doffset2 = tl.zeros((BLOCK_C,), ACC)
    dscale1 = tl.zeros((BLOCK_C,), ACC)
    dscale2 = tl.zeros((BLOCK_C,), ACC)
    for i in range(LOOPS):
        b, p, exists = columns(group * LOOPS + i, B, P, BLOCK_Q, ROWS)
        passive = is_passive[:, None] & exists
        active = is_active[:, None] & exists
        at = c[:, None] * P + p
        y_at1 = j1 * P + p
        y_at2 = j2 * P + p
        x_at1 = y_at1 if REVERSE else at
        x_at2 = y_at2 if REVERSE else C1 * P + at
        dy_at = dy_ptr + b * C * P
        x_at = x_ptr + b * stride_xb * MUL
        a_at = a_ptr + b * stride_ab * MUL + at
        dx_at = dx_ptr + b * C * P
        da_at = da_ptr + b * (2 * C2) * P + at

        a_s = load(a_at, active, ACC)
        x2 = load(x_at + x_at2, active, ACC)
        dv2 = load(dy_at + y_at2, active, ACC)
        dv1 = load(dy_at + y_at1, passive, ACC)
        t = tanh_of_factor(TANH_SCALE * a_s, CLAMP)
        s = CLAMP * t
        if sums_ptr is not None:
            mean = total(sums_ptr, b, B, PARTS) / (C2 * P)
            s -= mean
        e = exp_of_factor(s, CLAMP)
        x2_e = x2 * e
        ds = tl.zeros((1, 1), ACC)
        if sums_ptr is not None:
            # the sum was taken with exp(s + mean), and before the scale, which GIN has none of
            ds -= total(sums_ptr + B * PARTS, b, B, PARTS) * exp_of_factor(-mean, CLAMP) / (C2 * P)
        if dlogdet_ptr is not None:
            ds += load(dlogdet_ptr + b * stride_l, b < B, ACC)
        _store_gradients(
            dx_at + x_at1, dx_at + x_at2, da_at, dv1, dv2, x2_e, t, e, ds, scale1, scale2, passive, active, P, C2, CLAMP, TANH_SCALE
        )  # fmt: skip
        if part_ptr is not None:
            doffset1 += tl.sum(dv1, axis=1)
            doffset2 += tl.sum(dv2, axis=1)
            if ACT is not None:
                x1 = load(x_at + x_at1, passive, ACC)
                a_t = load(a_at + C2 * P, active, ACC)
                dscale1 += tl.sum(product(dv1, x1), axis=1)
                dscale2 += tl.sum(product(dv2, x2_e + 0.1 * a_t), axis=1)
    if part_ptr is not None:
        _store_sums(
            part_ptr,
            group,
            c,
            is_passive,
            is_active,
            doffset1,
            doffset2,
            dscale1,
            dscale2,
            C,
            C1,
            TILES,
            ACT,
        )


@triton.jit
def _coupling_inv_passive_kernel(
    y_ptr, g_ptr, offset_ptr, inv_ptr, x_ptr, B, P, stride_yb,
    C: tl.constexpr, ACT: tl.constexpr, REVERSE: tl.constexpr, MUL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, LOOPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """x[:, :C1] = (y[:, inv[:C1]] - offset) / scale; with REVERSE in the channels inv[:C1] of x.

    Program: one tile of passive channels, LOOPS tiles of columns. P (unless ROWS) and the stride
    come divided by MUL.

    y_ptr: (B, C, P), stride_yb between samples.
    g_ptr, offset_ptr: (C,).
    inv_ptr: int64 (C,), or None for the identity.
    x_ptr: (B, C, P) contiguous, out.
    """
    if not ROWS:
        P = P * MUL
    C1: tl.constexpr = C - C // 2
    TILES: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    c = (tl.program_id(0) % TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_passive = c < C1
    j = index(inv_ptr, c, is_passive)[:, None]
    factor, boost = inverse_scale(scale(g_ptr, c, is_passive, ACT, ACC)[:, None])
    offset = load(offset_ptr + c, is_passive, ACC)[:, None]
    for i in range(LOOPS):
        b, p, exists = columns(tl.program_id(0) // TILES * LOOPS + i, B, P, BLOCK_Q, ROWS)
        passive = is_passive[:, None] & exists
        y_at = j * P + p
        x_at = y_at if REVERSE else c[:, None] * P + p
        y = load(y_ptr + b * stride_yb * MUL + y_at, passive, ACC)
        tl.store(x_ptr + b * C * P + x_at, (y - offset) * factor * boost, mask=passive)


@triton.jit
def _coupling_inv_active_kernel(
    y_ptr, a_ptr, g_ptr, offset_ptr, inv_ptr, sums_ptr, x_ptr, logdet_ptr, B, P, stride_yb,
    stride_ab,
    C: tl.constexpr, CLAMP: tl.constexpr, TANH_SCALE: tl.constexpr, ACT: tl.constexpr,
    REVERSE: tl.constexpr, PARTS: tl.constexpr,
    MUL: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
    LOOPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x[:, C1:] = ((y[:, inv[C1:]] - offset) / scale - 0.1 * a_t) * exp(-s), s as in the forward;
    with REVERSE in the channels inv[C1:] of x.

    Program: one tile of active channels, LOOPS tiles of columns. P (unless ROWS) and the strides
    come divided by MUL.

    y_ptr: (B, C, P), stride_yb between samples.
    a_ptr: (B, 2*C2, P), stride_ab between samples.
    g_ptr, offset_ptr: (C,).
    inv_ptr: int64 (C,), or None for the identity.
    sums_ptr: (B, PARTS), partial sums of s per sample, whose mean is taken off s (GIN); or None.
    x_ptr: (B, C, P) contiguous, out.
    logdet_ptr: out. ROWS: (B,), the log-determinant -(sum of s + sum of log(scale)). Else (B,
    programs per sample), sums of s. Or None.
    """
    if not ROWS:
        P = P * MUL
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    TILES: tl.constexpr = max(1, (C2 + BLOCK_C - 1) // BLOCK_C)
    group = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    is_active = c < C2
    j = index(inv_ptr, C1 + c, is_active)[:, None]
    factor, boost = inverse_scale(scale(g_ptr, C1 + c, is_active, ACT, ACC)[:, None])
    offset = load(offset_ptr + C1 + c, is_active, ACC)[:, None]
    if ROWS and logdet_ptr is not None:
        # one more passive channel than active ones where C is odd: the last
        log_scale = log_scale_sum(g_ptr, c, is_active, ACT, ACC) + log_scale_sum(
            g_ptr, C2 + c, c < C1, ACT, ACC
        )
    for i in range(LOOPS):
        block = group * LOOPS + i
        b, p, exists = columns(block, B, P, BLOCK_Q, ROWS)
        active = is_active[:, None] & exists
        at = c[:, None] * P + p
        a_at = a_ptr + b * stride_ab * MUL + at
        a_s = load(a_at, active, ACC)
        a_t = load(a_at + C2 * P, active, ACC)
        y_at = j * P + p
        x_at = y_at if REVERSE else C1 * P + at
        y = load(y_ptr + b * stride_yb * MUL + y_at, active, ACC)
        # All loads are on their way from here on. Without the barrier ptxas 12.8 puts half of them
        # off until the others have been used: 42 KB in flight on a multiprocessor for 74, and 36.6
        # us on an H200 for a minimum of 31.5 (bfloat16, (32, 256, 64, 64)).
        tl.debug_barrier()
        t = tanh_of_factor(TANH_SCALE * a_s, CLAMP)  # 0 where masked
        s = CLAMP * t
        if logdet_ptr is not None:
            if ROWS:
                tl.store(
                    logdet_ptr + b,
                    -(CLAMP * tl.sum(t, axis=0, keep_dims=True) + log_scale),
                    mask=exists,
                )
            else:
                tl.store(logdet_ptr + (block * TILES + tile), CLAMP * tl.sum(t), mask=b < B)
        if sums_ptr is not None:
            s -= total(sums_ptr, b, B, PARTS) / (C2 * P)
        x = ((y - offset) * factor * boost - 0.1 * a_t) * exp_of_factor(-s, CLAMP)
        tl.store(x_ptr + b * C * P + x_at, x, mask=active)


@triton.jit
def _coupling_inv_bwd_kernel(
    y_ptr, dy_ptr, dlogdet_ptr, a_ptr, g_ptr, offset_ptr, inv_ptr, x_ptr, dx_ptr, da_ptr, part_ptr,
    B, P, stride_ab, stride_l,
    C: tl.constexpr, CLAMP: tl.constexpr, TANH_SCALE: tl.constexpr, ACT: tl.constexpr,
    MUL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr, LOOPS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The active half of the inverse and the backward in one, but for GIN.

    With u2 = (y[:, inv[C1:]] - offset) / scale, x2 * exp(s) is u2 - 0.1 * a_t, and x[:, C1:] that
    times exp(-s); the rest as in :func:`_coupling_bwd_kernel`. Program: one tile of channel pairs,
    LOOPS tiles of columns. P (unless ROWS) and the stride come divided by MUL.

    y_ptr, dy_ptr: (B, C, P) contiguous.
    dlogdet_ptr: (B,) with stride_l, or None.
    a_ptr: (B, 2*C2, P), stride_ab between samples.
    g_ptr, offset_ptr: (C,).
    inv_ptr: int64 (C,), or None for the identity.
    x_ptr: (B, C, P) contiguous; x[:, :C1] is read, x[:, C1:] is out.
    dx_ptr: (B, C, P) contiguous, out.
    da_ptr: (B, 2*C2, P) contiguous, out.
    part_ptr: (2, groups, C), out: sums of dv and of dv * u; or None.
    """
    if not ROWS:
        P = P * MUL
    C2: tl.constexpr = C // 2
    C1: tl.constexpr = C - C2
    TILES: tl.constexpr = (C1 + BLOCK_C - 1) // BLOCK_C
    group = tl.program_id(0) // TILES
    c = (tl.program_id(0) % TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_passive = c < C1
    is_active = c < C2
    j1 = index(inv_ptr, c, is_passive)[:, None]
    j2 = index(inv_ptr, C1 + c, is_active)[:, None]
    scale1 = scale(g_ptr, c, is_passive, ACT, ACC)[:, None]
    scale2 = scale(g_ptr, C1 + c, is_active, ACT, ACC)[:, None]
    factor2, boost2 = inverse_scale(scale2)
    offset2 = load(offset_ptr + C1 + c, is_active, ACC)[:, None]
    doffset1 = tl.zeros((BLOCK_C,), ACC)
    doffset2 = tl.zeros((BLOCK_C,), ACC)
    dscale1 = tl.zeros((BLOCK_C,), ACC)
    dscale2 = tl.zeros((BLOCK_C,), ACC)
    for i in range(LOOPS):
        b, p, exists = columns(group * LOOPS + i, B, P, BLOCK_Q, ROWS)
        passive = is_passive[:, None] & exists
        active = is_active[:, None] & exists
        at = c[:, None] * P + p
        x_at = x_ptr + b * C * P + at
        a_at = a_ptr + b * stride_ab * MUL + at
        dx_at = dx_ptr + b * C * P + at

        a_s = load(a_at, active, ACC)
        a_t = load(a_at + C2 * P, active, ACC)
        y2 = load(y_ptr + b * C * P + (j2 * P + p), active, ACC)
        dv2 = load(dy_ptr + b * C * P + (j2 * P + p), active, ACC)
        dv1 = load(dy_ptr + b * C * P + (j1 * P + p), passive, ACC)
        t = tanh_of_factor(TANH_SCALE * a_s, CLAMP)
        s = CLAMP * t
        u2 = (y2 - offset2) * factor2 * boost2
        x2_e = u2 - 0.1 * a_t
        tl.store(x_at + C1 * P, x2_e * exp_of_factor(-s, CLAMP), mask=active)
        ds = tl.zeros((1, 1), ACC)
        if dlogdet_ptr is not None:
            ds += load(dlogdet_ptr + b * stride_l, b < B, ACC)
        _store_gradients(
            dx_at, dx_at + C1 * P, da_ptr + b * (2 * C2) * P + at, dv1, dv2, x2_e, t,
            exp_of_factor(s, CLAMP), ds, scale1, scale2,
            passive, active, P, C2, CLAMP, TANH_SCALE,
        )  # fmt: skip
        if part_ptr is not None:
            x1 = load(x_at, passive, ACC)
            doffset1 += tl.sum(dv1, axis=1)
            doffset2 += tl.sum(dv2, axis=1)
            dscale1 += tl.sum(product(dv1, x1), axis=1)
            dscale2 += tl.sum(product(dv2, u2), axis=1)
    if part_ptr is not None:
        _store_sums(
            part_ptr,
            group,
            c,
            is_passive,
            is_active,
            doffset1,
            doffset2,
            dscale1,
            dscale2,
            C,
            C1,
            TILES,
            ACT,
        )


# --- launchers: what depends on shapes, dtypes and constants alone is worked out once -------------


def _on_its_device(launcher: Callable) -> Callable:
    """Run a launcher on the device of its first argument: Triton launches on the current one."""

    @wraps(launcher)
    def launch(x: Tensor, *args):
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.get_device()):
                return launcher(x, *args)
        return launcher(x, *args)

    return launch


def _promoted(*dtypes: torch.dtype) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _activation(spec: CouplingSpec) -> str | None:
    return None if spec.gin else spec.activation


def _allocated(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new contiguous tensor; ``empty_like``, where it will do, is three times cheaper to call
    than ``empty``.
    """
    if like.dtype is dtype and like.shape == shape and like.is_contiguous():
        return torch.empty_like(like)
    return torch.empty(shape, dtype=dtype, device=like.device)


def _gin_logdet(sums: Tensor | None, batch: int, acc: torch.dtype, device: torch.device) -> Tensor:
    """GIN's log-determinant: 0, and nan where a sample's sum of s is."""
    return (
        torch.zeros(batch, dtype=acc, device=device) if sums is None else sums[0].sum(1).mul_(0.0)
    )


class _Forward(NamedTuple):
    dtype: torch.dtype  # of y
    acc: torch.dtype
    launch: Launch
    gin: GinSums | None
    sums: tuple[int, ...] | None  # shape of the sums of s that the launch leaves; None without
    finish: Launch | None  # makes them the log-determinant; None where they are it


@lru_cache(maxsize=1024)
def _prepare_fwd(
    shape: tuple[int, ...], stride_xb: int, stride_ab: int, x: torch.dtype, a: torch.dtype,
    g: torch.dtype, offset: torch.dtype,
    spec: CouplingSpec, jac: bool, indexed: bool, device: int,
) -> _Forward:  # fmt: skip
    """See :class:`_Forward`; the last arguments and the dtypes are there to tell compiled kernels
    apart.
    """
    batch, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    dtype = _promoted(x, a, g)
    acc = _accumulator(dtype)
    gin = (
        GinSums(channels, batch, pixels, a.itemsize, stride_ab, None, spec, acc)
        if spec.gin and channels > 1
        else None
    )
    wants_sum = jac and not spec.gin
    constants = {
        "C": channels,
        "CLAMP": spec.clamp,
        "TANH_SCALE": spec.tanh_scale,
        "ACT": _activation(spec),
        "REVERSE": spec.reverse,
    }
    if by_rows(channels, pixels, acc.itemsize):
        cut = plan(channels, batch, 1, dtype.itemsize, FORWARD_ROWS, _COLUMNS)
        mul = alignment(stride_xb, stride_ab)
        launch = Launch(
            _coupling_rows_fwd_kernel, cut.programs, (batch, stride_xb // mul, stride_ab // mul),
            cut.warps,
            **constants, MUL=mul, BLOCK_C=cut.block_c, BLOCK_B=cut.block_q, LOOPS=cut.loops,
            ACC=ACCUMULATORS[acc],
        )  # fmt: skip
        return _Forward(dtype, acc, launch, gin, (batch,) if wants_sum else None, None)
    cut = plan(channels - channels // 2, batch, pixels, dtype.itemsize, None)
    mul = alignment(pixels, stride_xb, stride_ab)
    launch = Launch(
        _coupling_fwd_kernel, cut.programs,
        (batch, pixels // mul, stride_xb // mul, stride_ab // mul), cut.warps,
        **constants, PARTS=1 if gin is None else gin.parts, MUL=mul, BLOCK_C=cut.block_c,
        BLOCK_P=cut.block_q, ACC=ACCUMULATORS[acc],
    )  # fmt: skip
    if not wants_sum:
        return _Forward(dtype, acc, launch, gin, None, None)
    count = cut.programs // batch
    return _Forward(
        dtype,
        acc,
        launch,
        gin,
        (batch, count),
        logdet_launch(batch, count, pixels, channels, spec, acc, 1.0),
    )


@_on_its_device
def coupling_fwd(
    x: Tensor,
    a: Tensor,
    g: Tensor,
    offset: Tensor,
    perm: Tensor | None,
    inv: Tensor | None,
    spec: CouplingSpec,
    jac: bool,
) -> tuple[Tensor, Tensor | None]:
    """Coupling, global affine and permutation.

    Args:
        x: (B, C, *S), float64, float32, bfloat16 or float16; see :func:`uncovered` for its layout.
        a: (B, 2*C2, *S), the subnet's output, likewise.
        g: ``global_scale``, C elements, contiguous.
        offset: ``global_offset``, likewise.
        perm: int64 (C,), or None for the identity.
        inv: argsort(perm), or None.
        spec: The coupling's constants.
        jac: Whether the log-determinant is wanted.

    Returns:
        y (B, C, *S), contiguous, in the promoted dtype of x, a and g, and the log-determinant (B,)
        in nats (float64 if y is, else float32; zeros for GIN), or None without ``jac``.
    """
    indexed = perm is not None
    prepared = _prepare_fwd(
        x.shape,
        x.stride(0),
        a.stride(0),
        x.dtype,
        a.dtype,
        g.dtype,
        offset.dtype,
        spec,
        jac,
        indexed,
        x.get_device(),
    )
    is_aligned = aligned(x, a, g, offset, perm, inv)
    y = _allocated(x, x.shape, prepared.dtype)
    means = None if prepared.gin is None else prepared.gin(is_aligned, a)
    sums = (
        None
        if prepared.sums is None
        else torch.empty(prepared.sums, dtype=prepared.acc, device=x.device)
    )
    index = perm if prepared.launch.kernel is _coupling_rows_fwd_kernel else inv
    prepared.launch(is_aligned, x, a, g, offset, index, means, y, sums)
    if prepared.finish is not None and prepared.sums is not None:
        logdet = torch.empty(prepared.sums[:1], dtype=prepared.acc, device=x.device)
        prepared.finish(is_aligned, sums, g, logdet)
        return y, logdet
    return y, _gin_logdet(means, x.shape[0], prepared.acc, x.device) if jac and spec.gin else sums


class _Backward(NamedTuple):
    acc: torch.dtype
    launch: Launch
    gin: GinSums | None
    sums: tuple[int, ...] | None  # shape of the partial sums for the parameters; None unless wanted
    finish: Launch | None


@lru_cache(maxsize=1024)
def _prepare_bwd(
    shape: tuple[int, ...], rows_of_sample: int, stride_xb: int, stride_ab: int,
    strides_l: tuple[int, int], dy: torch.dtype,
    dlogdet: torch.dtype | None, x: torch.dtype, a: torch.dtype, g: torch.dtype,
    offset: torch.dtype, spec: CouplingSpec,
    need_params: bool, indexed: bool, device: int,
) -> _Backward:  # fmt: skip
    """See :class:`_Backward`; the last arguments and the dtypes are there to tell compiled kernels
    apart.
    """
    batch, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    acc = _accumulator(_promoted(x, a, g))
    gin = (
        GinSums(channels, batch, pixels, a.itemsize, stride_ab, stride_xb, spec, acc)
        if spec.gin and channels > 1
        else None
    )
    rows = by_rows(channels, pixels, acc.itemsize)
    # cut by the accumulator's size: six tensors' values are alive at once, so registers bound the
    # tile and not the width of an access
    columns = _COLUMNS_BWD if need_params else _COLUMNS
    cut = plan(
        channels - channels // 2,
        batch,
        pixels,
        acc.itemsize,
        BACKWARD_ROWS if rows else None,
        columns,
    )
    mul = alignment(0 if rows else pixels, stride_xb, stride_ab)
    sizes = (
        batch,
        pixels if rows else pixels // mul,
        stride_xb // mul,
        stride_ab // mul,
        strides_l[1],
    )
    launch = Launch(
        _coupling_bwd_kernel, cut.programs, sizes, cut.warps,
        C=channels, CLAMP=spec.clamp, TANH_SCALE=spec.tanh_scale, ACT=_activation(spec),
        REVERSE=spec.reverse,
        PARTS=1 if gin is None else gin.parts, MUL=mul,
        ROWS=rows, BLOCK_C=cut.block_c, BLOCK_Q=cut.block_q, LOOPS=cut.loops, ACC=ACCUMULATORS[acc],
    )  # fmt: skip
    if not need_params:
        return _Backward(acc, launch, gin, None, None)
    finish = params_launch(
        cut.groups,
        batch // rows_of_sample,
        rows_of_sample * pixels,
        channels,
        strides_l[0],
        spec,
        acc,
    )
    return _Backward(acc, launch, gin, (1 if spec.gin else 2, cut.groups, channels), finish)


@lru_cache(maxsize=1024)
def _prepare_inv_bwd(
    shape: tuple[int, ...], rows_of_sample: int, stride_ab: int, strides_l: tuple[int, int],
    y: torch.dtype, x: torch.dtype,
    dy: torch.dtype, dlogdet: torch.dtype | None, a: torch.dtype, g: torch.dtype,
    offset: torch.dtype, spec: CouplingSpec,
    need_params: bool, indexed: bool, device: int,
) -> _Backward:  # fmt: skip
    batch, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    acc = _accumulator(_promoted(x, a, g))
    rows = by_rows(channels, pixels, acc.itemsize)
    columns = _COLUMNS_BWD if need_params else _COLUMNS
    cut = plan(
        channels - channels // 2,
        batch,
        pixels,
        acc.itemsize,
        BACKWARD_ROWS if rows else None,
        columns,
    )
    mul = alignment(0 if rows else pixels, stride_ab)
    launch = Launch(
        _coupling_inv_bwd_kernel, cut.programs,
        (batch, pixels if rows else pixels // mul, stride_ab // mul, strides_l[1]), cut.warps,
        C=channels, CLAMP=spec.clamp, TANH_SCALE=spec.tanh_scale, ACT=_activation(spec), MUL=mul,
        ROWS=rows, BLOCK_C=cut.block_c, BLOCK_Q=cut.block_q, LOOPS=cut.loops, ACC=ACCUMULATORS[acc],
    )  # fmt: skip
    if not need_params:
        return _Backward(acc, launch, None, None, None)
    finish = params_launch(
        cut.groups,
        batch // rows_of_sample,
        rows_of_sample * pixels,
        channels,
        strides_l[0],
        spec,
        acc,
    )
    return _Backward(acc, launch, None, (2, cut.groups, channels), finish)


def _spread(dlogdet: Tensor | None, batch: int) -> tuple[Tensor | None, tuple[int, int], int]:
    """The gradient of the log-determinant per row of x, the strides per sample and per row, and how
    many rows make a sample.
    """
    if dlogdet is None:
        return None, (0, 0), 1
    rows = batch // dlogdet.shape[0]
    dlogdet_of_row = dlogdet if rows == 1 else dlogdet.repeat_interleave(rows)
    return dlogdet_of_row, (dlogdet.stride(0), dlogdet_of_row.stride(0)), rows


@_on_its_device
def coupling_bwd(
    dy: Tensor,
    dlogdet: Tensor | None,
    x: Tensor,
    a: Tensor,
    g: Tensor,
    offset: Tensor,
    perm: Tensor | None,
    inv: Tensor | None,
    spec: CouplingSpec,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`coupling_fwd`; tanh and exp are computed again rather than kept.

    Args:
        dy: Gradient of y, (B, C, *S), in any layout.
        dlogdet: Gradient of the log-determinant, (B,), or None; of fewer samples where several rows
            of x make one.
        x, a, g, offset, perm, inv, spec: As given to the forward.
        need_params: Whether the gradients of g and offset are wanted.

    Returns:
        (dx, da, dg, doffset), each in the shape and dtype of its tensor; the last two None unless
        wanted, dg None for GIN.
    """
    dy = dy.contiguous()
    dlogdet = None if spec.gin else dlogdet
    dlogdet_of_row, strides_l, rows = _spread(dlogdet, x.shape[0])
    dlogdet_dtype = None if dlogdet is None else dlogdet.dtype
    prepared = _prepare_bwd(
        x.shape, rows, x.stride(0), a.stride(0), strides_l, dy.dtype, dlogdet_dtype,
        x.dtype, a.dtype, g.dtype, offset.dtype, spec, need_params, inv is not None, x.get_device(),
    )  # fmt: skip
    is_aligned = aligned(dy, dlogdet, dlogdet_of_row, x, a, g, offset, inv)
    dx, da = _allocated(x, x.shape, x.dtype), _allocated(a, a.shape, a.dtype)
    means = None if prepared.gin is None else prepared.gin(is_aligned, a, inv, dy, x)
    sums = (
        None
        if prepared.sums is None
        else torch.empty(prepared.sums, dtype=prepared.acc, device=x.device)
    )
    prepared.launch(is_aligned, dy, dlogdet_of_row, x, a, g, inv, means, dx, da, sums)
    if prepared.finish is None:
        return dx, da, None, None
    dg, doffset = None if spec.gin else torch.empty_like(g), torch.empty_like(offset)
    prepared.finish(is_aligned, sums, dlogdet, g, dg, doffset)
    return dx, da, dg, doffset


@lru_cache(maxsize=1024)
def _prepare_inv_passive(
    shape: tuple[int, ...], stride_yb: int, y: torch.dtype, g: torch.dtype, offset: torch.dtype,
    spec: CouplingSpec, indexed: bool, device: int,
) -> tuple[torch.dtype, Launch]:  # fmt: skip
    batch, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    dtype = _promoted(y, g)
    acc = _accumulator(dtype)
    rows = by_rows(channels, pixels, acc.itemsize)
    cut = plan(
        channels - channels // 2,
        batch,
        pixels,
        dtype.itemsize,
        FORWARD_ROWS if rows else None,
        _COLUMNS,
    )
    mul = alignment(0 if rows else pixels, stride_yb)
    launch = Launch(
        _coupling_inv_passive_kernel, cut.programs,
        (batch, pixels if rows else pixels // mul, stride_yb // mul), cut.warps,
        C=channels, ACT=_activation(spec), REVERSE=spec.reverse, MUL=mul,
        ROWS=rows, BLOCK_C=cut.block_c, BLOCK_Q=cut.block_q, LOOPS=cut.loops, ACC=ACCUMULATORS[acc],
    )  # fmt: skip
    return dtype, launch


@_on_its_device
def coupling_inv_passive(
    y: Tensor,
    g: Tensor,
    offset: Tensor,
    perm: Tensor | None,
    inv: Tensor | None,
    spec: CouplingSpec,
) -> Tensor:
    """First half of the inverse: the passive channels, which the subnet needs.

    Args:
        y: (B, C, *S); see :func:`uncovered` for its layout.
        g, offset, perm, inv, spec: As given to the forward.

    Returns:
        A new, contiguous x (B, C, *S) in the promoted dtype of y and g; x[:, :C1] is final, x[:,
        C1:] is for :func:`coupling_inv_active`.
    """
    dtype, launch = _prepare_inv_passive(
        y.shape, y.stride(0), y.dtype, g.dtype, offset.dtype, spec, inv is not None, y.get_device()
    )
    # so that it counts its versions: a subnet that writes to its input is noticed
    with torch.inference_mode(False):
        x = torch.empty(y.shape, dtype=dtype, device=y.device)
    launch(aligned(y, g, offset, inv), y, g, offset, inv, x)
    return x


class _InverseActive(NamedTuple):
    launch: Launch
    gin: GinSums | None
    # shape of the sums of s, or of the log-determinant, that the launch leaves; None without
    sums: tuple[int, ...] | None
    finish: Launch | None


@lru_cache(maxsize=1024)
def _prepare_inv_active(
    shape: tuple[int, ...], stride_yb: int, stride_ab: int, y: torch.dtype, x: torch.dtype,
    a: torch.dtype, g: torch.dtype,
    offset: torch.dtype, spec: CouplingSpec, jac: bool, indexed: bool, device: int,
) -> _InverseActive:  # fmt: skip
    batch, channels, pixels = shape[0], shape[1], math.prod(shape[2:])
    acc = _accumulator(x)
    gin = (
        GinSums(channels, batch, pixels, a.itemsize, stride_ab, None, spec, acc)
        if spec.gin and channels > 1
        else None
    )
    rows = by_rows(channels, pixels, acc.itemsize)
    # rows: a tile of all passive channels, for the sum of log(scale) runs over them too
    walked = channels - channels // 2 if rows else max(1, channels // 2)
    cut = plan(walked, batch, pixels, x.itemsize, FORWARD_ROWS if rows else None, _COLUMNS)
    mul = alignment(0 if rows else pixels, stride_yb, stride_ab)
    launch = Launch(
        _coupling_inv_active_kernel, cut.programs,
        (batch, pixels if rows else pixels // mul, stride_yb // mul, stride_ab // mul), cut.warps,
        C=channels, CLAMP=spec.clamp, TANH_SCALE=spec.tanh_scale, ACT=_activation(spec),
        REVERSE=spec.reverse,
        PARTS=1 if gin is None else gin.parts, MUL=mul,
        ROWS=rows, BLOCK_C=cut.block_c, BLOCK_Q=cut.block_q, LOOPS=cut.loops, ACC=ACCUMULATORS[acc],
    )  # fmt: skip
    if spec.gin or not jac:
        return _InverseActive(launch, gin, None, None)
    if rows:
        return _InverseActive(launch, gin, (batch,), None)
    count = cut.tiles * cut.blocks // batch
    return _InverseActive(
        launch, gin, (batch, count), logdet_launch(batch, count, pixels, channels, spec, acc, -1.0)
    )


@_on_its_device
def coupling_inv_active(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    g: Tensor,
    offset: Tensor,
    perm: Tensor | None,
    inv: Tensor | None,
    spec: CouplingSpec,
    jac: bool,
) -> Tensor | None:
    """Second half of the inverse: writes x[:, C1:] in place.

    Args:
        y: As given to :func:`coupling_inv_passive`.
        x: What that returned.
        a: (B, 2*C2, *S), the subnet's output for x[:, :C1].
        g, offset, perm, inv, spec: As given to the forward.
        jac: Whether the log-determinant is wanted.

    Returns:
        The log-determinant of the inverse (B,) in nats (float64 if x is, else float32; zeros for
        GIN), or None without ``jac``.
    """
    prepared = _prepare_inv_active(
        y.shape,
        y.stride(0),
        a.stride(0),
        y.dtype,
        x.dtype,
        a.dtype,
        g.dtype,
        offset.dtype,
        spec,
        jac,
        inv is not None,
        y.get_device(),
    )
    is_aligned = aligned(y, x, a, g, offset, inv)
    acc = _accumulator(x.dtype)
    means = None if prepared.gin is None else prepared.gin(is_aligned, a)
    sums = None if prepared.sums is None else torch.empty(prepared.sums, dtype=acc, device=x.device)
    prepared.launch(is_aligned, y, a, g, offset, inv, means, x, sums)
    if prepared.finish is not None and prepared.sums is not None:
        logdet = torch.empty(prepared.sums[:1], dtype=acc, device=x.device)
        prepared.finish(is_aligned, sums, g, logdet)
        return logdet
    return _gin_logdet(means, x.shape[0], acc, x.device) if jac and spec.gin else sums


@_on_its_device
def coupling_inv_bwd(
    y: Tensor,
    x: Tensor,
    dy: Tensor,
    dlogdet: Tensor | None,
    a: Tensor,
    g: Tensor,
    offset: Tensor,
    perm: Tensor | None,
    inv: Tensor | None,
    spec: CouplingSpec,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """:func:`coupling_inv_active` and :func:`coupling_bwd`: writes x[:, C1:] in place and returns
    the gradients.

    Args:
        y: The output of :func:`coupling_fwd`.
        x: What :func:`coupling_inv_passive` returned.
        dy: Gradient of y, (B, C, *S), in any layout.
        dlogdet: Gradient of the log-determinant, (B,), or None; of fewer samples where several rows
            of x make one.
        a: (B, 2*C2, *S), the subnet's output for x[:, :C1].
        g, offset, perm, inv, spec: As given to the forward.
        need_params: Whether the gradients of g and offset are wanted.

    Returns:
        (dx, da, dg, doffset), as :func:`coupling_bwd`.
    """
    if spec.gin:  # its means would have to be taken first, and then everything read again
        coupling_inv_active(y, x, a, g, offset, perm, inv, spec, False)
        return coupling_bwd(dy, dlogdet, x, a, g, offset, perm, inv, spec, need_params)
    y, dy = y.contiguous(), dy.contiguous()
    dlogdet_of_row, strides_l, rows = _spread(dlogdet, x.shape[0])
    dlogdet_dtype = None if dlogdet is None else dlogdet.dtype
    prepared = _prepare_inv_bwd(
        x.shape, rows, a.stride(0), strides_l, y.dtype, x.dtype, dy.dtype, dlogdet_dtype,
        a.dtype, g.dtype, offset.dtype, spec, need_params, inv is not None, x.get_device(),
    )  # fmt: skip
    is_aligned = aligned(y, dy, dlogdet, dlogdet_of_row, a, g, offset, inv, x)
    dx, da = _allocated(x, x.shape, x.dtype), _allocated(a, a.shape, a.dtype)
    sums = (
        None
        if prepared.sums is None
        else torch.empty(prepared.sums, dtype=prepared.acc, device=x.device)
    )
    prepared.launch(is_aligned, y, dy, dlogdet_of_row, a, g, offset, inv, x, dx, da, sums)
    if prepared.finish is None:
        return dx, da, None, None
    dg, doffset = torch.empty_like(g), torch.empty_like(offset)
    prepared.finish(is_aligned, sums, dlogdet, g, dg, doffset)
    return dx, da, dg, doffset
