"""Shapes, marks, and fixtures that run kernels on this machine, for the tests of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastflow_kernels.engines.triton import plan
from tests.support import modes
from tests.support.cases import DEVICE
from tests.support.coupling import shape_id
from tests.support.modes import EXECUTED, INTERPRETED, slow_when_executed

# A program takes about 20 ms in the interpreter, so shapes are chosen for few programs.
PLANES = ((2, 7, 4, 5), (3, 2, 3, 3), (2, 1, 2, 3), (1, 9, 7), (2, 6, 2, 4, 2))
ROWS = ((5, 7), (3, 2), (4, 1), (2, 9, 1, 1), (9, 130))
# More than one tile along the pixels, the channels, or both.
TILED = ((1, 3, 1100), (2, 70, 64), (3, 33, 14, 14))
# A batch beyond a grid's 65535 in y and z, and rows too wide for one tile.
EXTREME = ((70_000, 2), (2, 4096), (1, 4097, 1, 2))

in_the_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="is about the interpreter's memory checker"
)
not_interpreted = pytest.mark.skipif(
    INTERPRETED,
    reason="slow or pointless in the interpreter; runs with compiled kernels",
)
without_a_gpu = pytest.mark.skipif(
    not (INTERPRETED or EXECUTED), reason="counts accesses, which a GPU does not report"
)
both_kinds = pytest.mark.parametrize("gin", [False, True], ids=["affine", "gin"])
gin_is_slow_when_executed = pytest.mark.parametrize(
    "gin", [False, pytest.param(True, marks=slow_when_executed)], ids=["affine", "gin"]
)


def shapes(*values: tuple[int, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", values, ids=shape_id)


def shapes_but_shortly(
    values: tuple[tuple[int, ...], ...], keep: tuple[tuple[int, ...], ...]
) -> pytest.MarkDecorator:
    """Parametrize over shapes; all except ``keep`` are slow tests if kernels are executed."""
    return pytest.mark.parametrize(
        "shape",
        [
            pytest.param(
                shape, id=shape_id(shape), marks=() if shape in keep else slow_when_executed
            )
            for shape in values
        ],
    )


@pytest.fixture(scope="module")
def kernels_run() -> Iterator[None]:
    """Run kernels on this machine, in one of the ways of tests/support/modes.py."""
    with modes.kernels_run():
        yield


@pytest.fixture
def default_device() -> Iterator[None]:
    with DEVICE:
        # The mode looks its functions up at the first call: call before sanitize() replaces some.
        torch.empty(0)
        yield


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take one program as enough to keep the GPU busy.

    Kernels then loop over small inputs as they do over large ones.
    """
    monkeypatch.setattr(plan, "BUSY", 1)
    for name in ("FORWARD_ROWS", "BACKWARD_ROWS"):
        monkeypatch.setattr(plan, name, getattr(plan, name)._replace(busy=1))
    plan.make_plan.cache_clear()
    yield
    plan.make_plan.cache_clear()


# pytest looks fixtures up by name in the test's module: import them together with this list.
on_this_machine = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run", "default_device")]
