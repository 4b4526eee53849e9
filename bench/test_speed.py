"""The benchmarks, run by pytest-benchmark: one test per workload, mode, dtype and provider.

    make bench BENCH_ARGS="--workloads fastflow-wrn50 --modes train"

The providers of a group are timed together, in turn, when its first test runs; each test then hands
its own samples to pytest-benchmark, whose table and JSON so hold the measured figures. Everything
else about a figure is in the rows (bench/records.py).
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import Workload
from bench.run import Run


class Replay:
    """A clock that moves only as it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def feed(self, benchmark: Any, samples: list[float]) -> None:
        """Let pytest-benchmark time a call that takes as long as each of the samples did."""
        self.now, remaining = 0.0, iter(samples)

        def advance() -> None:
            self.now += next(remaining)

        benchmark.pedantic(advance, rounds=len(samples))


REPLAY = Replay()


def report(
    benchmark: Any, run: Run, kind: str, workload: Workload, mode: str, dtype: str, provider: str
) -> None:
    outcome = run.outcome(kind, workload, mode, dtype, provider)
    if outcome is None:
        pytest.skip("the budget is spent")
    if outcome.failure:
        pytest.fail(outcome.failure, pytrace=False)
    if outcome.times is None:
        pytest.skip(outcome.row["skipped"])
    benchmark.group = f"{kind}: {workload.name} {workload.shape}, {mode}, {dtype}"
    benchmark.extra_info.update(outcome.row)
    REPLAY.feed(benchmark, outcome.times.seconds)


@pytest.mark.benchmark(timer=REPLAY)
def test_block(
    benchmark: Any, run: Run, workload: Workload, mode: str, dtype: str, provider: str
) -> None:
    """One block without its subnet's cost."""
    report(benchmark, run, "block", workload, mode, dtype, provider)


@pytest.mark.benchmark(timer=REPLAY)
def test_flow(
    benchmark: Any, run: Run, workload: Workload, mode: str, dtype: str, provider: str
) -> None:
    """A whole flow with its real subnets."""
    report(benchmark, run, "flow", workload, mode, dtype, provider)


@pytest.mark.benchmark(timer=REPLAY)
def test_sweep(
    benchmark: Any, run: Run, workload: Workload, mode: str, dtype: str, provider: str
) -> None:
    """One block as batch, channels and pixels grow."""
    report(benchmark, run, "sweep", workload, mode, dtype, provider)
