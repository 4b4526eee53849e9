"""What the tests of the kernels share: shapes, marks, and fixtures that run kernels on this
machine.
"""

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
# more than one tile along the pixels, the channels, both
TILED = ((1, 3, 1100), (2, 70, 64), (3, 33, 14, 14))
# a batch beyond a grid's 65535 in y and z; rows too wide for one tile
EXTREME = ((70_000, 2), (2, 4096), (1, 4097, 1, 2))

in_the_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="is about the interpreter's memory checker"
)
not_interpreted = pytest.mark.skipif(
    INTERPRETED,
    reason="takes the interpreter long, or shows nothing there: compiled kernels run it",
)
without_a_gpu = pytest.mark.skipif(
    not (INTERPRETED or EXECUTED), reason="counts accesses, which a GPU does not tell"
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
    """All but those to keep are for slow runs where kernels are compiled for each."""
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
    """Kernels run on this machine, in one of the ways of tests/support/modes.py."""
    with modes.kernels_run():
        yield


@pytest.fixture
def default_device() -> Iterator[None]:
    with DEVICE:
        # the mode looks up which functions it serves at the first call: before sanitize() replaces
        # some of them
        torch.empty(0)
        yield


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let one program be enough to keep the GPU busy, so that small inputs are walked in loops as
    large ones are.
    """
    monkeypatch.setattr(plan, "BUSY", 1)
    for name in ("FORWARD_ROWS", "BACKWARD_ROWS"):
        monkeypatch.setattr(plan, name, getattr(plan, name)._replace(busy=1))
    plan.make_plan.cache_clear()
    yield
    plan.make_plan.cache_clear()


# Fixtures are found by name in the module that asks for them: import these with it.
on_this_machine = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run", "default_device")]
