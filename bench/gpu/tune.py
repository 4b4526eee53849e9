"""The kernels with other values of the constants that cut their work: the questions of TUNING.md
that a GPU can answer by itself.

    python -m bench.gpu.tune [--only rows,tile] [--out FILE.jsonl]

All variants are compiled first, on all cores. Then the settings of a question are timed in turn on
one workload, as the benchmarks are (bench/timing.py): the device's own time, inputs that have left
the L2. A row is written for each as it is measured, and a table at the end says what every setting
takes, as a multiple of the present one.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import records
from bench.gpu import warm
from bench.gpu.passes import Passes
from bench.records import Row
from bench.timing import copy_bandwidth, interleaved
from bench.workloads import DTYPES, Workload, workloads
from fastflow_kernels.engines.triton import plan

REPEATS = (5, 9)
SECONDS = 0.4  # of one group, once it has the least repeats


Setting = tuple[str, str, Any]


class Question(NamedTuple):
    """Values to try together, the present ones first, and where they could matter.

    Attributes:
        name: What is asked, for the command line.
        settings: Each a value for every constant that it names, as (module, constant, value).
        workloads, passes: Where.
    """

    name: str
    settings: tuple[tuple[Setting, ...], ...]
    workloads: tuple[str, ...]
    passes: tuple[str, ...]


def tried(module: str, constant: str, *values: Any) -> tuple[tuple[Setting, ...], ...]:
    return tuple(((module, constant, value),) for value in values)


def _rows(kind: str) -> tuple[tuple[Setting, ...], ...]:
    """Cuts of the rows, the present one first."""
    now = getattr(plan, kind)
    other = [plan.RowTiles(values, busy) for values in (4, 2, 1) for busy in (256, 512, 1024)]
    return tried("plan", kind, now, *(cut for cut in other if cut != now))


_PLANES = ("fastflow-wrn50/1", "fastflow-wrn50/3", "fastflow-r18/1")
_ROWS = ("cflow/1", "cflow large batch", "tabular", "hyperspectral")
# In the order of what they may bring: a run that is cut short has answered what matters most.
QUESTIONS = (
    Question("rows", _rows("BACKWARD_ROWS"), _ROWS, ("backward", "reversible")),
    Question("forward-rows", _rows("FORWARD_ROWS"), _ROWS, ("forward", "inverse")),
    Question(
        "tile",
        tried("plan", "TILE_BYTES", 4096, 2048, 8192),
        _PLANES,
        ("forward", "backward", "inverse", "reversible"),
    ),
    Question(
        "columns",
        tried("plan", "COLUMNS_WITH_SUMS", 64, 32, 128),
        ("fastflow-wrn50/1", "fastflow-wrn50/3"),
        ("backward",),
    ),
    Question(
        "sums",
        tried("plan", "SUMS_BLOCK_GROUPS", 256, 64, 128, 512),
        ("fastflow-cait", "fastflow-r18/3", "tabular"),
        ("backward",),
    ),
)


def module_of(name: str) -> ModuleType:
    from fastflow_kernels.engines.triton import backward, forward, inverse

    return {"plan": plan, "backward": backward, "forward": forward, "inverse": inverse}[name]


def label(setting: tuple[Setting, ...]) -> str:
    """The constants' values, as rows name them."""
    return ", ".join(
        f"{constant}={tuple(value) if isinstance(value, tuple) else value}"
        for _, constant, value in setting
    )


@contextlib.contextmanager
def _set(setting: tuple[Setting, ...]) -> Iterator[None]:
    """The constants with these values, and launches prepared anew."""
    with contextlib.ExitStack() as stack:
        for module, constant, value in setting:
            stack.enter_context(mock.patch.object(module_of(module), constant, value))
        _forget()
        yield


def _forget() -> None:
    """Let launches be prepared anew."""
    for module in ("plan", "backward", "forward", "inverse"):
        for function in vars(module_of(module)).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


class Variant:
    """The launches of one workload with other values of constants: ``ready`` prepares them, the
    calls only launch.
    """

    def __init__(self, setting: tuple[Setting, ...], passes: Passes) -> None:
        self.setting, self.passes = setting, passes

    def ready(self, mode: str, calls: int) -> list[Callable[[], object]]:
        with _set(self.setting):
            self.passes.calls(mode, 1)[0]()  # from here on the launches are prepared
        return self.passes.calls(mode, calls)


Job = tuple[Question, tuple[Setting, ...], Workload, str]


def jobs(only: Iterable[str] = (), chosen: Iterable[Question] = QUESTIONS) -> list[Job]:
    """The (question, setting, workload, dtype), the settings of one case in a row."""
    known = {workload.name: workload for workload in workloads("block", on_cpu=False)}
    asked = [question for question in chosen if not only or question.name in only]
    return [
        (q, setting, known[name], dtype)
        for q in asked
        for name in q.workloads
        for dtype in DTYPES
        for setting in q.settings
    ]


def name_of(job: Job) -> str:
    _, setting, workload, dtype = job
    return f"{label(setting)} {workload.name} {dtype}"


def compile_variant(job: Job, device: str) -> None:
    """Launch everything once, so that Triton's cache has it."""
    question, setting, workload, dtype = job
    variant = Variant(
        setting, Passes(workload, getattr(torch, dtype), torch.device(device), most=1)
    )
    for mode in question.passes:
        variant.ready(mode, 0)


def measure(
    todo: list[Job], device: torch.device, keep: Callable[[Row], None], say: Callable[[str], None]
) -> None:
    """Time all settings of each case in turn, and hand over a row for each."""
    cases: dict[tuple[str, str, str], list[Job]] = defaultdict(list)
    for job in todo:
        cases[job[0].name, job[2].name, job[3]].append(job)
    for (asked, name, dtype), alike in cases.items():
        question, _, workload, _ = alike[0]
        passes = Passes(workload, getattr(torch, dtype), device)
        variants = {label(setting): Variant(setting, passes) for _, setting, *_ in alike}
        present = label(question.settings[0])
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
                        "provider": value,
                        "median_us": medians[value] * 1e6,
                        "p20_us": p20 * 1e6,
                        "p80_us": p80 * 1e6,
                        "ratio": medians[value] / medians[present],
                    }
                )
            say(
                f"{asked} {name} {mode} {dtype}: "
                + "; ".join(f"{v} {t * 1e6:,.1f} us" for v, t in medians.items())
            )
    _forget()


def table(rows: list[Row]) -> str:
    """For each setting and pass: time as a multiple of the present one's, geometric mean, least and
    largest over all cases.
    """
    ratios: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        ratios[row["provider"], row["mode"]].append(row)
    lines = [
        "| setting | pass | mean of the present one's time | least | largest, where |",
        "|---|---|---:|---:|---|",
    ]
    for (provider, mode), alike in ratios.items():
        mean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in alike))
        least, most = (pick(alike, key=lambda row: row["ratio"]) for pick in (min, max))
        lines.append(
            f"| {provider} | {mode} | {mean:.3f} | {least['ratio']:.3f} | {most['ratio']:.3f}, "
            f"{most['workload']}, {most['dtype']} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.tune",
        description="Time the kernels with other values of their constants.",
    )
    parser.add_argument(
        "--only",
        default="",
        help=f"questions, of {','.join(q.name for q in QUESTIONS)} (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/tune.jsonl"),
        help="a .jsonl file to append the rows to",
    )
    options = parser.parse_args(arguments)
    only = [name for name in options.only.split(",") if name]
    if unknown := set(only) - {question.name for question in QUESTIONS}:
        parser.error(f"--only: unknown questions {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu.tune: torch finds no GPU")
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
