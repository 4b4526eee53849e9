"""The kernels that sum: per sample ahead of GIN's main pass, and the partial sums of main passes.

No kernel uses atomics. Every program writes its own partial result, and one program adds them in
order, so that results repeat bit for bit.

Loops whose length is only known at run time are ``while`` loops. ``range`` over a run-time value
fails in the interpreter of Triton 3.6 with numpy 2.4.

Notation: see :mod:`~fastflow_kernels.engines.triton.forward`.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow_kernels.coupling import Coupling
from fastflow_kernels.engines.triton import plan
from fastflow_kernels.engines.triton.launch import (
    ACC_DTYPES,
    Launch,
    Operands,
    Prepared,
    Sums,
    aligned,
    on_its_device,
    values_of,
)
from fastflow_kernels.engines.triton.math import (
    clamped,
    exp_of_factor,
    log_scale_of,
    scale_of,
    scale_slope,
)
from fastflow_kernels.engines.triton.tiles import index, load, sample


@triton.jit
def _gin_sums_kernel(
    a_ptr, dy_ptr, x_ptr, inv_ptr, sums_ptr,
    B, P, stride_ab, stride_xb, stride_dyb,
    C: tl.constexpr, ACTIVE: tl.constexpr, FUNCTION: tl.constexpr, CLAMP: tl.constexpr,
    INPUT_SCALE: tl.constexpr, UNPERMUTES_INPUT: tl.constexpr, PARTS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Compute per sample the sum of s before its mean is subtracted, and with dy the sum of h.

    With dv = dy[:, inv]::

        s = clamp * f(input_scale * a_s)
        h = dv2 * x2 * exp(s)

    With UNPERMUTES_INPUT x2 is that of x[:, inv].

    Program (b, k) adds every PARTS-th tile of sample b, starting with tile k. For PARTS = 0 it adds
    the channels of the k-th tile of pixels, for a sum per pixel. P and the strides arrive divided
    by ALIGN.

    Args:
        a_ptr: Input (B, 2*C2, P), stride_ab between samples.
        dy_ptr: Input (B, C, P), stride_dyb between samples, or None to leave out the sum of h.
        x_ptr: Input (B, C, P), stride_xb between samples; None if dy is None.
        inv_ptr: Input (C,), int64, or None for the identity.
        sums_ptr: Output (1 or 2, B, PARTS or P), the sums of s and then those of h.
    """
    P = P * ALIGN
    C2: tl.constexpr = ACTIVE
    C1: tl.constexpr = C - C2
    pixel_tiles = tl.cdiv(P, BLOCK_COLUMNS)
    step = PARTS if PARTS > 0 else pixel_tiles
    b = (tl.program_id(0) // step).to(tl.int64)
    k = tl.program_id(0) % step
    a_ptr += b * stride_ab * ALIGN
    if dy_ptr is not None:
        dy_ptr = sample(dy_ptr, b, stride_dyb, C, P, ALIGN)
        x_ptr += b * stride_xb * ALIGN
    tiles = pixel_tiles * tl.cdiv(C2, BLOCK_CHANNELS)
    sum_s = tl.zeros((BLOCK_CHANNELS, BLOCK_COLUMNS), ACC_DTYPE)
    sum_h = tl.zeros((BLOCK_CHANNELS, BLOCK_COLUMNS), ACC_DTYPE)
    tile = k
    while tile < tiles:
        c = (tile // pixel_tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        p = (tile % pixel_tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        offs = c[:, None] * P + p
        mask = (c < C2)[:, None] & (p < P)
        a_s = load(a_ptr + offs, mask, ACC_DTYPE)
        s = CLAMP * clamped(INPUT_SCALE * a_s, FUNCTION, CLAMP)
        sum_s += s
        if dy_ptr is not None:
            offs_y = index(inv_ptr, C1 + c, c < C2)[:, None] * P + p
            offs_x = offs_y if UNPERMUTES_INPUT else C1 * P + offs
            sum_h += (
                load(dy_ptr + offs_y, mask, ACC_DTYPE)
                * load(x_ptr + offs_x, mask, ACC_DTYPE)
                * exp_of_factor(s, CLAMP)
            )
        tile += step
    if PARTS > 0:
        tl.store(sums_ptr + (b * PARTS + k), tl.sum(sum_s))
        if dy_ptr is not None:
            tl.store(sums_ptr + ((b + B) * PARTS + k), tl.sum(sum_h))
    else:
        p = k * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        tl.store(sums_ptr + (b * P + p), tl.sum(sum_s, axis=0), mask=p < P)
        if dy_ptr is not None:
            tl.store(sums_ptr + ((b + B) * P + p), tl.sum(sum_h, axis=0), mask=p < P)


def prepare_gin_sums(
    operands: Operands, stride_ab: int, stride_xb: int | None = None, stride_dyb: int | None = None
) -> Sums | None:
    """Prepare GIN's sums, per sample or per pixel, which run ahead of the main pass.

    Args:
        operands: The operands of the main pass.
        stride_ab: The stride of a between samples.
        stride_xb: The stride of x between samples; None without dy and x.
        stride_dyb: The stride of dy between samples; None without gaps between them.

    Returns:
        The launch, with pointers (a, dy, x, inv). Its sums are (1, B, parts), with dy and x
        (2, B, parts); per pixel P stands for parts. None if s keeps its mean: the coupling is not
        GIN, or has no active channel.
    """
    active, batch, pixels = operands.active_channels, operands.batch, operands.pixels
    if not operands.spec.gin or not active:
        return None
    itemsize = max(4, operands.a_dtype.itemsize)
    tiles = plan.make_plan(active, batch, pixels, itemsize, rows=None)
    is_per_pixel = operands.spec.mean_per_pixel and pixels > 1
    # The forward pass on rows reads one sum per sample.
    parts = 1 if operands.is_rows else plan.gin_parts(tiles, batch)
    programs = tiles.column_tiles if is_per_pixel else batch * parts
    values = values_of(
        operands, tiles, stride_ab=stride_ab, stride_xb=stride_xb, stride_dyb=stride_dyb
    ) | {"PARTS": 0 if is_per_pixel else parts}
    launch = Launch(_gin_sums_kernel, programs, tiles.warps, values)
    shape = (1 if stride_xb is None else 2, batch, pixels if is_per_pixel else parts)
    return Sums(launch, shape, operands.acc_dtype)


@triton.jit
def _logdet_kernel(
    part_ptr, g_ptr, logdet_ptr,
    B, PART_COUNT, P,
    C: tl.constexpr, SIGN: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_SAMPLES: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Compute logdet[b] = SIGN * (sum(part[b, :]) + P * sum(log(activation(g)))).

    A program computes BLOCK_SAMPLES samples. B is None if that is 1.

    Args:
        part_ptr: Input (B, PART_COUNT), contiguous: partial sums of s.
        g_ptr: Input (C,), the global scale before its activation; None for scale 1. For a chain C
            counts the channels of all blocks.
        logdet_ptr: Output (B,).
    """
    b = tl.program_id(0).to(tl.int64)
    if BLOCK_SAMPLES > 1:
        b = b * BLOCK_SAMPLES + tl.arange(0, BLOCK_SAMPLES)[:, None]
    exists = b < B if BLOCK_SAMPLES > 1 else True
    part_ptr += b * PART_COUNT
    sum_s = tl.zeros((BLOCK_SAMPLES, BLOCK_PARTS), ACC_DTYPE)
    start = 0
    while start < PART_COUNT:
        k = start + tl.arange(0, BLOCK_PARTS)[None, :]
        sum_s += load(part_ptr + k, (k < PART_COUNT) & exists, ACC_DTYPE)
        start += BLOCK_PARTS
    log_scale = tl.zeros((BLOCK_CHANNELS,), ACC_DTYPE)
    if g_ptr is not None:
        for first in range(0, C, BLOCK_CHANNELS):
            c = first + tl.arange(0, BLOCK_CHANNELS)
            g = load(g_ptr + c, c < C, ACC_DTYPE)
            log_scale += tl.where(c < C, log_scale_of(g, ACTIVATION), 0.0)
    if BLOCK_SAMPLES > 1:
        sum_s = tl.sum(sum_s, axis=1, keep_dims=True)
    else:
        sum_s = tl.sum(sum_s)
    tl.store(logdet_ptr + b, SIGN * (sum_s + P * tl.sum(log_scale)), mask=exists)


def prepare_log_det(operands: Operands, count: int, sign: float) -> Launch:
    """Prepare the launch that adds partial sums to the log-determinant.

    Args:
        operands: The operands of the main pass.
        count: Number of partial sums per sample that the main pass leaves.
        sign: 1.0, or -1.0 for the inverse.

    Returns:
        The launch, with pointers (partial sums (B, count), global_scale, log-determinant).
    """
    values = {
        "B": None,
        "PART_COUNT": count,
        "P": operands.pixels,
        "C": operands.channels,
        "SIGN": sign,
        "ACTIVATION": operands.activation,
        "BLOCK_SAMPLES": 1,
        "BLOCK_PARTS": 256,
        "BLOCK_CHANNELS": 256,
        "ACC_DTYPE": ACC_DTYPES[operands.acc_dtype],
    }
    return Launch(_logdet_kernel, operands.batch, 4, values)


def log_det_of(
    prepared: Prepared,
    is_aligned: bool,
    x: Tensor,
    global_scale: Tensor | None,
    sums: Tensor | None,
    partials: Tensor | None,
) -> Tensor:
    """Return the log-determinant (B,), in nats, from the sums that a pass has left.

    Args:
        prepared: What the pass was prepared with.
        is_aligned: Whether the pointers of the pass are aligned.
        x: A tensor with the pass's batch and device, (B, C, *S).
        global_scale: The global scale before its activation, C elements; None for a side.
        sums: GIN's sums, or None.
        partials: The partial sums of the pass; None for GIN.
    """
    batch, dtype = x.shape[0], prepared.acc_dtype
    if partials is not None:
        if prepared.finish is None:
            return partials
        log_det = torch.empty(batch, dtype=dtype, device=x.device)
        prepared.finish(is_aligned, partials, global_scale, log_det)
        return log_det
    if sums is None:
        return torch.zeros(batch, dtype=dtype, device=x.device)
    return sums[0].sum(1).mul_(0.0)  # zero, or NaN for samples whose sum of s is NaN


def log_det_of_chain(sums: Sequence[Tensor], couplings: Sequence[Coupling], pixels: int) -> Tensor:
    """Return the log-determinant of consecutive blocks together, (B,), in nats.

    See :class:`~fastflow_kernels.engines.ChainEngine`.
    """
    scales = [coupling.parameters[0] for coupling in couplings]
    activation = couplings[0].spec.activation
    return _finish_chain(torch.cat(tuple(sums), 1), torch.cat(scales), activation, pixels)


@on_its_device
def _finish_chain(
    partials: Tensor, global_scale: Tensor, activation: str | None, pixels: int
) -> Tensor:
    """Return the log-determinant from the sums of s, (B, parts), and the scales of all blocks."""
    dtypes = (partials.dtype, global_scale.dtype)
    sizes = (*partials.shape, global_scale.numel(), pixels)
    prepared = _prepare_chain(dtypes, sizes, activation, partials.get_device())
    log_det = torch.empty(len(partials), dtype=partials.dtype, device=partials.device)
    prepared.launch(aligned(partials, global_scale), partials, global_scale, log_det)
    return log_det


@lru_cache(maxsize=1024)
def _prepare_chain(
    dtypes: tuple[torch.dtype, torch.dtype],
    sizes: tuple[int, ...],
    activation: str | None,
    device: int,
) -> Prepared:
    """Prepare the launch of a chain's log-determinant, with the pointers of prepare_log_det.

    Args:
        dtypes: The dtypes of the sums and of the scales.
        sizes: Samples, sums of a sample, channels of all blocks, and pixels.
        activation: The activation of the scales.
        device: The index of the GPU.
    """
    batch, count, channels, pixels = sizes
    block_samples, block_parts = plan.tile_of_sums(batch, count)
    values = {
        "B": None if block_samples == 1 else batch,
        "PART_COUNT": count,
        "P": pixels,
        "C": channels,
        "SIGN": 1.0,
        "ACTIVATION": activation,
        "BLOCK_SAMPLES": block_samples,
        "BLOCK_PARTS": block_parts,
        "BLOCK_CHANNELS": 256,
        "ACC_DTYPE": ACC_DTYPES[dtypes[0]],
    }
    launch = Launch(_logdet_kernel, -(-batch // block_samples), 4, values)
    return Prepared(dtypes[0], dtypes[0], launch)


@triton.jit
def _params_bwd_kernel(
    part_ptr, dlogdet_ptr, g_ptr, dg_ptr, doffset_ptr,
    GROUPS, B, P, stride_l,
    C: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of global_scale and global_offset.

    With the sums over the groups::

        doffset = sum(part[0])
        dg      = (sum(part[1]) + P * sum(dlogdet) / scale) * activation'(g)

    A program computes BLOCK_CHANNELS channels.

    Args:
        part_ptr: Input (2, GROUPS, C), contiguous; (1, GROUPS, C) for ACTIVATION = None (GIN).
        dlogdet_ptr: Input (B,), stride_l between samples, or None.
        g_ptr: Input (C,), the global scale before its activation.
        dg_ptr: Output (C,), or None for ACTIVATION = None.
        doffset_ptr: Output (C,).
    """
    BLOCK_SAMPLES: tl.constexpr = BLOCK_GROUPS * BLOCK_CHANNELS
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = c < C
    doffset = tl.zeros((BLOCK_GROUPS, BLOCK_CHANNELS), ACC_DTYPE)
    dscale = tl.zeros((BLOCK_GROUPS, BLOCK_CHANNELS), ACC_DTYPE)
    start = 0
    while start < GROUPS:
        k = start + tl.arange(0, BLOCK_GROUPS)[:, None]
        mask = (k < GROUPS) & is_channel[None, :]
        doffset += load(part_ptr + (k.to(tl.int64) * C + c[None, :]), mask, ACC_DTYPE)
        if ACTIVATION is not None:
            offs_scale = (GROUPS + k).to(tl.int64) * C + c[None, :]
            dscale += load(part_ptr + offs_scale, mask, ACC_DTYPE)
        start += BLOCK_GROUPS
    tl.store(doffset_ptr + c, tl.sum(doffset, axis=0), mask=is_channel)
    if ACTIVATION is not None:
        g = load(g_ptr + c, is_channel, ACC_DTYPE)
        scale = scale_of(g, ACTIVATION)
        sum_dscale = tl.sum(dscale, axis=0)
        if dlogdet_ptr is not None:
            # Sum in float64, because a rounding error here is the same in every channel.
            dlogdet = tl.zeros((BLOCK_SAMPLES,), tl.float64)
            first = tl.full((), 0, tl.int64)  # for offsets beyond 2^31
            while first < B:
                b = first + tl.arange(0, BLOCK_SAMPLES)
                dlogdet += load(dlogdet_ptr + b * stride_l, b < B, tl.float64)
                first += BLOCK_SAMPLES
            sum_dscale += (P * tl.sum(dlogdet)).to(ACC_DTYPE) / scale
        tl.store(dg_ptr + c, sum_dscale * scale_slope(g, scale, ACTIVATION), mask=is_channel)


def prepare_params(operands: Operands, groups: int, stride_l: int) -> Launch:
    """Prepare the launch that adds partial sums to the gradients of the parameters.

    Args:
        operands: The operands of the backward pass.
        groups: Number of partial sums per channel that the backward pass leaves.
        stride_l: The stride of the log-determinant's gradient.

    Returns:
        The launch, with pointers (partial sums (1 or 2, groups, C), gradient of the
        log-determinant, global_scale, gradient of global_scale, gradient of global_offset).
    """
    rows = operands.rows_per_sample
    values = {
        "GROUPS": groups,
        "B": operands.batch // rows,
        "P": operands.pixels * rows,
        "stride_l": stride_l,
        "C": operands.channels,
        "ACTIVATION": operands.activation,
        "BLOCK_GROUPS": plan.SUMS_BLOCK_GROUPS,
        "BLOCK_CHANNELS": plan.SUMS_BLOCK_CHANNELS,
        "ACC_DTYPE": ACC_DTYPES[operands.acc_dtype],
    }
    programs = -(-operands.channels // plan.SUMS_BLOCK_CHANNELS)
    return Launch(_params_bwd_kernel, programs, plan.SUMS_WARPS, values)
