"""Which inputs the kernels take, and how their work is divided into tiles. It imports no Triton.

A kernel works on tiles of channels by columns. There are two kinds of columns:

- Planes: a column is one pixel of one sample.
- Rows: a column is a whole sample, which has a single pixel.

In both cases the address of a value is ``sample * stride + channel * P + pixel``.

The width of an access in bits depends on the class of the shape (see :func:`alignment`). The table
holds for sm_90 and is tested by tests/test_kernels_compiled.py:

======================================== ============================ ============ ============
class                                    tensors                      float32      bfloat16
======================================== ============================ ============ ============
planes: 8 divides P and the strides      all, permuted channels too   128          128
planes: 4 divides P and the strides      all                          128          64
planes: 2 divides P and the strides      all                          64           32
planes: 1 divides P and the strides      all                          32           16
rows: the same with C instead of P       in the order of channels     up to 128    up to 128
rows                                     permuted: x and a forward,   32           16
                                         dy backward, y in reverse
======================================== ============================ ============ ============

- Narrower accesses move the same number of bytes.
- A channels-last input is rows, one for each pixel.
- For pointers that are not aligned to 16 bytes there is another binary, which accesses single
  values.
- Each sample is contiguous (:func:`~fastflow_kernels.layouts.is_packed`). There may be gaps
  between samples.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The most elements of a sample, and the most samples with pixels. Both are counted in 32 bits.
MAX_SAMPLE = 2**31 - 1

# bench/TUNING.md has the measurements behind the constants below.

# Planes: bytes of one tensor in a tile. Each of 128 threads holds 8 float32 or 16 bfloat16 values,
# two 128-bit accesses.
TILE_BYTES = 4096
# Rows: bytes of a row in the accumulator's dtype. A row is one tile and must fit in the registers
# of 16 warps.
MAX_ROW_BYTES = 8192
# Planes: programs that keep a GPU busy, two for each multiprocessor of an H100.
BUSY = 256
# The most programs that share the sums of one sample.
GIN_PARTS = 64
# Columns from which a program's 3 values a column, with sums 5, outweigh its partial sums and its
# constants per channel (index, scale, offset: up to 16 bytes).
COLUMNS = 32
COLUMNS_WITH_SUMS = 64
# The sums of the parameters' gradients wait for memory, not for arithmetic. Few channels per
# program make many programs; 8 float32 values fill a 32-byte sector.
SUMS_BLOCK_CHANNELS = 8
# All groups arrive in two turns, because make_plan makes at most 512 where it can.
SUMS_BLOCK_GROUPS = 256
SUMS_WARPS = 8


class RowTiles(NamedTuple):
    """How rows are tiled in one kind of pass.

    Constants per channel stay in registers. In the backward pass sums per channel do so too.

    Attributes:
        thread_values: Values of one tensor's tile that a thread holds, for a float32 accumulator.
            A thread holds more if 16 warps do not suffice, and 1 for a float64 accumulator.
        busy: Programs that keep a GPU busy. With more work than that, programs loop.
    """

    thread_values: int
    busy: int


# A quarter of the values in twice the programs: 0.58 to 0.93 times the time backward, 0.94 to 1.52
# forward (H200, `python -m bench.gpu.tune --only rows,forward-rows`, bench/TUNING.md).
FORWARD_ROWS = RowTiles(thread_values=4, busy=256)
BACKWARD_ROWS = RowTiles(thread_values=1, busy=512)


class Plan(NamedTuple):
    """How the work of one launch is divided.

    Attributes:
        is_rows: Whether a column is a sample rather than a pixel.
        block_channels: Channels in a tile, a power of two.
        block_columns: Columns in a tile, a power of two.
        channel_tiles: Tiles along the channels.
        column_tiles: Tiles along the columns of all samples.
        tiles_per_program: Tiles along the columns that one program walks.
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


def wants_halves(x: Tensor) -> bool:
    """Return whether the activations of a chain should travel in halves.

    A convolution copies the passive half of several samples, because it is a strided view. A linear
    layer takes it as it is.
    """
    return x.dim() > 2 and len(x) > 1 and x.shape[2:].numel() > 1


def why_unsupported(shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Return why the kernels do not take a tensor, in words, or None if they take it.

    The layout does not matter, because the caller makes a tensor contiguous unless its samples are.

    Args:
        shape: The shape of the block's input or output, (B, C, *S).
        dtype: Its dtype.
    """
    if dtype not in DTYPES:
        return f"dtype {dtype} has no kernel; it must be float32, bfloat16, float16 or float64"
    if len(shape) < 2:
        return f"{len(shape)} dimensions; the kernels need at least two, (batch, channels)"
    if math.prod(shape) <= MAX_SAMPLE:
        return None
    sample = math.prod(shape[1:])
    if sample > MAX_SAMPLE:
        return f"a sample of {sample} elements; offsets inside a sample are 32-bit"
    if shape[0] > MAX_SAMPLE and math.prod(shape[2:]) > 1:
        return f"a batch of {shape[0]} samples with pixels; tiles are counted in 32 bits"
    return None


def alignment(*sizes: int) -> int:
    """Return the largest power of two up to 16 that divides all sizes.

    The compiler proves that an access is aligned only from what it knows about the arguments. Of an
    integer it only learns whether 16 divides it. So lengths are passed divided by this factor,
    which is a constant of the kernel.
    """
    merged = 16
    for size in sizes:
        merged |= size
    return merged & -merged


@lru_cache(maxsize=1024)
def make_plan(
    channels: int, batch: int, pixels: int, itemsize: int, rows: RowTiles | None, columns: int = 1
) -> Plan:
    """Divide channels by columns into tiles.

    Args:
        channels: Channels, or channel pairs, that the kernel walks.
        batch: Number of samples.
        pixels: Pixels of a sample.
        itemsize: Bytes of the widest element.
        rows: How rows are tiled, if a column is a sample. A tile then holds all channels. None for
            planes.
        columns: Columns that one program should see, so that its cost per channel is small. It
            loops over that many if enough work remains for the other multiprocessors.
    """
    if rows:
        thread_values = 1 if itemsize == 8 else rows.thread_values
        tile_size = 8 * 32 * thread_values
        block_channels = _power_of_two(channels)
        block_columns = max(1, min(tile_size // block_channels, _power_of_two(batch)))
        column_tiles = -(-batch // block_columns)
    else:
        thread_values = TILE_BYTES // itemsize // 128
        tile_size = 128 * thread_values
        block_columns = _choose_pixel_block(pixels, tile_size)
        block_channels = min(_power_of_two(channels), tile_size // block_columns)
        column_tiles = batch * -(-pixels // block_columns)
    channel_tiles = -(-channels // block_channels)
    busy = rows.busy if rows else BUSY
    tiles_per_program = 1
    if columns > 1:
        # The final sum walks the groups one after the other, so there should be at most 512.
        while (
            tiles_per_program < 64
            and (
                tiles_per_program * block_columns < columns
                or column_tiles > 512 * tiles_per_program
            )
            and column_tiles * channel_tiles >= 2 * busy * tiles_per_program
        ):
            tiles_per_program *= 2
    return Plan(
        is_rows=rows is not None,
        block_channels=block_channels,
        block_columns=block_columns,
        channel_tiles=channel_tiles,
        column_tiles=column_tiles,
        tiles_per_program=tiles_per_program,
        groups=-(-column_tiles // tiles_per_program),
        warps=max(1, min(16, block_channels * block_columns // (32 * thread_values))),
    )


def columns_are_samples(channels: int, pixels: int, itemsize: int) -> bool:
    """Return whether whole samples are the columns ("rows").

    Args:
        channels: Channels of the tensor.
        pixels: Pixels of a sample.
        itemsize: Bytes of an element of the accumulator's dtype.
    """
    return pixels == 1 and channels * itemsize <= MAX_ROW_BYTES


def gin_parts(plan: Plan, batch: int) -> int:
    """Return how many programs share the sums of one sample, a power of two.

    Args:
        plan: How the samples are divided into tiles.
        batch: Number of samples.
    """
    return min(GIN_PARTS, _power_of_two(plan.channel_tiles * plan.column_tiles // batch))


def tile_of_sums(batch: int, count: int) -> tuple[int, int]:
    """Return how many samples a program finishes, and how many of their sums it reads at once.

    Both are powers of two.

    Args:
        batch: Number of samples.
        count: Number of partial sums of a sample.
    """
    block_parts = min(256, _power_of_two(count))
    return min(256 // block_parts, _power_of_two(batch)), block_parts


def _choose_pixel_block(pixels: int, tile_size: int) -> int:
    """Return the widest block of pixels among those that need the least padding.

    A block has at least 64 pixels, if the sample has that many.
    """
    best = min(_power_of_two(pixels), tile_size)
    block = best
    while block > 64:
        block //= 2
        if -(-pixels // block) * block < -(-pixels // best) * best:
            best = block
    return best


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
