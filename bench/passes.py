"""The kernels' passes over one workload, called by their launchers: no module, no autograd, no
subnet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import Workload
from bench.compiled import spec_of
from bench.subject import Sample, draw_samples
from fastflow_kernels.coupling import Coupling, OutputGrads

# reversible: the inverse and the backward of a chain, in one
PASSES = ("forward", "backward", "inverse", "reversible")


class Passes:
    """The launches of one workload and dtype, on inputs that take turns.

    Args:
        workload: Its shape and constants count; the permutation is a hard one.
        dtype: Of all tensors but the gradient of the log-determinant.
        device: A GPU.
        most: The most inputs to take turns; by default so many that none is found in the L2 cache.
    """

    def __init__(
        self, workload: Workload, dtype: torch.dtype, device: torch.device, most: int | None = None
    ) -> None:
        self.samples: list[Sample] = draw_samples("block", workload, dtype, device)[:most]
        self.next = 0
        channels = workload.shape[1]
        g, offset = (torch.randn(channels, device=device, dtype=dtype) for _ in range(2))
        perm = torch.randperm(channels, device=device)
        self.coupling = Coupling(g, offset, spec_of(workload.options), perm, perm.argsort())
        self.dlogdet = [sample.dlogdet.float() for sample in self.samples]

    def calls(self, name: str, count: int) -> list[Callable[[], object]]:
        """Calls of a pass that can run in a row, each on the next inputs."""
        chosen = [(self.next + i) % len(self.samples) for i in range(count)]
        self.next = (self.next + count) % len(self.samples)
        return [self._call(name, i) for i in chosen]

    def _call(self, name: str, i: int) -> Callable[[], object]:
        from fastflow_kernels.engines.triton import engine

        x, a, dy = (t.detach() for t in (self.samples[i].x, self.samples[i].a, self.samples[i].dy))
        coupling, grads = self.coupling, OutputGrads(dy, self.dlogdet[i])

        def inverse() -> object:
            return engine.invert_active(x, engine.invert_passive(x, coupling), a, coupling)

        def reversible() -> object:
            u = engine.invert_passive(x, coupling)
            return engine.invert_and_backward(x, u, a, grads, coupling, True)

        return {
            "forward": lambda: engine.forward(x, a, coupling),
            "backward": lambda: engine.backward(x, a, grads, coupling, True),
            "inverse": inverse,
            "reversible": reversible,
        }[name]
