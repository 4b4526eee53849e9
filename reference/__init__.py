"""The oracle: a readable, pure-PyTorch `AllInOneBlock`. It imports torch and nothing else, least of
all ``fastflow_kernels``.
"""

from reference.all_in_one_block import AllInOneBlock
from reference.base import InvertibleModule

__all__ = ["AllInOneBlock", "InvertibleModule"]
