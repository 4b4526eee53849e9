"""What every test shares: fixed seeds, one CPU thread, full precision on GPUs."""

from __future__ import annotations

import pytest
import torch

from fastflow_kernels import dispatch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # sums in one order; and small tensors are faster so
    # TF32 would make the peers' and the reference's products inexact, and the allowed errors with them.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _small_inputs_run_fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are small, and what they are about is the fused path; those marked ``plain`` get what "auto" gives small inputs."""
    if "plain" not in request.keywords:
        monkeypatch.setattr(dispatch, "SMALL", 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
