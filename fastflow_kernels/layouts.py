"""Memory layouts: which one a tensor has, and how it gets another."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last where each sample of x is, otherwise contiguous."""
    if x.dim() > 3 and not x.is_contiguous():
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        if x.is_contiguous(memory_format=layout):
            return layout
        sample = x[:1]  # of a batch with gaps
        if sample.is_contiguous(memory_format=layout) and not sample.is_contiguous():
            return layout
    return torch.contiguous_format


def in_layout(x: Tensor, layout: torch.memory_format) -> Tensor:
    """x in the given layout if that is channels-last; for the contiguous one x as it is."""
    if layout is torch.contiguous_format:
        return x
    return x.contiguous(memory_format=layout)


def is_packed(t: Tensor) -> bool:
    """Whether each sample's block is contiguous; the stride between samples is free."""
    if t.is_contiguous():
        return True
    size = 1
    for n, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if n != 1 and stride != size:
            return False
        size *= n
    return True


def packed(t: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where the values of a sample lie apart."""
    return t if is_packed(t) else t.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """(B, C, *S) -> (B * P, C), contiguous; a view where x is channels-last."""
    # one sample of another layout would be a transposed view
    return x.movedim(1, -1).reshape(-1, x.shape[1]).contiguous()


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """(B * P, C) -> (B, C, *S), channels-last, on the same memory.

    It is not a view to autograd, which forbids to change a Function's views.
    """
    batch, _, *spatial = like.shape
    view = rows.view(batch, *spatial, rows.shape[1]).movedim(-1, 1)
    return torch.empty(0, dtype=rows.dtype, device=rows.device).set_(
        rows.untyped_storage(), rows.storage_offset(), view.shape, view.stride()
    )
