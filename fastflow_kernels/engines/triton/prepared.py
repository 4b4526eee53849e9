"""Launches whose grid, sizes and constants are worked out once, for all calls of one shape.

On small inputs the launches' Python is what a step takes: Triton's own dispatcher binds,
specializes and looks up some twenty arguments per launch (15.6 us on an AMD EPYC, of which 2.0 are
left here; `python -m pytest bench/overhead.py -k one_launch`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all tensors start at a multiple of 16 bytes, which the compiled binary of a
    :class:`Launch` counts on.
    """
    merged = 0
    for t in tensors:
        if t is not None:
            merged |= t.data_ptr()
    return not merged & 15


class Launch:
    """A kernel with everything that stays the same between calls of one shape.

    The first call goes through Triton's dispatcher, which compiles the kernel or finds its binary;
    later ones hand the pointers straight to that binary. Whoever keeps a launch must key it by what
    the dispatcher looks at: device, dtypes, which pointers are None, and all that ``sizes`` and
    ``constants`` are made of. Alignment is asked for per call.

    Args:
        kernel: The kernel; its parameters are pointers, then sizes, then constants.
        programs: Length of the grid.
        sizes: The integers after the pointers.
        warps: Warps of a program.
        constants: The constexprs, in the kernel's order.
    """

    def __init__(
        self, kernel: Any, programs: int, sizes: tuple[int, ...], warps: int, **constants: Any
    ) -> None:
        self.kernel, self.grid, self.sizes, self.constants = (
            kernel,
            (programs, 1, 1),
            sizes,
            constants,
        )
        self.options = {"num_warps": warps, "enable_fp_fusion": True}
        self._run: Callable[..., None] | None = None
        self._tail = (*sizes, *constants.values())

    def __call__(self, is_aligned: bool, *pointers: Tensor | None) -> None:
        """Launch on the current device's current stream.

        Args:
            is_aligned: Whether :func:`aligned` holds for the pointers that come from outside.
            pointers: The kernel's pointers.
        """
        if self._run is not None and is_aligned:
            self._run(*pointers, *self._tail)
            return
        compiled = self.kernel[self.grid](*pointers, *self.sizes, **self.constants, **self.options)
        if is_aligned and isinstance(compiled, CompiledKernel):  # not in the interpreter
            self._run = compiled[self.grid]
