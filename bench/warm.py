"""Compile the kernels that the benchmarks of a block launch, on all cores at once: time on a borrowed GPU is short.

    python -m bench.warm

One process takes 5 minutes for these 546 binaries (Triton 3.6 for sm_90, AMD EPYC). The benchmarks find them in Triton's cache.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from bench.cases import Workload, workloads
from bench.providers import PROVIDERS, block_class, why_not
from bench.run import DTYPES
from bench.subject import Subject, build_model, draw_samples

MOST_PROCESSES = 16  # each holds a CUDA context and the tensors of a workload
Job = tuple[Workload, str, str]


def jobs(on_cpu: bool) -> list[Job]:
    """The (workload, dtype, provider) that launch kernels of ours, in the order of the benchmarks."""
    ours = [provider for provider in PROVIDERS.values() if provider.ours and provider.execution == "eager"]
    return [(w, dtype, p.name) for w in workloads("block", on_cpu) for dtype in DTYPES for p in ours if not why_not(p, w, on_cpu)]


def run(job: Job, device: str) -> None:
    """A training step and an inverse, as the benchmarks run them."""
    workload, dtype, name = job
    samples = draw_samples("block", workload, getattr(torch, dtype), torch.device(device))[:1]
    build, _ = block_class(PROVIDERS["ours"])
    subject = Subject("block", workload, PROVIDERS[name], samples, build_model("block", workload, build, "anomalib"))
    for mode in ("train", "inverse"):
        subject.results(mode)


def in_parallel(run: Callable[[Any, str], None], todo: list[Any]) -> list[Any]:
    """Call ``run(job, "cuda")`` for every job, in as many processes as there are cores; those that failed, after saying why."""
    started, failed = time.perf_counter(), []
    processes = min(MOST_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, job, "cuda"): job for job in todo}
        for future in as_completed(futures):
            if error := future.exception():
                failed.append(futures[future])
                print(f"{futures[future]}: {type(error).__name__}: {error}", flush=True)
    seconds = time.perf_counter() - started
    print(f"compiled {len(todo) - len(failed)} of {len(todo)} cases in {seconds:.0f} s, {processes} processes", flush=True)
    return failed


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.warm: torch finds no GPU")
    if in_parallel(run, jobs(on_cpu=False)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
