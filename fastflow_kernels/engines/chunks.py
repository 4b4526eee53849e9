"""Chunks of tensors that fit in a CPU's cache, and scratch buffers that are kept between calls."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from fastflow_kernels import torch_private
from fastflow_kernels.layouts import packed

_CHUNK_BYTES = 1 << 20  # Per thread: it fits in a core's L2 cache beside the operands.
_SCRATCH_BYTES = 16 << 20  # Per thread and dtype: the largest buffer kept between calls.
_MAX_VIEWS = 64  # Per thread: views of the buffers, kept by dtype and shapes.


def flat(t: Tensor) -> Tensor:
    """Return t, (B, C, *S), as (B, C, P). It is a view if each sample is contiguous."""
    if t.dim() == 2:
        return (t if t.stride(1) == 1 else t.contiguous()).unsqueeze(2)
    return packed(t).flatten(2)


def chunk_sizes(
    x: Tensor, dtype: torch.dtype, keep_together: int, pairs: int | None = None
) -> tuple[int, int]:
    """Return how many samples, and how many channel pairs of each, form a chunk.

    Args:
        x: The tensor to walk, (B, C, P) or (B, C).
        dtype: The dtype of the computation.
        keep_together: Number of consecutive samples that stay in one chunk, each of them whole. 0
            allows a chunk to be a part of one sample.
        pairs: Number of channel pairs, if x is the active half alone.
    """
    batch, channels, *spatial = x.shape
    pixels = spatial[0] if spatial else 1
    channels, pairs = (channels, max(1, channels // 2)) if pairs is None else (2 * pairs, pairs)
    if x.device.type != "cpu":
        return batch, pairs  # elsewhere each chunk costs launches, so one is best
    budget = _CHUNK_BYTES // dtype.itemsize * torch.get_num_threads()
    min_samples = max(1, keep_together)
    min_elements = channels * pixels * min_samples
    if min_elements < 4 * budget or keep_together or pixels == 1:
        return min_samples * max(1, min(batch // min_samples, budget // min_elements)), pairs
    # A chunk of one half of the channels is half as large, because many passes read several of
    # them. For (1, 256, 64, 64) one chunk took 1.04 times the time forward, 1.06 backward and 1.17
    # in the inverse (one thread of an Intel Xeon). A sample of 2 MB gains nothing by chunks.
    return 1, max(1, min(pairs, budget // 2 // pixels))


def chunks_of(dim: int, step: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors in pieces of ``step`` along ``dim``; whole if one piece holds all."""
    size = tensors[0].shape[dim]
    if step >= size:
        yield tensors
        return
    for start in range(0, size, step):
        yield tuple(t.narrow(dim, start, min(step, size - start)) for t in tensors)


def accumulate(total: Tensor | None, part: Tensor) -> Tensor:
    """Add ``part`` to ``total`` in place; None counts as zero."""
    return part if total is None else total.add_(part)


def resized(scratch: Tensor, like: Tensor) -> Tensor:
    """Return the scratch in the shape of ``like``, which may be smaller (the last chunk)."""
    if scratch.shape == like.shape:
        return scratch
    return scratch.view(-1)[: like.numel()].view(like.shape)


class _Scratch(threading.local):
    """Buffers that a thread keeps between calls.

    Touching fresh memory pages costs more than the arithmetic on them.
    """

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.views: dict[tuple[torch.dtype, tuple[tuple[int, ...], ...]], list[Tensor]] = {}

    def take(self, like: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Return uninitialised tensors of these shapes, valid until this thread's next call.

        Args:
            like: A tensor on the device to use.
            dtype: The dtype of the result.
            shapes: One shape for each tensor.
        """
        is_kept = like.device.type == "cpu" and not torch_private.is_watched()
        if is_kept and (views := self.views.get((dtype, shapes))):
            return views
        sizes = [math.prod(shape) for shape in shapes]
        total = sum(sizes)
        is_kept = is_kept and total * dtype.itemsize <= _SCRATCH_BYTES
        buffer = self.buffers.get(dtype) if is_kept else None
        # A buffer made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            if buffer is None or buffer.numel() < total:
                buffer = torch.empty(total, dtype=dtype, device=like.device)
                self._forget(dtype)
            pieces = buffer[:total].split(sizes)
            views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        if is_kept:
            if len(self.views) >= _MAX_VIEWS:
                self._forget(dtype)
            self.buffers[dtype] = buffer
            self.views[dtype, shapes] = views
        return views

    def _forget(self, dtype: torch.dtype) -> None:
        """Drop the views of the buffer of this dtype."""
        self.views = {key: views for key, views in self.views.items() if key[0] is not dtype}


scratch = _Scratch()
