"""The three ways in which tests run the kernels: on a GPU, in Triton's interpreter, or compiled and
executed on the CPU.

With TRITON_INTERPRET=1 Triton interprets kernels, for as long as the process lives. Otherwise they
run on a GPU if there is one, and in tests/support/executor if there is none.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from fastflow_kernels import route

INTERPRETED = route.is_interpreted()
EXECUTED = not INTERPRETED and not torch.cuda.is_available()

if EXECUTED:
    from tests.support.executor import EXECUTOR, gpu
    from tests.support.executor import watched as sanitize
else:
    from tests.support.sanitizer import sanitize

__all__ = [
    "EXECUTED",
    "INTERPRETED",
    "kernels_run",
    "sanitize",
    "slow_when_executed",
    "units_of_floor",
]

# For what another test covers as well: compiling its kernels takes a second or so. `kernels` says
# nothing new of a kernel's test.
slow_when_executed = pytest.mark.slow if EXECUTED else pytest.mark.kernels


def kernels_run() -> AbstractContextManager[Any]:
    """A context in which ``backend="triton"`` can be used."""
    return gpu() if EXECUTED else contextlib.nullcontext()


def units_of_floor() -> float:
    """The floor of the accuracy criterion (tests/support/compare.py): 4, and 17 where instructions
    are as wrong as they may be.

    PTX documents ex2.approx and div.full with up to 2 units in the last place each. Times eps, for
    clamp c <= 2 and t = tanh:

    - t = 1 - q with q = 2 / (e + 1) <= 0.445: (2 + 2) q, at most 1.8; so s = c t by 1.8 c, and 1 -
      t^2 by 3.6;
    - exp(s): 2 + 1.8 c = 5.6; scale: 4 (SIGMOID and SOFTPLUS divide and take an exponential), 1 /
      scale: 6;
    - y: 5.6 + 4 = 9.6; the inverse: 5.6 + 6 = 11.6; the gradients of x and a: 5.6 + 4 + 3.6 = 13.2
      of their largest value.

    The gradients of the parameters are sums, whose terms may cancel. They are held to the same, by
    experience and not by derivation.
    """
    return 4.0 if not EXECUTED or EXECUTOR.perturb is None else 4.0 + 13.2
