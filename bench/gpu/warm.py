"""Compile kernels on all cores at once, ahead of what launches them from a single process: time on
a GPU may be short.

    python -m bench.gpu.warm

Compiled is what bench/gpu/smallest.py, ``python -m fastflow_kernels check`` and the benchmarks of a
block launch: 546 binaries, for which one process takes 5 minutes (Triton 3.6 for sm_90, AMD EPYC).
Triton has the C compiler make a launcher as well, for each combination of argument types: 24 for
``check``, 0.7 s each. Later processes find all of it in Triton's cache.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from unittest import mock

import torch

from bench.providers import EAGER, PROVIDERS, why_not
from bench.subject import Subject, draw_samples
from bench.workloads import DTYPES, Workload, workloads
from fastflow_kernels import check
from tests.support import every_kernel

MOST_PROCESSES = 16  # each holds a CUDA context and the tensors of a workload
Job = tuple[Workload, str, str]


def jobs() -> list[Job]:
    """The (workload, dtype, provider) that launch kernels of ours, in the order of the
    benchmarks.
    """
    ours = [provider for provider in EAGER if provider.ours]
    found = workloads("block", on_cpu=False)
    return [
        (w, dtype, p.name)
        for w in found
        for dtype in DTYPES
        for p in ours
        if not why_not(p, w, on_cpu=False)
    ]


def run(job: Job, device: str) -> None:
    """A training step and an inverse, as the benchmarks run them."""
    workload, dtype, name = job
    samples = draw_samples("block", workload, getattr(torch, dtype), torch.device(device))[:1]
    subject = Subject("block", workload, PROVIDERS[name], samples)
    for mode in ("train", "inverse"):
        subject.results(mode)


def run_check(name: str) -> None:
    """What the check launches on one of its shapes."""
    with mock.patch.object(check, "GPU_SHAPES", {name: check.GPU_SHAPES[name]}):
        check.check(repeats=1)


def todo(device: str) -> dict[str, Callable[[], None]]:
    """What is to be run, by its name."""
    found: dict[str, Callable[[], None]] = {
        f"smallest {shape} GIN {gin}": partial(every_kernel.run_one, shape, gin, device)
        for shape in every_kernel.SHAPES
        for gin in (False, True)
    }
    found |= {f"check {name}": partial(run_check, name) for name in check.GPU_SHAPES}
    return found | {
        f"{job[0].name} {job[0].shape} {job[1]} {job[2]}": partial(run, job, device)
        for job in jobs()
    }


def in_parallel(calls: dict[str, Callable[[], None]]) -> list[str]:
    """Call everything, in as many processes as there are cores; the names of what failed, after
    saying why.
    """
    started, failed = time.perf_counter(), []
    processes = min(MOST_PROCESSES, os.cpu_count() or 1)
    # one thread each: all cores are taken
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        futures = {pool.submit(call): name for name, call in calls.items()}
        try:
            for future in as_completed(futures):
                if error := future.exception():
                    failed.append(futures[future])
                    print(f"{futures[future]}: {type(error).__name__}: {error}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    seconds = time.perf_counter() - started
    print(
        f"compiled {len(calls) - len(failed)} of {len(calls)} cases in {seconds:.0f} s, "
        f"{processes} processes",
        flush=True,
    )
    return failed


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu.warm: torch finds no GPU")
    if in_parallel(todo("cuda")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
