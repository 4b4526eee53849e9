"""Executes the kernels that Triton compiles, on CPU tensors, without a GPU. It needs Triton 3.6 or
newer.

``program.py`` decodes the PTX that Triton compiles for sm_90, ``machine.py`` runs every thread of
many CTAs at once, a register being a numpy array with one entry per thread. ``driver.py`` puts both
where Triton expects a GPU: inside ``gpu()`` every kernel takes CPU tensors, and so does the
package's ``backend="triton"``::

    with gpu(), watched() as launches:
        y = torch.empty_like(x)
        kernel[(8,)](x, y, x.numel(), BLOCK=128)

What goes wrong raises :class:`Fault`, with the kernel, the line of its source, the pointer and the
thread. It finds what Triton's interpreter cannot: misaligned vectors, accesses outside the tensor
that a pointer came from, threads that store to one element or load what another one stores, races
in shared memory between two barriers, barriers that not all threads reach, 32-bit overflow of
offsets, loops that never end, a kept binary that is launched with arguments it was not compiled
for, and what the approximate instructions may do at worst (``EXECUTOR.perturb``). Tensors made
inside ``watched()`` are filled with NaNs: reading them is a fault, and an output that was never
written stays NaN.

It is stricter than a GPU: no element may be stored twice in a launch, or loaded by one thread and
stored by another, even with a barrier between. It does not cover ptxas and what lies below (SASS,
registers, speed), registers that nobody wrote, races between the instructions of one warp, fresh
memory of integers, streams and graphs, and targets other than sm_90. It knows the instructions that
the package's kernels need and a few more, not those of ``tl.dot``, atomics, ``tl.sin``,
``tl.cumsum`` or ``tl.device_print``: those raise :class:`Unsupported`.
"""

import pytest

pytest.importorskip("triton", minversion="3.6")  # older ones launch otherwise

from tests.support.executor.driver import EXECUTOR, gpu, watched
from tests.support.executor.program import Program
from tests.support.executor.values import Fault, Unsupported

__all__ = ["EXECUTOR", "Fault", "Program", "Unsupported", "gpu", "watched"]
