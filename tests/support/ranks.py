"""Tests in several processes, which torch.distributed joins over gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.small_inputs import small_up_to


def run_ranks(work: Callable[[int], object], count: int, folder: Path) -> None:
    """Run ``work(rank)`` in so many processes, small inputs on the fused path.

    Args:
        work: Raises where a check fails; processes are spawned, so it must be picklable.
        count: How many processes.
        folder: An empty one, where they find each other.
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
    # Torch 2.14 once aborted while a rank's interpreter shut down, after all checks: "terminate
    # called without an active exception".
    os._exit(0)
