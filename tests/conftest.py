"""What every test shares: fixed seeds, one CPU thread, full precision on GPUs."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from fastflow_kernels import dispatch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # sums in one order; and small tensors are faster so
    # TF32 would make the peers' and the reference's products inexact, and the allowed errors with
    # them.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _small_inputs_run_fused(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests are small, and what they are about is the fused path; those marked ``plain`` get what
    "auto" gives small inputs.
    """
    if "plain" not in request.keywords:
        monkeypatch.setattr(dispatch, "SMALL", 0)


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
