"""Test what the benchmarks' compiled providers run: ours its kernels, the stock blocks none."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch

from bench.choice import Group
from bench.measure import Settings, Task
from bench.workloads import Workload
from tests.support.cases import DEVICE
from tests.support.graphs import Graphs, calls, operators
from tests.support.modes import kernels_run

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("fused", "fresh_compiler")]

SMALL = Workload("small", (3, 6, 4, 4), {"affine_clamping": 1.9}, (2,), steps=2, subnet="conv")
ONCE = Settings(DEVICE, (2, 2), 0.0, copy_bandwidth=1e10)


def graphs_of(provider: str, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Measure a provider, which checks its results, and return what it has compiled."""
    graphs = Graphs()
    monkeypatch.setenv("FASTFLOW_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    with kernels_run():
        task = Task(Group(kind, SMALL, "float32", mode), ["ours", provider], ONCE)
        outcome = task.measure(mode)[provider]
    assert outcome.failure is None
    assert "skipped" not in outcome.row
    return graphs


@pytest.mark.parametrize(("kind", "blocks"), [("block", 1), ("flow", 2)])
def test_a_compiled_step_of_ours_calls_our_kernels(
    kind: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = graphs_of("ours-compiled", kind, "train", monkeypatch)
    (forward,), (backward,) = graphs.forward, graphs.backward
    assert operators(forward) == Counter(coupling_forward=blocks)
    assert operators(backward) == Counter(coupling_backward=blocks)
    # The stored coefficients are not copied: no compiler fuses a copy with an operator.
    assert "aten.clone" not in calls(forward)


def test_a_compiled_inverse_of_ours_calls_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    (inverse,) = graphs_of("ours-compiled", "block", "inverse", monkeypatch).forward
    assert operators(inverse) == Counter(invert_passive=1, invert_active=1)


@pytest.mark.parametrize("provider", ["anomalib-compiled", "freia-compiled"])
def test_a_compiled_stock_block_calls_no_kernel_of_ours(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = graphs_of(provider, "block", "train", monkeypatch)
    assert graphs.forward
    assert graphs.backward
    assert not any(map(operators, graphs.forward + graphs.backward))
