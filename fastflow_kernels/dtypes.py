"""The dtype of a result, and the dtype in which it is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def promoted(first: Tensor, *tensors: Tensor | None) -> torch.dtype:
    """Return the dtype that ordinary operations on these tensors would give; None is ignored."""
    dtype = first.dtype
    for t in tensors:
        if t is not None and t.dtype is not dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in, which is float64 for float64 and otherwise float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in ``dtype``, or the tensor itself if it has that dtype."""
    return t if t.dtype is dtype else t.to(dtype)
