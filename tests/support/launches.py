"""What one launch of a kernel moved: the record that both ways of running kernels without a GPU
keep.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Launch:
    """What one kernel launch moved, in bytes.

    Attributes:
        kernel: The kernel's name.
        loaded, stored: By argument name: bytes of all unmasked lanes.
        distinct: By argument name: bytes of the distinct addresses loaded.
    """

    kernel: str
    loaded: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    distinct: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, loaded: np.ndarray, stored: np.ndarray, itemsize: int) -> None:
        """Add what was loaded from and stored to one tensor, as addresses or element numbers."""
        if loaded.size:
            self.loaded[name] = loaded.size * itemsize
            self.distinct[name] = np.unique(loaded).size * itemsize
        if stored.size:
            self.stored[name] = stored.size * itemsize
