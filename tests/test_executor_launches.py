"""Test that the executor of compiled kernels runs what Triton launches."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("needs a process without TRITON_INTERPRET (ci/kernels.sh)", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fastflow_kernels.coupling import Coupling, CouplingSpec
from fastflow_kernels.engines.triton import engine, forward, launch
from tests.support.executor import EXECUTOR, gpu, watched
from tests.support.ptx import fault

pytestmark = pytest.mark.kernels


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, stride_x, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride_x, mask=i < N), mask=i < N)


def copy_launch(programs: int) -> launch.Launch:
    return launch.Launch(_copy_kernel, programs, 1, {"N": 100, "stride_x": 1, "BLOCK": 64})


def copy(is_aligned: bool, x: torch.Tensor, copying: launch.Launch) -> torch.Tensor:
    y = torch.zeros(x.shape)
    copying(is_aligned, x, y)
    return y


def test_a_triton_kernel_runs():
    copying = copy_launch(3)
    x = torch.randn(100)
    with gpu():
        assert torch.equal(copy(True, x, copying), x)
        assert torch.equal(copy(True, x, copying), x)  # takes the cached binary


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    "dtype",
    [torch.int32, torch.int64, torch.int8, torch.uint8, torch.bool, torch.bfloat16, torch.float64],
)
def test_a_triton_kernel_that_is_launched_as_usual(dtype):
    """Launch with and without options; Triton warns about its future default for fp fusion."""
    x = torch.randint(2, (100,)).to(dtype)
    with gpu():
        for options in ({}, {"num_warps": 2}, {"num_stages": 2, "num_warps": 1}):
            y = torch.zeros_like(x)
            _copy_kernel[(2,)](x, y, 100, 1, BLOCK=64, **options)
            assert torch.equal(x, y)


def test_a_fault_names_the_line_the_element_and_the_program():
    with (
        gpu(),
        fault(
            r"_copy_kernel: test_executor_launches.py:\d+: .*x_ptr \(90,\) .* "
            r"element 90 of 90, program 1, thread \d+"
        ),
    ):
        _copy_kernel[(2,)](torch.zeros(90), torch.zeros(100), 100, 1, BLOCK=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda copying, x: copy(True, x[1:], copying), "taken for a multiple of 16"),
        (lambda copying, x: copy(True, x.double(), copying), "torch.float64 for \\*fp32"),
        (
            lambda copying, x: copy(True, x, _change(copying, (96, 1, 64))),
            "would choose another binary",
        ),
        (
            lambda copying, x: copy(True, x, _change(copying, (100, 1, 32))),
            "where 64 was compiled in",
        ),
        (
            lambda copying, x: copy(True, x, _change(copying, (100, 2, 64))),
            "where 1 was compiled in",
        ),
        (lambda copying, x: copy(True, x, _change(copying, (2**31, 1, 64))), "as i32"),
        (lambda copying, x: copy(True, x, _change(copying, (100, 1))), "4 arguments for 5"),
    ],
    ids=["pointer", "dtype", "divisible", "constexpr", "one", "too large", "too few"],
)
def test_a_binary_that_was_compiled_for_other_arguments(change, message):
    copying = copy_launch(2)
    x = torch.randn(112)
    with gpu():
        copy(True, x, copying)
        with fault(message):
            change(copying, x)


def _change(copying: launch.Launch, tail: tuple[int, ...]) -> launch.Launch:
    copying._tail = tail
    return copying


def test_it_leaves_no_trace():
    spec = CouplingSpec.of(1.9, "anomalib", "SOFTPLUS", False)
    coupling = Coupling(torch.randn(4), torch.randn(4), spec)
    with gpu():
        engine.forward(torch.randn(2, 4), torch.randn(2, 4), coupling)
    for value in vars(forward).values():
        if isinstance(value, JITFunction):
            assert not value.device_caches
        elif hasattr(value, "cache_info"):
            assert value.cache_info().currsize == 0
    assert EXECUTOR.launches is None


def test_fresh_memory_is_poisoned_where_it_is_watched():
    empty = torch.empty
    with watched() as launches, gpu():
        assert torch.empty(2).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
        assert torch.zeros(1).new_empty(2).isnan().all()
        copy(True, torch.randn(100), copy_launch(2))
    assert torch.empty is empty
    (launch,) = launches
    assert (launch.kernel, launch.loaded, launch.stored) == (
        "_copy_kernel",
        {"x_ptr": 400},
        {"y_ptr": 400},
    )


def test_a_warm_up_that_is_not_aligned_prepares_aligned_launches(monkeypatch):
    """While a CUDA graph is captured, nothing can be compiled or loaded."""

    def refuse(*_: object) -> None:
        raise AssertionError("the dispatcher was asked again")

    copying = copy_launch(2)
    x = torch.randn(101)
    with gpu():
        assert torch.equal(copy(False, x[1:], copying), x[1:])
        monkeypatch.setattr(JITFunction, "run", refuse)
        assert torch.equal(copy(True, x[:100], copying), x[:100])
