"""The workloads: shapes and options of models that people run, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

ALL_IN_ONE = "AllInOneBlock"


@dataclass(frozen=True)
class Workload:
    """A block as a published model uses it, and the flow that the model builds from such blocks.

    In a flow of coupling blocks, a PermuteRandom follows each of them.

    Attributes:
        name: The model and its stage.
        shape: (B, C, *S) of the input.
        options: Constructor options of the block.
        conditions: Channels of each condition.
        declared: Spatial shape that the model declares, if it is not that of the input. Only
            anomalib's formula allows this.
        steps: Blocks of the whole flow. With 0 only the single block is measured.
        subnet: "conv" (3x3 and 1x1 in turn), "conv3" (3x3) or "fc" (linear). A subnet has two
            layers with a ReLU between them.
        hidden: Width of the subnet's hidden layer, as a multiple of its input's width.
        conditional_steps: How many of the first steps take the conditions. None means all.
        cpu_batch: Batch size on a CPU. None means that of ``shape``.
        cpu_flow_batch: Batch size of the whole flow on a CPU. None means ``cpu_batch``.
        channels_last: Whether every tensor has this memory format.
        block: The block's class: ALL_IN_ONE, or one of FrEIA's coupling blocks.
        permutes: Whether a PermuteRandom also follows a coupling block that is measured alone.
    """

    name: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    conditions: tuple[int, ...] = ()
    declared: tuple[int, ...] | None = None
    steps: int = 0
    subnet: str = "fc"
    hidden: float = 2.0
    conditional_steps: int | None = None
    cpu_batch: int | None = None
    cpu_flow_batch: int | None = None
    channels_last: bool = False
    block: str = ALL_IN_ONE
    permutes: bool = False

    def on_cpu(self, kind: str) -> Workload:
        """Return the workload with the batch size for a CPU."""
        batch = self.cpu_batch
        if kind in WHOLE and self.cpu_flow_batch is not None:
            batch = self.cpu_flow_batch
        return self if batch is None else replace(self, shape=(batch, *self.shape[1:]))


def _stages(name: str, shapes: list[tuple[int, ...]], **common: Any) -> list[Workload]:
    return [Workload(f"{name}/{i}", shape, **common) for i, shape in enumerate(shapes, 1)]


_FASTFLOW: dict[str, Any] = {
    "subnet": "conv",
    "hidden": 1.0,
    "steps": 8,
    "cpu_batch": 4,
    "cpu_flow_batch": 1,
}
_CFLOW: dict[str, Any] = {"options": {"affine_clamping": 1.9}, "conditions": (128,)}
_CFLOW_SOFT: dict[str, Any] = {
    "options": {"affine_clamping": 1.9, "permute_soft": True},
    "conditions": (128,),
    "steps": 8,
}
_GLOW: dict[str, Any] = {"block": "GLOWCouplingBlock", "steps": 8}
_GLOW_IMAGES: dict[str, Any] = {**_GLOW, "subnet": "conv3", "hidden": 1.0}
_MSFLOW: dict[str, Any] = {
    "options": {"affine_clamping": 1.9},
    "conditions": (64,),
    "declared": (1, 1),
    "subnet": "conv3",
    "hidden": 1.0,
}

# In the order of importance: a run that stops early has measured what matters most.
WORKLOADS = (
    *_stages(
        "fastflow-wrn50", [(32, 256, 64, 64), (32, 512, 32, 32), (32, 1024, 16, 16)], **_FASTFLOW
    ),
    *_stages("cflow", [(64, 512), (64, 1024), (64, 2048)], **_CFLOW, steps=8),
    Workload("tabular", (4096, 64), steps=8),
    *_stages("fastflow-r18", [(32, 64, 64, 64), (32, 128, 32, 32), (32, 256, 16, 16)], **_FASTFLOW),
    Workload(
        "fastflow-cait",
        (32, 768, 28, 28),
        subnet="conv",
        hidden=0.16,
        steps=20,
        cpu_batch=2,
        cpu_flow_batch=1,
    ),
    *_stages(
        "uflow-mcait",
        [(8, 384, 14, 14), (8, 816, 28, 28)],
        subnet="conv",
        hidden=1.0,
        steps=4,
        cpu_batch=2,
        cpu_flow_batch=1,
    ),
    *_stages("cflow-ad", [(256, 512), (256, 1024), (256, 2048)], **_CFLOW_SOFT),
    Workload("bgad", (4096, 512), **_CFLOW_SOFT, cpu_batch=1024),
    # MSFlow chains 2, 5 and 8 blocks in its three stages.
    Workload("msflow/1", (8, 256, 64, 64), **_MSFLOW, steps=2, cpu_batch=2, cpu_flow_batch=1),
    Workload("msflow/2", (8, 512, 32, 32), **_MSFLOW, steps=5, cpu_batch=2, cpu_flow_batch=1),
    Workload("msflow/3", (8, 1024, 16, 16), **_MSFLOW, steps=8, cpu_batch=2, cpu_flow_batch=1),
    Workload(
        "hyperspectral",
        (10000, 100),
        {"affine_clamping": 1.0, "global_affine_init": 0.7, "reverse_permutation": True},
        (10,),
        steps=40,
        conditional_steps=30,
        cpu_flow_batch=1000,
    ),
    Workload(
        "calo", (512, 500), {"affine_clamping": 5.0, "global_affine_init": 0.92}, (1,), steps=12
    ),
    Workload("tabular soft", (4096, 64), {"permute_soft": True}, steps=8),
    Workload("tabular Householder 8", (4096, 64), {"learned_householder_permutation": 8}, steps=8),
    Workload("tabular GIN", (4096, 64), {"gin_block": True}, steps=8),
    # One image, as in inference. CFlow with more fibers at a time than its default of 64.
    Workload("fastflow-wrn50/1 one image", (1, 256, 64, 64)),
    Workload("fastflow-r18/1 one image", (1, 64, 64, 64)),
    Workload("fastflow-r18/3 one image", (1, 256, 16, 16)),
    Workload("cflow large batch", (2048, 512), **_CFLOW),
    # What the block offers although no published model is known to use it.
    Workload("soft large batch", (2048, 512), {"permute_soft": True}),
    Workload("Householder 4/1", (256, 256), {"learned_householder_permutation": 4}),
    Workload("Householder 4/2", (256, 512), {"learned_householder_permutation": 4}),
    Workload("channels-last/1", (32, 256, 64, 64), cpu_batch=4, channels_last=True),
    Workload("channels-last/2", (32, 1024, 16, 16), cpu_batch=4, channels_last=True),
    Workload("channels-last/3", (32, 64, 32, 32), cpu_batch=4, channels_last=True),
    # Inputs for which Python takes most of the time.
    Workload("small/posterior", (128, 5), conditions=(10,), steps=6),
    Workload("small/sample", (1, 64), steps=6),
    Workload("small/image", (2, 3, 16, 16), subnet="conv", steps=4),
    Workload(
        "small/image channels-last", (2, 6, 16, 16), subnet="conv", steps=4, channels_last=True
    ),
    Workload("small/signal", (1, 256, 256)),
    # FrEIA's coupling blocks with its defaults, which are the clamp function ATAN and clamp 2.
    Workload("cinn", (512, 500), conditions=(10,), **_GLOW),
    Workload("cinn-images", (64, 32, 32, 32), conditions=(16,), cpu_flow_batch=4, **_GLOW_IMAGES),
    *_stages("glow", [(4096, 64), (2048, 512)], **_GLOW),
    Workload("glow/3", (4, 64, 64, 64), cpu_flow_batch=1, **_GLOW_IMAGES),
    *_stages("glow tiny", [(64, 8), (512, 32)], **_GLOW),
    Workload("rnvp", (4096, 64), block="RNVPCouplingBlock", steps=8),
    Workload("gin", (4096, 64), block="GINCouplingBlock", steps=8),
    Workload("one-sided", (4096, 64), block="AffineCouplingOneSided", permutes=True, steps=8),
)

_SWEEP = (8, 256, 32, 32)
_SWEEP_CPU = (2, 256, 16, 16)


def sweep(on_cpu: bool) -> tuple[Workload, ...]:
    """Return shapes in which the batch, the channels or the pixels grow from one common shape."""
    batch, channels, height, width = _SWEEP_CPU if on_cpu else _SWEEP
    batches = (1, 2, 4, 8, 16, 32) if on_cpu else (1, 2, 4, 8, 16, 32, 64, 128)
    channel_counts = (16, 64, 256, 1024) if on_cpu else (16, 32, 64, 128, 256, 512, 1024, 2048)
    sides = (4, 8, 16, 32, 64) if on_cpu else (4, 8, 16, 32, 64, 128)
    return (
        *(Workload("sweep-batch", (n, channels, height, width)) for n in batches),
        *(Workload("sweep-channels", (batch, n, height, width)) for n in channel_counts),
        *(Workload("sweep-pixels", (batch, channels, n, n)) for n in sides),
    )


# One of each kind of input, which together take a minute or two.
TYPICAL = (
    "fastflow-wrn50/3",
    "cflow/1",
    "tabular",
    "tabular soft",
    "tabular GIN",
    "fastflow-r18/1 one image",
    "channels-last/3",
    "small/sample",
    "small/image",
)
KINDS = ("block", "flow", "reversible", "sweep")
WHOLE = ("flow", "reversible")  # whole flows with their subnets: a plain or a reversible chain
DTYPES = ("float32", "bfloat16")


def workloads(kind: str, on_cpu: bool) -> list[Workload]:
    """Return the workloads of one of KINDS, with the batch sizes for a CPU or a GPU."""
    if kind == "sweep":
        return list(sweep(on_cpu))
    chosen = [workload for workload in WORKLOADS if workload.steps or kind not in WHOLE]
    if kind == "reversible":
        chosen = [w for w in chosen if w.block == ALL_IN_ONE and not w.conditions]
    return [workload.on_cpu(kind) for workload in chosen] if on_cpu else chosen
