"""The workloads: shapes and options of the models that people run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Workload:
    """One block as a published model uses it.

    Attributes:
        name: The model and its stage.
        shape: (B, C, *S) of the input.
        options: Constructor options of the block.
        conditions: Channels of each condition.
        cpu_batch: Batch on a CPU, where the whole one would only cost time.
    """

    name: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    conditions: tuple[int, ...] = ()
    cpu_batch: int | None = None

    def on_cpu(self) -> Workload:
        """The same with the batch that a CPU is measured with."""
        return self if self.cpu_batch is None else Workload(self.name, (self.cpu_batch, *self.shape[1:]), self.options, self.conditions)


_CFLOW = {"affine_clamping": 1.9}

WORKLOADS = (
    Workload("fastflow-wrn50/1", (32, 256, 64, 64), cpu_batch=4),
    Workload("fastflow-wrn50/2", (32, 512, 32, 32), cpu_batch=4),
    Workload("fastflow-wrn50/3", (32, 1024, 16, 16), cpu_batch=4),
    Workload("fastflow-wrn50/1 one image", (1, 256, 64, 64)),
    Workload("fastflow-r18/1", (32, 64, 64, 64), cpu_batch=4),
    Workload("fastflow-r18/2", (32, 128, 32, 32), cpu_batch=4),
    Workload("fastflow-r18/3", (32, 256, 16, 16), cpu_batch=4),
    Workload("fastflow-r18/1 one image", (1, 64, 64, 64)),
    Workload("fastflow-r18/3 one image", (1, 256, 16, 16)),
    Workload("cflow/1", (64, 512), _CFLOW, (128,)),
    Workload("cflow/2", (64, 1024), _CFLOW, (128,)),
    Workload("cflow/3", (64, 2048), _CFLOW, (128,)),
    Workload("cflow large batch", (2048, 512), _CFLOW, (128,)),
    Workload("tabular", (4096, 64)),
    Workload("tabular soft", (4096, 64), {"permute_soft": True}),
    Workload("tabular Householder 8", (4096, 64), {"learned_householder_permutation": 8}),
    Workload("tabular GIN", (4096, 64), {"gin_block": True}),
)
