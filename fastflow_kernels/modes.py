"""Which of torch's dispatch modes are on: whether tensors have values at all, and whether somebody
looks on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

_KEYS = torch._C._TorchDispatchModeKey
_SYMBOLIC = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)


def is_watched() -> bool:
    """Whether a dispatch mode is on, which may exchange every tensor that is made: then nothing
    made may be kept for later calls.
    """
    return torch._C._len_torch_dispatch_stack() > 0


def is_symbolic() -> bool:
    """Whether operations are recorded or tensors have no values: FakeTensorMode, make_fx,
    functionalization.
    """
    return is_watched() and any(torch._C._get_dispatch_mode(key) is not None for key in _SYMBOLIC)


def is_recorded() -> bool:
    """Whether operations are recorded, so that tensors cannot be asked for their values:
    compilation, export, jit.trace, and the above.
    """
    return torch.compiler.is_compiling() or torch._C._is_tracing() or is_symbolic()


def is_onnx_export() -> bool:
    """Whether a file for ONNX is being made; Dynamo takes torch.onnx.is_in_onnx_export for False,
    but not what that reads.
    """
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return torch.onnx.is_in_onnx_export() or (flags is not None and flags._is_onnx_exporting)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within: neither a dispatch mode nor torch.jit.trace sees what is done."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
