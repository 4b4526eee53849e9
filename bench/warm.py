"""Compile the kernels that the benchmarks of a block launch, on all cores at once: time on a borrowed GPU is short.

    python -m bench.warm

One process takes 5 minutes for these 546 binaries (Triton 3.6 for sm_90, AMD EPYC). The benchmarks find them in Triton's cache.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

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


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench.warm: torch finds no GPU")
    started, todo = time.perf_counter(), jobs(on_cpu=False)
    processes = min(MOST_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, job, "cuda"): job for job in todo}
        failed = []
        for future in as_completed(futures):
            if error := future.exception():
                failed.append(futures[future])
                workload, dtype, name = futures[future]
                print(f"{workload.name} {dtype} {name}: {type(error).__name__}: {error}", flush=True)
    print(f"warmed {len(todo) - len(failed)} of {len(todo)} cases in {time.perf_counter() - started:.0f} s, {processes} processes")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
