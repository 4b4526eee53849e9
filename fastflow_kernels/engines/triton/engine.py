"""The kernels as an engine: see :class:`~fastflow_kernels.engines.Engine`. Imports Triton."""

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
