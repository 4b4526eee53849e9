"""Options of the benchmarks, the one run that its tests share, and a stand-in where
pytest-benchmark is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.providers import PROVIDERS
from bench.run import DTYPES, KINDS, Run
from bench.subject import MODES

RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of fastflow_kernels")
    group.addoption("--kinds", help=f"of {','.join(KINDS)} (default: all)")
    group.addoption(
        "--workloads",
        help="only those whose name is, or contains, one of these, separated by commas, in this order",
    )
    group.addoption("--modes", help=f"of {','.join(MODES)} (default: all; train alone in sweeps)")
    group.addoption(
        "--dtypes", help=f"of {','.join(DTYPES)} (default: both; float32 alone in sweeps)"
    )
    group.addoption(
        "--providers", help=f"of {','.join(PROVIDERS)} (default: the eager ones, see --compiled)"
    )
    group.addoption(
        "--compiled",
        action="store_true",
        help="also those compiled by torch.compile, and on a GPU those in CUDA graphs",
    )
    group.addoption("--quick", action="store_true", help="few repetitions of a few workloads")
    group.addoption(
        "--budget",
        type=float,
        default=float("inf"),
        help="seconds after which no further group is begun",
    )
    group.addoption("--threads", type=int, default=1, help="CPU threads (default: 1)")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--record", action="store_true", help="append the rows under bench/results")
    group.addoption(
        "--out",
        type=Path,
        default=Path("out/bench"),
        help="a folder or a .jsonl file to append the rows to, without --record",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("threads"))
    # TF32 would make the stock blocks' products inexact, and the comparison one of different
    # precisions.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if not config.pluginmanager.hasplugin("benchmark"):
        config.addinivalue_line(
            "markers", "benchmark(timer): options of pytest-benchmark, which is not installed"
        )
        config.pluginmanager.register(_StandIn())
    config.stash[RUN] = Run(config)


class _StandIn:
    """The fixture ``benchmark`` as far as it is used here, without pytest-benchmark's table: the
    rows are all there is.
    """

    class Benchmark:
        def __init__(self) -> None:
            self.group, self.extra_info = None, {}

        def pedantic(self, target: Callable[[], None], rounds: int) -> None:
            for _ in range(rounds):
                target()

    @pytest.fixture
    def benchmark(self) -> Benchmark:
        return self.Benchmark()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" in metafunc.fixturenames:
        run, kind = metafunc.config.stash[RUN], metafunc.function.__name__.removeprefix("test_")
        names = run.providers()
        cases = [(*group, name) for group in run.groups(kind) for name in names]
        ids = [
            f"{w.name}-{'x'.join(map(str, w.shape))}-{mode}-{dtype}-{name}"
            for w, mode, dtype, name in cases
        ]
        metafunc.parametrize(("workload", "mode", "dtype", "provider"), cases, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what stands for a kind that was not chosen."""
    unchosen = [
        item
        for item in items
        if item.path.parent == Path(__file__).parent and item.name.endswith("[NOTSET]")
    ]
    items[:] = [item for item in items if item not in unchosen]
    config.hook.pytest_deselected(items=unchosen)


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """The run, its bandwidth measured."""
    run = request.config.stash[RUN]
    run.begin()
    yield run
    run.task = run.group = None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[RUN]
    if run.left_out:
        terminalreporter.section(f"left out: the budget of {run.budget:.0f} s was spent")
        for label in run.left_out:
            terminalreporter.write_line(label)
