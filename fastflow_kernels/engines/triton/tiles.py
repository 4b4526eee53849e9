"""Functions that the kernels share: where the values of a tile lie, and the constants of channels.

A tile has shape (BLOCK_CHANNELS, BLOCK_COLUMNS): channels down, columns across.

- One value per column is (1, BLOCK_COLUMNS), or a scalar if the tile lies in one sample.
- One value per channel is loaded as a vector (BLOCK_CHANNELS,), which the caller turns into
  (BLOCK_CHANNELS, 1). Triton 3.6 would load a block of shape (1, 1) once for each value that a
  thread holds.

A constexpr ``if`` that returns needs an ``else``. Otherwise the compiler also reads what follows
the ``if``, and expects one return type.
"""

import triton
import triton.language as tl

from fastflow_kernels.engines.triton.math import log_scale_of, scale_of


@triton.jit
def columns(tile, B, P, BLOCK_COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Return the samples (int64) and pixels of a tile's columns, and a mask of those that exist.

    With ROWS a tile has BLOCK_COLUMNS samples of one pixel. Otherwise it has BLOCK_COLUMNS pixels
    of one sample, and the tiles of a sample follow each other.
    """
    q = tl.arange(0, BLOCK_COLUMNS)[None, :]
    if ROWS:
        b = tile.to(tl.int64) * BLOCK_COLUMNS + q
        p = 0
        mask = b < B
    else:
        tiles = (P - 1) // BLOCK_COLUMNS + 1  # P + BLOCK_COLUMNS - 1 may not fit in 32 bits
        b = (tile // tiles).to(tl.int64)
        p = (tile % tiles) * BLOCK_COLUMNS + q
        mask = p < tl.where(b < B, P, 0)
    return b, p, mask


@triton.jit
def load(ptr, mask, ACC_DTYPE: tl.constexpr):
    """Load values in the accumulator's dtype, with 0 where masked."""
    return tl.load(ptr, mask=mask, other=0.0).to(ACC_DTYPE)


@triton.jit
def index(index_ptr, c, mask):
    """Return index[c] as int32, or c itself without an index."""
    if index_ptr is None:
        return c
    else:
        return tl.load(index_ptr + c, mask=mask, other=0).to(tl.int32)


@triton.jit
def sample(ptr, b, stride, C: tl.constexpr, P, ALIGN: tl.constexpr):
    """Return the pointer to sample b. No stride means that samples of C * P values have no gaps."""
    if stride is None:
        return ptr + b * C * P
    else:
        return ptr + b * stride * ALIGN


@triton.jit
def halves(
    ptr, active_ptr, b, stride, active_stride, C: tl.constexpr, C1: tl.constexpr, P,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Return two pointers to sample b: add a passive channel's offset to the first.

    Add an active channel's offset, C1 * P or more, to the second. Both are the same if ``ptr`` is
    the whole tensor, and ``active_ptr`` None. Otherwise each half has its own samples.
    """
    if active_ptr is None:
        whole_ptr = sample(ptr, b, stride, C, P, ALIGN)
        return whole_ptr, whole_ptr
    else:
        passive_ptr = sample(ptr, b, stride, C1, P, ALIGN)
        return passive_ptr, sample(active_ptr, b, active_stride, C - C1, P, ALIGN) - C1 * P


@triton.jit
def in_halves(pointers, active_ptr, j, C1: tl.constexpr, offs):
    """Return where the values of channels j lie, (BLOCK_CHANNELS, BLOCK_COLUMNS).

    ``pointers`` are those of :func:`halves`. The compiler proves that accesses are aligned only if
    whole tiles of pointers are selected.
    """
    if active_ptr is None:
        return pointers[0] + offs
    else:
        return tl.where(j < C1, pointers[0] + offs, pointers[1] + offs)


@triton.jit
def scale(g_ptr, c, mask, ACTIVATION: tl.constexpr, ACC_DTYPE: tl.constexpr):
    """Return activation(g[c]), or 1 for ACTIVATION = None (GIN, a side)."""
    if ACTIVATION is None:
        return tl.full((1,), 1.0, ACC_DTYPE)
    else:
        return scale_of(load(g_ptr + c, mask, ACC_DTYPE), ACTIVATION)


@triton.jit
def global_offset(offset_ptr, c, mask, ACC_DTYPE: tl.constexpr):
    """Return offset[c], or 0 without an offset (a side)."""
    if offset_ptr is None:
        return tl.full((1,), 0.0, ACC_DTYPE)
    else:
        return load(offset_ptr + c, mask, ACC_DTYPE)


@triton.jit
def inverse_scale(scale):
    """Return two factors whose product is 1 / scale.

    For a subnormal scale a single factor would overflow, although (y - offset) / scale may not.
    """
    is_tiny = scale < 2.0**-64
    return 1.0 / tl.where(is_tiny, scale * 2.0**64, scale), tl.where(is_tiny, 2.0**64, 1.0)


@triton.jit
def log_scale_sum(g_ptr, c, mask, ACTIVATION: tl.constexpr, ACC_DTYPE: tl.constexpr):
    """Return the sum of log(activation(g[c])) over the channels c that exist, 0 for a side."""
    if ACTIVATION is None:
        return tl.full((), 0.0, ACC_DTYPE)
    else:
        g = load(g_ptr + c, mask, ACC_DTYPE)
        return tl.sum(tl.where(mask, log_scale_of(g, ACTIVATION), 0.0))


@triton.jit
def total(sums_ptr, b, exists, p, P, PARTS: tl.constexpr):
    """Return sums[b, :].sum() for the samples b that exist, (1, 1) or (1, BLOCK_COLUMNS).

    The order of additions is always the same. PARTS = 0 returns sums[b, p] for the pixels p.
    """
    if PARTS == 0:
        return tl.load(sums_ptr + b * P + p, mask=p < tl.where(exists, P, 0), other=0.0)
    else:
        k = tl.arange(0, PARTS)[:, None]
        return tl.sum(
            tl.load(sums_ptr + b * PARTS + k, mask=k < tl.where(exists, PARTS, 0), other=0.0),
            axis=0,
            keep_dims=True,
        )
