"""The oracle: readable blocks in pure PyTorch, which the fused blocks are tested against.

It imports only torch, and nothing of ``fastflow_kernels``.
"""

from reference.all_in_one_block import AllInOneBlock
from reference.base import InvertibleModule
from reference.coupling_blocks import (
    AffineCouplingOneSided,
    ConditionalAffineTransform,
    GINCouplingBlock,
    GLOWCouplingBlock,
    NICECouplingBlock,
    RNVPCouplingBlock,
)

__all__ = [
    "AffineCouplingOneSided",
    "AllInOneBlock",
    "ConditionalAffineTransform",
    "GINCouplingBlock",
    "GLOWCouplingBlock",
    "InvertibleModule",
    "NICECouplingBlock",
    "RNVPCouplingBlock",
]
