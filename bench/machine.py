"""Set torch up for measuring, and describe the machine in words."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch


def set_up_torch(threads: int) -> None:
    """Set the number of CPU threads, and switch TF32 off.

    TF32 would make the stock blocks' matrix products inexact, and two precisions would be compared.
    """
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def describe_machine() -> str:
    """Describe the processor, torch's threads, the GPU and the versions in one line.

    Returns:
        For instance ``"AMD EPYC, 2 cores, 2 torch threads, AVX2, no GPU; Linux x86_64, Python
        3.11.7, torch 2.13.0+cpu, triton 3.9.0"``.
    """
    cores, threads = _usable_cores(), torch.get_num_threads()
    hardware = [
        cpu_model(),
        f"{cores} core{'s' * (cores != 1)}",
        f"{threads} torch thread{'s' * (threads != 1)}",
        torch.backends.cpu.get_cpu_capability(),
        _gpu(),
    ]
    software = [
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"triton {version_of('triton')}",
    ]
    return f"{', '.join(hardware)}; {', '.join(software)}"


def _usable_cores() -> int:
    """Count the cores that this process may use. In a container the machine can have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Return the processor's name.

    The kernel is asked first, because ``platform.processor()`` is empty on most Linux systems.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str:
    """Return the number of GPUs and the name of the first one, or ``"no GPU"``."""
    if not torch.cuda.is_available():
        return "no GPU"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


def version_of(distribution: str) -> str:
    """Return the version of an installed distribution without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"
