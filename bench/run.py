"""One run of the benchmarks: what was chosen, and the group that is being measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

import pytest
import torch

from bench import records
from bench.cases import QUICK, Workload, workloads
from bench.measure import Outcome, Settings, Task
from bench.providers import PROVIDERS
from bench.records import Row
from bench.subject import MODES
from bench.timing import copy_bandwidth

KINDS = ("block", "flow", "sweep")
DTYPES = ("float32", "bfloat16")


class Run:
    """One run: its choice of workloads, modes, dtypes and providers, and the group that is being
    measured.
    """

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
        # a GPU's samples are short, and its time is dear
        repeats, seconds = ((5, 25), 8.0) if self.device.type == "cpu" else ((5, 11), 0.8)
        repeats, seconds = ((3, 5), 1.0) if self.quick else (repeats, seconds)
        self.settings = Settings(self.device, repeats, seconds, bandwidth)
        self.provenance = records.provenance(self.device)
        self.say(
            f"{self.provenance['device_name']}: copies at {bandwidth * 1e-9:.1f} GB/s; rows go to "
            f"{self.target}"
        )

    def groups(self, kind: str) -> list[tuple[Workload, str, str]]:
        """The (workload, mode, dtype) to measure, the modes of one workload in a row."""
        if kind not in self._chosen("kinds", KINDS):
            return []
        modes = self._chosen("modes", MODES, ["train"] if kind == "sweep" else None)
        dtypes = self._chosen("dtypes", DTYPES, ["float32"] if kind == "sweep" else None)
        found, parts = workloads(kind, self.device.type == "cpu"), self._given("workloads")
        if parts:
            found = _named(found, parts)
        elif self.quick:
            found = [w for w in found if w.name in QUICK[kind]]
        return [(w, m, d) for w in found for d in dtypes for m in modes]

    def providers(self) -> list[str]:
        """The providers, and with them those of ours that they are compared with."""
        executions = {"eager"}
        if self.config.getoption("compiled"):
            executions |= {"compiled"} if self.device.type == "cpu" else {"compiled", "graphs"}
        chosen = self._chosen(
            "providers",
            PROVIDERS,
            [p.name for p in PROVIDERS.values() if p.execution in executions],
        )
        needed = {"ours", *chosen, *(PROVIDERS[name].our_base for name in chosen)}
        return [name for name in PROVIDERS if name in needed]

    def _chosen(
        self, option: str, known: Iterable[str], default: list[str] | None = None
    ) -> list[str]:
        """The names given for an option, in the known order; the default, or all, if none were."""
        given = self._given(option)
        if unknown := [name for name in given if name not in known]:
            raise pytest.UsageError(
                f"--{option}: expected names among {', '.join(known)}; got {', '.join(unknown)}"
            )
        return [name for name in known if name in given] or default or list(known)

    def _given(self, option: str) -> list[str]:
        return [part for part in (self.config.getoption(option) or "").split(",") if part]

    def outcome(
        self, kind: str, workload: Workload, mode: str, dtype: str, provider: str
    ) -> Outcome | None:
        """What became of a provider; its whole group is measured, and its rows are written, when
        the first is asked for.
        """
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
            self.task = (
                key[:-1],
                Task(kind, workload, getattr(torch, dtype), self.providers(), self.settings),
            )
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
            print(
                f"[{time.perf_counter() - self.started:4.0f} s] {line}", file=sys.stderr, flush=True
            )


def _named(found: list[Workload], parts: list[str]) -> list[Workload]:
    """Those whose name contains a part, in the order of the parts; a part that is a whole name
    stands for nothing else.
    """
    names = {w.name for w in found}
    chosen = {
        id(w): w
        for part in parts
        for w in found
        if (w.name == part if part in names else part in w.name)
    }
    return list(chosen.values())


def _label(kind: str, name: str, shape: tuple[int, ...], dtype: str, mode: str) -> str:
    return f"{kind} {name} {'x'.join(map(str, shape))} {mode} {dtype}"


def _in_a_line(outcomes: dict[str, Outcome]) -> str:
    parts = []
    for name, outcome in outcomes.items():
        if outcome.failure:
            parts.append(f"{name} FAILED ({outcome.failure})")
        elif outcome.times:
            parts.append(f"{name} {_figure(outcome.row, name, 'median_us', 'ratio')}")
            if "call_bytes" in outcome.row:  # on a GPU
                parts[-1] += f", as called {_figure(outcome.row, name, 'wall_us', 'ratio_wall')}"
    return "; ".join(parts)


def _figure(row: Row, name: str, time: str, ratio: str) -> str:
    times_ours = "" if row[ratio] is None or name.startswith("ours") else f" ({row[ratio]:.2f}x)"
    return f"{row[time]:,.0f} us{times_ours}"
