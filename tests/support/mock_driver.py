"""A GPU that is not there: Triton launches up to the driver's call, which does nothing. For
measuring what a launch costs in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastflow_kernels import route
from fastflow_kernels.index_cache import IndexCache


def _yes(*_: object) -> bool:
    return True


class Utils:
    """Loads nothing, and says what an H100 says of itself."""

    def load_binary(self, *_: object) -> tuple[int | None, ...]:
        # no module: nothing to unload when the driver has gone
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
    """Where a launch ends: called with the grid, the stream, handles and hooks, and the kernel's
    arguments.
    """

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, *_: object) -> None:
        pass


class Driver:
    """An H100 as far as Triton's dispatcher asks."""

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
    """A context in which ``backend="triton"`` takes CPU tensors: kernels are compiled and launched,
    but nothing runs; results are garbage.

    As on a GPU, a permutation's values are not looked at in every call.

    Args:
        stand_in: What takes the launches instead.
    """
    driver.set_active(Driver() if stand_in is None else stand_in)
    try:
        with (
            mock.patch.object(route, "is_interpreted", new=_yes),
            mock.patch.object(IndexCache, "checks_values", new=False),
        ):
            yield
    finally:
        driver.set_active(None)  # found anew when it is asked for
