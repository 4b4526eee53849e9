"""The kernels as a :class:`~fastflow_kernels.engines.ChainEngine`. Importing it imports Triton."""

from fastflow_kernels.engines.triton.backward import backward, backward_halves, invert_and_backward
from fastflow_kernels.engines.triton.forward import forward, forward_halves
from fastflow_kernels.engines.triton.inverse import invert_active, invert_passive
from fastflow_kernels.engines.triton.sums import log_det_of_chain

__all__ = [
    "backward",
    "backward_halves",
    "forward",
    "forward_halves",
    "invert_active",
    "invert_and_backward",
    "invert_passive",
    "log_det_of_chain",
]
