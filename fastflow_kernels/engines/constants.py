"""Numbers as 0-dimensional tensors, which are cheaper operands than Python numbers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastflow_kernels import torch_private


def constant(value: Any, dtype: torch.dtype) -> Tensor:
    """Return a number as a 0-dimensional tensor on the CPU, cached for later calls.

    Such an operand costs 1.5 us less than a Python number, which every operation wraps anew.
    Tensors on any device accept it.

    Args:
        value: A float. Anything else, such as a clamp that is a tensor, is returned as it is.
        dtype: The dtype of the tensor.
    """
    if type(value) is not float:
        return value
    return _make(value, dtype) if torch_private.is_watched() else _cached(value, dtype)


def operand(value: Any, dtype: torch.dtype) -> Any:
    """Return :func:`constant`, or the number itself while operations are traced."""
    return value if torch_private.is_traced() else constant(value, dtype)


def _make(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


# A coupling needs about ten constants. The size is bounded, because a clamp may change forever.
@lru_cache(maxsize=128)
def _cached(value: float, dtype: torch.dtype) -> Tensor:
    return _make(value, dtype)
