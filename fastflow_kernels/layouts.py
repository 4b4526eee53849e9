"""Memory layouts: which one a tensor has, and in which form an engine is given it."""

from __future__ import annotations

from typing import Protocol

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
    """x, which is contiguous or channels-last already, in the given layout."""
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


class Form(Protocol):
    """In which form an engine is given the tensors of a block, (B, C, *S)."""

    def take(self, t: Tensor) -> Tensor:
        """A tensor as the engine takes it."""

    def give(self, t: Tensor, like: Tensor) -> Tensor:
        """A result of the engine in the block's form; ``like`` has the batch and spatial size."""

    def per_sample(self, log_det: Tensor, like: Tensor) -> Tensor:
        """The engine's log-determinant per sample, (B,)."""

    def packed(self, t: Tensor, layout: torch.memory_format) -> Tensor:
        """A tensor, or a copy that :meth:`take` needs not copy; ``layout`` is that of a result."""

    def rows_per_sample(self, x: Tensor) -> int:
        """How many samples of the engine's make one of the block's."""


class _Samples:
    """As they are."""

    def take(self, t: Tensor) -> Tensor:
        return t

    def give(self, t: Tensor, like: Tensor) -> Tensor:
        return t

    def per_sample(self, log_det: Tensor, like: Tensor) -> Tensor:
        return log_det

    def packed(self, t: Tensor, layout: torch.memory_format) -> Tensor:
        return t if is_packed(t) else t.contiguous()

    def rows_per_sample(self, x: Tensor) -> int:
        return 1


class _Pixels:
    """Every pixel of a channels-last tensor is a row, which the engine takes for a sample."""

    def take(self, t: Tensor) -> Tensor:
        return as_rows(t)

    def give(self, t: Tensor, like: Tensor) -> Tensor:
        return from_rows(t, like)

    def per_sample(self, log_det: Tensor, like: Tensor) -> Tensor:
        return log_det.view(like.shape[0], -1).sum(1)

    def packed(self, t: Tensor, layout: torch.memory_format) -> Tensor:
        return t.contiguous(memory_format=layout)

    def rows_per_sample(self, x: Tensor) -> int:
        return x.shape[2:].numel()


SAMPLES: Form = _Samples()
PIXELS: Form = _Pixels()
