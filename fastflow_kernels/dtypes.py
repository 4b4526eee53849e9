"""Which dtype a result has, and in which one it is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype that ordinary operations on these tensors would give."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        if t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a computation is done in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype; itself if it has that."""
    return t if t.dtype is dtype else t.to(dtype)
