"""The kernels' passes over one workload, called by their launchers: no module, no autograd, no
subnet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import Workload
from bench.compiled import spec_of
from bench.subject import Sample, draw_samples

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
        self.shared = (g, offset, perm, perm.argsort(), spec_of(workload.options))
        self.dlogdet = [sample.dlogdet.float() for sample in self.samples]

    def calls(self, name: str, count: int) -> list[Callable[[], object]]:
        """Calls of a pass that can run in a row, each on the next inputs."""
        chosen = [(self.next + i) % len(self.samples) for i in range(count)]
        self.next = (self.next + count) % len(self.samples)
        return [self._call(name, i) for i in chosen]

    def _call(self, name: str, i: int) -> Callable[[], object]:
        from fastflow_kernels.engines.triton import coupling

        x, a, dy = (t.detach() for t in (self.samples[i].x, self.samples[i].a, self.samples[i].dy))

        def inverse() -> object:
            u = coupling.coupling_inv_passive(x, *self.shared)
            return coupling.coupling_inv_active(x, u, a, *self.shared, True)

        def reversible() -> object:
            u = coupling.coupling_inv_passive(x, *self.shared)
            return coupling.coupling_inv_bwd(x, u, dy, self.dlogdet[i], a, *self.shared, True)

        return {
            "forward": lambda: coupling.coupling_fwd(x, a, *self.shared, True),
            "backward": lambda: coupling.coupling_bwd(
                dy, self.dlogdet[i], x, a, *self.shared, True
            ),
            "inverse": inverse,
            "reversible": reversible,
        }[name]
