"""The kernels as a :class:`~fastflow_kernels.engines.ChainEngine`. Importing it imports Triton."""

from fastflow_kernels.engines.triton.backward import (
    backward,
    backward_in_chain,
    invert_and_backward,
)
from fastflow_kernels.engines.triton.forward import forward, forward_in_chain
from fastflow_kernels.engines.triton.inverse import invert_active, invert_passive
from fastflow_kernels.engines.triton.plan import wants_halves
from fastflow_kernels.engines.triton.sums import log_det_of_chain

__all__ = [
    "backward",
    "backward_in_chain",
    "forward",
    "forward_in_chain",
    "invert_active",
    "invert_and_backward",
    "invert_passive",
    "log_det_of_chain",
    "wants_halves",
]
