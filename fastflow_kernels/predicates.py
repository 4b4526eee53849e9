"""What several files ask about the tensors of a call."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements up to which "auto" runs plain operations on a CPU: autograd's own nodes cost less than a
# Python one, and here that is most of the time. Train step of one block on a thread of an AMD EPYC,
# plain against eager: 321 against 478 us for (100, 2), 417 against 533 us for (64, 256), 507
# against 592 us for (64, 512), 665 against 659 us for (1, 256, 16, 16).
SMALL = 1 << 15


def is_small(x: Tensor, cost_factor: int = 1) -> bool:
    """Whether what a call costs outweighs what it computes.

    Never on a GPU, where fused kernels save launches.

    Args:
        x: The block's input, (B, C, *S).
        cost_factor: How much larger an input may be and still count as small, because a matrix
            product dominates.
    """
    return x.numel() <= cost_factor * SMALL and not x.is_cuda


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for tensors on this device.

    The meta device has none; torch.amp.is_autocast_available, which says so, does not compile.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: nothing can be asked of values then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
