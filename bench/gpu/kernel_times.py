"""Measure what each kernel takes by itself on this GPU.

    python -m bench.gpu.kernel_times [--only NAME,...] [--out FILE.jsonl]
    ncu --clock-control none --section SpeedOfLight python -m bench.gpu.kernel_times --once

The second form runs every kernel once under a profiler such as ncu.

Times are the GPU's own (CUPTI, through torch.profiler), without Python and without the launch.
Inputs take turns, so that none is still in the L2 cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import records
from bench.gpu.passes import Passes
from bench.records import Row
from bench.timing import copy_bandwidth
from bench.workloads import DTYPES, WORKLOADS, Workload
from tests.support.kernel_passes import PASSES

CALLS = 20
DEFAULT = (
    "fastflow-wrn50/1",
    "fastflow-wrn50/3",
    "fastflow-r18/1",
    "fastflow-cait",
    "cflow/1",
    "cflow large batch",
    "tabular",
    "hyperspectral",
)


def measure(workload: Workload, dtype: str, device: torch.device) -> list[Row]:
    """Return a row for every kernel of every pass."""
    passes, rows = Passes(workload, getattr(torch, dtype), device), []
    for name in PASSES:
        for call in passes.calls(name, 3):  # compile, and fill the allocator's pool
            call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for call in passes.calls(name, CALLS):
                call()
            torch.cuda.synchronize()
        rows += rows_of(profiler.events(), workload, name, dtype)
    return rows


def run_once(workload: Workload, dtype: str, device: torch.device) -> None:
    """Run every kernel of every pass once."""
    passes = Passes(workload, getattr(torch, dtype), device, most=1)
    for name in PASSES:
        passes.calls(name, 1)[0]()
    torch.cuda.synchronize()


def rows_of(events: Iterable[Any], workload: Workload, mode: str, dtype: str) -> list[Row]:
    """Return a row for every kernel of ours among a profiler's events."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.name.endswith("_kernel") and event.device_time:
            times[event.name].append(event.device_time)
    rows = []
    for kernel, microseconds in times.items():
        low, *_, high = statistics.quantiles(microseconds, n=5)
        identity = {
            "kind": "kernel",
            "workload": workload.name,
            "shape": list(workload.shape),
            "mode": mode,
            "dtype": dtype,
        }
        figures = {
            "median_us": statistics.median(microseconds),
            "p20_us": low,
            "p80_us": high,
            "repeats": len(microseconds),
        }
        rows.append(identity | {"provider": kernel} | figures)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.kernel_times",
        description="Measure what each kernel takes by itself on this GPU.",
    )
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        default=",".join(DEFAULT),
        help="workloads (bench/workloads.py; default: %(default)s)",
    )
    parser.add_argument(
        "--once", action="store_true", help="run every kernel once for a profiler, time nothing"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        default=Path("out/kernels.jsonl"),
        help="file to append the rows to (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    known = {workload.name: workload for workload in WORKLOADS}
    names = [name for name in options.only.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        parser.error(
            f"--only: expected workloads among {', '.join(known)}; got {', '.join(unknown)}"
        )
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu.kernel_times: torch finds no GPU")
    device = torch.device("cuda")
    if options.once:
        for name in names:
            for dtype in DTYPES:
                run_once(known[name], dtype, device)
        return
    where = records.provenance(device) | {"copy_gbs": copy_bandwidth(device) * 1e-9}
    for name in names:
        for dtype in DTYPES:
            rows = measure(known[name], dtype, device)
            records.append((row | where for row in rows), options.out)
            parts = (
                f"{row['mode']} {row['provider'].strip('_').removesuffix('_kernel')} "
                f"{row['median_us']:.1f} us"
                for row in rows
            )
            print(f"{name} {dtype}: {', '.join(parts)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
