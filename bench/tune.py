"""The kernels with other values of the constants that cut their work: the questions of TUNING.md that a GPU can answer by itself.

    python -m bench.tune [--only TILE_BYTES,BUSY] [--out FILE.jsonl]

One constant is changed at a time. All variants are compiled first, on all cores; then the values of a constant are timed in turn on one
workload, as the benchmarks are (bench/timing.py): device events, inputs that have left the L2. A row is written for each as it is measured,
and a table at the end says what every value takes, as a multiple of the present one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import records, warm
from bench.cases import Workload, workloads
from bench.passes import Passes
from bench.records import Row
from bench.run import DTYPES
from bench.timing import copy_bandwidth, interleaved

REPEATS = (5, 15)
SECONDS = 1.0  # of one group, once it has the least repeats


class Question(NamedTuple):
    """A constant, the module that holds it, the values to try, and where it could matter."""

    constant: str
    module: str
    values: tuple[Any, ...]
    workloads: tuple[str, ...]
    passes: tuple[str, ...]


_PLANES = ("fastflow-wrn50/1", "fastflow-wrn50/3", "fastflow-r18/1 one image")
_ROWS = ("cflow/1", "cflow large batch", "tabular")
# In the order of what they may bring: a run that is cut short has answered what matters most.
QUESTIONS = (
    Question("TILE_BYTES", "launch", (2048, 4096, 8192), _PLANES, ("forward", "backward", "inverse", "reversible")),
    Question("ROW_THREAD_VALUES", "launch", ({4: 2, 8: 1}, {4: 4, 8: 1}, {4: 8, 8: 1}), _ROWS, ("forward", "backward", "inverse")),
    Question("BUSY", "launch", (128, 256, 512), ("cflow large batch", "tabular", "hyperspectral"), ("forward", "backward", "inverse")),
    Question("_COLUMNS_BWD", "coupling", (32, 64, 128), ("fastflow-wrn50/1", "cflow large batch", "hyperspectral"), ("backward",)),
    Question("_SUMS_BLOCK_K", "reduce", (64, 128, 256, 512), ("fastflow-cait", "fastflow-r18/3", "tabular"), ("backward",)),
    Question("_SUMS_WARPS", "reduce", (4, 8), ("fastflow-cait", "fastflow-r18/3", "tabular"), ("backward",)),
)


def _module(name: str) -> ModuleType:
    from fastflow_kernels.kernels import coupling, launch, reduce

    return {"coupling": coupling, "launch": launch, "reduce": reduce}[name]


def present(question: Question) -> Any:
    """The constant's value in the code."""
    return getattr(_module(question.module), question.constant)


def _forget() -> None:
    """Let launches be prepared anew."""
    for module in ("launch", "coupling"):
        for function in vars(_module(module)).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


class Variant:
    """The launches of one workload with one value of a constant, as bench.timing times them: ``ready`` prepares, the calls only launch."""

    def __init__(self, question: Question, value: Any, passes: Passes) -> None:
        self.question, self.value, self.passes = question, value, passes

    def ready(self, mode: str, calls: int) -> list[Callable[[], object]]:
        with mock.patch.object(_module(self.question.module), self.question.constant, self.value):
            _forget()
            self.passes.calls(mode, 1)[0]()  # from here on the launches are prepared
        return self.passes.calls(mode, calls)


Job = tuple[Question, Any, Workload, str]


def jobs(only: Iterable[str] = (), chosen: Iterable[Question] = QUESTIONS) -> list[Job]:
    """The (question, value, workload, dtype), the values of one case in a row."""
    known = {workload.name: workload for workload in workloads("block", on_cpu=False)}
    asked = [question for question in chosen if not only or question.constant in only]
    return [(q, value, known[name], dtype) for q in asked for name in q.workloads for dtype in DTYPES for value in q.values]


def name_of(job: Job) -> str:
    question, value, workload, dtype = job
    return f"{question.constant}={value} {workload.name} {dtype}"


def compile_variant(job: Job, device: str) -> None:
    """Launch everything once, so that Triton's cache has it."""
    question, value, workload, dtype = job
    variant = Variant(question, value, Passes(workload, getattr(torch, dtype), torch.device(device), most=1))
    for mode in question.passes:
        variant.ready(mode, 0)


def measure(todo: list[Job], device: torch.device, keep: Callable[[Row], None], say: Callable[[str], None]) -> None:
    """Time all values of each case in turn, and hand over a row for each."""
    cases: dict[tuple[Question, str, str], list[Job]] = defaultdict(list)
    for job in todo:
        cases[job[0], job[2].name, job[3]].append(job)
    for (question, name, dtype), alike in cases.items():
        workload = alike[0][2]
        passes = Passes(workload, getattr(torch, dtype), device)
        variants = {str(value): Variant(question, value, passes) for _, value, *_ in alike}
        for mode in question.passes:
            times = interleaved(variants, mode, device, REPEATS, SECONDS)
            medians = {value: statistics.median(found.seconds) for value, found in times.items()}
            for value, found in times.items():
                p20, *_, p80 = statistics.quantiles(found.seconds, n=5)
                keep(
                    {
                        "kind": "tune",
                        "workload": name,
                        "shape": list(workload.shape),
                        "mode": mode,
                        "dtype": dtype,
                        "provider": f"{question.constant}={value}",
                        "median_us": medians[value] * 1e6,
                        "p20_us": p20 * 1e6,
                        "p80_us": p80 * 1e6,
                        "ratio": medians[value] / medians[str(present(question))],
                    }
                )
            say(f"{question.constant} {name} {mode} {dtype}: " + ", ".join(f"{v} {t * 1e6:,.1f} us" for v, t in medians.items()))
    _forget()


def table(rows: list[Row]) -> str:
    """For each constant and value: time as a multiple of the present value's, geometric mean, least and largest over all cases."""
    ratios: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        ratios[row["provider"]].append(row)
    lines = ["| value | mean of the present one's time | least | largest, where |", "|---|---:|---:|---|"]
    for provider, alike in ratios.items():
        mean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in alike))
        least, most = (pick(alike, key=lambda row: row["ratio"]) for pick in (min, max))
        where = f"{most['workload']}, {most['mode']}, {most['dtype']}"
        lines.append(f"| {provider} | {mean:.3f} | {least['ratio']:.3f} | {most['ratio']:.3f}, {where} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Time the kernels with other values of their constants.")
    parser.add_argument("--only", default="", help=f"constants, of {','.join(q.constant for q in QUESTIONS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("out/tune.jsonl"), help="a .jsonl file to append the rows to")
    options = parser.parse_args(arguments)
    only = [name for name in options.only.split(",") if name]
    if unknown := set(only) - {question.constant for question in QUESTIONS}:
        parser.error(f"--only: unknown constants {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        raise SystemExit("bench.tune: torch finds no GPU")
    device, started, rows = torch.device("cuda"), time.perf_counter(), []
    todo = jobs(only)
    broken = warm.in_parallel({name_of(job): partial(compile_variant, job, "cuda") for job in todo})
    where = records.provenance(device) | {"copy_gbs": copy_bandwidth(device) * 1e-9}

    def keep(row: Row) -> None:
        rows.append(row | where)
        records.append(rows[-1:], options.out)

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {line}", file=sys.stderr, flush=True)

    measure([job for job in todo if name_of(job) not in broken], device, keep, say)
    print(table(rows))
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
