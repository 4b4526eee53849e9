"""Run the benchmarks over all groups: measure each, print it and record it, within the budget."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from bench import records
from bench.choice import Choice, Group
from bench.measure import Outcome, Settings, Task
from bench.records import Row
from bench.timing import copy_bandwidth

REPEATS = {"cpu": (5, 25), "cuda": (5, 11)}  # fewer on a GPU, whose time is limited


def compare(choice: Choice, seconds: float, budget: float, target: Path) -> int:
    """Measure all groups, and append their rows to a file or folder.

    Args:
        choice: What is measured.
        seconds: Time limit for the repetitions of one group.
        budget: Seconds after which no new group is started.
        target: The folder or ``.jsonl`` file that the rows are appended to.

    Returns:
        The exit status: 1 if a provider's results are wrong or ours cannot run, otherwise 0.
    """
    start, failed = time.perf_counter(), False
    device = choice.device
    settings = Settings(device, REPEATS[device.type], seconds, copy_bandwidth(device))
    provenance = records.provenance(device)

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {line}", file=sys.stderr, flush=True)

    say(
        f"{provenance['device_name']}: a large copy reaches "
        f"{settings.copy_bandwidth * 1e-9:.1f} GB/s; rows are appended to {target}"
    )
    task: Task | None = None
    not_started: list[Group] = []
    for group in choice.groups():
        if time.perf_counter() - start > budget:
            not_started.append(group)
            continue
        if task is None or not task.is_of(group):
            task = None  # free the last task's memory first
            if device.type == "cuda":
                torch.cuda.empty_cache()
            task = Task(group, choice.with_ours(group.workload.block), settings)
        outcomes = task.measure(group.mode)
        failed |= any(outcome.failure for outcome in outcomes.values())
        if outcomes["ours"].failure is None:
            # a failed peer too, with its reason: otherwise an older row would stand in for it
            rows = (outcome.row | provenance for outcome in outcomes.values())
            records.append(rows, target)
        say(f"{group}: {_describe(outcomes)}")
    for group in not_started:
        say(f"left out, because the budget of {budget:.0f} s was spent: {group}")
    return int(failed)


def _describe(outcomes: dict[str, Outcome]) -> str:
    parts = []
    for name, outcome in outcomes.items():
        if outcome.failure:
            parts.append(f"{name} FAILED ({outcome.failure})")
        elif "median_us" in outcome.row:
            parts.append(f"{name} {_figure(outcome.row, 'median_us', 'ratio')}")
            if "call_bytes" in outcome.row:  # on a GPU
                parts[-1] += f", as called {_figure(outcome.row, 'wall_us', 'ratio_wall')}"
    return "; ".join(parts)


def _figure(row: Row, time: str, ratio: str) -> str:
    is_ours = row["provider"].startswith("ours") or row[ratio] is None
    return f"{row[time]:,.0f} us" + ("" if is_ours else f" ({row[ratio]:.2f}x ours)")
