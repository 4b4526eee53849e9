"""The oracle: a readable `AllInOneBlock` in pure PyTorch, which the fused block is tested against.

It imports only torch, and nothing of ``fastflow_kernels``.
"""

from reference.all_in_one_block import AllInOneBlock
from reference.base import InvertibleModule

__all__ = ["AllInOneBlock", "InvertibleModule"]
