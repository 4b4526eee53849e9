"""Time the kernels with other values of the constants that divide their work (bench/TUNING.md).

    python -m bench.gpu.tune [--only rows,tile] [--out FILE.jsonl]

All variants are compiled first, on all cores. Then the settings of a question are timed in turn on
one workload, as in the other benchmarks (bench/timing.py). The GPU's own time counts, and inputs
are no longer in the L2 cache. Each row is written as soon as it is measured. A table at the end has
the time of every setting as a multiple of the present one's.
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
SECONDS = 0.4  # time limit of one group, once it has the least repeats


Setting = tuple[str, str, Any]  # module, constant, value


class Question(NamedTuple):
    """Values of constants to compare, and the workloads and passes where they could matter.

    Attributes:
        name: The question's name on the command line.
        settings: The present values first. Each setting has a value for every constant it names.
        workloads: Names of the workloads to time.
        passes: Names of the passes to time.
    """

    name: str
    settings: tuple[tuple[Setting, ...], ...]
    workloads: tuple[str, ...]
    passes: tuple[str, ...]


def settings_of(module: str, constant: str, *values: Any) -> tuple[tuple[Setting, ...], ...]:
    """Return one setting for each value of a constant."""
    return tuple(((module, constant, value),) for value in values)


def _row_tiles(constant: str) -> tuple[tuple[Setting, ...], ...]:
    """Return settings of the tiles of rows, the present one first."""
    present = getattr(plan, constant)
    tiles = [plan.RowTiles(values, busy) for values in (4, 2, 1) for busy in (256, 512, 1024)]
    return settings_of("plan", constant, present, *(tile for tile in tiles if tile != present))


_PLANES = ("fastflow-wrn50/1", "fastflow-wrn50/3", "fastflow-r18/1")
_ROWS = ("cflow/1", "cflow large batch", "tabular", "hyperspectral")
# The most promising ones first: a run that is stopped early has answered what matters most.
QUESTIONS = (
    Question("rows", _row_tiles("BACKWARD_ROWS"), _ROWS, ("backward", "reversible")),
    Question("forward-rows", _row_tiles("FORWARD_ROWS"), _ROWS, ("forward", "inverse")),
    Question(
        "tile",
        settings_of("plan", "TILE_BYTES", 4096, 2048, 8192),
        _PLANES,
        ("forward", "backward", "inverse", "reversible"),
    ),
    Question(
        "columns",
        settings_of("plan", "COLUMNS_WITH_SUMS", 64, 32, 128),
        ("fastflow-wrn50/1", "fastflow-wrn50/3"),
        ("backward",),
    ),
    Question(
        "sums",
        settings_of("plan", "SUMS_BLOCK_GROUPS", 256, 64, 128, 512),
        ("fastflow-cait", "fastflow-r18/3", "tabular"),
        ("backward",),
    ),
)


def module_of(name: str) -> ModuleType:
    from fastflow_kernels.engines.triton import backward, forward, inverse

    return {"plan": plan, "backward": backward, "forward": forward, "inverse": inverse}[name]


def label(setting: tuple[Setting, ...]) -> str:
    """Format the constants and their values, as rows name them."""
    return ", ".join(
        f"{constant}={tuple(value) if isinstance(value, tuple) else value}"
        for _, constant, value in setting
    )


@contextlib.contextmanager
def _patched_constants(setting: tuple[Setting, ...]) -> Iterator[None]:
    """Give the constants these values within the context, and let launches be prepared again."""
    with contextlib.ExitStack() as stack:
        for module, constant, value in setting:
            stack.enter_context(mock.patch.object(module_of(module), constant, value))
        _clear_prepared_launches()
        yield


def _clear_prepared_launches() -> None:
    """Clear the caches of prepared launches, which depend on the constants."""
    for module in ("plan", "backward", "forward", "inverse"):
        for function in vars(module_of(module)).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


class Variant:
    """The launches of one workload with other values of constants.

    ``ready`` prepares the launches, so that the calls only launch.
    """

    def __init__(self, setting: tuple[Setting, ...], passes: Passes) -> None:
        self.setting, self.passes = setting, passes

    def ready(self, mode: str, calls: int) -> list[Callable[[], object]]:
        with _patched_constants(self.setting):
            self.passes.calls(mode, 1)[0]()  # prepares the launches
        return self.passes.calls(mode, calls)


Job = tuple[Question, tuple[Setting, ...], Workload, str]


def jobs(only: Iterable[str] = (), chosen: Iterable[Question] = QUESTIONS) -> list[Job]:
    """Return each (question, setting, workload, dtype).

    Jobs that differ only in the setting follow each other. ``only`` holds names of questions. If it
    is empty, all of ``chosen`` count.
    """
    known = {workload.name: workload for workload in workloads("block", on_cpu=False)}
    return [
        (question, setting, known[name], dtype)
        for question in chosen
        if not only or question.name in only
        for name in question.workloads
        for dtype in DTYPES
        for setting in question.settings
    ]


def name_of(job: Job) -> str:
    _, setting, workload, dtype = job
    return f"{label(setting)} {workload.name} {dtype}"


def compile_variant(job: Job, device: str) -> None:
    """Launch everything once, so that it is in Triton's cache."""
    question, setting, workload, dtype = job
    variant = Variant(
        setting, Passes(workload, getattr(torch, dtype), torch.device(device), most=1)
    )
    for mode in question.passes:
        variant.ready(mode, 0)


def measure(
    todo: list[Job], device: torch.device, keep: Callable[[Row], None], say: Callable[[str], None]
) -> None:
    """Time all settings of each case in turn, and pass a row for each to ``keep``."""
    cases: dict[tuple[str, str, str], list[Job]] = defaultdict(list)
    for job in todo:
        cases[job[0].name, job[2].name, job[3]].append(job)
    for (_, name, dtype), case_jobs in cases.items():
        question, _, workload, _ = case_jobs[0]
        passes = Passes(workload, getattr(torch, dtype), device)
        variants = {label(setting): Variant(setting, passes) for _, setting, *_ in case_jobs}
        present = label(question.settings[0])
        for mode in question.passes:
            times = interleaved(variants, mode, device, REPEATS, SECONDS)
            medians = {value: statistics.median(t.seconds) for value, t in times.items()}
            for value, measured in times.items():
                p20, *_, p80 = statistics.quantiles(measured.seconds, n=5)
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
                f"{question.name} {name} {mode} {dtype}: "
                + "; ".join(f"{value} {t * 1e6:,.1f} us" for value, t in medians.items())
            )
    _clear_prepared_launches()


def table(rows: list[Row]) -> str:
    """Format a table: for each setting and pass, its time divided by the present setting's.

    The columns are the geometric mean, the least and the largest ratio over all cases.
    """
    cases: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cases[row["provider"], row["mode"]].append(row)
    lines = [
        "| setting | pass | time / present setting's, mean | least | largest, where |",
        "|---|---|---:|---:|---|",
    ]
    for (provider, mode), case_rows in cases.items():
        mean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in case_rows))
        least, most = (pick(case_rows, key=lambda row: row["ratio"]) for pick in (min, max))
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
    known = [question.name for question in QUESTIONS]
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        default="",
        help=f"questions, chosen from {', '.join(known)} (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        default=Path("out/tune.jsonl"),
        help="file to append the rows to (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    only = [name for name in options.only.split(",") if name]
    if unknown := set(only) - set(known):
        parser.error(
            f"--only: expected questions among {', '.join(known)}; got {', '.join(sorted(unknown))}"
        )
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu.tune: torch finds no GPU")
    device, start, rows = torch.device("cuda"), time.perf_counter(), []
    todo = jobs(only)
    failed = warm.run_in_parallel(
        {name_of(job): partial(compile_variant, job, "cuda") for job in todo}
    )
    where = records.provenance(device) | {"copy_gbs": copy_bandwidth(device) * 1e-9}

    def keep(row: Row) -> None:
        rows.append(row | where)
        records.append(rows[-1:], options.out)

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {line}", file=sys.stderr, flush=True)

    measure([job for job in todo if name_of(job) not in failed], device, keep, say)
    print(table(rows))
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
