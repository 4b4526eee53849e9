"""Walking tensors in chunks that stay in a CPU's cache, with scratch that is kept between calls."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from fastflow_kernels import torch_private

_CHUNK_BYTES = 1 << 20  # per thread: stays in a core's second-level cache beside its operands
_SCRATCH_BYTES = 16 << 20  # per thread and dtype: the most that is kept between calls
_MOST_VIEWS = 64  # of the scratch, kept by shape


def flat(t: Tensor) -> Tensor:
    """(B, C, *S) -> (B, C, P); copies only what is not contiguous."""
    return t.contiguous().view(t.shape[0], t.shape[1], math.prod(t.shape[2:]))


def chunk_sizes(x: Tensor, dtype: torch.dtype, together: int) -> tuple[int, int]:
    """How many samples, and how many channel pairs of each, one pass works on.

    Args:
        x: (B, C, P).
        dtype: Of the computation.
        together: So many samples are never parted, nor is any of them; 0 allows a part of one.
    """
    batch, channels, pixels = x.shape
    pairs = max(1, channels // 2)
    if x.device.type != "cpu":
        return batch, pairs  # elsewhere a pass is a launch: few and large
    budget = _CHUNK_BYTES // dtype.itemsize * torch.get_num_threads()
    least = max(1, together)
    sample = channels * pixels * least
    if sample <= 4 * budget or together or pixels == 1:
        return least * max(1, min(batch // least, budget // sample)), pairs
    return 1, max(1, min(pairs, budget // pixels))


def chunks_of(dim: int, step: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in pieces of ``step`` along ``dim``; themselves if one piece holds all."""
    size = tensors[0].shape[dim]
    if step >= size:
        yield tensors
        return
    for start in range(0, size, step):
        yield tuple(t.narrow(dim, start, min(step, size - start)) for t in tensors)


def resized(scratch: Tensor, like: Tensor) -> Tensor:
    """The scratch in the shape of ``like``, which is smaller in the last chunk."""
    if scratch.shape == like.shape:
        return scratch
    return scratch.view(-1)[: like.numel()].view(like.shape)


class _Scratch(threading.local):
    """Buffers of a thread that are kept: fresh pages cost more than the arithmetic in them."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.views: dict[tuple[torch.dtype, tuple[tuple[int, ...], ...]], list[Tensor]] = {}

    def take(self, like: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Uninitialised tensors of these shapes, valid until this thread's next call."""
        is_kept = like.device.type == "cpu" and not torch_private.is_watched()
        if is_kept and (views := self.views.get((dtype, shapes))):
            return views
        sizes = [math.prod(shape) for shape in shapes]
        total = sum(sizes)
        is_kept = is_kept and total * dtype.itemsize <= _SCRATCH_BYTES
        buffer = self.buffers.get(dtype) if is_kept else None
        # otherwise the buffer could not be written to outside of inference mode
        with torch.inference_mode(False):
            if buffer is None or buffer.numel() < total:
                buffer = torch.empty(total, dtype=dtype, device=like.device)
                self._forget(dtype)
            pieces = buffer[:total].split(sizes)
            views = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        if is_kept:
            if len(self.views) >= _MOST_VIEWS:
                self._forget(dtype)
            self.buffers[dtype] = buffer
            self.views[dtype, shapes] = views
        return views

    def _forget(self, dtype: torch.dtype) -> None:
        """Drop the views of a buffer that is replaced."""
        self.views = {key: views for key, views in self.views.items() if key[0] is not dtype}


scratch = _Scratch()
