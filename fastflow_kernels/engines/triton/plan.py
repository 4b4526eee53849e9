"""Which inputs the kernels take, and how their work is cut into tiles. Imports no Triton.

A kernel works on tiles of channels by columns. A column is one pixel of one sample ("planes": the
input has pixels) or a whole sample ("rows": it has a single one). Either way the address of a value
is ``sample * stride + channel * P + pixel``.

How many bits an access takes follows from the class of the shape (:func:`alignment`; compiled for
sm_90, tests/test_kernels_compiled.py):

======================================== ============================ ============ ============
class                                    tensors                      float32      bfloat16
======================================== ============================ ============ ============
planes: 8 divides P and the strides      all, permuted channels too   128          128
planes: 4 does                           all                          128          64
planes: 2 does                           all                          64           32
planes: 1 does                           all                          32           16
rows: the same of C and the strides      in the order of channels     up to 128    up to 128
rows                                     permuted: x and a forward,   32           16
                                         dy backward, y in reverse
======================================== ============================ ============ ============

A channels-last input is rows, one for each pixel. A pointer that is not aligned to 16 bytes gets a
binary of its own, with single values. Narrower accesses move the same bytes. The values of a sample
lie together (:func:`~fastflow_kernels.layouts.is_packed`); samples may lie apart.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_SAMPLE = 2**31 - 1  # elements of a sample, and samples with pixels: both are counted in 32 bits
# The constants' measurements: bench/TUNING.md.
# planes, of one tensor: 8 float32 or 16 bfloat16 values for each of 128 threads, two 128-bit
# accesses
TILE_BYTES = 4096
# in the accumulator: a row is one tile and must fit in the registers of 16 warps
MAX_ROW_BYTES = 8192
BUSY = 256  # programs that keep a GPU busy with planes: two for each multiprocessor of an H100
GIN_PARTS = 64  # most programs that share the sums of one sample
# A program's channel constants (index, scale, offset: up to 16 bytes a channel) and partial sums
# are small against 3 and 5 values a column from these many columns on.
COLUMNS = 32
COLUMNS_WITH_SUMS = 64
# The sums of the parameters' gradients wait for memory, not for arithmetic. So a program takes few
# channels, for many programs, yet a 32-byte sector of float32; and so many groups at a time that
# all of them (make_plan makes 512 at most, where it can) arrive in two turns.
SUMS_BLOCK_CHANNELS = 8
SUMS_BLOCK_GROUPS = 256
SUMS_WARPS = 8


class RowTiles(NamedTuple):
    """How rows are cut in one kind of pass.

    Attributes:
        thread_values: Values of a tile that a thread holds, of one tensor, where the accumulator is
            float32; more where 16 warps do not suffice. 1 where it is float64.
        busy: Programs that keep a GPU busy; with more work than that they loop.
    """

    thread_values: int
    busy: int


# Measured on an H200, `python -m bench.gpu.tune --only rows,forward-rows` (bench/TUNING.md).
# Channel constants live in registers, and in the backward pass sums do too. There a quarter of the
# values in twice the programs takes 0.58 to 0.93 of the time; forward 0.94 to 1.52 of it.
FORWARD_ROWS = RowTiles(thread_values=4, busy=256)
BACKWARD_ROWS = RowTiles(thread_values=1, busy=512)


class Plan(NamedTuple):
    """How one launch is cut.

    Attributes:
        is_rows: Whether a column is a sample rather than a pixel.
        block_channels: Channels in a tile, a power of two.
        block_columns: Columns in a tile, a power of two.
        channel_tiles: Tiles along the channels.
        column_tiles: Tiles along the columns of all samples.
        tiles_per_program: Column tiles that one program walks.
        groups: Programs along the columns, ceil(column_tiles / tiles_per_program).
        warps: Warps of a program.
    """

    is_rows: bool
    block_channels: int
    block_columns: int
    channel_tiles: int
    column_tiles: int
    tiles_per_program: int
    groups: int
    warps: int

    @property
    def programs(self) -> int:
        return self.channel_tiles * self.groups


def why_unsupported(shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why the kernels do not take a tensor, in words; None if they do.

    The layout is no reason: whoever calls makes a tensor contiguous unless its samples are packed.

    Args:
        shape: (B, C, *S), of the block's input or output.
        dtype: Its dtype.
    """
    if dtype not in DTYPES:
        return f"dtype {dtype} has no kernel"
    if len(shape) < 2:
        return f"{len(shape)} dimensions; at least (batch, channels) are needed"
    if math.prod(shape) <= MAX_SAMPLE:
        return None
    sample = math.prod(shape[1:])
    if sample > MAX_SAMPLE:
        return f"a sample of {sample} elements; offsets inside a sample are 32-bit"
    if shape[0] > MAX_SAMPLE and math.prod(shape[2:]) > 1:
        return f"a batch of {shape[0]} samples with pixels; tiles are counted in 32 bits"
    return None


def alignment(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all sizes.

    The compiler proves an access aligned only from what it knows about its arguments. It is told of
    an integer that 16 divides, of nothing less; so lengths travel as quotients, and this factor is
    a constant of the kernel.
    """
    merged = 16
    for n in sizes:
        merged |= n
    return merged & -merged


@lru_cache(maxsize=1024)
def make_plan(
    channels: int, batch: int, pixels: int, itemsize: int, rows: RowTiles | None, columns: int = 1
) -> Plan:
    """Cut channels by columns into tiles.

    Args:
        channels: Channels, or channel pairs, that the kernel walks.
        batch: Samples.
        pixels: Pixels of a sample.
        itemsize: Bytes of the widest element.
        rows: How rows are cut, where a column is a sample; then a tile holds all channels. None for
            planes.
        columns: Columns that one program should see for its cost per channel to be small; it loops
            over that many if there is work enough for the other multiprocessors.
    """
    if rows:
        values = 1 if itemsize == 8 else rows.thread_values
        tile = 8 * 32 * values
        block_channels = _power_of_two(channels)
        block_columns = max(1, min(tile // block_channels, _power_of_two(batch)))
        column_tiles = -(-batch // block_columns)
    else:
        values = TILE_BYTES // itemsize // 128
        tile = 128 * values
        block_columns = _pixel_block(pixels, tile)
        block_channels = min(_power_of_two(channels), tile // block_columns)
        column_tiles = batch * -(-pixels // block_columns)
    channel_tiles = -(-channels // block_channels)
    busy = rows.busy if rows else BUSY
    walked = 1
    if columns > 1:
        # the finishing sum walks the groups one after the other: fewer than 1024 where that can be
        # had
        while (
            walked < 64
            and (walked * block_columns < columns or column_tiles > 512 * walked)
            and column_tiles * channel_tiles >= 2 * busy * walked
        ):
            walked *= 2
    return Plan(
        is_rows=rows is not None,
        block_channels=block_channels,
        block_columns=block_columns,
        channel_tiles=channel_tiles,
        column_tiles=column_tiles,
        tiles_per_program=walked,
        groups=-(-column_tiles // walked),
        warps=max(1, min(16, block_channels * block_columns // (32 * values))),
    )


def is_cut_by_rows(channels: int, pixels: int, itemsize: int) -> bool:
    """Whether whole samples are the columns, given the bytes of the accumulator."""
    return pixels == 1 and channels * itemsize <= MAX_ROW_BYTES


def gin_parts(plan: Plan, batch: int) -> int:
    """Programs (a power of two) that share one sample's sums, given the plan of its tiles."""
    return min(GIN_PARTS, _power_of_two(plan.channel_tiles * plan.column_tiles // batch))


def _pixel_block(pixels: int, tile: int) -> int:
    """The widest block of pixels among those that pad the row least; 64 pixels or more, where there
    are so many.
    """
    best = min(_power_of_two(pixels), tile)
    block = best
    while block > 64:
        block //= 2
        if -(-pixels // block) * block < -(-pixels // best) * best:
            best = block
    return best


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
