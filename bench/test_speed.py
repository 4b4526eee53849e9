"""Time each block and flow with pytest-benchmark, in float32.

    python -m pytest bench/test_speed.py -k "block and cflow/1 and train"

There is one test for each workload, mode and provider. For ratios use ``python -m bench compare``,
which checks the results first and lets the providers take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bench.providers import EAGER, why_not
from bench.subject import MODES, Subject, draw_samples
from bench.workloads import KINDS, workloads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 15
CASES = [
    pytest.param(kind, workload, mode, id=f"{kind} {workload.name} {mode}")
    for kind in KINDS
    for workload in workloads(kind, DEVICE.type == "cpu")
    if kind != "sweep"
    for mode in MODES
]


@pytest.mark.parametrize("provider", EAGER, ids=lambda provider: provider.name)
@pytest.mark.parametrize(("kind", "workload", "mode"), CASES)
def test_speed(benchmark: Any, kind: str, workload: Any, mode: str, provider: Any) -> None:
    if reason := why_not(provider, workload, DEVICE.type == "cpu"):
        pytest.skip(reason)
    samples = draw_samples(kind, workload, torch.float32, DEVICE)
    subject = Subject(kind, workload, provider, samples)
    benchmark.group = f"{kind} {workload.name} {workload.shape} {mode}"

    def setup() -> tuple[Sequence[Callable[[], object]], dict[str, object]]:
        return subject.ready(mode, 1), {}  # runs the forward pass that a backward pass needs

    def run(call: Callable[[], object]) -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=setup, rounds=ROUNDS, warmup_rounds=3)
