"""The kernels' passes over one workload, on inputs that take turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.subject import Sample, draw_samples
from bench.workloads import Workload
from fastflow_kernels.coupling import Coupling, OutputGrads
from tests.support.kernel_passes import Inputs, run_pass, spec_of


class Passes:
    """The kernel launches of one workload and dtype.

    Args:
        workload: Its shape and constants are used. The permutation is always a hard one.
        dtype: The dtype of all tensors except the gradient of the log-determinant.
        device: A GPU.
        most: The most inputs that take turns. By default there are so many that none is still in
            the L2 cache.
    """

    def __init__(
        self, workload: Workload, dtype: torch.dtype, device: torch.device, most: int | None = None
    ) -> None:
        channels = workload.shape[1]
        g, offset = (torch.randn(channels, device=device, dtype=dtype) for _ in range(2))
        perm = torch.randperm(channels, device=device)
        coupling = Coupling(g, offset, spec_of(workload.options), perm, perm.argsort())

        def inputs(sample: Sample) -> Inputs:
            assert sample.a is not None
            grads = OutputGrads(sample.dy, sample.dlogdet.float())
            return Inputs(sample.x.detach(), sample.a.detach(), grads, coupling)

        self.inputs = [inputs(s) for s in draw_samples("block", workload, dtype, device)[:most]]
        self.next = 0

    def calls(self, name: str, count: int) -> list[Callable[[], object]]:
        """Return calls of a pass that can run in a row, each on the next inputs."""
        chosen = [(self.next + i) % len(self.inputs) for i in range(count)]
        self.next = (self.next + count) % len(self.inputs)
        return [partial(run_pass, name, self.inputs[i]) for i in chosen]
