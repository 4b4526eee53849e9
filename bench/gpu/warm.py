"""Compile kernels on all cores, so that programs that run in one process find them compiled.

    python -m bench.gpu.warm

Use it where time on a GPU is limited. It compiles what bench/gpu/smallest.py, ``python -m
fastflow_kernels check`` and the benchmarks of a block launch: 546 binaries. One process would take
5 minutes for them (Triton 3.6 for sm_90, AMD EPYC). Triton also lets the C compiler make a launcher
for each combination of argument types: 24 for ``check``, 0.7 s each. It also compiles the blocks
that ``ci/gpu.sh OUTDIR graphs`` measures. Later processes find everything in the caches of Triton,
Inductor and AOTAutograd.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from unittest import mock

import torch

from bench.machine import set_up_torch
from bench.providers import EAGER, PROVIDERS, why_not
from bench.subject import Subject, draw_samples
from bench.workloads import DTYPES, Workload, workloads
from fastflow_kernels import check
from tests.support import every_kernel

MOST_PROCESSES = 16  # each holds a CUDA context and the tensors of a workload
Job = tuple[Workload, str, str]
# What `ci/gpu.sh OUTDIR graphs` measures, as far as torch.compile makes it.
COMPILED = ("ours-compiled", "freia-compiled", "anomalib-graphs", "freia-graphs")
COMPILED_WORKLOADS = ("cflow/1", "tabular", "fastflow-wrn50/1")


def compiled_jobs() -> list[Job]:
    """Return each (workload, dtype, provider) that torch.compile has to compile."""
    known = {workload.name: workload for workload in workloads("block", on_cpu=False)}
    return [
        (known[name], "float32", provider) for name in COMPILED_WORKLOADS for provider in COMPILED
    ]


def jobs() -> list[Job]:
    """Return each (workload, dtype, provider) that launches our kernels, in benchmark order."""
    ours = [provider for provider in EAGER if provider.is_ours]
    return [
        (workload, dtype, provider.name)
        for workload in workloads("block", on_cpu=False)
        for dtype in DTYPES
        for provider in ours
        if not why_not(provider, workload, on_cpu=False)
    ]


def run(job: Job, device: str) -> None:
    """Run a training step, and eagerly an inverse, as the benchmarks do."""
    workload, dtype, name = job
    is_eager = PROVIDERS[name].execution == "eager"
    if not is_eager:
        torch._dynamo.reset()  # otherwise it soon refuses to compile another block
    samples = draw_samples("block", workload, getattr(torch, dtype), torch.device(device))[:1]
    subject = Subject("block", workload, PROVIDERS[name], samples)
    for mode in ("train", "inverse") if is_eager else ("train",):
        subject.results(mode)


def run_check(name: str) -> None:
    """Run what ``python -m fastflow_kernels check`` launches on one of its shapes."""
    with mock.patch.object(check, "GPU_SHAPES", {name: check.GPU_SHAPES[name]}):
        check.check(repeats=1)


def calls_to_warm(device: str) -> dict[str, Callable[[], None]]:
    """Return the calls that launch every kernel to compile, by name. The longest come first."""

    def runs(jobs: list[Job]) -> dict[str, Callable[[], None]]:
        return {
            f"{job[0].name} {job[0].shape} {job[1]} {job[2]}": partial(run, job, device)
            for job in jobs
        }

    calls = runs(compiled_jobs()) | {
        f"smallest {shape} GIN {gin}": partial(every_kernel.run_one, shape, gin, device)
        for shape in every_kernel.SHAPES
        for gin in (False, True)
    }
    calls |= {f"check {name}": partial(run_check, name) for name in check.GPU_SHAPES}
    return calls | runs(jobs())


def pool(processes: int) -> ProcessPoolExecutor:
    """Return processes whose compiled blocks the benchmarks find in Inductor's cache."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, spawn, initializer=_prepare_process)


def _prepare_process() -> None:
    # The settings of torch are part of a cache's key. One thread, as all cores are in use.
    set_up_torch(threads=1)
    # The key also names the first module that has imported torch. In a spawned process that is the
    # main program under this name.
    sys.modules.pop("__mp_main__", None)


def run_in_parallel(calls: dict[str, Callable[[], None]]) -> list[str]:
    """Run all calls in as many processes as there are cores, and print why a call failed.

    Returns:
        The names of the calls that failed.
    """
    start, failed = time.perf_counter(), []
    processes = min(MOST_PROCESSES, os.cpu_count() or 1)
    with pool(processes) as executor:
        futures = {executor.submit(call): name for name, call in calls.items()}
        try:
            for future in as_completed(futures):
                if error := future.exception():
                    failed.append(futures[future])
                    print(f"{futures[future]}: {type(error).__name__}: {error}", flush=True)
        except KeyboardInterrupt:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    seconds = time.perf_counter() - start
    print(
        f"compiled {len(calls) - len(failed)} of {len(calls)} cases in {seconds:.0f} s with "
        f"{processes} processes",
        flush=True,
    )
    return failed


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu.warm: torch finds no GPU")
    # Otherwise Inductor starts processes of its own in each process.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if run_in_parallel(calls_to_warm("cuda")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
