"""What every test shares: fixed seeds, one CPU thread, full precision on GPUs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("tests.support")  # before it is imported

from tests.support.cases import seed_cpu  # noqa: E402
from tests.support.small_inputs import small_up_to  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # sums in one order; and small tensors are faster so
    # TF32 would make the peers' and the reference's products inexact, and the allowed errors with
    # them.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        seed_cpu(0)


@pytest.fixture
def fused() -> Iterator[None]:
    """Small inputs run the fused path, as large ones do: files of tests with small inputs ask."""
    with small_up_to(0):
        yield


@pytest.fixture
def small(request: pytest.FixtureRequest) -> Iterator[int]:
    """What :data:`tests.support.small_inputs.plain_and_fused` sets."""
    with small_up_to(request.param):
        yield request.param


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile has seen nothing yet, and keeps nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        # what only a GPU can show comes first: a run may be cut off
        items.sort(key=lambda item: "gpu" not in item.keywords)
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once what failed: a run takes minutes, and one that is cut off says nothing at its
    end.
    """
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        said = (
            report.longrepr.reprcrash.message
            if hasattr(report.longrepr, "reprcrash")
            else report.longreprtext
        )
        line = f"\nFAILED {report.nodeid}: {said.partition(chr(10))[0]}"
        print(line, file=sys.__stderr__, flush=True)


def pytest_runtest_logfinish() -> None:
    """End a process of pytest-xdist's whose CUDA context a kernel has wrecked, for it would fail
    every test that follows.

    Another one takes its place; the culprit is reported as failed and once more as crashed.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
