"""Which of torch's dispatch modes are on: whether tensors have values at all, and whether somebody looks on."""

from __future__ import annotations

import torch

_KEYS = torch._C._TorchDispatchModeKey
_SYMBOLIC = (_KEYS.FAKE, _KEYS.PROXY, _KEYS.FUNCTIONAL)


def is_watched() -> bool:
    """Whether a dispatch mode is on, which may exchange every tensor that is made: then nothing made may be kept for later calls."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_symbolic() -> bool:
    """Whether operations are recorded or tensors have no values: FakeTensorMode, make_fx, functionalization."""
    return is_watched() and any(torch._C._get_dispatch_mode(key) is not None for key in _SYMBOLIC)
