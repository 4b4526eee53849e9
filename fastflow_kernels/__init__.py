"""Fused blocks for normalizing flows, drop-ins for those of FrEIA and anomalib."""

from fastflow_kernels.coupling_blocks import (
    AffineCouplingOneSided,
    ConditionalAffineTransform,
    GINCouplingBlock,
    GLOWCouplingBlock,
    NICECouplingBlock,
    RNVPCouplingBlock,
)
from fastflow_kernels.freia import InvertibleModule
from fastflow_kernels.modules import AllInOneBlock
from fastflow_kernels.patch import accelerate, restore
from fastflow_kernels.reporting import Report, report
from fastflow_kernels.sequence import ReversibleSequence

__version__ = "0.1.0"
__all__ = [
    "AffineCouplingOneSided",
    "AllInOneBlock",
    "ConditionalAffineTransform",
    "GINCouplingBlock",
    "GLOWCouplingBlock",
    "InvertibleModule",
    "NICECouplingBlock",
    "RNVPCouplingBlock",
    "Report",
    "ReversibleSequence",
    "__version__",
    "accelerate",
    "report",
    "restore",
]
