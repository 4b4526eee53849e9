"""Which inputs the kernels take and how the work is cut into tiles. Pure Python: shapes and dtypes
in, numbers out.

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
binary of its own, with single values. Samples with strides inside are not taken
(:func:`uncovered`): the caller makes them contiguous. Narrower accesses move the same bytes.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_SAMPLE = 2**31 - 1  # elements of a sample, and samples with pixels: both are counted in 32 bits
# planes, of one tensor: 8 float32 or 16 bfloat16 values for each of 128 threads, two 128-bit
# accesses
TILE_BYTES = 4096
# in the accumulator: a row is one tile and must fit in the registers of 16 warps
MAX_ROW_BYTES = 8192
BUSY = 256  # programs that keep a GPU busy with planes: two for each multiprocessor of an H100
GIN_PARTS = 64  # most programs that share the sums of one sample


class RowTiles(NamedTuple):
    """How rows are cut in one kind of pass.

    Attributes:
        thread_values: Values of a tile that a thread holds, of one tensor, where the accumulator is
            float32; more where 16 warps do not suffice. 1 where it is float64.
        busy: Programs that keep a GPU busy; with more work than that they loop.
    """

    thread_values: int
    busy: int


# Measured on an H200, `python -m bench.tune --only rows,forward-rows` (bench/TUNING.md). Channel
# constants live in registers, and in the backward pass sums do too. There a quarter of the values
# in twice the programs takes 0.58 to 0.93 of the time; forward 0.94 to 1.52 of it.
FORWARD_ROWS = RowTiles(thread_values=4, busy=256)
BACKWARD_ROWS = RowTiles(thread_values=1, busy=512)


class Plan(NamedTuple):
    """How one launch is cut.

    Attributes:
        rows: Whether a column is a sample rather than a pixel.
        block_c: Channels in a tile, a power of two.
        block_q: Columns in a tile, a power of two.
        tiles: Tiles along the channels.
        blocks: Tiles along the columns of all samples.
        loops: Column tiles that one program walks.
        groups: Programs along the columns, ceil(blocks / loops).
        warps: Warps of a program.
    """

    rows: bool
    block_c: int
    block_q: int
    tiles: int
    blocks: int
    loops: int
    groups: int
    warps: int

    @property
    def programs(self) -> int:
        return self.tiles * self.groups


def uncovered(x: Tensor, a: Tensor | None = None) -> str | None:
    """Why the kernels do not take these inputs, in words, or None if they do.

    Args:
        x: (B, C, *S), the block's input or output.
        a: (B, 2*C2, *S), the subnet's output.
    """
    for t in (x,) if a is None else (x, a):
        if t.is_contiguous() and t.numel() <= MAX_SAMPLE and t.dtype in DTYPES and t.dim() > 1:
            continue
        if t.dtype not in DTYPES:
            return f"dtype {t.dtype} has no kernel"
        if t.dim() < 2:
            return f"{t.dim()} dimensions; at least (batch, channels) are needed"
        if not packed(t):
            return f"each sample's block of shape {tuple(t.shape[1:])} must be contiguous; its strides are {t.stride()[1:]}"
        if t.numel() > MAX_SAMPLE and t.numel() // t.shape[0] > MAX_SAMPLE:
            return f"a sample of {t.numel() // t.shape[0]} elements; offsets inside a sample are 32-bit"
        if t.shape[0] > MAX_SAMPLE and t.shape[2:].numel() > 1:
            return f"a batch of {t.shape[0]} samples with pixels; tiles are counted in 32 bits"
    return None


def packed(t: Tensor) -> bool:
    """Whether each sample's block is contiguous; the stride between samples is free."""
    if t.is_contiguous():
        return True
    size = 1
    for n, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if n != 1 and stride != size:
            return False
        size *= n
    return True


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
def plan(
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
        block_c = _power_of_two(channels)
        block_q = max(1, min(tile // block_c, _power_of_two(batch)))
        blocks = -(-batch // block_q)
    else:
        values = TILE_BYTES // itemsize // 128
        tile = 128 * values
        block_q = _pixel_block(pixels, tile)
        block_c = min(_power_of_two(channels), tile // block_q)
        blocks = batch * -(-pixels // block_q)
    tiles = -(-channels // block_c)
    loops = 1
    if columns > 1:
        # the finishing sum walks the groups one after the other: fewer than 1024 where that can be
        # had
        busy = rows.busy if rows else BUSY
        while (
            loops < 64
            and (loops * block_q < columns or blocks > 512 * loops)
            and blocks * tiles >= 2 * busy * loops
        ):
            loops *= 2
    warps = max(1, min(16, block_c * block_q // (32 * values)))
    return Plan(
        rows is not None, block_c, block_q, tiles, blocks, loops, -(-blocks // loops), warps
    )


def by_rows(channels: int, pixels: int, itemsize: int) -> bool:
    """Whether whole samples are the columns, given the bytes of the accumulator."""
    return pixels == 1 and channels * itemsize <= MAX_ROW_BYTES


def gin_parts(plan: Plan, batch: int) -> int:
    """Programs (a power of two) that share one sample's sums, given the plan of its tiles."""
    return min(GIN_PARTS, _power_of_two(plan.tiles * plan.blocks // batch))


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
