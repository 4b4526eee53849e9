"""Execute the kernels that Triton compiles on CPU tensors, without a GPU (Triton 3.6 or newer).

``program.py`` decodes the PTX that Triton compiles for sm_90. ``machine.py`` runs every thread of
many CTAs at once; a register is a numpy array with one entry per thread. ``driver.py`` puts both
where Triton expects a GPU: inside ``gpu()`` every kernel takes CPU tensors, and so does the
package's ``backend="triton"``::

    with gpu(), watched() as launches:
        y = torch.empty_like(x)
        kernel[(8,)](x, y, x.numel(), BLOCK=128)

An error raises :class:`Fault`, which names the kernel, the line of its source, the pointer and the
thread. The executor finds what Triton's interpreter cannot:

- misaligned vectors, and accesses outside the tensor that a pointer came from;
- threads that store to one element, or load what another thread stores;
- races in shared memory between two barriers, and barriers that not all threads reach;
- 32-bit overflow of offsets, and loops that never end;
- a cached binary that is launched with arguments it was not compiled for;
- the worst that the approximate instructions may do (``EXECUTOR.perturb``).

Tensors made inside ``watched()`` are filled with NaNs. Reading them is a fault, and an output that
was never written stays NaN.

The executor is stricter than a GPU. No element may be stored twice in a launch, or loaded by one
thread and stored by another, even with a barrier between.

It does not cover:

- ptxas and what lies below (SASS, registers, speed), and targets other than sm_90;
- registers that were never written, and fresh memory of integers;
- races between the instructions of one warp;
- streams and graphs.

It knows the instructions that the package's kernels need and a few more. Those of ``tl.dot``,
atomics, ``tl.sin``, ``tl.cumsum`` and ``tl.device_print`` raise :class:`Unsupported`.
"""

import pytest

pytest.importorskip("triton", minversion="3.6")  # older versions launch in another way

from tests.support.executor.driver import EXECUTOR, gpu, watched
from tests.support.executor.program import Program
from tests.support.executor.values import Fault, Unsupported

__all__ = ["EXECUTOR", "Fault", "Program", "Unsupported", "gpu", "watched"]
