"""The three ways in which tests run the kernels.

With TRITON_INTERPRET=1, Triton interprets kernels for the lifetime of the process. Otherwise they
run on a GPU if there is one. Without one, they are compiled and executed on the CPU by
tests/support/executor.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from fastflow_kernels.engines import available

INTERPRETED = available.is_interpreted()
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

# For cases that another test covers too, because compiling their kernels takes about a second. The
# mark `kernels` changes nothing: a kernel's test has it already.
slow_when_executed = pytest.mark.slow if EXECUTED else pytest.mark.kernels


def kernels_run() -> AbstractContextManager[Any]:
    """Return a context in which ``backend="triton"`` can be used."""
    return gpu() if EXECUTED else contextlib.nullcontext()


def units_of_floor() -> float:
    """Return the floor of the accuracy criterion (tests/support/compare.py), in eps * magnitude.

    It is 4 by default, and 17.2 if the executor makes instructions as wrong as they may be. PTX
    documents errors of up to 2 units in the last place for ex2.approx and div.full each. For clamp
    c <= 2 and t = tanh, the errors in units of eps are:

    - t = 1 - q with q = 2 / (e + 1) <= 0.445: (2 + 2) q, at most 1.8
    - s = c t: 1.8 c
    - 1 - t^2: 3.6
    - exp(s): 2 + 1.8 c = 5.6
    - scale: 4, because SIGMOID and SOFTPLUS divide and take an exponential
    - 1 / scale: 6
    - y: 5.6 + 4 = 9.6
    - inverse: 5.6 + 6 = 11.6
    - gradients of x and a: 5.6 + 4 + 3.6 = 13.2 of their largest value

    The gradients of the parameters are sums whose terms may cancel. They have the same floor, by
    experience and not by derivation.
    """
    return 4.0 if not EXECUTED or EXECUTOR.perturb is None else 4.0 + 13.2
