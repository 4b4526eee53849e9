"""Compile kernels on all cores at once, ahead of what launches them from a single process: time on
a GPU may be short.

    python -m bench.warm

What bench/smallest.py, ``python -m fastflow_kernels check`` and the benchmarks of a block launch:
546 binaries, for which one process takes 5 minutes (Triton 3.6 for sm_90, AMD EPYC). Triton has the
C compiler make a launcher as well, for each combination of argument types: 24 for ``check``, 0.7 s
each. Later processes find all of it in Triton's cache.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial

import torch

from bench import smallest
from bench.cases import Workload, workloads
from bench.providers import PROVIDERS, block_class, why_not
from bench.run import DTYPES
from bench.subject import Subject, build_model, draw_samples
from fastflow_kernels import check

MOST_PROCESSES = 16  # each holds a CUDA context and the tensors of a workload
Job = tuple[Workload, str, str]


def jobs() -> list[Job]:
    """The (workload, dtype, provider) that launch kernels of ours, in the order of the
    benchmarks.
    """
    ours = [
        provider
        for provider in PROVIDERS.values()
        if provider.ours and provider.execution == "eager"
    ]
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
    build, _ = block_class(PROVIDERS["ours"])
    subject = Subject(
        "block",
        workload,
        PROVIDERS[name],
        samples,
        build_model("block", workload, build, "anomalib"),
    )
    for mode in ("train", "inverse"):
        subject.results(mode)


def run_check(name: str, dtype: str) -> None:
    """What the check launches on one of its shapes."""
    check._evaluate(
        check._backend("triton"), check._tensors(check.GPU_SHAPES[name], getattr(torch, dtype))
    )


def todo(device: str) -> dict[str, Callable[[], None]]:
    """What is to be run, by its name."""
    found = {
        f"smallest {shape} GIN {gin}": partial(smallest.run_one, shape, gin, device)
        for shape in smallest.SHAPES
        for gin in (False, True)
    }
    found |= {
        f"check {name} {dtype}": partial(run_check, name, dtype)
        for name in check.GPU_SHAPES
        for dtype in DTYPES
    }
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
        raise SystemExit("bench.warm: torch finds no GPU")
    if in_parallel(todo("cuda")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
