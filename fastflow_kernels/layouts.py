"""Memory layouts: the one that a tensor has, and the ways to another."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """Return channels-last if each sample of x is channels-last, otherwise contiguous."""
    if x.dim() > 3 and not x.is_contiguous():
        layout = channels_last_of(x)
        if x.is_contiguous(memory_format=layout):
            return layout
        sample = x[:1]  # a batch may have gaps between its samples
        if sample.is_contiguous(memory_format=layout) and not sample.is_contiguous():
            return layout
    return torch.contiguous_format


def channels_last_of(x: Tensor) -> torch.memory_format:
    """Return the channels-last format for a tensor of rank 4 or 5."""
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def in_layout(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Convert x to a channels-last layout; for the contiguous layout return it as it is."""
    if layout is torch.contiguous_format:
        return x
    return x.contiguous(memory_format=layout)


def is_packed(t: Tensor) -> bool:
    """Return whether each sample is contiguous; any stride between samples is allowed."""
    if t.is_contiguous():
        return True
    size = 1
    for n, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if n != 1 and stride != size:
            return False
        size *= n
    return True


def packed(t: Tensor) -> Tensor:
    """Return the tensor if its samples are contiguous, otherwise a contiguous copy."""
    return t if is_packed(t) else t.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """Reshape (B, C, *S) to rows (B * P, C), as a view if x is channels-last.

    Each row is contiguous. There are gaps between the rows of some of a tensor's channels.
    """
    # packed(), because a single sample in another layout would be a transposed view
    return packed(x.movedim(1, -1).reshape(-1, x.shape[1]))


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Reshape rows (B * P, C) to a channels-last tensor (B, C, *S) on the same memory.

    Autograd does not know it as a view, because it forbids in-place changes to views that a
    Function returns.

    Args:
        rows: (B * P, C), contiguous.
        like: A tensor of the shape (B, *, *S).
    """
    batch, _, *spatial = like.shape
    view = rows.view(batch, *spatial, rows.shape[1]).movedim(-1, 1)
    return torch.empty(0, dtype=rows.dtype, device=rows.device).set_(
        rows.untyped_storage(), rows.storage_offset(), view.shape, view.stride()
    )
