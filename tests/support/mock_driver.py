"""A mock of the CUDA driver, to measure the overhead of a launch in Python without a GPU.

Triton prepares each launch up to the driver's call, which does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastflow_kernels.engines import available
from fastflow_kernels.index_cache import IndexCache


def _yes(*_: object) -> bool:
    return True


class Utils:
    """The driver's functions: they load nothing, and report the properties of an H100."""

    def load_binary(self, *_: object) -> tuple[int | None, ...]:
        # Without a module, nothing is unloaded after the driver was replaced.
        module, function, registers, spills, most_threads = None, 1, 32, 0, 1024
        known = (module, function, registers, spills)
        return known if triton.__version__.startswith("3.3.") else (*known, most_threads)

    def unload_module(self, *_: object) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "max_num_regs": 65536,
        }


class Launcher:
    """A launcher that does nothing.

    Triton calls it with the grid, the stream, handles and hooks, and the kernel's arguments.
    """

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, *_: object) -> None:
        pass


class Driver:
    """The parts of an H100's driver that Triton's dispatcher uses."""

    utils = Utils()
    launcher_cls = Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def set_current_device(self, device: int) -> None:
        pass

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextmanager
def mock_gpu(stand_in: Driver | None = None) -> Iterator[None]:
    """Let ``backend="triton"`` take CPU tensors.

    Kernels are compiled and launched, but none runs, so results are garbage. As on a GPU, calls do
    not check the values of a permutation.

    Args:
        stand_in: Driver that takes the launches instead.
    """
    driver.set_active(Driver() if stand_in is None else stand_in)
    try:
        with (
            mock.patch.object(available, "is_interpreted", new=_yes),
            mock.patch.object(IndexCache, "checks_values", new=False),
        ):
            yield
    finally:
        driver.set_active(None)  # Triton looks for the real driver at the next use
