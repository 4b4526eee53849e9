"""Run tests in several processes, which torch.distributed joins over gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.small_inputs import small_up_to


def run_ranks(work: Callable[[int], object], count: int, folder: Path) -> None:
    """Run ``work(rank)`` in several processes, with small inputs on the fused path.

    Args:
        work: Function that raises if a check fails. It must be picklable, because processes are
            spawned.
        count: Number of processes.
        folder: Empty folder that the processes use to find each other.
    """
    torch.multiprocessing.spawn(_run_rank, (work, count, folder), nprocs=count)


def _run_rank(rank: int, work: Callable[[int], object], count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count
    )
    try:
        with small_up_to(0):
            work(rank)
    finally:
        dist.destroy_process_group()
    # Skip the interpreter's shutdown, in which torch 2.14 once aborted a rank after all checks
    # ("terminate called without an active exception").
    os._exit(0)
