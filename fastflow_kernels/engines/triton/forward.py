"""The forward pass on a GPU: coupling, global affine and permutation in one pass over memory.

Notation of all kernels, in addition to that of coupling.py:

- x is (B, C, *S), with P = prod(S) pixels, C1 = C - C//2 passive and C2 = C//2 active channels.
  One side of a coupling block has C1 = 0, no scale, no offset and no permutation.
- a is (B, 2*C2, *S), with the halves (a_s, a_t).
- y[:, j] = v[:, perm[j]] and inv = argsort(perm).
- Indices: b is a sample, p a pixel, c a channel, j a permuted channel.

Constants of all kernels:

- C, FUNCTION (f), CLAMP, INPUT_SCALE, SHIFT_SCALE: from the coupling.
- ACTIVE: the number of active channels, C2.
- ACTIVATION: the activation of the global scale; None for GIN and for a side.
- UNPERMUTES_INPUT: whether the permutation is inverted ahead of the coupling, so that x is read
  through ``inv`` too.
- ROWS: whether a column is a whole sample of one pixel (see plan.py).
- PARTS: number of partial sums per sample; 0 for a sum per pixel.
- ALIGN: the divisor of P and of the strides (see ``alignment`` in plan.py).
- BLOCK_CHANNELS, BLOCK_COLUMNS: the size of a tile.
- TILES_PER_PROGRAM: number of tiles that a program walks along the columns.
- ACC_DTYPE: the dtype of the computation.

They are constexpr. A Python float argument would be float32 on the device and spoil float64.
The stride of an output or of dy is None if there are no gaps between its samples.

Every kernel walks channel pairs (c, C1 + c) and finds their permuted channels through ``inv``. The
forward on rows is the exception: it gathers values through ``perm``, because scattered stores of
single values would be slow there.
"""

from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastflow_kernels.coupling import Coupling, Halves
from fastflow_kernels.engines.triton import plan
from fastflow_kernels.engines.triton.launch import (
    Launch,
    Operands,
    Prepared,
    aligned,
    dtype_of,
    empty_of,
    empty_partials,
    joint,
    key_in_chain,
    key_of,
    on_its_device,
    pointers_of,
    values_of,
)
from fastflow_kernels.engines.triton.math import clamped, exp_of_factor
from fastflow_kernels.engines.triton.sums import log_det_of, prepare_gin_sums, prepare_log_det
from fastflow_kernels.engines.triton.tiles import (
    columns,
    global_offset,
    halves,
    in_halves,
    index,
    load,
    log_scale_sum,
    scale,
    total,
)


@triton.jit
def _coupling_fwd_kernel(
    x_ptr, a_ptr, g_ptr, offset_ptr, inv_ptr, sums_ptr, y_ptr, part_ptr, x2_ptr, y2_ptr,
    B, P, stride_xb, stride_ab, stride_yb, stride_x2b, stride_y2b,
    C: tl.constexpr, ACTIVE: tl.constexpr, FUNCTION: tl.constexpr, CLAMP: tl.constexpr,
    INPUT_SCALE: tl.constexpr, SHIFT_SCALE: tl.constexpr, ACTIVATION: tl.constexpr,
    UNPERMUTES_INPUT: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Compute y, and partial sums of s for the log-determinant.

    With t = f(input_scale * a_s)::

        s         = clamp * t                            minus its mean (GIN)
        u         = cat(x1, x2 * exp(s) + shift_scale * a_t)
        y[:, inv] = u * scale + offset

    With UNPERMUTES_INPUT x1 and x2 are those of x[:, inv]: channel j of y comes from channel j of
    x.

    A program computes one tile of channel pairs by pixels of one sample. P and the strides arrive
    divided by ALIGN.

    Args:
        x_ptr: Input (B, C, P), stride_xb between samples.
        a_ptr: Input (B, 2*C2, P), stride_ab between samples.
        g_ptr: Input (C,), the global scale before its activation; None for a side.
        offset_ptr: Input (C,); None for a side.
        inv_ptr: Input (C,), int64, or None for the identity.
        sums_ptr: Input (B, PARTS) or, per pixel, (B, P): sums of s for its mean (GIN), or None.
        y_ptr: Output (B, C, P), stride_yb between samples.
        part_ptr: Output (B, programs per sample), sums of s, or None.
        x2_ptr, y2_ptr: The active halves of x and y, (B, C2, P), stride_x2b and stride_y2b between
            samples, or None. With them x_ptr and y_ptr are the passive halves.
    """
    P = P * ALIGN
    C2: tl.constexpr = ACTIVE
    C1: tl.constexpr = C - C2
    CHANNEL_TILES: tl.constexpr = (max(C1, C2) + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    program = tl.program_id(0)
    b, p, mask_columns = columns(program // CHANNEL_TILES, B, P, BLOCK_COLUMNS, False)
    c = (program % CHANNEL_TILES) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_passive = c < C1
    is_active = c < C2
    mask_passive = is_passive[:, None] & mask_columns
    mask_active = is_active[:, None] & mask_columns
    a_ptr += b * stride_ab * ALIGN
    x_ptrs = halves(x_ptr, x2_ptr, b, stride_xb, stride_x2b, C, C1, P, ALIGN)
    y_ptrs = halves(y_ptr, y2_ptr, b, stride_yb, stride_y2b, C, C1, P, ALIGN)
    offs = c[:, None] * P + p
    j1 = index(inv_ptr, c, is_passive)[:, None]
    j2 = index(inv_ptr, C1 + c, is_active)[:, None]
    offs_y1 = j1 * P + p
    offs_y2 = j2 * P + p

    a_s = load(a_ptr + offs, mask_active, ACC_DTYPE)
    a_t = load(a_ptr + C2 * P + offs, mask_active, ACC_DTYPE)
    offs_x2 = offs_y2 if UNPERMUTES_INPUT else C1 * P + offs
    x2 = load(x_ptrs[1] + offs_x2, mask_active, ACC_DTYPE)
    if C1 > 0:
        x1 = load(x_ptrs[0] + (offs_y1 if UNPERMUTES_INPUT else offs), mask_passive, ACC_DTYPE)
        y1 = (
            x1 * scale(g_ptr, c, is_passive, ACTIVATION, ACC_DTYPE)[:, None]
            + global_offset(offset_ptr, c, is_passive, ACC_DTYPE)[:, None]
        )
        tl.store(in_halves(y_ptrs, y2_ptr, j1, C1, offs_y1), y1, mask=mask_passive)
    t = clamped(INPUT_SCALE * a_s, FUNCTION, CLAMP)  # 0 where masked
    s = CLAMP * t
    if part_ptr is not None:
        tl.store(part_ptr + program, CLAMP * tl.sum(t))
    if sums_ptr is not None:
        s -= total(sums_ptr, b, b < B, p, P, PARTS) / (C2 * P if PARTS > 0 else C2)
    u2 = x2 * exp_of_factor(s, CLAMP) + SHIFT_SCALE * a_t
    y2 = (
        u2 * scale(g_ptr, C1 + c, is_active, ACTIVATION, ACC_DTYPE)[:, None]
        + global_offset(offset_ptr, C1 + c, is_active, ACC_DTYPE)[:, None]
    )
    tl.store(in_halves(y_ptrs, y2_ptr, j2, C1, offs_y2), y2, mask=mask_active)


@triton.jit
def _coupling_rows_fwd_kernel(
    x_ptr, a_ptr, g_ptr, offset_ptr, perm_ptr, sums_ptr, y_ptr, logdet_ptr, x2_ptr, y2_ptr,
    B, stride_xb, stride_ab, stride_yb, stride_x2b, stride_y2b,
    C: tl.constexpr, ACTIVE: tl.constexpr, FUNCTION: tl.constexpr, CLAMP: tl.constexpr,
    INPUT_SCALE: tl.constexpr, SHIFT_SCALE: tl.constexpr, ACTIVATION: tl.constexpr,
    UNPERMUTES_INPUT: tl.constexpr, ADDS_LOG_SCALE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TILES_PER_PROGRAM: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """Compute y and the log-determinant for one pixel, P = 1.

    With t = f(input_scale * a_s)::

        s      = clamp * t                            minus its mean (GIN)
        u      = cat(x1, x2 * exp(s) + shift_scale * a_t)
        y      = (u * scale + offset)[:, perm]
        logdet = sum(s) + sum(log(scale))             without log(scale) unless ADDS_LOG_SCALE

    The kernel gathers the input of each output channel through perm. With UNPERMUTES_INPUT channel
    j of y comes from channel j of x.

    A program computes TILES_PER_PROGRAM tiles of all channels by samples. The strides arrive
    divided by ALIGN.

    Args:
        x_ptr: Input (B, C), stride_xb between samples.
        a_ptr: Input (B, 2*C2), stride_ab between samples.
        g_ptr: Input (C,), the global scale before its activation; None for a side.
        offset_ptr: Input (C,); None for a side.
        perm_ptr: Input (C,), int64, or None for the identity.
        sums_ptr: Input (B,), the sum of s per sample for its mean (GIN), or None.
        y_ptr: Output (B, C), stride_yb between samples.
        logdet_ptr: Output (B,), or None.
        x2_ptr, y2_ptr: The active halves of x and y, (B, C2), stride_x2b and stride_y2b between
            samples, or None. With them x_ptr and y_ptr are the passive halves.
    """
    C2: tl.constexpr = ACTIVE
    C1: tl.constexpr = C - C2
    j = tl.arange(0, BLOCK_CHANNELS)
    is_channel = j < C
    c = index(perm_ptr, j, is_channel)
    is_active = is_channel & (c >= C1)
    factor = scale(g_ptr, c, is_channel, ACTIVATION, ACC_DTYPE)[:, None]
    offset = global_offset(offset_ptr, c, is_channel, ACC_DTYPE)[:, None]
    if ADDS_LOG_SCALE:
        log_scale = log_scale_sum(g_ptr, c, is_channel, ACTIVATION, ACC_DTYPE)
    for i in range(TILES_PER_PROGRAM):
        tile = tl.program_id(0) * TILES_PER_PROGRAM + i
        b, _, mask_columns = columns(tile, B, 1, BLOCK_COLUMNS, True)
        mask = is_channel[:, None] & mask_columns
        mask_active = is_active[:, None] & mask_columns
        offs_a = b * stride_ab * ALIGN + (c[:, None] - C1)
        a_s = load(a_ptr + offs_a, mask_active, ACC_DTYPE)
        a_t = load(a_ptr + offs_a + C2, mask_active, ACC_DTYPE)
        x_ptrs = halves(x_ptr, x2_ptr, b, stride_xb, stride_x2b, C, C1, 1, ALIGN)
        y_ptrs = halves(y_ptr, y2_ptr, b, stride_yb, stride_y2b, C, C1, 1, ALIGN)
        offs_x = (j if UNPERMUTES_INPUT else c)[:, None]
        x = load(in_halves(x_ptrs, x2_ptr, c[:, None], C1, offs_x), mask, ACC_DTYPE)
        t = clamped(INPUT_SCALE * a_s, FUNCTION, CLAMP)
        s = CLAMP * t  # 0 for passive channels, so that u = x there
        if logdet_ptr is not None:
            log_det = CLAMP * tl.sum(t, axis=0, keep_dims=True)
            if ADDS_LOG_SCALE:
                log_det += log_scale
            tl.store(logdet_ptr + b, log_det, mask=mask_columns)
        if sums_ptr is not None:
            s = tl.where(mask_active, s - total(sums_ptr, b, b < B, 0, 1, 1) / C2, 0.0)
        y = (x * exp_of_factor(s, CLAMP) + SHIFT_SCALE * a_t) * factor + offset
        tl.store(in_halves(y_ptrs, y2_ptr, j[:, None], C1, j[:, None]), y, mask=mask)


# In the order of Operands.strides. Those of the active halves are left out but in a chain.
_STRIDES = ("stride_xb", "stride_ab", "stride_yb", "stride_x2b", "stride_y2b")


@lru_cache(maxsize=1024)
def _prepare(*key: Any) -> Prepared:
    """Prepare the forward pass for the operands of a key: see :func:`key_of`."""
    operands = Operands(*key)
    dtype, acc_dtype, pixels = operands.dtype, operands.acc_dtype, operands.pixels
    strides = dict(zip_longest(_STRIDES, operands.strides))
    is_in_chain = len(operands.strides) == len(_STRIDES)
    no_halves = {} if is_in_chain else {"x2_ptr": None, "y2_ptr": None}
    gin_sums = prepare_gin_sums(operands, strides["stride_ab"])
    has_log_det = not operands.spec.gin
    if operands.is_rows:
        tiles = operands.plan(operands.channels, dtype.itemsize, plan.FORWARD_ROWS, plan.COLUMNS)
        values = values_of(operands, tiles, **strides) | no_halves
        values["ADDS_LOG_SCALE"] = has_log_det and not is_in_chain
        launch = Launch(_coupling_rows_fwd_kernel, tiles.programs, tiles.warps, values)
        partials = (operands.batch,) if has_log_det else None
        return Prepared(dtype, acc_dtype, launch, gin_sums, partials)
    # The default, one column a program at least: this kernel has no loop over tiles.
    tiles = plan.make_plan(
        operands.channel_pairs, operands.batch, pixels, dtype.itemsize, rows=None
    )
    values = values_of(operands, tiles, **strides) | no_halves
    values["PARTS"] = 1 if gin_sums is None else gin_sums.launch.values["PARTS"]
    launch = Launch(_coupling_fwd_kernel, tiles.programs, tiles.warps, values)
    if not has_log_det:
        return Prepared(dtype, acc_dtype, launch, gin_sums)
    count = tiles.programs // operands.batch
    finish = prepare_log_det(operands, count, sign=1.0)
    return Prepared(dtype, acc_dtype, launch, None, (operands.batch, count), finish)


@on_its_device
def forward(
    x: Tensor, a: Tensor, coupling: Coupling, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return y and the log-determinant.

    See :class:`~fastflow_kernels.engines.Engine`. A new y is contiguous.
    """
    a = joint(a, coupling)
    dtypes = (x.dtype, None if y is None else y.dtype, a.dtype)
    stride_yb = None if y is None or y.is_contiguous() else y.stride(0)
    prepared = _prepare(*key_of(x, coupling, dtypes, (x.stride(0), a.stride(0), stride_yb)))
    g, offset = coupling.global_scale, coupling.global_offset
    is_rows = prepared.launch.kernel is _coupling_rows_fwd_kernel
    channel_index = coupling.perm if is_rows else coupling.inv
    is_aligned = aligned(x, a, g, offset, channel_index, y)
    y = empty_of(x, prepared.dtype) if y is None else y
    sums = None if prepared.gin_sums is None else prepared.gin_sums(is_aligned, a, None, None, None)
    partials = empty_partials(prepared, x.device)
    prepared.launch(is_aligned, x, a, g, offset, channel_index, sums, y, partials)
    return y, log_det_of(prepared, is_aligned, x, g, sums, partials)


@partial(on_its_device, position=1)
def forward_in_chain(
    x: Tensor | Halves, a: Tensor, coupling: Coupling, y: Tensor | Halves
) -> Tensor:
    """Write y, and return sums of s, (B, parts).

    See :class:`~fastflow_kernels.engines.ChainEngine`.
    """
    x1, x2, stride_xb, stride_x2b = pointers_of(x)
    y1, y2, stride_yb, stride_y2b = pointers_of(y)
    dtypes = (x1.dtype, dtype_of(x2), y1.dtype, dtype_of(y2), a.dtype)
    strides = (stride_xb, a.stride(0), stride_yb, stride_x2b, stride_y2b)
    prepared = _prepare(*key_in_chain(x, coupling, dtypes, strides))
    g, offset = coupling.parameters
    is_rows = prepared.launch.kernel is _coupling_rows_fwd_kernel
    channel_index = coupling.perm if is_rows else coupling.inv
    is_aligned = aligned(x1, x2, a, g, offset, channel_index, y1, y2)
    sums = empty_partials(prepared, a.device)
    assert sums is not None  # not GIN
    prepared.launch(is_aligned, x1, a, g, offset, channel_index, None, y1, sums, x2, y2)
    return sums.view(len(a), -1)
