"""Numbers as operands: 0-dimensional tensors, which are cheaper than Python numbers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastflow_kernels import torch_private


def constant(value: Any, dtype: torch.dtype) -> Tensor:
    """A number as a 0-dimensional tensor on the CPU, kept for later calls.

    As an operand it costs 1.5 us less than a Python number, which every call wraps anew. Operands
    without dimensions may lie on the CPU beside tensors on any device. A value that is a tensor
    already, such as a clamp that learns, stays what it is.
    """
    if type(value) is not float:
        return value
    return _new(value, dtype) if torch_private.is_watched() else _kept(value, dtype)


def operand(value: Any, dtype: torch.dtype) -> Any:
    """A constant as above; the number itself where operations are traced."""
    return value if torch_private.is_traced() else constant(value, dtype)


def _new(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


@lru_cache(maxsize=128)  # a coupling needs about ten; bounded, because a clamp may always change
def _kept(value: float, dtype: torch.dtype) -> Tensor:
    return _new(value, dtype)
