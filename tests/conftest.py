"""Settings and fixtures of all tests: fixed seeds, one CPU thread, full precision on GPUs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("tests.support")  # must come before its import

from tests.support.cases import seed_cpu  # noqa: E402
from tests.support.small_inputs import small_up_to  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # one order of summation, and small tensors are faster
    # TF32 would make the products of the peers and the reference inexact, and the criterion wider.
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
    """Let small inputs run the fused path, as large ones do. Tests with small inputs request it."""
    with small_up_to(0):
        yield


@pytest.fixture
def small(request: pytest.FixtureRequest) -> Iterator[int]:
    """Set the limit of small inputs, as :data:`tests.support.small_inputs.plain_and_fused` asks."""
    with small_up_to(request.param):
        yield request.param


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Reset torch.compile before and after the test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        # Tests that need a GPU come first, because a run may be interrupted.
        items.sort(key=lambda item: "gpu" not in item.keywords)
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print each failure at once.

    A run takes minutes, and pytest prints its summary only if the run reaches its end.
    """
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        message = (
            report.longrepr.reprcrash.message
            if hasattr(report.longrepr, "reprcrash")
            else report.longreprtext
        )
        line = f"\nFAILED {report.nodeid}: {message.partition(chr(10))[0]}"
        print(line, file=sys.__stderr__, flush=True)


def pytest_runtest_logfinish() -> None:
    """End a pytest-xdist worker if a kernel has broken its CUDA context.

    Otherwise every later test of this worker would fail. Another worker takes its place. The test
    that broke the context is reported twice, as failed and as crashed.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
