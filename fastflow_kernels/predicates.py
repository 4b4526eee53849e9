"""Questions about the tensors of a call that several files ask."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements up to which "auto" runs plain operations on a CPU. Training, 1 thread of an AMD EPYC,
# plain / eager: (64, 512) 507 / 592 us, (1, 256, 16, 16) 665 / 659 us (more in bench/TUNING.md).
SMALL = 1 << 15


def is_small(x: Tensor, cost_factor: int = 1) -> bool:
    """Return whether the overhead of a fused call outweighs what it computes.

    On a GPU it never does, because fused kernels save launches.

    Args:
        x: The block's input, (B, C, *S).
        cost_factor: How much larger an input may be and still count as small, because a matrix
            product dominates.
    """
    return x.numel() <= cost_factor * SMALL and not x.is_cuda


def is_autocast(device: torch.device) -> bool:
    """Return whether autocast is on for tensors on this device.

    The meta device has no autocast. torch.amp.is_autocast_available() would say so, but it does not
    compile.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_dtype(x: Tensor, parameter: Tensor) -> torch.dtype | None:
    """Return the half precision of autocast if it is on for x, otherwise None.

    Autocast leaves float64 alone.
    """
    if torch.float64 in (x.dtype, parameter.dtype) or not is_autocast(x.device):
        return None
    return torch.get_autocast_dtype(x.device.type)


def is_capturing(x: Tensor) -> bool:
    """Return whether a CUDA graph is being captured, so that values cannot be read."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
