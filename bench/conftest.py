"""Options of the benchmarks, the one run that its tests share, and a stand-in where pytest-benchmark is not installed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import records
from bench.cases import QUICK, Workload, workloads
from bench.measure import Outcome, Settings, Task
from bench.providers import PROVIDERS
from bench.subject import MODES
from bench.timing import copy_bandwidth

KINDS = ("block", "flow", "sweep")
DTYPES = ("float32", "bfloat16")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of fastflow_kernels")
    group.addoption("--kinds", help=f"of {','.join(KINDS)} (default: all)")
    group.addoption("--workloads", help="only those whose name contains one of these, separated by commas")
    group.addoption("--modes", help=f"of {','.join(MODES)} (default: all; train alone in sweeps)")
    group.addoption("--dtypes", help=f"of {','.join(DTYPES)} (default: both; float32 alone in sweeps)")
    group.addoption("--providers", help=f"of {','.join(PROVIDERS)} (default: those called eagerly)")
    group.addoption("--compiled", action="store_true", help="also those compiled by torch.compile, and on a GPU those in CUDA graphs")
    group.addoption("--quick", action="store_true", help="few repetitions of a few workloads")
    group.addoption("--budget", type=float, default=float("inf"), help="seconds after which no further group is begun")
    group.addoption("--threads", type=int, default=1, help="CPU threads (default: 1)")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--record", action="store_true", help="append the rows under bench/results")
    group.addoption("--out", type=Path, default=Path("out/bench"), help="a folder or a .jsonl file to append the rows to, without --record")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("threads"))
    # TF32 would make the stock blocks' products inexact, and the comparison one of different precisions.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if not config.pluginmanager.hasplugin("benchmark"):
        config.addinivalue_line("markers", "benchmark(timer): options of pytest-benchmark, which is not installed")
        config.pluginmanager.register(_StandIn())
    config.stash[RUN] = Run(config)


class _StandIn:
    """The fixture ``benchmark`` as far as it is used here, without pytest-benchmark's table: the rows are all there is."""

    class Benchmark:
        def __init__(self) -> None:
            self.group, self.extra_info = None, {}

        def pedantic(self, target: Callable[[], None], rounds: int) -> None:
            for _ in range(rounds):
                target()

    @pytest.fixture
    def benchmark(self) -> Benchmark:
        return self.Benchmark()


class Run:
    """One run: its choice of workloads, modes, dtypes and providers, and the group that is being measured."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.device = torch.device(config.getoption("device"))
        self.quick, self.budget = config.getoption("quick"), config.getoption("budget")
        self.target = records.RESULTS if config.getoption("record") else config.getoption("out")
        self.started = time.perf_counter()
        self.left_out: list[str] = []
        self.task: tuple[tuple, Task] | None = None
        self.group: tuple[tuple, dict[str, Outcome]] | None = None

    def begin(self) -> None:
        """Measure what is measured once."""
        bandwidth = copy_bandwidth(self.device)
        self.settings = Settings(self.device, (3, 5) if self.quick else (5, 25), 1.0 if self.quick else 8.0, bandwidth)
        self.provenance = records.provenance(self.device)
        self.say(f"{self.provenance['device_name']}: copies at {bandwidth * 1e-9:.1f} GB/s; rows go to {self.target}")

    def groups(self, kind: str) -> list[tuple[Workload, str, str]]:
        """The (workload, mode, dtype) to measure, the modes of one workload in a row."""
        if kind not in self._chosen("kinds", KINDS):
            return []
        modes, dtypes = (("train",), ("float32",)) if kind == "sweep" else (MODES, DTYPES)
        found = workloads(kind, self.device.type == "cpu")
        parts = self._option("workloads")
        if parts or self.quick:
            found = [w for w in found if any(part in w.name for part in parts) or (not parts and w.name in QUICK[kind])]
        return [(w, m, d) for w in found for d in self._chosen("dtypes", dtypes) for m in self._chosen("modes", modes)]

    def providers(self) -> list[str]:
        """The providers, ours always among them."""
        on_cpu, compiled = self.device.type == "cpu", self.config.getoption("compiled")
        default = [p.name for p in PROVIDERS.values() if p.execution == "eager" or (compiled and not (on_cpu and p.execution == "graphs"))]
        chosen = self._chosen("providers", tuple(PROVIDERS), tuple(default))
        needed = {"ours", *(PROVIDERS[name].our_base for name in chosen)}
        return [name for name in PROVIDERS if name in needed or name in chosen]

    def _option(self, name: str) -> list[str]:
        return [part for part in (self.config.getoption(name) or "").split(",") if part]

    def _chosen(self, name: str, known: tuple[str, ...], default: tuple[str, ...] | None = None) -> list[str]:
        chosen = self._option(name)
        everything = {"kinds": KINDS, "modes": MODES, "dtypes": DTYPES}.get(name, known)
        if unknown := [part for part in chosen if part not in everything]:
            raise pytest.UsageError(f"--{name}: {', '.join(unknown)} is not among {', '.join(everything)}")
        return chosen or list(known if default is None else default)

    def outcome(self, kind: str, workload: Workload, mode: str, dtype: str, provider: str) -> Outcome | None:
        """What became of a provider; its whole group is measured, and its rows are written, when the first is asked for."""
        key = (kind, workload.name, workload.shape, dtype, mode)
        if self.group is None or self.group[0] != key:
            if time.perf_counter() - self.started > self.budget:
                self.left_out += [_label(*key)] if _label(*key) not in self.left_out else []
                return None
            self.group = (key, self._measure(key, workload))
        return self.group[1][provider]

    def _measure(self, key: tuple, workload: Workload) -> dict[str, Outcome]:
        kind, _, _, dtype, mode = key
        if self.task is None or self.task[0] != key[:-1]:
            self.task = self.group = None  # free the memory of the last one first
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.task = (key[:-1], Task(kind, workload, getattr(torch, dtype), self.providers(), self.settings))
        outcomes = self.task[1].measure(mode)
        if outcomes["ours"].failure is None:
            for outcome in outcomes.values():
                outcome.row |= self.provenance
            records.append((o.row for o in outcomes.values() if o.failure is None), self.target)
        self.say(f"{_label(*key)}: {_in_a_line(outcomes)}")
        return outcomes

    def say(self, line: str) -> None:
        """A line on the terminal, also where pytest captures output."""
        capture = self.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"[{time.perf_counter() - self.started:4.0f} s] {line}", file=sys.stderr, flush=True)


RUN = pytest.StashKey[Run]()


def _label(kind: str, name: str, shape: tuple[int, ...], dtype: str, mode: str) -> str:
    return f"{kind} {name} {'x'.join(map(str, shape))} {mode} {dtype}"


def _in_a_line(outcomes: dict[str, Outcome]) -> str:
    parts = []
    for name, outcome in outcomes.items():
        if outcome.failure:
            parts.append(f"{name} FAILED")
        elif outcome.times:
            ratio = "" if name.startswith("ours") else f" ({outcome.row['ratio']:.2f}x)"
            parts.append(f"{name} {outcome.row['median_us']:,.0f} us{ratio}")
    return ", ".join(parts)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" in metafunc.fixturenames:
        run, kind = metafunc.config.stash[RUN], metafunc.function.__name__.removeprefix("test_")
        names = run.providers()
        cases = [(*group, name) for group in run.groups(kind) for name in names]
        ids = [f"{w.name}-{'x'.join(map(str, w.shape))}-{mode}-{dtype}-{name}" for w, mode, dtype, name in cases]
        metafunc.parametrize(("workload", "mode", "dtype", "provider"), cases, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what stands for a kind that was not chosen."""
    unchosen = [item for item in items if item.path.parent == Path(__file__).parent and item.name.endswith("[NOTSET]")]
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
