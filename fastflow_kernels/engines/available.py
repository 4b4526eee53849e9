"""Whether the Triton engine can be used, and the engine itself. Importing it imports no Triton."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from fastflow_kernels.engines import ChainEngine
from fastflow_kernels.engines.triton.plan import why_unsupported


@cache
def why_no_triton() -> str | None:
    """Return why Triton cannot be used in this process at all, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        triton_engine()
    except Exception as error:  # a broken or too old Triton must not break the eager engine
        return f"Triton does not import: {type(error).__name__}: {error}"
    return None


@cache
def triton_engine() -> ChainEngine:
    """Return the Triton engine. The first call imports Triton."""
    from fastflow_kernels.engines.triton import engine

    return engine


def is_interpreted() -> bool:
    """Return whether Triton's interpreter is switched on.

    It runs kernels on CPU tensors, slowly, for tests.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not_triton(x: Tensor, as_pixels: bool = False) -> str | None:
    """Return why the Triton kernels do not take this input, or None if they do.

    Args:
        x: The block's input, (B, C, *S).
        as_pixels: Whether its pixels are passed as rows, (B * P, C).
    """
    if not x.is_cuda and not is_interpreted():
        return f"the input is on {x.device}, and Triton runs on a GPU"
    shape: Sequence[int] = x.shape
    if as_pixels:
        shape = x.numel() // shape[1], shape[1]
    return why_no_triton() or why_unsupported(shape, x.dtype)
