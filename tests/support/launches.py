"""A record of the bytes that a kernel launch moved, kept by the executor and the interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Launch:
    """The bytes that one kernel launch moved.

    Attributes:
        kernel: The kernel's name.
        loaded: Bytes loaded by all unmasked lanes, by argument name.
        stored: Bytes stored by all unmasked lanes, by argument name.
        distinct: Bytes of the distinct addresses loaded, by argument name.
    """

    kernel: str
    loaded: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    distinct: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, loaded: np.ndarray, stored: np.ndarray, itemsize: int) -> None:
        """Add the loads and stores of one tensor, as addresses or element numbers."""
        if loaded.size:
            self.loaded[name] = loaded.size * itemsize
            self.distinct[name] = np.unique(loaded).size * itemsize
        if stored.size:
            self.stored[name] = stored.size * itemsize
