"""The inverse on a GPU, in two passes: first the passive channels, then the active ones.

The subnet runs in between, because it needs the passive channels.

Notation: see :mod:`~fastflow_kernels.engines.triton.forward`.
"""

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastflow_kernels.coupling import Coupling
from fastflow_kernels.engines.triton import plan
from fastflow_kernels.engines.triton.launch import (
    Launch,
    Operands,
    Prepared,
    aligned,
    empty_of,
    empty_partials,
    joint,
    key_of,
    on_its_device,
    values_of,
)
from fastflow_kernels.engines.triton.math import clamped, exp_of_factor
from fastflow_kernels.engines.triton.sums import log_det_of, prepare_gin_sums, prepare_log_det
from fastflow_kernels.engines.triton.tiles import (
    columns,
    global_offset,
    index,
    inverse_scale,
    load,
    log_scale_sum,
    sample,
    scale,
    total,
)
from fastflow_kernels.layouts import packed
from fastflow_kernels.torch_private import versions_counted


@triton.jit
def _coupling_inv_passive_kernel(
    y_ptr, g_ptr, offset_ptr, inv_ptr, x_ptr,
    B, P, stride_yb,
    C: tl.constexpr, ACTIVATION: tl.constexpr, UNPERMUTES_INPUT: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Compute x[:, :C1] = (y[:, inv[:C1]] - offset) / scale, the passive channels of x.

    With UNPERMUTES_INPUT the results are the channels inv[:C1] of x.

    A program computes one tile of passive channels in TILES_PER_PROGRAM tiles of columns. P (unless
    ROWS) and the stride arrive divided by ALIGN.

    Args:
        y_ptr: Input (B, C, P), stride_yb between samples.
        g_ptr: Input (C,), the global scale before its activation.
        offset_ptr: Input (C,).
        inv_ptr: Input (C,), int64, or None for the identity.
        x_ptr: Output (B, C, P), contiguous.
    """
    if not ROWS:
        P = P * ALIGN
    C1: tl.constexpr = C - C // 2
    CHANNEL_TILES: tl.constexpr = (C1 + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    group = tl.program_id(0) // CHANNEL_TILES
    c = (tl.program_id(0) % CHANNEL_TILES) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_passive = c < C1
    j = index(inv_ptr, c, is_passive)[:, None]
    factor, boost = inverse_scale(scale(g_ptr, c, is_passive, ACTIVATION, ACC_DTYPE)[:, None])
    offset = load(offset_ptr + c, is_passive, ACC_DTYPE)[:, None]
    for i in range(TILES_PER_PROGRAM):
        b, p, mask_columns = columns(group * TILES_PER_PROGRAM + i, B, P, BLOCK_COLUMNS, ROWS)
        mask_passive = is_passive[:, None] & mask_columns
        offs_y = j * P + p
        offs_x = offs_y if UNPERMUTES_INPUT else c[:, None] * P + p
        y = load(y_ptr + b * stride_yb * ALIGN + offs_y, mask_passive, ACC_DTYPE)
        tl.store(x_ptr + b * C * P + offs_x, (y - offset) * factor * boost, mask=mask_passive)


@triton.jit
def _coupling_inv_active_kernel(
    y_ptr, a_ptr, g_ptr, offset_ptr, inv_ptr, sums_ptr, x_ptr, logdet_ptr,
    B, P, stride_yb, stride_ab, stride_xb,
    C: tl.constexpr, ACTIVE: tl.constexpr, FUNCTION: tl.constexpr, CLAMP: tl.constexpr,
    INPUT_SCALE: tl.constexpr, SHIFT_SCALE: tl.constexpr, ACTIVATION: tl.constexpr,
    UNPERMUTES_INPUT: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TILES_PER_PROGRAM: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Compute the active channels of x, and the log-determinant or partial sums for it.

    With t = f(input_scale * a_s)::

        s         = clamp * t                            minus its mean (GIN)
        x[:, C1:] = ((y[:, inv[C1:]] - offset) / scale - shift_scale * a_t) * exp(-s)

    With UNPERMUTES_INPUT the results are the channels inv[C1:] of x.

    A program computes one tile of active channels in TILES_PER_PROGRAM tiles of columns. P (unless
    ROWS) and the strides arrive divided by ALIGN.

    Args:
        y_ptr: Input (B, C, P), stride_yb between samples.
        a_ptr: Input (B, 2*C2, P), stride_ab between samples.
        g_ptr: Input (C,), the global scale before its activation; None for a side.
        offset_ptr: Input (C,); None for a side.
        inv_ptr: Input (C,), int64, or None for the identity.
        sums_ptr: Input (B, PARTS) or, per pixel, (B, P): sums of s for its mean (GIN), or None.
        x_ptr: Output (B, C, P), stride_xb between samples.
        logdet_ptr: Output or None. With ROWS it is (B,), the log-determinant
            -(sum(s) + sum(log(scale))). Otherwise it is (B, programs per sample), sums of s.
    """
    if not ROWS:
        P = P * ALIGN
    C2: tl.constexpr = ACTIVE
    C1: tl.constexpr = C - C2
    CHANNEL_TILES: tl.constexpr = max(1, (C2 + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS)
    group = tl.program_id(0) // CHANNEL_TILES
    channel_tile = tl.program_id(0) % CHANNEL_TILES
    c = channel_tile * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_active = c < C2
    j = index(inv_ptr, C1 + c, is_active)[:, None]
    factor, boost = inverse_scale(scale(g_ptr, C1 + c, is_active, ACTIVATION, ACC_DTYPE)[:, None])
    offset = global_offset(offset_ptr, C1 + c, is_active, ACC_DTYPE)[:, None]
    if ROWS and logdet_ptr is not None:
        # The sum runs over channels 0 to C2 - 1, then over the C1 channels from C2 on.
        log_scale = log_scale_sum(g_ptr, c, is_active, ACTIVATION, ACC_DTYPE) + log_scale_sum(
            g_ptr, C2 + c, c < C1, ACTIVATION, ACC_DTYPE
        )
    for i in range(TILES_PER_PROGRAM):
        tile = group * TILES_PER_PROGRAM + i
        b, p, mask_columns = columns(tile, B, P, BLOCK_COLUMNS, ROWS)
        mask_active = is_active[:, None] & mask_columns
        offs = c[:, None] * P + p
        a_tile_ptr = a_ptr + b * stride_ab * ALIGN + offs
        a_s = load(a_tile_ptr, mask_active, ACC_DTYPE)
        a_t = load(a_tile_ptr + C2 * P, mask_active, ACC_DTYPE)
        offs_y = j * P + p
        offs_x = offs_y if UNPERMUTES_INPUT else C1 * P + offs
        y = load(y_ptr + b * stride_yb * ALIGN + offs_y, mask_active, ACC_DTYPE)
        # The barrier keeps the loads together. ptxas 12.8 delayed half of them: 36.6 us, where the
        # bytes alone take 31.5 (H200, bfloat16, (32, 256, 64, 64); bench/TUNING.md).
        tl.debug_barrier()
        t = clamped(INPUT_SCALE * a_s, FUNCTION, CLAMP)  # 0 where masked
        s = CLAMP * t
        if logdet_ptr is not None:
            if ROWS:
                log_det = -(CLAMP * tl.sum(t, axis=0, keep_dims=True) + log_scale)
                tl.store(logdet_ptr + b, log_det, mask=mask_columns)
            else:
                sum_s = CLAMP * tl.sum(t)
                tl.store(logdet_ptr + (tile * CHANNEL_TILES + channel_tile), sum_s, mask=b < B)
        if sums_ptr is not None:
            s -= total(sums_ptr, b, b < B, p, P, PARTS) / (C2 * P if PARTS > 0 else C2)
        x = ((y - offset) * factor * boost - SHIFT_SCALE * a_t) * exp_of_factor(-s, CLAMP)
        tl.store(sample(x_ptr, b, stride_xb, C, P, ALIGN) + offs_x, x, mask=mask_active)


@lru_cache(maxsize=1024)
def _prepare_passive(*key: Any) -> Prepared:
    """Prepare the first pass for the operands of a key: see :func:`key_of`."""
    operands = Operands(*key)
    dtype = operands.dtype
    (stride_yb,) = operands.strides
    tiles = operands.plan(operands.channel_pairs, dtype.itemsize, plan.FORWARD_ROWS, plan.COLUMNS)
    values = values_of(operands, tiles, stride_yb=stride_yb)
    launch = Launch(_coupling_inv_passive_kernel, tiles.programs, tiles.warps, values)
    return Prepared(dtype, operands.acc_dtype, launch)


@on_its_device
def invert_passive(y: Tensor, coupling: Coupling) -> Tensor:
    """Return a new x whose passive channels are final.

    See :class:`~fastflow_kernels.engines.Engine`. x is contiguous.
    """
    g, offset, inv = coupling.global_scale, coupling.global_offset, coupling.inv
    y = packed(y)
    prepared = _prepare_passive(*key_of(y, coupling, (y.dtype,), (y.stride(0),)))
    with versions_counted():
        x = empty_of(y, prepared.dtype)
    is_aligned = aligned(y, g, offset, inv)
    prepared.launch(is_aligned, y, g, offset, inv, x)
    return x


@lru_cache(maxsize=1024)
def _prepare_active(*key: Any) -> Prepared:
    """Prepare the second pass for the operands of a key: see :func:`key_of`."""
    operands = Operands(*key)
    dtype, acc_dtype, batch = operands.dtype, operands.acc_dtype, operands.batch
    stride_yb, stride_ab, stride_xb = operands.strides
    strides = {"stride_yb": stride_yb, "stride_ab": stride_ab, "stride_xb": stride_xb}
    gin_sums = prepare_gin_sums(operands, stride_ab)
    # On rows a tile has as many channels as are passive, because it also sums their log(scale).
    tiled_channels = (
        operands.channel_pairs if operands.is_rows else max(1, operands.active_channels)
    )
    tiles = operands.plan(tiled_channels, dtype.itemsize, plan.FORWARD_ROWS, plan.COLUMNS)
    values = values_of(operands, tiles, **strides)
    values["PARTS"] = 1 if gin_sums is None else gin_sums.launch.values["PARTS"]
    launch = Launch(_coupling_inv_active_kernel, tiles.programs, tiles.warps, values)
    if operands.spec.gin:
        return Prepared(dtype, acc_dtype, launch, gin_sums)
    if operands.is_rows:
        return Prepared(dtype, acc_dtype, launch, None, (batch,))
    count = tiles.channel_tiles * tiles.column_tiles // batch
    finish = prepare_log_det(operands, count, sign=-1.0)
    return Prepared(dtype, acc_dtype, launch, None, (batch, count), finish)


@on_its_device
def invert_active(y: Tensor, x: Tensor, a: Tensor, coupling: Coupling) -> Tensor:
    """Write the active channels of x and return the inverse's log-determinant.

    See :class:`~fastflow_kernels.engines.Engine`.
    """
    prepared, is_aligned, sums, partials = write_active(y, x, a, coupling)
    return log_det_of(prepared, is_aligned, x, coupling.global_scale, sums, partials)


def write_active(
    y: Tensor, x: Tensor, a: Tensor, coupling: Coupling
) -> tuple[Prepared, bool, Tensor | None, Tensor | None]:
    """Write the active channels of x, without finishing the log-determinant.

    Returns:
        Arguments of :func:`~fastflow_kernels.engines.triton.sums.log_det_of`: the prepared
        launches, whether the pointers are aligned, GIN's sums and the partial sums.
    """
    g, offset, inv = coupling.global_scale, coupling.global_offset, coupling.inv
    y, a = packed(y), joint(a, coupling)
    strides = (y.stride(0), a.stride(0), None if x.is_contiguous() else x.stride(0))
    prepared = _prepare_active(*key_of(y, coupling, (y.dtype, x.dtype, a.dtype), strides))
    is_aligned = aligned(y, x, a, g, offset, inv)
    sums = None if prepared.gin_sums is None else prepared.gin_sums(is_aligned, a, None, None, None)
    partials = empty_partials(prepared, x.device)
    prepared.launch(is_aligned, y, a, g, offset, inv, sums, x, partials)
    return prepared, is_aligned, sums, partials
