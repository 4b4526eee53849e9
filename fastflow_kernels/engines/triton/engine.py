"""The kernels as an :class:`~fastflow_kernels.engines.Engine`. Importing it imports Triton."""

from fastflow_kernels.engines.triton.backward import backward, invert_and_backward
from fastflow_kernels.engines.triton.forward import forward
from fastflow_kernels.engines.triton.inverse import invert_active, invert_passive

__all__ = [
    "backward",
    "forward",
    "invert_active",
    "invert_and_backward",
    "invert_passive",
]
